"""The fast path of ranks that share memory: native calls that bypass the coordinator's general path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commgraph import compat
from commgraph.communicators.base import AccessRefused, CallsDiffer, PeerClosed, PeerLate, PeerLeft
from commgraph.communicators.memory import dense
from commgraph.forks import keep_for_ever
from commgraph.shm.host_memory import HostMemory
from commgraph.shm.mailbox import Mailbox, tensors_with
from commgraph.shm.stopped import GONE, LOST, MISMATCH, REFUSED, TIMEOUT, Stopped

__all__ = ["PROCESS_ENDED", "Closed", "ShmFastPath", "by_peer", "native_calls", "tensors_of", "translated"]

# `Team.state` of a member that was closed without an error.
_CLOSED = 2

# Why a rank of this host is lost.
PROCESS_ENDED = "its process ended"


class ShmFastPath:
    """`commgraph.communicators.base.FastPath` of one group in shared memory."""

    has_notes = True

    def __init__(self, group: Any, memory: HostMemory, mailbox: Mailbox | None, numbers: Sequence[int]) -> None:
        """Over a native group.

        Args:
            group: native object that runs and counts collectives (native/module_group.c).
            memory: shared by the ranks.
            mailbox: carries messages and objects; None where there are no rings.
            numbers: of the ranks, in errors.
        """
        self.counter = group
        self.mailbox = mailbox
        self._memory: HostMemory | None = memory
        self._rank_in_group = memory.rank_in_group
        self._numbers = numbers

    def open(self, describe: Callable[[str, tuple[Any, ...]], int], timeout: float) -> Any:
        assert self._memory is not None
        return native_calls(self._memory.native, self.counter, describe, int(timeout * 1e9))

    def pause(self, paused: bool) -> None:
        self.counter.paused = int(paused)

    def offer(self, x: torch.Tensor, dst: int, *, tag: int, label: int = 0) -> bool:
        assert self.mailbox is not None
        whole = dense(x)
        return self.mailbox.offer(dst, tensors_with(label), tag, ((whole.data_ptr(), whole.nbytes),))

    def translate(self, error: BaseException) -> Exception | None:
        memory = self._memory
        if isinstance(error, Stopped) and error.code == GONE and memory is not None and memory.team.state(error.member) == _CLOSED:
            return PeerLeft(self._numbers[error.member])
        return translated(error, self._rank_in_group, lambda _, rank: PeerClosed(rank, PROCESS_ENDED), self._numbers)

    @property
    def interrupted(self) -> bool:
        return self._memory is None or not self.counter.enabled

    def post_note(self, text: str) -> None:
        self.counter.post_note(text.encode(errors="replace"))

    def read_note(self, rank: int) -> str | None:
        text = self.counter.read_note(rank)
        return None if text is None else text.decode(errors="replace")

    def break_off(self) -> None:
        """End every call with an error, here and on the ranks that wait for this one."""
        with contextlib.suppress(AttributeError):  # another thread closes it at this very moment
            self.counter.enabled = 0
            self._memory.team.close(True)  # type: ignore[union-attr]  # suppressed above

    def disown(self) -> None:
        if self._memory is not None:
            keep_for_ever(self._memory, self.counter, self.mailbox)
            self.counter.enabled = 0
            self._memory.team.disown()
            self._memory, self.mailbox = None, None
            self.counter = Closed(0, {})

    def close(self) -> None:
        """Leave the group; the memory goes with its last reference."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.counter.enabled = 0
            memory.team.close()
            # The count stays readable where errors name it; the native group goes with its last reference.
            self.counter = Closed(int(self.counter.sequence), self.counter.claims)
            self.mailbox = None


class Closed:
    """Stands in for the native group of a closed one."""

    busy = False

    def __init__(self, sequence: int, claims: dict[Any, object]) -> None:
        self.sequence = sequence
        self.claims = claims
        self.enabled = 0
        self.paused = 0

    def post_note(self, text: bytes) -> None:
        """Do nothing."""

    def read_note(self, rank: int) -> None:
        """Return None: there are no notes."""


def translated(
    error: BaseException, me: int, lost: Callable[[int, int], PeerClosed], numbers: Sequence[int] | None = None
) -> Exception | None:
    """Return `PeerLate`, `PeerClosed` or `CallsDiffer` for what ended a native call; None for any other exception.

    Args:
        error: that ended it.
        me: this rank, as the native call names it.
        lost: makes the error of a rank that is lost, from how the native call names it and how the error is to.
        numbers: of the ranks, where the error is to name them otherwise.
    """
    if not isinstance(error, Stopped):
        return None
    code = error.code
    member = error.member if code in (TIMEOUT, MISMATCH, REFUSED, LOST, GONE) else me
    rank = member if numbers is None else numbers[member]
    if code == TIMEOUT:
        return PeerLate(rank)
    if code == MISMATCH:
        return CallsDiffer(rank)
    if code == REFUSED:
        return AccessRefused(rank)
    if code == LOST:
        return lost(member, rank)
    return PeerClosed(rank, "it closed its side" if code == GONE else "this rank closed the group")


def native_calls(native: Any, group: Any, describe: Callable[[str, tuple[Any, ...]], int] | None, timeout_ns: int) -> Any:
    """Return the native calls of a coordinator; `group` and `describe` are None for one rank."""
    return native.FastCalls(group, tensors_of(native), describe, timeout_ns)


def tensors_of(native: Any) -> Any:
    """Return the native object that reads and makes tensors (native/module_tensors.h)."""
    return native.Tensors(
        torch.Tensor,
        compat.dlpack_exchange(),
        torch.is_inference_mode_enabled,
        torch.is_grad_enabled,
        compat.count_modes,
        compat.increment_version,
        *compat.ambient_flags(),
        torch.int8,
        torch.uint8,
    )


def by_peer(pairs: Sequence[tuple[torch.Tensor, int]]) -> dict[int, list[torch.Tensor]]:
    """Return the tensors of each peer, in order."""
    found: dict[int, list[torch.Tensor]] = {}
    for x, peer in pairs:
        found.setdefault(peer, []).append(x)
    return found
