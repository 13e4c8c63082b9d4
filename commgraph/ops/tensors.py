"""Operations on tensors of one shape on all ranks, as operators with derivatives.

A derivative is the adjoint with respect to the *sum of all ranks' losses*, as for torch's functional collectives: each rank's input enters
the outputs, and so the losses, of all of them. (`commgraph.nn.functional` has the forms for one loss that every rank computes alike.) It is
expressed by operators again, and therefore has derivatives of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from commgraph import compat
from commgraph.coordinator.group import GroupCoordinator
from commgraph.ops.library import apart, check_dim, check_op, check_peer, contiguous, define, real, resized

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce", "reduce_scatter"]

# Reductions.


def _all_reduce(x: torch.Tensor, group: GroupCoordinator, op: str) -> torch.Tensor:
    return apart(group.all_reduce(x, op=op), x)


def _all_reduce_fake(x: torch.Tensor, group: Any, op: str) -> torch.Tensor:
    check_op(x, op)
    return contiguous(x, x.shape)


def _all_reduce_keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.group, ctx.op = inputs
    _keep_values(ctx, x, output)


def _all_reduce_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    total = torch.ops.commgraph.all_reduce(grad, ctx.group, "avg" if ctx.op == "avg" else "sum")
    return _through_op(ctx, total, lambda x: x), None, None


def _keep_values(ctx: Any, x: torch.Tensor, output: torch.Tensor) -> None:
    """Of a sum the derivative knows nothing; that of the other operations depends on where the result came from."""
    ctx.linear = ctx.op in ("sum", "avg")
    ctx.save_for_backward(*(() if ctx.linear else (x, output)))


def _through_op(ctx: Any, total: torch.Tensor, whole: Any) -> torch.Tensor:
    """The gradient of an input, from that of the result; `whole` makes a result that covers the input of one that is a piece of it."""
    if ctx.linear:
        return total
    x, output = ctx.saved_tensors
    if ctx.op == "product":
        # By what the others have multiplied with: a division would not survive a zero.
        n, me = real(ctx.group).world_size, real(ctx.group).rank_in_group
        everyone = torch.ops.commgraph.all_gather(x.unsqueeze(0), ctx.group, 0)
        product: torch.Tensor = total * torch.cat([everyone.narrow(0, 0, me), everyone.narrow(0, me + 1, n - 1 - me)]).prod(0)
        return product
    # Ranks that all had the largest entry share its gradient, as torch.amax has it.
    chosen = (x == whole(output)).to(total.dtype)
    shared: torch.Tensor = total * chosen / torch.ops.commgraph.all_reduce(chosen, ctx.group, "sum")
    return shared


all_reduce = define(
    "all_reduce(Tensor x, Group group, str op) -> Tensor",
    _all_reduce,
    _all_reduce_fake,
    keep=_all_reduce_keep,
    gradient=_all_reduce_gradient,
)


def _reduce_scatter(x: torch.Tensor, group: GroupCoordinator, dim: int, op: str) -> torch.Tensor:
    return apart(group.reduce_scatter(x, dim, op=op), x)


def _reduce_scatter_fake(x: torch.Tensor, group: Any, dim: int, op: str) -> torch.Tensor:
    check_op(x, op)
    n, dim = real(group).world_size, check_dim(x, dim)
    compat.check(x.shape[dim] % n == 0, lambda: f"reduce_scatter: dim {dim} of x {tuple(x.shape)} does not divide by {n} ranks")
    return contiguous(x, resized(x, dim, x.shape[dim] // n))


def _reduce_scatter_keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.group, ctx.dim, ctx.op = inputs
    _keep_values(ctx, x, output)


def _reduce_scatter_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    def whole(piece: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = torch.ops.commgraph.all_gather(piece, ctx.group, ctx.dim)
        return gathered

    total = whole(grad)
    return _through_op(ctx, total / real(ctx.group).world_size if ctx.op == "avg" else total, whole), None, None, None


reduce_scatter = define(
    "reduce_scatter(Tensor x, Group group, int dim, str op) -> Tensor",
    _reduce_scatter,
    _reduce_scatter_fake,
    keep=_reduce_scatter_keep,
    gradient=_reduce_scatter_gradient,
)


# Gathers.


def _all_gather(x: torch.Tensor, group: GroupCoordinator, dim: int) -> torch.Tensor:
    return apart(group.all_gather(x, dim), x)


def _all_gather_fake(x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    dim = check_dim(x, dim)
    return contiguous(x, resized(x, dim, x.shape[dim] * real(group).world_size))


def _all_gather_keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.group, ctx.dim = inputs


all_gather = define(
    "all_gather(Tensor x, Group group, int dim) -> Tensor",
    _all_gather,
    _all_gather_fake,
    keep=_all_gather_keep,
    gradient=lambda ctx, grad: (torch.ops.commgraph.reduce_scatter(grad, ctx.group, ctx.dim, "sum"), None, None),
)


# Exchanges.


def _all_to_all(x: torch.Tensor, group: GroupCoordinator, scatter_dim: int, gather_dim: int) -> torch.Tensor:
    return apart(group.all_to_all(x, scatter_dim=scatter_dim, gather_dim=gather_dim), x)


def _all_to_all_fake(x: torch.Tensor, group: Any, scatter_dim: int, gather_dim: int) -> torch.Tensor:
    n, scatter_dim, gather_dim = real(group).world_size, check_dim(x, scatter_dim), check_dim(x, gather_dim)
    compat.check(x.shape[scatter_dim] % n == 0, lambda: f"all_to_all: dim {scatter_dim} of x {tuple(x.shape)} does not divide by {n} ranks")
    shape = resized(x, scatter_dim, x.shape[scatter_dim] // n)
    shape[gather_dim] = shape[gather_dim] * n
    return contiguous(x, shape)


def _all_to_all_keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.group, ctx.scatter_dim, ctx.gather_dim = inputs


all_to_all = define(
    "all_to_all(Tensor x, Group group, int scatter_dim, int gather_dim) -> Tensor",
    _all_to_all,
    _all_to_all_fake,
    keep=_all_to_all_keep,
    gradient=lambda ctx, grad: (torch.ops.commgraph.all_to_all(grad, ctx.group, ctx.gather_dim, ctx.scatter_dim), None, None, None),
)


def _broadcast(x: torch.Tensor, group: GroupCoordinator, src: int) -> torch.Tensor:
    # A copy on src too: what comes out of an operator is none of its inputs.
    return group.broadcast(x.clone(memory_format=torch.contiguous_format), src)


def _broadcast_fake(x: torch.Tensor, group: Any, src: int) -> torch.Tensor:
    check_peer(group, src, "src")
    return contiguous(x, x.shape)


def _broadcast_keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.group, ctx.src = inputs


broadcast = define(
    "broadcast(Tensor x, Group group, int src) -> Tensor",
    _broadcast,
    _broadcast_fake,
    keep=_broadcast_keep,
    gradient=lambda ctx, grad: (torch.ops.commgraph.reduce(grad, ctx.group, ctx.src), None, None),
)


def _reduce(x: torch.Tensor, group: GroupCoordinator, dst: int) -> torch.Tensor:
    total = apart(group.all_reduce(x), x)
    return total if group.rank_in_group == dst else total.zero_()


# What broadcast needs as its derivative. In one operator, because those who get nothing must not be able to leave it out.
reduce = define(
    "reduce(Tensor x, Group group, int dst) -> Tensor",
    _reduce,
    _broadcast_fake,
    keep=_broadcast_keep,
    gradient=lambda ctx, grad: (torch.ops.commgraph.broadcast(grad, ctx.group, ctx.src), None, None),
)
