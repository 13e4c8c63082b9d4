"""Ranks that nobody pinned move to idle cores, and leave their affinities as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commgraph.shm import native_module

PROGRAM = Path(__file__).parents[1] / "programs" / "affinity.py"


@pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")
def test_an_affinity_is_as_it_was_after_waits(tmp_path: Path) -> None:
    """Given back exactly; untouched where it names one core; left alone where another thread has changed it. An idle wait costs nothing."""
    command = [sys.executable, str(PROGRAM), str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert all("done" in output for output in outputs)
