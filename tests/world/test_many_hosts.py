"""What a World over many hosts costs each rank: bounded by what it uses, not by how many ranks there are."""

from __future__ import annotations

import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.assembly import Terms
from commgraph.communicators.shm import exchange_bytes
from commgraph.communicators.tcp import TcpCommunicator
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.deadline import Deadline
from commgraph.shm import native_module
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore, _make_room
from tests.helpers import CountingStore

pytestmark = pytest.mark.skipif(native_module.load() is None, reason="there is no native module")


def cost(n: int) -> tuple[list[float], list[int]]:
    """Return the descriptors of each rank of a World of n hosts with a context over all, before and after it is used, and its keys.

    Descriptors are an average: all ranks are in this process.
    """
    store, met, keys = ThreadStore(), threading.Barrier(n), [0] * n
    before = len(os.listdir("/proc/self/fd"))
    found: list[float] = []

    def count() -> None:
        if met.wait(60) == 0:
            found.append((len(os.listdir("/proc/self/fd")) - before) / n)
        met.wait(60)

    def rank(number: int) -> None:
        counting = CountingStore(store)
        with cg.World._make(counting, number, n, Terms(timeout=timedelta(seconds=60), label=f"host {number}")) as world:
            begun = counting.keys
            with world.context(cg.Layout(n, dp=n), name="main") as context:
                keys[number] = counting.keys - begun
                count()
                context.dp.all_reduce(torch.ones(4))
                count()

    _make_room(n)
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(rank, range(n)))
    return found, keys


@pytest.mark.parametrize("n", [24, pytest.param(64, marks=[pytest.mark.hosts, pytest.mark.slow])])
def test_descriptors_and_keys_do_not_grow_with_the_number_of_ranks(n: int) -> None:
    """A build links a rank to its two neighbours, and rank 0 alone reads what all have said. A call links it to those it talks to."""
    few, few_keys = cost(8)
    many, many_keys = cost(n)
    # A wait that lasts looks for two more keys: whether a rank has failed, and whether the survivors have gone on.
    assert max(many_keys[1:]) <= max(few_keys[1:]) + 2, (few_keys, many_keys)
    assert many_keys[0] <= few_keys[0] + 8 * (n - 8), (few_keys[0], many_keys[0])
    assert many[0] < few[0] + 1, (few, many)
    # A small all-reduce meets log2(n) ranks on either side.
    assert many[1] <= many[0] + 2 * math.log2(n) + 1, (few, many)


@pytest.mark.parametrize("n", [2, 5, 8, 13])
def test_the_words_of_a_build_reach_every_rank_over_few_links(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one host's memory, say. Over a tree: each rank but the first makes one link; four ranks or fewer link all pairs."""
    ends: list[bytes] = []
    attach = TcpTransport._attach

    def counted(self: TcpTransport, *args: Any) -> Any:
        ends.append(self._group)
        return attach(self, *args)

    monkeypatch.setattr(TcpTransport, "_attach", counted)

    def program(world: cg.World) -> bytes:
        host = world.group.communicator("tcp")
        assert isinstance(host, TcpCommunicator)
        part = host.among(range(n))
        exchange = exchange_bytes(part, "a test", Deadline.after(30.0))
        for step in range(3):
            found = exchange(f"{step} of {world.rank}".encode() * (step + 1))
            assert found == [f"{step} of {rank}".encode() * (step + 1) for rank in range(n)]
        world.group.barrier()
        part.close()
        return part.transport._group

    (group,) = set(spmd(program, n))
    assert ends.count(group) == 2 * (n - 1 if n > 4 else n * (n - 1) // 2)


@pytest.mark.hosts
@pytest.mark.slow
def test_a_world_of_64_hosts_builds_three_contexts_in_time() -> None:
    """Processor time of all ranks together, which is what a machine that does nothing else takes: threads run Python in turns."""
    layouts = (cg.Layout(64, tp=8, pp=2), cg.Layout(64, dp=64), cg.Layout(64, tp=4))
    begun = time.process_time()

    def program(world: cg.World) -> float:
        for number, layout in enumerate(layouts):
            world.context(layout, name=f"context {number}")
        return time.process_time() - begun

    assert max(spmd(program, 64, nodes=64, timeout=100)) < 5
