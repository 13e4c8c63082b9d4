"""Meshes of torch over the groups of contexts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import commgraph as cg
from tests.helpers import ROOT, on_ctx

PROGRAM = Path(__file__).parent.parent / "programs/mesh.py"


def test_fsdp_and_dtensor_run_on_meshes_of_two_contexts() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mesh_needs_a_default_group() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        with pytest.raises(cg.BackendUnavailableError, match="no default process group"):
            ctx.mesh("tp")
        with pytest.raises(cg.LayoutError, match="give each group once"):
            ctx.mesh()

    on_ctx(2, run)
