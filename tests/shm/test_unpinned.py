"""Ranks that nobody pinned move to idle cores, and leave their affinities as they were; those that are bound spin where each has a core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commgraph.processes import count_sharing
from commgraph.shm import native_module
from tests.processes import PROGRAMS, Processes, outputs


@pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")
def test_an_affinity_is_as_it_was_after_waits(tmp_path: Path, processes: Processes) -> None:
    """Given back exactly; untouched where it names one core; left alone where another thread has changed it. An idle wait costs nothing."""
    ranks = [processes.start(PROGRAMS / "affinity.py", tmp_path / "meet", str(rank)) for rank in range(2)]
    assert all("done" in output for output in outputs(ranks, timeout=60))


@pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")
@pytest.mark.skipif(not {0, 1} <= os.sched_getaffinity(0), reason="two cores are needed")
def test_ranks_bound_to_cores_of_their_own_spin(tmp_path: Path, processes: Processes) -> None:
    ranks = [processes.start(PROGRAMS / "bound.py", tmp_path / "meet", str(rank), str(rank)) for rank in range(2)]
    assert [output.split("\n")[:2] for output in outputs(ranks, timeout=60)] == [["bound True", "both on one False"]] * 2


def test_processes_that_share_cores() -> None:
    here = os.getpid()
    assert count_sharing([]) == 0
    assert count_sharing([here, here]) == 2
    assert count_sharing([here, 1 << 30]) == 2, "one that cannot be asked counts"
