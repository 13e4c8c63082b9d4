"""Attaches to a job of this user on this host: reads its records from outside, twice, and says who waits for whom."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from commgraph.doctor.stacks import stack_of
from commgraph.shm import recorder as layout
from commgraph.trace.diagnose import Diagnosis, diagnose
from commgraph.trace.read import RankRecord, open_numbers, read_file, read_process, recorded_processes

__all__ = ["NotRecordedError", "attach_to_job", "attach_to_process", "attach_to_records"]

# Seconds between two looks, by which a rank that runs is told from one that hangs.
_BETWEEN: Final = 0.5
# Part of a core that a thread which mostly sleeps does not use.
_BUSY: Final = 0.2
# Ranks of a world whose Python stacks are read: each takes a tenth of a second, and where all are outside of calls the first ones tell.
_STACKS: Final = 16
_ADVICE: Final = (
    "Start the job with COMMGRAPH_RECORD=1 (records in memory), COMMGRAPH_RECORD=FOLDER (files that stay), or "
    "CommunicatorOptions(record=True)"
)


class NotRecordedError(Exception):
    """There is no record of such a job."""


def attach_to_process(pid: int) -> list[Diagnosis]:
    """Diagnose the worlds of which a process has ranks.

    Raises:
        NotRecordedError: it has no record, or cannot be read; the text says what is known all the same.
    """
    try:
        worlds = {record.world for record in read_process(pid)}
    except FileNotFoundError:
        raise NotRecordedError(f"there is no process {pid} on this host") from None
    except PermissionError:
        raise NotRecordedError(f"process {pid} belongs to another user: run the doctor as that user") from None
    if not worlds:
        raise NotRecordedError(
            f"process {pid} {_state_of(pid, pid, None)[0] or 'runs'}{_shares(pid)}; its calls are not recorded. {_ADVICE}"
        )
    return _diagnose(lambda: [record for record in _everywhere() if record.world in worlds])


def attach_to_job(name: str) -> list[Diagnosis]:
    """Diagnose the worlds that fit a name: the begin of a world's name, a launcher's job, a context, or a part of the command line.

    Raises:
        NotRecordedError: none does; the text lists those that there are.
    """
    records = _everywhere()
    worlds = {record.world for record in records if _fits(record, name)}
    if not worlds:
        known = sorted({f"{record.world[:12]} ({record.facts['program']})" for record in records})
        listing = "".join(f"\n  {line}" for line in known) or " none"
        raise NotRecordedError(f"no recorded job of this user on this host is called {name!r}; recorded worlds:{listing}\n{_ADVICE}")
    return _diagnose(lambda: [record for record in _everywhere() if record.world in worlds])


def attach_to_records(paths: Sequence[Path]) -> list[Diagnosis]:
    """Diagnose the worlds whose records are in files or folders, as of ranks on other hosts.

    Raises:
        NotRecordedError: there is no record.
    """
    files = [file for path in paths for file in (sorted(path.glob(f"*{layout.SUFFIX}")) if path.is_dir() else [path])]

    def read() -> list[RankRecord]:
        found = []
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                found.append(read_file(file))
        return found

    if not read():
        raise NotRecordedError(f"no record of calls in {', '.join(map(str, paths))}. {_ADVICE}")
    return _diagnose(read)


def _everywhere() -> list[RankRecord]:
    """Return the records of all processes of this user; each once, from its own process where that lives."""
    found: dict[tuple[str, int], RankRecord] = {}
    for pid in recorded_processes():
        with contextlib.suppress(OSError):  # it has just ended
            for record in read_process(pid):
                if record.facts["pid"] == pid or (record.world, record.rank) not in found:
                    found[record.world, record.rank] = record
    return list(found.values())


def _fits(record: RankRecord, name: str) -> bool:
    facts = record.facts
    contexts = {group.context for group in record.groups}
    return facts["world"].startswith(name) or name in (facts["job"], *contexts) or name in facts["program"]


def _diagnose(read: Callable[[], list[RankRecord]]) -> list[Diagnosis]:
    """Look twice, and diagnose each world."""
    before: dict[tuple[str, int], RankRecord] = {(record.world, record.rank): record for record in read()}
    used = {key: _state_of(*_thread_of(record), None)[1] for key, record in before.items()}
    time.sleep(_BETWEEN)
    after: list[RankRecord] = read()
    here = socket.gethostname()
    worlds: dict[str, list[RankRecord]] = {}
    for record in after:
        if not record.facts.get("queue"):
            worlds.setdefault(record.world, []).append(record)
    found = []
    for world, records in worlds.items():
        now, processes, stacks = {}, {}, _STACKS
        for record in records:
            key = (world, record.rank)
            local = record.facts["host"] == here
            now[record.rank] = time.monotonic_ns() if local else time.time_ns() - record.to_real
            if local:
                does = _state_of(*_thread_of(record), used.get(key))[0]
                # A rank in a call: the record says where.
                if does and not does.startswith("has ended") and stacks and not open_numbers(record):
                    does, stacks = f"{does}, {stack_of(*_thread_of(record))}", stacks - 1
                processes[record.rank] = does
        earlier = [record for (of, _), record in before.items() if of == world]
        found.append(diagnose(records, now, processes=processes, before=earlier))
    return found


def _thread_of(record: RankRecord) -> tuple[int, int]:
    return int(record.facts["pid"]), int(record.facts.get("native_thread", record.facts["pid"]))


def _state_of(pid: int, thread: int, before: int | None) -> tuple[str, int]:
    """Return what a rank's process does, where that explains a hang, and the processor time of its thread in ticks.

    Args:
        pid, thread: of the rank.
        before: ticks at the look before; None: there was none.
    """
    try:
        fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ("has ended" if not Path(f"/proc/{pid}").exists() else "has ended the thread of this rank"), 0
    state, ticks = fields[0], int(fields[11]) + int(fields[12])
    if state in "Tt":
        return "is stopped (SIGSTOP, or a debugger)", ticks
    if state in "ZX":
        return "has ended", ticks
    if state == "D":
        return "waits for the kernel (a disk, a network file system)", ticks
    if before is not None:
        share = (ticks - before) / os.sysconf("SC_CLK_TCK") / _BETWEEN
        # One that is ready to run computes too, where others have taken the cores meanwhile.
        if share > _BUSY or state == "R":
            return f"computes: its thread used {min(share, 1):.0%} of a core while the doctor looked", ticks
        return "sleeps or waits outside of commgraph", ticks
    return "", ticks


def _shares(pid: int) -> str:
    """Say how much memory of commgraph's a process has mapped."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        count = sum("/memfd:commgraph " in line for line in lines)
        return f" and has {count} groups in shared memory" if count else ""
    return ""
