"""The short way of messages between the ranks of a host: for plain tensors what the door is for collectives.

It answers "not mine" to everything else before anything is sent. Both ways count and tag alike, so that the two ranks of a message may take
different ones.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from commgraph.communicators.base import Communicator
from commgraph.communicators.shm import tensors_of
from commgraph.communicators.signature import MESSAGE, digest, message, messages
from commgraph.shm.mailbox import TENSORS, Mailbox, nanoseconds
from commgraph.shm.stopped import Busy, Stopped

if TYPE_CHECKING:
    from commgraph.coordinator.facts import GroupFacts
    from commgraph.coordinator.link import GroupLink

__all__ = ["ShortMessages"]

# What the native module calls a dtype: DLPack's code and bits, in a byte each.
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_KINDS: Final = MappingProxyType(
    {
        torch.bool: _BOOL << 8 | 8,
        torch.bfloat16: _BFLOAT << 8 | 16,
        torch.float16: _FLOAT << 8 | 16,
        torch.float32: _FLOAT << 8 | 32,
        torch.float64: _FLOAT << 8 | 64,
        torch.int8: _INT << 8 | 8,
        torch.int16: _INT << 8 | 16,
        torch.int32: _INT << 8 | 32,
        torch.int64: _INT << 8 | 64,
        torch.uint8: _UINT << 8 | 8,
        torch.uint16: _UINT << 8 | 16,
        torch.uint32: _UINT << 8 | 32,
        torch.uint64: _UINT << 8 | 64,
    }
)
_DTYPES: Final = MappingProxyType({kind: dtype for dtype, kind in _KINDS.items()})


class ShortMessages:
    """Of one link."""

    def __init__(self, link: GroupLink, strategy: Communicator, mailbox: Mailbox) -> None:
        self._link = link
        self._strategy = strategy
        self._mailbox = mailbox
        self._post = mailbox.open_post(tensors_of, _digest)
        self._patience = nanoseconds(link.host_timeout)

    def send(self, group: GroupFacts, x: Any, dst: Any) -> bool:
        """Sends x, if it and all around it is plain."""
        link = self._link
        ring = self._mailbox.outgoing.get(dst) if type(dst) is int else None
        if ring is None:
            return False
        link.ensure_open(group.name)
        if not link.is_idle((dst, True)):
            return False
        number = link.count(MESSAGE, dst, outgoing=True)
        try:
            if self._post.send(ring, x, number, self._patience):
                return True
        except BaseException as error:
            self._end(group, "send", messages(x), dst, error)
        link.uncount(MESSAGE, dst, outgoing=True)
        return False

    def receive(self, group: GroupFacts, size: Any, dtype: Any, src: Any, out: Any) -> torch.Tensor | None:
        """The tensor that came, `out` if that is given, where it and all around it is plain; else None, and nothing was read."""
        link = self._link
        kind = _KINDS.get(dtype) if type(dtype) is torch.dtype else None
        ring = self._mailbox.incoming.get(src) if type(src) is int else None
        if kind is None or ring is None or (out is None and group.device.type != "cpu"):
            return None
        link.ensure_open(group.name)
        if not link.is_idle((src, False)) or self._mailbox.has_aside(src, TENSORS):
            return None
        number = link.count(MESSAGE, src, outgoing=False)
        try:
            result = self._post.recv(ring, size, kind, out, number, self._patience)
        except BaseException as error:
            self._end(group, "recv", message(dtype, torch.Size([size] if type(size) is int else size).numel()), src, error)
        if result is None:
            # Something else is asked for, or lies there, for the long way to see to.
            link.uncount(MESSAGE, src, outgoing=False)
        return result  # type: ignore[no-any-return]  # as native/module_post.c has it

    def _end(self, group: GroupFacts, operation: str, what: str, peer: int, error: BaseException) -> NoReturn:
        """As the long way would have it: the error of the group, which is broken by a message half sent."""
        try:
            if isinstance(error, Busy):
                self._link.uncount(MESSAGE, peer, outgoing=operation == "send")
                raise error
            if not isinstance(error, Stopped):
                self._strategy.abort()  # a signal's handler has raised: the peer must not wait for the rest
                raise error
            call, seconds = group._message(operation, None)
            with self._link.guard(call, f"{operation}({what}, {peer})", seconds):
                raise self._strategy.translate(error)
            raise AssertionError("guard always raises")
        finally:
            del error  # whose traceback holds this frame


def _digest(kind: int, numel: int) -> int:
    return digest(message(_DTYPES[kind], numel))
