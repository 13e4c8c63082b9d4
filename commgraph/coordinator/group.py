"""`GroupCoordinator`: one group of ranks, every operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar, overload

import attrs
import torch
import torch.distributed as dist
from torch.compiler import is_dynamo_compiling

from commgraph import ambient, compat
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.shm_fast import native_calls
from commgraph.communicators.tags import COLLECTIVE, make_tag
from commgraph.coordinator import dict_messages, experts, messages, object_work
from commgraph.coordinator.asynchronous import begin_collective, begin_natively
from commgraph.coordinator.capture import GraphCapture, capture
from commgraph.coordinator.checks import BadArgument, like, shape
from commgraph.coordinator.coalesced import LISTS, either
from commgraph.coordinator.exchanges import AllToAll, Barrier, CloseBarrier, Scatter, SiblingBarrier
from commgraph.coordinator.experts import Dispatched, Sizes
from commgraph.coordinator.failures import Call
from commgraph.coordinator.gathers import AllGather, AllGatherList, AllGatherV, Broadcast, Gather
from commgraph.coordinator.native_messages import NativeMessages
from commgraph.coordinator.objects import Objects
from commgraph.coordinator.objects_hosts import objects_of
from commgraph.coordinator.operation import Describe, Operation, collective, explain, perform, raise_native, run, run_generally
from commgraph.coordinator.operators import OPERATIONS
from commgraph.coordinator.reductions import AllReduce, AllReduceInPlace, Reduce, ReduceScatter, ReduceScatterV
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import BackendUnavailableError, BuildError, ContextClosedError
from commgraph.shm import native_module
from commgraph.work import AnySource, Recv, Send, Work

__all__ = ["GroupCoordinator"]

T = TypeVar("T")
D = TypeVar("D", bound=Mapping[Any, Any])


@attrs.define
class Family:
    """The coordinators on one set of communicators, and siblings that end with them."""

    coordinators: list[GroupCoordinator] = attrs.field(factory=list)
    siblings: list[GroupCoordinator] = attrs.field(factory=list)
    # The World, which closes its groups when it is collected: it lives as long as they are used.
    world: object = None


# Attributes that compiled code may read. `facts` become constants of the graph, which is compiled again for a group whose `guard`
# differs; the operations are traced through. The name of a group is no fact: one graph serves groups of any name.
@compat.opaque(
    guard=lambda group: group._guarded,
    facts=(
        "world_size",
        "rank_in_group",
        "rank",
        "local_rank",
        "device",
        "next_in_group",
        "prev_in_group",
        "is_first_rank",
        "is_last_rank",
        "_token",
        "_experts",
    ),
    operations=(
        "all_reduce",
        "all_reduce_",
        "reduce_scatter",
        "reduce_scatterv",
        "all_gather",
        "all_gatherv",
        "gather",
        "scatter",
        "reduce",
        "all_to_all",
        "broadcast",
        "send",
        "recv",
        "sendrecv",
        "barrier",
        "all_reduce_async",
        "all_gather_async",
        "reduce_scatter_async",
        "broadcast_async",
        "all_to_all_async",
        "gather_async",
        "barrier_async",
        "dispatch",
        "combine",
    ),
)
@attrs.frozen(eq=False, repr=False, slots=False)
class GroupCoordinator(compat.OpaqueBase):
    """One rank's view of a group of ranks, with every operation. Made by `World.context`, never by hand.

    `rank`, `ranks`, `first_rank`, `next_rank`, ... are global ranks; `src` and `dst` arguments are ranks *in the group*. `dim` counts as
    torch's does. Host tensors are served by the host's strategies, device tensors by the device's. Every tensor operation takes any
    strides and gives contiguous results. Operations are collective: every rank of the group calls them in the same order (send and
    receive: the two ranks concerned). In a group of one rank they return their input object, or the filled `out`, after the same checks.

    Errors of every operation, beside those that it names:
        UnsupportedTensorError, ValueError: bad input, raised before anything is sent. If every rank raised, the group goes on.
        CollectiveTimeoutError: the deadline passed (`timeout`: a timedelta or seconds; 0 polls; default: that of the options).
        CollectiveMismatchError: the ranks called different things.
        PeerLostError: a rank of the group is gone.
        ConcurrentCallError: another call of the group is under way, on another thread or around this one; the group goes on.
        ContextClosedError: the context was closed, before the call or during it.

    After a timeout, a mismatch or a lost peer the group is broken: every call raises that error again, and the context can only be closed.

    Attributes:
        name: what the layout calls the group.
        rank: global rank of this process (or thread).
        ranks: global ranks of the group, in group order.
        local_rank: number of this rank on its node.
        device: where its device tensors live.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    local_rank: int
    device: torch.device
    world_size: int
    rank_in_group: int
    _state: GroupState = attrs.field(alias="state")
    _objects: Objects = attrs.field(alias="objects")
    # Native calls for plain arguments (native/module_fast.c), which return None for all others; None where the group has none.
    _fast: Any = attrs.field(alias="fast")
    # Argument that ordered operators declare as changed; all groups of a world have the same one.
    _token: torch.Tensor = attrs.field(alias="token")
    _family: Family = attrs.field(alias="family")
    # What a compiled graph depends on, which is compared in each call of one.
    _guarded: list[Any] = attrs.field(init=False)

    _operations: ClassVar[Mapping[str, type[Operation]]] = OPERATIONS

    @_guarded.default
    def _facts(self) -> list[Any]:
        return [self.world_size, self.rank_in_group, self.rank, self.local_rank, str(self.device), self._experts]

    @classmethod
    def _of(cls, name: str, state: GroupState, *, local_rank: int, device: torch.device, token: torch.Tensor, world: object) -> Self:
        """Make the first coordinator on a state."""
        members = state.members
        state.native_messages = NativeMessages.open(state)
        made = cls(
            name=name,
            rank=members.rank,
            ranks=members.ranks,
            local_rank=local_rank,
            device=device,
            world_size=members.world_size,
            rank_in_group=members.rank_in_group,
            state=state,
            objects=objects_of(state),
            fast=None,
            token=token,
            family=Family(world=world),
        )
        return made._joined(name)

    def _joined(self, name: str) -> Self:
        """Make a further coordinator on the communicators of this one."""
        coordinator = attrs.evolve(self, name=name, fast=self._open_fast(name))
        self._family.coordinators.append(coordinator)
        self._state.enter(name)
        return coordinator

    def _open_fast(self, name: str) -> Any:
        if self.world_size > 1:
            fast, records = self._state.fast, self._state.records
            calls = None if fast is None else fast.open(Describe(OPERATIONS, LISTS, self), self._state.timeouts.host)
            if calls is not None and records is not None:
                strategy = next((one.name for one in self._state.strategies.communicators if one.serves_host), "")
                calls.record(records[name], records.text(strategy))
            return calls
        native = native_module.load()
        return None if native is None else native_calls(native, None, None, 0)

    # Facts.

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first rank."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the group's last rank."""
        return self.ranks[-1]

    @property
    def next_in_group(self) -> int:
        """Rank in the group that follows this one, around its end."""
        return (self.rank_in_group + 1) % self.world_size

    @property
    def prev_in_group(self) -> int:
        """Rank in the group before this one, around its start."""
        return (self.rank_in_group - 1) % self.world_size

    @property
    def next_rank(self) -> int:
        """Global rank of `next_in_group`."""
        return self.ranks[self.next_in_group]

    @property
    def prev_rank(self) -> int:
        """Global rank of `prev_in_group`."""
        return self.ranks[self.prev_in_group]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the group's first."""
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank is the group's last."""
        return self.rank == self.last_rank

    @property
    def communicators(self) -> Mapping[str, tuple[str, ...]]:
        """Operation -> names of the strategies that may serve it, first choice first. Empty for one rank."""
        return self._state.strategies.table

    def communicator(self, name: str) -> Communicator:
        """The live strategy called `name`.

        Raises:
            BackendUnavailableError: if the group has none of that name.
        """
        live = self._state.strategies.communicators
        for communicator in live:
            if communicator.name == name:
                return communicator
        have = ", ".join(c.name for c in live) or "none (a group of one rank needs none)"
        raise BackendUnavailableError(f"group {self.name!r} (rank {self.rank}) has no strategy {name!r}; it has: {have}")

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Strategies that were considered for the group and cannot serve it, with the reasons."""
        return self._state.strategies.refused

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent on the group's communicators, by whichever of the coordinators that share them."""
        return sum(communicator.bytes_sent for communicator in self._state.strategies.communicators)

    @property
    def cpu_group(self) -> dist.ProcessGroup | None:
        """The torch process group for host tensors, unknown to torch.distributed's tables.

        None for one rank and after close. Ranks that communicate by other means than gloo make it when it is first asked for, each by
        itself, and its connections as torch uses them: ranks which all begin with a receive wait for ever. ``torch_group("cpu")`` connects
        at once.
        """
        return self._state.torch_groups.cpu

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The torch process group of the backend for device tensors; `cpu_group` where there is none."""
        return self._state.torch_groups.device

    @property
    def shares_with(self) -> tuple[GroupCoordinator, ...]:
        """Coordinators of this context on the same communicators. Calls on one of them wait for those on the others."""
        return tuple(other for other in self._family.coordinators if other is not self and self.world_size > 1)

    @property
    def siblings(self) -> tuple[GroupCoordinator, ...]:
        """The coordinators that `sibling` has made of this one and those that it shares with, as far as they are open."""
        return tuple(one for one in self._family.siblings if not one._state.is_closed)

    @property
    def _may_be_left(self) -> bool:
        """Whether a rank may not come to close the group, which is broken, or where an object was waited for in vain, none came since."""
        return self.is_broken or self._state.waited_in_vain

    @property
    def is_broken(self) -> bool:
        """Whether a timeout, a mismatch or a lost peer has broken the group."""
        return self._state.failures.broken is not None

    @property
    def _experts(self) -> int | None:
        return self._state.experts

    # Reductions.

    @overload
    def all_reduce(self, x: torch.Tensor, *, op: str = ..., timeout: Timeout = ...) -> torch.Tensor: ...
    @overload
    def all_reduce(self, x: Sequence[torch.Tensor], *, op: str = ..., timeout: Timeout = ...) -> list[torch.Tensor]: ...
    def all_reduce(
        self, x: torch.Tensor | Sequence[torch.Tensor], *, op: str = "sum", timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Reduces x over the group.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic. Unchanged. Or a list of them, as one call (coalesced).
            op: "sum", "avg" (not of integers), "max", "min" or "product"; of integers and bool also "band", "bor" or "bxor". Taken in rank
                order, small floats in float32.
            timeout: deadline.

        Returns:
            A new tensor of x's shape and dtype, with the same bits on every rank; of a list a list.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.all_reduce(x, op, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, either(AllReduce, x), self, (x, op), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(either(AllReduce, x), self, (x, op), timeout)
        return result

    @overload
    def all_reduce_(self, x: torch.Tensor, *, op: str = ..., timeout: Timeout = ...) -> torch.Tensor: ...
    @overload
    def all_reduce_(self, x: Sequence[torch.Tensor], *, op: str = ..., timeout: Timeout = ...) -> list[torch.Tensor]: ...
    def all_reduce_(
        self, x: torch.Tensor | Sequence[torch.Tensor], *, op: str = "sum", timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """`all_reduce` into x itself, which is returned; of a list into each of its tensors."""
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if fast.all_reduce_(x, op, timeout):
                    return x if isinstance(x, torch.Tensor) else list(x)
            except BaseException as error:
                raise_native(error, either(AllReduceInPlace, x), self, (x, op), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(either(AllReduceInPlace, x), self, (x, op), timeout)
        return result

    def reduce(self, x: torch.Tensor, dst: int = 0, *, op: str = "sum", timeout: Timeout = None) -> torch.Tensor | None:
        """Reduces x over the group, on one rank.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic; without a gradient. Unchanged.
            dst: rank in the group that gets the result.
            op: as for `all_reduce`.
            timeout: deadline.

        Returns:
            On `dst` a new tensor of x's shape and dtype, with the bits that `all_reduce` gives; None elsewhere.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.reduce(x, dst, op, timeout)) is not None:
                    return None if y is False else y
            except BaseException as error:
                raise_native(error, Reduce, self, (x, dst, op), timeout)
        result: torch.Tensor | None = run(Reduce, self, (x, dst, op), timeout)
        return result

    @overload
    def reduce_scatter(
        self, x: torch.Tensor, dim: int = ..., *, op: str = ..., out: torch.Tensor | None = ..., timeout: Timeout = ...
    ) -> torch.Tensor: ...
    @overload
    def reduce_scatter(self, x: Sequence[torch.Tensor], dim: int = ..., *, op: str = ..., timeout: Timeout = ...) -> list[torch.Tensor]: ...
    def reduce_scatter(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        dim: int = -1,
        *,
        op: str = "sum",
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Reduces x over the group and keeps this rank's piece of `dim`.

        Args:
            x: equal shapes on all ranks; `x.shape[dim]` divides by the group's size. Unchanged. Or a list of them, as one call.
            dim: which dimension is cut, in rank order.
            op: as for `all_reduce`.
            out: filled and returned in place of a new tensor; not with a list.
            timeout: deadline.

        Returns:
            x's shape with `dim` divided by the group's size; of a list a list.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.reduce_scatter(x, dim, op, out, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, either(ReduceScatter, x), self, (x, dim, op, out), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(either(ReduceScatter, x), self, (x, dim, op, out), timeout)
        return result

    def reduce_scatterv(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None, *, op: str = "sum", timeout: Timeout = None
    ) -> torch.Tensor:
        """Reduces x over the group and keeps this rank's piece, of uneven pieces.

        Args:
            x: equal shapes on all ranks. Unchanged.
            dim: which dimension is cut, in rank order.
            sizes: extent of each rank's piece, adding up to `x.shape[dim]`; zeros are fine; None cuts evenly.
            op: as for `all_reduce`.
            timeout: deadline.

        Returns:
            x's shape with `sizes[rank_in_group]` along `dim`.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.reduce_scatterv(x, dim, sizes, op, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, ReduceScatterV, self, (x, dim, sizes, op), timeout)
        result: torch.Tensor = run(ReduceScatterV, self, (x, dim, sizes, op), timeout)
        return result

    # Gathers, scatter, broadcast.

    @overload
    def all_gather(self, x: torch.Tensor, dim: int = ..., *, out: torch.Tensor | None = ..., timeout: Timeout = ...) -> torch.Tensor: ...
    @overload
    def all_gather(self, x: Sequence[torch.Tensor], dim: int = ..., *, timeout: Timeout = ...) -> list[torch.Tensor]: ...
    def all_gather(
        self, x: torch.Tensor | Sequence[torch.Tensor], dim: int = -1, *, out: torch.Tensor | None = None, timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Concatenates every rank's x along `dim`.

        Args:
            x: equal shapes on all ranks, at least 1-D. Unchanged. Or a list of them, as one call (coalesced).
            dim: where the pieces are joined, in rank order.
            out: filled and returned in place of a new tensor; not with a list.
            timeout: deadline.

        Returns:
            x's shape with `dim` multiplied by the group's size; of a list a list.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.all_gather(x, dim, out, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, either(AllGather, x), self, (x, dim, out), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(either(AllGather, x), self, (x, dim, out), timeout)
        return result

    def all_gatherv(
        self, x: torch.Tensor | Sequence[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None, *, timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Concatenates uneven pieces along `dim`.

        Args:
            x: one tensor, or a list of them with the same extent along `dim`. Shapes may differ between ranks along `dim` alone.
            dim: where the pieces are joined, in rank order.
            sizes: extent of every rank's piece; zeros are fine; None: all like this rank's.
            timeout: deadline, of the whole list.

        Returns:
            A tensor with `sum(sizes)` along `dim`, or a list of them.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.all_gatherv(x, dim, sizes, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, AllGatherV, self, (x, dim, sizes), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(
            AllGatherV if isinstance(x, torch.Tensor) else AllGatherList, self, (x, dim, sizes), timeout
        )
        return result

    def gather(
        self, x: torch.Tensor, dst: int = 0, dim: int = -1, *, sizes: Sequence[int] | None = None, timeout: Timeout = None
    ) -> torch.Tensor | None:
        """Concatenates every rank's x along `dim`, on one rank.

        Args:
            x: at least 1-D, without a gradient. Shapes may differ between ranks along `dim` alone. Unchanged.
            dst: rank in the group that gets the result.
            dim: where the pieces are joined, in rank order.
            sizes: extent of every rank's piece along `dim`; zeros are fine; None: all like this rank's.
            timeout: deadline.

        Returns:
            On `dst` x's shape with `sum(sizes)` along `dim`, None elsewhere.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.gather(x, dst, dim, sizes, timeout)) is not None:
                    return None if y is False else y
            except BaseException as error:
                raise_native(error, Gather, self, (x, dst, dim, sizes), timeout)
        result: torch.Tensor | None = run(Gather, self, (x, dst, dim, sizes), timeout)
        return result

    def scatter(
        self,
        x: torch.Tensor | None = None,
        src: int = 0,
        dim: int = -1,
        *,
        sizes: Sequence[int] | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Cuts the tensor of one rank along `dim`, and gives each rank its piece.

        Args:
            x: at least 1-D, without a gradient; unchanged. None elsewhere than on `src`, or a tensor of the dtype and shape of that, whose
                values are ignored: where torch traces it is needed, for its shape.
            src: rank in the group whose x is cut.
            dim: which dimension is cut, in rank order: that of `src` counts.
            sizes: extent of each rank's piece, adding up to `x.shape[dim]`; zeros are fine; None cuts evenly. Needed on `src` alone.
            timeout: deadline.

        Returns:
            A new tensor of x's shape with this rank's size along `dim`, on the device of x or the group's; x itself in a group of one rank.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.scatter(x, src, dim, sizes, timeout)) is not None:
                    return y if type(y) is not list else Scatter.resume(self, y, (x, src, dim, sizes), timeout)
            except BaseException as error:
                raise_native(error, Scatter, self, (x, src, dim, sizes), timeout)
        result: torch.Tensor = run(Scatter, self, (x, src, dim, sizes), timeout)
        return result

    @overload
    def broadcast(self, x: torch.Tensor, src: int = ..., *, timeout: Timeout = ...) -> torch.Tensor: ...
    @overload
    def broadcast(self, x: Sequence[torch.Tensor], src: int = ..., *, timeout: Timeout = ...) -> list[torch.Tensor]: ...
    def broadcast(
        self, x: torch.Tensor | Sequence[torch.Tensor], src: int = 0, *, timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Fills x on every rank with that of `src`, in place.

        Args:
            x: equal shapes and dtypes on all ranks. Or a list of them, as one call (coalesced).
            src: rank in the group whose x is sent.
            timeout: deadline.

        Returns:
            x; of a list a list of its tensors.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if fast.broadcast(x, src, timeout):
                    return x if isinstance(x, torch.Tensor) else list(x)
            except BaseException as error:
                raise_native(error, either(Broadcast, x), self, (x, src), timeout)
        result: torch.Tensor | list[torch.Tensor] = run(either(Broadcast, x), self, (x, src), timeout)
        return result

    # Exchanges.

    def all_to_all(
        self,
        x: torch.Tensor,
        *,
        scatter_dim: int = 0,
        gather_dim: int = 0,
        input_sizes: Sequence[int] | None = None,
        output_sizes: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Cuts x along `scatter_dim`, sends piece i to rank i, and joins what came along `gather_dim` in rank order.

        Args:
            x: at least 1-D. Unchanged.
            scatter_dim: which dimension is cut.
            gather_dim: where the pieces are joined.
            input_sizes: extent along `scatter_dim` of the piece for each rank; None cuts evenly. Where the two dims differ they must be
                the same on every rank.
            output_sizes: extent along `gather_dim` of the piece from each rank. None: as even as the input; needed with `input_sizes`
                where the two dims are the same.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `scatter_dim` cut to this rank's share and `gather_dim` grown to the sum of `output_sizes`.
        """
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if (y := fast.all_to_all(x, scatter_dim, gather_dim, input_sizes, output_sizes, out, timeout)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                raise_native(error, AllToAll, self, (x, scatter_dim, gather_dim, input_sizes, output_sizes, out), timeout)
        result: torch.Tensor = run(AllToAll, self, (x, scatter_dim, gather_dim, input_sizes, output_sizes, out), timeout)
        return result

    def barrier(self, *, timeout: Timeout = None) -> None:
        """Waits until every rank of the group has called it. Orders the hosts, not their devices."""
        if not is_dynamo_compiling() and (fast := self._fast) is not None:
            try:
                if fast.barrier(timeout):
                    return
            except BaseException as error:
                raise_native(error, Barrier, self, (), timeout)
        run(Barrier, self, (), timeout)
        return

    # Messages. Only sender and receiver count them, so they may come between any collectives.

    def send(self, x: torch.Tensor, dst: int | None = None, *, tag: int = 0, timeout: Timeout = None) -> None:
        """Sends x to one rank; returns when it was taken.

        A message with a tag of up to 64 KiB is taken at once, so that the receiver may ask for the tags in an order of its own.

        Args:
            x: any shape.
            dst: rank in the group, by default `next_in_group`; not this rank itself, which `isend` serves.
            tag: 0 to 2**20 - 1. Messages from one rank to another pair by their tags, those of each tag in order. Tensors on a device whose
                strategy pairs messages by their order alone (NCCL) can have no tag but 0.
            timeout: deadline.

        Raises:
            UnsupportedTensorError: also for a tag, where x's strategy knows none.
            ValueError: also for a tag, where torch traces.
        """
        messages.send(self, x, dst, tag, timeout)

    @overload
    def recv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None = None,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor: ...
    @overload
    def recv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: AnySource,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> tuple[torch.Tensor, int]: ...
    def recv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | AnySource | None = None,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor | tuple[torch.Tensor, int]:
        """Receives a tensor of a known shape and dtype.

        Args:
            size: its shape, which is that of the tensor sent: another one of as many elements is a CollectiveMismatchError (over gloo
                a CollectiveTimeoutError).
            dtype: its dtype.
            src: rank in the group, by default `prev_in_group`; not this rank itself, which `irecv` serves. `commgraph.ANY`: the rank that
                has sent first; where several have, they are served in turn. The next message with that tag of every rank must have this
                size and dtype, and not be empty. A deadline that passes loses nothing: call again. A rank that died is a PeerLostError; one
                that has closed its side is skipped on one host, unless none is left.
            tag: that of the message, as for `send`; messages of other tags are kept for later receives.
            device: where to put it, by default the group's device.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            The tensor; with `commgraph.ANY` the tensor and the rank in the group from which it came.

        Raises:
            UnsupportedTensorError: also for a tag or `commgraph.ANY`, where the strategy for such tensors knows neither.
            ValueError: also for a tag or `commgraph.ANY`, where torch traces.
        """
        received: torch.Tensor | tuple[torch.Tensor, int] = messages.recv(self, size, dtype, src, tag, device, out, timeout)
        return received

    def sendrecv(
        self,
        x: torch.Tensor,
        dst: int,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int,
        *,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Sends x to one rank and receives a tensor from another one, or the same, both at once.

        Ranks that all do so cannot wait for each other. The other side of either message may be a `send` or `recv` as well.

        Args:
            x: any shape.
            dst: rank in the group; this rank itself where `src` is, too.
            size, dtype: of what comes.
            src: rank in the group.
            device: where to put what comes, by default the group's device.
            out: filled and returned in place of a new tensor; apart from x.
            timeout: deadline.

        Returns:
            The tensor that came.
        """
        return messages.sendrecv(self, x, dst, size, dtype, src, device, out, timeout)

    def isend(self, x: torch.Tensor, dst: int | None = None, *, tag: int = 0, timeout: Timeout = None) -> Work[None]:
        """`send` without waiting until x was taken.

        Args:
            x: any shape. Not to be changed until the work has ended.
            dst: rank in the group, by default `next_in_group`; this rank itself gets a copy, which its `irecv` takes.
            tag: as for `send`.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is None.
        """
        return messages.isend(self, x, dst, tag, timeout)

    @overload
    def irecv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None = None,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> Work[torch.Tensor]: ...
    @overload
    def irecv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: AnySource,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> Work[tuple[torch.Tensor, int]]: ...
    def irecv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | AnySource | None = None,
        *,
        tag: int = 0,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> Work[torch.Tensor] | Work[tuple[torch.Tensor, int]]:
        """`recv`, whose result `Work.wait` gives.

        Args:
            size, dtype: of what comes.
            src: rank in the group, by default `prev_in_group`; this rank itself gives what it has sent itself by `isend`.
                `commgraph.ANY`: as for `recv`, this rank included.
            tag: that of the message.
            device: where to put it, by default the group's device.
            out: filled and given in place of a new tensor. Not to be touched until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is the tensor; with `commgraph.ANY` the tensor and the rank in the group from which it came.
        """
        begun: Work[torch.Tensor] | Work[tuple[torch.Tensor, int]] = messages.irecv(self, size, dtype, src, tag, device, out, timeout)
        return begun

    def batch(self, messages_: Sequence[Send | Recv], *, timeout: Timeout = None) -> Work[list[torch.Tensor | None]]:
        """Sends and receives several tensors at once, in whatever order the ranks list them.

        Between two ranks the messages of each direction and tag pair in the order in which they are listed; the other side may be a batch,
        or single sends and receives of either kind. A rank may send to itself.

        Args:
            messages: `commgraph.Send` and `commgraph.Recv`.
            timeout: deadline of each message, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result has the filled tensor of each `Recv` and None for each `Send`, in the order given.
        """
        return messages.batch(self, messages_, timeout)

    # Objects.

    def broadcast_object(self, obj: T | None = None, src: int = 0, *, timeout: Timeout = None) -> T:
        """Returns the object of `src` on every rank.

        On one host any picklable object; between hosts any, once an authkey is set, and plain data without one (numbers, strings,
        bytes, lists, tuples, dicts, sets, dtypes, tensors). A receiver whose deadline passes before anything arrived may call again:
        its next `broadcast_object` goes on waiting for the same object.

        Args:
            obj: what to send; ignored elsewhere than on `src`.
            src: rank in the group.
            timeout: deadline.

        Raises:
            TypeError: if `obj` cannot be sent; nothing was.
        """
        result: T = self._objects.broadcast(self, "broadcast_object", obj, src, timeout)
        return result

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, *, timeout: Timeout = None) -> list[Any]:
        """Fills `obj_list` on every rank with the objects of `src`, in place.

        Args:
            obj_list: lists of equal length on all ranks.
            src: rank in the group.
            timeout: deadline.

        Returns:
            obj_list.
        """
        return self._broadcast_list(obj_list, src, timeout)

    def all_gather_object(self, obj: T, *, timeout: Timeout = None) -> list[T]:
        """Returns every rank's object, in rank order; which objects: as for `broadcast_object`."""
        return self._objects.all_gather(self, "all_gather_object", obj, timeout)

    def scatter_object(self, objs: Sequence[Any] | None = None, src: int = 0, *, timeout: Timeout = None) -> Any:
        """Returns this rank's object of those that `src` gives.

        Which objects, and receivers whose deadline passes: as for `broadcast_object`.

        Args:
            objs: one object for each rank, in rank order; ignored elsewhere than on `src`, which gets its own one itself.
            src: rank in the group.
            timeout: deadline.

        Raises:
            TypeError: one of them cannot be sent; nothing was.
            ValueError: their number is not that of the ranks; nothing was sent. The others wait for the next call of `src`.
        """
        return self._objects.scatter(self, "scatter_object", objs, src, timeout)

    def gather_object(self, obj: T, dst: int = 0, *, timeout: Timeout = None) -> list[T] | None:
        """Returns every rank's object, in rank order, on one rank; which objects: as for `broadcast_object`.

        Args:
            obj: of this rank.
            dst: rank in the group that gets them.
            timeout: deadline.

        Returns:
            On `dst` a list of all, its own one itself; None elsewhere.
        """
        return self._objects.gather(self, "gather_object", obj, dst, timeout)

    def isend_object(self, obj: Any, dst: int, *, timeout: Timeout = None) -> Work[None]:
        """`send_object` without waiting until the object was taken.

        Args:
            obj: pickled at once: it may be changed afterwards.
            dst: rank in the group; this rank itself gets a copy, which its `irecv_object` takes.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is None.
        """
        return object_work.isend_object(self, self._objects, obj, dst, timeout)

    def irecv_object(self, src: int, *, timeout: Timeout = None) -> Work[Any]:
        """`recv_object`, whose object `Work.wait` gives.

        Args:
            src: rank in the group; this rank itself gives what it has sent itself by `isend_object`.
            timeout: deadline, a timedelta or seconds, from when its turn comes. One that passes before anything arrived loses nothing: the
                next receive of an object from that rank goes on waiting for the same one.

        Returns:
            Work whose result is the object.
        """
        return object_work.irecv_object(self, self._objects, src, timeout)

    def send_object(self, obj: Any, dst: int, *, timeout: Timeout = None) -> None:
        """Sends an object to one rank in the group; which objects: as for `broadcast_object`."""
        self._objects.send(self, "send_object", obj, dst, timeout)

    def recv_object(self, src: int, *, timeout: Timeout = None) -> Any:
        """Returns the next object from one rank in the group. A deadline that passes before anything arrived loses nothing: call again."""
        return self._objects.recv(self, "recv_object", src, timeout)

    # Dicts of tensors and objects.

    def broadcast_tensor_dict(self, tensor_dict: D | None = None, src: int = 0, *, timeout: Timeout = None) -> D | dict[Any, Any]:
        """Returns the dict of `src` on every rank: tensors are sent as tensors, everything else as objects.

        Args:
            tensor_dict: may nest dicts and hold empty tensors; ignored elsewhere than on `src`. Unchanged.
            src: rank in the group.
            timeout: deadline of each part.

        Returns:
            On `src` and in a group of one rank the dict itself; elsewhere a new one, its tensors on the host if they were there, else on
            the group's device.
        """
        result: D | dict[Any, Any] = dict_messages.broadcast_dict(self, self._objects, tensor_dict, src, timeout)
        return result

    def send_tensor_dict(
        self,
        tensor_dict: Mapping[Any, Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> None:
        """Sends a dict of tensors and objects to one rank.

        Args:
            tensor_dict: may nest dicts and hold empty tensors. Unchanged.
            dst: rank in the group, by default `next_in_group`.
            all_gather_group: ranks that hold the same dict and whose counterparts on the other side are such a group too (tp beside pp):
                each sends one slice of every tensor whose numel divides by their number, and the receivers gather.
            all_gather_tensors: key (nested keys joined by dots) -> whether to slice that tensor, against that rule. A residual that
                already differs between the ranks (sequence parallelism) must not be sliced.
            timeout: deadline of each part.
        """
        dict_messages.send_dict(self, self._objects, tensor_dict, dst, all_gather_group, all_gather_tensors, timeout)

    def recv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> dict[Any, Any]:
        """Receives what `send_tensor_dict` sent; `all_gather_group` and `all_gather_tensors` as given there.

        Args:
            src: rank in the group, by default `prev_in_group`.
            all_gather_group: the ranks among which slices are gathered.
            all_gather_tensors: as on the sender.
            timeout: deadline of each part.

        Returns:
            A new dict; its tensors on the host if they were there, else on the group's device.
        """
        return dict_messages.recv_dict(self, self._objects, src, all_gather_group, all_gather_tensors, timeout)

    def isend_tensor_dict(
        self,
        tensor_dict: Mapping[Any, Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> Work[None]:
        """`send_tensor_dict` without waiting until it was taken.

        Args:
            tensor_dict, dst, all_gather_group, all_gather_tensors: as for `send_tensor_dict`. Objects are pickled now; tensors are not to
                be changed until the work has ended.
            timeout: deadline of each part, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is None.
        """
        return dict_messages.isend_dict(self, self._objects, tensor_dict, dst, all_gather_group, all_gather_tensors, timeout)

    def irecv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> Work[dict[Any, Any]]:
        """`recv_tensor_dict`, whose dict `Work.wait` gives.

        With an `all_gather_group` the slices are gathered in `wait`, which is therefore collective over that group: its ranks wait for
        their dicts in the same order.

        Args:
            src, all_gather_group, all_gather_tensors: as for `recv_tensor_dict`.
            timeout: deadline of each part, a timedelta or seconds, from when its turn comes.
        """
        return dict_messages.irecv_dict(self, self._objects, src, all_gather_group, all_gather_tensors, timeout)

    # The expert-parallel exchange.

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        *routing: torch.Tensor,
        sizes: Sizes = None,
        extra_tensors: Sequence[torch.Tensor] = (),
        timeout: Timeout = None,
    ) -> Dispatched:
        """Sends every rank's rows to the ranks of this group, for their experts.

        Rows replicated over tp are dispatched over ``ctx.dp`` (and the result goes through ``ctx.tp.all_reduce``), rows split over tp over
        ``ctx.ep``.

        Args:
            hidden_states: ``[rows, ...]``; the rows may differ in number between ranks, and be none.
            routing: the router logits ``[rows, experts]``; or top-k weights ``[rows, k]`` and ids ``[rows, k]`` (integers; below zero: no
                expert).
            sizes: rows of each rank. ``"equal"``: all have as many as this one. None: the ranks exchange their numbers first,
                which cannot be traced.
            extra_tensors: carried along, ``[rows, ...]`` each.
            timeout: deadline of each part.

        Returns:
            A `Dispatched`. With `CommunicatorOptions.experts` and top-k ids it holds the rows that need an expert of this rank; else all.

        Raises:
            TypeError: `routing` is neither of the two.
        """
        return experts.dispatch(self, hidden_states, routing, sizes, extra_tensors, timeout)

    def combine(self, hidden_states: torch.Tensor, dispatched: Dispatched, *, timeout: Timeout = None) -> torch.Tensor:
        """Sums the results of the ranks' experts for the dispatched rows, and returns to each rank those of its own rows.

        Args:
            hidden_states: as many rows as ``dispatched[0]``, in its order: the contributions of this rank's experts (zeros where none).
            dispatched: of this group's `dispatch`.
            timeout: deadline.

        Returns:
            ``[rows of this rank, ...]``, the sum over all ranks.
        """
        return experts.combine(self, hidden_states, dispatched, timeout)

    # Collectives that are waited for later. Where torch traces each is its blocking operator and has ended at once.

    def all_reduce_async(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> Work[torch.Tensor]:
        """`all_reduce`, whose result `Work.wait` gives.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic; without a gradient. Not to be changed until the work has ended.
            op: as for `all_reduce`.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is a new tensor of x's shape and dtype; x itself in a group of one rank.
        """
        if not is_dynamo_compiling() and self._fast is not None and (work := begin_natively(AllReduce, self, (x, op), timeout)) is not None:
            return work
        return begin_collective(AllReduce, self, (x, op), timeout)

    def reduce_scatter_async(
        self, x: torch.Tensor, dim: int = -1, *, op: str = "sum", out: torch.Tensor | None = None, timeout: Timeout = None
    ) -> Work[torch.Tensor]:
        """`reduce_scatter`, whose result `Work.wait` gives.

        Args:
            x: equal shapes on all ranks; `x.shape[dim]` divides by the group's size; without a gradient. Not to be changed until the work
                has ended.
            dim: which dimension is cut, in rank order.
            op: as for `all_reduce`.
            out: filled and given in place of a new tensor. Not to be touched until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result has x's shape with `dim` divided by the group's size.
        """
        return begin_collective(ReduceScatter, self, (x, dim, op, out), timeout)

    def all_gather_async(
        self, x: torch.Tensor, dim: int = -1, *, out: torch.Tensor | None = None, timeout: Timeout = None
    ) -> Work[torch.Tensor]:
        """`all_gather`, whose result `Work.wait` gives.

        Args:
            x: equal shapes on all ranks, at least 1-D; without a gradient. Not to be changed until the work has ended.
            dim: where the pieces are joined, in rank order.
            out: filled and given in place of a new tensor. Not to be touched until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result has x's shape with `dim` multiplied by the group's size.
        """
        return begin_collective(AllGather, self, (x, dim, out), timeout)

    def gather_async(
        self, x: torch.Tensor, dst: int = 0, dim: int = -1, *, sizes: Sequence[int] | None = None, timeout: Timeout = None
    ) -> Work[torch.Tensor | None]:
        """`gather`, whose result `Work.wait` gives.

        Args:
            x, dst, dim, sizes: as for `gather`. x is not to be changed until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is that of `gather`.
        """
        return begin_collective(Gather, self, (x, dst, dim, sizes), timeout)

    def broadcast_async(self, x: torch.Tensor, src: int = 0, *, timeout: Timeout = None) -> Work[torch.Tensor]:
        """`broadcast`, which is waited for later.

        Args:
            x: equal shapes and dtypes on all ranks; without a gradient. Not to be changed, or read elsewhere than on `src`, until the work
                has ended.
            src: rank in the group whose x is sent.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is x.
        """
        return begin_collective(Broadcast, self, (x, src), timeout)

    def all_to_all_async(
        self,
        x: torch.Tensor,
        *,
        scatter_dim: int = 0,
        gather_dim: int = 0,
        input_sizes: Sequence[int] | None = None,
        output_sizes: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> Work[torch.Tensor]:
        """`all_to_all`, whose result `Work.wait` gives.

        Args:
            x, scatter_dim, gather_dim, input_sizes, output_sizes: as for `all_to_all`; x is without a gradient, and not to be changed until
                the work has ended.
            out: filled and given in place of a new tensor. Not to be touched until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is that of `all_to_all`.
        """
        return begin_collective(AllToAll, self, (x, scatter_dim, gather_dim, input_sizes, output_sizes, out), timeout)

    def barrier_async(self, *, timeout: Timeout = None) -> Work[None]:
        """`barrier`, which is waited for later: the work ends on no rank before every rank of the group has begun it.

        Args:
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is None.
        """
        return begin_collective(Barrier, self, (), timeout)

    # Lifetime.

    def sibling(self, name: str) -> GroupCoordinator:
        """A coordinator of the same ranks with communicators of its own, so that its operations overlap with this one's. Collective.

        It has the options of this one, belongs to the same context, and is closed with it (or earlier, by its own `close`). A call of
        this group as any other: a rank that is late, has left, or calls something else is an error of the group.

        Args:
            name: what errors call it; the same on every rank.

        Returns:
            A coordinator; `shares_with` is empty.

        Raises:
            ValueError: a name that is no non-empty string. The other ranks raise `BuildError`.
            LayoutMismatchError: the ranks gave different names.
            BuildError: a rank could not build its part, or did not come in time.
        """
        state = self._state
        run_generally(SiblingBarrier, self, ())
        if (rebuild := state.rebuild) is None:  # another thread has closed it since
            where = Call(self.name, "sibling", state.members, state.sequence).where
            raise ContextClosedError(f"{where}: its context was closed during the call")
        made = rebuild(state, name)
        world = self._family.world
        coordinator = GroupCoordinator._of(name, made, local_rank=self.local_rank, device=self.device, token=self._token, world=world)
        self._family.siblings[:] = [*self.siblings, coordinator]
        return coordinator

    def torch_group(self, kind: Literal["device", "cpu"]) -> dist.ProcessGroup:
        """`device_group` or `cpu_group` in the tables of torch.distributed until close: for DeviceMesh, FSDP and others.

        Collective the first time of each kind. Where no backend serves device tensors the two are one group. A group of one rank has one,
        too, made now.

        Args:
            kind: "device" or "cpu".

        Returns:
            torch's group. Its ranks are those of this process's default group, in group order.

        Raises:
            BackendUnavailableError: this process has no default process group, without which torch.distributed knows no other.
        """
        self._state.ensure_open(self.name)
        if kind not in ("device", "cpu"):
            raise ValueError(f"torch_group of group {self.name!r} (rank {self.rank}): kind={kind!r} is neither 'device' nor 'cpu'")
        if not dist.is_initialized():
            raise BackendUnavailableError(
                f"torch_group of group {self.name!r} (rank {self.rank}): this process has no default process group, and without one "
                "torch.distributed finds no other: call torch.distributed.init_process_group first, or take cpu_group, which needs none"
            )
        return self._state.torch_groups.enter(kind, self.all_gather_object)

    @contextlib.contextmanager
    def graph_capture(self, device: torch.device | None = None, *, stream: Any = None) -> Iterator[GraphCapture]:
        """`ParallelContext.graph_capture` for this group alone: an error inside of the block ends this group and no other.

        Args:
            device: whose graphs; None: the group's.
            stream: to capture on, in place of a new one.
        """
        self._state.ensure_open(self.name)
        with capture([self], device or self.device, stream, f"group {self.name!r}") as made:
            yield made

    def prepare_communication_buffer_for_model(self, model: torch.nn.Module) -> None:
        """Lets strategies allocate buffers by the sizes in `model`. Collective."""
        self._state.ensure_open(self.name)
        with ambient.lasting():
            for communicator in self._state.strategies.communicators:
                communicator.warmup(model)

    def warmup(self) -> None:
        """Allocates everything that first use would, and proves that the group works. Collective."""
        self._state.ensure_open(self.name)
        with ambient.lasting():
            for communicator in self._state.strategies.communicators:
                communicator.warmup()
        self.barrier()

    def empty(self, size: Sequence[int] | int, dtype: torch.dtype, *, timeout: Timeout = None) -> torch.Tensor:
        """Returns a tensor in memory that the ranks share: a large one needs no staging copy in collectives. Collective.

        Where the ranks do not share memory it is an ordinary tensor. It may be used after the group was closed.

        Args:
            size: its shape, equal on all ranks.
            dtype: its dtype.
            timeout: deadline.

        Returns:
            An uninitialised tensor of this rank's own on the group's device.

        Raises:
            BuildError: a rank could not make or map the memory; on every rank, and the group goes on.
        """
        with collective(self, "empty", timeout) as (sequence, deadline):
            try:
                extents, one = shape(size), like(self, dtype, self.device)
            except BadArgument as error:
                raise explain(error, self, "empty", sequence) from None
            if self.world_size == 1:
                return ambient.empty(extents, dtype, self.device)
            strategy = self._state.strategies.route("all_reduce", extents, dtype, self.device)
            what = f"empty({dtype} {extents})"
            tag = make_tag(COLLECTIVE, sequence, what)
            try:
                return perform(
                    self,
                    "empty",
                    sequence,
                    what,
                    deadline,
                    lambda: strategy.empty(extents, one.dtype, one.device, tag=tag, deadline=deadline),
                )
            except BuildError as error:
                where = Call(self.name, "empty", self._state.members, sequence).where
                raise BuildError(f"{where}: {what}: {error}. No rank has got the tensor, and the group goes on") from error

    def _flush(self, deadline: Deadline) -> bool:
        """Waits for pending collectives and sends, which the peers need, here and on siblings.

        Args:
            deadline: until when.

        Returns:
            Whether all of it has ended.
        """
        return self._state.pending.flush(deadline) and all(sibling._flush(deadline) for sibling in self.siblings)

    def _leave(self) -> bool:
        """Has calls that the other ranks end from now on raise that this rank closes, too, here and on siblings.

        Returns:
            Whether no collective is under way.
        """
        self._state.failures.closing = True
        idle = [sibling._leave() for sibling in self.siblings]
        return self._state.turns.is_idle and all(idle)

    def _meet(self, deadline: Deadline) -> None:
        """Waits until every rank closes; also where torch traces, and nothing is recorded in the graph."""
        run_generally(CloseBarrier, self, (), deadline.left())

    def close(self) -> None:
        """Closes this coordinator on this rank; the last one on its communicators takes them along. Sends nothing; idempotent."""
        if self._state.is_inherited:
            return
        if self._fast is not None:
            self._fast.close()
        self._state.leave(self.name)
        if self._state.is_closed:
            self._objects.join(1.0)
            # Coordinators refer to each other: without this the cycle, and the memory, would live until garbage collection.
            for sibling in self._family.siblings:
                sibling.close()
            self._family.siblings.clear()
            self._family.coordinators.clear()
            self._family.world = None

    def _disown(self) -> None:
        """Give it up in a forked child, a coordinator of one rank included."""
        if self._fast is not None and self.world_size == 1:
            self._fast.close()
        self._state.disown()
        for sibling in self._family.siblings:
            sibling._disown()

    def _broadcast_list(self, obj_list: Any, src: int, timeout: Timeout) -> list[Any]:
        if not isinstance(obj_list, list):
            what = f"obj_list is a {type(obj_list).__name__}, a list to be filled is needed"
            with collective(self, "broadcast_object_list", timeout) as (sequence, _):
                raise explain(BadArgument(what), self, "broadcast_object_list", sequence)
        received = self._objects.broadcast(self, "broadcast_object_list", obj_list, src, timeout)
        if received is not obj_list:
            if len(received) != len(obj_list):
                raise ValueError(
                    f"broadcast_object_list on group {self.name!r} (rank {self.rank}, {self.rank_in_group} of {self.world_size} in the "
                    f"group): obj_list has {len(obj_list)} entries here and {len(received)} on rank {self.ranks[src]}"
                )
            obj_list[:] = received
        return obj_list  # type: ignore[no-any-return]  # a list

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} holds connections of this process and cannot be pickled: send its layout and name, and look the group up in the "
            "receiver's own context (context[name])"
        )

    def __repr__(self) -> str:
        shown = str(self.ranks) if len(self.ranks) <= 8 else f"({', '.join(map(str, self.ranks[:6]))}, ..., {self.ranks[-1]})"
        return f"<GroupCoordinator {self.name!r}: rank {self.rank}, {self.rank_in_group} of {self.world_size} in {shown}>"
