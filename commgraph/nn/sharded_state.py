"""Checkpoints that every rank writes its part of, and that ranks of any other number read: for torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.local_shards import LocalShards
from commgraph.nn.places import NameMapping, Place, extra_states, places_of
from commgraph.nn.shards import Shard, as_dtensor
from commgraph.nn.state import LoadReport

__all__ = [
    "ShardedParameter",
    "load_sharded_optimizer_state_dict",
    "load_sharded_state_dict",
    "sharded_optimizer_state_dict",
    "sharded_parameters",
    "sharded_state_dict",
]


@attrs.frozen
class ShardedParameter:
    """A parameter of which each rank of a group holds a part.

    Attributes:
        parameter: this rank's part.
        group: the ranks.
        dim: the dim that is cut.
        full_shape: shape of the full parameter.
    """

    parameter: torch.Tensor = attrs.field(repr=False)
    group: GroupCoordinator
    dim: int
    full_shape: tuple[int, ...]


def sharded_parameters(model: nn.Module) -> dict[str, ShardedParameter]:
    """Says which parameters of a model are sharded by its parallel layers, and how.

    Args:
        model: any module.

    Returns:
        Name -> `ShardedParameter`, tied ones under each of their names. Every rank holds whole what is not in it.
    """
    return {
        path: ShardedParameter(place.tensor, place.layer.group, place.cut.dim, place.cut.full_shape(place.tensor))
        for path, place in places_of(model).items()
        if place.is_sharded and place.cut is not None and place.layer is not None
    }


@torch.no_grad()
def sharded_state_dict(model: nn.Module, *, mapping: NameMapping | None = None) -> dict[str, Any]:
    """A model's state for ``torch.distributed.checkpoint.save`` and ``load``. Not collective.

    A checkpoint written from it has the full tensors' names, shapes and values, so that a model on another number of ranks, or a model
    that is not sharded at all, loads it. Each box of a tensor is written by one of the ranks that hold it, as is every tensor that is
    equal on all ranks.

    Names must tell the tensors of all ranks apart: a pipeline stage that numbers its layers from 0 gives a mapping such as
    ``{"layers.8": "layers.0"}``.

    Args:
        model: any module, with parallel layers or without, and with ``fully_shard`` around modules or without.
        mapping: as for `load_full_state_dict`; a fused layer that it takes apart is saved apart.

    Returns:
        Name -> a `LocalShards` where ranks hold parts, else the tensor, on this rank's memory. ``load`` writes into the model.

    Raises:
        ConfigurationError: a tensor is on the meta device, or two have one name.
    """
    state: dict[str, Any] = {}
    for name, (place, shard) in _named(model, mapping).items():
        if place.tensor.is_meta:
            raise ConfigurationError(f"sharded_state_dict: {name} is on the meta device: model.to_empty(device=...) first")
        state[name] = place.view(place.tensor, shard)
    return state | {path: module.get_extra_state() for path, module in extra_states(model).items()}


@torch.no_grad()
def load_sharded_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, mapping: NameMapping | None = None, strict: bool = True
) -> LoadReport:
    """Ends the loading of a state that ``torch.distributed.checkpoint.load`` filled. Not collective.

    Example:
        ::

            state = {"model": sharded_state_dict(model)}
            torch.distributed.checkpoint.load(state, checkpoint_id="step-100")
            load_sharded_state_dict(model, state["model"])

    Copies what is not in the model's own memory already, clears the padding of vocabularies and gives modules their extra state.

    Args:
        model: any module.
        state: of `sharded_state_dict` of this model, or of an equal one on equally many ranks.
        mapping: as it was given there.
        strict: whether missing and unexpected names are an error.

    Returns:
        The missing and unexpected names.

    Raises:
        ConfigurationError: names do not fit, before anything is loaded; or a tensor's shape or boxes do not.
    """
    own, extra = _named(model, mapping), extra_states(model)
    seen: set[tuple[int, Shard | None]] = {(id(place.tensor), shard) for name, (place, shard) in own.items() if name in state}
    missing = [name for name, (place, shard) in own.items() if (id(place.tensor), shard) not in seen]
    missing += [name for name in extra if name not in state]
    unexpected = [name for name in state if name not in own and name not in extra]
    if strict and (missing or unexpected):
        raise ConfigurationError(
            f"load_sharded_state_dict: the state does not fit {type(model).__name__}. Missing: {', '.join(missing) or 'nothing'}. "
            f"Unexpected: {', '.join(unexpected) or 'nothing'}. It must come from sharded_state_dict(model, mapping=...) of such a model"
        )
    for name, (place, shard) in own.items():
        if name in state:
            _copy(place.view(place.tensor, shard), state[name], name)
    for place, _ in own.values():
        if place.cut is not None:
            place.cut.zero_padding(place.tensor)
    for name, module in extra.items():
        if name in state:
            module.set_extra_state(state[name])
    return LoadReport(tuple(missing), tuple(unexpected))


@torch.no_grad()
def sharded_optimizer_state_dict(model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    """The state of a model's optimizers for ``torch.distributed.checkpoint``, laid out as the parameters are. Not collective.

    Args:
        model: whose parameters the optimizers have.
        optimizers: one or several. One that made no step yet makes its state now (torch's ``get_optimizer_state_dict``).

    Returns:
        Flat names, ``"state.lm_head.weight.exp_avg"`` and ``"param_groups.lm_head.weight.lr"``, so that a checkpoint fits other pipeline
        stages, too -> a `LocalShards` where the parameter is one, else tensor or number. Tensors are the optimizer's own.

    Raises:
        ConfigurationError: a sharded parameter's state is of another shape than the parameter (as Adafactor's), which has no full tensor.
    """
    places = places_of(model)
    tied = _tied(places)
    state: dict[str, Any] = {}
    for key, value in _local_optimizer_state(model, optimizers).items():
        place = _owner(key, value, places)
        viewed = value if place is None else place.view(value, None)
        state |= dict.fromkeys(_aliases(key, tied), viewed)
    return state


@torch.no_grad()
def load_sharded_optimizer_state_dict(
    model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer], state: Mapping[str, Any]
) -> None:
    """Gives optimizers a state that ``torch.distributed.checkpoint.load`` filled. Not collective.

    Args:
        model: whose parameters the optimizers have.
        optimizers: one or several.
        state: of `sharded_optimizer_state_dict` of this model and these optimizers, or of equal ones on equally many ranks.

    Raises:
        ConfigurationError: names are missing, or boxes differ.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    places = places_of(model)
    own = _local_optimizer_state(model, optimizers)
    tied = _tied(places)
    loaded: dict[str, Any] = {}
    missing = []
    for key, value in own.items():
        found = next((alias for alias in _aliases(key, tied) if alias in state), None)
        if found is None:
            missing.append(key)
        elif (place := _owner(key, value, places)) is None:
            loaded[key] = state[found]
        else:
            _copy(place.view(value, None), state[found], key)
            if place.cut is not None:
                place.cut.zero_padding(value)
            loaded[key] = value
    if missing:
        raise ConfigurationError(f"load_sharded_optimizer_state_dict: the state has no {', '.join(missing)}")
    set_optimizer_state_dict(model, optimizers, loaded, options=StateDictOptions(flatten_optimizer_state_dict=True))


def _named(model: nn.Module, mapping: NameMapping | None) -> dict[str, tuple[Place, Shard | None]]:
    """Every tensor of a model, or shard of one, by its name in a checkpoint."""
    named: dict[str, tuple[Place, Shard | None]] = {}
    for path, place in places_of(model).items():
        for name, shard in place.names(path, mapping).items():
            if name in named:
                raise ConfigurationError(f"two tensors of {type(model).__name__} are called {name!r} by mapping={dict(mapping or {})}")
            named[name] = place, shard
    return named


def _copy(target: torch.Tensor, source: Any, name: str) -> None:
    is_equal = isinstance(source, torch.Tensor) and target.shape == source.shape
    if not is_equal or isinstance(target, LocalShards) != isinstance(source, LocalShards):
        raise ConfigurationError(
            f"{name}: {_described(target)} here, the state has {_described(source)}; full tensors are loaded by load_full_state_dict"
        )
    if isinstance(target, LocalShards) and isinstance(source, LocalShards) and target.boxes != source.boxes:
        raise ConfigurationError(
            f"{name}: this model is {target!r}, the state {source!r}; only torch.distributed.checkpoint changes the number of ranks"
        )
    for mine, theirs in zip(_memory(target), _memory(source), strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


def _memory(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if isinstance(tensor, LocalShards):
        yield from tensor.tensors
    else:
        sharded = as_dtensor(tensor)
        yield tensor if sharded is None else sharded.to_local()


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, LocalShards) else f"a {type(value).__name__} {tuple(getattr(value, 'shape', ()))}"


def _local_optimizer_state(model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(model, optimizers, options=options))


def _tied(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The names of each parameter, by each of its names."""
    names: dict[int, list[str]] = {}
    for path, place in places.items():
        names.setdefault(id(place.tensor), []).append(path)
    return {path: several for several in names.values() for path in several}


def _split(key: str, paths: Container[str]) -> tuple[str, str, str]:
    """The section of an optimizer's state that a key is in, the parameter's name, and what is kept for it."""
    section, _, rest = key.partition(".")
    path = rest
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return section, path, rest[len(path) :]


def _aliases(key: str, tied: Mapping[str, list[str]]) -> list[str]:
    """The key, and that for each other name of its parameter: a stage of another pipeline may know one of them only."""
    section, path, kept = _split(key, tied)
    return [f"{section}.{name}{kept}" for name in tied[path]] if path else [key]


def _owner(key: str, value: Any, places: Mapping[str, Place]) -> Place | None:
    """The sharded parameter whose state this is; None where it is a number, or of a parameter that every rank holds whole."""
    section, path, _ = _split(key, places)
    if section != "state" or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    place = places.get(path)
    if place is None or not place.is_sharded:
        return None
    if value.shape != place.tensor.shape:
        raise ConfigurationError(
            f"{key} has shape {tuple(value.shape)} and its parameter {tuple(place.tensor.shape)} on this rank, of "
            f"{place.cut.full_shape(place.tensor) if place.cut else ''}: state of another shape than a sharded parameter's cannot be saved"
        )
    return place
