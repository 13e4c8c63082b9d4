"""Deaths, interruptions and small machines: what shared memory does when something goes wrong. Real processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.testing import spmd

PROGRAMS = Path(__file__).parent / "programs"


def in_processes(n: int, body: Callable[[cg.ParallelContext], Any], path: Path, **options: Any) -> list[Any]:
    """`body` on n forked processes; what it returned on each, or the exception's text."""
    fork = multiprocessing.get_context("fork")

    def run(rank: int, answer: Any) -> None:
        torch.set_num_threads(1)
        try:
            with cg.World.connect(f"file://{path}/meet", rank=rank, world_size=n) as world:
                ctx = world.context(cg.Layout(n, tp=n), name="a", options=cg.CommunicatorOptions(**options))
                answer.send(body(ctx))
        except BaseException as error:
            answer.send(f"{type(error).__name__}: {error}")
            raise

    pipes = [fork.Pipe() for _ in range(n)]
    processes = [fork.Process(target=run, args=(rank, pipes[rank][1]), daemon=True) for rank in range(n)]
    for process in processes:
        process.start()
    try:
        assert all(mine.poll(60) for mine, _ in pipes), "a rank said nothing within 60 s"
        return [mine.recv() for mine, _ in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAMS / name), *arguments], capture_output=True, text=True, timeout=100, check=False)


def test_rows_4_and_5_a_killed_rank_is_named_and_leaves_nothing() -> None:
    """Rows 4 and 5: a dead peer blocks the others for ever, and its segments stay. `nox -s faults` runs a hundred cycles."""
    done = program("kill_cycles.py", "--cycles", "4", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 cycles, every survivor raised" in done.stdout
    assert "resource_tracker" not in done.stderr
    assert "Traceback" not in done.stderr


def test_row_4_a_stopped_rank_is_late_and_not_lost(tmp_path: Path) -> None:
    def body(ctx: cg.ParallelContext) -> str:
        ctx.tp.barrier()
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            return "went on"
        time.sleep(0.1)
        try:
            ctx.tp.all_reduce_(torch.ones(4), timeout=0.5)
        except cg.CollectiveError as error:
            return type(error).__name__
        finally:
            for child in Path("/proc").glob("[0-9]*"):
                stat = child / "stat"
                text = stat.read_text() if stat.exists() else ""
                if f") T {os.getppid()} " in text:
                    os.kill(int(child.name), signal.SIGCONT)
        return "nothing raised"

    assert in_processes(2, body, tmp_path)[0] == "CollectiveTimeoutError"


def test_ctrl_c_ends_a_wait_and_releases_the_peers(tmp_path: Path) -> None:
    def body(ctx: cg.ParallelContext) -> str:
        ctx.tp.barrier()
        try:
            if ctx.rank == 0:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                begun = time.monotonic()
                try:
                    ctx.tp.all_reduce_(torch.ones(4))
                finally:
                    assert time.monotonic() - begun < 2
            else:
                time.sleep(0.6)
                ctx.tp.all_reduce_(torch.ones(4))
        except (KeyboardInterrupt, cg.CollectiveError) as error:
            return type(error).__name__
        return "nothing raised"

    assert in_processes(2, body, tmp_path) == ["KeyboardInterrupt", "PeerLostError"]


SMALL = """
mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {python} {program}
"""
WHOLE = """
import tempfile, torch, commgraph as cg
from commgraph.testing import spmd
def body(world):
    ctx = world.context(cg.Layout(2, tp=2), name="a")
    assert ctx.tp.communicators["all_reduce"][0] == "shm"
    for size in (1, 1000, 20_000_000):
        assert bool((ctx.tp.all_reduce(torch.ones(size)) == 2).all())
    shared = ctx.tp.empty((4_000_000,), torch.float32).fill_(1)
    assert bool((ctx.tp.all_reduce_(shared) == 2).all())
    assert ctx.tp.broadcast_object(torch.ones(5_000_000), 0).sum() == 5_000_000
    return "bytes of shared memory" in ctx.explain()
assert spmd(body, 2) == [True, True]
print("everything worked")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root here")
def test_row_18_a_small_dev_shm_is_no_limit(tmp_path: Path) -> None:
    """Row 18: a small /dev/shm kills with SIGBUS. Here it holds nothing of ours."""
    script = tmp_path / "whole.py"
    script.write_text(WHOLE)
    command = SMALL.format(python=sys.executable, program=script)
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "everything worked" in done.stdout


def test_row_18_memory_that_cannot_be_had_is_said_with_its_size(tmp_path: Path) -> None:
    def body(ctx: cg.ParallelContext) -> tuple[str, float]:
        return ctx.explain(), float(ctx.tp.all_reduce(torch.ones(())))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        answers = in_processes(2, body, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    for text, total in answers:
        assert total == 2  # over gloo, on both
        assert "shm: not used, rank 0 in the group: " in text
        assert "bytes of shared memory are needed" in text


def test_row_10_an_idle_rank_leaves_its_core_alone(tmp_path: Path) -> None:
    """Row 10: idle and decoding workers spin a core each."""

    def body(ctx: cg.ParallelContext) -> list[float]:
        shares = []
        for messages, pause in ((1, 1.5), (150, 0.01)):
            ctx.tp.barrier()
            wall, busy = time.perf_counter(), time.process_time()
            for _ in range(messages):
                if ctx.rank == 0:
                    time.sleep(pause)
                    ctx.tp.broadcast_object({"step": 1}, 0)
                else:
                    ctx.tp.broadcast_object(None, 0)
            shares.append((time.process_time() - busy) / (time.perf_counter() - wall))
        return shares

    _, (idle, busy) = in_processes(2, body, tmp_path)
    assert idle < 0.01
    assert busy < 0.10


def test_row_5_sixteen_contexts_at_once_never_collide() -> None:
    def run(world: cg.World) -> None:
        contexts = [world.context(cg.Layout(2, tp=2), name=f"context {i}") for i in range(16)]
        xs = [torch.full((1000,), float(i + world.rank)) for i in range(16)]
        for _ in range(3):
            for i, ctx in enumerate(contexts):
                assert float(ctx.tp.all_reduce(xs[i])[7]) == 2 * i + 1
                assert ctx.tp.broadcast_object(i, i % 2) == i

    spmd(run, 2)


def test_row_7_what_a_context_took_it_gives_back() -> None:
    def counts() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count("memfd:commgraph")

    def run(world: cg.World) -> None:
        def once(number: int) -> None:
            with world.context(cg.Layout(2, tp=2), name=f"context {number}") as ctx:
                ctx.warmup()
                ctx.tp.all_reduce(ctx.tp.empty((100_000,), torch.float32).fill_(1))
                ctx.tp.broadcast_object({"x": torch.ones(10_000)}, 1)
            world.group.barrier()

        once(0)
        world.group.barrier()
        before = counts()
        for number in range(1, 26):
            once(number)
        world.group.barrier()
        # gloo's own threads close what they had a moment later.
        deadline = time.monotonic() + 5
        while any(now > was for now, was in zip(counts(), before, strict=True)) and time.monotonic() < deadline:
            time.sleep(0.05)
        after = counts()
        world.group.barrier()
        assert all(now <= was for now, was in zip(after, before, strict=True)), (before, after)

    spmd(run, 2)
