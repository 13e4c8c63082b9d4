"""`Process`: the identity of a process, by which its peers on the same host notice that it has ended."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

__all__ = ["Process", "seconds_since_boot", "start_time"]


class Process(msgspec.Struct, frozen=True):
    """A process of one boot of a kernel.

    Attributes:
        boot_id: identity of the boot; empty where there is none (another system than Linux).
        pid_namespace: inode of the pid namespace in which `pid` is meant; 0 where there is none.
        pid: process id.
        started: when it started, in clock ticks since boot: pids are used again.
    """

    boot_id: str
    pid_namespace: int
    pid: int
    started: str

    @classmethod
    def own(cls) -> Self:
        """Return that of the calling process."""
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino
        except OSError:
            namespace = 0
        return cls(_read(Path("/proc/sys/kernel/random/boot_id")), namespace, os.getpid(), start_time(os.getpid()))

    def can_watch(self, other: Process) -> bool:
        """Whether this process would notice the end of `other`: another process of the same host and pid namespace."""
        here, there = (self.boot_id, self.pid_namespace), (other.boot_id, other.pid_namespace)
        return here == there and bool(self.boot_id and self.pid_namespace and other.started) and self.pid != other.pid

    @property
    def seconds_started(self) -> float:
        """When it started, in seconds since boot; 0 where that is unknown."""
        return int(self.started) / os.sysconf("SC_CLK_TCK") if self.started.isdigit() else 0.0

    def has_ended(self) -> bool:
        """Whether it has ended, reaped by its parent or not; asked of a process that the caller can watch."""
        if start_time(self.pid) != self.started:
            return True
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:  # no such system call, or no descriptor left: an unreaped process is taken for a living one
            return False
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(0))
        finally:
            os.close(fd)


def seconds_since_boot() -> float:
    """Return the time on the clock that processes' start times are of; another where the system has none."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def count_sharing(pids: Iterable[int]) -> int:
    """Return how many of these processes of this host may run on a core on which the calling thread may; those that do not tell count."""
    mine, here = _cores_of(0), os.getpid()
    return sum(pid == here or mine is None or (theirs := _cores_of(pid)) is None or not mine.isdisjoint(theirs) for pid in pids)


def _cores_of(pid: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(pid)
    except (OSError, AttributeError):  # AttributeError: another system than Linux
        return None


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot, from ``/proc``; empty where that cannot be read."""
    # Field 22; the name of the command, field 2 in parentheses, may itself contain spaces and parentheses.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
