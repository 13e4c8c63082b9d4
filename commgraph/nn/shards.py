"""How a parameter lies on the ranks of a group: which part of which full tensor each of them holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch

from commgraph.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Chunk", "Cut", "Full", "Piece", "Shard", "Slice", "as_dtensor", "held", "shape_of", "take"]

Shard = str | int
"""Names a full tensor among those that one parameter is made of, by ``"q"``, ``"k"``, ``"v"``, or its number."""


class Slice(Protocol):
    """A full tensor in a file, as ``safe_open(...).get_slice(name)`` of safetensors gives it: an index reads that part alone."""

    def get_shape(self) -> list[int]:
        """Return the shape of the full tensor."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


Full = torch.Tensor | Slice
"""A full tensor, in memory or in a file."""


def shape_of(full: Full) -> tuple[int, ...]:
    """Return the shape of a full tensor."""
    return tuple(full.shape if isinstance(full, torch.Tensor) else full.get_shape())


def take(local: torch.Tensor, box: torch.Tensor, part: torch.Tensor, *, adopt: bool) -> None:
    """Fills a box of a parameter.

    Args:
        local: the parameter.
        box: what is filled: the parameter, or a view of it.
        part: its values, of any dtype and device.
        adopt: where `part` is as the parameter has to be, it becomes the parameter's memory and is not copied.
    """
    plain = as_dtensor(local) is None and box.shape == local.shape
    if adopt and plain and part.is_contiguous() and (part.dtype, part.device) == (local.dtype, local.device):
        local.data = part
    else:
        box.copy_(part)


@attrs.frozen
class Piece:
    """One full tensor, cut into equal blocks in rank order.

    Attributes:
        full: extent of the full tensor along the dim that is cut.
        blocks: how many blocks there are; it divides the number of ranks. Where ranks outnumber blocks, neighbours hold the same one.
    """

    full: int
    blocks: int

    @property
    def size(self) -> int:
        """Extent of a block; the last ones are padded to it."""
        return -(-self.full // self.blocks)

    def span(self, rank: int, world: int) -> tuple[int, int]:
        """First index and end, in the full tensor, of one rank's part; padding not counted."""
        start = min(rank * self.blocks // world * self.size, self.full)
        return start, min(start + self.size, self.full)


@attrs.frozen
class Chunk:
    """A box of a full tensor, as far as this rank holds it.

    Attributes:
        shard: which of the full tensors that a parameter is made of.
        offsets: where the box begins in the full tensor, one number a dim.
        tensor: the box, a view of this rank's memory.
    """

    shard: Shard
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the box lies, as an index of the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.tensor.shape, strict=True))


def as_dtensor(tensor: torch.Tensor) -> DTensor | None:
    """Return a DTensor, as ``fully_shard`` makes parameters, with its type; None of any other tensor."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def held(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Return the boxes of a tensor that this rank holds, each with its offsets: all of it, or a DTensor's own shard."""
    if (sharded := as_dtensor(tensor)) is None:
        return [((0,) * tensor.dim(), tensor)]
    # Taken from the class: an instance of a parallel layer's parameter answers with a refusal (`marks`).
    chunks = type(sharded).__create_chunk_list__(sharded)
    return [(tuple(chunk.offsets), sharded.to_local()) for chunk in chunks]


@attrs.frozen
class Cut:
    """How one parameter is made of pieces, as one rank sees it: its blocks of all pieces, one after the other along `dim`.

    Attributes:
        dim: the dim of the parameter that is cut.
        pieces: the full tensors, in order.
        rank, world: rank in the group, and ranks in it.
    """

    dim: int
    pieces: Mapping[Shard, Piece]
    rank: int
    world: int

    @property
    def sizes(self) -> list[int]:
        """Extent of this rank's block of each piece, padding included."""
        return [piece.size for piece in self.pieces.values()]

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds everything."""
        return all(piece.blocks == 1 for piece in self.pieces.values())

    def full_shape(self, local: torch.Tensor, shard: Shard | None = None) -> tuple[int, ...]:
        """Shape of one full tensor, or of all of them joined along `dim`, given the parameter."""
        extent = sum(piece.full for piece in self.pieces.values()) if shard is None else self.pieces[shard].full
        return (*local.shape[: self.dim], extent, *local.shape[self.dim + 1 :])

    @torch.no_grad()
    def fill(self, local: torch.Tensor, full: Full, shard: Shard | None = None, *, what: str, adopt: bool = False) -> None:
        """Copies this rank's part of `full` into the parameter, and zeros into the padding.

        Args:
            local: the parameter.
            full: one full tensor; without `shard` all of them, joined along `dim` in order. Any dtype and device; of a `Slice` only this
                rank's part is read.
            shard: which one.
            what: names the parameter in errors.
            adopt: see `take`.

        Raises:
            ConfigurationError: an unknown shard, a wrong shape, a parameter without memory.
        """
        if shard is not None and (shard not in self.pieces or len(self.pieces) == 1):
            have = ", ".join(map(repr, self.pieces)) if len(self.pieces) > 1 else "one piece only, which needs no shard"
            raise ConfigurationError(f"{what} has no shard {shard!r}: it has {have}")
        expected = self.full_shape(local, shard)
        place = f"rank {self.rank} of {self.world} in the group"
        shape = shape_of(full)
        if shape != expected:
            hint = ""
            if shape == tuple(local.shape):
                hint = "; this is the shape of one rank's share: such tensors go through load_state_dict"
            raise ConfigurationError(f"{what}: the full tensor has shape {expected}, got {shape} ({place}){hint}")
        if local.is_meta:
            raise ConfigurationError(
                f"{what} is on the meta device and has no memory to load into: model.to_empty(device=...) first ({place})"
            )
        for chunk in self.chunks(local, shard):
            take(local, chunk.tensor, full[chunk.index], adopt=adopt)
        self.zero_padding(local)

    def chunks(self, local: torch.Tensor, shard: Shard | None = None) -> list[Chunk]:
        """The boxes of a full tensor that this rank holds, padding left out; a rank whose blocks are padding alone holds none.

        Args:
            local: the parameter, its gradient, or anything else of its shape; a DTensor is this rank's share of all that.
            shard: of which full tensor; None: of all of them, joined along `dim`.
        """
        found, joined = [], 0
        for name, piece, begin, (start, stop) in self._blocks():
            if shard in (None, name):
                first = start + (joined if shard is None else 0)
                for offsets, box in self._within(local, begin, begin + stop - start):
                    found.append(Chunk(name, (*offsets[: self.dim], first + offsets[self.dim] - begin, *offsets[self.dim + 1 :]), box))
            joined += piece.full
        return found

    def zero_padding(self, local: torch.Tensor) -> None:
        """Writes zeros where the parameter holds nothing of any full tensor."""
        for _, piece, begin, (start, stop) in self._blocks():
            for _, box in self._within(local, begin + stop - start, begin + piece.size):
                box.zero_()

    def _blocks(self) -> list[tuple[Shard, Piece, int, tuple[int, int]]]:
        """For each piece where its block begins in the parameter, and the span of the full tensor that the block holds."""
        begins = itertools.accumulate(self.sizes, initial=0)
        spans = [piece.span(self.rank, self.world) for piece in self.pieces.values()]
        return list(zip(self.pieces, self.pieces.values(), begins, spans, strict=False))

    def _within(self, local: torch.Tensor, begin: int, end: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """The parts from `begin` to `end` along `dim` that this rank holds of `local`, each with its offsets in it."""
        found, dim = [], self.dim
        for offsets, box in held(local):
            low, high = max(begin, offsets[dim]), min(end, offsets[dim] + box.shape[dim])
            if low < high and box.numel():
                found.append(((*offsets[:dim], low, *offsets[dim + 1 :]), box.narrow(dim, low - offsets[dim], high - low)))
        return found

    def join(self, gathered: torch.Tensor, dim: int | None = None) -> list[torch.Tensor]:
        """The full tensors, in order, out of every rank's blocks. Differentiable.

        Args:
            gathered: the parts of all ranks, joined along `dim` in rank order.
            dim: along which the pieces lie; None: the parameter's own.
        """
        dim = self.dim if dim is None else dim
        if self.world == 1:
            return list(gathered.split(self.sizes, dim))
        if len(self.pieces) == 1 and (whole := next(iter(self.pieces.values()))).blocks == self.world:
            return [gathered.narrow(dim, 0, whole.full)]  # the usual case: nothing lies between the blocks, so nothing is copied
        blocks: Sequence[torch.Tensor] = gathered.split(self.sizes * self.world, dim)
        count = len(self.pieces)
        full = []
        for i, piece in enumerate(self.pieces.values()):
            holders = itertools.islice(blocks, i, None, count * (self.world // piece.blocks))  # the first of each run of equal ones
            full.append(torch.cat(list(holders), dim).narrow(dim, 0, piece.full))
        return full
