"""Ctrl-C is answered wherever a rank waits, and afterwards closing does not wait either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import ROOT, TooLateError, again_if_late

PROGRAM = Path(__file__).parent.parent / "programs" / "interrupts.py"


@again_if_late
def test_every_wait_is_interrupted() -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(PROGRAM)]
        absent = subprocess.Popen([*command, "1", f"{folder}/store"], env=env, stderr=subprocess.DEVNULL)
        try:
            ran = subprocess.run([*command, "0", f"{folder}/store"], env=env, capture_output=True, text=True, check=False, timeout=240)
        finally:
            absent.kill()
            absent.wait()
    cells = {f"{cell.pop('kind')} {cell.pop('name')}": cell for cell in map(json.loads, ran.stdout.splitlines())}
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {"alone connect_server", "gloo send", "gloo close_context", "build connecting", "close world"} <= cells.keys()
    assert not {name: cell for name, cell in cells.items() if "failed" in cell}
    if late := {name: cell for name, cell in cells.items() if cell["seconds"] > 1 or cell.get("closed", 0) > 3}:
        raise TooLateError(f"interrupted or closed too late: {late}")
