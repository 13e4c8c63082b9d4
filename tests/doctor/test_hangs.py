"""The doctor names the culprit of a job that hangs, from outside: in threads, and in processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import commgraph as cg
from commgraph.cli import main
from commgraph.doctor import stacks
from commgraph.doctor.attach import attach_to_process
from commgraph.testing import spmd
from commgraph.trace.diagnose import Diagnosis
from commgraph.trace.read import calls_of, read_process
from tests.helpers import ROOT
from tests.programs.hangs import KINDS, hang

CULPRITS = {"skips": (1,), "order": (0, 1), "stopped": (1,), "loop": (1,), "nobody_sends": (0, 1)}
FINDINGS = {
    "skips": ("Rank 1 has not called target/tp all_reduce #4", "rank 1 is in target/pp recv #0 from rank 3 since"),
    "order": ("Ranks 0, 1 wait for each other", "rank 0 is in target/tp all_reduce #4", "rank 1 is in target/other all_reduce #0"),
    "stopped": ("Rank 1 has not called target/tp all_reduce #",),
    "loop": ("Rank 1 has not called target/tp all_reduce #4", "rank 1 is in no call: it ended target/tp all_reduce #3"),
    "nobody_sends": ("Rank 0 has not sent what target/pp recv #0 of rank 2 waits for", "rank 0 is in target/world close #"),
}


def check(found: Diagnosis, kind: str) -> None:
    assert sorted(found.states) == [0, 1, 2, 3]
    assert tuple(sorted(found.culprits)) == CULPRITS[kind], found.text
    for part in FINDINGS[kind]:
        assert part in found.finding, found.text
    assert "hangs.py" in found.finding


def look_until_found(look: Callable[[], Diagnosis], kind: str) -> Diagnosis:
    """Look again until the ranks are where they stay: how long that takes is the machine's affair."""
    deadline = time.monotonic() + 40
    while True:
        found = look()
        if tuple(sorted(found.culprits)) == CULPRITS[kind] and all(part in found.finding for part in FINDINGS[kind]):
            return found
        if time.monotonic() > deadline:
            return found  # for the assertions that say what is missing


def diagnosis_of(world: cg.World) -> Diagnosis:
    """That of this world among those that the process has, or had until their memory was collected."""
    name = world._builder.name
    return next(one for one in attach_to_process(os.getpid()) if {state.record.world for state in one.states.values()} == {name})


@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_of_threads(kind: str) -> None:
    ready, release = threading.Semaphore(0), threading.Event()
    worlds: dict[int, cg.World] = {}
    found: list[Diagnosis] = []

    def look() -> None:
        for _ in range(4):
            ready.acquire()
        found.append(look_until_found(lambda: diagnosis_of(worlds[0]), kind))
        release.set()
        for world in worlds.values():
            world._abort()

    def body(world: cg.World) -> None:
        worlds[world.rank] = world
        hang(world, kind, 60, ready.release, release.wait)

    doctor = threading.Thread(target=look)
    doctor.start()
    with pytest.raises(cg.CommGraphError):
        spmd(body, 4, timeout=60)
    doctor.join()
    check(found[0], kind)


class Job:
    """Four processes that hang."""

    def __init__(self, kind: str, folder: Path, **environ: str) -> None:
        program = ROOT / "tests" / "programs" / "hangs.py"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(program), kind, str(rank), "4", str(folder / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for rank in range(4)
        ]
        for rank in self.ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        if kind == "stopped":
            self.ranks[1].send_signal(signal.SIGSTOP)

    def __enter__(self) -> list[subprocess.Popen[str]]:
        return self.ranks

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.communicate()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
def test_a_hang_of_processes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Job(kind, tmp_path) as ranks:

        def look() -> Diagnosis:
            (found,) = attach_to_process(ranks[2].pid)
            return found

        found = look_until_found(look, kind)
        check(found, kind)
        if kind == "loop":
            assert "its process computes: its thread used" in found.finding
            where = "in spin (" if shutil.which("py-spy") else stacks.MISSING
            assert where in found.finding
        assert main(["doctor", "--job", str(tmp_path)]) == 1
        assert found.finding[:60] in capsys.readouterr().out
        if kind == "stopped":
            assert "its process is stopped (SIGSTOP" in found.finding
            # A killed rank: its neighbours have its record open.
            ranks[1].kill()
            ranks[1].wait()
            kept = {record.rank: record for record in read_process(ranks[0].pid)}
            assert [call.operation for call in calls_of(kept[1])].count("all_reduce") >= 3
            assert not [name for name in os.listdir("/dev/shm") if "record" in name]


def test_a_job_that_goes_on_waits_for_nobody() -> None:
    found: list[Diagnosis] = []

    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="goes on", options=cg.CommunicatorOptions(record=True)) as context:
            context.tp.all_reduce(torch.ones(1))
            if world.rank == 0:
                found.append(diagnosis_of(world))
            world.group.barrier()

    spmd(body, 2)
    assert found[0].finding == ""
    assert "No rank waits for another one" in found[0].text


# As `py-spy dump --json` prints it (0.4).
PRINTED = [
    {"os_thread_id": 7, "frames": [{"name": "other", "filename": "b.py", "line": 1}]},
    {"os_thread_id": 8, "frames": [{"name": f"f{i}", "filename": "/a/train.py", "line": i} for i in range(9)]},
]


def test_the_stack_of_a_rank_is_read_by_py_spy_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert stacks.stack_of(41, 8) == stacks.MISSING
    program = tmp_path / "py-spy"
    allowed = "[ \"$*\" = 'dump --nonblocking --json --pid 41' ] || { echo not allowed >&2; exit 1; }"
    program.write_text(f"#!/bin/sh\n{allowed}\necho '{json.dumps(PRINTED)}'\n")
    program.chmod(0o755)
    assert (
        stacks.stack_of(41, 8)
        == "in f0 (/a/train.py:0), called by f1 (/a/train.py:1), called by f2 (/a/train.py:2), called by f3 (/a/train.py:3)"
    )
    assert stacks.stack_of(41, 9) == "(it runs no Python)"
    assert stacks.stack_of(42, 8) == "(py-spy could not read its stack: not allowed)"
    program.write_text("#!/bin/sh\necho nonsense\n")
    assert stacks.stack_of(41, 8) == "(py-spy could not read its stack: JSONDecodeError)"


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_what_is_not_recorded_is_said(sleeper: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["--pid", str(sleeper)], ["--job", "no such job"], ["--record", str(tmp_path)], ["--record", str(tmp_path / "nowhere")]):
        assert main(["doctor", *asked]) == 2
        assert "COMMGRAPH_RECORD" in capsys.readouterr().err
    assert main(["doctor", "--pid", str(2**22 + 1)]) == 2
    assert "there is no process" in capsys.readouterr().err
