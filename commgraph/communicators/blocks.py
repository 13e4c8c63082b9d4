"""Blocks: the native module's form of a tensor, rows of contiguous bytes at equal distances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from commgraph import ambient
from commgraph.communicators.memory import copy_back, is_dense

__all__ = ["Block", "Staging", "block", "cut", "run"]

# (address, rows, bytes of a row, bytes from row to row), as native/copy.h has it.
Block = tuple[int, int, int, int]


def run(x: torch.Tensor) -> Block:
    """Return a dense tensor as a block of one row."""
    nbytes = x.nbytes
    return (x.data_ptr(), 1, nbytes, nbytes)


def cut(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[Block]:
    """Return the blocks of the pieces of a dense tensor along `dim`."""
    shape = x.shape
    item = x.element_size()
    rows = math.prod(shape[:dim]) if dim else 1
    inner = math.prod(shape[dim + 1 :]) * item
    pitch = shape[dim] * inner
    at = x.data_ptr()
    blocks = []
    for size in sizes:
        row = size * inner
        blocks.append((at, rows, row, pitch))
        at += row
    return blocks


def block(x: torch.Tensor) -> Block | None:
    """Return the block of a tensor, None if its memory has not that form."""
    if is_dense(x):
        nbytes = x.nbytes
        return (x.data_ptr(), 1, nbytes, nbytes) if nbytes else (0, 0, 0, 0)
    if x.is_conj() or x.is_neg():
        return None
    size = x.element_size()
    dims = [(extent, stride) for extent, stride in zip(x.shape, x.stride(), strict=True) if extent > 1]
    row = 1
    while dims and dims[-1][1] == row:
        row *= dims.pop()[0]
    if not dims:
        return (x.data_ptr(), 1, row * size, row * size)
    rows, pitch = dims.pop()
    if pitch < row:
        return None
    while dims:
        extent, stride = dims.pop()
        if stride != pitch * rows:
            return None
        rows *= extent
    return (x.data_ptr(), rows, row * size, pitch * size)


class Staging:
    """Destinations of pieces: their own memory, or a staging buffer for a piece that is no block."""

    __slots__ = ("_buffers", "_pieces", "blocks")

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        self._buffers: list[torch.Tensor] | None = None
        self.blocks = [block(piece) for piece in pieces]
        if None in self.blocks:
            buffers = [
                piece if found is not None else ambient.empty(piece.shape, piece.dtype)
                for piece, found in zip(pieces, self.blocks, strict=True)
            ]
            self._buffers = buffers
            self.blocks = [block(piece) for piece in buffers]

    def copy_back(self) -> None:
        """Copy the staging buffers to their pieces."""
        if self._buffers is not None:
            copy_back(self._buffers, self._pieces)
