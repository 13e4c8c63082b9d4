"""The benchmark's command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from commgraph import launch
from commgraph.bench import plot, report, start
from commgraph.bench.deliver import deliver
from commgraph.bench.plan import Plan, parse
from commgraph.errors import CommGraphError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or one rank of it where a launcher started this process.

    Returns:
        0; 1 if ranks could not talk; 2 if the arguments cannot be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        facts = launch.detect(os.environ)
        rank = facts.rank
        plan = parse(argv)
        if plan.plot is not None:
            plot.check()
        if plan.read:
            return _show(plan)
        if facts.world_size > 1:
            return start.launched(plan, facts.launcher)
        if plan.threads:
            return start.threads(plan)
        starter = start.find_mpiexec() if "mpi" in plan.compare else None
        return start.processes(plan) if starter is None else start.mpiexec(starter, plan, argv)
    except BrokenPipeError:
        raise
    except (CommGraphError, OSError) as error:
        return start.complain(error, rank)


def _show(plan: Plan) -> int:
    runs = [run for path in plan.read for run in report.read(path)]
    print("\n\n".join(map(report.text, runs)))
    deliver(plan, runs)
    return 0
