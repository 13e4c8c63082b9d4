"""Builds in processes that die, end early, come again, or find what others have left. Children are forked: importing torch takes longest.

    python builds.py <scenario> <folder>

Each scenario prints a line of JSON for each of its cells.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commgraph as cg
from tests.helpers import free_port

FORK = mp.get_context("fork")
PATIENCE = timedelta(seconds=20)
_CLONE_NEWNET = 0x40000000  # from linux/sched.h


def processes(n: int, body: Callable[[int], object], *, late: Sequence[int] = ()) -> list[Any]:
    """Run `body` on n ranks; return what each returns, or how it ended. Ranks in `late` begin a little later."""
    pipes = [FORK.Pipe(duplex=False) for _ in range(n)]
    all_started = FORK.Barrier(n)

    def child(rank: int) -> None:
        warnings.simplefilter("ignore")
        all_started.wait()
        begun = time.monotonic()
        if rank in late:
            time.sleep(0.3)
        try:
            said = body(rank)
        except cg.CommGraphError as error:
            said = [type(error).__name__, round(time.monotonic() - begun, 1), str(error)]
        pipes[rank][1].send(said)

    children = [FORK.Process(target=child, args=(rank,)) for rank in range(n)]
    for one in children:
        one.start()
    said: list[Any] = []
    for rank, one in enumerate(children):
        pipes[rank][1].close()
        try:
            said.append(pipes[rank][0].recv() if pipes[rank][0].poll(40) else "nothing in 40 s")
        except EOFError:
            one.join(5)
            said.append(one.exitcode)
        pipes[rank][0].close()
    for one in children:
        one.join(5)
        if one.is_alive():
            one.kill()
            one.join()
    return said


def tell(**cell: Any) -> None:
    print(json.dumps(cell), flush=True)


def use(world: cg.World, what: str) -> int:
    """Use a World as far as `what` says, and leave everything open."""
    if what == "nothing":
        return world.size
    if what == "reduce":
        return int(world.group.all_reduce(torch.tensor(1)))
    ctx = world.context(cg.Layout(world.size, tp=world.size), name="a")
    return int(ctx.tp.all_reduce(torch.tensor(1))) if what == "context and reduce" else world.size


def ends(folder: Path) -> None:
    """Ranks build, and just end: rank 0 takes the store along."""
    for n in (2, 4):
        for what in ("nothing", "reduce", "context", "context and reduce"):
            for late in ((), (1,)) if n == 2 else ((),):
                where = f"tcp://127.0.0.1:{free_port()}"

                def body(rank: int) -> int:
                    return use(cg.World.connect(where, rank=rank, world_size=n, timeout=PATIENCE), what)  # noqa: B023 - run at once

                said = processes(n, body, late=late)
                tell(n=n, what=what, late=late, said=said, fine=said == [n] * n)


def again(folder: Path) -> None:
    """Worlds one after another at one port and in one file, closed and not, the last one still held or not."""
    for way in ("tcp", "file"):
        for held in (False, True):
            where = f"tcp://127.0.0.1:{free_port()}" if way == "tcp" else f"file://{folder}/again-{held}"

            def body(rank: int) -> int:
                sums = 0
                world = None
                for _ in range(6):
                    if not held:  # noqa: B023 - run at once
                        world = None
                    world = cg.World.connect(where, rank=rank, world_size=3, timeout=PATIENCE)  # noqa: B023 - run at once
                    sums += int(world.group.all_reduce(torch.tensor(1)))
                    world.close()
                return sums

            said = processes(3, body)
            tell(way=way, held=held, said=said, fine=said == [18] * 3)


class Mortal(dist.Store):
    """The store of a rank that is killed at its n-th operation."""

    def __init__(self, store: dist.Store, at: int) -> None:
        super().__init__()
        self._store: Any = store
        self._left = at

    def _do(self, name: str, *args: Any) -> Any:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self._store, name)(*args)

    def set(self, key: str, value: Any) -> None:
        self._do("set", key, value)

    def get(self, key: str) -> bytes:
        return bytes(self._do("get", key))

    def add(self, key: str, amount: int) -> int:
        return int(self._do("add", key, amount))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return bytes(self._do("compare_set", key, expected, desired))

    def check(self, keys: list[str]) -> bool:
        return bool(self._do("check", keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._do("wait", keys, PATIENCE if timeout is None else timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._do("delete_key", key))

    deleteKey = delete_key  # noqa: N815 - what torch's stores call one that is written in Python

    def has_extended_api(self) -> bool:
        return False


def deaths(folder: Path) -> None:
    """A rank is killed at the n-th operation on the store of a build, the first excepted, which says that it is there.

    The others say so within two seconds, and who it was.
    """
    for shm in (True, False):
        for victim in (0, 2):
            for at in (2, 14, 23, 34, 47, 60) if shm else (47,):
                path = folder / f"deaths-{shm}-{victim}-{at}"

                def body(rank: int) -> str:
                    store: dist.Store = dist.FileStore(str(path), -1)  # noqa: B023 - run at once
                    store = Mortal(store, at) if rank == victim else store  # noqa: B023 - run at once
                    world = cg.World.from_store(store, rank=rank, world_size=3, timeout=PATIENCE)
                    world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(shm=shm))  # noqa: B023 - run at once
                    return "built"

                said = processes(3, body)
                others = [said[rank] for rank in range(3) if rank != victim]
                # After the last operation that the others need, everything is built: also then the victim is killed.
                fine = said[victim] in (-9, "built") and all(
                    one == "built" or (one[0] == "BuildError" and one[1] < 4 and f"rank {victim}" in one[2]) for one in others
                )
                tell(shm=shm, victim=victim, at=at, said=said, fine=fine)


def closes(folder: Path) -> None:
    """A rank dies while the others close."""
    for shm in (True, False):
        for victim in (0,) if shm else (0, 2):
            path = folder / f"closes-{shm}-{victim}"

            def body(rank: int) -> float:
                world = cg.World.connect(f"file://{path}", rank=rank, world_size=3, timeout=PATIENCE)  # noqa: B023 - run at once
                world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(shm=shm))  # noqa: B023 - run at once
                world.group.barrier()
                if rank == victim:  # noqa: B023 - run at once
                    time.sleep(0.5)
                    os.kill(os.getpid(), signal.SIGKILL)
                begun = time.monotonic()
                world.close()
                return time.monotonic() - begun

            said = processes(3, body)
            fine = all(isinstance(one, float) and one < 3 for rank, one in enumerate(said) if rank != victim) and said[victim] == -9
            tell(shm=shm, victim=victim, said=said, fine=fine)


def leavings(folder: Path) -> None:
    """A job died early, in the middle of a build, or with everything built; the next one meets in the same file."""
    for at in (5, 12, 30, 1000):
        path = folder / f"leavings-{at}"

        def dies(rank: int) -> None:
            store: dist.Store = Mortal(dist.FileStore(str(path), 2), at + rank)  # noqa: B023 - run at once
            cg.World.from_store(store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
            os.kill(os.getpid(), signal.SIGKILL)

        def works(rank: int) -> int:
            with cg.World.connect(f"file://{path}", rank=rank, world_size=2, timeout=PATIENCE) as world:  # noqa: B023 - run at once
                return use(world, "context and reduce")

        processes(2, dies)
        said = processes(2, works)
        tell(at=at, said=said, fine=said == [2, 2])


def stopped(folder: Path) -> None:
    """The process that serves the store is stopped: the others' errors still come at their deadline."""
    where = f"tcp://127.0.0.1:{free_port()}"

    def body(rank: int) -> Any:
        world = cg.World.connect(where, rank=rank, world_size=3, timeout=timedelta(seconds=4))
        ctx = world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(shm=False))
        pids = ctx.tp.all_gather_object(os.getpid())
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)
        operation, built = ["none", 0.0], 0.0
        begun = time.monotonic()
        try:
            ctx.tp.all_reduce(torch.ones(4), timeout=1)
        except cg.CollectiveError as error:
            operation = [type(error).__name__, time.monotonic() - begun]
        begun = time.monotonic()
        try:
            world.context(cg.Layout(3, pp=3), name="b")
        except cg.BuildError:
            built = time.monotonic() - begun
        if rank == 1:
            time.sleep(1.0)
            os.kill(pids[0], signal.SIGKILL)
        return [*operation, built]

    said = processes(3, body)
    fine = all(one[0] == "CollectiveTimeoutError" and one[1] < 4 and one[2] < 8 for one in said[1:])
    tell(said=said, fine=fine)


def leaves(folder: Path) -> None:
    """A rank leaves its context or its World by an exception, or closes it, and lives; the others, who build, hear of it at once."""
    leaves_in("context", folder / "sibling", lambda world, ctx: ctx.tp.sibling("b"))
    leaves_in("context", folder / "torch group", lambda world, ctx: ctx.tp.torch_group("cpu"))
    leaves_in("world", folder / "context", lambda world, ctx: world.context(cg.Layout(3, tp=3), name="b"))
    leaves_in("close", folder / "closed", lambda world, ctx: ctx.tp.sibling("b"))


def leaves_in(left: str, path: Path, build: Callable[[cg.World, Any], object]) -> None:
    have_ended = FORK.Semaphore(0)

    def body(rank: int) -> Any:
        world = cg.World.connect(f"file://{path}", rank=rank, world_size=3, timeout=PATIENCE)
        ctx = world.context(cg.Layout(3, tp=3), name="a")
        dist.init_process_group("gloo", init_method=f"file://{path}-torch", rank=rank, world_size=3)
        ctx.tp.barrier()
        if rank == 1:
            if left == "close":
                ctx.close(timeout=10)
            else:
                (ctx if left == "context" else world).__exit__(ValueError, ValueError(), None)
            return have_ended.acquire(timeout=60) and have_ended.acquire(timeout=60)
        begun = time.monotonic()
        try:
            build(world, ctx)
            return "built"
        except cg.CommGraphError as error:
            return [type(error).__name__, time.monotonic() - begun, str(error)]
        finally:
            have_ended.release()

    said = processes(3, body)
    kind = {"context": "PeerLostError", "world": "BuildError", "close": "CollectiveMismatchError"}[left]
    fine = said[1] is True and all(one[0] == kind and one[1] < 8 and "rank 1" in one[2] for one in said[::2])
    tell(left=left, build=path.name, said=said, fine=fine)


def continued(folder: Path) -> None:
    """A rank is stopped until the others have given up and ended, the store with them; its error then blames none of them."""
    for shm in (True, False):
        for when in ("before", "in"):
            continues(when, folder / f"{shm}-{when}", shm=shm)


def continues(when: str, sign: Path, *, shm: bool) -> None:
    where = f"tcp://127.0.0.1:{free_port()}"
    pids, may_stop, may_call = FORK.Array("i", 3), FORK.Event(), FORK.Event()

    def stop_and_continue() -> None:
        may_stop.wait(60)
        os.kill(pids[1], signal.SIGSTOP)
        await_state(pids[1], "T")
        sign.touch()
        may_call.set()
        for rank in (0, 2):
            await_state(pids[rank], "ZX")
        os.kill(pids[1], signal.SIGCONT)

    def body(rank: int) -> str:
        pids[rank] = os.getpid()
        world = cg.World.connect(where, rank=rank, world_size=3, timeout=PATIENCE)
        options = cg.CommunicatorOptions(shm=shm, host_timeout=timedelta(seconds=1))
        ctx = world.context(cg.Layout(3, tp=3), name="a", options=options)
        ctx.tp.barrier(timeout=PATIENCE)
        if rank != 1:
            may_call.wait(60)
        else:
            may_stop.set()
            while when == "before" and not sign.exists():
                pass
        ctx.tp.all_reduce(torch.ones(1 << 20), timeout=60 if rank == 1 and shm else 1)
        return "worked"

    stopper = threading.Thread(target=stop_and_continue)
    stopper.start()
    said = processes(3, body)
    stopper.join(60)
    kind, _, text = said[1]
    others = all(one[0] == "CollectiveTimeoutError" and "no word from rank 1" in one[2] for one in said[::2])
    late = "this one, which was late or stopped", "where this process was late or stopped, the others gave up", "was not run itself"
    fine = others and any(words in text for words in late) and (not shm or kind == "CollectiveTimeoutError")
    tell(shm=shm, when=when, said=said, fine=fine)


def await_state(pid: int, letters: str) -> None:
    """Wait until a process is in one of the states that `/proc` shows as these letters, or gone."""
    while (fields := status_of(pid)) and fields[0] not in letters:
        time.sleep(0.002)


def status_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def no_loopback(folder: Path) -> None:
    """The loopback interface is down, as in a new network namespace. The error says so on every rank, at once."""
    assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def body(rank: int) -> int:
        return cg.World.connect(f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE).size

    said = processes(2, body)
    tell(said=said, fine=all(one[0] == "BuildError" and one[1] < 8 and "loopback interface" in one[2] for one in said))


if __name__ == "__main__":
    scenarios: tuple[Callable[[Path], None], ...] = (ends, again, deaths, closes, leavings, stopped, leaves, continued, no_loopback)
    next(one for one in scenarios if one.__name__ == sys.argv[1])(Path(sys.argv[2]))
