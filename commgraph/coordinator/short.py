"""The short way of messages between the ranks of a host: for plain tensors what the door is for collectives.

It answers "not mine" to everything else before anything is sent. Both ways count and tag alike, so that the two ranks of a message may take
different ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from commgraph import compat
from commgraph.communicators.base import Communicator
from commgraph.communicators.signature import MESSAGE, digest, messages, tagged
from commgraph.shm.mailbox import Mailbox, nanoseconds
from commgraph.shm.stopped import Busy, Stopped

if TYPE_CHECKING:
    from commgraph.coordinator.facts import GroupFacts
    from commgraph.coordinator.link import GroupLink

__all__ = ["ShortMessages"]

# Kinds of tensors whose digests are kept.
_KEPT = 1024


class ShortMessages:
    """Of one link."""

    def __init__(self, link: GroupLink, strategy: Communicator, mailbox: Mailbox) -> None:
        self._link = link
        self._strategy = strategy
        self._mailbox = mailbox
        self._modes = compat.count_modes()
        self._mark_written = compat.mark_written()
        self._patience = nanoseconds(link.host_timeout)
        self._digests: dict[tuple[torch.dtype, int], int] = {}

    def send(self, group: GroupFacts, x: Any, dst: Any) -> bool:
        """Sends x, if it and all around it is plain."""
        link = self._link
        if not self._is_plain(x, dst):
            return False
        link.ensure_open(group.name)
        if not link.is_idle((dst, True)):
            return False
        tag = tagged(MESSAGE, link.count(MESSAGE, dst, outgoing=True), self._digest(x))
        try:
            self._mailbox.send_memory(dst, tag, x.data_ptr(), x.nbytes, self._patience)
        except BaseException as error:
            self._end(group, "send", x, dst, error)
        return True

    def receive(self, group: GroupFacts, size: Any, dtype: Any, src: Any, out: Any) -> torch.Tensor | None:
        """The tensor that came, `out` if that is given, where it and all around it is plain; else None, and nothing was read."""
        link = self._link
        shape = (size,) if type(size) is int else size
        if out is None:
            if group.device.type != "cpu" or type(shape) not in (tuple, torch.Size) or type(dtype) is not torch.dtype:
                return None
            try:
                out = self._strategy.new(shape, dtype, group.device)
            except (TypeError, RuntimeError, ValueError):
                return None  # what is wrong with it the long way says
        elif type(out) is not torch.Tensor or out.shape != shape or out.dtype != dtype:
            return None
        if not self._is_plain(out, src):
            return None
        marks = not out.is_inference()
        if not marks and not torch.is_inference_mode_enabled():
            return None
        link.ensure_open(group.name)
        if not link.is_idle((src, False)):
            return None
        tag = tagged(MESSAGE, link.count(MESSAGE, src, outgoing=False), self._digest(out))
        try:
            if self._mailbox.receive_memory(src, tag, out.data_ptr(), out.nbytes, out, self._patience):
                if marks:
                    self._mark_written((out,))
                return out  # type: ignore[no-any-return]  # a tensor, as was seen
        except BaseException as error:
            self._end(group, "recv", out, src, error)
        # Something else lies there, for the long way to see to.
        link.uncount(MESSAGE, src, outgoing=False)
        return None

    def _is_plain(self, x: Any, peer: Any) -> bool:
        link = self._link
        return (
            type(x) is torch.Tensor
            and type(peer) is int
            and 0 <= peer < link.world_size
            and peer != link.rank_in_group
            and self._modes() == 0
            and x.is_cpu
            and not x.requires_grad
            and x.layout is torch.strided
            and not x.is_quantized
            and x.is_contiguous()
            and x.numel() > 0
            and not x.is_neg()
            and not x.is_conj()
        )

    def _digest(self, x: torch.Tensor) -> int:
        key = (x.dtype, x.numel())
        found = self._digests.get(key)
        if found is None:
            if len(self._digests) >= _KEPT:
                self._digests.clear()
            found = self._digests[key] = digest(messages(x))
        return found

    def _end(self, group: GroupFacts, operation: str, x: torch.Tensor, peer: int, error: BaseException) -> NoReturn:
        """As the long way would have it: the error of the group, which is broken by a message half sent."""
        if isinstance(error, Busy):
            raise error
        if not isinstance(error, Stopped):
            self._strategy.abort()  # a signal's handler has raised: the peer must not wait for the rest
            raise error
        call, seconds = group._message(operation, None)
        with self._link.guard(call, f"{operation}({messages(x)}, {peer})", seconds):
            raise self._strategy.translate(error)
        raise AssertionError("guard always raises")
