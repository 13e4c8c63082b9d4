"""From the names and tensors of a checkpoint to those of a model, by transformers' own mapping, without reading anything.

Converters made of operations that only move elements become lazy tensors (`lazy`); others are run on whole tensors when needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from commgraph.integrations.transformers.lazy import Converted, Joined, Part, Stacked, Transposed
from commgraph.nn.shards import Slice

__all__ = ["converted"]

Sources = dict[str, list[Slice]]


def converted(model: Any, checkpoint: Mapping[str, Slice]) -> dict[str, Slice]:
    """Return the full tensors of a model by its names, out of those of a checkpoint by theirs.

    Args:
        model: whole, before it is cut; it may be without memory.
        checkpoint: name -> full tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Slice] = {}
    groups: dict[str, tuple[Any, Sources, list[tuple[str, str]]]] = {}
    for key in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if pattern is None:
            found[name] = checkpoint[key]
            continue
        _, sources, keys = groups.setdefault(name, (by_pattern[pattern], {}, []))
        sources.setdefault(pattern, []).append(checkpoint[key])
        keys.append((key, pattern))
    for first, (converter, sources, keys) in groups.items():
        lazy = _lazy(converter, {pattern: list(slices) for pattern, slices in sources.items()}, first, model, known)
        found |= _eager(converter, keys, checkpoint, first, model) if lazy is None else lazy
    return found


def _lazy(converter: Any, sources: Sources, first: str, model: Any, known: Mapping[str, torch.Tensor]) -> dict[str, Slice] | None:
    """Return the results of a converter as lazy tensors; None where an operation does more than moving elements."""
    values: dict[str, Any] = sources
    for operation in converter.operations:
        step = STEPS.get(type(operation).__name__)
        if step is None:
            return None
        values = step(operation, values, converter, first, model, known)
    at = next((pattern for pattern in values if pattern in first), None)
    before, _, behind = first.partition(at) if at is not None else ("", "", "")
    return {before + pattern + behind: _one(value) for pattern, value in values.items()}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _stack(operation: Any, values: dict[str, Any], converter: Any, *_: Any) -> dict[str, Any]:
    single = len(values) == 1 and len(converter.target_patterns) == 1
    return {converter.target_patterns[0] if single else name: Stacked(tuple(parts), operation.dim) for name, parts in values.items()}


def _join(operation: Any, values: dict[str, Any], converter: Any, *_: Any) -> dict[str, Any]:
    parts = []
    for pattern in converter.source_patterns:
        value = values.get(pattern, [])
        parts += value if isinstance(value, list) else [value]
    return {converter.target_patterns[0]: Joined(tuple(parts), operation.dim)}


def _chunk(operation: Any, values: dict[str, Any], converter: Any, first: str, model: Any, known: Any) -> dict[str, Any]:
    del first, known
    (value,) = map(_one, values.values())
    targets = operation.get_target_patterns(converter.target_patterns, config=model.config)
    dim, total = operation.dim, value.get_shape()[operation.dim]
    size = -(-total // len(targets))  # as torch.chunk
    return {target: Part(value, dim, place * size, min((place + 1) * size, total)) for place, target in enumerate(targets)}


def _split(operation: Any, values: dict[str, Any], converter: Any, first: str, model: Any, known: Any) -> dict[str, Any]:
    del model
    (value,) = map(_one, values.values())
    parts, begin = {}, 0
    for target in converter.target_patterns:
        size = known[first.replace(converter.target_patterns[0], target)].shape[operation.dim]
        parts[target] = Part(value, operation.dim, begin, begin + size)
        begin += size
    return parts


def _transpose(operation: Any, values: dict[str, Any], converter: Any, first: str, model: Any, known: Any) -> dict[str, Any]:
    del model
    target = operation.get_target_pattern(values, converter.source_patterns, converter.target_patterns)
    value = _one(next(iter(values.values())))
    stays = operation.check_dims and tuple(value.get_shape()) == tuple(known[first].shape)
    dims = (operation.dim0 % len(value.get_shape()), operation.dim1 % len(value.get_shape()))
    return {target: value if stays else Transposed(value, dims)}


STEPS: Mapping[str, Callable[..., dict[str, Any]]] = MappingProxyType(
    {"MergeModulelist": _stack, "Concatenate": _join, "Chunk": _chunk, "Split": _split, "Transpose": _transpose}
)


def _eager(converter: Any, keys: Sequence[tuple[str, str]], checkpoint: Mapping[str, Slice], first: str, model: Any) -> dict[str, Slice]:
    """Return the results of a converter, computed from whole tensors when one is asked for."""
    results: dict[str, torch.Tensor] = {}

    def result(name: str) -> torch.Tensor:
        if not results:
            own = copy.deepcopy(converter)
            for key, pattern in keys:
                own.add_tensor(first, key, pattern, checkpoint[key][...])
            for target, value in own.convert(first, model=model, config=model.config).items():
                results[target] = _one(value)
        return results.pop(name)

    names = [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
    return {name: Converted(lambda name=name: result(name)) for name in names}  # type: ignore[misc]  # a default, bound early
