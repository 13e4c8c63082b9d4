"""accelerate trains over the backend as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import PROGRAMS, Processes

pytest.importorskip("accelerate", reason="by `nox -s torch_backend`")


@pytest.mark.timeout(400)
def test_a_training_script(tmp_path: Path, processes: Processes) -> None:
    said = processes.launch(2, PROGRAMS / "accelerated.py", tmp_path, timeout=350)
    assert [text.splitlines()[-1] for text in said] == ["done"] * 2
