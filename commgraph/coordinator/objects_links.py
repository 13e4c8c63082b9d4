"""Objects between ranks that have TCP links: frames of any size, whose large parts travel beside what is signed.

A message is a first frame, which says what follows, and a frame for each large part (`commgraph.shm.sealed_pickle`); without a key it is
one frame, of plain data (`commgraph.wire`). The caller's thread sends and receives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import torch

from commgraph import ambient, wire
from commgraph.carriers import UNSERVED
from commgraph.communicators.base import PeerLate
from commgraph.communicators.memory import is_dense, pooled
from commgraph.communicators.tags import COLLECTIVE, MESSAGE, OBJECT, make_tag, message_text, rest_of
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.dict_parts import taken_apart
from commgraph.coordinator.frames import STREAMS, Frames
from commgraph.coordinator.messages import exchange
from commgraph.coordinator.objects import NetworkObjects, UnreadableDictError, has_come, nothing_yet, refuse_object, unreadable
from commgraph.coordinator.operation import Group, explain
from commgraph.coordinator.pending import DICTS, OBJECTS, MessageKey
from commgraph.coordinator.recorded import OBJECTS as OBJECT_FAMILY
from commgraph.coordinator.recorded import entry
from commgraph.coordinator.spans import spanned
from commgraph.coordinator.state import GroupState
from commgraph.coordinator.tensor_dict import Entry, join_dict, result_tensors
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import ConcurrentCallError, ContextClosedError
from commgraph.shm.pickling import Pickler
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.shm.sealed_pickle import Sealed, key_of, open_sealed, seal

__all__ = ["LinkObjects", "Parts", "bytes_of_parts"]

# A message that came: its first frame, what that says if it is signed, and the frames that followed it.
Parts = tuple[Any, Sealed | None, Sequence[Any]]

# Of an object, in the record of calls.
_SENT: Final = (OBJECT_FAMILY, OUTGOING, 0)


class LinkObjects(NetworkObjects):
    """Objects of a group whose ranks have TCP links."""

    def __init__(self, state: GroupState, transport: TcpTransport) -> None:
        super().__init__(state)
        self._pickler = Pickler()
        self._transport = transport
        self._uid = state.members.uid
        self._timeout_ns = int(state.timeouts.host * 1e9)
        self._others = [peer for peer in range(transport.world_size) if peer != transport.rank_in_group]
        self._description = _Description()
        self._signing = None if self._key is None else key_of(self._key)

    # A call without a deadline of its own, where nothing is pending and there are links: with less Python.

    def _is_plain(self, peer: Any, outgoing: bool, timeout: Timeout) -> bool:
        state, net = self._state, self._transport.messages
        return (
            timeout is None
            and type(peer) is int
            and 0 <= peer < self._transport.world_size
            and peer != self._transport.rank_in_group
            and (not state.pending.lanes or state.pending.is_idle((peer, outgoing, OBJECTS)))
            and net.is_linked(peer)
        )

    def send(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> None:
        (self._send if self._is_plain(dst, True, timeout) else super().send)(group, operation, obj, dst, timeout)

    @spanned
    def _send(self, group: Group, operation: str, obj: object, dst: int, _: Timeout) -> None:
        state, key, turn, net = self._state, (dst, True, OBJECTS), Turn(), self._transport.messages
        state.ensure_open(group.name)
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counts.get(key, 0)
            parts = self._encode_message(group, operation, obj, f"message {self._transport.rank_in_group} {dst} {number}")
            state.counts[key] = number + 1
        finally:
            state.turns.release(key, turn)
        tag = make_tag(OBJECT, number, "message")
        written = None if state.records is None else entry(group, operation, peer=dst, message=_SENT, moved=_bytes_of(parts))
        with written or contextlib.nullcontext():
            try:
                net.send_parts([dst], tag, rest_of(tag), parts, self._timeout_ns)
            except BaseException as error:
                self._end(Frames.of_message(group, operation, Deadline.after(state.timeouts.host), OBJECTS, number, OUTGOING), net, error)

    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        return (self._receive if self._is_plain(src, False, timeout) else super().recv)(group, operation, src, timeout)

    @spanned
    def _receive(self, group: Group, operation: str, src: int, _: Timeout) -> Any:
        state, key, turn = self._state, (src, False, OBJECTS), Turn()
        state.ensure_open(group.name)
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counts.get(key, 0)
            context = f"message {src} {self._transport.rank_in_group} {number}"
            frames = Frames.of_message(group, operation, Deadline.after(state.timeouts.host), OBJECTS, number, INCOMING)
            written = None if state.records is None else entry(group, operation, peer=src, message=frames.message)
            with written or contextlib.nullcontext():
                message = self._take(frames, self._transport.messages, src, context)
                if message is None:
                    raise nothing_yet(group, operation, state.sequence, src, state.timeouts.host)
            state.counts[key] = number + 1
            state.waited_in_vain = False
        finally:
            state.turns.release(key, turn)
        return self._decode_message(group, operation, src, message, context)

    def broadcast(self, group: Group, operation: str, obj: object, src: Any, timeout: Timeout) -> Any:
        state, transport = self._state, self._transport
        if (
            timeout is None
            and state.comparison is None
            and state.pending.side_streams is None
            and type(src) is int
            and 0 <= src < transport.world_size
            and (not state.pending.lanes or state.pending.is_idle(None))
            and transport.collectives.are_linked(self._others if src == transport.rank_in_group else (src,))
        ):
            return self._broadcast(group, operation, obj, src)
        return super().broadcast(group, operation, obj, src, timeout)

    @spanned
    def _broadcast(self, group: Group, operation: str, obj: object, src: int) -> Any:
        state, turn, net = self._state, Turn(), self._transport.collectives
        try:
            sequence = state.begin(group.name, operation, turn)
            context = f"broadcast {src} {sequence}"
            if src == self._transport.rank_in_group:
                try:
                    parts = self._encode_message(group, operation, obj, context)
                except BaseException:
                    state.uncount_collective()  # the others wait for this call's object, and get that of the next call
                    raise
                tag = make_tag(COLLECTIVE, sequence, f"{operation}(src={src})")
                written = None if state.records is None else entry(group, operation, sequence=sequence, peer=src, moved=_bytes_of(parts))
                with written or contextlib.nullcontext():
                    try:
                        net.send_parts(self._others, tag, rest_of(tag), parts, self._timeout_ns)
                    except BaseException as error:
                        frames = Frames.of_collective(group, operation, Deadline.after(state.timeouts.host), sequence, src)
                        self._end(frames, net, error)
                return obj
            frames = Frames.of_collective(group, operation, Deadline.after(state.timeouts.host), sequence, src)
            written = None if state.records is None else entry(group, operation, sequence=sequence, peer=src)
            with written or contextlib.nullcontext():
                message = self._take(frames, net, src, context)
                if message is None:
                    state.uncount_collective()
                    raise nothing_yet(group, operation, sequence, src, state.timeouts.host)
            state.waited_in_vain = False
        finally:
            state.turns.release(None, turn)
        return self._decode_message(group, operation, src, message, context)

    # Dicts without a deadline of their own, where nothing is pending and there are links: the same frames and messages, with less Python.

    @ambient.sheltered
    def send_plain(self, group: Group, tree: object, dst: Any, timeout: Timeout) -> bool:
        native = self._state.native_messages
        if timeout is not None or native is None or not native.are_alone(dst):
            return False
        self._state.ensure_open(group.name)
        entries, tensors = taken_apart(group, "send_tensor_dict", tree)
        if not all(x.is_cpu and is_dense(x) and x.dtype not in UNSERVED for x in tensors):
            return False
        self._send_dict(group, "send_tensor_dict", entries, tensors, dst)
        return True

    @spanned
    def _send_dict(self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int) -> None:
        state, net, (turn, describing) = self._state, self._transport.messages, (Turn(), Turn())
        lane, descriptions = (dst, True, 0), (dst, True, DICTS)
        try:
            state.begin_message(group.name, operation, lane, turn)
            state.begin_message(group.name, operation, descriptions, describing)
            number = state.counted(descriptions)
            context = f"{STREAMS[DICTS]} {self._transport.rank_in_group} {dst} {number}"
            described = self._description.write(entries, lambda: self._describe(group, operation, entries, tensors))
            parts = self._encode_message(group, operation, described, context)
            state.count(descriptions)
            frames = Frames.of_message(group, operation, Deadline.after(state.timeouts.host), DICTS, number, OUTGOING)
            moved = 0 if state.records is None else _bytes_of(parts) + sum([x.nbytes for x in tensors])
            with entry(group, operation, peer=dst, message=frames.message, moved=moved):
                try:
                    net.send_parts([dst], frames.tag, frames.rest, parts, self._timeout_ns)
                    if messages := self._messages_of(tensors, lane):
                        net.exchange(messages, [], self._timeout_ns)
                except BaseException as error:
                    self._end(frames, net, error)
        finally:
            state.turns.release(descriptions, describing)
            state.turns.release(lane, turn)

    @ambient.sheltered
    def recv_plain(self, group: Group, src: Any, timeout: Timeout) -> dict[Any, Any] | None:
        native = self._state.native_messages
        if timeout is not None or native is None or not native.are_alone(src):
            return None
        return self._receive_dict(group, "recv_tensor_dict", src)

    @spanned
    def _receive_dict(self, group: Group, operation: str, src: int) -> dict[Any, Any]:
        state, net, (turn, describing) = self._state, self._transport.messages, (Turn(), Turn())
        lane, descriptions = (src, False, 0), (src, False, DICTS)
        state.ensure_open(group.name)
        try:
            state.begin_message(group.name, operation, lane, turn)
            state.begin_message(group.name, operation, descriptions, describing)
            number = state.counted(descriptions)
            context = f"{STREAMS[DICTS]} {src} {self._transport.rank_in_group} {number}"
            frames = Frames.of_message(group, operation, Deadline.after(state.timeouts.host), DICTS, number, INCOMING)
            with entry(group, operation, peer=src, message=frames.message):
                message = self._take(frames, net, src, context)
                if message is None:
                    raise nothing_yet(group, operation, state.sequence, src, state.timeouts.host)
                state.waited_in_vain = False
                state.count(descriptions)
                described = self._decode_message(group, operation, src, message, context)
                try:
                    entries = self._description.read(described[1], lambda: self._described(group, operation, src, described))
                except UnreadableDictError as failed:
                    self._receive_tensors(frames, failed.tensors(group.device), src, turn)
                    raise failed.error from failed.error.__cause__
                tensors = result_tensors(entries, group.device, {}, self._new)
                self._receive_tensors(frames, tensors, src, turn)
        finally:
            state.turns.release(descriptions, describing)
            state.turns.release(lane, turn)
        return join_dict(entries, tensors)

    def _new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `new_tensor`, without asking for the strategy: the links fill what is on the host."""
        return pooled(self._transport.pool, shape, dtype) if device.type == "cpu" else ambient.empty(shape, dtype, device)

    def _receive_tensors(self, frames: Frames, tensors: Sequence[torch.Tensor], src: int, turn: Turn) -> None:
        group, net = frames.group, self._transport.messages
        if not all(x.is_cpu and x.dtype not in UNSERVED for x in tensors):
            deadline = Deadline.after(self._state.timeouts.host)
            exchange(group, frames.operation, tensors, src, False, deadline, limited=False, turn=turn)
            return
        try:
            if messages := self._messages_of(tensors, (src, False, 0)):
                net.exchange([], messages, self._timeout_ns)
        except BaseException as error:
            self._end(frames, net, error)
        if (records := self._state.records) is not None:
            records[group.name].add(sum([x.nbytes for x in tensors]))

    def _messages_of(self, tensors: Sequence[torch.Tensor], lane: MessageKey) -> list[tuple[int, int, int, int]]:
        """Number tensors as one message of a lane, and return what the native module needs of those that are not empty."""
        if not tensors:
            return []
        tag = make_tag(MESSAGE, self._state.count(lane), " ".join([message_text(x.dtype, x.shape) for x in tensors]))
        return [(lane[0], tag, x.data_ptr(), x.nbytes) for x in tensors if x.numel()]

    def _take(self, frames: Frames, net: Any, src: int, context: str) -> Parts | None:
        """Return the next message from `src`, None if none began to arrive in time."""
        sealed, beside = None, ()
        try:
            head = net.take(src, frames.tag, self._timeout_ns, self._timeout_ns)
        except BaseException as error:
            self._end(frames, net, error)
        if head is None:
            return None
        if self._signing is not None:
            sealed = self._opened(frames.group, frames.operation, src, head, context)
            try:
                beside = net.take_all(src, frames.rest, sealed.lengths, self._timeout_ns) if sealed.lengths else ()
            except BaseException as error:
                self._end(frames, net, error)
        message = head, sealed, beside
        if (records := self._state.records) is not None:
            records[frames.group.name].add(bytes_of_parts(message))
        return message

    def _end(self, frames: Frames, net: Any, error: BaseException) -> NoReturn:
        """Raise the public error for that of a native call."""
        try:
            frames.perform(functools.partial(self._transport.fail, net, error))
            raise AssertionError("TcpTransport.fail has not raised")
        finally:
            del error  # whose traceback holds this frame

    def _opened(self, group: Group, operation: str, src: int, head: Any, context: str) -> Sealed:
        assert self._signing is not None
        try:
            return open_sealed(head, self._signing, f"{self._uid} {context}".encode())
        except wire.WireError as error:
            raise unreadable(group, operation, src, error) from error

    # Every other message.

    def _encode_message(self, group: Group, operation: str, obj: object, context: str) -> tuple[Any, ...]:
        signing = self._signing
        if signing is None:
            return (self._encode(group, operation, obj, context),)
        try:
            return seal(obj, self._pickler, signing, f"{self._uid} {context}".encode())
        except (ConcurrentCallError, ContextClosedError):
            raise
        except ValueError as error:
            raise explain(BadArgument(str(error)), group, operation, self._state.sequence) from error
        except Exception as error:
            raise refuse_object(group, operation, obj, error) from error

    def _decode_message(self, group: Group, operation: str, src: int, message: Parts, context: str) -> Any:
        head, sealed, beside = message
        if sealed is None:
            return self._decode(group, operation, src, memoryview(head), context)
        try:
            return sealed.load(beside)
        except Exception as error:
            raise unreadable(group, operation, src, error) from error

    def _send_frames(self, frames: Frames, to: Mapping[int, Any]) -> None:
        by_message: dict[int, list[int]] = {}
        for peer, parts in to.items():
            by_message.setdefault(id(parts), []).append(peer)

        def act() -> None:
            for peers in by_message.values():
                self._transport.send_parts(to[peers[0]], peers, frames.tag, frames.rest, frames.deadline)

        frames.perform(act, sum(_bytes_of(to[peers[0]]) for peers in by_message.values()), peer=next(iter(to)))

    def _await(self, frames: Frames, src: int, context: str) -> Any:
        transport, patience, tag, deadline = self._transport, self._state.timeouts.host, frames.tag, frames.deadline

        def act() -> Parts | None:
            try:
                transport.net_for(tag, (src,), deadline)
            except PeerLate:
                return None  # there is no link as yet
            head = transport.take(src, tag, deadline, deadline.at_least(patience))
            if head is None:
                return None
            if self._signing is None:
                return head, None, ()
            sealed = self._opened(frames.group, frames.operation, src, head, context)
            # The sender has begun: from here on a timeout is a failure of the group, and not only of this receive.
            beside = transport.take_all(src, tag, frames.rest, sealed.lengths, deadline.at_least(patience)) if sealed.lengths else ()
            return head, sealed, beside

        return frames.perform(act, peer=src, is_made=has_come, received=bytes_of_parts)


class _Description:
    """The last description that was written, and that was read: of a dict with the same keys and tensors it is the same bytes.

    Those name neither a message nor its number, which the frame around them does. Not of dicts with objects or with keys that are no
    strings, of which different ones may be equal.
    """

    def __init__(self) -> None:
        self._written: tuple[Sequence[Entry], Any] = ((), None)
        self._read: tuple[bytes, list[Entry]] = (b"", [])

    def write(self, entries: Sequence[Entry], describe: Callable[[], Any]) -> Any:
        """Return what `describe` returns of these entries."""
        if not _is_repeatable(entries):
            return describe()
        earlier, made = self._written
        if made is None or earlier != entries:
            made = describe()
            self._written = entries, made
        return made

    def read(self, frame: bytes, understand: Callable[[], list[Entry]]) -> list[Entry]:
        """Return the entries that `understand` finds in a frame; they are not to be changed."""
        earlier, entries = self._read
        if frame != earlier:
            entries = understand()
            if _is_repeatable(entries):
                self._read = bytes(frame), entries
        return entries


def _is_repeatable(entries: Sequence[Entry]) -> bool:
    return all(what[0] != "o" and all(type(key) is str for key in path) for path, what in entries)


def bytes_of_parts(received: Parts | None) -> int:
    """Return the bytes of what `_await` returned."""
    return 0 if received is None else _bytes_of((received[0], *received[2]))


def _bytes_of(parts: Sequence[Any]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
