"""Dtypes as which elements are moved, where torch cannot copy or fill tensors of their own dtype: int4 and its like, bits, small floats.

Operations that only move data serve such tensors as the integers of their bytes.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

__all__ = ["CARRIERS", "QUANTIZED", "UNSERVED", "carried", "carrier", "clone", "fill"]

# Bytes of an element -> dtype that torch can copy in every layout, and without a warning.
CARRIERS = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128})

_NAMES = MappingProxyType({str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)})

# Dtypes of quantized tensors, whose values are not their elements alone.
QUANTIZED = frozenset({dtype for name, dtype in _NAMES.items() if name.startswith(("qint", "quint"))})

# Dtypes of which torch copies or fills no tensor on the host: those of less than a byte, and bits without a meaning.
UNSERVED = frozenset(
    {
        dtype
        for name, dtype in _NAMES.items()
        if name.startswith(("bits", "float4")) or (name.startswith(("int", "uint")) and int(name.lstrip("uint")) < 8)
    }
)


def carrier(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype as which elements of `dtype` are moved: itself, where torch serves it."""
    return CARRIERS[dtype.itemsize] if dtype in UNSERVED else dtype


def carried(x: torch.Tensor) -> torch.Tensor:
    """Return x itself, or a view of it where its dtype needs a carrier."""
    return x.view(CARRIERS[x.itemsize]) if x.dtype in UNSERVED else x


def clone(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of x."""
    return carried(x).clone(memory_format=torch.contiguous_format).view(x.dtype)


def fill(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Copy x into `out`, which has its shape and dtype; return `out`."""
    carried(out).copy_(carried(x))
    return out
