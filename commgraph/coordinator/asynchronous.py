"""Operations that are begun here and waited for later.

Each is the blocking operation, made by another thread in the order in which the operations were begun (`commgraph.work`): the collectives
of a group in one order, the messages to a peer in one, those from a peer in one. A blocking call waits for those that were begun before it
in its own order, and for no other: messages pass collectives, and those of one peer those of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.communicators import signature
from commgraph.coordinator import traced
from commgraph.coordinator.call import Call, Timeout, place
from commgraph.coordinator.link import LaneKey
from commgraph.coordinator.messages import MessageOperations
from commgraph.work import Finished, Job, Recv, Send, Work

if TYPE_CHECKING:
    from commgraph.coordinator.group import GroupCoordinator

__all__ = ["AsynchronousOperations"]

T = TypeVar("T")


class AsynchronousOperations(MessageOperations):
    """The same with a `Work` for a result. Arguments are checked when it is begun; the deadline counts from when its turn comes.

    Where torch traces, a collective is its blocking operator and has ended at once; messages that nobody waits for cannot be traced.
    """

    # Collectives.

    def all_reduce_async(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> Work[torch.Tensor]:
        """`all_reduce`, whose result `Work.wait` gives.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic; without a gradient. Not to be changed until the work has ended.
            op: as for `all_reduce`.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is a new tensor of x's shape and dtype; x itself in a group of one rank.
        """
        if is_dynamo_compiling() or traced.looks_on(x):
            return Finished(self.all_reduce(x, op=op, timeout=timeout))
        with self._beginning("all_reduce_async", timeout) as call:
            call.op(op, call.tensor(x).dtype)
        return self._begun(call, lambda: self.all_reduce(x, op=op, timeout=timeout))

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
        if is_dynamo_compiling() or traced.looks_on(x):
            return Finished(self.all_gather(x, dim, out=out, timeout=timeout))
        with self._beginning("all_gather_async", timeout) as call:
            shape = list(call.tensor(x).shape)
            shape[call.dim(x, dim)] *= self.world_size
            if out is not None:
                call.out(out, shape, x)
        return self._begun(call, lambda: self.all_gather(x, dim, out=out, timeout=timeout))

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
        if is_dynamo_compiling() or traced.looks_on(x):
            return Finished(self.reduce_scatter(x, dim, op=op, out=out, timeout=timeout))
        with self._beginning("reduce_scatter_async", timeout) as call:
            shape = list(call.tensor(x).shape)
            at = call.dim(x, dim)
            shape[at] = call.even(shape[at], f"dim {at} of x {tuple(x.shape)}")[0]
            call.op(op, x.dtype)
            if out is not None:
                call.out(out, shape, x)
        return self._begun(call, lambda: self.reduce_scatter(x, dim, op=op, out=out, timeout=timeout))

    @contextlib.contextmanager
    def _beginning(self, operation: str, timeout: Timeout) -> Iterator[Call]:
        """The checks of a collective. One that is refused counts when its turn would have come, as blocking ones do at once."""
        self._link.ensure_open(self.name)
        try:
            call, _ = self._describe(operation, self._link.sequence, timeout)
            yield call
        except Exception:
            self._link.submit(None, Job(lambda: self._link.begin(self.name), place()))
            raise

    def _begun(self, call: Call, run: Callable[[], T]) -> Work[T]:
        job = Job(run, place())
        if self.world_size == 1:
            job.run()
        else:
            self._link.submit(None, job)
        return Work(call.where, call.facts, [job], lambda results: results[0])

    # Messages.

    def isend(self, x: torch.Tensor, dst: int | None = None, *, timeout: Timeout = None) -> Work[None]:
        """`send` without waiting until x was taken.

        Args:
            x: any shape. Not to be changed until the work has ended.
            dst: rank in the group, by default `next_in_group`.
            timeout: deadline, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result is None.
        """
        call, seconds = self._message("isend", timeout)
        x = call.tensor(x)
        dst = call.peer(self.next_in_group if dst is None else dst, "dst", other=True)
        return self._under_way(call, {(dst, True): [x]}, seconds, None)

    def irecv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None = None,
        *,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> Work[torch.Tensor]:
        """`recv`, whose tensor `Work.wait` gives.

        Args:
            size, dtype: of what comes.
            src: rank in the group, by default `prev_in_group`.
            device: where to put it, by default the group's device.
            out: filled and given in place of a new tensor. Not to be touched until the work has ended.
            timeout: deadline, a timedelta or seconds, from when its turn comes.
        """
        call, seconds = self._message("irecv", timeout)
        result, src = self._landing(call, size, dtype, src, device, out)
        return self._under_way(call, {(src, False): [result]}, seconds, result)

    def batch(self, messages: Sequence[Send | Recv], *, timeout: Timeout = None) -> Work[list[torch.Tensor | None]]:
        """Sends and receives all of these at once, so that it does not matter in which order the ranks list them.

        Between two ranks the messages of each direction pair in the order in which they are listed; the other side may be a batch, or
        single sends and receives of either kind.

        Args:
            messages: `commgraph.Send` and `commgraph.Recv`.
            timeout: deadline of each message, a timedelta or seconds, from when its turn comes.

        Returns:
            Work whose result has the filled tensor of each `Recv` and None for each `Send`, in the order given.
        """
        call, seconds = self._message("batch", timeout)
        lanes: dict[tuple[int, bool], list[torch.Tensor]] = {}
        filled: list[torch.Tensor | None] = []
        for i, message in enumerate(call.several(messages, "messages")):
            what = f"messages[{i}]"
            if isinstance(message, Send):
                x = call.tensor(message.x, f"{what}.x")
                peer = call.peer(self.next_in_group if message.dst is None else message.dst, f"{what}.dst", other=True)
            elif isinstance(message, Recv):
                x = call.written(call.tensor(message.out, f"{what}.out"), f"{what}.out")
                peer = call.peer(self.prev_in_group if message.src is None else message.src, f"{what}.src", other=True)
            else:
                raise call.unsupported(f"{what} is a {type(message).__name__}, a commgraph.Send or a commgraph.Recv is needed")
            lanes.setdefault((peer, isinstance(message, Send)), []).append(x)
            filled.append(x if isinstance(message, Recv) else None)
        return self._under_way(call, lanes, seconds, filled)

    def _under_way(self, call: Call, lanes: Mapping[tuple[int, bool], Sequence[torch.Tensor]], seconds: float, result: T) -> Work[T]:
        """Messages by (peer, whether they go there), each with its own number."""
        jobs = []
        for (peer, outgoing), tensors in lanes.items():
            rest = list(tensors)
            while rest and outgoing and self._offer(call, rest[0], peer, seconds):
                rest.pop(0)
            if rest:
                run = partial(self._each, call, rest, peer, "send" if outgoing else "recv", seconds)
                jobs.append(self._submit((peer, outgoing), run))
        return Work(call.where, call.facts, jobs, lambda _: result)

    def _each(self, call: Call, tensors: Sequence[torch.Tensor], peer: int, operation: str, seconds: float) -> None:
        for x in tensors:
            self._exchange(call, [x], peer, operation, seconds)

    def _offer(self, call: Call, x: torch.Tensor, dst: int, seconds: float) -> bool:
        """Sends x here and now, if it need not wait for anything."""
        if not self._link.is_idle((dst, True)):
            return False
        text = signature.messages(x)
        number = self._link.count(signature.MESSAGE, dst, outgoing=True)
        taken = False
        try:
            with self._link.guard(call, f"send({text}, {dst})", seconds):
                tag = signature.make_tag(signature.MESSAGE, number, text)
                taken = self._link.route("send", x.shape, x.dtype, x.device).offer([(x.detach(), dst)], tag=tag)
        finally:
            if not taken:
                self._link.uncount(signature.MESSAGE, dst, outgoing=True)
        return taken

    def _submit(self, key: LaneKey, run: Callable[[], Any]) -> Job:
        job = Job(run, place())
        self._link.submit(key, job)
        return job

    # Dicts of tensors and objects.

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
        call, seconds = self._message("isend_tensor_dict", timeout)
        dst = call.peer(self.next_in_group if dst is None else dst, "dst", other=True)
        send = self._pack_dict(call, tensor_dict, dst, all_gather_group, all_gather_tensors)
        return Work(call.where, call.facts, [self._submit((dst, True), lambda: send(seconds))], lambda _: None)

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
        call, seconds = self._message("irecv_tensor_dict", timeout)
        src = call.peer(self.prev_in_group if src is None else src, "src", other=True)
        job = self._submit((src, False), lambda: self._receive_dict(call, src, all_gather_group, all_gather_tensors, seconds))
        return Work(call.where, call.facts, [job], lambda results: results[0].gathered(all_gather_group, timeout))
