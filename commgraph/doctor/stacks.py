"""Python stacks of other processes, read from outside by py-spy, where that is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

__all__ = ["MISSING", "stack_of"]

MISSING: Final = "(pip install py-spy: the doctor then says in which line of Python)"
_FRAMES: Final = 4
_SECONDS: Final = 10


def stack_of(pid: int, thread: int) -> str:
    """Return where a thread of a process is, innermost frame first, as a part of a sentence; why that is not known, in brackets.

    Args:
        pid: of a process of this user on this host, which may be stopped. It is not paused.
        thread: its number by the kernel.
    """
    # Beside this interpreter first: the scripts of a virtual environment need not be on the PATH.
    program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
    if program is None:
        return MISSING
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
        frames = _frames(json.loads(told), thread)
    except subprocess.CalledProcessError as error:
        return f"(py-spy could not read its stack: {' '.join(error.stderr.split())[:160]})"
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError) as error:
        return f"(py-spy could not read its stack: {type(error).__name__})"
    return f"in {', called by '.join(frames)}" if frames else "(it runs no Python)"


def _frames(threads: list[dict[str, Any]], thread: int) -> list[str]:
    found: list[dict[str, Any]] = next((one["frames"] for one in threads if one["os_thread_id"] == thread), [])
    return [f"{one['name']} ({one['filename']}:{one['line']})" for one in found[:_FRAMES]]
