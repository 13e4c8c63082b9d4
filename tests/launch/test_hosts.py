"""Which ranks share a node: locality proved by data read back through the very segment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from commgraph import hosts
from commgraph.deadline import Deadline
from commgraph.errors import BuildError
from commgraph.hosts import Hosts, Identity, Probe, alone, group_by_verdicts
from commgraph.meeting import Meeting
from commgraph.processes import Process
from tests.helpers import NEW_MOUNTS, NEW_NET, NEW_PIDS, again_if_late, may_unshare, within
from tests.processes import Processes, outputs

TIMEOUT = timedelta(seconds=30)


# Any: torch's stubs leave out that these are exported, and some of their methods.
def hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def tcp_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]


class ForwardingStore:
    """Forwards to a store and counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        what = getattr(self.store, name)
        if callable(what):
            self.calls[name] += 1
        return what


def discover(store: Any, rank: int, world_size: int, *, label: str = "", timeout: timedelta) -> Hosts:
    """Discovery by a rank of a world of which nothing is known yet."""
    me = Process.own()
    deadline = Deadline.after(timeout.total_seconds())
    return hosts.discover(Meeting(store, store, range(world_size), rank, "the world", deadline, me, (me,) * world_size), label=label)


def on_threads(world_size: int, each: Callable[[int], Hosts]) -> list[Hosts]:
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(each, range(world_size)))


def check(result: Sequence[Hosts], nodes: Sequence[int]) -> None:
    assert [host.nodes for host in result] == [tuple(nodes)] * len(nodes)
    assert [host.rank for host in result] == list(range(len(nodes)))
    keys = {(node, host.node_key) for node, host in zip(nodes, result, strict=True)}
    assert len(keys) == len({key for _, key in keys}) == len(set(nodes))
    assert all(len(key) == 32 for _, key in keys)


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_threads_of_a_process_share_a_node(world_size: int) -> None:
    store = hash_store()
    descriptors = len(os.listdir("/proc/self/fd"))
    result = on_threads(world_size, lambda rank: discover(store, rank, world_size, timeout=TIMEOUT))
    check(result, [0] * world_size)
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # what tests before this one left may go meanwhile


def test_labels_split_nodes() -> None:
    store = hash_store()
    result = on_threads(6, lambda rank: discover(store, rank, 6, label="abcabc"[rank], timeout=TIMEOUT))
    check(result, [0, 1, 2, 0, 1, 2])
    assert (result[4].node_rank, result[4].node_count, result[4].local_ranks, result[4].local_rank, result[4].local_size) == (
        1,
        3,
        (1, 4),
        1,
        2,
    )
    assert "key" not in repr(result[4])


def test_one_rank_uses_no_store() -> None:
    single = discover(object(), 0, 1, timeout=TIMEOUT)
    assert single.nodes == (0,)
    assert len(single.node_key) == 32
    assert single.networks == alone().networks


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_a_smaller_world_has_the_same_neighbours(places: list[int], data: st.DataObject) -> None:
    """Any labels give a node map; of any of its ranks in any order the restricted map says who shares a node."""
    numbers = list(dict.fromkeys(places))
    whole = Hosts(0, tuple(numbers.index(place) for place in places), b"k" * 32, tuple(places.index(place) for place in places))
    others = data.draw(st.permutations(range(1, len(places))))
    ranks = others[: data.draw(st.integers(0, len(others)))]
    ranks.insert(data.draw(st.integers(0, len(ranks))), 0)
    part = whole.restrict(ranks)
    assert ranks[part.rank] == 0
    assert list(dict.fromkeys(part.nodes)) == list(range(part.node_count))
    for rank, old in enumerate(ranks):
        assert [node == part.nodes[rank] for node in part.nodes] == [whole.nodes[peer] == whole.nodes[old] for peer in ranks]
        assert [one == part.networks[rank] for one in part.networks] == [whole.nodes[peer] == whole.nodes[old] for peer in ranks]


def test_store_calls_do_not_grow() -> None:
    def calls(world_size: int) -> list[Counter[str]]:
        store = hash_store()
        stores = [ForwardingStore(store) for _ in range(world_size)]
        on_threads(world_size, lambda rank: discover(stores[rank], rank, world_size, timeout=TIMEOUT))
        for one in stores:
            del one.calls["check"]  # a wait looks again and again
        return [one.calls for one in stores]

    once = {"set": 2, "multi_get": 2, "has_extended_api": 2}
    assert calls(3) == [once] * 3
    assert calls(24) == [once] * 24


def test_a_lying_proof_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 2 to 5 say that they sit where their neighbours sit, but what they point at holds no secret of theirs."""
    honest = Probe.identity
    lies: dict[int, dict[str, Any]] = {
        2: {"proof": hashlib.sha256(b"").hexdigest()},
        3: {"fd": 2**40},
        4: {"fd": -1},
        5: {"pid": 1, "fd": 0},
    }

    def identity(self: Probe, label: str = "") -> Identity:
        rank = int(threading.current_thread().name.rpartition("_")[2])
        return attrs.evolve(honest(self, label), **lies.get(rank, {}))

    monkeypatch.setattr(Probe, "identity", identity)
    store = hash_store()
    results: list[Hosts | None] = [None] * 6

    def each(rank: int) -> None:
        results[rank] = discover(store, rank, 6, timeout=TIMEOUT)

    threads = [threading.Thread(target=each, args=(rank,), name=f"rank_{rank}") for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check([result for result in results if result is not None], [0, 0, 1, 2, 3, 4])


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfds are Linux's")
def test_only_sealed_memory_is_mapped(tmp_path: Path) -> None:
    """A file could shrink under the mapping, and a pipe would be waited for."""
    reading, writing = os.pipe()
    with (tmp_path / "file").open("w+b") as file, Probe() as probe:
        file.write(b"x" * 4096)
        file.flush()
        try:
            assert hosts._read_memfd(os.getpid(), probe.identity().fd) == probe.secret
            assert [hosts._read_memfd(os.getpid(), fd) for fd in (reading, writing)] == [b"", b""]
            with contextlib.suppress(OSError):  # but on tmpfs files may have seals
                assert hosts._read_memfd(os.getpid(), file.fileno()) == b""
        finally:
            os.close(reading)
            os.close(writing)


def test_without_memfds_threads_share_and_processes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    store = hash_store()
    check(on_threads(4, lambda rank: discover(store, rank, 4, timeout=TIMEOUT)), [0] * 4)
    with Probe() as probe:
        mine = probe.identity()
    assert not mine.may_share_with(attrs.evolve(mine, pid=mine.pid + 1))
    assert not mine.may_share_with(attrs.evolve(mine, pid=mine.pid + 1, reachable=True))


@pytest.mark.parametrize("field", ["boot_id", "pid_namespace", "shm_device", "label"])
def test_identities_that_differ_anywhere_are_not_tried(field: str) -> None:
    with Probe() as probe:
        mine = probe.identity()
    assert mine.may_share_with(attrs.evolve(mine, pid=mine.pid + 1))
    change: dict[str, Any] = {field: "else" if isinstance(getattr(mine, field), str) else -1}
    assert not mine.may_share_with(attrs.evolve(mine, **change))


@pytest.mark.parametrize("make", [hash_store, tcp_store])
@again_if_late
def test_ranks_that_do_not_come_are_named(make: Callable[[], Any]) -> None:
    store = make()
    with within(0.5 + 2), pytest.raises(BuildError) as caught:
        discover(store, 7, 30, timeout=timedelta(seconds=0.5))
    assert "rank 7: the world: ranks 0, 1, 2, 3, 4, 5, 6, 8, " in str(caught.value)
    assert "and 13 more of 30 did not come within 0.5 s" in str(caught.value)
    assert "MASTER_ADDR" in str(caught.value)


def test_a_rank_that_dies_between_the_exchanges_is_named() -> None:
    store = hash_store()
    with Probe() as probe:
        store.set("hosts/identity/1", msgspec.msgpack.encode(probe.identity()))
        with pytest.raises(BuildError, match=r"rank 1 of 2 did not come within 0.3 s"):
            discover(store, 0, 2, timeout=timedelta(seconds=0.3))


@pytest.mark.parametrize("value", ["", "nonsense", "\x80"])
def test_what_is_not_ours_in_the_store(value: str) -> None:
    store = hash_store()
    store.set("hosts/identity/1", value)
    with pytest.raises(BuildError, match="the store holds for rank 1"):
        discover(store, 0, 2, timeout=TIMEOUT)


@st.composite
def verdict_tables(draw: st.DrawFn) -> list[list[int]]:
    size = draw(st.integers(1, 9))
    node = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    lost = draw(st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=6))
    strange = draw(st.lists(st.integers(-3, 12), max_size=2))
    return [[peer for peer in range(size) if node[peer] == node[rank] and (rank, peer) not in lost] + strange for rank in range(size)]


@given(verdict_tables(), st.randoms(use_true_random=False))
def test_groups_are_mutual_and_do_not_depend_on_order(verdicts: list[list[int]], shuffler: random.Random) -> None:
    nodes = group_by_verdicts(verdicts)
    assert len(nodes) == len(verdicts)
    assert [nodes.index(node) for node in range(max(nodes) + 1)] == sorted({nodes.index(node) for node in nodes})
    for rank, node in enumerate(nodes):
        for peer in range(rank):
            mutual = peer in verdicts[rank] and rank in verdicts[peer]
            assert mutual or nodes[peer] != node
        # The lowest node that takes it, and no other.
        takes = [
            other
            for other in range(max(nodes[:rank], default=-1) + 1)
            if all(peer in verdicts[rank] and rank in verdicts[peer] for peer in range(rank) if nodes[peer] == other)
        ]
        assert node == min(takes, default=max(nodes[:rank], default=-1) + 1)
    shuffled = [shuffler.sample(verdict, len(verdict)) for verdict in verdicts]
    assert group_by_verdicts(shuffled) == group_by_verdicts([set(verdict) for verdict in verdicts]) == nodes


def test_grouping_a_large_world_is_quick() -> None:
    began = time.process_time()
    nodes = group_by_verdicts([range(rank // 8 * 8, rank // 8 * 8 + 8) for rank in range(100_000)])
    assert max(nodes) == 12_499
    assert time.process_time() - began < 5


# One process of a world, in other namespaces where its last arguments say so.
RANK = """
import json, sys
import torch.distributed as dist
from commgraph import hosts
from commgraph.deadline import Deadline
from commgraph.meeting import Meeting
from commgraph.processes import Process
from tests.helpers import unshare
where, rank, size, flags, *mounts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
if int(flags):
    unshare(int(flags), *mounts)
if where.startswith("/"):
    store = dist.FileStore(where, size)
else:
    store = dist.TCPStore("127.0.0.1", int(where), is_master=False)
store, me = dist.PrefixStore("test", store), Process.own()
found = hosts.discover(Meeting(store, store, range(size), rank, "the world", Deadline.after(60), me, (me,) * size))
print(json.dumps([found.rank, found.nodes, found.networks, found.node_key.hex()]))
"""


def on_processes(processes: Processes, where: str, namespaces: Sequence[tuple[int, *tuple[str, ...]]]) -> list[Hosts]:
    """What each of some processes finds, in namespaces of its own: flags, and what is mounted there."""
    size = str(len(namespaces))
    found = map(json.loads, outputs([processes.start("-c", RANK, where, str(i), size, *map(str, own)) for i, own in enumerate(namespaces)]))
    return [Hosts(rank, tuple(nodes), bytes.fromhex(key), tuple(networks)) for rank, nodes, networks, key in found]


def test_processes_share_a_node_over_tcp(processes: Processes) -> None:
    store = tcp_store()
    check(on_processes(processes, str(store.port), [(0,)] * 3), [0] * 3)


@pytest.mark.skipif(not may_unshare(), reason="needs root and unshare")
def test_namespaces(tmp_path: Path, processes: Processes) -> None:
    """Another network and mount namespace is the same node; another pid namespace or another /dev/shm is another one."""
    namespaces: list[tuple[int, *tuple[str, ...]]] = [
        (0,),
        (NEW_NET | NEW_MOUNTS,),
        (NEW_PIDS | NEW_MOUNTS, "mount -t proc none /proc"),
        (NEW_PIDS,),  # with the /proc of the outer one
        (NEW_MOUNTS, "mount -t tmpfs none /dev/shm"),
    ]
    result = on_processes(processes, str(tmp_path / "store"), namespaces)
    check(result, [0, 0, 1, 2, 3])
    assert {host.networks for host in result} == {result[0].networks}
    assert result[0].networks == (0, 1, 0, 0, 0)
