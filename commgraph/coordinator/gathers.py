"""Gathers and broadcasts: all_gather, gather, broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from commgraph.carriers import fill
from commgraph.communicators.base import Communicator
from commgraph.coordinator import checks
from commgraph.coordinator.checks import Place
from commgraph.coordinator.operation import Group, Operation, differentiate, run_directly
from commgraph.deadline import Deadline

__all__ = ["AllGather", "AllGatherV", "Broadcast", "BroadcastCopy", "Gather", "apart_from", "describe", "into"]


def describe(x: torch.Tensor) -> str:
    """Return dtype and shape as text."""
    return f"{x.dtype} {tuple(x.shape)}"


def into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """Return the result, or `out` filled with its values if that is given."""
    return result if out is None else fill(out, result)


def apart_from(out: torch.Tensor, x: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """Return x, or a copy if it shares memory with `out`; `own`: the view of `out` that is x's part, which x may be."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return x
    in_place = own is not None and own.data_ptr() == x.data_ptr() and own.is_contiguous() and x.is_contiguous()
    return x if in_place else x.clone()


class AllGather(Operation):
    """Every rank's tensor, joined along a dim, on all ranks; equal shapes."""

    name = "all_gather"
    routed_as = "all_gather"
    native: ClassVar[int | None] = 3
    schema = "all_gather(Tensor x, Group group, int dim) -> Tensor"
    dims: ClassVar[tuple[int, ...]] = (0,)

    @classmethod
    def check(
        cls, place: Place, x: Any, dim: Any, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int, list[int], tuple[int, ...], torch.Tensor | None]:
        dim = checks.dim(checks.tensor(place, x), dim)
        return cls._checked(place, x, dim, [x.shape[dim]] * place.world_size, out)

    @classmethod
    def _checked(
        cls, place: Place, x: torch.Tensor, dim: int, sizes: list[int], out: torch.Tensor | None
    ) -> tuple[torch.Tensor, int, list[int], tuple[int, ...], torch.Tensor | None]:
        shape = checks.resized(x, dim, sum(sizes))
        return x, dim, sizes, shape, None if out is None else checks.out(place, out, shape, x)

    @classmethod
    def alone(cls, x: torch.Tensor, dim: int, sizes: list[int], shape: tuple[int, ...], out: torch.Tensor | None) -> torch.Tensor:
        return into(out, x)

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        x, _, _, shape, _ = checked
        return shape, x.dtype, x.device

    @classmethod
    def text(cls, n: int, x: torch.Tensor, dim: int, sizes: list[int], shape: tuple[int, ...], out: torch.Tensor | None) -> str:
        return f"{x.dtype} {shape} dim={dim} {sizes}"

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
        shape: tuple[int, ...],
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        if out is None:
            out = strategy.new(shape, x.dtype, x.device)
        else:
            x = apart_from(out, x, out.split(sizes, dim)[group.rank_in_group])
        strategy.all_gather(x, dim, sizes, out, tag=tag, deadline=deadline)
        return out

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return [(args[2], "out")]

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dim: int, out: torch.Tensor | None = None) -> torch.Tensor:
        return into(out, x if group.world_size == 1 else cls.call(group, x, dim))

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dim: int) -> torch.Tensor:
        dim = checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, x.shape[dim] * place.world_size))

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        piece: torch.Tensor = differentiate("reduce_scatter", node, grad, node.args[0], "sum")
        return piece


class AllGatherV(AllGather):
    """Every rank's tensor, joined along a dim, on all ranks; pieces of any sizes."""

    name = "all_gatherv"
    native: ClassVar[int | None] = 3
    schema = "all_gatherv(Tensor x, Group group, int dim, SymInt[] sizes, Tensor(a!) token) -> Tensor"
    ordered = True

    @classmethod
    def check(
        cls, place: Place, x: Any, dim: Any, sizes: Any, name: str = "x"
    ) -> tuple[torch.Tensor, int, list[int], tuple[int, ...], torch.Tensor | None]:
        dim = checks.dim(checks.tensor(place, x, name), dim)
        return cls._checked(place, x, dim, checks.joined(place, x, dim, sizes, name), None)

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return ()

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
        if group.world_size == 1:
            return x
        # Equal sizes are said as well, so that the call is equal to that of a rank which neither traces nor wants a gradient.
        y: torch.Tensor = cls.call(group, x, dim, [x.shape[dim]] * group.world_size if sizes is None else list(sizes))
        return y

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        dim = checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, sum(checks.joined(place, x, dim, sizes))))

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        piece: torch.Tensor = differentiate("reduce_scatterv", node, grad, *node.args[:2], "sum")
        return piece


class AllGatherList(AllGatherV):
    """`AllGatherV` of several tensors with the same extents along a dim, as one call."""

    native: ClassVar[int | None] = None

    @classmethod
    def check(cls, place: Place, xs: Any, dim: Any, sizes: Any) -> tuple[Any, ...]:
        given = checks.several(xs, "x")
        return tuple([AllGatherV.check(place, x, dim, sizes, f"x[{i}]") for i, x in enumerate(given)])

    @classmethod
    def alone(cls, *parts: Any) -> list[torch.Tensor]:
        return [part[0] for part in parts]

    @classmethod
    def routed_by(cls, *parts: Any) -> tuple[Any, ...]:
        return AllGatherV.routed_by(*parts[0]) if parts else ((), torch.uint8, torch.device("cpu"))

    @classmethod
    def text(cls, n: int, *parts: Any) -> str:
        return "; ".join([AllGatherV.text(n, *part) for part in parts])

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, *parts: Any) -> list[torch.Tensor]:
        route = group._state.strategies.route
        serving = [route(cls.routed_as, *AllGatherV.routed_by(*part)) for part in parts]
        return [AllGatherV.serve(group, one, tag, deadline, *part) for one, part in zip(serving, parts, strict=True)]

    @classmethod
    def watched(cls, *args: Any) -> Sequence[Any]:
        return args[0] if isinstance(args[0], list | tuple) else ()

    @classmethod
    def traced(cls, group: Group, xs: Sequence[torch.Tensor], dim: int, sizes: Sequence[int] | None) -> list[torch.Tensor]:
        return [AllGatherV.traced(group, x, dim, sizes) for x in xs]


class Gather(Operation):
    """Every rank's tensor, joined along a dim, on one rank."""

    name = "gather"
    routed_as = "gather"
    rooted: ClassVar[bool] = True
    native: ClassVar[int | None] = 4
    schema = "gather(Tensor x, Group group, int dst, int dim, SymInt[]? sizes, Tensor(a!) token) -> Tensor"
    ordered = True
    differentiable: ClassVar[bool] = False

    @classmethod
    def check(cls, place: Place, x: Any, dst: Any, dim: Any, sizes: Any) -> tuple[torch.Tensor, int, int, list[int], tuple[int, ...]]:
        checks.tensor(place, x, gradient="gather")
        dst, dim = checks.peer(place, dst, "dst"), checks.dim(x, dim)
        pieces = checks.joined(place, x, dim, sizes)
        return x, dst, dim, pieces, checks.resized(x, dim, sum(pieces))

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        x, *_, shape = checked
        return shape, x.dtype, x.device

    @classmethod
    def text(cls, n: int, x: torch.Tensor, dst: int, dim: int, sizes: list[int], shape: tuple[int, ...]) -> str:
        return f"dst={dst} {x.dtype} {shape} dim={dim} {sizes}"

    @classmethod
    def serve(
        cls,
        group: Group,
        strategy: Communicator,
        tag: int,
        deadline: Deadline,
        x: torch.Tensor,
        dst: int,
        dim: int,
        sizes: list[int],
        shape: tuple[int, ...],
    ) -> torch.Tensor | None:
        out = strategy.new(shape, x.dtype, x.device) if group.rank_in_group == dst else None
        strategy.gather(x, dim, sizes, out, dst, tag=tag, deadline=deadline)
        return out

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dst: int, dim: int, sizes: Sequence[int] | None) -> torch.Tensor | None:
        if group.world_size == 1:
            return x
        checks.refuse_gradient(group, x, cls.name)
        gathered: torch.Tensor = cls.call(group, x, dst, dim, None if sizes is None else list(sizes))
        return gathered if group.rank_in_group == dst else None

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, dst: int, dim: int, sizes: Sequence[int] | None, token: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor | None = super().kernel(x, group, dst, dim, sizes, token)
        # An operator has to return a tensor: elsewhere one without elements.
        return x.new_empty(checks.resized(x, checks.dim(x, dim), 0)) if gathered is None else gathered

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dst: int, dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
        here, dim = place.rank_in_group == checks.peer(place, dst, "dst"), checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, sum(checks.joined(place, x, dim, sizes)) if here else 0))


class BroadcastCopy(Operation):
    """A new tensor with the values of one rank's."""

    name = "broadcast"
    routed_as = "broadcast"
    rooted: ClassVar[bool] = True
    schema = "broadcast(Tensor x, Group group, int src) -> Tensor"

    @classmethod
    def check(cls, place: Place, x: Any, src: Any) -> tuple[torch.Tensor, int]:
        return checks.tensor(place, x), checks.peer(place, src, "src")

    @classmethod
    def text(cls, n: int, x: torch.Tensor, src: int) -> str:
        return f"src={src} {describe(x)}"

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, src: int) -> torch.Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        strategy.broadcast(y, src, tag=tag, deadline=deadline)
        return y

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, src: int) -> torch.Tensor:
        # A copy on src too: an operator must not return one of its inputs.
        y: torch.Tensor = run_directly(Broadcast, group, (x.detach().clone(memory_format=torch.contiguous_format), src))
        return y

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, src: int) -> torch.Tensor:
        checks.peer(place, src, "src")
        return x.new_empty(x.shape)

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = differentiate("reduce_on_one", node, grad, node.args[0])
        return total


class Broadcast(BroadcastCopy):
    """The values of one rank's tensor, into those of all others."""

    native: ClassVar[int | None] = 2

    @classmethod
    def check(cls, place: Place, x: Any, src: Any) -> tuple[torch.Tensor, int]:
        checks.fillable(checks.tensor(place, x))
        return x, checks.peer(place, src, "src")

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, src: int) -> torch.Tensor:
        strategy.broadcast(checks.announce_filling(x), src, tag=tag, deadline=deadline)
        return x

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return [(args[0], "x")]

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, src: int) -> torch.Tensor:
        return x if group.world_size == 1 else x.copy_(BroadcastCopy.call(group, x, src))


class BroadcastPart(BroadcastCopy):
    """Broadcast of a tensor of a dict: filled on the others; on `src` only read, with any strides."""

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, x: torch.Tensor, src: int) -> torch.Tensor:
        strategy.broadcast(x, src, tag=tag, deadline=deadline)
        return x
