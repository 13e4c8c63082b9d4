"""Ctrl-C is answered wherever a rank waits, and afterwards closing does not wait either."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from commgraph.shm import native_module
from tests.helpers import again_if_late, in_time
from tests.processes import PROGRAMS, Processes, outputs


@again_if_late
def test_every_wait_is_interrupted(tmp_path: Path, processes: Processes) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    kinds = ["alone", "builds", "gloo", *(["shm"] if native_module.why_missing() is None else [])]
    for kind in kinds[1:]:
        processes.start(PROGRAMS / "interrupts.py", kind, "1", folder / kind)
    said = outputs([processes.start(PROGRAMS / "interrupts.py", kind, "0", folder / kind) for kind in kinds], timeout=240)
    processes.close()
    cells = {f"{cell.pop('kind')} {cell.pop('name')}": cell for cell in map(json.loads, "".join(said).splitlines())}
    assert {"alone connect_server", "gloo send", "gloo close_context", "build connecting", "close world"} <= cells.keys()
    assert not {name: cell for name, cell in cells.items() if "failed" in cell}
    for name, cell in cells.items():
        in_time(cell["seconds"], 1, f"interrupting {name}")
        in_time(cell.get("closed", 0), 3, f"closing after {name}")
