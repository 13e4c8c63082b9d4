"""Start of the ranks: as processes of this machine, by MPI's launcher, or as threads; or by a launcher, before this program."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import commgraph as cg
from commgraph.bench import peers
from commgraph.bench.deliver import deliver
from commgraph.bench.library import Job
from commgraph.bench.plan import Plan
from commgraph.bench.run import run
from commgraph.commands import run_ranks
from commgraph.errors import CommGraphError, ConfigurationError
from commgraph.testing import spmd

__all__ = ["complain", "find_mpiexec", "launched", "mpiexec", "processes", "threads"]

_RANKS = 2
_PREFIX = "commgraph-bench-"
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
    ranks = plan.ranks or _RANKS
    return run_ranks("commgraph bench", _rank, ranks, plan, peers.inherit(plan.compare, ranks))


def _rank(rank: int, ranks: int, folder: Path, plan: Plan, gifts: Mapping[str, Any]) -> int:
    try:
        with cg.World.connect(f"file://{folder}/meeting", rank=rank, world_size=ranks) as world:
            found = run(Job(world, "processes", folder), plan, gifts)
        if rank == 0:
            deliver(plan, [found])
    except BrokenPipeError:
        raise
    except (CommGraphError, OSError) as error:
        return complain(error, rank)
    return 0


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
