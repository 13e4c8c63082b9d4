"""Builds in processes that die, end early, come again, or find what others have left. Children are forked: importing torch takes longest.

    python builds.py <scenario> <folder>

Each scenario prints a line of JSON for each of its cells: whether it is fine, and what it took where two seconds are promised: from a
death, from a deadline, or from the beginning of a build that ends at once.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commgraph as cg
from tests.helpers import free_port

FORK = mp.get_context("fork")
_CLONE_NEWNET = 0x40000000  # from linux/sched.h
PATIENCE = timedelta(seconds=20)
PAUSE = 0.5
# Most of a cell's time is waiting.
AT_ONCE = 4
Cell = Callable[[], dict[str, Any]]


def processes(n: int, body: Callable[[int], object], *, late: Sequence[int] = ()) -> list[Any]:
    """Run `body` on n ranks; return what each returns, how it ended, or [error, when by the clock, text]. Those in `late` begin later."""
    pipes = [FORK.Pipe(duplex=False) for _ in range(n)]
    all_started = FORK.Barrier(n)

    def child(rank: int) -> None:
        warnings.simplefilter("ignore")
        all_started.wait()
        if rank in late:
            time.sleep(0.3)
        try:
            said = body(rank)
        except cg.CommGraphError as error:
            said = [type(error).__name__, time.monotonic(), str(error)]
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


def use(world: cg.World, what: str) -> int:
    """Use a World as far as `what` says, and leave everything open."""
    if what == "nothing":
        return world.size
    if what == "reduce":
        return int(world.group.all_reduce(torch.tensor(1)))
    ctx = world.context(cg.Layout(world.size, tp=world.size), name="a")
    return int(ctx.tp.all_reduce(torch.tensor(1))) if what == "context and reduce" else world.size


def ends(folder: Path) -> Iterator[Cell]:
    """Ranks build, and just end: rank 0 takes the store along."""

    def cell(n: int, what: str, late: Sequence[int]) -> dict[str, Any]:
        where = f"tcp://127.0.0.1:{free_port()}"
        said = processes(n, lambda rank: use(cg.World.connect(where, rank=rank, world_size=n, timeout=PATIENCE), what), late=late)
        return {"n": n, "what": what, "late": late, "said": said, "fine": said == [n] * n}

    for n in (2, 4):
        for what in ("nothing", "reduce", "context", "context and reduce"):
            for late in ((), (1,)) if n == 2 else ((),):
                yield partial(cell, n, what, late)


def again(folder: Path) -> Iterator[Cell]:
    """Worlds one after another at one port and in one file, closed and not, the last one still held or not."""

    def cell(way: str, held: bool) -> dict[str, Any]:
        where = f"tcp://127.0.0.1:{free_port()}" if way == "tcp" else f"file://{folder}/again-{held}"

        def body(rank: int) -> int:
            sums = 0
            world = None
            for _ in range(6):
                if not held:
                    world = None
                world = cg.World.connect(where, rank=rank, world_size=3, timeout=PATIENCE)
                sums += int(world.group.all_reduce(torch.tensor(1)))
                world.close()
            return sums

        said = processes(3, body)
        return {"way": way, "held": held, "said": said, "fine": said == [18] * 3}

    for way in ("tcp", "file"):
        for held in (False, True):
            yield partial(cell, way, held)


class Mortal(dist.Store):
    """The store of a rank that is killed at its n-th operation; `when` then has the time."""

    def __init__(self, store: dist.Store, at: int, when: Any = None) -> None:
        super().__init__()
        self._store: Any = store
        self._left = at
        self._when = when

    def _do(self, name: str, *args: Any) -> Any:
        self._left -= 1
        if not self._left:
            if self._when is not None:
                self._when.value = time.monotonic()
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


def deaths(folder: Path) -> Iterator[Cell]:
    """A rank is killed at the n-th operation on the store of a build, the first excepted, which says that it is there.

    The others say so within the time that is promised, and who it was.
    """

    def cell(shm: bool, victim: int, at: int) -> dict[str, Any]:
        path, when = folder / f"deaths-{shm}-{victim}-{at}", FORK.Value("d", 0.0)

        def body(rank: int) -> str:
            store: dist.Store = dist.FileStore(str(path), -1)
            store = Mortal(store, at, when) if rank == victim else store
            world = cg.World.from_store(store, rank=rank, world_size=3, timeout=PATIENCE)
            world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(shm=shm))
            return "built"

        said = processes(3, body)
        others = [said[rank] for rank in range(3) if rank != victim]
        # After the last operation that the others need, everything is built: also then the victim is killed.
        fine = said[victim] in (-9, "built") and all(
            one == "built" or (one[0] == "BuildError" and f"rank {victim}" in one[2]) for one in others
        )
        heard = [one[1] - when.value for one in others if fine and one != "built"]
        return {"shm": shm, "victim": victim, "at": at, "said": said, "fine": fine, "took": max(heard, default=0.0)}

    for shm in (True, False):
        for victim in (0, 2):
            for at in (2, 14, 23, 34, 47, 60) if shm else (47,):
                yield partial(cell, shm, victim, at)


def closes(folder: Path) -> Iterator[Cell]:
    """A rank dies while the others close."""

    def cell(shm: bool, victim: int) -> dict[str, Any]:
        path = folder / f"closes-{shm}-{victim}"

        def body(rank: int) -> float:
            world = cg.World.connect(f"file://{path}", rank=rank, world_size=3, timeout=PATIENCE)
            world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(shm=shm))
            world.group.barrier()
            if rank == victim:
                time.sleep(PAUSE)
                os.kill(os.getpid(), signal.SIGKILL)
            begun = time.monotonic()
            world.close()
            return time.monotonic() - begun

        said = processes(3, body)
        others = [one for rank, one in enumerate(said) if rank != victim]
        fine = said[victim] == -9 and all(isinstance(one, float) for one in others)
        return {"shm": shm, "victim": victim, "said": said, "fine": fine, "took": max(others) - PAUSE if fine else 0.0}

    for shm, victim in ((True, 0), (False, 0), (False, 2)):
        yield partial(cell, shm, victim)


def leavings(folder: Path) -> Iterator[Cell]:
    """A job died early, in the middle of a build, or with everything built; the next one meets in the same file."""

    def cell(at: int) -> dict[str, Any]:
        path = folder / f"leavings-{at}"

        def dies(rank: int) -> None:
            store: dist.Store = Mortal(dist.FileStore(str(path), 2), at + rank)
            cg.World.from_store(store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
            os.kill(os.getpid(), signal.SIGKILL)

        def works(rank: int) -> int:
            with cg.World.connect(f"file://{path}", rank=rank, world_size=2, timeout=PATIENCE) as world:
                return use(world, "context and reduce")

        processes(2, dies)
        said = processes(2, works)
        return {"at": at, "said": said, "fine": said == [2, 2]}

    for at in (5, 12, 30, 1000):
        yield partial(cell, at)


def stopped(folder: Path) -> Iterator[Cell]:
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

    def cell() -> dict[str, Any]:
        said = processes(3, body)
        fine = all(one[0] == "CollectiveTimeoutError" for one in said[1:])
        return {
            "said": said,
            "fine": fine,
            "took": max(max(one[1] - 1, one[2] - 4) for one in said[1:]) if fine else 0.0,
        }  # beyond the deadlines

    yield cell


def leaves(folder: Path) -> Iterator[Cell]:
    """A rank leaves its context or its World by an exception, or closes it, and lives; the others, who build, hear of it at once."""
    yield partial(leaves_in, "context", folder / "sibling", lambda world, ctx: ctx.tp.sibling("b"))
    yield partial(leaves_in, "context", folder / "torch group", lambda world, ctx: ctx.tp.torch_group("cpu"))
    yield partial(leaves_in, "world", folder / "context", lambda world, ctx: world.context(cg.Layout(3, tp=3), name="b"))
    yield partial(leaves_in, "close", folder / "closed", lambda world, ctx: ctx.tp.sibling("b"))


def leaves_in(left: str, path: Path, build: Callable[[cg.World, Any], object]) -> dict[str, Any]:
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
            return [type(error).__name__, str(error), time.monotonic() - begun]
        finally:
            have_ended.release()

    said = processes(3, body)
    kind = {"context": "PeerLostError", "world": "BuildError", "close": "CollectiveMismatchError"}[left]
    fine = said[1] is True and all(one[0] == kind and "rank 1" in one[1] for one in said[::2])
    return {"left": left, "build": path.name, "said": said, "fine": fine, "took": max(one[2] for one in said[::2]) if fine else 0.0}


def continued(folder: Path) -> Iterator[Cell]:
    """A rank is stopped until the others have given up and ended, the store with them; its error then blames none of them."""
    for shm in (True, False):
        for when in ("before", "in"):
            yield partial(continues, when, folder / f"{shm}-{when}", shm=shm)


def continues(when: str, sign: Path, *, shm: bool) -> dict[str, Any]:
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
    return {"shm": shm, "when": when, "said": said, "fine": fine}


def await_state(pid: int, letters: str) -> None:
    """Wait until a process is in one of the states that `/proc` shows as these letters, or gone."""
    while (fields := status_of(pid)) and fields[0] not in letters:
        time.sleep(0.002)


def status_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def no_loopback(folder: Path) -> Iterator[Cell]:
    """The loopback interface is down, as in a new network namespace. The error says so on every rank, at once."""
    yield partial(connects_without_loopback, folder)


def connects_without_loopback(folder: Path) -> dict[str, Any]:
    assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def body(rank: int) -> int:
        return cg.World.connect(f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE).size

    begun = time.monotonic()
    said = processes(2, body)
    fine = all(one[0] == "BuildError" and "loopback interface" in one[2] for one in said)
    return {"said": said, "fine": fine, "took": max(one[1] for one in said) - begun if fine else 0.0}


def told(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What each of some cells gives, which run at the same time."""
    pipes = [FORK.Pipe(duplex=False) for _ in cells]
    children = [FORK.Process(target=lambda cell=cell, said=said: said.send(cell())) for cell, (_, said) in zip(cells, pipes, strict=True)]
    for one in children:
        one.start()
    for _, said in pipes:
        said.close()
    found = [heard.recv() for heard, _ in pipes]
    for one in children:
        one.join()
    return found


def main() -> None:
    scenarios = (ends, again, deaths, closes, leavings, stopped, leaves, continued, no_loopback)
    cells = list(next(one for one in scenarios if one.__name__ == sys.argv[1])(Path(sys.argv[2])))
    for first in range(0, len(cells), AT_ONCE):
        for found in told(cells[first : first + AT_ONCE]):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
