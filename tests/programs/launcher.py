"""Starts ranks as real processes, quickly: they are forked from this one, which has imported torch already.

Reads jobs from standard input, a line of JSON each: a list of processes {"argv": [...], "env": {...}}. Answers with a line: for each, its
exit code (negative: the signal), standard output and standard error. A child ends as any interpreter does, exit handlers included.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - so that the children have it

import commgraph.world  # noqa: F401

SECONDS = 45


class Child(Exception):  # noqa: N818 - no error
    """Unwinds a child out of the loop, so that it ends at the end of this file."""


def start(process: dict[str, Any], folder: Path, number: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    for fd, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(process["env"])
    tempfile.tempdir = None
    sys.argv = process["argv"]
    raise Child


def wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve() -> None:
    for line in sys.stdin:
        # Not a context manager: the children, who leave by an exception, would clear it away.
        folder = Path(tempfile.mkdtemp())
        codes = wait([start(process, folder, number) for number, process in enumerate(json.loads(line))])
        texts = [[(folder / f"{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(len(codes))]
        shutil.rmtree(folder)
        print(json.dumps([(code, *text) for code, text in zip(codes, texts, strict=True)]), flush=True)


try:
    serve()
except Child:
    runpy.run_path(sys.argv[0], run_name="__main__")
