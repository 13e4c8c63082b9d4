"""Where the tensors of a model are: which are sharded, by which layer, and how they are called in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commgraph.errors import ConfigurationError
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.local_shards import LocalShards
from commgraph.nn.shards import Cut, Full, Shard, as_dtensor, held, shape_of, take

__all__ = ["NameMapping", "Place", "extra_states", "label", "original", "places_of", "renamed"]

NameMapping = Mapping[str, str | tuple[str, Shard] | None]
"""Part of a checkpoint's name -> that part in the model's names, or that and a shard, or None to leave such tensors out."""


EXTRA = "_extra_state"  # how torch calls what a module's get_extra_state returns, in state dicts


@attrs.frozen
class Place:
    """A parameter or buffer of a model; how it is cut, and by which layer, if it is."""

    tensor: torch.Tensor
    cut: Cut | None = None
    layer: ParallelLayer | None = None

    @property
    def shards(self) -> tuple[Shard | None, ...]:
        """The shards of which the tensor is made; (None,) where it is one."""
        return tuple(self.cut.pieces) if self.cut is not None and len(self.cut.pieces) > 1 else (None,)

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks of the layer's group hold different parts."""
        return self.cut is not None and not self.cut.is_replicated

    def names(self, path: str, mapping: NameMapping | None) -> dict[str, Shard | None]:
        """Return the names in a checkpoint: of each shard where the mapping names all, else one of the whole."""
        apart = {name: shard for shard in self.shards if (name := original(path, shard, mapping))}
        return apart if len(apart) == len(self.shards) else {original(path, None, mapping) or path: None}

    def fill(self, full: Full, shard: Shard | None, what: str, *, adopt: bool = False) -> None:
        """Copies this rank's part of a full tensor, of the whole or one shard, into the model. `adopt`: see `commgraph.nn.shards.take`."""
        if self.cut is not None and self.layer is not None:
            self.cut.fill(self.tensor, full, shard, what=f"{what} on rank {self.layer.ctx.rank}", adopt=adopt)
        elif shape_of(full) != tuple(self.tensor.shape):
            raise ConfigurationError(f"{what}: the full tensor has shape {tuple(self.tensor.shape)}, got {shape_of(full)}")
        elif self.tensor.is_meta:
            raise ConfigurationError(f"{what} is on the meta device and has no memory to load into: model.to_empty(device=...) first")
        else:
            for offsets, box in held(self.tensor):
                part = full[tuple(slice(start, start + size) for start, size in zip(offsets, box.shape, strict=True))]
                take(self.tensor, box, part, adopt=adopt)

    def gather(self) -> list[torch.Tensor]:
        """Return the full tensors, one a shard. Collective over the layer's group, and over the mesh of a DTensor."""
        local = self.tensor.detach()
        if (sharded := as_dtensor(local)) is not None:
            local = sharded.full_tensor()
        if self.cut is None or self.layer is None:
            return [local]
        if self.cut.is_replicated:
            return list(local.split(self.cut.sizes, self.cut.dim))
        return self.cut.join(self.layer.group.all_gather(local, self.cut.dim))

    def view(self, local: torch.Tensor, shard: Shard | None) -> torch.Tensor:
        """Return a tensor of the parameter's shape, or one shard of it, as torch.distributed.checkpoint takes it.

        Where this rank holds the whole it is the tensor itself, or a view of it; a DTensor where a layer does not cut it further.
        """
        local = local.detach()
        if self.cut is None or self.layer is None or (self.cut.is_replicated and shard is None):
            return local
        chunks = self.cut.chunks(local, shard)
        if self.cut.is_replicated and as_dtensor(local) is None and chunks:
            return chunks[0].tensor
        mesh = as_dtensor(local)
        ranks = self.layer.group.world_size * (1 if mesh is None else mesh.device_mesh.size())
        boxes = [(chunk.offsets, chunk.tensor) for chunk in chunks]
        like = (local if mesh is None else mesh.to_local()).new_empty(0)
        return LocalShards(
            self.cut.full_shape(local, shard), [offsets for offsets, _ in boxes], [tensor for _, tensor in boxes], like, ranks
        )


def places_of(model: nn.Module) -> dict[str, Place]:
    """Every parameter and persistent buffer by its name; tied ones under each of their names."""
    places = {}
    for path, module, tensor in _state(model):
        name = path.rpartition(".")[2]
        if name == EXTRA or not isinstance(tensor, torch.Tensor):
            continue
        if isinstance(module, ParallelLayer) and name in module.cuts:
            places[path] = Place(tensor, module.cuts[name], module)
        else:
            places[path] = Place(tensor)
    return places


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with extra state, by its name in a state dict."""
    return {path: module for path, module, _ in _state(model) if path.rpartition(".")[2] == EXTRA}


def _state(model: nn.Module) -> Iterator[tuple[str, nn.Module, object]]:
    """Everything in a model's state dict with its name and module; the names are those without DDP and torch.compile around modules."""
    for key, value in model.state_dict(keep_vars=True).items():
        parts, module = [], model
        *owners, last = key.split(".")
        for part in owners:
            if not (isinstance(module, DistributedDataParallel) or part == "_orig_mod"):
                parts.append(part)
            module = getattr(module, part)
        yield ".".join((*parts, last)), module, value


def label(path: str, shard: Shard | None) -> str:
    """Return a tensor's name for messages."""
    return path if shard is None else f"{path}[{shard}]"


def renamed(name: str, mapping: NameMapping | None) -> tuple[str, Shard | None] | None:
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


def original(path: str, shard: Shard | None, mapping: NameMapping | None) -> str | None:
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
