"""Builds in which ranks die, end early, come again, or find what a job before them has left, in real processes: programs/builds.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.world.test_torchrun import environment

PROGRAM = ROOT / "tests" / "programs" / "builds.py"


@pytest.mark.parametrize(
    ("scenario", "cells"),
    [("ends", 12), ("again", 4), ("deaths", 14), ("closes", 3), ("leavings", 4), ("stopped", 1)],
)
def test_builds(scenario: str, cells: int, tmp_path: Path) -> None:
    """See the functions of these names in the program, each of which says what it does."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), scenario, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    came = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(came) == cells
    assert not [cell for cell in came if not cell["fine"]], done.stderr[-2000:]
