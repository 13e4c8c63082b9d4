"""Operations that are begun here and waited for later.

Each is the blocking operation, made by another thread in the order in which the operations were begun (`commgraph.work`): the collectives
of a group in one order, the messages to a peer in one, those from a peer in one. A blocking call waits for those that were begun before it
in its own order, and for no other: messages pass collectives, and those of one peer those of another.

On a device such a call is enqueued on a stream of its lane's own (`commgraph.coordinator.aside`): at once where its strategy only enqueues,
by the lane's thread where it holds up the host. NCCL carries all that a group does by one communicator: there messages do not pass
collectives, and a rank's order of beginning them is its peers' too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.communicators import signature
from commgraph.communicators.base import Communicator
from commgraph.coordinator import traced
from commgraph.coordinator.aside import Aside
from commgraph.coordinator.call import Call, Timeout, place
from commgraph.coordinator.link import LaneKey, MessageKey
from commgraph.coordinator.messages import MessageOperations, Received
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
        return self._begun(call, "all_reduce", x, lambda: self.all_reduce(x, op=op, timeout=timeout))

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
        return self._begun(call, "all_gather", x, lambda: self.all_gather(x, dim, out=out, timeout=timeout), out)

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
        return self._begun(call, "reduce_scatter", x, lambda: self.reduce_scatter(x, dim, op=op, out=out, timeout=timeout), out)

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

    def _begun(
        self, call: Call, operation: str, x: torch.Tensor, run: Callable[[], torch.Tensor], out: torch.Tensor | None = None
    ) -> Work[torch.Tensor]:
        if self.world_size == 1:
            job = Job(run, place())
            job.run()
            return Work(call.where, call.facts, [job], lambda results: results[0])
        link, sides = self._link, self._link.sides
        if sides is None or link.streams(x.device) is None:
            return Work(call.where, call.facts, [self._submit(None, run)], lambda results: results[0])
        aside = Aside(sides, None, run, [x] if out is None else [x, out])
        job = Job(aside, place())
        at_once = link.route(operation, x.shape, x.dtype, x.device).enqueues
        # With `check` it is compared now, in the one order that all groups have on a device, though that waits for the peers to begin it.
        if sides.streams.is_capturing() or (at_once and (link.is_idle(None) or link.check)):
            job.run()
        else:
            link.submit(None, job)
        return Work(call.where, call.facts, [job], lambda results: _joined([aside], results[0], results), [aside])

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
        for out in filled:
            if out is not None:
                call.filling(out)
        return self._under_way(call, lanes, seconds, filled)

    def _under_way(self, call: Call, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float, result: T) -> Work[T]:
        """Messages by (peer, whether they go there), each with its own number."""
        jobs, asides = [], []
        enqueued = {key: [x for x in tensors if self._enqueues(key, x)] for key, tensors in lanes.items()}
        if any(enqueued.values()):
            aside, job = self._enqueue(call, enqueued, seconds)
            asides.append(aside)
            jobs.append(job)
        for key, tensors in lanes.items():
            rest = [x for x in tensors if not any(x is other for other in enqueued[key])]
            peer, outgoing = key
            while rest and outgoing and self._offer(call, rest[0], peer, seconds):
                rest.pop(0)
            if rest:
                run = partial(self._each, call, rest, peer, "send" if outgoing else "recv", seconds)
                on_device = any(self._link.streams(x.device) is not None for x in rest)
                jobs.append(self._submit(key, run, rest, asides if on_device else None))
        return Work(call.where, call.facts, jobs, lambda _: _joined(asides, result), asides)

    def _enqueues(self, key: MessageKey, x: torch.Tensor) -> bool:
        """Whether such a message holds up nobody, and need not go by way of a thread."""
        link = self._link
        return link.streams(x.device) is not None and link.route("send" if key[1] else "recv", x.shape, x.dtype, x.device).enqueues

    def _enqueue(self, call: Call, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float) -> tuple[Aside, Job]:
        """Messages of a device, as one exchange: by themselves those of one communicator would wait for each other in the order given."""
        link = self._link
        assert link.sides is not None
        for key, tensors in lanes.items():
            if tensors:
                seconds = link.settle(key, call, seconds)
        by_strategy: dict[Communicator, tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]] = {}
        for (peer, outgoing), tensors in lanes.items():
            for x in tensors:
                strategy = link.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
                by_strategy.setdefault(strategy, ([], []))[0 if outgoing else 1].append((x.detach(), peer))

        def run() -> None:
            link.ensure_open(self.name)
            for strategy, (sends, receives) in by_strategy.items():
                going = [f"to {peer}: {signature.messages(x)}" for x, peer in sends]
                coming = [f"from {peer}: {signature.messages(x)}" for x, peer in receives]
                left = link.deadline(call, strategy, seconds)
                with link.guard(call, f"{call.operation}({'; '.join((*going, *coming))})", left):
                    # What only enqueues pairs messages by their order alone.
                    strategy.exchange(sends, receives, tag=signature.make_tag(signature.MESSAGE, 0), timeout=left)

        lane = next(key for key, tensors in lanes.items() if tensors)
        aside = Aside(link.sides, lane, run, [x for tensors in lanes.values() for x in tensors])
        job = Job(aside, place())
        job.run()
        return aside, job

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

    def _submit(self, key: LaneKey, run: Callable[[], Any], given: Sequence[torch.Tensor] = (), asides: list[Aside] | None = None) -> Job:
        """A job of a lane; where it has to do with a device also an aside, which is added to `asides`."""
        sides = self._link.sides
        if asides is not None and sides is not None:
            asides.append(Aside(sides, key, run, [x for x in given if self._link.streams(x.device) is not None]))
            run = asides[-1]
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
        asides: list[Aside] = []
        job = self._submit((dst, True), lambda: send(seconds), (), asides)
        return Work(call.where, call.facts, [job], lambda _: _joined(asides, None), asides)

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
        asides: list[Aside] = []
        run = partial(self._receive_dict, call, src, all_gather_group, all_gather_tensors, seconds)
        job = self._submit((src, False), run, (), asides)

        def finish(results: Sequence[Any]) -> dict[Any, Any]:
            received: Received = results[0]
            return _joined(asides, received, received.on_device()).gathered(all_gather_group, timeout)

        return Work(call.where, call.facts, [job], finish, asides)


def _joined(asides: Sequence[Aside], result: T, made: Sequence[torch.Tensor] = ()) -> T:
    """`result`, of calls whose end the current stream now comes after."""
    for aside in asides:
        aside.join(made)
    return result
