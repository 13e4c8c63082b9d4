"""A rank is stopped (SIGSTOP) in the middle of a large call: whoever gives up on the call has its tensor for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT


def test_a_stopped_rank_changes_no_tensor_after_its_peers_error(tmp_path: Path) -> None:
    """A broadcast, a reduction in memory that the ranks share, and a message, whose receivers let the other rank write to their tensors."""
    program = [sys.executable, str(ROOT / "tests" / "programs" / "stopped_source.py"), "96", str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(
            program,
            env=os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=110) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    results = {name: (int(given_up), int(changed)) for name, given_up, changed in map(str.split, said[1][0].splitlines())}
    assert {name: changed for name, (_, changed) in results.items()} == {"broadcast": 0, "all_reduce_": 0, "recv": 0}, said
    assert sum(given_up for given_up, _ in results.values()) > 0, "no call was long enough to be stopped within"
