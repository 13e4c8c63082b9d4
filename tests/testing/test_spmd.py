"""`spmd` itself: results in order, the first failure with its rank, and nobody left behind wherever the others were."""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.meeting import Meeting
from commgraph.testing import spmd
from tests.helpers import again_if_late, within
from tests.processes import Processes, outputs


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No thread, Python's or gloo's, and no descriptor may outlive a call of `spmd`, however it ended."""
    gc.collect()
    descriptors = set(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    tasks = set(os.listdir("/proc/self/task"))
    yield
    assert set(threading.enumerate()) - threads == set()
    # What a failure holds through its traceback goes with it; gloo's event loops end a moment after their group.
    deadline = time.monotonic() + 5
    while True:
        gc.collect()
        left = set(os.listdir("/proc/self/fd")) - descriptors, set(os.listdir("/proc/self/task")) - tasks
        if left == (set(), set()) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    # OpenMP's workers come with torch's first larger kernel and stay.
    assert left[0] == set()
    assert len(left[1]) <= os.cpu_count()  # type: ignore[operator]


def test_results_come_in_the_order_of_ranks() -> None:
    def run(world: cg.World) -> int:
        time.sleep(0.02 * (4 - world.rank))
        return world.rank * 10

    assert spmd(run, 5) == [0, 10, 20, 30, 40]
    assert spmd(lambda world: None, 3) == [None] * 3
    assert spmd(lambda world: world.size, 1) == [1]


@pytest.mark.parametrize(("size", "nodes"), [(0, 1), (-1, 1), (2, 0), (2, 3)])
def test_sizes_that_cannot_be(size: int, nodes: int) -> None:
    with pytest.raises(cg.ConfigurationError, match="spmd"):
        spmd(lambda world: None, size, nodes=nodes)


@pytest.mark.parametrize(
    ("size", "nodes", "expected"), [(4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (3, 3, [0, 1, 2]), (8, 3, [0, 0, 0, 1, 1, 1, 2, 2])]
)
def test_simulated_nodes_are_runs_of_neighbours(size: int, nodes: int, expected: list[int]) -> None:
    def run(world: cg.World) -> Any:
        assert (world.node_count, world.node_rank) == (nodes, expected[world.rank])
        assert int(world.group.all_reduce(torch.tensor(1))) == size
        return list(world.nodes.values())

    assert spmd(run, size, nodes=nodes) == [expected] * size


# Where the others are when one rank fails.


def in_a_collective(world: cg.World) -> None:
    world.group.all_reduce(torch.ones(1))


def in_a_receive(world: cg.World) -> None:
    world.group.recv((1,), torch.float32, src=world.size - 1)


def in_an_object_receive(world: cg.World) -> None:
    world.group.recv_object(world.size - 1)


def in_a_barrier_of_a_context(world: cg.World) -> None:
    world.context(cg.Layout(world.size - 1, tp=world.size - 1), name="never").tp.barrier()


def in_a_store_wait(world: cg.World) -> None:
    world.store.wait(["nobody sets this"], timedelta(seconds=50))


def in_a_store_get(world: cg.World) -> None:
    world.store.get("nobody sets this")


def in_a_build(world: cg.World) -> None:
    world.context(cg.Layout(world.size), name="a")


def in_a_split(world: cg.World) -> None:
    world.split(range(world.size))


def in_a_split_world(world: cg.World) -> None:
    world.split([0, 1, 2]).group.recv((1,), torch.float32, src=2 if world.rank < 2 else 0)


def in_a_second_world(world: cg.World) -> None:
    cg.World.from_store(world.store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=50))


def in_the_closing_of_the_world(world: cg.World) -> None:
    return


PLACES = (
    in_a_collective,
    in_a_receive,
    in_an_object_receive,
    in_a_store_wait,
    in_a_store_get,
    in_a_build,
    in_a_split,
    in_a_split_world,
    in_a_second_world,
    in_the_closing_of_the_world,
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("delay", [0.0, 0.3])
@again_if_late
def test_the_first_failure_is_raised_and_the_others_are_released(place: Callable[[cg.World], None], delay: float) -> None:
    def run(world: cg.World) -> None:
        if world.rank == 3:
            time.sleep(delay)
            raise KeyError("mine")
        place(world)

    with within(delay + 2), pytest.raises(KeyError, match="mine") as caught:
        spmd(run, 4)
    assert caught.value.__notes__ == ["(raised on rank 3 of 4)"]
    assert any(entry.name == "run" and "test_spmd" in str(entry.path) for entry in caught.traceback)


@pytest.mark.parametrize("rank", [0, 1])
@again_if_late
def test_a_failure_before_a_world_is_complete(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank fails while it connects: the others wait for it in the store."""
    from commgraph import building

    connect = building.Builder.connect

    def fail(self: building.Builder, uid: str, ranks: tuple[int, ...], meeting: Meeting, options: cg.CommunicatorOptions) -> Any:
        if self.rank == rank:
            raise OSError("no network")
        return connect(self, uid, ranks, meeting, options)

    monkeypatch.setattr(building.Builder, "connect", fail)
    with within(2), pytest.raises(OSError, match="no network") as caught:
        spmd(lambda world: None, 3)
    assert caught.value.__notes__ == [f"(raised on rank {rank} of 3)"]


def test_the_first_of_several_failures() -> None:
    def run(world: cg.World) -> None:
        time.sleep(0.3 * (3 - world.rank))
        raise ValueError(f"from {world.rank}")

    with pytest.raises(ValueError, match="from 3"):
        spmd(run, 4)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_is_raised_too(kind: type[BaseException]) -> None:
    def run(world: cg.World) -> None:
        if world.rank == 1:
            raise kind
        world.group.barrier()

    with pytest.raises(kind):
        spmd(run, 3)


def test_pytest_outcomes_pass_through() -> None:
    def run(world: cg.World) -> None:
        pytest.skip("not here")

    with pytest.raises(pytest.skip.Exception):
        spmd(run, 2)


# Time.


@pytest.mark.parametrize("place", [in_a_store_wait, in_a_store_get], ids=lambda place: place.__name__)
@again_if_late
def test_the_time_of_a_run_is_limited_and_the_message_says_where_each_rank_was(place: Callable[[cg.World], None]) -> None:
    def run(world: cg.World) -> None:
        if world.rank != 1:
            place(world)

    # After the deadline the ranks are released, and the whole run ends.
    with within(1 + 4), pytest.raises(cg.CollectiveTimeoutError, match=r"ranks 0, 1, 2 of 3 were not done after 1 s") as caught:
        spmd(run, 3, timeout=1)
    assert "commgraph-rank-2" in str(caught.value)
    assert "spmd.py" in str(caught.value)


@again_if_late
def test_the_time_of_a_run_is_the_default_deadline_of_its_operations() -> None:
    gave_up = threading.Event()

    def run(world: cg.World) -> None:
        if world.rank:
            assert gave_up.wait(30)
            return
        try:
            world.group.recv((1,), torch.float32, src=1)
        finally:
            gave_up.set()

    with within(1 + 2), pytest.raises(cg.CollectiveTimeoutError):
        spmd(run, 2, timeout=1)


@again_if_late
def test_an_interrupt_of_the_caller_releases_the_ranks() -> None:
    """Ctrl-C while the ranks wait for each other."""

    def run(world: cg.World) -> None:
        if world.rank == 0:
            threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1]).start()
            time.sleep(0.4)
            world.group.recv((1,), torch.float32, src=1)
        else:
            world.store.wait(["never"], timedelta(seconds=50))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with within(0.4 + 2), pytest.raises(KeyboardInterrupt):
            spmd(run, 2)
    finally:
        signal.signal(signal.SIGUSR1, before)


# Several runs.


def test_runs_may_nest_and_stand_side_by_side() -> None:
    def inner(world: cg.World) -> int:
        return int(world.group.all_reduce(torch.tensor(world.rank)))

    def outer(world: cg.World) -> Any:
        nested = spmd(inner, 3)
        return nested, int(world.group.all_reduce(torch.tensor(sum(nested))))

    assert spmd(outer, 2) == [([3, 3, 3], 18)] * 2


def test_a_failure_of_a_nested_run_goes_up_with_both_ranks() -> None:
    def inner(world: cg.World) -> None:
        if world.rank == 2:
            raise ValueError("inside")
        world.group.barrier()

    def outer(world: cg.World) -> None:
        if world.rank == 1:
            spmd(inner, 3)
        world.group.barrier()

    with pytest.raises(ValueError, match="inside") as caught:
        spmd(outer, 2)
    assert caught.value.__notes__ == ["(raised on rank 2 of 3)", "(raised on rank 1 of 2)"]


def test_a_hundred_runs_leave_nothing() -> None:
    for _ in range(20):
        spmd(lambda world: world.context(cg.Layout(2, tp=2), name="a").tp.barrier(), 2)
        with pytest.raises(ZeroDivisionError):
            spmd(lambda world: 1 // world.rank, 2)


def test_worlds_that_the_program_closed_itself() -> None:
    def run(world: cg.World) -> bool:
        world.close()
        return world.closed

    assert spmd(run, 3) == [True] * 3


def test_the_ranks_are_threads_with_a_default_group_of_nobody() -> None:
    names = spmd(lambda world: threading.current_thread().name, 2)
    assert names == ["commgraph-rank-0", "commgraph-rank-1"]
    assert not dist.is_initialized()


# Descriptors: gloo ends the process where it runs out of them.

FEW = """
import resource, sys
import commgraph as cg
from commgraph.testing import spmd
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    print(spmd(lambda world: world.group.all_gather_object(world.rank)[-1], 24)[0])
except cg.ConfigurationError as error:
    print(error)
"""


def test_a_low_limit_of_open_files_is_raised_or_explained(processes: Processes) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 2000, "this test lowers the limit of its child to 2000"

    raised, explained = outputs([processes.start("-c", FEW, "256", hard) for hard in ("2000", "300")])
    assert raised == "23\n"
    assert "ulimit" in explained
