"""What torch passes to a process group, in the words of a coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from commgraph.errors import UnsupportedTensorError

__all__ = ["copy_pieces", "fill", "flat", "host", "joined", "one", "reduction", "seconds"]

# By hash, which is the number of the operation: to ask for the operation itself takes 0.6 us.
_OPS = MappingProxyType(
    {
        hash(dist.ReduceOp(kind)): name
        for kind, name in (
            (dist.ReduceOp.SUM, "sum"),
            (dist.ReduceOp.AVG, "avg"),
            (dist.ReduceOp.PRODUCT, "product"),
            (dist.ReduceOp.MIN, "min"),
            (dist.ReduceOp.MAX, "max"),
            (dist.ReduceOp.BAND, "band"),
            (dist.ReduceOp.BOR, "bor"),
            (dist.ReduceOp.BXOR, "bxor"),
        )
    }
)


def reduction(op: Any) -> tuple[str, float | torch.Tensor | None]:
    """Return the name of a reduction, and the factor by which each rank's tensor is multiplied before, or None."""
    name = _OPS.get(hash(op))
    if name is not None:
        return name, None
    if op == dist.ReduceOp.PREMUL_SUM:
        return "sum", op.factor
    raise ValueError(f"{op!r} is not a reduction that commgraph knows: SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR, PREMUL_SUM")


def seconds(timeout: timedelta | None) -> timedelta | None:
    """Return a deadline, or None where torch says that there is none: by a negative or no time."""
    return timeout if timeout is not None and timeout > timedelta(0) else None


def one(tensors: Any, what: str) -> torch.Tensor:
    """Return the only tensor of a list, as one that needs no gradient; torch's process groups change tensors behind autograd's back."""
    if isinstance(tensors, torch.Tensor):
        return host(tensors, what)
    if len(tensors) != 1:
        raise ValueError(f"{what}: {len(tensors)} tensors; a group of commgraph takes one tensor a call")
    return host(tensors[0], what)


def host(x: Any, what: str) -> torch.Tensor:
    """Return a tensor as one that needs no gradient, after a check of its device."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{what}: a {type(x).__name__} instead of a tensor")
    if not x.is_cpu:
        raise UnsupportedTensorError(
            f"{what}: a tensor on {x.device}; the backend commgraph serves host tensors, and a group written in Python has no second "
            'backend. Make one group for each kind: init_process_group("nccl"), then new_group(backend="commgraph")'
        )
    return x.detach() if x.requires_grad else x


def flat(x: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor in one dimension: the same memory where it is contiguous."""
    return x.reshape(-1)


def fill(out: torch.Tensor, values: torch.Tensor) -> None:
    """Copy as many values into a tensor of any shape and strides, unless they are there already."""
    if out.data_ptr() != values.data_ptr() or not out.is_contiguous():
        out.copy_(values.view(out.shape))


def joined(tensors: Iterable[Any], what: str) -> torch.Tensor:
    """Return the elements of several tensors one after the other."""
    return torch.cat([flat(host(x, what)) for x in tensors])


def copy_pieces(outs: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Cut values into pieces, and copy each into its tensor."""
    for out, piece in zip(outs, values.split([out.numel() for out in outs]), strict=True):
        out.copy_(piece.view(out.shape))
