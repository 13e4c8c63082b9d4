"""Objects between the ranks of a group over several hosts: those of one host in the memory that they share, the others over links.

A broadcast goes over a link to one rank of each other host, its *relay*, and from there to the other ranks of that host in shared memory,
as it was sent: every rank checks the signature itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from commgraph.communicators.base import CallsDiffer
from commgraph.communicators.hierarchical import HierarchicalCommunicator
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.coordinator.frames import Frames
from commgraph.coordinator.objects import NetworkObjects, Objects, checked_peer, has_come, nothing_yet
from commgraph.coordinator.objects_links import LinkObjects, Parts, bytes_of_parts
from commgraph.coordinator.objects_shm import ShmObjects
from commgraph.coordinator.operation import Group, collective, perform
from commgraph.coordinator.recorded import recorded
from commgraph.coordinator.state import GroupState
from commgraph.coordinator.tensor_dict import Entry
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import ContextClosedError
from commgraph.shm.mailbox import OBJECT, PIECES, Mailbox
from commgraph.shm.stopped import TIMEOUT, Stopped

__all__ = ["HostObjects", "objects_of"]

# Set in what peers read of a call of objects: apart from the operations of the native module (native/module.h).
_POSTED: Final = 128

# Seconds between two looks whether the readers of a broadcast live.
_LOOK_EVERY: Final = 0.1


def objects_of(state: GroupState) -> Objects:
    """Return the implementation of `Objects` for a group."""
    strategy, fast, mailbox = state.detecting, state.detects, state.mailbox
    if strategy is not None and fast is not None and mailbox is not None:
        return ShmObjects(state, strategy, fast, mailbox)
    transport = None if state.network is None else state.network.transport
    if not isinstance(transport, TcpTransport):
        return NetworkObjects(state)
    over = state.strategies.for_messages()
    # With `check` each call is compared by a message that a rank of this host would have to wait for, too.
    if not isinstance(over, HierarchicalCommunicator) or state.comparison is not None:
        return LinkObjects(state, transport)
    return HostObjects(state, transport, over)


class HostObjects(LinkObjects):
    """Objects of a group of which several ranks are on one host."""

    def __init__(self, state: GroupState, transport: TcpTransport, over: HierarchicalCommunicator) -> None:
        """From its two ways.

        Args:
            state: of the group.
            transport: has the links.
            over: serves the messages of the group.
        """
        super().__init__(state, transport)
        self._hosts = over.hosts
        self._here = next(ranks for ranks in over.hosts if state.members.rank_in_group in ranks)
        # Of the ranks of this host; None where there is no other one.
        self._rings = over.rings
        # When to look next whether the readers of this host live: a writer that never waits would not notice.
        self._look_at = 0.0
        self._near = None if over.rings is None else ShmObjects(state, over, over.rings, over.rings.mailbox)

    def _near_to(self, peer: Any) -> ShmObjects | None:
        """Return what serves messages with another rank of this host; None for any other rank."""
        return self._near if type(peer) is int and peer in self._here and peer != self._transport.rank_in_group else None

    # To one rank.

    def send(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> None:
        if (near := self._near_to(dst)) is not None:
            near.send(group, operation, obj, dst, timeout)
        else:
            super().send(group, operation, obj, dst, timeout)

    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        near = self._near_to(src)
        return super().recv(group, operation, src, timeout) if near is None else near.recv(group, operation, src, timeout)

    def pack(self, group: Group, operation: str, obj: object, dst: int) -> Callable[[Deadline], None] | None:
        near = self._near_to(dst)
        return super().pack(group, operation, obj, dst) if near is None else near.pack(group, operation, obj, dst)

    def sends_in_parts(self, peer: int) -> bool:
        return self._near_to(peer) is None

    def send_plain(self, group: Group, tree: object, dst: Any, timeout: Timeout) -> bool:
        near = self._near_to(dst)
        return super().send_plain(group, tree, dst, timeout) if near is None else near.send_plain(group, tree, dst, timeout)

    def recv_plain(self, group: Group, src: Any, timeout: Timeout) -> dict[Any, Any] | None:
        near = self._near_to(src)
        return super().recv_plain(group, src, timeout) if near is None else near.recv_plain(group, src, timeout)

    def pack_dict(
        self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[Deadline], None]]:
        near = self._near_to(dst)
        return (
            super().pack_dict(group, operation, entries, tensors, dst)
            if near is None
            else near.pack_dict(group, operation, entries, tensors, dst)
        )

    def recv_dict(self, group: Group, operation: str, src: int, deadline: Deadline) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        near = self._near_to(src)
        return super().recv_dict(group, operation, src, deadline) if near is None else near.recv_dict(group, operation, src, deadline)

    # To all.

    def _relay(self, src: int, host: Sequence[int]) -> int:
        """Return the rank of a host that has a broadcast of `src` first; on the host of `src` that is `src` itself."""
        position = next(ranks.index(src) for ranks in self._hosts if src in ranks)
        return host[position % len(host)]

    @recorded
    def broadcast(self, group: Group, operation: str, obj: object, src: Any, timeout: Timeout) -> Any:
        with collective(group, operation, timeout) as (sequence, deadline):
            src = checked_peer(group, operation, src, "src", sequence)
            context, relay = f"broadcast {src} {sequence}", self._relay(src, self._here)
            frames = Frames.of_collective(group, operation, deadline, sequence, src)
            parts: list[tuple[Any, ...]] = []

            def make() -> Mapping[int, Any]:
                parts.append(self._encode_message(group, operation, obj, context))
                return {self._relay(src, host): parts[0] for host in self._hosts if src not in host}

            if self._give(frames, src, make):
                self._put_here(frames, deadline, parts[0])
                return obj
            if relay == group.rank_in_group:
                message = self._get(frames, src, context)
                head, _, beside = message
                self._put_here(frames, self._relaying(deadline), (head, *beside))
            else:
                message = self._get_here(frames, src, relay, context)
        return self._decode_message(group, operation, src, message, context)

    def _relaying(self, deadline: Deadline) -> Deadline:
        """Return the deadline for passing on what came by another one: as long, but a poll may not end halfway."""
        return Deadline.after(deadline.seconds if deadline.seconds >= 1.0 else self._state.timeouts.host)

    def _put_here(self, frames: Frames, deadline: Deadline, parts: tuple[Any, ...]) -> None:
        """Put the parts of a broadcast for all ranks of this host, by a deadline of its own."""
        if len(self._here) == 1:
            return
        posted = self._post(frames)

        def act() -> None:
            try:
                mailbox = self._mailbox(frames.group)
                self._look_at_readers(mailbox)
                mailbox.broadcast(OBJECT, frames.tag, parts, deadline.left_ns(), posted)
            except Stopped as stopped:
                raise self._translated(stopped) from None
            except BaseException:
                self._transport.abort()  # other hosts have it, and this one perhaps a part
                raise

        perform(frames.group, frames.operation, frames.sequence, frames.what, deadline, act, 0)

    def _look_at_readers(self, mailbox: Mailbox) -> None:
        """Raise where a rank of this host has died or left, at times."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            lost = mailbox.team.lost()
            if lost is not None:
                raise Stopped(*lost)

    def _get_here(self, frames: Frames, src: int, relay: int, context: str) -> Parts:
        """Return the parts of a broadcast that a rank of this host puts for all."""
        group, operation, deadline, state = frames.group, frames.operation, frames.deadline, self._state
        posted = self._post(frames)

        def act() -> Parts | None:
            kept = True
            try:
                kind, number, parts = self._mailbox(group).receive_broadcast(relay, deadline.left_ns(), posted)
                kept = False
            except Stopped as stopped:
                if stopped.code == TIMEOUT:
                    return None
                kept = False
                raise self._translated(stopped) from None
            finally:
                if kept:  # it may be asked for again
                    self._unpost()
                    state.uncount_collective()
            if kind != OBJECT or number != frames.tag:
                raise CallsDiffer(relay)
            return self._parts(group, operation, src, parts, context)

        received = frames.perform(act, is_made=has_come, received=bytes_of_parts)
        if received is None:
            raise nothing_yet(group, operation, frames.sequence, relay, deadline.seconds)
        state.waited_in_vain = False
        return received

    def _post(self, frames: Frames) -> int:
        """Count a call of this host's ranks, as if it were a group of its own; return what peers read while this rank waits."""
        assert self._rings is not None
        counter = self._rings.counter
        counter.sequence += 1
        return int(counter.sequence) << 8 | _POSTED | (frames.tag & _POSTED - 1)

    def _unpost(self) -> None:
        """Take back the count of a call that may be made again."""
        assert self._rings is not None
        self._rings.counter.sequence -= 1
        if (mailbox := self._rings.mailbox) is not None:
            mailbox.team.unpost()

    def _parts(self, group: Group, operation: str, src: int, parts: Sequence[Any], context: str) -> Parts:
        sealed = None if self._signing is None else self._opened(group, operation, src, parts[0], context)
        return parts[0], sealed, parts[1:]

    # To each its own: `scatter`.

    def _send_frames(self, frames: Frames, to: Mapping[int, Any]) -> None:
        far = {peer: parts for peer, parts in to.items() if self._near_to(peer) is None}
        if far:
            super()._send_frames(frames, far)

        def act() -> None:
            try:
                for peer in to.keys() - far.keys():
                    self._mailbox(frames.group).send(peer, PIECES, frames.tag, to[peer], frames.deadline.left_ns())
            except Stopped as stopped:
                raise self._translated(stopped) from None
            except BaseException:
                self._transport.abort()
                raise

        if len(far) < len(to):
            frames.perform(act, 0)

    def _await(self, frames: Frames, src: int, context: str) -> Any:
        if self._near_to(src) is None:
            return super()._await(frames, src, context)

        def act() -> Parts | None:
            try:
                found, parts = self._mailbox(frames.group).receive(src, PIECES, frames.deadline.left_ns())
            except Stopped as stopped:
                if stopped.code == TIMEOUT:
                    return None
                raise self._translated(stopped) from None
            if found != frames.tag:
                raise CallsDiffer(src)
            return self._parts(frames.group, frames.operation, src, parts, context)

        return frames.perform(act, is_made=has_come, received=bytes_of_parts)

    # The memory of this host.

    def _mailbox(self, group: Group) -> Mailbox:
        mailbox: Mailbox | None = None if self._rings is None else self._rings.mailbox
        if mailbox is None:
            raise ContextClosedError(f"group {group.name!r} (rank {group.rank}): its context was closed during the call")
        return mailbox

    def _translated(self, stopped: Stopped) -> BaseException:
        return (None if self._rings is None else self._rings.translate(stopped)) or stopped

    def join(self, timeout: float) -> None:
        if self._near is not None:
            self._near.join(timeout)
        super().join(timeout)
