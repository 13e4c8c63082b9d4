"""`GroupCoordinator`: one group of ranks, every operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import attrs
import torch
import torch.distributed as dist

from commgraph.communicators import signature
from commgraph.communicators.base import CallsDiffer, Communicator
from commgraph.coordinator.call import Call, Timeout
from commgraph.coordinator.host_objects import HostObjects
from commgraph.coordinator.link import GroupLink
from commgraph.coordinator.objects import ObjectPath
from commgraph.coordinator.tensor_dict import Entry, Plan, join_dict, landings, split_dict
from commgraph.errors import BackendUnavailableError
from commgraph.shm.stopped import Stopped

__all__ = ["GroupCoordinator"]

T = TypeVar("T")
D = TypeVar("D", bound=Mapping[Any, Any])


@attrs.frozen(eq=False, repr=False, slots=False)
class GroupCoordinator:
    """One group of ranks, as a rank of it sees it. Made by `World.context`, never by hand.

    `rank`, `ranks`, `first_rank`, `next_rank`, ... are global ranks; `src` and `dst` arguments are ranks *in the group*. `dim` counts as
    torch's does. Host tensors are served by the host's strategies, device tensors by the device's. Every tensor operation takes any
    strides and gives contiguous results. Operations are collective: every rank of the group calls them in the same order (send and
    receive: the two ranks concerned). In a group of one rank they return their input object, or the filled `out`, after the same checks.

    Errors of every operation, beside those that it names:
        UnsupportedTensorError, ValueError: bad input, raised before anything is sent. If every rank raised, the group goes on.
        CollectiveTimeoutError: the deadline passed (`timeout`: a timedelta or seconds; default: that of the options).
        CollectiveMismatchError: the ranks called different things.
        PeerLostError: a rank of the group is gone.
        ContextClosedError: the context was closed.

    After a timeout, a mismatch or a lost peer the group is broken: every call raises that error again, and the context can only be closed.

    Attributes:
        name: what the layout calls the group.
        rank: global rank of this process (or thread).
        ranks: global ranks of the group, in group order.
        local_rank: place of this rank on its node.
        device: where its device tensors live.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    local_rank: int
    device: torch.device
    _link: GroupLink = attrs.field(alias="link")
    _objects: ObjectPath | HostObjects = attrs.field(alias="objects")
    # The short way for plain calls (native/door.c), None where there is none; it answers None to whatever is not plain.
    _door: Any = attrs.field(alias="door")

    # Facts.

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        """Place of this rank in `ranks`."""
        return self._link.rank_in_group

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
        return self._link.table

    def communicator(self, name: str) -> Communicator:
        """The live strategy called `name`.

        Raises:
            BackendUnavailableError: if the group has none of that name.
        """
        for communicator in self._link.communicators:
            if communicator.name == name:
                return communicator
        have = ", ".join(c.name for c in self._link.communicators) or "none (a group of one rank needs none)"
        raise BackendUnavailableError(f"group {self.name!r} (rank {self.rank}) has no strategy {name!r}; it has: {have}")

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent on the group's communicators, by whichever of the coordinators that share them."""
        return sum(communicator.bytes_sent for communicator in self._link.communicators)

    @property
    def cpu_group(self) -> dist.ProcessGroup | None:
        """The torch process group for host tensors, unknown to torch.distributed's tables; None for one rank and after close."""
        return self._link.transport.process_group if self._link.transport is not None else None

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The torch process group for device tensors, which on the host is `cpu_group`."""
        return self.cpu_group

    @property
    def shares_with(self) -> tuple[GroupCoordinator, ...]:
        """Coordinators of this context on the same communicators: calls on one of them wait for those on the others."""
        return tuple(other for other in self._link.coordinators if other is not self and self.world_size > 1)

    # Reductions.

    def all_reduce(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> torch.Tensor:
        """Reduces x over the group.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic. Unchanged.
            op: "sum", "avg" (not of integers), "max", "min" or "product"; taken in rank order, small floats in float32.
            timeout: deadline.

        Returns:
            A new tensor of x's shape and dtype, with the same bits on every rank.
        """
        if timeout is None and self._door is not None:
            try:
                if (y := self._door.all_reduce(x, op)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_reduce", lambda: signature.reduced(op, x), error)
        call, seconds = self._begin("all_reduce", timeout)
        x = call.tensor(x)
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x
        strategy = self._link.route("all_reduce", x.shape, x.dtype, x.device)
        return self._link.run(call, signature.reduced(op, x), seconds, lambda tag, left: strategy.all_reduce(x, op, tag=tag, timeout=left))

    def all_reduce_(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> torch.Tensor:
        """`all_reduce` into x itself, which is returned."""
        if timeout is None and self._door is not None:
            try:
                if self._door.all_reduce_(x, op):
                    return x
            except BaseException as error:
                self._broken_off("all_reduce_", lambda: signature.reduced(op, x), error)
        call, seconds = self._begin("all_reduce_", timeout)
        x = call.written(call.tensor(x))
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x
        strategy = self._link.route("all_reduce", x.shape, x.dtype, x.device)
        return self._link.run(call, signature.reduced(op, x), seconds, lambda tag, left: strategy.all_reduce_(x, op, tag=tag, timeout=left))

    def reduce_scatter(
        self, x: torch.Tensor, dim: int = -1, *, op: str = "sum", out: torch.Tensor | None = None, timeout: Timeout = None
    ) -> torch.Tensor:
        """Reduces x over the group and keeps this rank's piece of `dim`.

        Args:
            x: equal shapes on all ranks; `x.shape[dim]` divides by the group's size. Unchanged.
            dim: which dimension is cut, in rank order.
            op: as for `all_reduce`.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `dim` divided by the group's size.
        """
        if timeout is None and self._door is not None:
            try:
                if (y := self._door.reduce_scatter(x, dim, op, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("reduce_scatter", lambda: f"{op} {signature.describe(x)} dim={dim}", error)
        call, seconds = self._begin("reduce_scatter", timeout)
        x = call.tensor(x)
        dim = call.dim(x, dim)
        sizes = call.even(x.shape[dim], f"dim {dim} of x {tuple(x.shape)}")
        return self._reduce_scatter(call, x, dim, sizes, op, out, seconds)

    def reduce_scatterv(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None, *, timeout: Timeout = None
    ) -> torch.Tensor:
        """Sums x over the group and keeps this rank's piece, of uneven pieces.

        Args:
            x: equal shapes on all ranks. Unchanged.
            dim: which dimension is cut, in rank order.
            sizes: extent of each rank's piece, adding up to `x.shape[dim]`; zeros are fine; None cuts evenly.
            timeout: deadline.

        Returns:
            x's shape with `sizes[rank_in_group]` along `dim`.
        """
        call, seconds = self._begin("reduce_scatterv", timeout)
        x = call.tensor(x)
        dim = call.dim(x, dim)
        what = f"dim {dim} of x {tuple(x.shape)}"
        pieces = call.even(x.shape[dim], what) if sizes is None else call.split(sizes, x.shape[dim], what)
        return self._reduce_scatter(call, x, dim, pieces, "sum", None, seconds)

    def _reduce_scatter(
        self, call: Call, x: torch.Tensor, dim: int, sizes: list[int], op: str, out: torch.Tensor | None, seconds: float
    ) -> torch.Tensor:
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        strategy = self._link.route("reduce_scatter", x.shape, x.dtype, x.device)
        result = call.out(out, _resized(x, dim, sizes[self.rank_in_group]), x, strategy.new)
        x = _apart(x, result)
        self._link.run(
            call,
            signature.scattered(op, x, dim, sizes),
            seconds,
            lambda tag, left: strategy.reduce_scatter(x, dim, sizes, op, result, tag=tag, timeout=left),
        )
        return result

    # Gathers.

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, out: torch.Tensor | None = None, timeout: Timeout = None) -> torch.Tensor:
        """Concatenates every rank's x along `dim`.

        Args:
            x: equal shapes on all ranks, at least 1-D. Unchanged.
            dim: where the pieces are joined, in rank order.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `dim` multiplied by the group's size.
        """
        if timeout is None and self._door is not None:
            try:
                if (y := self._door.all_gather(x, dim, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_gather", lambda: f"{signature.describe(x)} dim={dim}", error)
        call, seconds = self._begin("all_gather", timeout)
        x = call.tensor(x)
        dim = call.dim(x, dim)
        return self._all_gather(call, x, dim, [x.shape[dim]] * self.world_size, out, seconds)

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
        call, seconds = self._begin("all_gatherv", timeout)
        single = isinstance(x, torch.Tensor)
        tensors = [call.tensor(t, "x" if single else f"x[{i}]") for i, t in enumerate([x] if single else call.several(x, "x"))]
        checked = []
        for i, tensor in enumerate(tensors):
            axis = call.dim(tensor, dim)
            extent = tensor.shape[axis]
            pieces = [extent] * self.world_size if sizes is None else call.sizes(sizes)
            if pieces[self.rank_in_group] != extent:
                what = "x" if single else f"x[{i}]"
                raise call.wrong(
                    f"sizes={pieces} says {pieces[self.rank_in_group]} here; {what} {tuple(tensor.shape)} has {extent} in dim {axis}"
                )
            checked.append((tensor, axis, pieces))
        deadline = time.monotonic() + seconds
        results = [
            self._all_gather(call, tensor, axis, pieces, None, max(deadline - time.monotonic(), 0.001)) for tensor, axis, pieces in checked
        ]
        return results[0] if single else results

    def _all_gather(
        self, call: Call, x: torch.Tensor, dim: int, sizes: list[int], out: torch.Tensor | None, seconds: float
    ) -> torch.Tensor:
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        shape = _resized(x, dim, sum(sizes))
        strategy = self._link.route("all_gather", shape, x.dtype, x.device)
        result = call.out(out, shape, x, strategy.new)
        x = _apart(x, result, result.split(sizes, dim)[self.rank_in_group])
        self._link.run(
            call,
            signature.gathered(x.dtype, shape, dim, sizes),
            seconds,
            lambda tag, left: strategy.all_gather(x, dim, sizes, result, tag=tag, timeout=left),
        )
        return result

    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1, *, timeout: Timeout = None) -> torch.Tensor | None:
        """Concatenates every rank's x along `dim`, on one rank.

        Args:
            x: equal shapes on all ranks, at least 1-D. Unchanged.
            dst: rank in the group that gets the result.
            dim: where the pieces are joined, in rank order.
            timeout: deadline.

        Returns:
            On `dst` x's shape with `dim` multiplied by the group's size, None elsewhere.
        """
        call, seconds = self._begin("gather", timeout)
        x = call.tensor(x)
        dst = call.peer(dst, "dst")
        dim = call.dim(x, dim)
        if self.world_size == 1:
            return x
        out = None
        strategy = self._link.route("gather", x.shape, x.dtype, x.device)
        if self.rank_in_group == dst:
            out = strategy.new(_resized(x, dim, x.shape[dim] * self.world_size), x.dtype, x.device)
        pieces = None if out is None else out.split([x.shape[dim]] * self.world_size, dim)
        self._link.run(
            call,
            f"dst={dst} {signature.describe(x)} dim={dim}",
            seconds,
            lambda tag, left: strategy.gather(x, pieces, dst, tag=tag, timeout=left),
        )
        return out

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
        if timeout is None and self._door is not None and input_sizes is None and output_sizes is None:
            try:
                if (y := self._door.all_to_all(x, scatter_dim, gather_dim, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_to_all", lambda: f"{signature.describe(x)} dim={scatter_dim}", error)
        call, seconds = self._begin("all_to_all", timeout)
        x = call.tensor(x)
        scatter_dim, gather_dim = call.dim(x, scatter_dim, "scatter_dim"), call.dim(x, gather_dim, "gather_dim")
        what = f"dim {scatter_dim} of x {tuple(x.shape)}"
        cut = (
            call.even(x.shape[scatter_dim], what)
            if input_sizes is None
            else call.split(input_sizes, x.shape[scatter_dim], what, "input_sizes")
        )
        same = scatter_dim == gather_dim
        if output_sizes is not None:
            joined = call.sizes(output_sizes, "output_sizes")
            own = cut[self.rank_in_group] if same else x.shape[gather_dim]
            if joined[self.rank_in_group] != own:
                raise call.wrong(f"output_sizes={joined} says {joined[self.rank_in_group]} for this rank's own piece, which has {own}")
        elif same and input_sizes is not None:
            raise call.wrong("input_sizes without output_sizes: what each rank sends is its own affair, so say what comes from each")
        else:
            joined = cut if same else [x.shape[gather_dim]] * self.world_size
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        shape = list(x.shape)
        shape[scatter_dim] = cut[self.rank_in_group]
        shape[gather_dim] = sum(joined)
        rest = [extent for i, extent in enumerate(x.shape) if i not in (scatter_dim, gather_dim)]
        even = input_sizes is None and output_sizes is None
        # What all ranks share of the shape: not the extents that each may choose, which therefore must not choose the strategy either.
        shared = x.shape if even else rest
        strategy = self._link.route("all_to_all", shared, x.dtype, x.device)
        result = call.out(out, shape, x, strategy.new)
        x = _apart(x, result)
        sends, receives = x.split(cut, scatter_dim), result.split(joined, gather_dim)
        text = signature.all_to_all(x, shared, scatter_dim, gather_dim, None if same else cut)
        crossing = [(to.numel(), back.numel()) for to, back in zip(sends, receives, strict=True)]
        self._link.run(call, text, seconds, lambda tag, left: strategy.all_to_all(sends, receives, tag=tag, timeout=left), crossing)
        return result

    def broadcast(self, x: torch.Tensor, src: int = 0, *, timeout: Timeout = None) -> torch.Tensor:
        """Fills x on every rank with that of `src`, in place.

        Args:
            x: equal shapes and dtypes on all ranks.
            src: rank in the group whose x is sent.
            timeout: deadline.

        Returns:
            x.
        """
        if timeout is None and self._door is not None:
            try:
                if self._door.broadcast(x, src):
                    return x
            except BaseException as error:
                self._broken_off("broadcast", lambda: f"src={src} {signature.describe(x)}", error)
        call, seconds = self._begin("broadcast", timeout)
        x = call.written(call.tensor(x))
        return self._broadcast(call, x, call.peer(src, "src"), seconds)

    def _broadcast(self, call: Call, x: torch.Tensor, src: int, seconds: float) -> torch.Tensor:
        if self.world_size > 1:
            strategy = self._link.route("broadcast", x.shape, x.dtype, x.device)
            self._link.run(
                call, f"src={src} {signature.describe(x)}", seconds, lambda tag, left: strategy.broadcast(x, src, tag=tag, timeout=left)
            )
        return x

    def barrier(self, *, timeout: Timeout = None) -> None:
        """Returns on no rank before every rank of the group has called it. Orders the hosts, not their devices."""
        if timeout is None and self._door is not None:
            try:
                if self._door.barrier():
                    return
            except BaseException as error:
                self._broken_off("barrier", str, error)
        call, seconds = self._begin("barrier", timeout)
        if self.world_size > 1:
            strategy = self._link.route("barrier", (), None, torch.device("cpu"))
            self._link.run(call, "", seconds, lambda tag, left: strategy.barrier(tag=tag, timeout=left))

    # Point to point. Only the two ranks concerned count these, so they may fall between collectives as they like.

    def send(self, x: torch.Tensor, dst: int | None = None, *, timeout: Timeout = None) -> None:
        """Sends x to one rank; returns when it was taken.

        Args:
            x: any shape.
            dst: rank in the group, by default `next_in_group`.
            timeout: deadline.
        """
        call, seconds = self._message("send", timeout)
        x = call.tensor(x)
        dst = call.peer(self.next_in_group if dst is None else dst, "dst", other=True)
        self._exchange(call, [x], dst, "send", seconds)

    def recv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None = None,
        *,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Receives a tensor of a known shape and dtype.

        Args:
            size: its shape.
            dtype: its dtype.
            src: rank in the group, by default `prev_in_group`.
            device: where to put it, by default the group's device.
            out: filled and returned in place of a new tensor.
            timeout: deadline.
        """
        call, seconds = self._message("recv", timeout)
        src = call.peer(self.prev_in_group if src is None else src, "src", other=True)
        if device is None:
            device = self.device if out is None else call.tensor(out, "out").device
        result = call.out(out, call.size(size), call.like(dtype, device))
        self._exchange(call, [result], src, "recv", seconds)
        return result

    def _exchange(self, call: Call, tensors: Sequence[torch.Tensor], peer: int, operation: str, seconds: float) -> None:
        """Sends or receives tensors, all at once."""
        outgoing = operation == "send"
        by_strategy: dict[Communicator, list[tuple[torch.Tensor, int]]] = {}
        for x in tensors:
            by_strategy.setdefault(self._link.route(operation, x.shape, x.dtype, x.device), []).append((x, peer))
        for strategy, pairs in by_strategy.items():
            text = " ".join(f"{x.dtype} {x.numel()}" for x, _ in pairs)
            number = self._link.count(signature.MESSAGE, peer, outgoing=outgoing)
            tag = signature.make_tag(signature.MESSAGE, number, text)
            with self._link.guard(call, f"{operation}({text}, {peer})", seconds):
                strategy.exchange(pairs if outgoing else [], [] if outgoing else pairs, tag=tag, timeout=seconds)

    # Objects.

    def broadcast_object(self, obj: T | None = None, src: int = 0, *, timeout: Timeout = None) -> T:
        """The object of `src`, on every rank.

        On one host any picklable object; between hosts any, once an authkey is set, and plain data without one (numbers, strings,
        bytes, lists, tuples, dicts, sets, dtypes, tensors). A receiver whose deadline passes before anything arrived keeps its place:
        its next `broadcast_object` goes on waiting for the same object.

        Args:
            obj: what to send; ignored elsewhere than on `src`.
            src: rank in the group.
            timeout: deadline.

        Raises:
            TypeError: if `obj` cannot be sent; nothing was.
        """
        call, seconds = self._begin("broadcast_object", timeout)
        src = call.peer(src, "src")
        return obj if self.world_size == 1 else self._objects.broadcast(call, obj, src, seconds)  # type: ignore[return-value]  # None only where obj is

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, *, timeout: Timeout = None) -> list[Any]:
        """Fills `obj_list` on every rank with the objects of `src`, in place.

        Args:
            obj_list: lists of equal length on all ranks.
            src: rank in the group.
            timeout: deadline.

        Returns:
            obj_list.
        """
        call, seconds = self._begin("broadcast_object_list", timeout)
        src = call.peer(src, "src")
        if not isinstance(obj_list, list):
            raise call.wrong(f"obj_list is a {type(obj_list).__name__}, a list to be filled is needed")
        if self.world_size > 1:
            received = self._objects.broadcast(call, obj_list, src, seconds)
            if len(received) != len(obj_list):
                raise ValueError(f"{call.where}: obj_list has {len(obj_list)} entries here and {len(received)} on rank {self.ranks[src]}")
            obj_list[:] = received
        return obj_list

    def all_gather_object(self, obj: T, *, timeout: Timeout = None) -> list[T]:
        """Every rank's object, in rank order; which objects: as for `broadcast_object`."""
        call, seconds = self._begin("all_gather_object", timeout)
        return [obj] if self.world_size == 1 else self._objects.all_gather(call, obj, seconds)

    def send_object(self, obj: Any, dst: int, *, timeout: Timeout = None) -> None:
        """Sends an object to one rank in the group; which objects: as for `broadcast_object`."""
        call, seconds = self._message("send_object", timeout)
        self._objects.send(call, obj, call.peer(dst, "dst", other=True), seconds)

    def recv_object(self, src: int, *, timeout: Timeout = None) -> Any:
        """The next object from one rank in the group. A deadline that passes before anything arrived loses nothing: call again."""
        call, seconds = self._message("recv_object", timeout)
        return self._objects.recv(call, call.peer(src, "src", other=True), seconds)

    # Dicts of tensors and objects.

    def broadcast_tensor_dict(self, tensor_dict: D | None = None, src: int = 0, *, timeout: Timeout = None) -> D | dict[Any, Any]:
        """The dict of `src`, on every rank: tensors as tensors, everything else as objects.

        Args:
            tensor_dict: may nest dicts and hold empty tensors; ignored elsewhere than on `src`. Unchanged.
            src: rank in the group.
            timeout: deadline of each part.

        Returns:
            On `src` and in a group of one rank the dict itself; elsewhere a new one, its tensors on the host if they were there, else on
            the group's device.
        """
        call, seconds = self._message("broadcast_tensor_dict", timeout)
        src = call.peer(src, "src")
        if self.rank_in_group != src:
            call, seconds = self._begin("broadcast_tensor_dict", timeout)
            entries, carried = self._objects.broadcast_dict(call, None, (), src, seconds)
            whole = landings(entries, self.device, carried)
            for i, x in enumerate(whole):
                if i not in carried:
                    self._broadcast_part(x, src, timeout)
            return join_dict(entries, whole)
        if tensor_dict is None:
            raise call.wrong("tensor_dict is None on src, which has to give it")
        entries, tensors = _split(call, tensor_dict)
        if self.world_size > 1:
            # Counted only now: of what was refused above the others know nothing, and go on waiting.
            call, seconds = self._begin("broadcast_tensor_dict", timeout)
            _, carried = self._objects.broadcast_dict(call, entries, tensors, src, seconds)
            for i, x in enumerate(tensors):
                if i not in carried:
                    # On this side it is only read, and may lie in memory in any way.
                    self._broadcast_part(x, src, timeout)
        return tensor_dict

    def _broadcast_part(self, x: torch.Tensor, src: int, timeout: Timeout) -> None:
        call, seconds = self._begin("broadcast", timeout)
        self._broadcast(call, x, src, seconds)

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
            all_gather_tensors: key (nested keys joined by dots) -> whether to slice that tensor, against the rule. A residual that
                already differs between the ranks (sequence parallelism) must not be sliced.
            timeout: deadline of each part.
        """
        call, seconds = self._message("send_tensor_dict", timeout)
        dst = call.peer(self.next_in_group if dst is None else dst, "dst", other=True)
        entries, tensors = _split(call, tensor_dict)
        plan, sliced = _sliced(call, entries, all_gather_group, all_gather_tensors)
        outgoing = [plan.slice(x) if cut else x for x, cut in zip(tensors, sliced, strict=True)]
        carried = self._objects.send_dict(call, entries, outgoing, dst, seconds)
        self._exchange(call, [x for i, x in enumerate(outgoing) if i not in carried], dst, "send", seconds)

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
        call, seconds = self._message("recv_tensor_dict", timeout)
        src = call.peer(self.prev_in_group if src is None else src, "src", other=True)
        entries, carried = self._objects.recv_dict(call, src, seconds)
        plan, sliced = _sliced(call, entries, all_gather_group, all_gather_tensors)
        self._check_carried(call, src, entries, carried, sliced, plan, seconds)
        whole = landings(entries, self.device, {i: x for i, x in carried.items() if not sliced[i]})
        landing = [carried.get(i, plan.slice(x) if cut else x) for i, (x, cut) in enumerate(zip(whole, sliced, strict=True))]
        self._exchange(call, [x for i, x in enumerate(landing) if i not in carried], src, "recv", seconds)
        for x, piece, cut in zip(whole, landing, sliced, strict=True):
            if cut and all_gather_group is not None:
                all_gather_group.all_gather(piece, 0, out=x.view(-1), timeout=timeout)
        return join_dict(entries, whole)

    def _check_carried(
        self,
        call: Call,
        src: int,
        entries: Sequence[Entry],
        carried: Mapping[int, torch.Tensor],
        sliced: Sequence[bool],
        plan: Plan,
        seconds: float,
    ) -> None:
        """Whether the sender has sliced what is going to be gathered here, and nothing else."""
        expected = [torch.Size(what[2]).numel() for _, what in entries if what[0] == "t"]
        with self._link.guard(call, "recv_tensor_dict(...)", seconds):
            for i, x in carried.items():
                if x.numel() != expected[i] // (plan.world_size if sliced[i] else 1):
                    raise CallsDiffer(src)

    # Life.

    def prepare_communication_buffer_for_model(self, model: torch.nn.Module) -> None:
        """Lets the strategies size their buffers from `model`. Collective."""
        self._link.ensure_open(self.name)
        for communicator in self._link.communicators:
            communicator.prepare(model)

    def empty(self, size: Sequence[int] | int, dtype: torch.dtype, *, timeout: Timeout = None) -> torch.Tensor:
        """A tensor in memory that the ranks share until the group is closed, so that collectives on it need no staging copy. Collective.

        Where the ranks do not share memory it is a tensor like any other. It may be used after the group was closed, as any tensor.

        Args:
            size: its shape, equal on all ranks.
            dtype: its dtype.
            timeout: deadline.

        Returns:
            An uninitialised tensor of this rank's own on the group's device.
        """
        call, seconds = self._begin("empty", timeout)
        shape, like = call.size(size), call.like(dtype, self.device)
        if self.world_size == 1:
            return torch.empty(shape, dtype=dtype, device=self.device)
        strategy = self._link.route("all_reduce", shape, dtype, self.device)
        return self._link.run(
            call,
            f"{dtype} {shape}",
            seconds,
            lambda tag, left: strategy.empty(shape, like.dtype, like.device, tag=tag, timeout=left),
        )

    def close(self) -> None:
        """Closes this coordinator on this rank; the last one on its communicators takes them along. Sends nothing; idempotent."""
        if self._door is not None:
            self._door.close()
        self._link.leave(self.name)
        if self._link.is_closed:
            self._objects.join(1.0)

    def _broken_off(self, operation: str, text: Callable[[], str], error: BaseException) -> NoReturn:
        """A call that took the short way has failed: as the long way would have it."""
        strategy = self._link.comparing
        if strategy is None or not strategy.interrupted:
            raise error  # nothing was sent
        if not isinstance(error, Stopped):
            strategy.abort()  # a signal's handler has raised: the others must not wait for this rank
            raise error
        call, seconds = self._describe(operation, max(self._link.sequence - 1, 0), None)
        with self._link.guard(call, f"{operation}({text()})", seconds):
            raise strategy.translate(error)
        raise AssertionError("guard always raises")

    def _begin(self, operation: str, timeout: Timeout) -> tuple[Call, float]:
        """Counts a collective, whether its arguments are good or not: ranks that all raised stay level."""
        return self._describe(operation, self._link.begin(self.name), timeout)

    def _message(self, operation: str, timeout: Timeout) -> tuple[Call, float]:
        self._link.ensure_open(self.name)
        return self._describe(operation, self._link.sequence, timeout)

    def _describe(self, operation: str, sequence: int, timeout: Timeout) -> tuple[Call, float]:
        call = Call(self.name, operation, self.rank, self.rank_in_group, self.world_size, sequence, self.device)
        return call, call.seconds(timeout, self._link.host_timeout)

    def __copy__(self) -> GroupCoordinator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupCoordinator:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} holds connections of this process and cannot be pickled: send its layout and name, and look the group up in the "
            "receiver's own context (context[name])"
        )

    def __repr__(self) -> str:
        return f"<GroupCoordinator {self.name!r}: rank {self.rank}, {self.rank_in_group} of {self.world_size} in {_short(self.ranks)}>"


def _resized(x: torch.Tensor, dim: int, extent: int) -> tuple[int, ...]:
    return (*x.shape[:dim], extent, *x.shape[dim + 1 :])


def _apart(x: torch.Tensor, out: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """x, or a copy where filling `out` could change it before it was sent; it may be `own`, the view of `out` that x fills itself."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return x
    in_place = own is not None and own.data_ptr() == x.data_ptr() and own.is_contiguous() and x.is_contiguous()
    return x if in_place else x.clone()


def _split(call: Call, tensor_dict: Mapping[Any, Any]) -> tuple[list[Entry], list[torch.Tensor]]:
    """`split_dict`, of what can be sent."""
    try:
        entries, tensors = split_dict(tensor_dict)
    except TypeError as error:
        raise TypeError(f"{call.where}: {error}. Nothing was sent.") from None
    paths = (".".join(map(str, path)) for path, what in entries if what[0] == "t")
    return entries, [call.tensor(tensor, f"the tensor {path!r}") for path, tensor in zip(paths, tensors, strict=True)]


def _sliced(
    call: Call, entries: Sequence[Entry], group: GroupCoordinator | None, override: Mapping[str, bool] | None
) -> tuple[Plan, list[bool]]:
    plan = Plan() if group is None else Plan(group.world_size, group.rank_in_group, dict(override or {}))
    try:
        return plan, plan.sliced(entries)
    except ValueError as error:
        raise ValueError(f"{call.where}: {error}") from None


def _short(ranks: tuple[int, ...]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"({', '.join(map(str, ranks[:6]))}, ..., {ranks[-1]})"
