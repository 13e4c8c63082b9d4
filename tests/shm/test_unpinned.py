"""Ranks that nobody pinned move to idle cores, and leave their affinities as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from commgraph.shm import native_module
from tests.processes import PROGRAMS, Processes, outputs


@pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")
def test_an_affinity_is_as_it_was_after_waits(tmp_path: Path, processes: Processes) -> None:
    """Given back exactly; untouched where it names one core; left alone where another thread has changed it. An idle wait costs nothing."""
    ranks = [processes.start(PROGRAMS / "affinity.py", tmp_path / "meet", str(rank)) for rank in range(2)]
    assert all("done" in output for output in outputs(ranks, timeout=60))
