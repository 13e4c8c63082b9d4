"""The record of one side of a `commgraph.MessageQueue`, where COMMGRAPH_RECORD asks for one."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

from commgraph.deadline import Timeout
from commgraph.errors import CollectiveTimeoutError, ConcurrentCallError
from commgraph.shm import recorder as records
from commgraph.shm.queue_sides import Side, Writer
from commgraph.shm.recorder import EXCHANGE, INCOMING, OUTGOING, Recorder

__all__ = ["RecordedSide", "side_of"]

# Calls that the ring of a queue holds.
_CALLS: Final = 1 << 12
_FAMILY: Final = 4


def side_of(side: Side, environ: Mapping[str, str], n_readers: int, reader: int | None) -> Side:
    """Return `side`, or in its place one that records its calls. `reader`: which one it is, None for the writer."""
    said = environ.get("COMMGRAPH_RECORD", "")
    if said in ("", "0"):
        return side
    recorded: Any = RecordedSide(side, True if said == "1" else said, n_readers, 0 if reader is None else reader + 1)
    return recorded  # type: ignore[no-any-return]  # it has all that a Side has


class RecordedSide:
    """A side that records its calls, and is in everything else the side that it was made of.

    Its record has the writer as rank 0 and reader n as rank n + 1. Bytes are in the writer's record only: of what went through memory.
    """

    def __init__(self, side: Side, setting: bool | str, n_readers: int, rank: int) -> None:
        self._side: Any = side
        self._recorder = Recorder(setting, _CALLS, f"{side.name}-{'writer' if rank == 0 else f'reader{rank - 1}'}", None)
        facts = {"world": side.name, "rank": rank, "world_size": n_readers + 1, "node": 0, "nodes": 1, "local_rank": rank}
        here = {"host": socket.gethostname(), "pid": os.getpid(), "thread": threading.get_ident(), "program": " ".join(sys.argv)[:500]}
        self._recorder.note(records.FACTS, {**facts, **here, "job": "", "queue": True})
        group = {"context": "", "name": side.name, "uid": side.name, "ranks": [[0, n_readers, 1]], "rank_in_group": rank}
        number = self._recorder.note(records.GROUP, group)
        self._calls = self._recorder.native.of(number, number)
        self._put_bytes = 0
        if isinstance(side, Writer):
            put = side._put

            def measured(kind: int, meta: int, parts: tuple[Any, ...], timeout_ns: int, posted: int) -> None:
                self._put_bytes = records.bytes_of(parts)
                put(kind, meta, parts, timeout_ns, posted)

            side._put = measured

    def __getattr__(self, name: str) -> Any:
        """Return what the side has."""
        return getattr(self._side, name)

    def wait_until_ready(self, timeout: Timeout = None) -> None:
        """Wait until all readers have attached."""
        self._record("wait_until_ready", EXCHANGE, lambda: self._side.wait_until_ready(timeout))

    def enqueue(self, obj: Any, timeout: Timeout = None) -> None:
        """Send an object."""
        self._record("enqueue", OUTGOING, lambda: self._side.enqueue(obj, timeout))

    def dequeue(self, timeout: Timeout = None) -> Any:
        """Return the next object."""
        return self._record("dequeue", INCOMING, lambda: self._side.dequeue(timeout))

    def _record(self, operation: str, direction: int, act: Any) -> Any:
        record = self._calls
        # The other side of an enqueue are all readers.
        token = record.begin(operation, "queue", 0, (_FAMILY, direction, 0), 0 if direction == INCOMING else -1)
        try:
            result = act()
        except BaseException as error:
            if token is not None:
                unmade = isinstance(error, CollectiveTimeoutError | ConcurrentCallError)
                (record.cancel if unmade else record.fail)(token)
            raise
        if token is not None:
            record.done(token, self._put_bytes if direction == OUTGOING else None)
        return result

    def release(self) -> None:
        """Close the side without waiting, and the descriptor of the record."""
        self._side.release()
        self._recorder.close()
