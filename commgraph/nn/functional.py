"""Collectives that a gradient passes through, for one replicated loss.

Megatron-LM's tensor-parallel mappings: every rank of the group computes *the same* loss, so the gradient of a replicated tensor is the
same on every rank and must be counted once, not once per rank. (An all-reduce whose backward is an all-reduce, the adjoint for the *sum*
of all ranks' losses, gives weight gradients that are exactly world_size times too large here.) A tensor is in one of three states:
*replicated* (equal on all ranks), *split* (each rank holds its piece of a dim), *partial* (the ranks' tensors add up to the value). Each
function moves between two:

=========================================  =======================  ==============  ===============
function                                   from -> to               forward         backward
=========================================  =======================  ==============  ===============
``copy_to``                                replicated -> per rank   identity        all_reduce
``reduce_from``                            partial -> replicated    all_reduce      identity
``gather_from``                            split -> replicated      all_gather      own slice
``scatter_to``                             replicated -> split      own slice       all_gather
``reduce_scatter_to``                      partial -> split         reduce_scatter  all_gather
``gather_from(..., reduce_grad=True)``     split -> per rank        all_gather      reduce_scatter
=========================================  =======================  ==============  ===============

The lines come in pairs, and the backward of one is the forward of its twin, so that derivatives of any order are right. The last pair is
sequence parallelism (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022): around a column-parallel
and a row-parallel layer it takes the place of ``copy_to`` and ``reduce_from``.

Every function takes its group explicitly and is collective over it, in forward and in backward. A group of one rank gives the input object
back. Where no gradient is wanted (``torch.no_grad()``, or x requires none) they are the coordinator's own operation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from commgraph.coordinator import GroupCoordinator
from commgraph.ops.rules import Rule, again, in_rule, record

__all__ = ["copy_to", "gather_from", "reduce_from", "reduce_scatter_to", "scatter_to"]


class Reducer(Protocol):
    """The part of a group that `copy_to` and `reduce_from` use."""

    @property
    def world_size(self) -> int:
        """Ranks in the group."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the group, as a new tensor."""


def copy_to(x: torch.Tensor, group: Reducer) -> torch.Tensor:
    """Passes a replicated tensor to computations that differ from rank to rank, e.g. to a column-parallel layer.

    Args:
        x: any shape, equal on all ranks; floating point.
        group: a `GroupCoordinator`.

    Returns:
        x. Backward sums the ranks' gradients (each is that of its rank's computation only), so that they are replicated, too.
    """
    return record(_Copy, x, group) if group.world_size > 1 and _records(x) else x


def reduce_from(x: torch.Tensor, group: Reducer) -> torch.Tensor:
    """Adds the ranks' partial results, e.g. of a row-parallel layer.

    Args:
        x: equal shapes on all ranks. Unchanged.
        group: a `GroupCoordinator`.

    Returns:
        The sum, a new tensor of x's shape and dtype, with the same bits on every rank. Backward is the identity, since the gradient of
        a sum with respect to each term is that of the sum, which every rank already has.
    """
    if group.world_size == 1 or not _records(x):
        with torch.no_grad():  # one rank gets x back, after its arguments were looked at
            return group.all_reduce(x)
    return record(_Reduce, x, group)  # type: ignore[no-any-return]  # a tensor


def gather_from(x: torch.Tensor, group: GroupCoordinator, dim: int = -1, *, reduce_grad: bool = False) -> torch.Tensor:
    """Joins the ranks' pieces.

    Args:
        x: equal shapes on all ranks, at least 1-D. Unchanged.
        group: who joins.
        dim: where the pieces are joined, in rank order.
        reduce_grad: the computation on the result. False: equal on every rank; then every rank has the whole gradient, and backward takes
            its own slice. True: different on every rank (a column-parallel layer, after a region split by sequence); then each rank
            has part of the gradient, and backward is a reduce-scatter.

    Returns:
        x's shape with `dim` multiplied by the group's size.
    """
    if group.world_size == 1 or not _records(x):
        with torch.no_grad():  # one rank gets x back, after its arguments were looked at
            return group.all_gather(x, dim)
    return record(_Gather, x, group, dim, reduce_grad)  # type: ignore[no-any-return]  # a tensor


def scatter_to(x: torch.Tensor, group: GroupCoordinator, dim: int = -1) -> torch.Tensor:
    """Takes this rank's piece of a replicated tensor. Sends nothing forward; backward gathers the pieces' gradients.

    Args:
        x: equal on all ranks; `x.shape[dim]` divides by the group's size. Unchanged.
        group: who shares.
        dim: which dimension is cut, in rank order.

    Returns:
        x's shape with `dim` divided by the group's size; contiguous, and sharing x's memory where that can be.

    Raises:
        ValueError: `dim` is out of range or cannot be shared equally.
    """
    _check_even(x, group, dim)
    if group.world_size == 1:
        return x
    return record(_Scatter, x, group, dim) if _records(x) else _own_piece(x, group, dim)


def reduce_scatter_to(x: torch.Tensor, group: GroupCoordinator, dim: int = -1) -> torch.Tensor:
    """Adds the ranks' partial results and keeps this rank's piece, e.g. of the sequence after a row-parallel layer.

    Args:
        x: equal shapes on all ranks; `x.shape[dim]` divides by the group's size. Unchanged.
        group: who adds and shares.
        dim: which dimension is cut, in rank order.

    Returns:
        x's shape with `dim` divided by the group's size. Backward gathers, since every rank's partial result entered every piece.
    """
    if group.world_size == 1 or not _records(x):
        with torch.no_grad():  # one rank gets x back, after its arguments were looked at
            return group.reduce_scatter(x, dim)
    return record(_ReduceScatter, x, group, dim)  # type: ignore[no-any-return]  # a tensor


def _records(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _check_even(x: torch.Tensor, group: GroupCoordinator, dim: int) -> None:
    where = f"scatter_to on group {group.name!r} (rank {group.rank})"
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{where}: dim={dim} is out of range for shape {tuple(x.shape)}")
    if x.shape[dim] % group.world_size:
        raise ValueError(
            f"{where}: dim {dim} of x {tuple(x.shape)} has {x.shape[dim]} elements, which {group.world_size} ranks cannot share equally"
        )


def _own_piece(x: torch.Tensor, group: GroupCoordinator, dim: int) -> torch.Tensor:
    size = x.shape[dim] // group.world_size
    return x.narrow(dim, group.rank_in_group * size, size).contiguous()


# Each backward applies the twin, and not the bare collective: with create_graph=True it is recorded in its turn. All are linear, so the
# tangent of a result is the function of the tangent. `node` is what torch calls ctx.


class _Copy(Rule):
    @staticmethod
    def compute(x: torch.Tensor, group: Reducer) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, node.group = inputs

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: Reducer) -> Any:
        return in_rule(_Copy, node, (x, group))

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return again(_Reduce, grad, node.group), None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return again(_Copy, tangent, node.group)


class _Reduce(Rule):
    @staticmethod
    def compute(x: torch.Tensor, group: Reducer) -> torch.Tensor:
        return group.all_reduce(x)

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, node.group = inputs

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: Reducer) -> Any:
        return in_rule(_Reduce, node, (x, group))

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return again(_Copy, grad, node.group), None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return again(_Reduce, tangent, node.group)


class _Gather(Rule):
    @staticmethod
    def compute(x: torch.Tensor, group: GroupCoordinator, dim: int, reduce_grad: bool) -> torch.Tensor:
        return group.all_gather(x, dim)

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, node.group, node.dim, node.reduce_grad = inputs

    @staticmethod
    def batched(x: torch.Tensor, group: GroupCoordinator, dim: int, reduce_grad: bool) -> tuple[Any, ...]:
        return group, _from_the_front(x, dim), reduce_grad

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: GroupCoordinator, dim: int, reduce_grad: bool) -> Any:
        return in_rule(_Gather, node, (x, group, dim, reduce_grad))

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return again(_ReduceScatter if node.reduce_grad else _Scatter, grad, node.group, node.dim), None, None, None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return again(_Gather, tangent, node.group, node.dim, node.reduce_grad)


class _Along(Rule):
    # Of a group along a dim.

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, node.group, node.dim = inputs

    @staticmethod
    def batched(x: torch.Tensor, group: GroupCoordinator, dim: int) -> tuple[Any, ...]:
        return group, _from_the_front(x, dim)


class _Scatter(_Along):
    @staticmethod
    def compute(x: torch.Tensor, group: GroupCoordinator, dim: int) -> torch.Tensor:
        return _own_piece(x, group, dim)

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: GroupCoordinator, dim: int) -> Any:
        return in_rule(_Scatter, node, (x, group, dim))

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return again(_Gather, grad, node.group, node.dim, False), None, None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return again(_Scatter, tangent, node.group, node.dim)


class _ReduceScatter(_Along):
    @staticmethod
    def compute(x: torch.Tensor, group: GroupCoordinator, dim: int) -> torch.Tensor:
        return group.reduce_scatter(x, dim)

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: GroupCoordinator, dim: int) -> Any:
        return in_rule(_ReduceScatter, node, (x, group, dim))

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return again(_Gather, grad, node.group, node.dim, True), None, None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return again(_ReduceScatter, tangent, node.group, node.dim)


def _from_the_front(x: torch.Tensor, dim: int) -> int:
    return dim % x.dim() if -x.dim() <= dim < x.dim() else dim
