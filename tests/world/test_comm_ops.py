"""Jobs as the tests of vLLM and mpi4py have them, in processes that just end: programs/comm_ops.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import PROGRAMS, Processes


def jobs(processes: Processes, *words: object) -> list[dict[str, Any]]:
    done = processes.run(PROGRAMS / "comm_ops.py", *words, timeout=400)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.long)])
def test_jobs_whose_processes_just_end(ranks: int, rounds: int, processes: Processes) -> None:
    """One after another, nothing closed, rank 0 and the store with it as likely the first to end as any."""
    came = jobs(processes, "models", ranks, rounds)
    assert [job["fine"] for job in came] == [True] * rounds, came


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_collective_with_rows_that_differ_between_ranks(ranks: int, processes: Processes) -> None:
    came = jobs(processes, "collectives", ranks)
    assert [job["fine"] for job in came] == [True], came
