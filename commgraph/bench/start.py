"""Start of the ranks: as processes of this machine, by MPI's launcher, or as threads; or by a launcher, before this program."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import commgraph as cg
from commgraph.bench import peers
from commgraph.bench.deliver import deliver
from commgraph.bench.library import Job
from commgraph.bench.plan import Plan
from commgraph.bench.run import run
from commgraph.errors import CommGraphError, ConfigurationError
from commgraph.testing import spmd

__all__ = ["complain", "find_mpiexec", "launched", "mpiexec", "processes", "threads"]

_RANKS = 2
_PREFIX = "commgraph-bench-"
# Seconds that the others may take to end once a rank has failed.
_END_SECONDS = 3.0
# Seconds for the whole run of ranks that are threads.
_LONGEST_SECONDS = 4 * 3600.0


def complain(error: CommGraphError | OSError, rank: int = 0) -> int:
    """Says in one line what went wrong; returns the exit code. `ConfigurationError`, alike on every rank, is printed by rank 0 only."""
    if isinstance(error, ConfigurationError):
        if rank == 0:
            print(f"commgraph bench: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"commgraph bench: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 1


def processes(plan: Plan) -> int:
    """Runs on processes that this one starts.

    Returns:
        0, or the exit code of the rank that failed first; it has said why.
    """
    # Spawned and not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    ranks = plan.ranks or _RANKS
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory:
        # An end by SIGTERM is an end like any other: the processes and the folder go with it.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        gifts = peers.inherit(plan.compare, ranks)
        children = [spawn.Process(target=_child, args=(plan, rank, ranks, directory, gifts), daemon=True) for rank in range(ranks)]
        try:
            for child in children:
                child.start()
            code = _first_failure(children)
            if code:
                # commgraph's ranks notice a lost one, but those that wait in a peer may not.
                deadline = time.monotonic() + _END_SECONDS
                for child in children:
                    child.join(max(deadline - time.monotonic(), 0))
            return code
        finally:
            for child in children:
                if child.pid is not None:
                    child.terminate()
                    child.join()
            signal.signal(signal.SIGTERM, before)


def _first_failure(children: Sequence[multiprocessing.process.BaseProcess]) -> int:
    """Waits for all, or for the first that fails: its exit code."""
    waiting = list(children)
    while waiting:
        wait([child.sentinel for child in waiting])
        for child in [child for child in waiting if not child.is_alive()]:
            waiting.remove(child)
            if child.exitcode:
                if child.exitcode < 0:
                    print(f"commgraph bench: a rank was ended by signal {-child.exitcode}", file=sys.stderr)
                return max(child.exitcode, 1)
    return 0


def _child(plan: Plan, rank: int, ranks: int, directory: str, gifts: Mapping[str, Any]) -> None:
    try:
        with cg.World.connect(f"file://{directory}/meeting", rank=rank, world_size=ranks) as world:
            found = run(Job(world, "processes", Path(directory)), plan, gifts)
        if rank == 0:
            deliver(plan, [found])
    except (CommGraphError, OSError) as error:
        sys.exit(complain(error, rank))
    except KeyboardInterrupt:
        sys.exit(130)


def find_mpiexec() -> str | None:
    """MPI's launcher: beside this interpreter, where the wheels put it, else on the path; None without mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.is_file() else shutil.which("mpiexec")


def mpiexec(starter: str, plan: Plan, argv: Sequence[str]) -> int:
    """Runs on processes that MPI's launcher starts, which MPI insists on."""
    command = [starter, "-n", str(plan.ranks or _RANKS), sys.executable, "-m", "commgraph.bench", *argv]
    return subprocess.run(command, check=False).returncode


def threads(plan: Plan) -> int:
    """Runs on threads of this process."""
    ranks = plan.ranks or _RANKS
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory:
        gifts = peers.inherit(plan.compare, ranks)
        found, *_ = spmd(lambda world: run(Job(world, "threads", Path(directory)), plan, gifts), ranks, timeout=_LONGEST_SECONDS)
    deliver(plan, [found])
    return 0


def launched(plan: Plan, launcher: str) -> int:
    """Runs on the processes that a launcher started, this one among them."""
    with cg.World.from_env() as world:
        if plan.ranks not in (None, world.size):
            raise ConfigurationError(f"--ranks {plan.ranks}, but {launcher} started {world.size} processes")
        with tempfile.TemporaryDirectory(prefix=_PREFIX) if world.rank == 0 else contextlib.nullcontext() as mine:
            directory = world.group.broadcast_object(mine)
            assert directory is not None
            found = run(Job(world, launcher, Path(directory)), plan, {})
        if world.rank == 0:
            deliver(plan, [found])
    return 0
