"""Numbers of dtypes in the native module."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import torch

__all__ = ["KINDS"]

# DLPack's code and bits, in a byte each.
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
KINDS: Final = MappingProxyType(
    {
        torch.bool: _BOOL << 8 | 8,
        torch.bfloat16: _BFLOAT << 8 | 16,
        torch.float16: _FLOAT << 8 | 16,
        torch.float32: _FLOAT << 8 | 32,
        torch.float64: _FLOAT << 8 | 64,
        torch.int8: _INT << 8 | 8,
        torch.int16: _INT << 8 | 16,
        torch.int32: _INT << 8 | 32,
        torch.int64: _INT << 8 | 64,
        torch.uint8: _UINT << 8 | 8,
        torch.uint16: _UINT << 8 | 16,
        torch.uint32: _UINT << 8 | 32,
        torch.uint64: _UINT << 8 | 64,
    }
)
