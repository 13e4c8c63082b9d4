"""Forked children of a rank: what they inherit is refused to them, and leaves the rank and its peers alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import ROOT, free_port

PROGRAM = ROOT / "tests" / "programs" / "inherited.py"


@pytest.mark.parametrize("strategy", ["shm", "gloo"])
def test_a_forked_child_has_no_part_in_what_it_inherits(strategy: str) -> None:
    """Every operation, object, queue and pending work; close, garbage collection and every way to end; grandchildren; worlds of its own."""
    job: dict[str, Any] = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), strategy],
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=110)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, text) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == 0, text
        assert text.splitlines()[-1] == f"done {number}", text
