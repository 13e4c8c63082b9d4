"""Fast path of messages between the ranks of one host: native calls for plain tensors.

A native call refuses an argument that is not plain before anything is sent; the general path serves it then. Both paths count and tag
alike, so that sender and receiver of a message may take different ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from commgraph.communicators.base import FastPath
from commgraph.communicators.shm_fast import tensors_of
from commgraph.communicators.tags import message_text
from commgraph.coordinator.failures import Call
from commgraph.coordinator.messages import message_digest
from commgraph.coordinator.operation import Group, deadline_of, interrupted_by
from commgraph.coordinator.pending import ANY_RANK
from commgraph.coordinator.recorded import TENSORS
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Timeout
from commgraph.shm.kinds import KINDS
from commgraph.shm.mailbox import TENSORS as RECORDS
from commgraph.shm.mailbox import Mailbox
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.shm.stopped import Busy

__all__ = ["NativeMessages"]


class NativeMessages:
    """The native messages of one group."""

    def __init__(self, state: GroupState, fast: FastPath, mailbox: Mailbox) -> None:
        self._state = state
        self._fast = fast
        self._mailbox = mailbox
        self._calls = mailbox.open_native(
            tensors_of, message_digest, int(state.timeouts.host * 1e9), state.counts, state.turns.claims, (ANY_RANK, False, 0)
        )

    def send(self, group: Group, x: Any, dst: Any, timeout: Timeout) -> bool:
        """Send x natively if it and the arguments are plain; whether it was sent."""
        state = self._state
        ring = self._mailbox.outgoing.get(dst) if type(dst) is int else None
        if ring is None:
            return False
        state.ensure_open(group.name)
        if state.pending.lanes and not state.pending.is_free(dst, True):
            return False
        access = self._mailbox.writing[dst]
        if not access.try_take():
            return False  # another call uses the ring: the general path waits for it, or refuses
        recorder, token, message = state.recorder, None, (TENSORS, OUTGOING, 0)
        try:
            if recorder is not None:
                token = recorder.begin(group.name, "send", 0, x, strategy="shm", peer=dst, message=message)
            sent = bool(self._calls.send(ring, x, (dst, True, 0), timeout))
            if recorder is not None and token is not None:
                if sent:
                    recorder.end(token)
                else:
                    recorder.cancel(token)
            return sent
        except BaseException as error:
            if recorder is not None and token is not None:
                recorder.end(token, failed=True)
            self._end(group, "send", message_text(x.dtype, x.shape), dst, timeout, error)
        finally:
            access.give_back()

    def recv(self, group: Group, size: Any, dtype: Any, src: Any, out: Any, timeout: Timeout) -> torch.Tensor | None:
        """Receive a message natively if the arguments are plain; return the tensor, or None with nothing read."""
        state = self._state
        kind = KINDS.get(dtype) if type(dtype) is torch.dtype else None
        ring = self._mailbox.incoming.get(src) if type(src) is int else None
        if kind is None or ring is None or (out is None and group.device.type != "cpu"):
            return None
        state.ensure_open(group.name)
        if state.pending.lanes and not state.pending.is_free(src, False):
            return None
        inbox = self._mailbox.inboxes[src]
        if not inbox.access.try_take():
            return None  # another call uses the ring: the general path waits for it, or refuses
        recorder, token, message = state.recorder, None, (TENSORS, INCOMING, 0)
        try:
            if inbox.has(RECORDS):
                return None
            if recorder is not None:
                token = recorder.begin(group.name, "recv", 0, None, strategy="shm", peer=src, message=message)
            # None: another kind of message is asked for, or is next in the ring. The general path handles it.
            received: torch.Tensor | None = self._calls.recv(ring, size, kind, out, (src, False, 0), timeout)
            if recorder is not None and token is not None:
                if received is None:
                    recorder.cancel(token)
                else:
                    recorder.end(token, received)
            return received
        except BaseException as error:
            if recorder is not None and token is not None:
                recorder.end(token, failed=True)
            shape = (size,) if type(size) is int else size
            self._end(group, "recv", message_text(dtype, shape), src, timeout, error)
        finally:
            inbox.pass_turn()

    def _end(self, group: Group, operation: str, text: str, peer: int, timeout: Timeout, error: BaseException) -> NoReturn:
        """Raise as the general path does: the error of the group, which is broken by a message half sent."""
        state = self._state
        try:
            if isinstance(error, Busy):
                raise state.refused(group.name, operation, (peer, operation == "send", 0)) from None
            call = Call(group.name, operation, state.members, state.sequence)
            translated = self._fast.translate(error)
            if translated is None:
                state.failures.break_off(call, interrupted_by(error, f"{operation}({text}, {peer})"))  # the peer must not wait for the rest
                raise error
            seconds = deadline_of(group, operation, timeout).seconds
            state.failures.end(call, f"{operation}({text}, {peer})", seconds, translated)
        finally:
            del error  # whose traceback holds this frame
