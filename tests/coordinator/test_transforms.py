"""Derivatives beyond autograd's: forward mode and the transforms of torch.func. Right by rules, or a clear error; never silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import PROGRAMS, Processes, outputs


@pytest.mark.timeout(300)
def test_every_operation_under_every_transform(tmp_path: Path, processes: Processes) -> None:
    """Operations, lists, layers: jvp, dual tensors, a tangent on one rank only, grad, vmap, Hessians; in shared memory and over gloo."""
    ranks = [processes.start(PROGRAMS / "transforms.py", str(rank), "2", tmp_path / "meet") for rank in range(2)]
    assert outputs(ranks, timeout=250) == ["right\n"] * 2
