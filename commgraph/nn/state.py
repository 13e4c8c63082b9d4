"""Full checkpoints to models with parallel layers, and back."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

from commgraph.errors import ConfigurationError
from commgraph.nn.places import NameMapping, label, places_of, renamed
from commgraph.nn.shards import Full, Shard

__all__ = ["LoadReport", "full_state_dict", "load_full_state_dict"]


@attrs.frozen
class LoadReport:
    """Differences between a model and a checkpoint.

    Attributes:
        missing: tensors of the model that the checkpoint lacks, as ``"layers.0.qkv_proj.weight[k]"`` where one shard is.
        unexpected: names in the checkpoint without a tensor in the model.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@torch.no_grad()
def load_full_state_dict(
    model: nn.Module, full_state: Mapping[str, Full], *, mapping: NameMapping | None = None, strict: bool = True, adopt: bool = False
) -> LoadReport:
    """Loads a checkpoint of the unsharded model; each rank takes its share. Not collective.

    Example:
        A Llama of Hugging Face, into layers that compute several of its projections at once::

            load_full_state_dict(model, checkpoint, mapping={
                "q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
                "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
            })

    Args:
        model: any module; its parallel layers take their cut, every other parameter and persistent buffer the whole tensor.
        full_state: name -> full tensor, of any dtype and device; each is looked up once, so that a mapping may read it on demand. Of slices
            (``{name: file.get_slice(name) for name in file.keys()}`` of a ``safetensors.safe_open``) only this rank's parts are read.
        mapping: how names differ: whole dotted parts (``"q_proj"``, ``"transformer.h"``, never pieces of words), each entry used at its
            first place in a name, in order. See `NameMapping`.
        strict: whether missing and unexpected names are an error. A pipeline stage, which takes some layers of a checkpoint, passes False
            and reads the report.
        adopt: a part that is read in one piece, contiguous, and of the parameter's dtype and device becomes the parameter's memory and
            is not copied. Of a file that safetensors maps such parameters stay in the file, and take memory once they are written.

    Returns:
        The missing and unexpected names.

    Raises:
        ConfigurationError: names do not fit, before anything is loaded; or a tensor's shape does not, naming it, the shape and the rank.
    """
    places = places_of(model)
    wanted: dict[str, tuple[str, Shard | None]] = {}
    taken: dict[tuple[int, Shard | None], str] = {}
    unexpected = []
    for name in full_state:
        if (target := renamed(name, mapping)) is None:
            continue
        path, shard = target
        if path not in places or shard not in (None, *places[path].shards):
            unexpected.append(name)
            continue
        wanted[name] = path, shard
        # A tensor that the model has under two names may be in the checkpoint under both.
        first = taken.setdefault((id(places[path].tensor), shard), name)
        if first != name and wanted[first][0] == path:
            raise ConfigurationError(f"load_full_state_dict: {first!r} and {name!r} would both be loaded into {label(path, shard)}")
    missing = [
        label(path, shard)
        for path, place in places.items()
        if (id(place.tensor), None) not in taken
        for shard in place.shards
        if (id(place.tensor), shard) not in taken
    ]
    if strict and (missing or unexpected):
        raise ConfigurationError(
            f"load_full_state_dict: the checkpoint does not fit {type(model).__name__}. Missing: {', '.join(missing) or 'nothing'}. "
            f"Unexpected: {', '.join(unexpected) or 'nothing'}. Names are mapped by mapping={dict(mapping or {})}"
        )
    for name, (path, shard) in wanted.items():
        places[path].fill(full_state[name], shard, label(path, shard), adopt=adopt)
    return LoadReport(tuple(missing), tuple(unexpected))


@torch.no_grad()
def full_state_dict(model: nn.Module, *, mapping: NameMapping | None = None) -> dict[str, torch.Tensor]:
    """The checkpoint of the unsharded model, gathered from the ranks: the inverse of `load_full_state_dict`.

    Collective over the groups of the model's layers.

    Args:
        model: any module.
        mapping: as it was given for loading; a fused layer that it takes apart is given apart.

    Returns:
        Name -> full tensor, on the model's device, on every rank.
    """
    full: dict[str, torch.Tensor] = {}
    gathered: dict[int, list[torch.Tensor]] = {}  # tied parameters are gathered once
    for path, place in places_of(model).items():
        if id(place.tensor) not in gathered:
            gathered[id(place.tensor)] = place.gather()
        pieces = gathered[id(place.tensor)]
        names = place.names(path, mapping)
        if len(names) == len(pieces):
            full |= dict(zip(names, pieces, strict=True))
        else:
            full[next(iter(names))] = torch.cat(pieces, place.cut.dim if place.cut else 0)
    return full
