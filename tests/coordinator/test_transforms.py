"""Derivatives beyond autograd's: forward mode and the transforms of torch.func. Right by rules, or a clear error; never silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers


@pytest.mark.timeout(300)
def test_every_operation_under_every_transform(tmp_path: Path) -> None:
    """Operations, lists, layers: jvp, dual tensors, a tangent on one rank only, grad, vmap, Hessians; in shared memory and over gloo."""
    program = str(helpers.ROOT / "tests/programs/transforms.py")
    ranks = [
        subprocess.Popen([sys.executable, program, str(rank), "2", str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        out, _ = rank.communicate(timeout=250)
        assert (rank.returncode, out.strip()) == (0, "right")
