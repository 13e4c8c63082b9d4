"""The elements of strided tensors as dense memory, and the strides by which tensors are made of them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commgraph import ambient
from commgraph.carriers import CARRIERS

__all__ = ["pack", "unpack"]

# Elements of memory that a tensor's own elements may be spread over, for each of them. Memory is made in proportion to what was received.
_SPARSEST = 64


def pack(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Return the elements of a host tensor as dense integers of their bytes, and its strides.

    Elements that are expanded come once. The strides are None where the elements are in the order of a contiguous tensor: of one, and of
    one whose elements are spread too thin.
    """
    strides = x.stride()
    bits = x.detach().resolve_conj().resolve_neg().view(CARRIERS[x.itemsize])
    if x.is_contiguous() or not x.numel():
        return bits.contiguous(), None
    if _overlap(x.shape, strides):
        if bits.stride() != strides:  # it was lazily conjugated or negated, and is a copy now
            return bits.contiguous(), None
        return bits.as_strided((_span(x.shape, strides),), (1,)).contiguous(), strides
    once = bits[tuple([slice(1) if stride == 0 else slice(None) for stride in strides])]
    if _span(x.shape, strides) > _SPARSEST * once.numel():
        return bits.contiguous(), None
    return once.permute(_order(strides)).contiguous(), strides


def unpack(elements: torch.Tensor, shape: Sequence[int], strides: Sequence[int] | None) -> torch.Tensor:
    """Return the tensor whose `pack` gave such strides; over the memory of `elements` (1-D, of any dtype) where that is not spread.

    Raises:
        ValueError: they do not fit together, so that nothing was allocated.
    """
    if strides is None:
        return elements if elements.shape == shape else elements.view(tuple(shape))
    if len(strides) != len(shape) or min(strides, default=0) < 0 or min(shape, default=1) < 1:
        raise ValueError(f"strides {tuple(strides)} do not fit to the shape {tuple(shape)}")
    span, count = _span(shape, strides), elements.numel()
    if span != count:
        once = [1 if stride == 0 else extent for extent, stride in zip(shape, strides, strict=True)]
        order = _order(strides)
        if torch.Size(once).numel() != count or span > _SPARSEST * count or _overlap(shape, strides):
            raise ValueError(f"{count} elements are no tensor of shape {tuple(shape)} and strides {tuple(strides)}")
        memory = ambient.zeros(span * elements.itemsize, torch.uint8).view(CARRIERS[elements.itemsize])
        spread = memory.as_strided(once, tuple(strides)).permute(order)
        spread.copy_(elements.view(memory.dtype).view(spread.shape))
        elements = memory.view(elements.dtype)
    return elements.as_strided(tuple(shape), tuple(strides))


def _order(strides: Sequence[int]) -> list[int]:
    """Return the dimensions in the order of memory, outermost first."""
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements of memory from the first element of a tensor to its last."""
    return 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements share memory otherwise than by a stride of 0."""
    reach = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if stride and extent > 1:
            if stride < reach:
                return True
            reach += (extent - 1) * stride
    return False
