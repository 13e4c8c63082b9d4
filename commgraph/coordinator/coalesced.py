"""Coalesced calls: all_reduce, reduce_scatter, all_gather and broadcast of several tensors as one.

Small tensors of one dtype and device are sent in one buffer, by one call of their strategy; large ones, which a copy would only delay,
singly. Every rank gets the bits that separate calls would give it, in tensors of their own. Where torch traces, and where a gradient is
wanted, they are separate calls in order.

Lists of small plain tensors of one dtype are native calls (native/module_lists.c), which send the same bytes under the same tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from commgraph.carriers import CARRIERS
from commgraph.communicators.base import Communicator
from commgraph.communicators.memory import as_bytes, dense
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument, Place
from commgraph.coordinator.gathers import AllGather, Broadcast
from commgraph.coordinator.operation import Group, Operation
from commgraph.coordinator.reductions import AllReduce, AllReduceInPlace, ReduceScatter
from commgraph.deadline import Deadline

__all__ = ["LISTS", "either"]

# Bytes of one tensor from which on it is not copied to a buffer; native/module_lists.c has the same.
_LARGE_BYTES = 256 * 1024

# Checked arguments of the operation on one tensor.
Part = tuple[Any, ...]


class Coalesced(Operation):
    """An operation on a list of tensors. Its parts are the checked arguments of `single`, one tuple for each tensor."""

    single: ClassVar[type[Operation]]
    """The operation on one tensor."""

    @classmethod
    def check(cls, place: Place, xs: Sequence[Any], *args: Any) -> tuple[Part, ...]:
        parts = []
        for i, x in enumerate(xs):
            try:
                parts.append(cls.single.check(place, x, *args))
            except BadArgument as error:
                what = str(error)
                named = f"x[{i}]{what[1:]}" if what.startswith("x ") else f"x[{i}]: {what}"
                raise BadArgument(named, unsupported=error.unsupported) from None
        return tuple(parts)

    @classmethod
    def alone(cls, *parts: Part) -> list[torch.Tensor]:
        return [part[0] for part in parts]

    @classmethod
    def routed_by(cls, *parts: Part) -> tuple[Any, ...]:
        if not parts:
            return (), None, torch.device("cpu")
        first, *_ = cls.grouped(parts)
        return cls.routed_together([parts[i] for i in first])

    @classmethod
    def text(cls, n: int, *parts: Part) -> str:
        return f"[{'; '.join([cls.single.text(n, *part) for part in parts])}]"

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, *parts: Part) -> list[torch.Tensor]:
        results: dict[int, torch.Tensor] = {}
        route = group._state.strategies.route
        for indices in cls.grouped(parts):
            chosen = [parts[i] for i in indices]
            serving = route(cls.routed_as, *cls.routed_together(chosen))
            if len(chosen) == 1:
                results[indices[0]] = cls.single.serve(group, serving, tag, deadline, *chosen[0])
            else:
                results |= zip(indices, cls.serve_together(group, serving, tag, deadline, chosen), strict=True)
        return [results[i] for i in range(len(parts))]

    @classmethod
    def grouped(cls, parts: Sequence[Part]) -> list[list[int]]:
        """Return, for each buffer, the indices of the tensors in it; alike on every rank of the call."""
        found: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            x: torch.Tensor = part[0]
            apart = x.nbytes >= _LARGE_BYTES or cls.rounds_by_position(part)
            found.setdefault((x.dtype, x.device.type, i if apart else None), []).append(i)
        return list(found.values())

    @classmethod
    def rounds_by_position(cls, part: Part) -> bool:
        """Whether an element's bits depend on its position in the buffer; such a tensor is sent singly."""
        return False

    @classmethod
    def routed_together(cls, parts: Sequence[Part]) -> tuple[Any, ...]:
        """Return the arguments of `route` for tensors in one buffer."""
        if len(parts) == 1:
            return cls.single.routed_by(*parts[0])
        _, *others = cls.single.routed_by(*parts[0])
        return (sum([part[0].numel() for part in parts]),), *others

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        """Have the strategy serve several tensors of one dtype and device at once, and return their results."""
        raise NotImplementedError(cls)

    # Where torch traces or records.

    @classmethod
    def watched(cls, *args: Any) -> Sequence[Any]:
        xs: Sequence[Any] = args[0]
        return xs

    @classmethod
    def traced(cls, group: Group, xs: Sequence[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        return [cls.single.traced(group, x, *args) for x in xs]


class CoalescedAllReduce(Coalesced):
    """`AllReduce` of several tensors."""

    name = "all_reduce"
    routed_as = "all_reduce"
    single: ClassVar[type[Operation]] = AllReduce

    @classmethod
    def rounds_by_position(cls, part: Part) -> bool:
        return multiplies_complex(part[0], part[1])

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        xs, op = [x for x, _ in parts], parts[0][1]
        whole = torch.cat([dense(x).reshape(-1) for x in xs])
        total = strategy.all_reduce_(whole, op, tag=tag, deadline=deadline)
        pieces = total.split([x.numel() for x in xs])
        return [piece.clone().view(x.shape) for piece, x in zip(pieces, xs, strict=True)]


class CoalescedAllReduceInPlace(CoalescedAllReduce):
    """`AllReduceInPlace` of several tensors."""

    name = "all_reduce_"
    single: ClassVar[type[Operation]] = AllReduceInPlace

    @classmethod
    def check(cls, place: Place, xs: Sequence[Any], *args: Any) -> tuple[Part, ...]:
        parts = super().check(place, xs, *args)
        seen: dict[int, int] = {}
        for i, (x, _) in enumerate(parts):
            first = seen.setdefault(x.data_ptr(), i) if x.numel() and not x.is_meta else i
            if first != i:
                raise BadArgument(f"x[{i}] lies where x[{first}] does, and would be reduced twice; give it once")
        return parts

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        return filled([x for x, _ in parts], super().serve_together(group, strategy, tag, deadline, parts))

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return named(args[0])


class CoalescedReduceScatter(Coalesced):
    """`ReduceScatter` of several tensors."""

    name = "reduce_scatter"
    routed_as = "reduce_scatter"
    single: ClassVar[type[Operation]] = ReduceScatter

    @classmethod
    def check(cls, place: Place, xs: Sequence[Any], dim: Any, op: Any, out: Any = None) -> tuple[Part, ...]:
        without_out(out)
        return super().check(place, xs, dim, op)

    @classmethod
    def rounds_by_position(cls, part: Part) -> bool:
        return multiplies_complex(part[0], part[3])

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        n, op = group.world_size, parts[0][3]
        # One row for each rank: its piece of every tensor.
        rows = [torch.stack([dense(piece).reshape(-1) for piece in x.split(sizes, dim)]) for x, dim, sizes, *_ in parts]
        whole = torch.cat(rows, 1)
        out = whole.new_empty(1, whole.shape[1])
        strategy.reduce_scatter(whole, 0, [1] * n, op, out, tag=tag, deadline=deadline)
        shapes = [checks.resized(x, dim, sizes[0]) for x, dim, sizes, *_ in parts]
        pieces = out[0].split([row.shape[1] for row in rows])
        return [piece.clone().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    @classmethod
    def traced(cls, group: Group, xs: Sequence[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        without_out(args[2], ValueError)
        return super().traced(group, xs, *args)


class CoalescedAllGather(Coalesced):
    """`AllGather` of several tensors."""

    name = "all_gather"
    routed_as = "all_gather"
    single: ClassVar[type[Operation]] = AllGather

    @classmethod
    def check(cls, place: Place, xs: Sequence[Any], dim: Any, out: Any = None) -> tuple[Part, ...]:
        without_out(out)
        return super().check(place, xs, dim)

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        n = group.world_size
        mine = torch.cat([joinable(x) for x, *_ in parts])
        whole = mine.new_empty(n, mine.numel())
        strategy.all_gather(mine.unsqueeze(0), 0, [1] * n, whole, tag=tag, deadline=deadline)
        columns = whole.split([x.numel() for x, *_ in parts], 1)
        return [torch.cat(list(column.view(n, *x.shape)), dim).view(x.dtype) for column, (x, dim, *_) in zip(columns, parts, strict=True)]

    @classmethod
    def traced(cls, group: Group, xs: Sequence[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        without_out(args[1], ValueError)
        return super().traced(group, xs, *args)


class CoalescedBroadcast(Coalesced):
    """`Broadcast` of several tensors."""

    name = "broadcast"
    routed_as = "broadcast"
    rooted: ClassVar[bool] = True
    single: ClassVar[type[Operation]] = Broadcast

    @classmethod
    def serve_together(
        cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, parts: Sequence[Part]
    ) -> Sequence[torch.Tensor]:
        xs, src = [x for x, _ in parts], parts[0][1]
        whole = torch.cat([joinable(x) for x in xs])
        strategy.broadcast(whole, src, tag=tag, deadline=deadline)
        if group.rank_in_group == src:
            return [checks.announce_filling(x) for x in xs]
        pieces = whole.split([x.numel() for x in xs])
        return filled(xs, [piece.view(x.dtype).view(x.shape) for piece, x in zip(pieces, xs, strict=True)])

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return named(args[0])


# By the name of the operation on one tensor.
LISTS = MappingProxyType(
    {
        operation.name: operation
        for operation in (CoalescedAllReduce, CoalescedAllReduceInPlace, CoalescedReduceScatter, CoalescedAllGather, CoalescedBroadcast)
    }
)


def either(operation: type[Operation], x: object) -> type[Operation]:
    """Return the operation on x: the given one, or on a list of tensors that of lists."""
    return LISTS[operation.name] if isinstance(x, list | tuple) else operation


def multiplies_complex(x: torch.Tensor, op: str) -> bool:
    """Whether a reduction multiplies complex numbers, which torch's vectors round otherwise than its scalars."""
    return x.dtype.is_complex and op == "product"


def joinable(x: torch.Tensor) -> torch.Tensor:
    """Return the elements of x, 1-D, as numbers of a dtype that torch joins."""
    return as_bytes(dense(x)).view(CARRIERS[x.itemsize])


def filled(xs: list[torch.Tensor], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the caller's tensors, filled."""
    for x, value in zip(xs, values, strict=True):
        x.copy_(value)
    return xs


def named(xs: Sequence[Any]) -> Sequence[tuple[Any, str]]:
    """Return tensors with their names in a list."""
    return [(x, f"x[{i}]") for i, x in enumerate(xs)]


def without_out(out: Any, kind: type[Exception] = BadArgument) -> None:
    """Refuse a tensor for the result of a list."""
    if out is not None:
        raise kind("out= goes with one tensor, and x is a list of them; leave it out")
