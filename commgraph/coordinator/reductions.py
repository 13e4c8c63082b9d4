"""Reductions: all_reduce, reduce, reduce_scatter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from commgraph import compat
from commgraph.communicators.base import Communicator
from commgraph.coordinator import checks
from commgraph.coordinator.checks import Place
from commgraph.coordinator.gathers import apart_from, describe, into
from commgraph.coordinator.operation import Group, Operation, differentiate
from commgraph.deadline import Deadline

__all__ = ["AllReduce", "AllReduceInPlace", "Reduce", "ReduceOnOne", "ReduceScatter", "ReduceScatterV"]


def keep_values(node: Any, op: str, x: torch.Tensor, output: torch.Tensor) -> None:
    """Save tensors for the derivative of a reduction: none for a sum, which is linear; else input and result."""
    node.linear = op in ("sum", "avg")
    node.op = op
    kept = () if node.linear else (x, output)
    node.save_for_backward(*kept)
    node.save_for_forward(*kept)


def through_reduction(node: Any, value: torch.Tensor, whole: Any) -> torch.Tensor:
    """Return `value` times the derivative of the sum over the ranks with respect to this rank's input.

    Args:
        node: of autograd, after `keep_values`.
        value: of the input's shape: the sum over the ranks of the gradient of the result, or the tangent of the input.
        whole: makes a result that covers the input of one that is a piece of it.
    """
    if node.linear:
        return value
    x, output = node.saved_tensors
    if node.op == "product":
        # The product of the other ranks' values: dividing by this rank's would fail at zero.
        real = compat.real_object(node.group)
        n, me = real.world_size, real.rank_in_group
        everyone = differentiate("all_gather", node, x.unsqueeze(0), 0)
        others = torch.cat([everyone.narrow(0, 0, me), everyone.narrow(0, me + 1, n - 1 - me)])
        return value * others.prod(0, dtype=others.dtype)
    # Ranks that all had the largest element share its gradient, as torch.amax has it.
    chosen = (x == whole(output)).to(value.dtype)
    shared: torch.Tensor = value * chosen / differentiate("all_reduce", node, chosen, "sum")
    return shared


class AllReduce(Operation):
    """A new tensor with the reduction of every rank's."""

    name = "all_reduce"
    routed_as = "all_reduce"
    native: ClassVar[int | None] = 2
    schema = "all_reduce(Tensor x, Group group, str op) -> Tensor"

    @classmethod
    def check(cls, place: Place, x: Any, op: Any = "sum") -> tuple[torch.Tensor, str]:
        return checks.tensor(place, x), checks.reduction(op, x.dtype)

    @classmethod
    def routed_by(cls, x: torch.Tensor, op: str) -> tuple[Any, ...]:
        return x.shape, x.dtype, x.device, op

    @classmethod
    def text(cls, n: int, x: torch.Tensor, op: str) -> str:
        return f"{op} {describe(x)}"

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, op: str) -> torch.Tensor:
        return strategy.all_reduce(x, op, tag=tag, deadline=deadline)

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, op: str) -> torch.Tensor:
        checks.reduction(op, x.dtype)
        return x.new_empty(x.shape)

    @classmethod
    def save_for_backward(cls, node: Any, x: torch.Tensor, group: Any, args: Sequence[Any], output: torch.Tensor) -> None:
        keep_values(node, args[0], x, output)

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        total = differentiate("all_reduce", node, grad, "avg" if node.op == "avg" else "sum")
        return through_reduction(node, total, lambda x: x)

    @classmethod
    def tangent(cls, node: Any, tangent: torch.Tensor) -> torch.Tensor:
        mine = through_reduction(node, tangent, lambda x: x)
        total: torch.Tensor = differentiate("all_reduce", node, mine, "avg" if node.op == "avg" else "sum")
        return total


class AllReduceInPlace(AllReduce):
    """`AllReduce` into the input."""

    name = "all_reduce_"

    @classmethod
    def check(cls, place: Place, x: Any, op: Any = "sum") -> tuple[torch.Tensor, str]:
        checks.fillable(checks.tensor(place, x))
        return x, checks.reduction(op, x.dtype)

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, op: str) -> torch.Tensor:
        return strategy.all_reduce_(checks.announce_filling(x), op, tag=tag, deadline=deadline)

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return [(args[0], "x")]

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, op: str) -> torch.Tensor:
        return x if group.world_size == 1 else x.copy_(AllReduce.call(group, x, op))


class Reduce(Operation):
    """The reduction of every rank's tensor, on one rank."""

    name = "reduce"
    routed_as = "reduce"
    rooted: ClassVar[bool] = True
    native: ClassVar[int | None] = 3
    schema = "reduce(Tensor x, Group group, int dst, str op, Tensor(a!) token) -> Tensor"
    ordered = True
    differentiable: ClassVar[bool] = False

    @classmethod
    def check(cls, place: Place, x: Any, dst: Any, op: Any) -> tuple[torch.Tensor, int, str]:
        return checks.tensor(place, x, gradient="reduce"), checks.peer(place, dst, "dst"), checks.reduction(op, x.dtype)

    @classmethod
    def routed_by(cls, x: torch.Tensor, dst: int, op: str) -> tuple[Any, ...]:
        return x.shape, x.dtype, x.device, op

    @classmethod
    def text(cls, n: int, x: torch.Tensor, dst: int, op: str) -> str:
        return f"dst={dst} {op} {x.dtype} {tuple(x.shape)}"

    @classmethod
    def serve(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, dst: int, op: str
    ) -> torch.Tensor | None:
        return strategy.reduce(x, op, dst, tag=tag, deadline=deadline)

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dst: int, op: str) -> torch.Tensor | None:
        if group.world_size == 1:
            return x
        checks.refuse_gradient(group, x, cls.name)
        total: torch.Tensor = cls.call(group, x, dst, op)
        return total if group.rank_in_group == dst else None

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, *args: Any) -> torch.Tensor:
        total: torch.Tensor = super().kernel(x, group, *args)
        return x.new_empty(0) if total is None else total  # an operator has to return a tensor

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dst: int, op: str) -> torch.Tensor:
        checks.reduction(op, x.dtype)
        return x.new_empty(x.shape if place.rank_in_group == checks.peer(place, dst, "dst") else (0,))


class ReduceOnOne(Operation):
    """The sum of every rank's tensor on one rank, zeros elsewhere: the derivative of a broadcast.

    One operator for all ranks: the compiler must not drop it on those that get zeros.
    """

    name = "reduce_on_one"
    routed_as = "reduce"
    rooted: ClassVar[bool] = True
    schema = "reduce_on_one(Tensor x, Group group, int dst) -> Tensor"

    @classmethod
    def check(cls, place: Place, x: Any, dst: int) -> tuple[torch.Tensor, int]:
        return checks.tensor(place, x), checks.peer(place, dst, "dst")

    @classmethod
    def text(cls, n: int, x: torch.Tensor, dst: int) -> str:
        return f"dst={dst} {describe(x)}"

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, dst: int) -> torch.Tensor:
        total = strategy.reduce(x, "sum", dst, tag=tag, deadline=deadline)
        return torch.zeros_like(x, memory_format=torch.contiguous_format) if total is None else total

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dst: int) -> torch.Tensor:
        checks.peer(place, dst, "dst")
        return x.new_empty(x.shape)

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        copied: torch.Tensor = differentiate("broadcast", node, grad, node.args[0])
        return copied


class ReduceScatter(Operation):
    """This rank's piece of the reduction of every rank's tensor; equal pieces."""

    name = "reduce_scatter"
    routed_as = "reduce_scatter"
    native: ClassVar[int | None] = 4
    schema = "reduce_scatter(Tensor x, Group group, int dim, str op) -> Tensor"
    dims: ClassVar[tuple[int, ...]] = (0,)

    @classmethod
    def check(
        cls, place: Place, x: Any, dim: Any, op: Any, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int, list[int], str, torch.Tensor | None]:
        checks.tensor(place, x)
        dim = checks.dim(x, dim)
        sizes = checks.even(place, x, dim)
        checks.reduction(op, x.dtype)
        if out is not None:
            out = checks.out(place, out, checks.resized(x, dim, sizes[place.rank_in_group]), x)
        return x, dim, sizes, op, out

    @classmethod
    def alone(cls, x: torch.Tensor, dim: int, sizes: list[int], op: str, out: torch.Tensor | None) -> torch.Tensor:
        return into(out, x)

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        x, _, _, op, _ = checked
        return x.shape, x.dtype, x.device, op

    @classmethod
    def text(cls, n: int, x: torch.Tensor, dim: int, sizes: list[int], op: str, out: torch.Tensor | None) -> str:
        return f"{op} {describe(x)} dim={dim} {sizes}"

    @classmethod
    def serve(
        cls,
        group: Group,
        strategy: Communicator,
        tag: int,
        deadline: Deadline,
        x: torch.Tensor,
        dim: int,
        sizes: list[int],
        op: str,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        if out is None:
            out = strategy.new(checks.resized(x, dim, sizes[group.rank_in_group]), x.dtype, x.device)
        else:
            x = apart_from(out, x)
        strategy.reduce_scatter(x, dim, sizes, op, out, tag=tag, deadline=deadline)
        return out

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return [(args[3], "out")]

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dim: int, op: str, out: torch.Tensor | None = None) -> torch.Tensor:
        return into(out, x if group.world_size == 1 else cls.call(group, x, dim, op))

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dim: int, op: str) -> torch.Tensor:
        checks.reduction(op, x.dtype)
        dim = checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, checks.even(place, x, dim)[0]))

    @classmethod
    def save_for_backward(cls, node: Any, x: torch.Tensor, group: Any, args: Sequence[Any], output: torch.Tensor) -> None:
        keep_values(node, args[1], x, output)

    @classmethod
    def whole(cls, node: Any, piece: torch.Tensor) -> torch.Tensor:
        """Return every rank's piece of the result."""
        gathered: torch.Tensor = differentiate("all_gather", node, piece, node.args[0])
        return gathered

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        total = cls.whole(node, grad)
        if node.op == "avg":
            total = total / compat.real_object(node.group).world_size
        return through_reduction(node, total, partial(cls.whole, node))

    @classmethod
    def tangent(cls, node: Any, tangent: torch.Tensor) -> torch.Tensor:
        mine = through_reduction(node, tangent, partial(cls.whole, node))
        *where, _ = node.args
        piece: torch.Tensor = differentiate(cls.name, node, mine, *where, "avg" if node.op == "avg" else "sum")
        return piece


class ReduceScatterV(ReduceScatter):
    """This rank's piece of the reduction of every rank's tensor; pieces of any sizes."""

    name = "reduce_scatterv"
    native: ClassVar[int | None] = 4
    schema = "reduce_scatterv(Tensor x, Group group, int dim, SymInt[] sizes, str op, Tensor(a!) token) -> Tensor"
    ordered = True

    @classmethod
    def check(cls, place: Place, x: Any, dim: Any, sizes: Any, op: Any) -> tuple[torch.Tensor, int, list[int], str, torch.Tensor | None]:
        checks.tensor(place, x)
        dim = checks.dim(x, dim)
        pieces = checks.split(place, x, dim, sizes)
        return x, dim, pieces, checks.reduction(op, x.dtype), None

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return ()

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dim: int, sizes: Sequence[int] | None, op: str) -> torch.Tensor:
        if group.world_size == 1:
            return x
        if sizes is None:
            return ReduceScatter.traced(group, x, dim, op)
        y: torch.Tensor = cls.call(group, x, dim, list(sizes), op)
        return y

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str) -> torch.Tensor:
        checks.reduction(op, x.dtype)
        dim = checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, checks.split(place, x, dim, sizes)[place.rank_in_group]))

    @classmethod
    def save_for_backward(cls, node: Any, x: torch.Tensor, group: Any, args: Sequence[Any], output: torch.Tensor) -> None:
        keep_values(node, args[2], x, output)

    @classmethod
    def whole(cls, node: Any, piece: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = differentiate("all_gatherv", node, piece, *node.args[:2])
        return gathered
