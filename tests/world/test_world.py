"""Worlds: how they are made, what they know, how they are split and closed. The ranks are threads, each with a World of its own."""

from __future__ import annotations

import copy
import enum
import gc
import os
import pickle
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.testing import spmd
from tests.helpers import again_if_late, free_port, in_time, within
from tests.processes import Processes, outputs

SOON = timedelta(seconds=20)
MOMENT = timedelta(seconds=1)
# What a launcher says, and nothing of what the machine that runs this test may say.
NOBODY: Mapping[str, str] = {}


def together(*programs: Callable[[], Any], timeout: float = 40) -> list[Any]:
    """Runs each program on a thread of its own; results in order, or exceptions in their place."""
    results: list[Any] = [TimeoutError("still running")] * len(programs)

    def run(i: int) -> None:
        try:
            results[i] = programs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(programs))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return results


def sum_of_ranks(world: cg.World) -> int:
    with world:
        return int(world.group.all_reduce(torch.tensor(world.rank)))


def torchrun_env(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


# One process.


def test_a_world_of_one_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Any:
        raise AssertionError(f"a world of one rank reached for {args}")

    # Every store, and whatever torch makes in C++ as seen from outside: descriptors and threads.
    for name in ("TCPStore", "FileStore"):
        monkeypatch.setattr(dist, name, refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    store = UntouchedStore()
    gc.collect()
    descriptors, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    native = len(os.listdir("/proc/self/task"))
    for world in (
        cg.World.from_env(NOBODY),
        cg.World.from_env({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}),
        cg.World.from_env(torchrun_env(0, 1, 1)),
        cg.World.connect("tcp://127.0.0.1:1", rank=0, world_size=1),
        cg.World.from_store(store, rank=0, world_size=1),
    ):
        with world:
            assert (world.rank, world.size, world.local_rank, world.local_size, world.node_rank, world.node_count) == (0, 1, 0, 1, 0, 1)
            assert dict(world.nodes) == {0: 0}
            with world.context(cg.Layout(1), name="a") as ctx:
                x = torch.ones(3)
                assert ctx.tp.all_reduce(x) is x
                assert world.group.all_gather_object("x") == ["x"]
                assert ctx.tp.cpu_group is None
                assert dict(ctx.tp.communicators) == {}
            assert world.split([0]).size == 1
            assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert store.calls == []
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/task")) <= native  # fewer where an earlier test's event loop ended meanwhile


class UntouchedStore(dist.Store):
    """Refuses everything, and says what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("set", "get", "add", "wait", "check", "multi_get", "multi_set", "compare_set", "clone", "delete_key"):
            self.calls.append(name)
        return super().__getattribute__(name)


# Ways to be made.


def test_from_env_as_torchrun_starts_it() -> None:
    port = free_port()

    def rank(number: int) -> Callable[[], Any]:
        def run() -> Any:
            world = cg.World.from_env(torchrun_env(number, 3, port), timeout=SOON)
            return world.rank, world.size, world.local_rank, world.local_size, sum_of_ranks(world)

        return run

    assert together(*map(rank, range(3))) == [(r, 3, r, 3, 3) for r in range(3)]


@pytest.mark.parametrize("way", ["tcp", "file", "hash store", "tcp store", "file store", "prefix store"])
def test_every_way_to_meet(way: str, tmp_path: Path) -> None:
    port = free_port()
    hash_store = dist.HashStore()

    def make(rank: int) -> cg.World:
        if way == "tcp":
            return cg.World.connect(f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=SOON)
        if way == "file":
            return cg.World.connect(f"file://{tmp_path}/meet", rank=rank, world_size=3, timeout=SOON)
        store: dist.Store = hash_store
        if way == "tcp store":
            store = dist.TCPStore("127.0.0.1", port, 3, rank == 0, timeout=SOON, wait_for_workers=False)
        elif way == "file store":
            store = dist.FileStore(str(tmp_path / "meet"), 3)
        elif way == "prefix store":
            store = dist.PrefixStore("mine", hash_store)
        return cg.World.from_store(store, rank=rank, world_size=3, timeout=SOON)

    def run(rank: int) -> Any:
        with make(rank) as world:
            ctx = world.context(cg.Layout(3, tp=3), name="a")
            return ctx.tp.all_gather(torch.tensor([world.rank])).tolist(), world.group.all_gather_object({"rank": rank})

    assert together(*(lambda r=r: run(r) for r in range(3))) == [([0, 1, 2], [{"rank": 0}, {"rank": 1}, {"rank": 2}])] * 3


def test_explicit_arguments_come_first(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        environ = torchrun_env(rank, 2, 1)  # nobody serves at port 1: only init_method leads anywhere
        world = cg.World.from_env(environ, init_method=f"file://{tmp_path}/meet", local_rank=7 - rank, device="cpu", timeout=SOON)
        return world.local_rank, str(world.device), sum_of_ranks(world)

    assert together(lambda: run(0), lambda: run(1)) == [(7, "cpu", 1), (6, "cpu", 1)]


def test_engines_launched_apart_join() -> None:
    """Two engines of two ranks, each with a launcher of its own: four ranks, numbered engine by engine."""
    engines, meeting = (free_port(), free_port()), free_port()

    def run(engine: int, rank: int) -> Any:
        environ = torchrun_env(rank, 2, engines[engine])
        world = cg.World.from_env(environ, dp_rank=engine, dp_size=2, init_method=f"tcp://127.0.0.1:{meeting}", timeout=SOON)
        with world:
            ctx = world.context(cg.Layout(4, dp=2, tp=2), name="a")
            return world.rank, world.size, world.local_rank, ctx.dp.ranks, ctx.tp.ranks, int(ctx.dp.all_reduce(torch.tensor(world.rank)))

    # On one node the local rank counts all engines: the launcher of one knows only its own.
    results = together(*(lambda e=e, r=r: run(e, r) for e in range(2) for r in range(2)))
    assert results == [
        (0, 4, 0, (0, 2), (0, 1), 2),
        (1, 4, 1, (1, 3), (0, 1), 4),
        (2, 4, 2, (0, 2), (2, 3), 2),
        (3, 4, 3, (1, 3), (2, 3), 4),
    ]


def test_single_processes_join_as_engines(tmp_path: Path) -> None:
    def run(engine: int) -> Any:
        return sum_of_ranks(cg.World.from_env(NOBODY, dp_rank=engine, dp_size=3, init_method=f"file://{tmp_path}/meet", timeout=SOON))

    assert together(*(lambda e=e: run(e) for e in range(3))) == [3, 3, 3]
    with pytest.raises(cg.LaunchError, match="init_method"):
        cg.World.from_env(NOBODY, dp_rank=0, dp_size=2)


def test_the_environment_is_read_and_never_written(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert together(
        *(
            lambda r=r: sum_of_ranks(
                cg.World.from_env(torchrun_env(r, 2, 1), init_method=f"file://{tmp_path}/meet", timeout=SOON),
            )
            for r in range(2)
        )
    ) == [1, 1]
    with cg.World.from_env() as world:  # os.environ itself: of a test, so nobody's launch
        world.context(cg.Layout(1), name="a").explain()
    spmd(lambda world: world.context(cg.Layout(2, tp=2), name="a").warmup(), 2)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda: cg.World.connect("tcp://127.0.0.1:1", rank=2, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("tcp://127.0.0.1:1", rank=-1, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("tcp://127.0.0.1:1", rank=0, world_size=0, timeout=MOMENT),
        lambda: cg.World.connect("tcp://127.0.0.1", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("tcp://127.0.0.1:0", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("tcp://127.0.0.1:99999", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("env://", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("file:relative", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("file://host/path", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.connect("", rank=0, world_size=2, timeout=MOMENT),
        lambda: cg.World.from_store(dist.HashStore(), rank=3, world_size=2, timeout=MOMENT),
        lambda: cg.World.from_env(NOBODY, dp_rank=2, dp_size=2, init_method="tcp://127.0.0.1:1"),
        lambda: cg.World.from_env({"RANK": "0"}),
        lambda: cg.World.from_env({"RANK": "2", "WORLD_SIZE": "2"}),
        cg.World.from_torch,
    ],
)
def test_what_cannot_be_a_launch(call: Callable[[], object]) -> None:
    with pytest.raises(cg.LaunchError):
        call()


# Nobody there.


@pytest.mark.parametrize("way", ["file", "store", "serve"])
@again_if_late
def test_ranks_that_never_come_are_named_in_time(way: str, tmp_path: Path) -> None:
    method = {"file": f"file://{mkdtemp(dir=tmp_path)}/meet", "serve": f"tcp://127.0.0.1:{free_port()}"}

    def make() -> cg.World:
        if way == "store":
            return cg.World.from_store(dist.HashStore(), rank=0, world_size=3, timeout=MOMENT)
        return cg.World.connect(method[way], rank=0, world_size=3, timeout=MOMENT)

    with within(MOMENT.total_seconds() + 2), pytest.raises(cg.BuildError, match=r"1, 2") as caught:
        make()
    assert "2 of 3" in str(caught.value)


def test_nobody_serves_or_somebody_else_does() -> None:
    port = free_port()
    with pytest.raises(cg.BuildError, match="rank 0 did not serve there within 1 s"):
        cg.World.connect(f"tcp://127.0.0.1:{port}", rank=1, world_size=2, timeout=MOMENT)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(cg.BuildError, match="the port is taken"):
        cg.World.connect(f"tcp://127.0.0.1:{port}", rank=0, world_size=2, timeout=MOMENT)


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_world_that_could_not_be_built_blames_nobody_for_not_closing_it() -> None:
    @attrs.frozen
    class Broken(cg.CpuPlatform):
        def communicators(self, *_: object) -> Any:
            raise cg.BackendUnavailableError("no such thing here")

    def run(rank: int, store: dist.Store) -> Any:
        return cg.World.from_store(store, rank=rank, world_size=2, platform=Broken(), timeout=SOON)

    store = dist.HashStore()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = together(lambda: run(0, store), lambda: run(1, store))
        assert [type(result) for result in results] == [cg.BackendUnavailableError] * 2
        del results
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_ranks_with_and_without_a_secret_do_not_meet() -> None:
    store = dist.HashStore()

    def run(rank: int) -> Any:
        return cg.World.from_store(store, rank=rank, world_size=2, authkey=b"secret" if rank else None, timeout=SOON)

    results = together(lambda: run(0), lambda: run(1))
    assert [type(result) for result in results] == [cg.LayoutMismatchError] * 2
    assert all("authkey" in str(result) and "ranks 1: yes" in str(result) for result in results)


# Several worlds.


def test_two_worlds_at_once_from_one_store() -> None:
    """The n-th world of a rank meets the n-th of every other; both are used, in turns, until the end."""
    store = dist.HashStore()

    def run(rank: int) -> Any:
        with cg.World.from_store(store, rank=rank, world_size=2, timeout=SOON) as first:
            a = first.context(cg.Layout(2, tp=2), name="same name")
            with cg.World.from_store(store, rank=rank, world_size=2, timeout=SOON) as second:
                b = second.context(cg.Layout(2, pp=2), name="same name")
                sums = [(int(a.tp.all_reduce(torch.tensor(1 + i))), int(b.pp.all_reduce(torch.tensor(10 + i)))) for i in range(5)]
                first.store.set(f"key {rank}", "first")
                second.store.set(f"key {rank}", "second")
                keys = first.store.get(f"key {1 - rank}"), second.store.get(f"key {1 - rank}")
            # The second is closed; the first goes on.
            return sums, keys, int(a.tp.all_reduce(torch.tensor(5)))

    expected = ([(2 * (1 + i), 2 * (10 + i)) for i in range(5)], (b"first", b"second"), 10)
    assert together(lambda: run(0), lambda: run(1)) == [expected] * 2


def test_worlds_of_other_ranks_and_sizes_in_one_process(tmp_path: Path) -> None:
    """This process is rank 0 of one world and rank 1 of another."""

    def run(me: int) -> Any:
        left, right = me, (me + 1) % 3
        # Ring of three worlds of two: world w joins ranks w (as 0) and w - 1 (as 1). Each is entered on a thread of its own.
        return together(
            lambda: cg.World.connect(f"file://{tmp_path}/{left}", rank=0, world_size=2, timeout=SOON),
            lambda: cg.World.connect(f"file://{tmp_path}/{right}", rank=1, world_size=2, timeout=SOON),
        )

    pairs = together(*(lambda me=me: run(me) for me in range(3)))
    sums = together(*(lambda world=world, me=me: gather_and_close(world, me) for me, pair in enumerate(pairs) for world in pair))
    assert sums == [["0", "2"], ["1", "0"], ["1", "0"], ["2", "1"], ["2", "1"], ["0", "2"]]


def gather_and_close(world: cg.World, me: int) -> Any:
    with world:
        return world.group.all_gather_object(str(me))


def test_a_world_beside_an_initialised_torch_distributed() -> None:
    """The ranks of the world are threads of a process whose default group stays what it was."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        default = dist.group.WORLD
        registered = dict(dist.distributed_c10d._world.pg_names)
        results = spmd(lambda world: int(world.context(cg.Layout(2, tp=2), name="a").tp.all_reduce(torch.tensor(world.rank + 1))), 2)
        assert results == [3, 3]
        with cg.World.from_torch() as world:
            assert (world.rank, world.size) == (0, 1)
            x = torch.ones(2)
            assert world.context(cg.Layout(1), name="a").tp.all_reduce(x) is x
        assert dist.group.WORLD is default
        assert dict(dist.distributed_c10d._world.pg_names) == registered
        y = torch.ones(2)
        dist.all_reduce(y)
        assert y.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()


# Facts.


def test_facts() -> None:
    def run(world: cg.World) -> Any:
        assert isinstance(world.platform, cg.CpuPlatform)
        assert world.device == torch.device("cpu")
        assert world.group.ranks == tuple(range(6))
        assert world.group.name == "world"
        assert world.group.rank == world.rank
        with pytest.raises(TypeError):
            world.nodes[0] = 1  # type: ignore[index]
        world.store.set(f"from {world.rank}", "hello")
        assert world.store.get(f"from {(world.rank + 1) % 6}") == b"hello"
        return world.rank, world.size, world.local_rank, world.local_size, world.node_rank, world.node_count, dict(world.nodes)

    nodes = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert spmd(run, 6, nodes=3) == [(r, 6, r % 2, 2, r // 2, 3, nodes) for r in range(6)]
    assert spmd(run, 6) == [(r, 6, r, 6, 0, 1, dict.fromkeys(range(6), 0)) for r in range(6)]


def test_objects_need_a_key_between_nodes_only() -> None:
    def run(world: cg.World) -> Any:
        with pytest.raises(TypeError, match="authkey"):
            world.group.all_gather_object(print)  # a function travels by pickle alone
        return world.group.all_gather_object({"plain": [1, "x", None, b"y", (1.5,)]})

    assert spmd(run, 2, nodes=2) == [[{"plain": [1, "x", None, b"y", (1.5,)]}] * 2] * 2
    assert spmd(lambda world: world.group.all_gather_object(print), 2) == [[print, print]] * 2


def test_worlds_are_not_copied_and_not_pickled() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="target")
        assert copy.copy(world) is copy.deepcopy(world) is world
        with pytest.raises(TypeError, match="each process makes its own"):
            pickle.dumps(world)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(ctx)
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(ctx.tp)
        assert "rank 0 of 2" in repr(world) or "rank 1 of 2" in repr(world)
        assert "\n" not in repr(world) + repr(ctx) + repr(ctx.tp)

    spmd(run, 2)


# Split.


def test_split_is_collective_over_its_ranks_only() -> None:
    def run(world: cg.World) -> Any:
        if world.rank in (1, 4):
            return "elsewhere"  # and calls nothing at all
        small = world.split([5, 0, 3, 2])
        ctx = small.context(cg.Layout(4, tp=2, pp=2), name="a")
        gathered = ctx.world.all_gather_object(world.rank)
        return small.rank, small.size, dict(small.nodes), small.local_rank, small.local_size, gathered, ctx.tp.ranks

    results = spmd(run, 6, nodes=2)
    # 0, 1, 2 on one node, 3, 4, 5 on the other; the new world counts 5, 0, 3, 2 and its nodes by their lowest rank.
    nodes = {0: 0, 1: 1, 2: 0, 3: 1}
    assert results == [
        (1, 4, nodes, 0, 2, [5, 0, 3, 2], (0, 1)),
        "elsewhere",
        (3, 4, nodes, 1, 2, [5, 0, 3, 2], (2, 3)),
        (2, 4, nodes, 1, 2, [5, 0, 3, 2], (2, 3)),
        "elsewhere",
        (0, 4, nodes, 0, 2, [5, 0, 3, 2], (0, 1)),
    ]


def test_splits_of_splits_side_by_side_and_again() -> None:
    def run(world: cg.World) -> Any:
        half = world.split([0, 1] if world.rank < 2 else [2, 3])
        again = world.split([0, 1] if world.rank < 2 else [2, 3])
        alone = half.split([half.rank])
        turned = world.split([3, 2, 1, 0])
        results = [int(w.group.all_reduce(torch.tensor(world.rank))) for w in (half, again, alone, turned)]
        half.close()
        assert again.group.world_size == 2
        results.append(int(again.group.all_reduce(torch.tensor(1))))
        return results, turned.rank

    assert spmd(run, 4) == [([1, 1, 0, 6, 2], 3), ([1, 1, 1, 6, 2], 2), ([5, 5, 2, 6, 2], 1), ([5, 5, 3, 6, 2], 0)]


def test_what_cannot_be_split() -> None:
    def run(world: cg.World) -> None:
        for ranks in ([0, 2], [0, 0, 1], [-1, 0], [1 - world.rank], []):
            with pytest.raises(cg.LayoutError, match="split"):
                world.split(ranks)
        assert world.split([0, 1]).size == 2

    spmd(run, 2)


@again_if_late
def test_a_rank_that_never_comes_to_a_split_is_a_build_error() -> None:
    store, given_up = dist.HashStore(), threading.Event()

    def run(rank: int) -> Any:
        world = cg.World.from_store(store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
        try:
            begun = time.monotonic()
            if rank == 0:
                with pytest.raises(cg.BuildError, match=r"rank 1 of 2 did not come within 2 s"):
                    world.split([0, 1])
                given_up.set()
            else:
                assert given_up.wait(30)
            return time.monotonic() - begun
        finally:
            world.close(timeout=timedelta(seconds=5))

    took = together(lambda: run(0), lambda: run(1))
    assert min(took) > 1.5
    in_time(max(took), 2 + 2)


def test_closing_a_world_closes_its_splits_and_their_contexts() -> None:
    def run(world: cg.World) -> None:
        small = world.split([0, 1])
        ctx = small.context(cg.Layout(2, tp=2), name="a")
        older = world.context(cg.Layout(2, tp=2), name="a")
        world.close()
        assert small.closed
        assert ctx.closed
        assert older.closed
        for call in (
            ctx.tp.barrier,
            older.tp.barrier,
            small.group.barrier,
            world.group.barrier,
            lambda: world.context(cg.Layout(2), name="b"),
            lambda: world.split([0, 1]),
            lambda: small.context(cg.Layout(2), name="b"),
        ):
            with pytest.raises(cg.ContextClosedError):
                call()
        world.close()
        small.close()
        ctx.close()

    spmd(run, 2)


# Closing.


def test_use_after_close_and_closing_twice_with_one_rank() -> None:
    world = cg.World.from_env(NOBODY)
    ctx = world.context(cg.Layout(1), name="a")
    world.close()
    world.close(empty_cache=True)
    assert world.closed
    assert ctx.closed
    for call in (lambda: ctx.tp.all_reduce(torch.ones(1)), world.group.barrier, lambda: world.context(cg.Layout(1), name="b")):
        with pytest.raises(cg.ContextClosedError):
            call()


@again_if_late
def test_an_exception_in_a_with_statement_releases_the_peers_at_once() -> None:
    store = dist.HashStore()

    def run(rank: int) -> None:
        with cg.World.from_store(store, rank=rank, world_size=3, timeout=timedelta(seconds=30)) as world:
            ctx = world.context(cg.Layout(3, tp=3), name="a")
            world.group.barrier()
            if rank == 1:
                raise ZeroDivisionError
            ctx.tp.all_reduce(torch.ones(1))

    with within(2):
        first, raiser, last = together(*(lambda r=r: run(r) for r in range(3)))
    assert isinstance(raiser, ZeroDivisionError)
    # The one that raised, or one that it took along.
    assert isinstance(first, cg.PeerLostError)
    assert first.rank in (1, 2)
    assert isinstance(last, cg.PeerLostError)
    assert last.rank in (0, 1)


@again_if_late
def test_closing_without_the_others_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1 is busy elsewhere and never closes: rank 0 waits as long as it was told, then leaves, and says so."""
    store = dist.HashStore()
    left = threading.Event()

    def run(rank: int) -> Any:
        world = cg.World.from_store(store, rank=rank, world_size=2, timeout=SOON)
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        if rank == 0:
            begun = time.monotonic()
            world.close(timeout=MOMENT)
            left.set()
            return time.monotonic() - begun
        left.wait(30)
        with pytest.raises(cg.CollectiveError):
            ctx.tp.all_reduce(torch.ones(1), timeout=20)
        begun = time.monotonic()
        world.close()
        return time.monotonic() - begun

    first, second = together(lambda: run(0), lambda: run(1))
    assert first >= 1
    in_time(first, 2 * (MOMENT.total_seconds() + 2))  # of the context, then of the world
    in_time(second, 2, "to close where the peer is known to be gone")
    assert "was closed on rank 0 without its peers" in caplog.text


def test_a_world_that_nobody_closed_warns_and_lets_go() -> None:
    store = dist.HashStore()

    def make(rank: int) -> cg.World:
        world = cg.World.from_store(store, rank=rank, world_size=2, timeout=SOON)
        world.context(cg.Layout(2, tp=2), name="a")
        return world

    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    worlds = together(lambda: make(0), lambda: make(1))
    assert len(os.listdir("/proc/self/fd")) > descriptors
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worlds.clear()
        gc.collect()
    messages = [str(warning.message) for warning in caught if warning.category is ResourceWarning]
    assert len(messages) == 2
    assert all("was never closed" in message for message in messages)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_closed_world_does_not_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spmd(lambda world: None, 2)
        cg.World.from_env(NOBODY)  # one rank holds nothing
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# Split by color.


@settings(max_examples=15)
@given(st.data())
def test_split_by_is_comm_split(data: st.DataObject) -> None:
    """Against MPI's words: one world for each color, its ranks in the order of (key, rank); None gets none."""
    size = data.draw(st.integers(1, 5))
    colors = [data.draw(st.sampled_from([None, 0, 1, "train", b"x", ("train", 1)])) for _ in range(size)]
    keys = [data.draw(st.integers(-2, 2)) for _ in range(size)]
    nodes = data.draw(st.integers(1, min(2, size)))

    def run(world: cg.World) -> Any:
        small = world.split_by(colors[world.rank], keys[world.rank])
        if small is None:
            return None
        ranks = small.group.all_gather_object(world.rank)
        return small.rank, small.size, ranks, int(small.group.all_reduce(torch.tensor(10**world.rank)))

    for rank, found in enumerate(spmd(run, size, nodes=nodes)):
        if colors[rank] is None:
            assert found is None
            continue
        members = [other for other in range(size) if colors[other] == colors[rank]]
        members.sort(key=lambda other: (keys[other], other))
        assert found == (members.index(rank), len(members), members, sum(10**other for other in members))


def test_split_by_takes_what_counts_as_a_whole_number_or_text() -> None:
    class Role(enum.StrEnum):
        TRAINER = "trainer"

    def run(world: cg.World) -> Any:
        mine: tuple[Any, ...] = (
            (np.int64(3), Role.TRAINER, True, torch.tensor(2)) if world.rank else (3, "trainer", world.size == 2, np.uint8(2))
        )
        return [world.split_by(color, np.int32(-world.rank)).group.all_gather_object(world.rank) for color in mine]

    assert spmd(run, 2) == [[[1, 0]] * 4] * 2


def test_a_wrong_color_or_key_on_one_rank_is_an_error_on_all() -> None:
    def run(world: cg.World) -> Any:
        for color, key, said in (
            ([1, 2], 0, "rank 1: color=[1, 2]: a list is no color"),
            (1.5, 0, "rank 1: color=1.5: a float is no color"),
            (("a", {}), 0, "rank 1: color=('a', {}): a dict is no color"),
            (0, "first", "rank 1: key='first' is not a whole number"),
            (None, None, "rank 1: key=None is not a whole number"),
            (object, 2.5, "rank 1: color=<class 'object'>: a type is no color"),
        ):
            with pytest.raises(cg.LayoutError) as caught:
                world.split_by(*((color, key) if world.rank == 1 else (0, 0)))
            assert f"split_by on rank {world.rank} of 3" in str(caught.value)
            assert said in str(caught.value)
            assert "rank 0:" not in str(caught.value)
        small = world.split_by(0)  # the world goes on
        return small.size

    assert spmd(run, 3) == [3, 3, 3]


def test_split_by_of_a_split_over_nodes_and_again() -> None:
    def run(world: cg.World) -> Any:
        node = world.split_by(world.node_rank)
        across = world.split_by(world.local_rank)
        again = world.split_by(world.node_rank)
        inner = node.split_by("first" if node.rank == 0 else None)
        world.close()
        assert all(w.closed for w in (node, across, again))
        assert inner is None or inner.closed
        return node.node_count, node.local_size, across.node_count, across.size, again.size, inner and inner.size

    assert spmd(run, 4, nodes=2) == [(1, 2, 2, 2, 2, 1), (1, 2, 2, 2, 2, None)] * 2


def test_split_by_of_a_closed_world_and_of_one_rank() -> None:
    world = cg.World.from_env(NOBODY)
    assert world.split_by(None) is None
    assert world.split_by("me", 5).size == 1
    with pytest.raises(cg.LayoutError, match="no color"):
        world.split_by([])  # type: ignore[call-overload]
    world.close()
    with pytest.raises(cg.ContextClosedError):
        world.split_by(0)


def test_a_rank_that_never_comes_to_split_by_is_a_timeout() -> None:
    store, gave_up = dist.HashStore(), threading.Event()

    def run(rank: int) -> None:
        world = cg.World.from_store(store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
        try:
            if rank == 0:
                with pytest.raises(cg.CollectiveTimeoutError, match="all_gather_object"):
                    world.split_by(0)
                gave_up.set()
            else:
                gave_up.wait(20)
        finally:
            world.close(timeout=timedelta(seconds=1))

    assert together(lambda: run(0), lambda: run(1)) == [None, None]


SPLIT_BY = """
import sys
import torch
import commgraph as cg
where, rank = sys.argv[1], int(sys.argv[2])
with cg.World.connect(f"file://{where}", rank=rank, world_size=4) as world:
    part = world.split_by("trainer" if rank < 2 else "generator" if rank < 3 else None, key=-rank)
    if part is None:
        print(world.rank, "none")
    else:
        ctx = part.context(cg.Layout(part.size, tp=part.size), name="part")
        print(world.rank, part.rank, part.size, int(ctx.tp.all_reduce(torch.tensor(10**rank))))
"""


def test_split_by_between_processes(tmp_path: Path, processes: Processes) -> None:
    printed = outputs([processes.start("-c", SPLIT_BY, tmp_path / "meet", str(rank)) for rank in range(4)])
    assert [line.split() for line in printed] == [["0", "1", "2", "11"], ["1", "0", "2", "11"], ["2", "0", "1", "100"], ["3", "none"]]
