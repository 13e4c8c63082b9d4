"""Guarantees of worlds and contexts where other communicator layers have none: separate contexts, bounded start-up, bound ports."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.communicators.shm import ShmCommunicator
from commgraph.shm import native_module
from commgraph.shm.host_memory import HostMemory
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore
from tests.helpers import CountingStore, again_if_late, within


def work(ctx: cg.ParallelContext, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(100 * seed + ctx.rank)
    parts = []
    for _ in range(3):
        x = torch.randn(17, 8, generator=random)
        for name in ("tp", "dp", "pp", "ep", "dcp"):
            parts += [ctx[name].all_reduce(x), ctx[name].all_gather(x, 0)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.skipif(native_module.load() is None, reason="there is no native module")
def test_a_rank_that_is_slow_in_a_build_is_in_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of a build does not count as a call: a peer that has ended it may be in its first call already."""
    init = ShmCommunicator.__init__

    class Slow:
        """A native group one rank of which is slow after the last step of the build."""

        def __init__(self, group: Any, is_slow: bool) -> None:
            self.group, self.is_slow = group, is_slow

        def __getattr__(self, name: str) -> Any:
            return getattr(self.group, name)

        def probe_cma(self, *args: Any) -> None:
            self.group.probe_cma(*args)
            if self.is_slow:
                time.sleep(0.2)

    def slow_init(self: ShmCommunicator, memory: HostMemory, *how: Any) -> None:
        init(self, memory, *how)
        self._group = Slow(self._group, memory.rank_in_group == 1)

    monkeypatch.setattr(ShmCommunicator, "__init__", slow_init)

    def program(world: cg.World) -> list[float]:
        x = torch.ones(1)
        found = [float(world.group.all_reduce(x)), world.group.broadcast_object(7, 0)]
        found.append(float(world.split([1, 0]).group.all_gather(x, 0).sum()))
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        found.append(float(ctx.tp.reduce_scatter(torch.ones(2))))
        found.append(float(ctx.tp.sibling("b").all_reduce_async(x).wait()))
        return found

    assert spmd(program, 2, timeout=30) == [[2, 7, 2, 2, 2]] * 2


def test_eight_contexts_from_two_threads_never_answer_for_each_other() -> None:
    """A global getter could answer with another grid's group; eight contexts are used alternately from two threads, bit-exact."""
    layouts = [
        cg.Layout(4, tp=2, pp=2),
        cg.Layout(4, tp=4),
        cg.Layout(4, pp=4),
        cg.Layout(4, dp=2, tp=2),
        cg.Layout(4),
        cg.Layout(4, pcp=2, tp=2),
        cg.Layout(4, tp=4, dcp=2),
        cg.Layout(4, dp=4),
    ]

    def program(world: cg.World) -> list[bool]:
        contexts = [world.context(layout, name=f"context {i}") for i, layout in enumerate(layouts)]
        alone = [work(ctx, i) for i, ctx in enumerate(contexts)]
        together: dict[int, torch.Tensor] = {}

        def half(first: int) -> None:
            for i in range(first, len(contexts), 2):
                together[i] = work(contexts[i], i)

        threads = [threading.Thread(target=half, args=(first,)) for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [torch.equal(alone[i], together[i]) for i in range(len(contexts))]

    assert spmd(program, 4) == [[True] * 8] * 4


def test_asking_for_a_group_that_a_context_lacks_raises() -> None:
    """A draft's tensor parallelism cannot be ignored silently: a context has the groups of its own layout and no other."""

    def program(world: cg.World) -> None:
        ctx = world.context(cg.Layout.from_axes(2, {"attention": 2}), name="main")
        with pytest.raises(cg.LayoutError, match=r"'tp'.*attention"):
            ctx.tp  # noqa: B018 - the access is what raises

    spmd(program, 2)


def store_keys(layout: cg.Layout, *, shm: bool = False) -> list[int]:
    """How many keys each rank touches while it builds a context of `layout`."""
    n = layout.world_size
    store = ThreadStore()
    counts = [0] * n

    def rank(number: int) -> None:
        counting = CountingStore(store)
        with cg.World.from_store(counting, rank=number, world_size=n, timeout=timedelta(seconds=30)) as world:
            before = counting.keys
            with world.context(layout, name="main", options=cg.CommunicatorOptions(shm=shm)):
                counts[number] = counting.keys - before

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def test_building_touches_only_the_groups_of_this_rank() -> None:
    """A rank's store traffic is bounded by the sizes of its own groups, however many other groups there are."""
    n = 8

    def around_a_pair(others: int) -> cg.Layout:
        """Ranks 0 and 1 have the world and each other; the others share ever more groups, of ever more sizes."""
        more = {f"more{i}": [[0], [1], list(range(2, n - i)), *([rank] for rank in range(n - i, n))] for i in range(others)}
        return cg.Layout.from_groups(n, {"pair": [[0, 1], *([rank] for rank in range(2, n))], **more})

    few, many = store_keys(around_a_pair(0)), store_keys(around_a_pair(5))
    assert few[:2] == many[:2]
    assert few[2] < many[2], "those who have more groups do pay for them"
    assert store_keys(around_a_pair(0), shm=True) == store_keys(around_a_pair(5), shm=True), "in shared memory groups need no store"
    for layout in (cg.Layout(n, tp=2), cg.Layout(n, pp=2, tp=2), cg.Layout(n, tp=8), cg.Layout(n, dp=2, pp=2, tp=2)):
        counts = store_keys(layout)
        for rank, count in enumerate(counts):
            distinct = {layout.ranks(name, rank) for name in layout.names} - {(rank,)}
            # Rank 0 reads what every rank says, once before and once after; gloo takes a few keys for each member of a group.
            assert 0 < count <= 8 * sum(map(len, distinct)) + (4 * n if rank == 0 else 0) + 16, (layout, rank)


def test_a_world_of_one_rank_does_no_rendezvous_at_all() -> None:
    """One rank, no store operation."""
    counting = CountingStore(ThreadStore())
    with cg.World.from_store(counting, rank=0, world_size=1) as world, world.context(cg.Layout(1), name="main") as ctx:
        x = torch.ones(3)
        assert ctx.tp.all_reduce(x) is x
    assert not counting.operations


@again_if_late
def test_a_layout_of_a_hundred_thousand_ranks_takes_less_than_a_second() -> None:
    """The groups of every thousandth rank included."""
    with within(1):
        layout = cg.Layout(100_000, dp=125, pp=10, pcp=2, tp=8, dcp=2)
        assert all(rank in layout.ranks(name, rank) for rank in range(0, 100_000, 1000) for name in layout.names if name != "world")


def test_sixty_engines_in_a_process_and_a_default_group_untouched(tmp_path: Path) -> None:
    """Sixty cycles beside an initialised default group of torch, which stays as it was; descriptors, threads and memory do not grow."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = dist.group.WORLD

        def program(world: cg.World) -> list[tuple[int, int]]:
            marks = []
            for cycle in range(60):
                layouts = (cg.Layout(2, tp=2), cg.Layout(2, pp=2), cg.Layout(2, dp=2))
                contexts = [world.context(layout, name=f"engine {i}") for i, layout in enumerate(layouts)]
                for ctx in contexts:
                    assert ctx.world.all_reduce(torch.ones(2)).tolist() == [2, 2]
                    assert ctx.ep.broadcast_object(cycle) == cycle
                for ctx in contexts:
                    ctx.close()
                world.group.barrier()
                if world.rank == 0 and cycle in (9, 59):
                    gc.collect()
                    marks.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
                    pages = int(Path("/proc/self/statm").read_text().split()[1])
                    marks.append((pages * os.sysconf("SC_PAGE_SIZE"), 0))
                world.group.barrier()
            return marks

        early, early_memory, late, late_memory = spmd(program, 2)[0]
        assert late == early, "file descriptors, threads"
        assert late_memory[0] - early_memory[0] < 4 << 20, "resident bytes"
        assert dist.group.WORLD is group
        x = torch.ones(1)
        dist.all_reduce(x)
        assert x.item() == 1
    finally:
        dist.destroy_process_group()


def test_no_port_is_chosen_before_it_is_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port that is chosen and released may be bound by another: the system picks each, and it stays bound; one node meets by a file."""
    bind, bound = socket.socket.bind, list[socket.socket]()

    def watch(self: socket.socket, address: Any) -> None:
        assert address[1] == 0, "a port was chosen in Python"
        bound.append(self)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", watch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    results: dict[int, float] = {}

    def rank(number: int) -> None:
        environ = {"PMI_RANK": str(number), "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": str(number), "PMI_JOBID": "no port"}
        with cg.World.from_env(environ, timeout=timedelta(seconds=30)) as world, world.context(cg.Layout(2, tp=2), name="main") as ctx:
            results[number] = ctx.tp.all_reduce(torch.ones(1)).item()
            assert all(one.fileno() >= 0 for one in bound), "a port was released"
            ctx.tp.barrier()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: 2.0, 1: 2.0}
    assert all(one.fileno() < 0 for one in bound)
    # And where a port is asked for, "any" is refused: nobody could be told which one it became.
    with pytest.raises(cg.LaunchError, match="port"):
        cg.World.connect("tcp://127.0.0.1:0", rank=0, world_size=2)


def listening_ports() -> set[int]:
    """Ports at which this process listens now, as the kernel says."""
    own = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # 0A: LISTEN
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_every_port_is_bound_when_it_is_announced() -> None:
    """The address that a rank writes into the store is one at which it listens already."""
    announced: list[tuple[int, bool]] = []

    class Watching(ThreadStore):
        def set(self, key: str, value: bytes | str) -> None:
            data = value.encode() if isinstance(value, str) else bytes(value)
            # gloo writes a sockaddr_in of the loopback: family 2, the port in network order, 127.0.0.1.
            for found in re.finditer(rb"\x02\x00(..)\x7f\x00\x00\x01", data, re.DOTALL):
                port = int.from_bytes(found[1], "big")
                announced.append((port, port in listening_ports()))
            super().set(key, value)

    store = Watching()

    def rank(number: int) -> None:
        with cg.World.from_store(store, rank=number, world_size=3, timeout=timedelta(seconds=30)) as world:
            for i in range(2):
                world.context(cg.Layout(3, tp=3), name=f"{i}", options=cg.CommunicatorOptions(shm=False)).tp.barrier()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(announced) >= 6, "three ranks, two groups: else this test saw nothing"
    assert all(bound for _, bound in announced), announced
    assert all(port for port, _ in announced)


def test_sixty_four_ranks_with_real_data_in_one_process() -> None:
    """No GPU is needed: 64 ranks in one process, real data over real connections."""

    def program(world: cg.World) -> tuple[int, float]:
        tp = world.context(cg.Layout(64, tp=64), name="main").tp
        return tp.rank_in_group, tp.all_reduce(torch.full((1000,), float(world.rank))).sum().item()

    assert spmd(program, 64) == [(rank, 2016000.0) for rank in range(64)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("commgraph")]


@again_if_late
def test_a_fault_is_injected_and_told_by_rank() -> None:
    """The rank that failed is named, the others are released at once."""

    def program(world: cg.World) -> None:
        ctx = world.context(cg.Layout(8, tp=8), name="main")
        ctx.tp.barrier()
        if world.rank == 5:
            raise OSError("injected")
        ctx.tp.all_reduce(torch.ones(3))

    with within(2), pytest.raises(OSError, match="injected") as caught:
        spmd(program, 8)
    assert any("rank 5 of 8" in note for note in caught.value.__notes__)


def test_ranks_with_different_layouts_build_nothing() -> None:
    """The layout is one value, whose digest the ranks compare before anything is built."""

    def program(world: cg.World) -> str:
        layout = cg.Layout(4, tp=2) if world.rank != 3 else cg.Layout(4, pp=2)
        with pytest.raises(cg.LayoutMismatchError, match="ranks 3: Layout") as caught:
            world.context(layout, name="main")
        # Nothing is left: the name is free.
        world.context(cg.Layout(4, tp=2), name="main").close()
        return str(caught.value)

    assert all("the layout" in message for message in spmd(program, 4))
