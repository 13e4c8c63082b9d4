"""Records between the ranks of one host: to one of them, or to all.

A record has a kind, a number that says which message it is (`meta`), and parts. Records of one kind from one rank to another arrive in
order; one of another kind than is asked for is laid aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from commgraph.shm.host_memory import HostMemory
from commgraph.shm.pickling import Pickler
from commgraph.shm.stopped import TIMEOUT, Stopped

__all__ = ["DICT", "OBJECT", "SIZES", "TENSORS", "Mailbox"]

TENSORS, OBJECT, DICT, SIZES = 1, 2, 3, 4

# 2**62 ns are 146 years.
_MOST_NS = 1 << 62

# Smaller ones are cheaper through the ring, however small that is.
_HANDED_FROM = 64 << 10


class Mailbox:
    """One rank's side. Every method raises `commgraph.shm.stopped.Stopped`; a timeout loses nothing and sends nothing."""

    def __init__(self, memory: HostMemory) -> None:
        n, me = memory.sizes.n, memory.rank_in_group
        self.team = memory.team
        self.pickler = Pickler()
        # A record of so many bytes for all can be put before anybody reads, if all have read those before it.
        self.room = memory.sizes.broadcast_bytes // 2
        # To each rank, those for all under this rank's own number: several threads may send, each to another one.
        self._sent = [0] * n
        self._me = me
        # What goes into a ring at once, if it is empty.
        self._whole = memory.sizes.pair_bytes // 4 - 1024
        self.take = memory.pool.take
        self._broadcast = [memory.broadcast_ring(src) for src in range(n)]
        self._mine = self._broadcast[me]
        self._outgoing = {peer: memory.pair_ring(me, peer) for peer in range(n) if peer != me}
        self._incoming = {peer: memory.pair_ring(peer, me) for peer in range(n) if peer != me}
        self._aside: dict[tuple[int, int], deque[tuple[int, list[Any]]]] = {}
        self._pair_bytes = memory.sizes.pair_bytes

    def hand_over(self) -> None:
        """From now on both sides copy large parts where they lie: the ranks reach each other's memory."""
        for ring in self._outgoing.values():
            # What a ring holds at once is sent without its reader.
            ring.handed_from = max(self._pair_bytes, _HANDED_FROM)

    def send(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...], timeout: float) -> None:
        """Puts a record for one rank.

        It returns when the ring has it, which may be before it is read, and the reader those parts that are handed over.
        A part is a buffer, or (address, bytes) of memory that the caller keeps alive.
        """
        self._outgoing[dst].put(kind, meta, parts, nanoseconds(timeout), 0)
        self._sent[dst] += _nbytes(parts)

    def offer(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...]) -> bool:
        """The same where the ring has room for the whole record; otherwise False, and nothing was put."""
        if _nbytes(parts) + 8 * len(parts) > self._whole:
            return False
        try:
            self.send(dst, kind, meta, parts, 0.0)
        except Stopped as stopped:
            if stopped.code == TIMEOUT:
                return False
            raise
        return True

    def receive(self, src: int, kind: int, timeout: float) -> tuple[int, list[Any]]:
        """Meta and parts of the next record of that kind: the first as bytes, the others as writable buffers of their own."""
        aside = self._aside.get((src, kind))
        if aside:
            return aside.popleft()
        while True:
            found, meta, parts = self._incoming[src].get(nanoseconds(timeout), 0)
            if found == kind:
                return meta, parts
            self._lay_aside(src, found, meta, parts)

    def receive_into(self, src: int, meta: int, targets: Sequence[tuple[int, int]], owner: object, timeout: float) -> bool:
        """Reads the next record of tensors to memory of the caller's.

        Args:
            src: whose.
            meta: what it must be.
            targets: (address, bytes) for each part.
            owner: keeps that memory.
            timeout: seconds.

        Returns:
            Whether it was that one; if not nothing was written.
        """
        aside = self._aside.get((src, TENSORS))
        ring = self._incoming[src]
        while not aside:
            # One that another receive has begun to lay aside is laid aside to its end.
            kind, number, sizes = (0, 0, ()) if ring.reading else ring.peek(nanoseconds(timeout), 0)
            if kind == TENSORS:
                if number != meta or list(sizes) != [nbytes for _, nbytes in targets]:
                    return False
                if ring.take(nanoseconds(timeout), targets, owner):
                    return True
                continue  # the writer gave it up
            kind, number, parts = ring.get(nanoseconds(timeout), 0)
            self._lay_aside(src, kind, number, parts)
            aside = self._aside.get((src, TENSORS))
        number, parts = aside[0]
        if number != meta or [len(part) for part in parts] != [nbytes for _, nbytes in targets]:
            return False
        aside.popleft()
        for part, (address, nbytes) in zip(parts, targets, strict=True):
            memory_at(address, nbytes)[:] = part
        return True

    def send_memory(self, dst: int, meta: int, address: int, nbytes: int, patience: int) -> None:
        """`send` of one tensor; `patience` in nanoseconds."""
        self._outgoing[dst].put(TENSORS, meta, ((address, nbytes),), patience, 0)
        self._sent[dst] += nbytes

    def receive_memory(self, src: int, meta: int, address: int, nbytes: int, owner: object, patience: int) -> bool:
        """`receive_into` of one tensor, False also where its turn is not the next in the ring; `patience` in nanoseconds."""
        ring = self._incoming[src]
        if ring.reading or self._aside.get((src, TENSORS)):
            return False
        if ring.peek(patience, 0) != (TENSORS, meta, (nbytes,)):
            return False
        return bool(ring.take(patience, ((address, nbytes),), owner))

    def broadcast(self, kind: int, meta: int, parts: tuple[Any, ...], timeout: float, posted: int) -> None:
        """Puts a record for all others."""
        self._mine.put(kind, meta, parts, nanoseconds(timeout), posted)
        self._sent[self._me] += _nbytes(parts)

    @property
    def bytes_sent(self) -> int:
        """Bytes put so far."""
        return sum(self._sent)

    def receive_broadcast(self, src: int, timeout: float, posted: int) -> tuple[int, int, list[Any]]:
        """Kind, meta and parts of the next record that `src` put for all."""
        kind, meta, parts = self._broadcast[src].get(nanoseconds(timeout), posted)
        return kind, meta, parts

    def _lay_aside(self, src: int, kind: int, meta: int, parts: list[Any]) -> None:
        self._aside.setdefault((src, kind), deque()).append((meta, parts))


def nanoseconds(seconds: float) -> int:
    """A timeout as the native module takes it."""
    return min(int(seconds * 1e9), _MOST_NS)


def memory_at(address: int, nbytes: int) -> memoryview:
    """Bytes of this process as a writable buffer."""
    import ctypes

    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _nbytes(parts: Sequence[Any]) -> int:
    return sum([len(part) if type(part) is bytes else part[1] if type(part) is tuple else memoryview(part).nbytes for part in parts])
