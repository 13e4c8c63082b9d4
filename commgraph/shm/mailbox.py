"""Records between the ranks of one host: to one of them, or to all.

A record has a kind, a number that says which message it is (`meta`), and parts. Records of one kind from one rank to another arrive in
order; a record of another kind than the one asked for is unexpected and kept. Several threads may receive from one rank, each another kind:
one of them reads the ring, and keeps the records of the others for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commgraph.shm.host_memory import HostMemory
from commgraph.shm.pickling import Pickler
from commgraph.shm.recorder import INCOMING
from commgraph.shm.stopped import GONE, LOST, SELF, TIMEOUT, Busy, Stopped

if TYPE_CHECKING:
    import torch

__all__ = ["DICT", "OBJECT", "PIECES", "SIZES", "TENSORS", "Mailbox", "Told", "tensors_with"]

TENSORS, OBJECT, DICT, SIZES, PIECES = 1, 2, 3, 4, 5

Told = tuple[Any, str, int, int, int | None] | None
"""What a caller says of a call that is recorded, or None. It is the record of its coordinator
(`commgraph.coordinator.recorded`), the operation, the kind of the record in a ring, the other rank or the root of a collective, and of a
collective the meta of the record in a ring."""

# Values of `Team.state` of a side that was closed, and of one closed after an error.
_CLOSED, _FAILED = 2, 3

# Bytes of a part from which on it is copied by rendezvous: smaller ones are cheaper through the ring, however small that is.
_RENDEZVOUS_FROM = 64 << 10


def tensors_with(label: int) -> int:
    """Return the kind of records of tensors that were sent with a tag of the user's; 0 is that of messages without one."""
    return TENSORS | label << 8


class Access:
    """The right of one thread to use one side of a ring."""

    __slots__ = ("_lock", "_owner")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def try_take(self) -> bool:
        """Take it, if nobody has it."""
        if not self._lock.acquire(False):
            return False
        self._owner = threading.get_ident()
        return True

    def refuse_owner(self) -> None:
        """Raise `Busy` where this very thread has it: a signal handler calls in, and would wait for itself."""
        if self._owner == threading.get_ident():
            raise Busy("a call of this thread is under way, and a signal handler makes another one")

    def take(self, seconds: float) -> bool:
        """Wait for it; False if that takes longer."""
        if self.try_take():
            return True
        self.refuse_owner()
        if not self._lock.acquire(timeout=seconds):
            return False
        self._owner = threading.get_ident()
        return True

    def give_back(self) -> None:
        """Let another thread have it."""
        self._owner = 0
        self._lock.release()


class Inbox:
    """Unexpected records of one rank, read before a receive asked for them, and the right to read further ones."""

    __slots__ = ("_changed", "_unexpected", "_waiting", "access")

    def __init__(self) -> None:
        self.access = Access()
        # Reentrant, for signal handlers.
        self._changed = threading.Condition()
        self._waiting = 0
        self._unexpected: dict[int, deque[tuple[int, list[Any]]]] = {}

    def has(self, kind: int) -> bool:
        """Whether an unexpected record of that kind was kept."""
        return kind in self._unexpected

    def first(self, kind: int) -> tuple[int, list[Any]]:
        """Return the first unexpected record of that kind; it stays."""
        return self._unexpected[kind][0]

    def pop(self, kind: int) -> tuple[int, list[Any]]:
        """Remove and return the first unexpected record of that kind."""
        with self._changed:
            records = self._unexpected[kind]
            record = records.popleft()
            if not records:
                self._unexpected.pop(kind, None)  # there may be a million kinds
            return record

    def keep_unexpected(self, kind: int, meta: int, parts: list[Any]) -> None:
        """Keep a record for the receive that asks for its kind."""
        with self._changed:
            self._unexpected.setdefault(kind, deque()).append((meta, parts))
            self._changed.notify_all()

    def take_turn(self, kind: int, src: int, timeout_ns: int) -> bool:
        """Wait for the turn to read; False if an unexpected record of that kind was kept, which comes first."""
        if kind in self._unexpected or not (self.access.try_take() or self._wait(kind, src, timeout_ns)):
            return False
        # The thread that had the turn before may have kept one since.
        if kind in self._unexpected:
            self.pass_turn()
            return False
        return True

    def _wait(self, kind: int, src: int, timeout_ns: int) -> bool:
        """Wait while another thread reads; whether it is this one's turn now."""
        self.access.refuse_owner()
        deadline = time.monotonic_ns() + timeout_ns
        with self._changed:
            self._waiting += 1
            try:
                while kind not in self._unexpected:
                    if self.access.try_take():
                        return True
                    left = deadline - time.monotonic_ns()
                    if left <= 0:
                        raise Stopped(TIMEOUT, src)
                    self._changed.wait(left * 1e-9)
                return False
            finally:
                self._waiting -= 1

    def pass_turn(self) -> None:
        """End the turn."""
        self.access.give_back()
        if self._waiting:
            with self._changed:
                self._changed.notify_all()


class Mailbox:
    """One rank's rings to and from the others. Every method raises `commgraph.shm.stopped.Stopped`; a timeout loses and sends nothing."""

    def __init__(self, memory: HostMemory, numbers: Sequence[int] | None = None) -> None:
        """Open the rings.

        Args:
            memory: that holds them.
            numbers: by which methods name its ranks; None: their positions, by which `Stopped` names them in any case.
        """
        n, me = memory.sizes.n, memory.rank_in_group
        self.team = memory.team
        # Number of each rank, and its position.
        named = range(n) if numbers is None else numbers
        self._positions = {number: position for position, number in enumerate(named)}
        self.pickler = Pickler()
        # Bytes of a record for all that can be put without waiting for readers, if they have read all records before it.
        self.room = memory.sizes.broadcast_bytes // 2
        # Bytes sent to each rank, and to all at this rank's own number. Per rank, as several threads may send, each to another one.
        self._sent = dict.fromkeys(named, 0)
        self._me = named[me]
        # Bytes of a record that an empty ring takes at once.
        self._whole = memory.sizes.pair_bytes // 4 - 1024
        self.take = memory.pool.take
        self._broadcast = {named[src]: memory.broadcast_ring(src) for src in range(n)}
        self.mine = self._broadcast[self._me]
        self.outgoing = {named[peer]: memory.pair_ring(me, peer) for peer in range(n) if peer != me}
        self.incoming = {named[peer]: memory.pair_ring(peer, me) for peer in range(n) if peer != me}
        self.inboxes = {peer: Inbox() for peer in self.incoming}
        # Several threads may send to one rank, one record after the other.
        self.writing = {peer: Access() for peer in self.outgoing}
        self._module = memory.native
        # Native calls for plain tensors and dicts of them (native/module_messages.c), where the coordinator has opened them.
        self.native: Any = None
        self._pair_bytes = memory.sizes.pair_bytes

    def enable_rendezvous(self) -> None:
        """Send large parts by rendezvous from now on: sender and receiver copy them from process to process (cross-memory attach)."""
        for ring in self.outgoing.values():
            # A part that fits the ring is sent without waiting for its reader.
            ring.zero_copy_from = max(self._pair_bytes, _RENDEZVOUS_FROM)

    def send(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...], timeout_ns: int, told: Told = None) -> None:
        """Put a record for one rank.

        It returns when the ring has it, which may be before it is read, and the reader those parts that are copied by rendezvous.
        A part is a buffer, or (address, bytes) of memory that the caller keeps alive. `told`: about the call, for the record of calls.
        """
        writing = self.writing[dst]
        if not (writing.try_take() or writing.take(timeout_ns * 1e-9)):
            raise Stopped(TIMEOUT, self._positions[dst])
        try:
            self.outgoing[dst].put(kind, meta, parts, timeout_ns, 0, told)
            self._sent[dst] += _nbytes(parts)
        finally:
            writing.give_back()

    def offer(self, dst: int, kind: int, meta: int, parts: tuple[Any, ...], told: Told = None) -> bool:
        """Put a record where the ring has room for the whole of it; otherwise return False with nothing put. `told`: as for `send`."""
        writing = self.writing[dst]
        if _nbytes(parts) + 8 * len(parts) > self._whole or not writing.try_take():
            return False
        try:
            self.outgoing[dst].put(kind, meta, parts, 0, 0, told)
            self._sent[dst] += _nbytes(parts)
        except Stopped as stopped:
            if stopped.code == TIMEOUT:
                return False
            raise
        finally:
            writing.give_back()
        return True

    def receive(self, src: int, kind: int, timeout_ns: int) -> tuple[int, list[Any]]:
        """Return meta and parts of the next record of that kind: the first part as bytes, the others as writable buffers of their own."""
        inbox, ring = self.inboxes[src], self.incoming[src]
        if not inbox.take_turn(kind, self._positions[src], timeout_ns):
            return inbox.pop(kind)
        try:
            while True:
                found, meta, parts = ring.get(timeout_ns, 0)
                if found == kind:
                    return meta, parts
                inbox.keep_unexpected(found, meta, parts)
        finally:
            inbox.pass_turn()

    def receive_object(self, src: int, timeout_ns: int, told: Told) -> list[Any]:
        """Return the parts of the next object; the call is recorded, as `told` says of it."""
        assert told is not None
        inbox, ring = self.inboxes[src], self.incoming[src]
        if inbox.has(OBJECT) or not inbox.access.try_take():
            # An earlier receive has kept it, or another thread reads.
            record, operation, family, *_ = told
            token = record.begin(operation, "shm", 0, (family, INCOMING, 0), src)
            try:
                _, parts = self.receive(src, OBJECT, timeout_ns)
            except BaseException as error:
                # Nothing is lost: the call can be made again.
                (record.cancel if isinstance(error, Stopped) and error.code == TIMEOUT else record.fail)(token)
                raise
            record.done(token, sum(map(len, parts)))
            return parts
        try:
            while True:
                # The native call writes the entry of an object.
                found, meta, parts = ring.get(timeout_ns, 0, told)
                if found == OBJECT:
                    return parts  # type: ignore[no-any-return]  # as native/module_ring.c has it
                inbox.keep_unexpected(found, meta, parts)
        finally:
            inbox.pass_turn()

    def receive_dict(self, src: int, timeout_ns: int, told: Told) -> dict[str, torch.Tensor] | None:
        """Return the dict of the next record, if the native module describes it; else keep that. Native calls are open.

        `told`: as for `send`.

        Returns:
            None, with nothing lost, for another record, where another thread reads, and where a dict was kept.
        """
        inbox = self.inboxes[src]
        if not inbox.access.try_take():
            return None
        try:
            if inbox.has(DICT):
                return None
            found = self.native.get_dict(self.incoming[src], timeout_ns, told)
            if type(found) is dict:
                return found
            inbox.keep_unexpected(*found)
            return None
        finally:
            inbox.pass_turn()

    def receive_into(self, src: int, kind: int, meta: int, targets: Sequence[tuple[int, int]], owner: object, timeout_ns: int) -> bool:
        """Read the next record of a kind to memory of the caller's.

        Args:
            src: rank that sends it.
            kind: of the record.
            meta: expected of it.
            targets: (address, bytes) for each part.
            owner: keeps that memory alive.
            timeout_ns: deadline in nanoseconds.

        Returns:
            Whether its meta and sizes are those expected; if not nothing was written.
        """
        inbox = self.inboxes[src]
        if not inbox.take_turn(kind, self._positions[src], timeout_ns):
            return self._take_unexpected(inbox, kind, meta, targets)
        try:
            while (found := self._read(src, kind, meta, targets, owner, timeout_ns)) is None:
                pass
            return found
        finally:
            inbox.pass_turn()

    def receive_first(
        self, metas: Mapping[int, int], kind: int, targets: Sequence[tuple[int, int]], owner: object, timeout_ns: int, rest_ns: int
    ) -> tuple[int, bool] | None:
        """Read the next record of a kind, from the first of several ranks that has one, to memory of the caller's.

        Args:
            metas: expected meta by rank; ranks are polled in this order.
            kind, targets, owner: as for `receive_into`.
            timeout_ns: for a record to begin, in nanoseconds. Ranks from which another thread receives are polled once only.
            rest_ns: for the rest of it.

        Returns:
            Its rank, and whether its meta and sizes are those expected (if not nothing was written); None where none came.
        """
        taken: list[int] = []
        deadline = time.monotonic_ns() + timeout_ns
        try:
            while True:
                for src in metas:
                    inbox = self.inboxes[src]
                    if src not in taken and inbox.access.try_take():
                        taken.append(src)
                    if inbox.has(kind):
                        return src, self._take_unexpected(inbox, kind, metas[src], targets)
                at = self._module.any_ring(tuple([self.incoming[src] for src in taken]), max(deadline - time.monotonic_ns(), 0))
                if at < 0:
                    self._see_to(metas, taken)
                    return None
                src = taken[at]
                fits = self._read(src, kind, metas[src], targets, owner, rest_ns)
                if fits is not None:
                    return src, fits
        finally:
            for src in taken:
                self.inboxes[src].pass_turn()

    def _read(self, src: int, kind: int, meta: int, targets: Sequence[tuple[int, int]], owner: object, timeout_ns: int) -> bool | None:
        """Read one record, in this thread's turn: to the targets if it is of that kind, else keep it and return None."""
        ring = self.incoming[src]
        # A record that another receive has begun to read as unexpected is read to its end.
        found, number, sizes = (0, 0, ()) if ring.reading else ring.peek(timeout_ns, 0)
        if found == kind:
            if number != meta or list(sizes) != [nbytes for _, nbytes in targets]:
                return False
            return True if ring.take(timeout_ns, tuple(targets), owner) else None  # None: the writer gave it up
        found, number, parts = ring.get(timeout_ns, 0)
        inbox = self.inboxes[src]
        inbox.keep_unexpected(found, number, parts)
        return self._take_unexpected(inbox, kind, meta, targets) if found == kind else None

    def _take_unexpected(self, inbox: Inbox, kind: int, meta: int, targets: Sequence[tuple[int, int]]) -> bool:
        number, parts = inbox.first(kind)
        if number != meta or [len(part) for part in parts] != [nbytes for _, nbytes in targets]:
            return False
        inbox.pop(kind)
        for part, (address, nbytes) in zip(parts, targets, strict=True):
            memory_at(address, nbytes)[:] = part
        return True

    def _see_to(self, sources: Collection[int], taken: Collection[int]) -> None:
        """Raise if no record can come: one of the sources died or failed, all of them have closed, or this rank has."""
        at = self._positions
        if self.team.state(at[self._me]) >= _CLOSED:
            raise Stopped(SELF, at[self._me])
        lost = self.team.lost()
        states = {src: self.team.state(at[src]) for src in sources}
        gone = [src for src in taken if states[src] >= _CLOSED or (lost == (LOST, at[src]))]
        # Records that they sent before they left are still received.
        if not gone or self._module.any_ring(tuple([self.incoming[src] for src in gone]), 0) >= 0:
            return
        for src in gone:
            if lost == (LOST, at[src]):
                raise Stopped(LOST, at[src])
            if states[src] == _FAILED:
                raise Stopped(GONE, at[src])
        if len(gone) == len(states):
            raise Stopped(GONE, at[gone[0]])

    def unpack(self, parts: list[Any]) -> dict[str, torch.Tensor] | None:
        """Return the dict that the native module described by itself; None for another record."""
        return None if self.native is None else self.native.unpack(parts)

    def broadcast(self, kind: int, meta: int, parts: tuple[Any, ...], timeout_ns: int, call_id: int, told: Told = None) -> None:
        """Put a record for all others. `told`: as for `send`."""
        self.mine.put(kind, meta, parts, timeout_ns, call_id, told)
        self._sent[self._me] += _nbytes(parts)

    def count_broadcast(self, parts: Sequence[Any]) -> None:
        """Count the bytes of a record for all that was put natively."""
        self._sent[self._me] += _nbytes(parts)

    @property
    def broadcast_rings(self) -> tuple[Any, ...]:
        """The rings of records for all, by the ranks that write them."""
        return tuple(self._broadcast.values())

    @property
    def bytes_sent(self) -> int:
        """Bytes put so far."""
        return sum(self._sent.values()) + (0 if self.native is None else self.native.bytes_sent)

    def receive_broadcast(self, src: int, timeout_ns: int, call_id: int, told: Told = None) -> tuple[int, int, list[Any]]:
        """Return kind, meta and parts of the next record that `src` put for all. `told`: as for `send`."""
        return self._broadcast[src].get(timeout_ns, call_id, told)  # type: ignore[no-any-return]  # as native/module_ring.c has it


def memory_at(address: int, nbytes: int) -> memoryview:
    """Return memory of this process as a writable buffer."""
    import ctypes

    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _nbytes(parts: Sequence[Any]) -> int:
    if len(parts) == 1 and type(parts[0]) is bytes:
        return len(parts[0])
    return sum([len(part) if type(part) is bytes else part[1] if type(part) is tuple else memoryview(part).nbytes for part in parts])
