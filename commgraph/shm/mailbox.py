"""Records between the ranks of one host: to one of them, or to all.

A record has a kind, a number that says which message it is (`meta`), and parts. Records of one kind from one rank to another arrive in
order; one of another kind than is asked for is laid aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from commgraph.shm.host_memory import HostMemory
from commgraph.shm.pickling import Pickler
from commgraph.shm.stopped import TIMEOUT, Stopped

if TYPE_CHECKING:
    import torch

__all__ = ["DICT", "OBJECT", "SIZES", "TENSORS", "Mailbox"]

TENSORS, OBJECT, DICT, SIZES = 1, 2, 3, 4

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
        self.mine = self._broadcast[me]
        self.outgoing = {peer: memory.pair_ring(me, peer) for peer in range(n) if peer != me}
        self.incoming = {peer: memory.pair_ring(peer, me) for peer in range(n) if peer != me}
        self._aside: dict[tuple[int, int], deque[tuple[int, list[Any]]]] = {}
        self._module = memory.native
        # Native calls for plain tensors and dicts of them (native/module_messages.c), once they are open.
        self.native: Any = None
        self._pair_bytes = memory.sizes.pair_bytes

    def open_native(self, tensors_of: Callable[[Any], Any], digest: Callable[[int, int], int], timeout_ns: int) -> Any:
        """Open the native calls, and return them.

        Args:
            tensors_of: gives what the native module needs to look at tensors.
            digest: of a message, by its kind (DLPack's code and bits, in a byte each) and its number of elements.
            timeout_ns: of calls without a timeout of their own.
        """
        self.native = self._module.Messages(tensors_of(self._module), digest, timeout_ns)
        return self.native

    def hand_over(self) -> None:
        """From now on both sides copy large parts where they lie: the ranks reach each other's memory."""
        for ring in self.outgoing.values():
            # What a ring holds at once is sent without its reader.
            ring.handed_from = max(self._pair_bytes, _HANDED_FROM)

    def send(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...], timeout_ns: int) -> None:
        """Put a record for one rank.

        It returns when the ring has it, which may be before it is read, and the reader those parts that are copied by rendezvous.
        A part is a buffer, or (address, bytes) of memory that the caller keeps alive.
        """
        self.outgoing[dst].put(kind, meta, parts, timeout_ns, 0)
        self._sent[dst] += _nbytes(parts)

    def offer(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...]) -> bool:
        """Put a record where the ring has room for the whole of it; otherwise return False with nothing put."""
        if _nbytes(parts) + 8 * len(parts) > self._whole:
            return False
        try:
            self.send(dst, kind, meta, parts, 0)
        except Stopped as stopped:
            if stopped.code == TIMEOUT:
                return False
            raise
        return True

    def receive(self, src: int, kind: int, timeout_ns: int) -> tuple[int, list[Any]]:
        """Meta and parts of the next record of that kind: the first as bytes, the others as writable buffers of their own."""
        aside = self._aside.get((src, kind))
        if aside:
            return aside.popleft()
        while True:
            found, meta, parts = self.receive_any(src, timeout_ns)
            if found == kind:
                return meta, parts
            self.lay_aside(src, found, meta, parts)

    def receive_any(self, src: int, timeout_ns: int) -> tuple[int, int, list[Any]]:
        """Kind, meta and parts of the next record of any kind."""
        return self.incoming[src].get(timeout_ns, 0)  # type: ignore[no-any-return]  # as native/module_ring.c has it

    def receive_into(self, src: int, meta: int, targets: Sequence[tuple[int, int]], owner: object, timeout_ns: int) -> bool:
        """Reads the next record of tensors to memory of the caller's.

        Args:
            src: whose.
            meta: what it must be.
            targets: (address, bytes) for each part.
            owner: keeps that memory.
            timeout_ns: nanoseconds.

        Returns:
            Whether it was that one; if not nothing was written.
        """
        aside = self._aside.get((src, TENSORS))
        ring = self.incoming[src]
        while not aside:
            # One that another receive has begun to lay aside is laid aside to its end.
            kind, number, sizes = (0, 0, ()) if ring.reading else ring.peek(timeout_ns, 0)
            if kind == TENSORS:
                if number != meta or list(sizes) != [nbytes for _, nbytes in targets]:
                    return False
                if ring.take(timeout_ns, targets, owner):
                    return True
                continue  # the writer gave it up
            kind, number, parts = ring.get(timeout_ns, 0)
            self.lay_aside(src, kind, number, parts)
            aside = self._aside.get((src, TENSORS))
        number, parts = aside[0]
        if number != meta or [len(part) for part in parts] != [nbytes for _, nbytes in targets]:
            return False
        aside.popleft()
        for part, (address, nbytes) in zip(parts, targets, strict=True):
            memory_at(address, nbytes)[:] = part
        return True

    def has_aside(self, src: int, kind: int) -> bool:
        """Whether a record of that kind was laid aside, which comes before those in the ring."""
        return bool(self._aside) and bool(self._aside.get((src, kind)))

    def unpack(self, parts: list[Any]) -> dict[str, torch.Tensor] | None:
        """Return the dict that the native module described by itself; None for another record."""
        return None if self.native is None else self.native.unpack(parts)

    def broadcast(self, kind: int, meta: int, parts: tuple[Any, ...], timeout_ns: int, posted: int) -> None:
        """Put a record for all others."""
        self.mine.put(kind, meta, parts, timeout_ns, posted)
        self._sent[self._me] += _nbytes(parts)

    @property
    def bytes_sent(self) -> int:
        """Bytes put so far."""
        return sum(self._sent) + (0 if self.native is None else self.native.bytes_sent)

    def receive_broadcast(self, src: int, timeout_ns: int, posted: int) -> tuple[int, int, list[Any]]:
        """Return kind, meta and parts of the next record that `src` put for all."""
        return self._broadcast[src].get(timeout_ns, posted)  # type: ignore[no-any-return]  # as native/module_ring.c has it

    def lay_aside(self, src: int, kind: int, meta: int, parts: list[Any]) -> None:
        """Keeps a record for whoever asks for its kind."""
        self._aside.setdefault((src, kind), deque()).append((meta, parts))


def memory_at(address: int, nbytes: int) -> memoryview:
    """Bytes of this process as a writable buffer."""
    import ctypes

    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _nbytes(parts: Sequence[Any]) -> int:
    if len(parts) == 1 and type(parts[0]) is bytes:
        return len(parts[0])
    return sum([len(part) if type(part) is bytes else part[1] if type(part) is tuple else memoryview(part).nbytes for part in parts])
