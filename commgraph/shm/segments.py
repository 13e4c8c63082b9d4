"""Nameless shared memory: made by one process, opened by its peers through ``/proc``.

A memfd has no name that could be left behind or met by chance, is not bound by the size of ``/dev/shm``, and goes with the last process
that maps it. It is reserved in full when it is made, and sealed, so that no access to it can end in a SIGBUS. Where there are no memfds no
two processes are found to be on one host (`commgraph.hosts`), and message queues go through sockets.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat

from commgraph.errors import BuildError

__all__ = ["create", "open_peer", "why_impossible"]

_SEALS = 0x0002 | 0x0004  # F_SEAL_SHRINK | F_SEAL_GROW


def create(nbytes: int, name: str = "commgraph") -> int:
    """Return a descriptor of `nbytes` of zeroed memory; `name` is shown in ``/proc``.

    Raises:
        BuildError: there is no memory for it, saying how much is needed.
    """
    fd = -1
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)  # a memfd is open to every user at first
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except (OSError, AttributeError) as error:  # AttributeError: this C library has no memfds
        if fd >= 0:
            os.close(fd)
        raise BuildError(
            f"{nbytes} bytes of shared memory are needed and could not be reserved ({error}). They count as memory of this process: make "
            "room (the cgroup's limit, RLIMIT_FSIZE, RLIMIT_NOFILE), or ask for less by CommunicatorOptions(shm_bytes=..., "
            "queue_bytes=...) or shm=False"
        ) from error
    return fd


def why_impossible() -> str | None:
    """Return why this process cannot make any shared memory, not even a page; None where it can."""
    try:
        os.close(create(mmap.PAGESIZE))
    except BuildError as error:
        return f"{error.__cause__}"
    return None


def open_peer(pid: int, fd: int, nbytes: int) -> int:
    """Return a descriptor of this process for the memory that process `pid` has as `fd`.

    Raises:
        OSError: it cannot be opened, belongs to another user, or is something else.
    """
    here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(here)
    if found.st_uid != os.geteuid():  # root could open it all the same
        os.close(here)
        raise OSError(f"descriptor {fd} of process {pid} belongs to user {found.st_uid}, and this process to user {os.geteuid()}")
    if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
        os.close(here)
        raise OSError(f"descriptor {fd} of process {pid} is not the memory that it announced")
    return here
