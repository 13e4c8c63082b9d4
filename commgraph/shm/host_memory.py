"""The shared memory of one group: how its ranks map it, and its layout.

::

    page 0      a number that only this segment has
    members     one for each rank: its doorbell, state and process (native/team.h)
    group       lines, notes and slots of the collectives (native/steps.c)
    rings       one from each rank to all others, for what is broadcast; then one for each ordered pair of ranks
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, Self

import attrs
import msgspec

from commgraph.errors import BuildError
from commgraph.shm import native_module, segments
from commgraph.shm.stopped import Stopped

__all__ = ["HostMemory", "Sizes"]

_PAGE = 4096
_NONCE_BYTES = 16
# Most bytes of free memory that the pool keeps for results.
_POOL_BYTES = 256 << 20


@attrs.frozen
class Sizes:
    """Sizes of the parts, equal on every rank.

    Attributes:
        n: ranks.
        slot_bytes: of each of a rank's two slots: as much as it can stage at once.
        broadcast_bytes: of the ring from one rank to all others.
        pair_bytes: of the ring from one rank to one other; 0 for none of both kinds.
    """

    n: int
    slot_bytes: int
    broadcast_bytes: int
    pair_bytes: int

    @classmethod
    def plan(cls, n: int, *, shm_bytes: int, queue_bytes: int, queues: bool) -> Self:
        """Return the sizes for n ranks from those that a user gave: less for each rank of a large group, so that the sum stays bounded."""
        # A slot has at least a few cache lines for each other rank.
        slot = _pages(max(min(shm_bytes, max(8 * shm_bytes // n, 16 * 1024)), 256 * n))
        broadcast = min(queue_bytes, max(4 * queue_bytes // n, 16 * 1024))
        pair = min(queue_bytes // 2, max(4 * queue_bytes // (n * (n - 1)), 4 * 1024))
        return cls(n, slot, _lines(broadcast) if queues else 0, _lines(pair) if queues else 0)


class _Word(msgspec.Struct):
    """A rank's message to the others while they map each other's memory."""

    problem: str = ""
    pid: int = 0
    fd: int = -1
    nbytes: int = 0
    nonce: bytes = b""


class HostMemory:
    """One rank's view of the memory of its group.

    Attributes:
        native: the native module.
        segment, team, pool: objects of it.
        sizes: of the parts.
        nbytes: of the whole.
    """

    def __init__(self, native: Any, fd: int, nbytes: int, sizes: Sizes, rank_in_group: int, sharing: int) -> None:
        self.native = native
        self.segment = native.Segment(fd, nbytes)
        self.sizes = sizes
        self.nbytes = nbytes
        self.rank_in_group = rank_in_group
        self.team = native.Team(self.segment, _PAGE, sizes.n, rank_in_group, sharing)
        self.pool = native.Pool(_POOL_BYTES)

    @property
    def group_offset(self) -> int:
        """Offset of the memory of the collectives in the segment."""
        return _PAGE + _pages(self.native.group_layout(self.sizes.n, self.sizes.slot_bytes)[0])

    def broadcast_ring(self, src: int) -> Any:
        """Return the ring that `src` writes and all others read."""
        n, size = self.sizes.n, self.sizes.broadcast_bytes
        offset = _rings_offset(self.native, self.sizes) + src * _ring_bytes(self.native, n - 1, size)
        return self.native.Ring(self.team, self.pool, offset, src, 0, n - 1, size, True, False)

    def pair_ring(self, src: int, dst: int) -> Any:
        """Return the ring that `src` writes and `dst` reads; a thread may use it while another is in a collective."""
        n = self.sizes.n
        begin = _rings_offset(self.native, self.sizes) + n * _ring_bytes(self.native, n - 1, self.sizes.broadcast_bytes)
        index = src * (n - 1) + (dst if dst < src else dst - 1)
        offset = begin + index * _ring_bytes(self.native, 1, self.sizes.pair_bytes)
        # The ring's one reader is the first member from `dst` on that is not the writer: dst itself.
        return self.native.Ring(self.team, self.pool, offset, src, dst, 1, self.sizes.pair_bytes, False, True)


def join(exchange: Callable[[bytes], list[bytes]], sizes: Sizes, rank_in_group: int, *, sharing: int) -> HostMemory | str:
    """Make the memory of a group, or return why there is none. Collective: every rank gets memory, or every rank the same reason.

    Args:
        exchange: sends a rank's bytes (up to 1,000) to all ranks and returns those of all in rank order.
        sizes: of the parts.
        rank_in_group: this rank.
        sharing: ranks of the whole job that may run on a core of this one's, itself included.
    """
    native, fd, word = None, -1, _Word(pid=os.getpid())
    try:
        try:
            native = native_module.load()
            if native is None:
                word = _Word(problem=f"no native module ({native_module.why_missing()})")
            elif rank_in_group == 0:
                nbytes = _total(native, sizes)
                fd = segments.create(nbytes)
                nonce = secrets.token_bytes(_NONCE_BYTES)
                os.pwrite(fd, nonce, 0)
                word = _Word("", os.getpid(), fd, nbytes, nonce)
        except (BuildError, OSError) as error:
            word = _Word(problem=str(error))
        words = _exchange_words(exchange, word)
        problem = _problem_of(words)
        if problem or native is None:
            return problem
        memory = None
        try:
            memory = _open(native, words[0], sizes, rank_in_group, sharing)
            verdict = _Word()
        except (OSError, Stopped, MemoryError) as error:
            verdict = _Word(problem=f"the segment of the group's first rank (process {words[0].pid}) could not be opened: {error}")
        # A rank that has the verdicts of all knows that all have mapped the segment: the descriptor can be closed.
        problem = _problem_of(_exchange_words(exchange, verdict))
        return problem if problem or memory is None else memory
    finally:
        if fd >= 0:
            os.close(fd)


def _open(native: Any, first: _Word, sizes: Sizes, rank_in_group: int, sharing: int) -> HostMemory:
    fd = segments.open_peer(first.pid, first.fd, first.nbytes)
    try:
        if os.pread(fd, _NONCE_BYTES, 0) != first.nonce:
            raise OSError("another segment is open there")
        return HostMemory(native, fd, first.nbytes, sizes, rank_in_group, sharing)
    finally:
        os.close(fd)


def _exchange_words(exchange: Callable[[bytes], list[bytes]], word: _Word) -> list[_Word]:
    word.problem = word.problem[:700]
    return [msgspec.msgpack.decode(said, type=_Word) for said in exchange(msgspec.msgpack.encode(word))]


def _problem_of(words: list[_Word]) -> str:
    return next((f"rank {i} in the group: {word.problem}" for i, word in enumerate(words) if word.problem), "")


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _ring_bytes(native: Any, n_readers: int, capacity: int) -> int:
    return _lines(native.ring_bytes(n_readers, capacity)) if capacity else 0


def _rings_offset(native: Any, sizes: Sizes) -> int:
    member_bytes, group_bytes = native.group_layout(sizes.n, sizes.slot_bytes)
    return int(_PAGE + _pages(member_bytes) + _pages(group_bytes))


def _total(native: Any, sizes: Sizes) -> int:
    n = sizes.n
    rings = n * _ring_bytes(native, n - 1, sizes.broadcast_bytes) + n * (n - 1) * _ring_bytes(native, 1, sizes.pair_bytes)
    return _pages(_rings_offset(native, sizes) + rings)
