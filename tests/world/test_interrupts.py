"""Ctrl-C is answered wherever a rank waits, and afterwards closing does not wait either."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.helpers import TooLateError, again_if_late
from tests.processes import PROGRAMS, Processes


@again_if_late
def test_every_wait_is_interrupted(tmp_path: Path, processes: Processes) -> None:
    store = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
    processes.start(PROGRAMS / "interrupts.py", "1", store)
    ran = processes.run(PROGRAMS / "interrupts.py", "0", store, timeout=240)
    processes.close()
    cells = {f"{cell.pop('kind')} {cell.pop('name')}": cell for cell in map(json.loads, ran.stdout.splitlines())}
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {"alone connect_server", "gloo send", "gloo close_context", "build connecting", "close world"} <= cells.keys()
    assert not {name: cell for name, cell in cells.items() if "failed" in cell}
    if late := {name: cell for name, cell in cells.items() if cell["seconds"] > 1 or cell.get("closed", 0) > 3}:
        raise TooLateError(f"interrupted or closed too late: {late}")
