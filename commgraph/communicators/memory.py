"""Dense tensors, whose bytes can be sent as they lie, and staging buffers for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from commgraph import ambient
from commgraph.shm.pickling import tensor_over

__all__ = ["are_slices_joined", "as_bytes", "copy_back", "dense", "is_dense", "pooled", "staging_for"]


def is_dense(x: torch.Tensor) -> bool:
    """Whether the memory of x has its values one after the other: contiguous, and neither lazily conjugated nor negated."""
    return x.is_contiguous() and not x.is_conj() and not x.is_neg()


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if it is dense, else a dense copy."""
    return x.resolve_conj().resolve_neg().contiguous()


def are_slices_joined(x: torch.Tensor, dim: int) -> bool:
    """Whether x is dense and its slices along `dim` lie in memory one after the other."""
    return is_dense(x) and math.prod(x.shape[:dim]) == 1


def staging_for(view: torch.Tensor) -> torch.Tensor:
    """Return a tensor to which bytes for `view` can be written: itself if it is dense, else a buffer on its device, for `copy_back`."""
    return view if is_dense(view) else ambient.empty(view.shape, view.dtype, view.device)


def copy_back(staging: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> None:
    """Copy staging buffers to their views; those that are their views stay."""
    for piece, view in zip(staging, views, strict=True):
        if piece is not view:
            view.copy_(piece)


# Bytes of a tensor from which on its memory is taken from a pool.
_POOLED_BYTES = 128 * 1024


def pooled(pool: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised host tensor, over memory of a native `Pool` where it is large."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes < _POOLED_BYTES:
        return ambient.empty(tuple(shape), dtype)
    return tensor_over(pool.take(nbytes), dtype, shape)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as uint8, 1-D, without a copy."""
    # Not reshape(-1): of a single element any stride is contiguous, and only a stride of one can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)
