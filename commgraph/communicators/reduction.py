"""Reduction of the pieces of several ranks, in rank order, so that every rank gets the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch

from commgraph.communicators.memory import as_bytes

__all__ = ["DTYPES", "REDUCE_OPS", "accumulator", "reduce_pieces", "refuse_reduction"]

REDUCE_OPS = ("sum", "avg", "max", "min", "product", "band", "bor", "bxor")
_BITWISE = MappingProxyType({"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor})

# dtype -> dtype that it is accumulated in. Small floats lose bits if added in themselves; torch has no arithmetic on the host for
# most unsigned integers and float8, so those go through a wider type that wraps alike.
_ACCUMULATORS = MappingProxyType(
    {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.float8_e4m3fn: torch.float32,
        torch.float8_e4m3fnuz: torch.float32,
        torch.float8_e5m2: torch.float32,
        torch.float8_e5m2fnuz: torch.float32,
        torch.float8_e8m0fnu: torch.float32,
        torch.complex64: torch.complex64,
        torch.complex128: torch.complex128,
        torch.int64: torch.int64,
        torch.int32: torch.int32,
        torch.int16: torch.int16,
        torch.int8: torch.int8,
        torch.uint8: torch.uint8,
        torch.uint16: torch.int32,
        torch.uint32: torch.int64,
        torch.uint64: torch.int64,
        torch.bool: torch.bool,
    }
)


# All reductions, in an order that is equal on every rank.
DTYPES = tuple(_ACCUMULATORS)


def accumulator(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that `dtype` is accumulated in, None where it cannot be reduced."""
    return _ACCUMULATORS.get(dtype)


def refuse_reduction(dtype: torch.dtype, op: str) -> str | None:
    """Return why `op` is not defined on `dtype`, None where it is."""
    if dtype not in _ACCUMULATORS:
        return f"{dtype} has no arithmetic"
    if op == "avg" and not (dtype.is_floating_point or dtype.is_complex):
        return f"the average of {dtype} is not a {dtype}; reduce with op='sum' and divide in the type that you want"
    if op in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        return f"{dtype} has no bits of its own to combine; reduce x.view(...) of an integer dtype"
    if op in ("max", "min") and dtype.is_complex:
        return f"{dtype} has no order"
    return None


def reduce_pieces(pieces: Sequence[torch.Tensor], op: str, out: torch.Tensor) -> None:
    """Reduce `pieces` (one per rank, in rank order, equal shapes and dtypes) into `out`, which may be one of them.

    ``((p0 + p1) + p2) + ...`` in `accumulator`, rounded once at the end. On bool, sum is "or" and product is "and". NaN wins in max
    and min.
    """
    dtype = pieces[0].dtype
    if op in _BITWISE:
        _combine_bits(pieces, op, out)
        return
    if dtype == torch.bool:
        logical = torch.logical_or if op in ("sum", "max") else torch.logical_and
        total = pieces[0].clone()
        for piece in pieces[1:]:
            logical(total, piece, out=total)
        out.copy_(total)
        return
    wide = _ACCUMULATORS[dtype]
    # Unsigned 64-bit sums and products wrap as signed ones do; the order needs the sign bit turned.
    flip = dtype == torch.uint64 and op in ("max", "min")
    total = _widen(pieces[0], wide, flip)
    if total.data_ptr() == pieces[0].data_ptr():
        total = total.clone()
    for piece in pieces[1:]:
        value = _widen(piece, wide, flip)
        if op in ("sum", "avg"):
            total += value
        elif op == "product":
            total *= value
        elif op == "max":
            torch.maximum(total, value, out=total)
        else:
            torch.minimum(total, value, out=total)
    if op == "avg":
        total /= len(pieces)
    if flip:
        total ^= torch.iinfo(torch.int64).min
    out.copy_(total.view(dtype) if dtype == torch.uint64 else total.to(dtype))


def _combine_bits(pieces: Sequence[torch.Tensor], op: str, out: torch.Tensor) -> None:
    # As bytes, which gives the same bits: torch has no bitwise arithmetic of wide unsigned integers on the host.
    whole = [as_bytes(piece.contiguous()) for piece in pieces]
    total = whole[0].clone()
    for piece in whole[1:]:
        _BITWISE[op](total, piece, out=total)
    out.copy_(total.view(out.dtype).view(out.shape))


def _widen(piece: torch.Tensor, wide: torch.dtype, flip: bool) -> torch.Tensor:
    if piece.dtype == torch.uint64:
        signed = piece.view(torch.int64)
        return signed ^ torch.iinfo(torch.int64).min if flip else signed
    return piece.to(wide)
