"""Messages: tensors from one rank to another. Only the two ranks concerned count them, so they may fall between any collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.accelerators.side_streams import StreamTask
from commgraph.communicators.base import Communicator
from commgraph.communicators.tags import MESSAGE, digest, make_tag
from commgraph.coordinator import checks
from commgraph.coordinator.asynchronous import joined, submit
from commgraph.coordinator.checks import BadArgument, Place
from commgraph.coordinator.failures import Call, call_site
from commgraph.coordinator.gathers import into
from commgraph.coordinator.operation import (
    Group,
    Operation,
    deadline_of,
    explain,
    is_watched,
    perform,
    refuse_timeout,
    wait_pending,
)
from commgraph.coordinator.pending import MessageKey
from commgraph.deadline import Deadline, Timeout
from commgraph.shm.kinds import KINDS
from commgraph.work import Job, Recv, Send, Work

__all__ = ["Receive", "Transmit", "batch", "exchange", "irecv", "isend", "message_digest", "message_text", "recv", "send"]

T = TypeVar("T")


def message_text(dtype: torch.dtype, numel: int) -> str:
    """Return the text of a message; its two sides may give the tensor different shapes."""
    return f"{dtype} {numel}"


class Transmit(Operation):
    """The torch operator of `send`."""

    name = "send"
    schema = "send(Tensor x, Group group, int dst, Tensor(a!) token) -> ()"
    ordered = True

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, dst: int | None) -> None:
        checks.refuse_gradient(group, x, "send")
        cls.operator(x, group, group.next_in_group if dst is None else dst, cls.token(group))

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, dst: int, token: torch.Tensor) -> None:
        send(group, x.detach(), dst, None)

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, dst: int) -> None:
        checks.peer(place, dst, "dst")


class Receive(Operation):
    """The torch operator of `recv`."""

    name = "recv"
    schema = "recv(Group group, SymInt[] size, ScalarType dtype, int src, Device device, Tensor(a!) token) -> Tensor"
    ordered = True

    @classmethod
    def traced(cls, group: Group, size: Any, dtype: torch.dtype, src: int | None, device: Any, out: torch.Tensor | None) -> torch.Tensor:
        place = torch.device(device) if device is not None else group.device if out is None else out.device
        extents = [size] if isinstance(size, int | torch.SymInt) else list(size)
        source = group.prev_in_group if src is None else src
        return into(out, cls.operator(group, extents, dtype, source, place, cls.token(group)))

    @classmethod
    def kernel(
        cls, group: Group, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device, token: torch.Tensor
    ) -> torch.Tensor:
        return recv(group, list(size), dtype, src, device, None, None)

    @classmethod
    def fake(cls, place: Place, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device) -> torch.Tensor:
        checks.peer(place, src, "src")
        return torch.empty(tuple(size), dtype=dtype, device=device)


# Blocking.


def send(group: Group, x: torch.Tensor, dst: int | None, timeout: Timeout) -> None:
    """`GroupCoordinator.send`."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        Transmit.traced(group, x, dst)
        return
    native = group._state.native_messages
    if native is not None and native.send(group, x, group.next_in_group if dst is None else dst, timeout):
        return
    if is_watched(x):
        refuse_timeout(timeout)
        Transmit.traced(group, x, dst)
        return
    deadline = begin_message(group, "send", timeout)
    try:
        checks.tensor(group, x, gradient="send")
        peer = checks.peer(group, group.next_in_group if dst is None else dst, "dst", other=True)
    except BadArgument as error:
        raise explain(error, group, "send", group._state.sequence) from None
    exchange(group, "send", [x], peer, True, deadline, limited=timeout is not None)


def recv(
    group: Group,
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int | None,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    timeout: Timeout,
) -> torch.Tensor:
    """`GroupCoordinator.recv`."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        return Receive.traced(group, size, dtype, src, device, out)
    native = group._state.native_messages
    if native is not None and device is None:
        received: torch.Tensor | None = native.recv(group, size, dtype, group.prev_in_group if src is None else src, out, timeout)
        if received is not None:
            return received
    if is_watched(out):
        refuse_timeout(timeout)
        return Receive.traced(group, size, dtype, src, device, out)
    deadline = begin_message(group, "recv", timeout)
    try:
        result, peer = _result(group, size, dtype, src, device, out)
    except BadArgument as error:
        raise explain(error, group, "recv", group._state.sequence) from None
    exchange(group, "recv", [result], peer, False, deadline, limited=timeout is not None)
    return result


def begin_message(group: Group, operation: str, timeout: Timeout) -> Deadline:
    """Return the deadline of a call on a group that is open."""
    group._state.ensure_open(group.name)
    return deadline_of(group, operation, timeout)


def _result(
    group: Group, size: Any, dtype: torch.dtype, src: int | None, device: torch.device | str | None, out: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Return the tensor that is to be filled, and from whom."""
    peer = checks.peer(group, group.prev_in_group if src is None else src, "src", other=True)
    if device is None:
        device = group.device if out is None else checks.tensor(group, out, "out").device
    shape, like = checks.shape(size), checks.like(group, dtype, device)
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device), peer
    return checks.out(group, out, shape, like), peer


def exchange(
    group: Group, operation: str, tensors: Sequence[torch.Tensor], peer: int, outgoing: bool, deadline: Deadline, *, limited: bool = True
) -> None:
    """Send or receive tensors, all at once, after everything that was begun before with that peer.

    Args:
        group: on which.
        operation: that is made.
        tensors: sent or filled.
        peer: rank in the group.
        outgoing: whether they are sent.
        deadline: of all.
        limited: whether the user gave it a deadline of its own.
    """
    if not tensors:
        return
    state, key = group._state, (peer, outgoing)
    wait_pending(group, key, operation, deadline)
    state.ensure_open(group.name)
    state.pending.follow(key)
    by_strategy: dict[Communicator, list[tuple[torch.Tensor, int]]] = {}
    for x in tensors:
        strategy = state.strategies.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
        by_strategy.setdefault(strategy, []).append((x, peer))
    for strategy, pairs in by_strategy.items():
        text = " ".join([message_text(x.dtype, x.numel()) for x, _ in pairs])
        tag = make_tag(MESSAGE, state.count((MESSAGE, peer, outgoing)), text)
        left = deadline if limited or not strategy.stream_ordered else Deadline.after(state.timeouts.device)
        act = partial(strategy.exchange, pairs if outgoing else [], [] if outgoing else pairs, tag=tag, deadline=left)
        perform(group, operation, state.sequence, f"{'send' if outgoing else 'recv'}({text}, {peer})", left, act)


# Waited for later.


def isend(group: Group, x: torch.Tensor, dst: int | None, timeout: Timeout) -> Work[None]:
    """`GroupCoordinator.isend`."""
    deadline = begin_message(group, "isend", timeout)
    try:
        checks.tensor(group, x, gradient="isend")
        peer = checks.peer(group, group.next_in_group if dst is None else dst, "dst", other=True)
    except BadArgument as error:
        raise explain(error, group, "isend", group._state.sequence) from None
    return _under_way(group, "isend", {(peer, True): [x]}, deadline.seconds, timeout is not None, None)


def irecv(
    group: Group,
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int | None,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    timeout: Timeout,
) -> Work[torch.Tensor]:
    """`GroupCoordinator.irecv`."""
    deadline = begin_message(group, "irecv", timeout)
    try:
        result, peer = _result(group, size, dtype, src, device, out)
    except BadArgument as error:
        raise explain(error, group, "irecv", group._state.sequence) from None
    return _under_way(group, "irecv", {(peer, False): [result]}, deadline.seconds, timeout is not None, result)


def batch(group: Group, messages: Sequence[Send | Recv], timeout: Timeout) -> Work[list[torch.Tensor | None]]:
    """`GroupCoordinator.batch`."""
    deadline = begin_message(group, "batch", timeout)
    lanes: dict[MessageKey, list[torch.Tensor]] = {}
    filled: list[torch.Tensor | None] = []
    try:
        for i, message in enumerate(checks.several(messages, "messages")):
            what = f"messages[{i}]"
            if isinstance(message, Send):
                x = checks.tensor(group, message.x, f"{what}.x", gradient="batch")
                peer = checks.peer(group, group.next_in_group if message.dst is None else message.dst, f"{what}.dst", other=True)
            elif isinstance(message, Recv):
                x = checks.fillable(checks.tensor(group, message.out, f"{what}.out", gradient="batch"), f"{what}.out")
                peer = checks.peer(group, group.prev_in_group if message.src is None else message.src, f"{what}.src", other=True)
            else:
                raise BadArgument(f"{what} is a {type(message).__name__}, a commgraph.Send or a commgraph.Recv is needed", unsupported=True)
            lanes.setdefault((peer, isinstance(message, Send)), []).append(x)
            filled.append(x if isinstance(message, Recv) else None)
    except BadArgument as error:
        raise explain(error, group, "batch", group._state.sequence) from None
    for out in filled:
        if out is not None:
            checks.announce_filling(out)
    return _under_way(group, "batch", lanes, deadline.seconds, timeout is not None, filled)


def _under_way(
    group: Group, operation: str, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float, limited: bool, result: T
) -> Work[T]:
    """Begin messages by (peer, whether they go there), each with its own number; the deadline counts from when its turn comes."""
    state = group._state
    call = Call(group.name, operation, state.members, state.sequence)
    jobs, tasks = [], []
    enqueued = {key: [x for x in tensors if _is_stream_ordered(group, key, x)] for key, tensors in lanes.items()}
    if any(enqueued.values()):
        task, job = _enqueue(group, operation, enqueued, seconds, limited)
        tasks.append(task)
        jobs.append(job)
    for key, tensors in lanes.items():
        rest = [x for x in tensors if not any(x is other for other in enqueued[key])]
        peer, outgoing = key
        while rest and outgoing and _offer(group, operation, rest[0], peer, seconds):
            rest.pop(0)
        if rest:
            run = partial(_one_by_one, group, operation, rest, peer, outgoing, seconds, limited)
            on_device = any(state.streams(x.device) is not None for x in rest)
            jobs.append(submit(group, key, run, rest, tasks if on_device else None))
    return Work(call, jobs, lambda _: joined(tasks, result), tasks)


def _is_stream_ordered(group: Group, key: MessageKey, x: torch.Tensor) -> bool:
    """Whether such a message holds up nobody, and need not go by way of a thread."""
    state = group._state
    if state.streams(x.device) is None:
        return False
    return state.strategies.route("send" if key[1] else "recv", x.shape, x.dtype, x.device).stream_ordered


def _enqueue(
    group: Group, operation: str, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float, limited: bool
) -> tuple[StreamTask, Job]:
    """Enqueue messages of a device as one exchange: one by one those of one communicator would wait for each other in the order given."""
    state = group._state
    assert state.side_streams is not None
    deadline = Deadline.after(seconds)
    for key, tensors in lanes.items():
        if tensors:
            wait_pending(group, key, operation, deadline)
    by_strategy: dict[Communicator, tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]] = {}
    for (peer, outgoing), tensors in lanes.items():
        for x in tensors:
            strategy = state.strategies.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
            by_strategy.setdefault(strategy, ([], []))[0 if outgoing else 1].append((x.detach(), peer))

    def run() -> None:
        state.ensure_open(group.name)
        for strategy, (sends, receives) in by_strategy.items():
            going = [f"to {peer}: {message_text(x.dtype, x.numel())}" for x, peer in sends]
            coming = [f"from {peer}: {message_text(x.dtype, x.numel())}" for x, peer in receives]
            left = Deadline.after(seconds if limited else state.timeouts.device)
            # Stream-ordered strategies match messages by call order and ignore the tag.
            act = partial(strategy.exchange, sends, receives, tag=make_tag(MESSAGE, 0), deadline=left)
            perform(group, operation, state.sequence, f"{operation}({'; '.join((*going, *coming))})", left, act)

    lane = next(key for key, tensors in lanes.items() if tensors)
    task = StreamTask(state.side_streams, lane, run, [x for tensors in lanes.values() for x in tensors])
    job = Job(task, call_site())
    job.run()
    return task, job


def _one_by_one(
    group: Group, operation: str, tensors: Sequence[torch.Tensor], peer: int, outgoing: bool, seconds: float, limited: bool
) -> None:
    for x in tensors:
        exchange(group, operation, [x], peer, outgoing, Deadline.after(seconds), limited=limited)


def _offer(group: Group, operation: str, x: torch.Tensor, dst: int, seconds: float) -> bool:
    """Send x here and now, if it need not wait for anything."""
    state = group._state
    fast = state.detects
    if fast is None or fast.mailbox is None or not x.is_cpu or not state.pending.is_idle((dst, True)):
        return False
    if state.strategies.route("send", x.shape, x.dtype, x.device).fast is not fast:
        return False
    text = message_text(x.dtype, x.numel())
    key = (MESSAGE, dst, True)
    tag = make_tag(MESSAGE, state.count(key), text)
    taken = False

    def act() -> bool:
        try:
            return fast.offer(x.detach(), dst, tag=tag)
        except BaseException as error:
            translated = fast.translate(error)
            raise error if translated is None else translated from None

    try:
        taken = perform(group, operation, state.sequence, f"send({text}, {dst})", Deadline.after(seconds), act)
    finally:
        if not taken:
            state.uncount(key)
    return taken


_DTYPES: Final = MappingProxyType({kind: dtype for dtype, kind in KINDS.items()})


def message_digest(kind: int, numel: int) -> int:
    """Return the digest of a message's text, for the native module."""
    return digest(message_text(_DTYPES[kind], numel))
