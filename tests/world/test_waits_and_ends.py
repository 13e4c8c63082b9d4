"""Waits that end at once or take long, and what is said when they do; worlds that nobody holds any more, and programs that end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.shm import queue_sides
from commgraph.testing import spmd
from tests.helpers import ROOT, again_if_late, in_time, on, within
from tests.processes import PROGRAMS, Processes, outputs

# A coordinator and its world.


def test_a_coordinator_keeps_its_world_alive() -> None:
    def program(world: cg.World) -> list[Any]:
        return [weakref.ref(world), world.group, world.context(cg.Layout(2, tp=2), name="a").tp.sibling("b")]

    def run(rank: int, store: Any) -> None:
        try:
            made[rank] = program(cg.World.from_store(store, rank=rank, world_size=2, timeout=30))
        except BaseException as error:
            made[rank] = error

    def call(rank: int) -> None:
        _, group, sibling = made[rank]
        sums[rank] = [float(group.all_reduce(torch.ones(1), timeout=20)), float(sibling.all_reduce(torch.ones(1), timeout=20))]

    made: dict[int, Any] = {}
    sums: dict[int, list[float]] = {}
    store = torch.distributed.HashStore()

    def on_threads(target: Callable[..., None], *more: Any) -> None:
        threads = [threading.Thread(target=target, args=(rank, *more)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)

    on_threads(run, store)
    gc.collect()
    on_threads(call)
    assert sums == {0: [2, 2], 1: [2, 2]}
    worlds = [made[rank][0] for rank in range(2)]
    made.clear()
    with pytest.warns(ResourceWarning, match="never closed"):
        gc.collect()
    assert [world() for world in worlds] == [None, None]


# Who is missing.


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
def test_every_rank_names_the_missing_ones(options: dict[str, Any]) -> None:
    ended = threading.Barrier(4)

    def body(group: GroupCoordinator) -> str:
        group.barrier(timeout=20)
        try:
            if group.rank in (0, 2):
                group.barrier(timeout=0.3 if group.rank == 0 else 0.6)
        except cg.CollectiveTimeoutError as error:
            return str(error)
        finally:
            ended.wait(20)
        return ""

    said = on(4, body, timeout=40, **options)
    assert "no word from ranks 1, 3:" in said[0]
    assert "no word from ranks 1, 3:" in said[2]


# timeout=0.

X = torch.ones(3)
POLLS: dict[str, Callable[[GroupCoordinator], Any]] = {
    "all_reduce": lambda g: g.all_reduce(X, timeout=0),
    "all_reduce, strided": lambda g: g.all_reduce(torch.ones(6)[::2], timeout=0.0),
    "all_gather": lambda g: g.all_gather(X, timeout=timedelta(0)),
    "broadcast": lambda g: g.broadcast(X.clone(), 1, timeout=0),
    "barrier": lambda g: g.barrier(timeout=0),
    "recv": lambda g: g.recv(3, torch.float32, 1, timeout=0),
    "recv from any": lambda g: g.recv(3, torch.float32, cg.ANY, timeout=0),
    "recv_object": lambda g: g.recv_object(1, timeout=0),
    "broadcast_object": lambda g: g.broadcast_object(None, 1, timeout=0),
    "all_gather_object": lambda g: g.all_gather_object(1, timeout=0),
    "recv_tensor_dict": lambda g: g.recv_tensor_dict(1, timeout=0),
    "broadcast_tensor_dict": lambda g: g.broadcast_tensor_dict(None, 1, timeout=0),
    "all_reduce_async": lambda g: g.all_reduce_async(torch.ones(6)[::2], timeout=0).wait(),
    "wait": lambda g: g.irecv(3, torch.float32, 1).wait(timeout=0),
}


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
@again_if_late
def test_timeout_0_polls(options: dict[str, Any]) -> None:
    """Every call that takes a deadline ends at once where its peers have not come, with the error of a deadline that passed."""
    ended = threading.Barrier(2)

    def program(world: cg.World) -> dict[str, str]:
        told = {}
        for name, call in POLLS.items():
            group = world.context(cg.Layout(2, tp=2), name=name, options=cg.CommunicatorOptions(**options)).tp
            group.barrier(timeout=20)
            started = time.monotonic()
            if group.rank == 0:
                try:
                    told[name] = f"returned {call(group)}"
                except cg.CollectiveTimeoutError:
                    in_time(time.monotonic() - started, 1, name)
                except Exception as error:
                    told[name] = f"{type(error).__name__}: {error}"
            ended.wait(30)
        return told

    assert spmd(program, 2, timeout=60)[0] == {}


def test_what_came_before_is_polled_and_a_default_deadline_must_last() -> None:
    def body(group: GroupCoordinator) -> Any:
        if group.rank:
            group.send_object("here", 0)
            group.send(X, 0)
            return group.barrier(timeout=20)
        time.sleep(0.2)
        found = group.recv_object(1, timeout=0), group.recv(3, torch.float32, 1, timeout=0).tolist()
        group.barrier(timeout=20)
        return found

    assert on(2, body)[0] == ("here", [1, 1, 1])
    with pytest.raises(cg.ConfigurationError, match="timeout=0"):
        cg.CommunicatorOptions(timeout=0)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_deadline_in_the_past_or_none_at_all_is_refused(seconds: float) -> None:
    def body(group: GroupCoordinator) -> None:
        with pytest.raises(ValueError, match="timeout="):
            group.barrier(timeout=seconds)
        group.barrier()

    on(2, body)


# Queues that wait for long.


def until_late(call: Callable[[], object]) -> None:
    for _ in range(10_000):
        try:
            call()
        except cg.CollectiveTimeoutError:
            return
    raise AssertionError("it is never late")


@again_if_late
def test_a_queue_that_waits_long_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(queue_sides, "_SAY_NS", 50_000_000)
    with cg.MessageQueue.create(1) as queue:
        with pytest.raises(cg.CollectiveTimeoutError):
            queue.wait_until_ready(0.2)
        assert "for readers to attach: 0 of 1 are missing" in caplog.text
        with cg.MessageQueue.attach(queue.handle, 0) as reader:
            queue.enqueue(1)
            assert reader.dequeue(20) == 1
            caplog.clear()
            threading.Timer(0.3, queue.enqueue, ("late",)).start()
            assert reader.dequeue() == "late"
            assert "dequeue on message queue" in caplog.text
            assert "has waited for 0.05 s for the writer" in caplog.text
            assert "has waited for 0.1 s for the writer" in caplog.text
            caplog.clear()
            with within(3):
                until_late(lambda: queue.enqueue(b"x" * 20_000, timeout=0.2))
            assert "enqueue on message queue" in caplog.text
            assert "for reader 0 to make room" in caplog.text
            until_late(lambda: reader.dequeue(timeout=0))


# The end of a program.

ENDINGS = {
    "a world": "world = cg.World.from_store(store, rank=0, world_size=1)\nkept.append(world)",
    "a queue": "queue = cg.MessageQueue.create(1)\nkept.append(queue)",
    "a pair of worlds": """
def make(rank):
    kept.append(cg.World.from_store(store, rank=rank, world_size=2, timeout=30))
threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""",
}


def test_nothing_is_said_at_the_end_of_a_program() -> None:
    """A world or queue that nobody closed, in a module, in a cycle, and in a daemon thread: no noise of the interpreter's end."""
    made = "\n".join(ENDINGS.values())
    text = f"""
import threading, torch, commgraph as cg
store = torch.distributed.HashStore()
class Kept(list):
    pass
kept = Kept()
kept.itself = kept
{made}
threading.Thread(target=lambda kept=kept: threading.Event().wait(), daemon=True).start()
torch.kept_until_the_end = kept
"""
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_program_that_ends_while_threads_build_or_call_is_not_aborted(processes: Processes) -> None:
    outputs([processes.start(PROGRAMS / "ends_in_calls.py", what, over) for what in ("build", "calls") for over in ("shm", "gloo")])
