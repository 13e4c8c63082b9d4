"""Operations that a compiler must neither drop nor move, as operators: messages, and whatever differs from rank to rank.

A compiler drops what nobody uses and moves what depends on nothing. With equal shapes it does so alike on all ranks; but a piece may be
empty on one rank alone, and where sizes differ so may the order that saves most memory. So these say that they change a token, a tensor of
the coordinator's, and stay where the program has them. Their derivatives are such operators again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from commgraph import compat
from commgraph.coordinator.group import GroupCoordinator
from commgraph.ops.library import apart, check_dim, check_peer, check_sizes, contiguous, define, derivative_of, real, resized

__all__ = ["all_gatherv", "all_to_allv", "barrier", "combine", "dispatch", "gather", "recv", "reduce_scatterv", "send"]

Sizes = Sequence[Any]


# Uneven pieces.


def _all_gatherv(x: torch.Tensor, group: GroupCoordinator, dim: int, sizes: Sizes, token: torch.Tensor) -> torch.Tensor:
    gathered = group.all_gatherv(x, dim, list(sizes))
    assert isinstance(gathered, torch.Tensor)
    return apart(gathered, x)


def _all_gatherv_fake(x: torch.Tensor, group: Any, dim: int, sizes: Sizes, token: torch.Tensor) -> torch.Tensor:
    dim = check_dim(x, dim)
    check_sizes(group, sizes)
    own = sizes[real(group).rank_in_group]
    compat.check(own == x.shape[dim], lambda: f"all_gatherv: sizes={list(sizes)} says {own} here; x {tuple(x.shape)} has another dim {dim}")
    return contiguous(x, resized(x, dim, sum(sizes)))


def _reduce_scatterv(x: torch.Tensor, group: GroupCoordinator, dim: int, sizes: Sizes, token: torch.Tensor) -> torch.Tensor:
    return apart(group.reduce_scatterv(x, dim, list(sizes)), x)


def _reduce_scatterv_fake(x: torch.Tensor, group: Any, dim: int, sizes: Sizes, token: torch.Tensor) -> torch.Tensor:
    dim = check_dim(x, dim)
    check_sizes(group, sizes)
    compat.check(
        sum(sizes) == x.shape[dim], lambda: f"reduce_scatterv: sizes={list(sizes)} do not add up to dim {dim} of x {tuple(x.shape)}"
    )
    return contiguous(x, resized(x, dim, sizes[real(group).rank_in_group]))


def _all_to_allv(
    x: torch.Tensor,
    group: GroupCoordinator,
    scatter_dim: int,
    gather_dim: int,
    input_sizes: Sizes,
    output_sizes: Sizes,
    token: torch.Tensor,
) -> torch.Tensor:
    sent, received = list(input_sizes), list(output_sizes)
    return apart(group.all_to_all(x, scatter_dim=scatter_dim, gather_dim=gather_dim, input_sizes=sent, output_sizes=received), x)


def _all_to_allv_fake(
    x: torch.Tensor, group: Any, scatter_dim: int, gather_dim: int, input_sizes: Sizes, output_sizes: Sizes, token: torch.Tensor
) -> torch.Tensor:
    scatter_dim, gather_dim = check_dim(x, scatter_dim), check_dim(x, gather_dim)
    check_sizes(group, input_sizes)
    check_sizes(group, output_sizes)
    compat.check(
        sum(input_sizes) == x.shape[scatter_dim],
        lambda: f"all_to_all: input_sizes={list(input_sizes)} do not add up to dim {scatter_dim} of x {tuple(x.shape)}",
    )
    shape = resized(x, scatter_dim, input_sizes[real(group).rank_in_group])
    shape[gather_dim] = sum(output_sizes)
    return contiguous(x, shape)


all_gatherv = define(
    "all_gatherv(Tensor x, Group group, int dim, SymInt[] sizes, Tensor(a!) token) -> Tensor", _all_gatherv, _all_gatherv_fake
)
reduce_scatterv = define(
    "reduce_scatterv(Tensor x, Group group, int dim, SymInt[] sizes, Tensor(a!) token) -> Tensor", _reduce_scatterv, _reduce_scatterv_fake
)
all_to_allv = define(
    "all_to_allv(Tensor x, Group group, int scatter_dim, int gather_dim, SymInt[] input_sizes, SymInt[] output_sizes, Tensor(a!) token)"
    " -> Tensor",
    _all_to_allv,
    _all_to_allv_fake,
)


# `node` is what torch calls ctx. Torch's own way to register a derivative refuses operators that change an argument.


@derivative_of("all_gatherv")
class _AllGatherV(Function):
    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: Any, dim: int, sizes: Sizes, token: torch.Tensor) -> Any:
        node.rest = group, dim, sizes, token
        with compat.below_autograd():
            return torch.ops.commgraph.all_gatherv(x, *node.rest)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> Any:
        return torch.ops.commgraph.reduce_scatterv(grad, *node.rest), None, None, None, None


@derivative_of("reduce_scatterv")
class _ReduceScatterV(Function):
    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: Any, dim: int, sizes: Sizes, token: torch.Tensor) -> Any:
        node.rest = group, dim, sizes, token
        with compat.below_autograd():
            return torch.ops.commgraph.reduce_scatterv(x, *node.rest)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> Any:
        return torch.ops.commgraph.all_gatherv(grad, *node.rest), None, None, None, None


@derivative_of("all_to_allv")
class _AllToAllV(Function):
    @staticmethod
    def forward(
        node: Any, x: torch.Tensor, group: Any, scatter_dim: int, gather_dim: int, sent: Sizes, received: Sizes, token: torch.Tensor
    ) -> Any:
        node.back = group, gather_dim, scatter_dim, received, sent, token
        with compat.below_autograd():
            return torch.ops.commgraph.all_to_allv(x, group, scatter_dim, gather_dim, sent, received, token)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> Any:
        return torch.ops.commgraph.all_to_allv(grad, *node.back), *[None] * 6


# To one rank: the others get nothing, a tensor without entries.


def _gather(x: torch.Tensor, group: GroupCoordinator, dst: int, dim: int, token: torch.Tensor) -> torch.Tensor:
    gathered = group.gather(x, dst, dim)
    return contiguous(x, resized(x, check_dim(x, dim), 0)) if gathered is None else apart(gathered, x)


def _gather_fake(x: torch.Tensor, group: Any, dst: int, dim: int, token: torch.Tensor) -> torch.Tensor:
    check_peer(group, dst, "dst")
    dim, n = check_dim(x, dim), real(group).world_size
    return contiguous(x, resized(x, dim, x.shape[dim] * n if real(group).rank_in_group == dst else 0))


gather = define("gather(Tensor x, Group group, int dst, int dim, Tensor(a!) token) -> Tensor", _gather, _gather_fake)


# Messages.


def _send(x: torch.Tensor, group: GroupCoordinator, dst: int, token: torch.Tensor) -> None:
    group.send(x, dst)


def _send_fake(x: torch.Tensor, group: Any, dst: int, token: torch.Tensor) -> None:
    check_peer(group, dst, "dst")


def _recv(
    group: GroupCoordinator, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device, token: torch.Tensor
) -> torch.Tensor:
    return group.recv(list(size), dtype, src, device=device)


def _recv_fake(group: Any, size: Sizes, dtype: torch.dtype, src: int, device: torch.device, token: torch.Tensor) -> torch.Tensor:
    check_peer(group, src, "src")
    return torch.empty(tuple(size), dtype=dtype, device=device)


send = define("send(Tensor x, Group group, int dst, Tensor(a!) token) -> ()", _send, _send_fake)
recv = define("recv(Group group, SymInt[] size, ScalarType dtype, int src, Device device, Tensor(a!) token) -> Tensor", _recv, _recv_fake)
barrier = define("barrier(Group group, Tensor(a!) token) -> ()", lambda group, token: group.barrier(), lambda group, token: None)


# The expert-parallel exchange: several tensors gathered along their rows, and rows summed where they came from.


def _rows(group: Any, sizes: Sizes | None, own: Any) -> list[Any]:
    """Rows of each rank; None: all have as many as this one."""
    return [own] * real(group).world_size if sizes is None else list(sizes)


def _dispatch(tensors: Sequence[torch.Tensor], group: GroupCoordinator, sizes: Sizes | None, token: torch.Tensor) -> list[torch.Tensor]:
    given = list(tensors)
    gathered = group.all_gatherv(given, 0, _rows(group, sizes, given[0].shape[0]))
    return [apart(y, x) for x, y in zip(given, gathered, strict=True)]


def _dispatch_fake(tensors: Sequence[torch.Tensor], group: Any, sizes: Sizes | None, token: torch.Tensor) -> list[torch.Tensor]:
    rows = _rows(group, sizes, tensors[0].shape[0])
    check_sizes(group, rows)
    return [contiguous(x, resized(x, 0, sum(rows))) for x in tensors]


def _dispatch_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.group, sizes, ctx.token = inputs
    ctx.sizes = None if sizes is None else list(sizes)
    ctx.floating = [x.is_floating_point() or x.is_complex() for x in tensors]


def _dispatch_gradient(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    back = [
        torch.ops.commgraph.combine(grad, ctx.group, ctx.sizes, ctx.token) if floating and grad is not None else None
        for grad, floating in zip(grads, ctx.floating, strict=True)
    ]
    return back, None, None, None


def _combine(x: torch.Tensor, group: GroupCoordinator, sizes: Sizes | None, token: torch.Tensor) -> torch.Tensor:
    return apart(group.reduce_scatterv(x, 0, None if sizes is None else list(sizes)), x)


def _combine_fake(x: torch.Tensor, group: Any, sizes: Sizes | None, token: torch.Tensor) -> torch.Tensor:
    n = real(group).world_size
    if sizes is not None:
        return _reduce_scatterv_fake(x, group, 0, sizes, token)
    compat.check(x.shape[0] % n == 0, lambda: f"combine: {x.shape[0]} rows do not divide by {n} ranks")
    return contiguous(x, resized(x, 0, x.shape[0] // n))


# What comes of it is as large on every rank, so that all drop it or none, and experts stand between it and what follows: it need
# not change the token, but has it, for its derivative.
dispatch = define(
    "dispatch(Tensor[] tensors, Group group, SymInt[]? sizes, Tensor token) -> Tensor[]",
    _dispatch,
    _dispatch_fake,
    keep=_dispatch_keep,
    gradient=_dispatch_gradient,
)
combine = define("combine(Tensor x, Group group, SymInt[]? sizes, Tensor(a!) token) -> Tensor", _combine, _combine_fake)


@derivative_of("combine")
class _Combine(Function):
    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: Any, sizes: Sizes | None, token: torch.Tensor) -> Any:
        node.rest = group, sizes, token
        with compat.below_autograd():
            return torch.ops.commgraph.combine(x, *node.rest)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> Any:
        return torch.ops.commgraph.dispatch([grad], *node.rest)[0], None, None, None
