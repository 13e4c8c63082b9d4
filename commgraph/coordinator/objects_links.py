"""Objects between ranks that have TCP links: frames of any size, whose large parts travel beside what is signed.

A message is a first frame, which says what follows, and a frame for each large part (`commgraph.shm.sealed_pickle`); without a key it is
one frame, of plain data (`commgraph.wire`). The caller's thread sends and receives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from commgraph import wire
from commgraph.communicators.base import PeerLate
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.objects import NetworkObjects, refuse_object, unreadable
from commgraph.coordinator.operation import Group, explain, perform
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Deadline
from commgraph.errors import ConcurrentCallError, ContextClosedError
from commgraph.shm.pickling import Pickler
from commgraph.shm.sealed_pickle import open_sealed, seal

__all__ = ["LinkObjects"]


class LinkObjects(NetworkObjects):
    """Objects of a group whose ranks have TCP links."""

    def __init__(self, state: GroupState, transport: TcpTransport) -> None:
        super().__init__(state)
        self._pickler = Pickler()
        self._transport = transport
        self._uid = state.members.uid

    def _encode_message(self, group: Group, operation: str, obj: object, context: str) -> tuple[Any, ...]:
        key = self._key
        if key is None:
            return (self._encode(group, operation, obj, context),)
        try:
            return seal(obj, self._pickler, key, f"{self._uid} {context}".encode())
        except (ConcurrentCallError, ContextClosedError):
            raise
        except ValueError as error:
            raise explain(BadArgument(str(error)), group, operation, self._state.sequence) from error
        except Exception as error:
            raise refuse_object(group, operation, obj, error) from error

    def _decode_message(self, group: Group, operation: str, src: int, message: Any, context: str) -> Any:
        if self._key is None:
            return self._decode(group, operation, src, memoryview(message), context)
        sealed, beside = message
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
    ) -> None:
        by_message: dict[int, list[int]] = {}
        for peer, parts in frames.items():
            by_message.setdefault(id(parts), []).append(peer)

        def act() -> None:
            for peers in by_message.values():
                self._transport.send_parts(frames[peers[0]], peers, tag, rest, deadline)

        self._perform(group, operation, sequence, deadline, act)

    def _await(
        self, group: Group, operation: str, src: int, tag: int, rest: int, deadline: Deadline, context: str, sequence: int | None = None
    ) -> Any:
        key, transport, patience = self._key, self._transport, self._state.timeouts.host

        def act() -> Any:
            try:
                transport.net_for(tag, (src,), deadline)
            except PeerLate:
                return None  # there is no link as yet
            head = transport.take(src, tag, deadline, deadline.at_least(patience))
            if key is None or head is None:
                return head
            try:
                sealed = open_sealed(head, key, f"{self._uid} {context}".encode())
            except wire.WireError as error:
                raise unreadable(group, operation, src, error) from error
            # The sender has begun: from here on a timeout is a failure of the group, and not only of this receive.
            beside = transport.take_all(src, tag, rest, sealed.lengths, deadline.at_least(patience)) if sealed.lengths else ()
            return sealed, beside

        return self._perform(group, operation, sequence, deadline, act)

    def _perform(self, group: Group, operation: str, sequence: int | None, deadline: Deadline, act: Callable[[], Any]) -> Any:
        return perform(group, operation, self._state.sequence if sequence is None else sequence, f"{operation}(...)", deadline, act)
