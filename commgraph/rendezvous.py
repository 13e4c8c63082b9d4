"""Where the ranks of a job meet: torch's stores."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from commgraph.deadline import Deadline
from commgraph.errors import BuildError, LaunchError
from commgraph.waiting import interruptible

__all__ = ["open_store"]

# Seconds between two attempts to connect to the server of a store.
_RETRY_SECONDS = 0.05


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
        file_store = dist.FileStore(url.path, world_size)
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
        if not serves:
            _await_server(host, port, timeout, is_left)
        # multi_tenant: a second world of this process at the same address uses the first one's server.
        return dist.TCPStore(host, port, world_size, serves, timeout=timeout, wait_for_workers=False, multi_tenant=True)

    try:
        return interruptible(reach, timeout.total_seconds())
    except (dist.DistError, OSError) as error:
        hint = (
            "the port is taken, or is not one of this machine's addresses"
            if serves
            else f"rank 0 did not serve there within {timeout.total_seconds():.3g} s"
        )
        raise BuildError(f"rank {rank} of {world_size} could not meet its peers at {init_method}: {hint} ({error})") from error


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
