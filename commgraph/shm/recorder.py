"""The record of one rank's calls: a ring of entries in memory that other processes can read, while the job runs, hangs or after it.

The memory is nameless, and goes with the last process that has it open (each rank keeps those of its neighbours on the host open, so
that the record of a killed rank stays readable), or a file in a folder that the user has named. Layout, little-endian::

    0               header (`HEADER`)
    texts_offset    texts, each a word (kind << 24 | bytes) and the bytes; an entry refers to a text by its number
    entries_offset  `capacity` entries (`ENTRY`); the n-th call is in entry n modulo capacity, or in the next one that is not under way

Texts of the kind `GROUP` and `FACTS` are JSON: the ranks of a group, and what is known about the rank. Times of entries are those of
CLOCK_MONOTONIC; the header says what the calendar's clock showed at one such time, and how far that is from rank 0's clock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from commgraph.errors import BackendUnavailableError, BuildError
from commgraph.shm import native_module, segments
from commgraph.shm.kinds import KINDS

__all__ = [
    "CANCELLED",
    "COLLECTIVE",
    "DONE",
    "ENTRY",
    "EXCHANGE",
    "FACTS",
    "FAILED",
    "GROUP",
    "HEADER",
    "INCOMING",
    "MAGIC",
    "NAME",
    "OPEN",
    "OUTGOING",
    "SUFFIX",
    "VERSION",
    "Recorder",
    "bytes_of",
    "runs_of",
]

MAGIC: Final = b"CGRECORD"
VERSION: Final = 1
SUFFIX: Final = ".cgrecord"
NAME: Final = "commgraph-record"
"""Of the memory in ``/proc``, where a link /proc/PID/fd/N shows ``/memfd:commgraph-record (deleted)``."""

HEADER: Final = struct.Struct("<8sIIQQQQQQQqqqq")
"""Magic, version, bytes of an entry, capacity, texts_offset, texts_bytes, entries_offset, bytes of texts that are used, number of the
next entry, entries dropped; CLOCK_MONOTONIC and CLOCK_REALTIME at one moment, what is to be added to the latter for rank 0's, and its
error: ns."""
ENTRY: Final = struct.Struct("<QqqQQQIHHHHiiHBB6qHB5x")
"""State (number << 3 | OPEN ...), begin, end, sequence, bytes, thread; numbers of the texts of site, group, operation, strategy; tensors;
peer, tag; text of the dtype; dimensions, kind; shape; text of the reduction, family (`commgraph.coordinator.recorded`)."""
_CLOCKS: Final = struct.Struct("<qqqq")
_CLOCKS_OFFSET: Final = HEADER.size - _CLOCKS.size

CANCELLED, OPEN, DONE, FAILED = 0, 1, 2, 3
COLLECTIVE, OUTGOING, INCOMING, EXCHANGE = 0, 1, 2, 3
GROUP, FACTS = 2, 3

_TEXTS_OFFSET: Final = 4096
# Of texts, for 2,000 places in the code; groups come on top. A record without room for a text shows none.
_TEXTS_BYTES: Final = 512 << 10
_PAGE: Final = 4096
# Neighbours whose memory a rank keeps open.
_NEIGHBOURS: Final = 4

_PACKAGE: Final = Path(__file__).parents[1]
# Files with the code of operations, between whose frames no user's can be.
_OPERATIONS: Final = (f"{_PACKAGE / 'coordinator'}/", str(_PACKAGE / "shm" / "mailbox.py"))
# Parts of the package that use it as a program of a user's does: the places of calls are in them.
_PROGRAMS: Final = frozenset({"bench", "demo", "generate.py", "selftest.py"})
# Other code between a call and its caller: that of torch, and what torch writes (a graph; `_written_code`).
_OTHERS: Final = (f"{Path(torch.__file__).parent}/", contextlib.__file__, functools.__file__, "<eval_with_key>")


def runs_of(ranks: Sequence[int]) -> list[list[int]]:
    """Return numbers as [first, last, step] of each run of equal steps: a group of 100,000 ranks is a few."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs:
            first, last, step = runs[-1]
            if first == last and rank > last:
                runs[-1] = [first, rank, rank - first]
                continue
            if first != last and rank - last == step:
                runs[-1][1] = rank
                continue
        runs.append([rank, rank, 1])
    return runs


class Recorder:
    """Writes the record of one rank.

    Attributes:
        native: object that writes entries (native/module_recorder.c).
        setting: as it was asked for: True, or a folder.
        place: of the memory, for other processes on the host: (pid, descriptor, bytes); descriptor -1 for a file.
    """

    def __init__(self, setting: bool | str, calls: int, name: str, native_tensors: Callable[[Any], Any] | None) -> None:
        """Make the memory.

        Args:
            setting: True, or the folder for the file.
            calls: how many the ring holds; rounded up to a power of two.
            name: of the file, without its suffix.
            native_tensors: makes the native object that reads tensors; None where no call has tensors.

        Raises:
            BackendUnavailableError: there is no native module, which writes records.
            BuildError: no memory, or no file.
        """
        module = native_module.load()
        if module is None:
            raise BackendUnavailableError(
                f"calls cannot be recorded without the native module, which is missing ({native_module.why_missing()}): unset "
                "COMMGRAPH_RECORD and leave out CommunicatorOptions(record=...)"
            )
        capacity = 1 << max(calls - 1, 1).bit_length()
        entries_offset = _TEXTS_OFFSET + _TEXTS_BYTES
        nbytes = entries_offset + capacity * ENTRY.size
        self.setting = setting
        self._path = None if setting is True else Path(str(setting)) / f"{name}{SUFFIX}"
        self._fds = [segments.create(nbytes, NAME) if self._path is None else _create_file(self._path, nbytes)]
        os.pwrite(
            self._fds[0],
            HEADER.pack(
                MAGIC,
                VERSION,
                ENTRY.size,
                capacity,
                _TEXTS_OFFSET,
                _TEXTS_BYTES,
                entries_offset,
                0,
                0,
                0,
                time.monotonic_ns(),
                time.time_ns(),
                0,
                -1,
            ),
            0,
        )
        segment = module.Segment(self._fds[0], nbytes)
        self._memory = memoryview(segment)
        names = {dtype: str(dtype).removeprefix("torch.") for dtype in _dtypes()}
        kinds = {kind: names[dtype] for dtype, kind in KINDS.items()}
        self.native = module.Recorder(
            segment,
            None if native_tensors is None else native_tensors(module),
            site_of_job,
            _OPERATIONS,
            (*_own_code(), *_OTHERS, _written_code()),
            names,
            kinds,
        )
        self.place = (os.getpid(), -1 if self._path is not None else self._fds[0], nbytes)
        if self._path is not None:
            os.close(self._fds.pop())

    def note(self, kind: int, value: Mapping[str, Any]) -> int:
        """Append a text of JSON; return its number."""
        number: int = self.native.note(kind, json.dumps(value, separators=(",", ":")))
        return number

    def set_clock(self, offset_ns: int, error_ns: int) -> None:
        """Say how far the calendar's clock of this host is behind that of rank 0's."""
        _CLOCKS.pack_into(self._memory, _CLOCKS_OFFSET, time.monotonic_ns(), time.time_ns(), offset_ns, error_ns)

    def keep(self, places: Sequence[tuple[int, int, int]], index: int) -> None:
        """Keep the memory of neighbours open: the next of `places`, in which this rank's is at `index`."""
        for step in range(1, min(len(places), _NEIGHBOURS + 1)):
            pid, fd, nbytes = places[(index + step) % len(places)]
            if fd >= 0 and pid != os.getpid():
                with contextlib.suppress(OSError):  # a process that has ended, or may not be read: its record goes with it
                    self._fds.append(segments.open_peer(pid, fd, nbytes))

    def close(self) -> None:
        """Close the descriptors. The memory goes with the calls that still refer to it; a file stays."""
        while self._fds:
            os.close(self._fds.pop())


def bytes_of(parts: Sequence[Any]) -> int:
    """Return the bytes of the parts of a record of the mailbox: bytes, buffers, and (address, bytes)."""
    if len(parts) == 1 and type(parts[0]) is bytes:
        return len(parts[0])
    return sum([part[1] if isinstance(part, tuple) else memoryview(part).nbytes for part in parts])


def site_of_job() -> str | None:
    """Return where the job of a lane that runs on this thread was begun; None elsewhere."""
    site: str | None = getattr(threading.current_thread(), "commgraph_site", None)
    return site


def _own_code() -> list[str]:
    """Return what the names of the package's files begin with, but for those of programs."""
    return [f"{part}/" if part.is_dir() else str(part) for part in _PACKAGE.iterdir() if part.name not in _PROGRAMS]


def _written_code() -> str:
    """Return what the names of files begin with that torch's inductor writes: its own places, or where the user has sent them."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_"


def _dtypes() -> list[torch.dtype]:
    return [one for one in vars(torch).values() if isinstance(one, torch.dtype)]


def _create_file(path: Path, nbytes: int) -> int:
    """Return a descriptor of a new file of zeros.

    Raises:
        BuildError: it could not be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
    except OSError as error:
        raise BuildError(f"the record of calls could not be made as {path} with {nbytes} bytes: {error}") from error
    return fd
