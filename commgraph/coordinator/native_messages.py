"""Native messages between the ranks of one host: plain tensors, past the general path.

A call answers "not handled" before anything is sent to whatever is not plain; the general path takes it then. Both paths count and tag
alike, so that the two ranks of a message may take different ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from commgraph.communicators.base import FastPath
from commgraph.communicators.shm_fast import tensors_of
from commgraph.communicators.tags import MESSAGE, message_text
from commgraph.coordinator.failures import Call
from commgraph.coordinator.messages import message_digest
from commgraph.coordinator.operation import Group, deadline_of
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Timeout
from commgraph.shm.kinds import KINDS
from commgraph.shm.mailbox import TENSORS, Mailbox
from commgraph.shm.stopped import Busy

__all__ = ["NativeMessages"]


class NativeMessages:
    """Of one group."""

    def __init__(self, state: GroupState, fast: FastPath, mailbox: Mailbox) -> None:
        self._state = state
        self._fast = fast
        self._mailbox = mailbox
        self._calls = mailbox.open_native(tensors_of, message_digest, int(state.timeouts.host * 1e9))

    def send(self, group: Group, x: Any, dst: Any, timeout: Timeout) -> bool:
        """Send x, if it and all around it is plain."""
        state = self._state
        ring = self._mailbox.outgoing.get(dst) if type(dst) is int else None
        if ring is None:
            return False
        state.ensure_open(group.name)
        if state.pending.lanes and not state.pending.is_free(dst, True):
            return False
        key = (MESSAGE, dst, True, 0)
        number = state.count(key)
        try:
            if self._calls.send(ring, x, number, timeout):
                return True
        except BaseException as error:
            self._end(group, "send", message_text(x.dtype, x.numel()), dst, timeout, error)
        state.uncount(key)
        return False

    def recv(self, group: Group, size: Any, dtype: Any, src: Any, out: Any, timeout: Timeout) -> torch.Tensor | None:
        """Return the tensor that came, `out` if that is given, where it and all around it is plain; else None, and nothing was read."""
        state = self._state
        kind = KINDS.get(dtype) if type(dtype) is torch.dtype else None
        ring = self._mailbox.incoming.get(src) if type(src) is int else None
        if kind is None or ring is None or (out is None and group.device.type != "cpu"):
            return None
        state.ensure_open(group.name)
        if (state.pending.lanes and not state.pending.is_free(src, False)) or self._mailbox.has_aside(src, TENSORS):
            return None
        key = (MESSAGE, src, False, 0)
        number = state.count(key)
        try:
            result = self._calls.recv(ring, size, kind, out, number, timeout)
        except BaseException as error:
            numel = torch.Size([size] if type(size) is int else size).numel()
            self._end(group, "recv", message_text(dtype, numel), src, timeout, error)
        if result is None:
            # Something else is asked for, or lies there, for the general path to see to.
            state.uncount(key)
        return result  # type: ignore[no-any-return]  # as native/module_messages.c has it

    def _end(self, group: Group, operation: str, text: str, peer: int, timeout: Timeout, error: BaseException) -> NoReturn:
        """Raise as the general path does: the error of the group, which is broken by a message half sent."""
        state = self._state
        try:
            if isinstance(error, Busy):
                state.uncount((MESSAGE, peer, operation == "send", 0))
                raise error
            translated = self._fast.translate(error)
            if translated is None:
                state.strategies.abort()  # a signal's handler has raised: the peer must not wait for the rest
                raise error
            call = Call(group.name, operation, state.members, state.sequence)
            seconds = deadline_of(group, operation, timeout).seconds
            state.failures.end(call, f"{operation}({text}, {peer})", seconds, translated)
        finally:
            del error  # whose traceback holds this frame
