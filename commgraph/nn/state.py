"""Full checkpoints to models with parallel layers, and back."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

from commgraph.errors import ConfigurationError
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.shards import Cut, Shard

__all__ = ["LoadReport", "NameMapping", "full_state_dict", "load_full_state_dict"]

NameMapping = Mapping[str, str | tuple[str, Shard] | None]
"""Part of a checkpoint's name -> that part in the model's names, or that and a shard, or None to leave such tensors out."""


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
    model: nn.Module, full_state: Mapping[str, torch.Tensor], *, mapping: NameMapping | None = None, strict: bool = True
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
        full_state: name -> full tensor, of any dtype and device; each is looked up once, so that a mapping may read it on demand.
        mapping: how names differ: whole dotted parts (``"q_proj"``, ``"transformer.h"``, never pieces of words), each entry used at its
            first place in a name, in order. See `NameMapping`.
        strict: whether missing and unexpected names are an error. A pipeline stage, which takes some layers of a checkpoint, passes False
            and reads the report.

    Returns:
        The missing and unexpected names.

    Raises:
        ConfigurationError: names do not fit, before anything is loaded; or a tensor's shape does not, naming it, the shape and the rank.
    """
    places = _places(model)
    wanted: dict[str, tuple[str, Shard | None]] = {}
    taken: dict[tuple[int, Shard | None], str] = {}
    unexpected = []
    for name in full_state:
        if (target := _renamed(name, mapping)) is None:
            continue
        path, shard = target
        if path not in places or shard not in (None, *places[path].shards):
            unexpected.append(name)
            continue
        wanted[name] = path, shard
        # A tensor that the model has under two names may be in the checkpoint under both.
        first = taken.setdefault((id(places[path].tensor), shard), name)
        if first != name and wanted[first][0] == path:
            raise ConfigurationError(f"load_full_state_dict: {first!r} and {name!r} would both be loaded into {_label(path, shard)}")
    missing = [
        _label(path, shard)
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
        places[path].fill(full_state[name], shard, _label(path, shard))
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
    for path, place in _places(model).items():
        if id(place.tensor) not in gathered:
            gathered[id(place.tensor)] = place.gather()
        pieces = gathered[id(place.tensor)]
        apart = {name: piece for shard, piece in zip(place.shards, pieces, strict=True) if (name := _original(path, shard, mapping))}
        if len(apart) == len(pieces):
            full |= apart
        else:
            full[_original(path, None, mapping) or path] = torch.cat(pieces, place.cut.dim if place.cut else 0)
    return full


@attrs.frozen
class _Place:
    """A parameter or buffer of a model; how it is cut, and by which layer, if it is."""

    tensor: torch.Tensor
    cut: Cut | None = None
    layer: ParallelLayer | None = None

    @property
    def shards(self) -> tuple[Shard | None, ...]:
        """The shards of which the tensor is made; (None,) where it is one."""
        return tuple(self.cut.pieces) if self.cut is not None and len(self.cut.pieces) > 1 else (None,)

    def fill(self, full: torch.Tensor, shard: Shard | None, what: str) -> None:
        if self.cut is not None and self.layer is not None:
            self.cut.fill(self.tensor, full, shard, what=f"{what} on rank {self.layer.ctx.rank}")
        elif full.shape != self.tensor.shape:
            raise ConfigurationError(f"{what}: the full tensor has shape {tuple(self.tensor.shape)}, got {tuple(full.shape)}")
        elif self.tensor.is_meta:
            raise ConfigurationError(f"{what} is on the meta device and has no memory to load into: model.to_empty(device=...) first")
        else:
            self.tensor.copy_(full)

    def gather(self) -> list[torch.Tensor]:
        local = self.tensor.detach()
        if self.cut is None or self.layer is None:
            return [local]
        if self.cut.is_replicated:
            return list(local.split(self.cut.sizes, self.cut.dim))
        return self.cut.join(self.layer.group.all_gather(local, self.cut.dim))


def _places(model: nn.Module) -> dict[str, _Place]:
    """Every parameter and persistent buffer by its name; tied ones under each of their names."""
    places = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state
        owner, _, name = path.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, ParallelLayer) and name in layer.cuts:
            places[path] = _Place(tensor, layer.cuts[name], layer)
        else:
            places[path] = _Place(tensor)
    return places


def _label(path: str, shard: Shard | None) -> str:
    return path if shard is None else f"{path}[{shard}]"


def _renamed(name: str, mapping: NameMapping | None) -> tuple[str, Shard | None] | None:
    """The model's name for a checkpoint's, and the shard; None: left out."""
    parts, shard = name.split("."), None
    for source, target in (mapping or {}).items():
        replacement, target_shard = target if isinstance(target, tuple) else (target, None)
        if (replaced := _replaced(parts, source, replacement or "")) is None:
            continue
        if replacement is None:
            return None
        parts, shard = replaced, shard if target_shard is None else target_shard
    return ".".join(parts), shard


def _original(path: str, shard: Shard | None, mapping: NameMapping | None) -> str | None:
    """The checkpoint's name for the model's; None: the mapping has none for this shard."""
    parts, is_found = path.split("."), shard is None
    for source, target in reversed(list((mapping or {}).items())):
        replacement, target_shard = target if isinstance(target, tuple) else (target, None)
        if replacement is None or target_shard not in (None, shard):
            continue
        if (replaced := _replaced(parts, replacement, source)) is not None:
            parts, is_found = replaced, is_found or target_shard == shard
    return ".".join(parts) if is_found else None


def _replaced(parts: list[str], old: str, new: str) -> list[str] | None:
    """`parts` with the first run of parts that is `old` replaced; None where there is none."""
    run = old.split(".")
    for at in range(len(parts) - len(run) + 1):
        if parts[at : at + len(run)] == run:
            return [*parts[:at], *new.split("."), *parts[at + len(run) :]]
    return None
