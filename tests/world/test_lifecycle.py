"""What a process holds after worlds and contexts came and went: descriptors, threads, memory, objects."""

from __future__ import annotations

import gc
import operator
import os
import time
import tracemalloc
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.testing import spmd


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settle(at_most: tuple[int, int] | None = None) -> tuple[int, int]:
    """(descriptors, threads), once what ends a moment after its group has ended: gloo's event loops."""
    gc.collect()
    deadline = time.monotonic() + 5
    counts = descriptors(), native_threads()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        last, counts = counts, (descriptors(), native_threads())
        if counts == last if at_most is None else all(map(operator.le, counts, at_most)):
            break
    return counts


def nothing_grows(cycle: Callable[[], object], cycles: int, *, python_bytes: int, bytes_in_all: int) -> None:
    """Runs `cycle` until everything that is made once is there, then `cycles` times more, and compares."""
    for _ in range(8):
        cycle()
    tracemalloc.start()
    try:
        before, resident, python = settle(), resident_bytes(), tracemalloc.get_traced_memory()[0]
        for _ in range(cycles):
            cycle()
        assert settle(before) == before, "(descriptors, threads)"
        assert tracemalloc.get_traced_memory()[0] - python < python_bytes
        assert resident_bytes() - resident < bytes_in_all
    finally:
        tracemalloc.stop()


def three_contexts(world: cg.World) -> None:
    a = world.context(cg.Layout(2, tp=2), name="a")
    b = world.context(cg.Layout(2, pp=2), name="b")
    c = world.context(cg.Layout(2), name="c")
    x = torch.full((1000,), float(world.rank))
    assert a.tp.all_reduce(x)[0] == 1
    assert b.pp.all_gather_object([world.rank] * 100)[1][0] == 1
    assert c.tp.all_reduce(x) is x
    if world.rank == 0:
        b.pp.send_tensor_dict({"x": x, "y": "z"})
    else:
        assert b.pp.recv_tensor_dict()["y"] == "z"
    b.close()
    c.close()
    a.close()


def test_fifty_worlds_of_three_contexts_leave_nothing() -> None:
    nothing_grows(lambda: spmd(three_contexts, 2), 50, python_bytes=300_000, bytes_in_all=8 << 20)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {"shm": (1, {}), "tcp": (2, {}), "gloo": (1, {"shm": False})}


@pytest.mark.parametrize(("way", "builds"), [("tcp", 20), *(pytest.param(way, 200, marks=pytest.mark.long) for way in WAYS)])
def test_memory_of_closed_contexts_goes_back_to_the_system(way: str, builds: int) -> None:
    """Slots, rings, buffers of links, results in pools: a context that were left behind would show by 8 MiB and more."""
    nodes, options = WAYS[way]

    def build(world: cg.World) -> None:
        x = torch.ones(1 << 20)
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(**options)) as ctx:
            assert ctx.tp.all_reduce(x)[-1] == 2
            assert len(ctx.tp.all_gather_object(bytes(1 << 20))) == 2
            sent = ctx.tp.isend(x, 1 - world.rank)
            assert ctx.tp.recv(1 << 20, torch.float32, 1 - world.rank)[-1] == 1
            sent.wait()

    def run(world: cg.World) -> int:
        for _ in range(10):
            build(world)
        world.group.barrier()
        before = resident_bytes()
        for _ in range(builds):
            build(world)
        world.group.barrier()
        return resident_bytes() - before

    # What both threads of the ranks have freed and malloc keeps, whatever the number of builds.
    assert max(spmd(run, 2, nodes=nodes, timeout=300)) < 64 << 20


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_context_is_freed_without_garbage_collection(way: str) -> None:
    """Nothing refers back to it: its pools, which may hold much, do not wait for the collector."""
    nodes, options = WAYS[way]

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(**options)) as ctx:
            assert ctx.tp.all_reduce(torch.ones(100))[0] == 2
            assert ctx.tp.all_gather_object(world.rank) == [0, 1]
            state = ctx.tp._state
            assert state.network is not None
            held = [weakref.ref(one) for one in (state, state.network.transport, *state.strategies.communicators)]
        del ctx, state
        world.group.barrier()
        assert [one() for one in held] == [None] * len(held)
        world.group.barrier()

    gc.collect()
    gc.disable()
    try:
        spmd(run, 2, nodes=nodes)
    finally:
        gc.enable()


def test_rounds_that_fail_leave_nothing() -> None:
    """Builds that are refused, groups that break, contexts left by an exception, splits: twenty times."""

    def run(world: cg.World) -> None:
        with pytest.raises(cg.BuildError):
            world.context(cg.Layout(2, tp=1 + world.rank), name="a")
        with pytest.raises((ZeroDivisionError, cg.PeerLostError)), world.context(cg.Layout(2, tp=2), name="a") as ctx:
            ctx.tp.all_reduce(torch.ones(1) if world.rank else torch.ones(1 // world.rank))
        broken = world.context(cg.Layout(2, tp=2), name="a")
        call = broken.tp.all_reduce if world.rank else broken.tp.all_gather
        with pytest.raises(cg.CollectiveError):
            call(torch.ones(1), timeout=0.05)
        broken.close()
        split = world.split([1, 0])
        split.group.barrier()
        if world.rank:
            split.close(timeout=timedelta(seconds=1))  # and the other one leaves it to its world

    nothing_grows(lambda: spmd(run, 2), 12, python_bytes=300_000, bytes_in_all=8 << 20)


def test_no_operation_leaves_a_cycle() -> None:
    """What was sent is freed with its last reference, and not when the garbage is collected: it may be most of a device's memory."""
    x, tree = torch.ones(64), {"x": torch.ones(8), "nested": {"y": torch.ones(2, 3)}}

    def by_rank(send: Callable[[cg.GroupCoordinator], object], recv: Callable[[cg.GroupCoordinator], object]) -> Operation:
        return lambda group: send(group) if group.is_first_rank else recv(group)

    Operation = Callable[[cg.GroupCoordinator], object]
    operations: dict[str, Operation] = {
        "all_reduce": lambda group: group.all_reduce(x),
        "all_reduce, the long way": lambda group: group.all_reduce(x.view(8, 8).t()),
        "all_reduce_async": lambda group: group.all_reduce_async(x).wait(),
        "all_gather": lambda group: group.all_gather(x),
        "reduce_scatter": lambda group: group.reduce_scatter(x),
        "all_to_all": lambda group: group.all_to_all(x),
        "broadcast_object": lambda group: group.broadcast_object([1]),
        "all_gather_object": lambda group: group.all_gather_object([1]),
        "broadcast_tensor_dict": lambda group: group.broadcast_tensor_dict(tree),
        "send": by_rank(lambda group: group.send(x), lambda group: group.recv(64, torch.float32)),
        "isend": by_rank(lambda group: group.isend(x).wait(), lambda group: group.irecv(64, torch.float32).wait()),
        "isend with a tag": by_rank(lambda group: group.isend(x, tag=3).wait(), lambda group: group.irecv(64, torch.float32, tag=3).wait()),
        "recv from any rank": by_rank(lambda group: group.send(x, tag=5), lambda group: group.recv(64, torch.float32, cg.ANY, tag=5)),
        "irecv from any rank": by_rank(lambda group: group.send(x), lambda group: group.irecv(64, torch.float32, cg.ANY).wait()),
        "sendrecv": lambda group: group.sendrecv(x, group.next_in_group, 64, torch.float32, group.prev_in_group),
        "to oneself": lambda group: (group.isend(x, group.rank_in_group), group.irecv(64, torch.float32, group.rank_in_group).wait()),
        "isend_object": by_rank(lambda group: group.isend_object([1], 1).wait(), lambda group: group.irecv_object(0).wait()),
        "an object to oneself": lambda group: (
            group.isend_object([1], group.rank_in_group),
            group.irecv_object(group.rank_in_group).wait(),
        ),
        "scatter_object": lambda group: group.scatter_object([1, 2]),
        "scatter_object, large": lambda group: group.scatter_object([b"x" * 50_000] * 2),
        "gather_object": lambda group: group.gather_object([1]),
        "send_object": by_rank(lambda group: group.send_object([1], 1), lambda group: group.recv_object(0)),
        "send_tensor_dict": by_rank(lambda group: group.send_tensor_dict(tree), lambda group: group.recv_tensor_dict()),
        "isend_tensor_dict": by_rank(lambda group: group.isend_tensor_dict(tree).wait(), lambda group: group.irecv_tensor_dict().wait()),
    }

    def run(world: cg.World) -> dict[str, int]:
        left = {}
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            for name, operation in operations.items():
                operation(ctx.tp)
                ctx.tp.barrier()
                gc.collect()
                ctx.tp.barrier()
                for _ in range(5):
                    operation(ctx.tp)
                ctx.tp.barrier()
                left[name] = gc.collect() if ctx.tp.is_first_rank else 0
                ctx.tp.barrier()
        return left

    gc.collect()
    gc.freeze()  # a collection looks at what is made from here on
    gc.disable()
    try:
        assert spmd(run, 2)[0] == dict.fromkeys(operations, 0)
    finally:
        gc.enable()


def test_a_world_forgets_its_closed_contexts_and_splits() -> None:
    def run(world: cg.World) -> Any:
        def once() -> list[weakref.ref[Any]]:
            with world.context(cg.Layout(2, tp=2), name="a") as ctx, world.split([0, 1]) as split:
                return [weakref.ref(ctx), weakref.ref(split), weakref.ref(ctx.tp)]

        gone = [ref for _ in range(5) for ref in once()]
        world.split([0, 1])  # the closed ones are forgotten when the next one is made
        gc.collect()
        return [ref() for ref in gone]

    assert spmd(run, 2) == [[None] * 15] * 2


def test_a_closed_world_is_collected_with_all_that_it_held() -> None:
    def run(world: cg.World) -> Any:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        return weakref.ref(world), weakref.ref(ctx), weakref.ref(ctx.tp), weakref.ref(world.group)

    refs = [ref for refs in spmd(run, 2) for ref in refs]
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_kept_context_holds_no_connections_after_close() -> None:
    """A model may outlive its context; what it keeps then is facts."""
    before = settle()

    def run(world: cg.World) -> cg.ParallelContext:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        ctx.tp.all_reduce(torch.ones(1))
        return ctx

    contexts = spmd(run, 2)
    counts = settle(before)
    assert all(map(operator.le, counts, before)), (counts, before)
    assert [ctx.tp.rank_in_group for ctx in contexts] == [0, 1]
    assert contexts[0].layout == cg.Layout(2, tp=2)


def test_cycles_beside_a_default_group_leave_it_untouched() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        default, names = dist.group.WORLD, dict(dist.distributed_c10d._world.pg_names)
        for _ in range(5):
            spmd(three_contexts, 2)
            with cg.World.from_torch() as world:
                world.context(cg.Layout(1), name="a").tp.all_reduce(torch.ones(1))
        assert dist.group.WORLD is default
        assert dict(dist.distributed_c10d._world.pg_names) == names
        x = torch.ones(1)
        dist.all_reduce(x)
        assert x.item() == 1
    finally:
        dist.destroy_process_group()
