"""Take from one of two ranks what shared memory needs, and print which nodes, strategies and results the two get.

``unshared.py RANK PORT LACK`` is one rank; one of them lacks LACK.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

import commgraph as cg
from commgraph import hosts

_PR_SET_DUMPABLE = 4


def refuse(number: int) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def without_proc() -> None:
    real_open, real_stat, real_list = os.open, os.stat, os.listdir

    def hidden(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(("/proc", "/dev/fd")):
                raise FileNotFoundError(errno.ENOENT, "no /proc", str(path))
            return real(path, *args, **kwargs)

        return call

    os.open, os.stat, os.listdir = hidden(real_open), hidden(real_stat), hidden(real_list)  # type: ignore[assignment]  # of tests
    hosts._boot_id = str


def drop_capabilities() -> None:
    """Give up the right of root to read the memory of every process."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def take(lack: str) -> None:
    """Take away what this rank is to lack, before it has met the other."""
    if lack == "memfd":
        os.memfd_create = refuse(errno.EPERM)  # as a seccomp filter does
    elif lack == "descriptors":
        os.memfd_create = refuse(errno.EMFILE)
    elif lack == "space":
        os.posix_fallocate = refuse(errno.ENOSPC)  # a full cgroup
    elif lack == "file sizes":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    elif lack == "large files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    elif lack == "proc":
        without_proc()
    elif lack == "native module":
        sys.modules["commgraph.shm._native"] = None  # type: ignore[assignment]  # which refuses its import


LARGE: dict[str, Callable[[Any], Any]] = {
    "broadcast": lambda g: g.broadcast(torch.ones(1 << 20), src=1),
    "message": lambda g: g.send(torch.ones(4 << 20), 0) if g.rank else g.recv([4 << 20], torch.float32, 1),
}


def refused(world: cg.World, rank: int, name: str, call: Callable[[Any], Any]) -> str:
    """Return the error of a call for which one rank can no longer read the memory of the other."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
    ctx = world.context(cg.Layout(2, tp=2), name=name)
    ctx.tp.barrier()
    if rank == 1:
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    ctx.tp.barrier()
    try:
        call(ctx.tp)
    except cg.CommGraphError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        ctx._drop()
    return "none"


def main() -> None:
    rank, port, lack = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if lack == "dumpable":
        drop_capabilities()
    elif rank == (0 if lack == "large files" else 1):  # rank 0 makes the memory of a group
        take(lack)
    began = time.monotonic()
    world = cg.World.connect(f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=60)
    ctx = world.context(cg.Layout(2, tp=2), name="a")
    found: dict[str, Any] = {"nodes": list(world.nodes.values()), "first": ctx.tp.communicators["all_reduce"][0]}
    found["built"] = round(time.monotonic() - began, 2)
    found["sum"] = ctx.tp.all_reduce(torch.ones(4)).tolist()
    if lack == "dumpable":
        found["errors"] = [refused(world, rank, name, call) for name, call in LARGE.items()]
        again = world.context(cg.Layout(2, tp=2), name="again")
        found["again"] = float(again.tp.broadcast(torch.full([1 << 20], float(rank)), src=1).mean())
    print(json.dumps(found), flush=True)
    os._exit(0)  # a rank that lacks so much may not be able to close


if __name__ == "__main__":
    main()
