"""Messages: tensors from one rank to another. Only the two ranks concerned count them, so they may fall between any collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph import ambient
from commgraph.accelerators.side_streams import StreamTask
from commgraph.carriers import carried, clone
from commgraph.communicators.base import Communicator, FastPath
from commgraph.communicators.tags import MESSAGE, digest, make_tag, message_text, tagged_text
from commgraph.coordinator import checks
from commgraph.coordinator.any_source import from_self, receive_any, to_self
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
    passes_by,
    perform,
    refuse_timeout,
    wait_pending,
)
from commgraph.coordinator.pending import ANY_RANK, MessageKey
from commgraph.coordinator.recorded import TENSORS
from commgraph.coordinator.spans import span
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import ConcurrentCallError
from commgraph.shm.kinds import KINDS
from commgraph.shm.recorder import EXCHANGE, INCOMING, OUTGOING
from commgraph.work import AnySource, Job, Recv, Send, Work

__all__ = [
    "BUFFERED",
    "Receive",
    "SendReceive",
    "Transmit",
    "batch",
    "exchange",
    "irecv",
    "isend",
    "message_digest",
    "recv",
    "send",
    "sendrecv",
]

T = TypeVar("T")

# Bytes up to which `send` of a message with a tag does not wait for its receiver, also where no ring takes it.
BUFFERED: Final = 64 << 10


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
        send(group, x.detach(), dst, 0, None)

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
        extents, place = _asked(group, size, device, out)
        source = group.prev_in_group if src is None else src
        return into(out, cls.operator(group, extents, dtype, source, place, cls.token(group)))

    @classmethod
    def kernel(
        cls, group: Group, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device, token: torch.Tensor
    ) -> torch.Tensor:
        received: torch.Tensor = recv(group, list(size), dtype, src, 0, device, None, None)
        return received

    @classmethod
    def fake(cls, place: Place, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device) -> torch.Tensor:
        checks.peer(place, src, "src")
        return ambient.empty(tuple(size), dtype, device)


class SendReceive(Operation):
    """The torch operator of `sendrecv`."""

    name = "sendrecv"
    schema = "sendrecv(Tensor x, Group group, int dst, SymInt[] size, ScalarType dtype, int src, Device device, Tensor(a!) token) -> Tensor"
    ordered = True

    @classmethod
    def traced(
        cls, group: Group, x: torch.Tensor, dst: int, size: Any, dtype: torch.dtype, src: int, device: Any, out: torch.Tensor | None
    ) -> torch.Tensor:
        checks.refuse_gradient(group, x, "sendrecv")
        extents, place = _asked(group, size, device, out)
        return into(out, cls.operator(x, group, dst, extents, dtype, src, place, cls.token(group)))

    @classmethod
    def kernel(
        cls,
        x: torch.Tensor,
        group: Group,
        dst: int,
        size: Sequence[int],
        dtype: torch.dtype,
        src: int,
        device: torch.device,
        token: torch.Tensor,
    ) -> torch.Tensor:
        return sendrecv(group, x.detach(), dst, list(size), dtype, src, device, None, None)

    @classmethod
    def fake(
        cls, place: Place, x: torch.Tensor, dst: int, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device
    ) -> torch.Tensor:
        _both(place, checks.peer(place, dst, "dst"), checks.peer(place, src, "src"))
        return ambient.empty(tuple(size), dtype, device)


def _asked(group: Group, size: Any, device: Any, out: torch.Tensor | None) -> tuple[list[Any], torch.device]:
    """Return shape and device of a tensor to receive, where torch traces."""
    place = torch.device(device) if device is not None else group.device if out is None else out.device
    return [size] if isinstance(size, int | torch.SymInt) else list(size), place


# Blocking.


def send(group: Group, x: torch.Tensor, dst: int | None, tag: int, timeout: Timeout) -> None:
    """`GroupCoordinator.send`."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        _refuse_tag("send", tag)
        Transmit.traced(group, x, dst)
        return
    native, to = group._state.native_messages, group.next_in_group if dst is None else dst
    if native is not None and type(tag) is int and 0 <= tag < checks.TAGS and native.send(group, x, to, tag, timeout):
        return
    if is_watched(x) and not passes_by(timeout is not None or _is_special(tag), x):
        refuse_timeout(timeout)
        _refuse_tag("send", tag)
        Transmit.traced(group, x, dst)
        return
    deadline = begin_message(group, "send", timeout)
    try:
        checks.tensor(group, x, gradient="send")
        peer = checks.peer(group, group.next_in_group if dst is None else dst, "dst", other=True)
        tag = checks.message_tag(tag)
        strategy = _tagged(group, x, True, tag)
    except BadArgument as error:
        raise explain(error, group, "send", group._state.sequence) from None
    if strategy is not None and x.is_cpu and _ring_to(strategy, peer) is None and x.nbytes <= BUFFERED:
        # As through a ring: a receiver may ask for messages of several tags in another order than that in which they are sent.
        seconds = group._state.timeouts.host
        with ambient.shelter():
            _under_way(group, "send", {(peer, True, tag): [clone(x.detach())]}, seconds, False, None)
        return
    exchange(group, "send", [x], peer, True, deadline, tag=tag, limited=timeout is not None)


def recv(
    group: Group,
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int | AnySource | None,
    tag: int,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    timeout: Timeout,
) -> Any:
    """`GroupCoordinator.recv`."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        _refuse_tag("recv", tag, src)
        return Receive.traced(group, size, dtype, src, device, out)  # type: ignore[arg-type]  # `ANY` is refused
    native = group._state.native_messages
    if native is not None and device is None and type(tag) is int and 0 <= tag < checks.TAGS:
        received: torch.Tensor | None = native.recv(group, size, dtype, group.prev_in_group if src is None else src, tag, out, timeout)
        if received is not None:
            return received
    if is_watched(out) and not passes_by(timeout is not None or _is_special(tag, src), out):
        refuse_timeout(timeout)
        _refuse_tag("recv", tag, src)
        return Receive.traced(group, size, dtype, src, device, out)  # type: ignore[arg-type]  # as above
    deadline = begin_message(group, "recv", timeout)
    try:
        if isinstance(src, AnySource) and group.world_size == 1:
            raise BadArgument("src=commgraph.ANY is nobody: a group of one rank has nobody to talk to")
        result, peer, tag = _result(group, size, dtype, src, tag, device, out, other=True)
    except BadArgument as error:
        raise explain(error, group, "recv", group._state.sequence) from None
    if peer == ANY_RANK:
        wait_pending(group, (ANY_RANK, False, tag), "recv", deadline)
        return result, receive_any(group, "recv", result, tag, deadline)
    exchange(group, "recv", [result], peer, False, deadline, tag=tag, limited=timeout is not None)
    return result


def sendrecv(
    group: Group,
    x: torch.Tensor,
    dst: int,
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    timeout: Timeout,
) -> torch.Tensor:
    """`GroupCoordinator.sendrecv`."""
    native = None if is_dynamo_compiling() else group._state.native_messages
    if native is not None:
        received: torch.Tensor | None = native.swap(group, x, dst, size, dtype, src, device, out, timeout)
        if received is not None:
            return received
    if is_dynamo_compiling() or (is_watched(x, out) and not passes_by(timeout is not None, x, out)):
        refuse_timeout(timeout)
        return SendReceive.traced(group, x, dst, size, dtype, src, device, out)
    deadline = begin_message(group, "sendrecv", timeout)
    try:
        checks.tensor(group, x, gradient="sendrecv")
        to, source = checks.peer(group, dst, "dst"), checks.peer(group, src, "src")
        _both(group, to, source)
        result, _, _ = _result(group, size, dtype, source, 0, device, out, other=False)
    except BadArgument as error:
        raise explain(error, group, "sendrecv", group._state.sequence) from None
    limited, there, here = timeout is not None, (to, True, 0), (source, False, 0)
    if _is_stream_ordered(group, there, x) or _is_stream_ordered(group, here, result):
        return _under_way(group, "sendrecv", {there: [x], here: [result]}, deadline.seconds, limited, result).wait()
    sending = _under_way(group, "sendrecv", {there: [x]}, deadline.seconds, limited, None)
    exchange(group, "sendrecv", [result], source, False, deadline, limited=limited)
    sending.wait()
    return result


def _refuse_tag(operation: str, tag: Any, src: Any = None) -> None:
    """Refuse an argument that the operator lacks, where torch traces."""
    if _is_special(tag, src):
        what = "src=commgraph.ANY" if isinstance(src, AnySource) else f"tag={tag!r}"
        raise ValueError(
            f"{operation}: {what} cannot go with a call that is traced: messages in a graph pair by their order. Call it outside of the "
            "compiled function"
        )


def _is_special(tag: Any, src: Any = None) -> bool:
    """Whether the operator of a message lacks these arguments."""
    return isinstance(src, AnySource) or type(tag) is not int or bool(tag)


def _both(place: Place, dst: int, src: int) -> None:
    """Check that a rank sends to itself and receives from itself, or does neither."""
    me = place.rank_in_group
    if (dst == me) != (src == me):
        raise BadArgument(
            f"dst={dst} and src={src}: one of them is this rank itself and the other one is not, so one message has no other side"
        )


def begin_message(group: Group, operation: str, timeout: Timeout) -> Deadline:
    """Return the deadline of a call on a group that is open."""
    group._state.ensure_open(group.name)
    return deadline_of(group, operation, timeout)


@ambient.sheltered
def _result(
    group: Group,
    size: Any,
    dtype: torch.dtype,
    src: int | AnySource | None,
    tag: Any,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    *,
    other: bool,
) -> tuple[torch.Tensor, int, int]:
    """Return the tensor to fill, the source and the tag; `other`: the source is not the rank itself."""
    anyone = isinstance(src, AnySource)
    peer = ANY_RANK if anyone else checks.peer(group, group.prev_in_group if src is None else src, "src", other=other)
    tag = checks.message_tag(tag)
    if device is None:
        device = group.device if out is None else checks.tensor(group, out, "out").device
    shape, like = checks.shape(size), checks.like(group, dtype, device)
    result = ambient.empty(shape, like.dtype, like.device) if out is None else checks.out(group, out, shape, like)
    if anyone and not result.numel():
        raise BadArgument("size has no elements: nothing is sent of an empty tensor, so nobody could tell from whom it came")
    if peer != group.rank_in_group:
        _tagged(group, result, False, tag, needed=anyone)
    return result, peer, tag


def _tagged(group: Group, x: torch.Tensor, outgoing: bool, tag: int, *, needed: bool = False) -> Communicator | None:
    """Return the strategy of a message to or from another rank, after a check that it can tell messages by their tags, if it must."""
    if group.world_size == 1 or not (tag or needed):
        return None
    strategy = group._state.strategies.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
    if not strategy.tagged:
        what = f"tag={tag}" if tag else "src=commgraph.ANY"
        raise BadArgument(
            f"{what}: messages of tensors on {x.device} pair by their order alone: strategy {strategy.name!r} ignores "
            "tags; send it from the host, or over a sibling of the group",
            unsupported=True,
        )
    return strategy


def exchange(
    group: Group,
    operation: str,
    tensors: Sequence[torch.Tensor],
    peer: int,
    outgoing: bool,
    deadline: Deadline,
    *,
    tag: int = 0,
    limited: bool = True,
    turn: Turn | None = None,
) -> None:
    """Send or receive tensors as one exchange, after the pending messages of their tag with that peer.

    Args:
        group: on which.
        operation: that is made.
        tensors: sent or filled.
        peer: rank in the group.
        outgoing: whether they are sent.
        deadline: of all.
        tag: the user's.
        limited: whether the user gave it a deadline of its own.
        turn: of the call that it is a part of, which has claimed the lane; None: it takes a turn of its own.
    """
    if not tensors:
        return
    state, key = group._state, (peer, outgoing, tag)
    if (lane := state.pending.lane_of(key)) != key:
        wait_pending(group, lane, operation, deadline)
    wait_pending(group, key, operation, deadline)
    state.ensure_open(group.name)
    state.pending.follow(key)
    if peer == group.rank_in_group:
        for x in tensors:
            from_self(group, operation, x, tag, deadline)
        return
    if turn is not None:
        _exchange(group, operation, tensors, key, deadline, limited)
        return
    turn = Turn()
    try:
        state.begin_message(group.name, operation, key, turn)
        _exchange(group, operation, tensors, key, deadline, limited)
    finally:
        state.turns.release(key, turn)


def _exchange(group: Group, operation: str, tensors: Sequence[torch.Tensor], key: MessageKey, deadline: Deadline, limited: bool) -> None:
    state, (peer, outgoing, tag) = group._state, key
    by_strategy: dict[Communicator, list[tuple[torch.Tensor, int]]] = {}
    for x in tensors:
        strategy = state.strategies.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
        by_strategy.setdefault(strategy, []).append((x, peer))
    how = {"label": tag} if tag else {}
    for strategy, pairs in by_strategy.items():
        text = tagged_text(" ".join([message_text(x.dtype, x.shape) for x, _ in pairs]), tag)
        number = make_tag(MESSAGE, state.count(key), text)
        left = deadline if limited or not strategy.stream_ordered else Deadline.after(state.timeouts.device)
        moved = [(carried(x), peer) for x, peer in pairs]
        act = partial(strategy.exchange, moved if outgoing else [], [] if outgoing else moved, tag=number, deadline=left, **how)
        try:
            given, message = [x for x, _ in pairs], (TENSORS, OUTGOING if outgoing else INCOMING, tag)
            what = f"{'send' if outgoing else 'recv'}({text}, {peer})"
            perform(group, operation, state.sequence, what, left, act, given, strategy=strategy.name, peer=peer, message=message)
        except ConcurrentCallError:
            state.uncount(key)
            raise


# Waited for later.


def isend(group: Group, x: torch.Tensor, dst: int | None, tag: int, timeout: Timeout) -> Work[None]:
    """`GroupCoordinator.isend`."""
    deadline = begin_message(group, "isend", timeout)
    try:
        checks.tensor(group, x, gradient="isend")
        peer = checks.peer(group, group.next_in_group if dst is None else dst, "dst")
        tag = checks.message_tag(tag)
        if peer != group.rank_in_group:
            _tagged(group, x, True, tag)
    except BadArgument as error:
        raise explain(error, group, "isend", group._state.sequence) from None
    # A thread of the lane, which the profiler does not see, may take the message up before the caller waits.
    with span(group, "isend"):
        return _under_way(group, "isend", {(peer, True, tag): [x]}, deadline.seconds, timeout is not None, None)


def irecv(
    group: Group,
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int | AnySource | None,
    tag: int,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    timeout: Timeout,
) -> Work[Any]:
    """`GroupCoordinator.irecv`."""
    deadline = begin_message(group, "irecv", timeout)
    state = group._state
    try:
        result, peer, tag = _result(group, size, dtype, src, tag, device, out, other=False)
    except BadArgument as error:
        raise explain(error, group, "irecv", state.sequence) from None
    if peer != ANY_RANK:
        with span(group, "irecv"):
            return _under_way(group, "irecv", {(peer, False, tag): [result]}, deadline.seconds, timeout is not None, result)
    call = Call(group.name, "irecv", state.members, state.sequence)
    tasks: list[StreamTask] = []

    def run() -> int:
        state.ensure_open(group.name)
        return receive_any(group, "irecv", result, tag, Deadline.after(deadline.seconds))

    on_device = state.streams(result.device) is not None
    job = submit(group, (ANY_RANK, False, tag), run, [result], tasks if on_device else None)
    return Work(call, [job], lambda results: joined(tasks, (result, results[0])), tasks)


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
                peer = checks.peer(group, group.next_in_group if message.dst is None else message.dst, f"{what}.dst")
            elif isinstance(message, Recv):
                x = checks.fillable(checks.tensor(group, message.out, f"{what}.out", gradient="batch"), f"{what}.out")
                peer = checks.peer(group, group.prev_in_group if message.src is None else message.src, f"{what}.src")
            else:
                raise BadArgument(f"{what} is a {type(message).__name__}, a commgraph.Send or a commgraph.Recv is needed", unsupported=True)
            outgoing, tag = isinstance(message, Send), checks.message_tag(message.tag)
            if peer != group.rank_in_group:
                _tagged(group, x, outgoing, tag)
            lanes.setdefault((peer, outgoing, tag), []).append(x)
            filled.append(None if outgoing else x)
    except BadArgument as error:
        raise explain(error, group, "batch", group._state.sequence) from None
    for out in filled:
        if out is not None:
            checks.announce_filling(out)
    with span(group, "batch"):
        return _under_way(group, "batch", lanes, deadline.seconds, timeout is not None, filled)


@ambient.sheltered
def _under_way(
    group: Group, operation: str, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float, limited: bool, result: T
) -> Work[T]:
    """Begin messages by (peer, outgoing, tag), each with its own number; a deadline counts from when the lane runs its message."""
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
        peer, outgoing, tag = key
        if outgoing and peer == group.rank_in_group:
            for x in rest:
                to_self(group, operation, x, tag)
            continue
        while rest and outgoing and _offer(group, operation, rest[0], peer, tag, seconds):
            rest.pop(0)
        if rest:
            run = partial(_one_by_one, group, operation, rest, key, seconds, limited)
            on_device = any(state.streams(x.device) is not None for x in rest)
            jobs.append(submit(group, state.pending.lane_of(key), run, rest, tasks if on_device else None))
    return Work(call, jobs, lambda _: joined(tasks, result), tasks)


def _is_stream_ordered(group: Group, key: MessageKey, x: torch.Tensor) -> bool:
    """Whether such a message does not block, and needs no thread."""
    state = group._state
    if key[0] == group.rank_in_group or state.streams(x.device) is None:
        return False
    return state.strategies.route("send" if key[1] else "recv", x.shape, x.dtype, x.device).stream_ordered


def _enqueue(
    group: Group, operation: str, lanes: Mapping[MessageKey, Sequence[torch.Tensor]], seconds: float, limited: bool
) -> tuple[StreamTask, Job]:
    """Enqueue messages of a device as one exchange; enqueued singly, messages of one communicator would wait for each other in order."""
    state = group._state
    assert state.side_streams is not None
    deadline = Deadline.after(seconds)
    for key, tensors in lanes.items():
        if tensors:
            wait_pending(group, key, operation, deadline)
    by_strategy: dict[Communicator, tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]] = {}
    for (peer, outgoing, _), tensors in lanes.items():
        for x in tensors:
            strategy = state.strategies.route("send" if outgoing else "recv", x.shape, x.dtype, x.device)
            by_strategy.setdefault(strategy, ([], []))[0 if outgoing else 1].append((carried(x.detach()), peer))

    def run() -> None:
        state.ensure_open(group.name)
        for strategy, (sends, receives) in by_strategy.items():
            going = [f"to {peer}: {message_text(x.dtype, x.shape)}" for x, peer in sends]
            coming = [f"from {peer}: {message_text(x.dtype, x.shape)}" for x, peer in receives]
            left = Deadline.after(seconds if limited else state.timeouts.device)
            # Stream-ordered strategies match messages by call order and ignore the tag.
            act = partial(strategy.exchange, sends, receives, tag=make_tag(MESSAGE, 0), deadline=left)
            given, what = [x for x, _ in (*sends, *receives)], f"{operation}({'; '.join((*going, *coming))})"
            perform(group, operation, state.sequence, what, left, act, given, strategy=strategy.name, message=(TENSORS, EXCHANGE, 0))

    lane = next(key for key, tensors in lanes.items() if tensors)
    task = StreamTask(state.side_streams, lane, run, [x for tensors in lanes.values() for x in tensors])
    job = Job(task, call_site())
    job.run()
    return task, job


def _one_by_one(group: Group, operation: str, tensors: Sequence[torch.Tensor], key: MessageKey, seconds: float, limited: bool) -> None:
    peer, outgoing, tag = key
    for x in tensors:
        exchange(group, operation, [x], peer, outgoing, Deadline.after(seconds), tag=tag, limited=limited)


def _ring_to(strategy: Communicator, peer: int) -> FastPath | None:
    """Return what sends messages of a strategy to a rank through a ring; None if they go otherwise."""
    rings = strategy.rings
    mailbox = None if rings is None else rings.mailbox
    return None if mailbox is None or peer not in mailbox.outgoing else rings


def _offer(group: Group, operation: str, x: torch.Tensor, dst: int, label: int, seconds: float) -> bool:
    """Send x on this thread if no wait is needed; whether it was sent."""
    state = group._state
    if not x.is_cpu or not state.pending.is_idle((dst, True, label)):
        return False
    native = state.native_messages
    if native is not None and native.offer(group, operation, x, dst, label):
        return True
    rings = _ring_to(state.strategies.route("send", x.shape, x.dtype, x.device), dst)
    if rings is None:
        return False
    text = tagged_text(message_text(x.dtype, x.shape), label)
    key, turn, taken = (dst, True, label), Turn(), False

    def act() -> bool:
        try:
            return rings.offer(carried(x.detach()), dst, tag=tag, label=label)
        except BaseException as error:
            translated = rings.translate(error)
            raise error if translated is None else translated from None

    try:
        if not state.turns.claim(key, turn):
            return False
        tag = make_tag(MESSAGE, state.counted(key), text)
        left, what, message = Deadline.after(seconds), f"send({text}, {dst})", (TENSORS, OUTGOING, label)
        taken = perform(group, operation, state.sequence, what, left, act, [x], strategy="shm", peer=dst, message=message, is_made=bool)
        if taken:
            state.count(key)
    finally:
        state.turns.release(key, turn)
    return taken


_DTYPES: Final = MappingProxyType({kind: dtype for dtype, kind in KINDS.items()})


def message_digest(kind: int, shape: tuple[int, ...], label: int) -> int:
    """Return the digest of the text of a message with that tag of the user's, for the native module."""
    return digest(tagged_text(message_text(_DTYPES[kind], shape), label))
