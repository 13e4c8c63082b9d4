"""Fast path of messages: native calls for plain tensors, through rings between ranks of one host, over links between hosts.

A native call refuses an argument that is not plain before anything is sent; the general path serves it then. Both paths count and tag
alike, so that sender and receiver of a message may take different ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from commgraph import compat
from commgraph.communicators.base import Communicator, PeerLate
from commgraph.communicators.shm_fast import tensors_of
from commgraph.communicators.tags import message_text, tagged_text
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.coordinator.asynchronous import submit
from commgraph.coordinator.failures import Call
from commgraph.coordinator.messages import BUFFERED, message_digest
from commgraph.coordinator.operation import Group, deadline_of, interrupted_by
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Timeout
from commgraph.shm import native_module
from commgraph.shm.kinds import KINDS
from commgraph.shm.mailbox import Mailbox, tensors_with
from commgraph.shm.stopped import Busy

__all__ = ["NativeMessages"]


class NativeMessages:
    """The native messages of one group."""

    def __init__(self, native: Any, state: GroupState, strategy: Communicator) -> None:
        """Open the native calls.

        Args:
            native: the native module.
            state: of the group.
            strategy: that serves its messages.
        """
        self._state = state
        self._fast = strategy.rings
        self._tagged = strategy.tagged
        self._links: TcpTransport | None = strategy.links
        self._posted = strategy.posted
        mailbox: Mailbox | None = None if strategy.rings is None else strategy.rings.mailbox
        self._mailbox = mailbox
        self._rings_out = {} if mailbox is None else mailbox.outgoing
        self._rings_in = {} if mailbox is None else mailbox.incoming
        timeout_ns = int(state.timeouts.host * 1e9)
        self._calls = native.Messages(tensors_of(native), message_digest, timeout_ns, state.counts, state.turns.claims)
        if mailbox is not None:
            mailbox.native = self._calls

    @classmethod
    def open(cls, state: GroupState) -> NativeMessages | None:
        """Return the native messages of a group; None where calls are compared with those of the peers, or another strategy serves them."""
        strategy = state.strategies.for_messages()
        if strategy is None or state.comparison is not None or compat.dlpack_exchange() is None:
            return None
        if strategy.rings is None and strategy.links is None:
            return None
        return cls(native_module.load(), state, strategy)

    def send(self, group: Group, x: Any, dst: Any, tag: int, timeout: Timeout) -> bool:
        """Send x natively if it and the arguments are plain; whether it was sent."""
        state = self._state
        ring = self._rings_out.get(dst) if type(dst) is int else None
        if tag and not self._tagged:
            return False
        if ring is None and not self._is_linked(dst):
            return False
        state.ensure_open(group.name)
        if state.pending.lanes and not state.pending.is_free(dst, True):
            return False
        if ring is None:
            return self._send_linked(group, x, dst, tag, timeout)
        assert self._mailbox is not None
        access = self._mailbox.writing[dst]
        if not access.try_take():
            return False  # another call uses the ring: the general path waits for it, or refuses
        try:
            record = None if state.records is None else state.records[group.name]
            return self._calls.send(ring, x, (dst, True, tag), timeout, record) is True
        except BaseException as error:
            self._end(group, "send", x.dtype, x.shape, dst, tag, timeout, error, self._fast)
        finally:
            access.give_back()

    def recv(self, group: Group, size: Any, dtype: Any, src: Any, tag: int, out: Any, timeout: Timeout) -> torch.Tensor | None:
        """Receive a message natively if the arguments are plain; return the tensor, or None with nothing read."""
        state = self._state
        kind = KINDS.get(dtype) if type(dtype) is torch.dtype else None
        ring = self._rings_in.get(src) if type(src) is int else None
        if (
            kind is None
            or (tag and not self._tagged)
            or (ring is None and not self._is_linked(src))
            or (out is None and group.device.type != "cpu")
        ):
            return None
        state.ensure_open(group.name)
        if state.pending.lanes and not state.pending.is_free(src, False):
            return None
        if ring is None:
            return self._recv_linked(group, size, dtype, kind, src, tag, out, timeout)
        assert self._mailbox is not None
        inbox = self._mailbox.inboxes[src]
        if not inbox.access.try_take():
            return None  # another call uses the ring: the general path waits for it, or refuses
        try:
            if inbox.has(tensors_with(tag)):
                return None
            record = None if state.records is None else state.records[group.name]
            # None: another kind of message is asked for, or is next in the ring. The general path handles it.
            received: torch.Tensor | None = self._calls.recv(ring, size, kind, out, (src, False, tag), timeout, record)
            return received
        except BaseException as error:
            self._end(group, "recv", dtype, (size,) if type(size) is int else size, src, tag, timeout, error, self._fast)
        finally:
            inbox.pass_turn()

    # Over links.

    def are_alone(self, peer: Any) -> bool:
        """Whether messages with that rank go over a link that there is, and none is pending, with that rank or another."""
        return not self._state.pending.lanes and not self._posted and self._is_linked(peer)

    def _is_linked(self, peer: Any) -> bool:
        """Whether messages with that rank go over a link that there is."""
        links = self._links
        return (
            links is not None
            and type(peer) is int
            and 0 <= peer < links.world_size
            and peer != links.rank_in_group
            and peer not in self._rings_out
            and links.messages.is_linked(peer)
        )

    def _send_linked(self, group: Group, x: Any, dst: Any, tag: int, timeout: Timeout) -> bool:
        links = self._links
        assert links is not None
        if tag and type(x) is torch.Tensor and x.nbytes <= BUFFERED:
            # As through a ring: the receiver may ask for messages of several tags in another order than that in which they are sent.
            return self._offer(group, "send", x, dst, tag, timeout)
        records = self._state.records
        try:
            record = None if records is None else records[group.name]
            return self._calls.send_linked(links.messages, x, dst, (dst, True, tag), timeout, record) is True
        except BaseException as error:
            self._end(group, "send", x.dtype, x.shape, dst, tag, timeout, error, links)

    def _recv_linked(
        self, group: Group, size: Any, dtype: torch.dtype, kind: int, src: Any, tag: int, out: Any, timeout: Timeout
    ) -> torch.Tensor | None:
        links = self._links
        assert links is not None
        if self._posted:
            return None  # of receives from any rank, which the general path takes up
        records, lane = self._state.records, (src, False, tag)
        try:
            record = None if records is None else records[group.name]
            received: torch.Tensor | None = self._calls.recv_linked(links.messages, size, kind, out, src, lane, timeout, record)
            return received
        except BaseException as error:
            self._end(group, "recv", dtype, (size,) if type(size) is int else size, src, tag, timeout, error, links)

    def swap(
        self, group: Group, x: Any, dst: Any, size: Any, dtype: Any, src: Any, device: Any, out: Any, timeout: Timeout
    ) -> torch.Tensor | None:
        """Send x to one rank and receive a message from another one or the same, both over links; None, with nothing sent, elsewhere."""
        state, links = self._state, self._links
        kind = KINDS.get(dtype) if type(dtype) is torch.dtype else None
        if links is None or kind is None or device is not None or (out is None and group.device.type != "cpu"):
            return None
        if not (self._is_linked(dst) and self._is_linked(src)):
            return None
        state.ensure_open(group.name)
        if state.pending.lanes and not (state.pending.is_free(dst, True) and state.pending.is_free(src, False)):
            return None
        if self._posted:
            return None  # of receives from any rank, which the general path takes up
        there, here = (dst, True, 0), (src, False, 0)
        try:
            record = None if state.records is None else state.records[group.name]
            received: torch.Tensor | None
            received = self._calls.swap_linked(links.messages, x, dst, size, kind, out, src, there, here, timeout, record)
        except BaseException as error:
            self._end(group, "sendrecv", dtype, (size,) if type(size) is int else size, src, 0, timeout, error, links)
        return received

    def offer(self, group: Group, operation: str, x: torch.Tensor, dst: int, tag: int) -> bool:
        """Send x over a link without a wait for its receiver, if it is small; whether it was sent."""
        if x.nbytes > BUFFERED or not self._is_linked(dst):
            return False
        return self._offer(group, operation, x, dst, tag, None)

    def _offer(self, group: Group, operation: str, x: torch.Tensor, dst: int, tag: int, timeout: Timeout) -> bool:
        links, state = self._links, self._state
        assert links is not None
        deadline = deadline_of(group, operation, timeout)
        try:
            record = None if state.records is None else state.records[group.name]
            sent = self._calls.offer_linked(links.messages, x, dst, (dst, True, tag), operation, record)
        except BaseException as error:
            self._end(group, operation, x.dtype, x.shape, dst, tag, timeout, error, links)
        if sent is not None and sent is not True:
            # The socket took a part of it. A thread sends the rest, of a copy.
            dtype, shape = x.dtype, x.shape
            submit(group, (dst, True, tag), lambda: self._send_rest(group, operation, sent, dtype, shape, dst, tag, deadline.seconds))
        return sent is not None

    def _send_rest(
        self, group: Group, operation: str, rest: Any, dtype: torch.dtype, shape: Any, dst: int, tag: int, seconds: float
    ) -> None:
        links = self._links
        assert links is not None
        try:
            if links.messages.first_of([rest], int(seconds * 1e9)) < 0:
                raise PeerLate(dst)
        except BaseException as error:
            self._end(group, operation, dtype, shape, dst, tag, seconds, error, links)

    def _end(
        self,
        group: Group,
        operation: str,
        dtype: torch.dtype,
        shape: Any,
        peer: int,
        tag: int,
        timeout: Timeout,
        error: BaseException,
        way: Any,
    ) -> NoReturn:
        """Raise as the general path does: the error of the group, which is broken by a message half sent. `way` translates the error."""
        state = self._state
        try:
            if isinstance(error, Busy):
                raise state.refused(group.name, operation, (peer, operation == "send", tag)) from None
            call = Call(group.name, operation, state.members, state.sequence)
            what = f"{operation}({tagged_text(message_text(dtype, shape), tag)}, {peer})"
            translated = error if isinstance(error, PeerLate) else way.translate(error)
            if translated is None:
                state.failures.break_off(call, interrupted_by(error, what))  # the peer must not wait for the rest
                raise error
            seconds = deadline_of(group, operation, timeout).seconds
            state.failures.end(call, what, seconds, translated)
        finally:
            del error  # whose traceback holds this frame
