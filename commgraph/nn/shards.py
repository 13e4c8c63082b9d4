"""How a parameter lies on the ranks of a group: which part of which full tensor each of them holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from commgraph.errors import ConfigurationError

__all__ = ["Cut", "Piece", "Shard"]

Shard = str | int
"""Names a full tensor among those that one parameter is made of: ``"q"``, ``"k"``, ``"v"``, or its number."""


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
        """First index and end, in the full tensor, of the part of `rank` of `world`; padding not counted."""
        start = min(rank * self.blocks // world * self.size, self.full)
        return start, min(start + self.size, self.full)


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
    def fill(self, local: torch.Tensor, full: torch.Tensor, shard: Shard | None = None, *, what: str) -> None:
        """Copies this rank's part of `full` into the parameter, and zeros into the padding.

        Args:
            local: the parameter.
            full: one full tensor; without `shard` all of them, joined along `dim` in order. Any dtype and device.
            shard: which one.
            what: names the parameter in errors.

        Raises:
            ConfigurationError: an unknown shard, a wrong shape, a parameter without memory.
        """
        if shard is not None and (shard not in self.pieces or len(self.pieces) == 1):
            have = ", ".join(map(repr, self.pieces)) if len(self.pieces) > 1 else "one piece only, which needs no shard"
            raise ConfigurationError(f"{what} has no shard {shard!r}: it has {have}")
        expected = self.full_shape(local, shard)
        place = f"rank {self.rank} of {self.world} in the group"
        if tuple(full.shape) != expected:
            hint = ""
            if tuple(full.shape) == tuple(local.shape):
                hint = "; this is the shape of one rank's share: such tensors go through load_state_dict"
            raise ConfigurationError(f"{what}: the full tensor has shape {expected}, got {tuple(full.shape)} ({place}){hint}")
        if local.is_meta:
            raise ConfigurationError(
                f"{what} is on the meta device and has no memory to load into: model.to_empty(device=...) first ({place})"
            )
        blocks = dict(zip(self.pieces, local.split(self.sizes, self.dim), strict=True))
        names = list(self.pieces) if shard is None else [shard]
        for name, source in zip(names, full.split([self.pieces[name].full for name in names], self.dim), strict=True):
            start, stop = self.pieces[name].span(self.rank, self.world)
            blocks[name].narrow(self.dim, 0, stop - start).copy_(source.narrow(self.dim, start, stop - start))
            blocks[name].narrow(self.dim, stop - start, self.pieces[name].size - (stop - start)).zero_()

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
