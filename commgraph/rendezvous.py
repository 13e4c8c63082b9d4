"""Where the ranks of a job meet: torch's stores."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from commgraph.deadline import Deadline
from commgraph.errors import BuildError, LaunchError
from commgraph.waiting import interruptible

__all__ = ["PrivateFile", "open_store", "serve_store", "visit_store"]

# Seconds between two attempts to connect to the server of a store.
_RETRY_SECONDS = 0.05
# End of the name of the file whose lock says that a meeting file is in use.
_MARK = ".used"
# Of a store between ranks that are alive. commgraph's own waits in it have deadlines of their own.
_STORE_TIMEOUT = timedelta(minutes=5)


def open_store(init_method: str, *, rank: int, world_size: int, timeout: timedelta, hosted_elsewhere: bool = False) -> dist.Store:
    """Opens the store that an init method names, as torch's rendezvous of that scheme does.

    Args:
        init_method: ``tcp://host:port`` (served by rank 0) or ``file:///path``.
        rank: this rank.
        world_size: number of ranks.
        timeout: how long to wait for rank 0's server.
        hosted_elsewhere: somebody else (torchrun's agent) already serves at that address.

    Raises:
        LaunchError: an init method of another form.
        BuildError: nobody answers, or the port is taken.
    """
    url = urlsplit(init_method)
    try:
        port = url.port
    except ValueError as error:
        raise LaunchError(f"init_method={init_method!r}: {error}") from None
    if url.scheme == "file" and url.path.startswith("/") and not url.netloc:
        # A file that is marked is removed by whoever unmarks it last; torch would count those that have come, and jobs may have died.
        file_store = dist.FileStore(url.path, -1 if Path(f"{url.path}{_MARK}").exists() else world_size)
        file_store.set_timeout(timeout)
        return file_store
    if url.scheme != "tcp" or not url.hostname or not port:
        raise LaunchError(
            f"init_method={init_method!r} is neither tcp://host:port (a host name or address of rank 0's node and a port that is free "
            "there) nor file:///path (a file on storage that all ranks see)"
        )
    serves = rank == 0 and not hosted_elsewhere
    host = url.hostname

    def reach(is_left: Callable[[], bool]) -> dist.Store:
        if serves:
            _await_own_address(host, port, timeout, is_left)
        else:
            _await_server(host, port, timeout, is_left)
        # multi_tenant: a second world of this process at the same address uses the first one's server.
        return dist.TCPStore(host, port, world_size, serves, timeout=timeout, wait_for_workers=False, multi_tenant=True)

    try:
        return interruptible(reach, timeout.total_seconds())
    except (dist.DistError, OSError) as error:
        seconds = f"{timeout.total_seconds():.3g} s"
        if isinstance(error, socket.gaierror):
            hint = f"the name {host!r} did not resolve within {seconds}"
        elif isinstance(error, _NotHereError):
            hint = f"{host} is no address of this host, where rank 0 is to serve, and nothing sent there came here within {seconds}"
        else:
            hint = "the port is taken, or nobody may listen there" if serves else f"rank 0 did not serve there within {seconds}"
        raise BuildError(f"rank {rank} of {world_size} could not meet its peers at {init_method}: {hint} ({error})") from error


def serve_store(host: str) -> dist.Store:
    """Return a store that this process serves, at a port that the system chooses.

    Args:
        host: an address of this host.

    Raises:
        BuildError: it is none, or there is no port left.
    """
    try:
        return dist.TCPStore(host, 0, None, True, timeout=_STORE_TIMEOUT, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        raise BuildError(f"cannot serve a store at {host}: {error}") from error


def visit_store(host: str, port: int, deadline: Deadline, is_left: Callable[[], bool]) -> dist.Store:
    """Return a store that another rank serves already.

    Args:
        host, port: where.
        deadline: until when to try.
        is_left: as `commgraph.meeting.attend` gives it.

    Raises:
        BuildError: nobody answers.
    """
    try:
        _await_server(host, port, timedelta(seconds=deadline.left()), is_left)
        return dist.TCPStore(host, port, None, False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        raise BuildError(f"the store at {host} port {port} does not answer: {error}") from error


class PrivateFile:
    """Marks a file in which ranks of one host meet as in use, while this object lives; the last one of all processes removes it.

    The mark is a lock on a second file, which the system takes back from a process that was killed.
    """

    def __init__(self, path: Path) -> None:
        """Mark a file, which need not be there yet, and remove those in its directory that no living process has marked."""
        self._path, self._mark = path, path.with_name(path.name + _MARK)
        for other in path.parent.glob(f"*{_MARK}"):
            if other != self._mark:
                with contextlib.suppress(OSError):
                    _remove_unused(other)
        while True:
            self._fd = os.open(self._mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), self._mark.stat()):
                    break
            os.close(self._fd)  # the last one to use it has just removed it

    def close(self) -> None:
        """Take the mark back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                _remove_unused(self._mark)


def _remove_unused(mark: Path) -> None:
    """Remove a marked file and its mark if no living process has it."""
    fd = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error if it is in use
        if os.path.samestat(os.fstat(fd), mark.stat()):
            mark.with_name(mark.name.removesuffix(_MARK)).unlink(missing_ok=True)
            mark.unlink()
    finally:
        os.close(fd)


class _NotHereError(OSError):
    """An address is not this host's."""


def _await_own_address(host: str, port: int, timeout: timedelta, is_left: Callable[[], bool]) -> None:
    """Wait until a name resolves, to an address at which this host is reached: one of its own, or one that is forwarded to it.

    torch would wait as well, print a stack of C++ for each attempt, and not keep the deadline.
    """
    deadline = Deadline.after(timeout.total_seconds())
    while not is_left():
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            if any(_is_own(family, there) for family, _, _, _, there in found) or _comes_here(host, port, min(1.0, deadline.left())):
                return
            raise _NotHereError(f"it resolves to {', '.join(sorted({str(there[0]) for *_, there in found}))}")
        except OSError:
            if deadline.has_passed:
                raise
        time.sleep(min(_RETRY_SECONDS, deadline.left()))


def _is_own(family: int, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def _comes_here(host: str, port: int, seconds: float) -> bool:
    """Whether a connection to that place arrives at this host, as through a forwarded address or port."""
    try:
        # Both kinds of addresses, as torch's store listens.
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else None
        listener = socket.create_server(("", port)) if listener is None else listener
    except OSError:  # the port is taken: torch's store says so
        return True
    with listener:
        listener.setblocking(False)
        try:
            with contextlib.closing(socket.create_connection((host, port), seconds)):
                listener.accept()[0].close()
                return True
        except OSError:
            return False


def _await_server(host: str, port: int, timeout: timedelta, is_left: Callable[[], bool]) -> None:
    """Wait until somebody accepts connections there. torch would wait as well, and print a stack for each attempt that fails."""
    deadline = Deadline.after(timeout.total_seconds())
    while not is_left():
        try:
            with contextlib.closing(socket.create_connection((host, port), deadline.left())):
                return
        except OSError:
            if deadline.has_passed:
                raise
        time.sleep(min(_RETRY_SECONDS, deadline.left()))
