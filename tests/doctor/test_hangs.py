"""The doctor names the culprit of a job that hangs, from outside: in threads, and in processes that are stopped or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import commgraph as cg
from commgraph.cli import main
from commgraph.doctor.attach import attach_to_process
from commgraph.testing import spmd
from commgraph.trace.diagnose import Diagnosis
from commgraph.trace.read import calls_of, read_process
from tests.helpers import ROOT
from tests.programs.hangs import KINDS, hang

CULPRITS = {"skips": (1,), "order": (0, 1), "stopped": (1,), "loop": (1,), "nobody_sends": (0, 1)}
FINDINGS = {
    "skips": ("Rank 1 has not called target/tp all_reduce #3", "rank 1 is in target/pp recv #0 from rank 3 since"),
    "order": ("Ranks 0, 1 wait for each other", "rank 0 is in target/tp all_reduce #3", "rank 1 is in target/other all_reduce #0"),
    "stopped": ("Rank 1 has not called target/tp all_reduce #",),
    "loop": ("Rank 1 has not called target/tp all_reduce #3", "rank 1 is in no call: it ended target/tp all_reduce #2"),
    "nobody_sends": ("Rank 0 has not sent what target/pp recv #0 of rank 2 waits for", "rank 0 is in target/world close #"),
}


def check(found: Diagnosis, kind: str) -> None:
    assert sorted(found.states) == [0, 1, 2, 3]
    assert tuple(sorted(found.culprits)) == CULPRITS[kind], found.text
    for part in FINDINGS[kind]:
        assert part in found.finding, found.text
    assert "hangs.py" in found.finding


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
        time.sleep(0.4)
        found.append(diagnosis_of(worlds[0]))
        release.set()
        for world in worlds.values():
            world._abort()

    def body(world: cg.World) -> None:
        worlds[world.rank] = world
        hang(world, kind, 60, ready.release, release.wait)

    doctor = threading.Thread(target=look)
    doctor.start()
    with pytest.raises(cg.CommGraphError):
        spmd(body, 4, timeout=20)
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
        time.sleep(1.0)

    def __enter__(self) -> list[subprocess.Popen[str]]:
        return self.ranks

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.communicate()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
def test_a_hang_of_processes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Job(kind, tmp_path) as ranks:
        (found,) = attach_to_process(ranks[2].pid)
        check(found, kind)
        assert main(["doctor", "--job", str(tmp_path)]) == 1
        assert found.finding[:60] in capsys.readouterr().out
        if kind == "stopped":
            assert "its process is stopped (SIGSTOP" in found.finding
            # A killed rank: its neighbours have its record open.
            ranks[1].kill()
            ranks[1].wait()
            kept = {record.rank: record for record in read_process(ranks[0].pid)}
            assert [call.operation for call in calls_of(kept[1])][:3] == ["all_reduce"] * 3
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


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_what_is_not_recorded_is_said(sleeper: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["--pid", str(sleeper)], ["--job", "no such job"], ["--record", str(tmp_path)]):
        assert main(["doctor", *asked]) == 2
        assert "COMMGRAPH_RECORD" in capsys.readouterr().err
    assert main(["doctor", "--pid", str(2**22 + 1)]) == 2
    assert "there is no process" in capsys.readouterr().err
