"""How commands end: interrupted, read by nobody, with a rank that fails. A command that starts ranks ends all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

COMMAND = ("-m", "commgraph")
RANKS = ("tests/programs/endings.py",)


@contextlib.contextmanager
def started(*arguments: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    # Buffered, as for a user.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ, start_new_session=True
    ) as child:
        yield child


def all_ended(session: int) -> bool:
    """Whether the processes of a session are gone, or go within moments, as multiprocessing's tracker does when its pipe closes."""
    deadline = time.monotonic() + 20
    while members(session) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not members(session)


def members(session: int) -> list[int]:
    """The processes of a session that are no zombies."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == session and state != "Z":
                found.append(int(pid))
    return found


@pytest.mark.parametrize("arguments", [(*RANKS, "works"), (*COMMAND, "demo", "--tokens", "480")], ids=["ranks", "demo"])
def test_an_interrupt_ends_a_command_in_one_line(arguments: tuple[str, ...]) -> None:
    with started(*arguments) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does it
        said = child.stderr.read()
        child.stdout.read()
    assert (child.returncode, said) == (130, f"{'commgraph' if arguments[0] == '-m' else 'endings'}: interrupted\n")
    assert all_ended(child.pid)


def test_an_interrupt_while_a_command_begins_ends_it_in_one_line() -> None:
    with started(*COMMAND, "demo") as child:
        assert child.stderr is not None
        while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
            time.sleep(0.001)  # it imports torch
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
    assert (child.returncode, said) == (130, "commgraph: interrupted\n")


def test_an_end_by_sigterm_ends_the_ranks() -> None:
    with started(*RANKS, "works") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.terminate()
        _, said = child.communicate()
    assert (child.returncode, said) == (128 + signal.SIGTERM, "")
    assert all_ended(child.pid)


@pytest.mark.parametrize(
    "arguments",
    [("layout", "64"), ("layout", "8", "--rank", "1"), ("--help",), ("--version",), ("layout", "-h"), ("demo", "-h")],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with started(*COMMAND, *arguments, stdout=writing) as child:
        os.close(writing)
        _, said = child.communicate()
    assert (child.returncode, said) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "arguments",
    [pytest.param((*RANKS, "works"), id="ranks"), pytest.param((*COMMAND, "demo", "--tokens", "480"), id="demo", marks=pytest.mark.long)],
)
def test_a_reader_that_leaves_ends_the_work(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    with started(*arguments, stdout=writing) as child:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        _, said = child.communicate()
    assert (child.returncode, said) == (128 + signal.SIGPIPE, "")
    assert all_ended(child.pid)


@pytest.mark.parametrize(
    ("kind", "code", "told"), [("ends", 0, ""), ("fails", 3, ""), ("killed", 1, "endings: a rank was ended by signal 6\n")]
)
def test_a_command_ends_with_its_first_rank_that_fails(kind: str, code: int, told: str) -> None:
    with started(*RANKS, kind) as child:
        out, said = child.communicate()
    assert (child.returncode, out.splitlines()[0], said) == (code, "all are here", told)
    assert all_ended(child.pid)
