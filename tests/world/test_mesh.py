"""Meshes of torch over the groups of contexts."""

from __future__ import annotations

import pytest

import commgraph as cg
from tests.helpers import on_ctx
from tests.processes import PROGRAMS, Processes


def test_fsdp_and_dtensor_run_on_meshes_of_two_contexts(processes: Processes) -> None:
    assert processes.launch(4, PROGRAMS / "mesh.py") == [""] * 4


def test_a_mesh_needs_a_default_group() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        with pytest.raises(cg.BackendUnavailableError, match="no default process group"):
            ctx.mesh("tp")
        with pytest.raises(cg.LayoutError, match="give each group once"):
            ctx.mesh()

    on_ctx(2, run)
