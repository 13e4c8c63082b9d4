"""Objects between ranks that have TCP links: frames of any size, whose large parts travel beside what is signed.

A message is a first frame, which says what follows, and a frame for each large part (`commgraph.shm.sealed_pickle`); without a key it is
one frame, of plain data (`commgraph.wire`). The caller's thread sends and receives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from commgraph import wire
from commgraph.communicators.base import PeerLate
from commgraph.communicators.tags import OBJECT, OBJECT_REST, make_tag
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.objects import NetworkObjects, has_come, nothing_yet, refuse_object, unreadable
from commgraph.coordinator.operation import Group, explain, perform
from commgraph.coordinator.pending import OBJECTS
from commgraph.coordinator.recorded import Message
from commgraph.coordinator.spans import spanned
from commgraph.coordinator.state import GroupState
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import ConcurrentCallError, ContextClosedError
from commgraph.shm.pickling import Pickler
from commgraph.shm.sealed_pickle import Sealed, key_of, open_sealed, seal

__all__ = ["LinkObjects", "Parts", "bytes_of_parts"]

T = TypeVar("T")

# A message that came: its first frame, what that says if it is signed, and the frames that followed it.
Parts = tuple[Any, Sealed | None, Sequence[Any]]

# From the tag of a first frame to that of those that follow it.
_REST: Final = (OBJECT_REST - OBJECT) << 28


class LinkObjects(NetworkObjects):
    """Objects of a group whose ranks have TCP links."""

    def __init__(self, state: GroupState, transport: TcpTransport) -> None:
        super().__init__(state)
        self._pickler = Pickler()
        self._transport = transport
        self._uid = state.members.uid
        self._timeout_ns = int(state.timeouts.host * 1e9)
        self._signing = None if self._key is None else key_of(self._key)

    # Messages of a call without a deadline of its own, where nothing is pending and there is a link: with less Python.

    def _is_plain(self, peer: Any, outgoing: bool, timeout: Timeout) -> bool:
        state, net = self._state, self._transport.messages
        return (
            timeout is None
            and state.recorder is None
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
        state, key, turn = self._state, (dst, True, OBJECTS), Turn()
        state.ensure_open(group.name)
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counts.get(key, 0)
            parts = self._encode_message(group, operation, obj, f"message {self._transport.rank_in_group} {dst} {number}")
            state.counts[key] = number + 1
        finally:
            state.turns.release(key, turn)
        tag = make_tag(OBJECT, number, "message")
        self._native(group, operation, self._transport.messages.send_parts, [dst], tag, tag + _REST, parts, self._timeout_ns)

    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        return (self._receive if self._is_plain(src, False, timeout) else super().recv)(group, operation, src, timeout)

    @spanned
    def _receive(self, group: Group, operation: str, src: int, _: Timeout) -> Any:
        state, key, turn, net, signing = self._state, (src, False, OBJECTS), Turn(), self._transport.messages, self._signing
        state.ensure_open(group.name)
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counts.get(key, 0)
            context = f"message {src} {self._transport.rank_in_group} {number}"
            tag, seconds = make_tag(OBJECT, number, "message"), self._timeout_ns
            message = self._native(group, operation, net.take, src, tag, seconds, seconds)
            if message is None:
                raise nothing_yet(group, operation, state.sequence, src, state.timeouts.host)
            sealed, beside = None, ()
            if signing is not None:
                sealed = self._opened(group, operation, src, message, context)
                lengths = sealed.lengths
                beside = self._native(group, operation, net.take_all, src, tag + _REST, lengths, seconds) if lengths else ()
            state.counts[key] = number + 1
            state.waited_in_vain = False
        finally:
            state.turns.release(key, turn)
        return self._decode_message(group, operation, src, (message, sealed, beside), context)

    def _native(self, group: Group, operation: str, call: Callable[..., T], *args: Any) -> T:
        """Call the links; raise the public error where that fails."""
        try:
            return call(*args)
        except BaseException as error:
            fail = functools.partial(self._transport.fail, self._transport.messages, error)
        deadline = Deadline.after(self._state.timeouts.host)
        return perform(group, operation, self._state.sequence, f"{operation}(...)", deadline, fail)

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

    def _send_frames(
        self,
        group: Group,
        operation: str,
        frames: Mapping[int, Any],
        tag: int,
        rest: int,
        deadline: Deadline,
        sequence: int | None = None,
        message: Message | None = None,
    ) -> None:
        by_message: dict[int, list[int]] = {}
        for peer, parts in frames.items():
            by_message.setdefault(id(parts), []).append(peer)

        def act() -> None:
            for peers in by_message.values():
                self._transport.send_parts(frames[peers[0]], peers, tag, rest, deadline)

        peer, size = -1 if message is None else next(iter(frames)), sum(_bytes_of(frames[peers[0]]) for peers in by_message.values())
        number = self._state.sequence if sequence is None else sequence
        perform(group, operation, number, f"{operation}(...)", deadline, act, size, peer=peer, message=message)

    def _await(
        self,
        group: Group,
        operation: str,
        src: int,
        tag: int,
        rest: int,
        deadline: Deadline,
        context: str,
        sequence: int | None = None,
        message: Message | None = None,
    ) -> Any:
        transport, patience = self._transport, self._state.timeouts.host

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
            sealed = self._opened(group, operation, src, head, context)
            # The sender has begun: from here on a timeout is a failure of the group, and not only of this receive.
            beside = transport.take_all(src, tag, rest, sealed.lengths, deadline.at_least(patience)) if sealed.lengths else ()
            return head, sealed, beside

        number, peer = self._state.sequence if sequence is None else sequence, -1 if message is None else src
        what = f"{operation}(...)"
        return perform(group, operation, number, what, deadline, act, peer=peer, message=message, is_made=has_come, received=bytes_of_parts)


def bytes_of_parts(received: Parts | None) -> int:
    """Return the bytes of what `_await` returned."""
    return 0 if received is None else _bytes_of((received[0], *received[2]))


def _bytes_of(parts: tuple[Any, ...]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
