"""The memory of a message queue: one segment, which its writer creates and the readers on its host open.

Its parts::

    page 0      a number that only this segment has; the participant that was lost first, if any
    members     the writer, then one for each local reader
    ring        from the writer to them
"""

from __future__ import annotations

import os
import struct
from typing import Any, Self

from commgraph.errors import BuildError
from commgraph.shm import segments
from commgraph.shm.stopped import GONE, LOST

__all__ = ["FAULT_WRITER", "WRITER_CLOSED", "QueueMemory"]

_PAGE = 4096
_NONCE_BYTES = 16
_FAULT = struct.Struct("=I")
# Value of the fault word: 0 for nobody, 1 + reader, or this for the writer.
FAULT_WRITER = 0xFFFFFFFF
# Most bytes of free memory that the pool keeps for results.
_POOL_BYTES = 64 << 20

WRITER_CLOSED = "it closed the queue, and all that it had sent was read"


class QueueMemory:
    """One side's view of the memory of a queue.

    Attributes:
        team, ring: objects of the native module.
        fd: the writer's descriptor, which readers open; -1 on readers.
        nbytes: of the whole.
        nonce: 16 random bytes that only this memory has.
    """

    def __init__(self, native: Any, fd: int, nbytes: int, member: int, n_local: int, capacity: int) -> None:
        self._segment = native.Segment(fd, nbytes)
        self.team = native.Team(self._segment, _PAGE, 1 + n_local, member, 1 + n_local)
        pool = native.Pool(_POOL_BYTES)
        self.ring = native.Ring(self.team, pool, _ring_offset(native, n_local), 0, 1, n_local, capacity, False, False)
        self.fd = -1
        self.nbytes = nbytes
        self.nonce = b""

    @classmethod
    def create(cls, native: Any, n_local: int, capacity: int) -> Self:
        """Make the memory; return the writer's view.

        Raises:
            BuildError: there is no memory for it.
        """
        nbytes = _pages(_ring_offset(native, n_local) + native.ring_bytes(n_local, capacity))
        try:
            fd = segments.create(nbytes)
        except BuildError as error:
            raise BuildError(
                f"MessageQueue.create: {nbytes} bytes of shared memory are needed and could not be reserved ({error.__cause__}). They "
                "count as memory of this process: make room (cgroup limit, RLIMIT_FSIZE), or ask for smaller or fewer chunks"
            ) from error
        try:
            nonce = os.urandom(_NONCE_BYTES)
            os.pwrite(fd, nonce, 0)
            self = cls(native, fd, nbytes, 0, n_local, capacity)
        except BaseException:
            os.close(fd)
            raise
        self.fd, self.nonce = fd, nonce
        return self

    @classmethod
    def open(cls, native: Any, owner: tuple[int, int, int], nonce: bytes, reader: int, n_local: int, capacity: int) -> Self:
        """Open the memory; return a reader's view. `owner` is the writer's (process, descriptor, bytes).

        Raises:
            OSError: it cannot be opened, or is another's.
            ValueError: this reader has attached before.
        """
        fd = segments.open_peer(*owner)
        try:
            if os.pread(fd, _NONCE_BYTES, 0) != nonce:
                raise OSError("another segment is open there")
            return cls(native, fd, owner[2], 1 + reader, n_local, capacity)
        finally:
            os.close(fd)

    @property
    def fault(self) -> int:
        """The fault word, which is the participant that was lost first, as recorded in the memory."""
        with memoryview(self._segment) as view:
            return int(_FAULT.unpack_from(view, _NONCE_BYTES)[0])

    def blame(self, fault: int) -> None:
        """Record the participant that was lost, unless one is recorded already. Close the team afterwards, which publishes it."""
        if not self.fault:
            with memoryview(self._segment) as view:
                _FAULT.pack_into(view, _NONCE_BYTES, fault)

    def blame_of(self, code: int, member: int, writer_pid: int = 0) -> tuple[int | None, str]:
        """Return the reader that was lost first (None: the writer), and how, after the native module found that `member` died or left."""
        if code == GONE:
            # It may have left because of an earlier loss, which this side has not seen yet.
            if fault := self.fault:
                how = "another side found that it died or left"
                return (None if fault == FAULT_WRITER else fault - 1), how
            code, member = self.team.lost() or (code, member)
        if code == LOST:
            how = "its process died, or ended without close()"
        else:
            how = "it closed the queue" if member else WRITER_CLOSED
        if member:
            return member - 1, how
        return None, how + (f" (process {writer_pid})" if writer_pid else "")

    def let_go(self) -> None:
        """Close the descriptor: no reader can open the memory any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _ring_offset(native: Any, n_local: int) -> int:
    return _PAGE + _pages(int(native.group_layout(1 + n_local, _PAGE)[0]))
