"""How the tensors of a call lie in memory: as plain bytes, or by way of a copy that does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["are_slices_joined", "as_bytes", "copy_back", "is_packed", "packed", "staging_for"]


def is_packed(x: torch.Tensor) -> bool:
    """Whether its memory is what its values say, in order."""
    return x.is_contiguous() and not x.is_conj() and not x.is_neg()


def packed(x: torch.Tensor) -> torch.Tensor:
    """x itself where its memory is what its values say, else a contiguous copy (lazily conjugated or negated ones too)."""
    return x.resolve_conj().resolve_neg().contiguous()


def are_slices_joined(x: torch.Tensor, dim: int) -> bool:
    """Whether what x is cut into along `dim` lies in its memory one after the other."""
    return is_packed(x) and math.prod(x.shape[:dim]) == 1


def staging_for(view: torch.Tensor) -> torch.Tensor:
    """Where bytes for `view` may be written: itself if it is dense, else a buffer on its device, for `land`."""
    return view if is_packed(view) else torch.empty(view.shape, dtype=view.dtype, device=view.device)


def copy_back(landing: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> None:
    """Copies what came into buffers to where it belongs."""
    for piece, view in zip(landing, views, strict=True):
        if piece is not view:
            view.copy_(piece)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8, 1-D, without a copy."""
    # Not reshape(-1): of a single element any stride is contiguous, and only a stride of one can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)
