"""What others write to the store, or hand to a rank, is not believed: other keys, garbage, and memory of other users."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

import commgraph as cg
from commgraph import hosts
from commgraph.communicators.shm import _signed
from commgraph.hosts import Identity, Probe
from commgraph.sealed import SealedStore
from commgraph.shm import segments
from commgraph.testing.spmd import ThreadStore
from tests.processes import Processes


def ranks(store: Any, keys: Sequence[bytes | None], timeout: float = 20) -> list[Any]:
    """Build a World on threads, each with its authkey; return the Worlds' sizes, or the errors."""
    results: list[Any] = [None] * len(keys)

    def run(rank: int) -> None:
        try:
            with cg.World.from_store(store, rank=rank, world_size=len(keys), authkey=keys[rank], timeout=timeout) as world:
                layout, options = cg.Layout(world.size, tp=world.size), cg.CommunicatorOptions(shm=False)
                with world.context(layout, name="over gloo", options=options) as ctx:
                    results[rank] = ctx.tp.all_gather_object(world.rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    return results


def test_other_keys_are_told_at_build() -> None:
    for result in ranks(ThreadStore(), [b"one", b"another", b"one"]):
        assert type(result) is cg.LayoutMismatchError
        assert "authkey" in str(result)
        assert "ranks 0, 2: yes, " in str(result)
        assert "ranks 1: yes, " in str(result)
    assert ranks(ThreadStore(), [b"one"] * 3) == [[0, 1, 2]] * 3


class Garbling(ThreadStore):
    """Answers with garbage for keys that contain a text: somebody else writes to the store."""

    def __init__(self, part: str, garbage: bytes) -> None:
        super().__init__()
        self.part = part
        self.garbage = garbage
        self.garbled = 0

    def _garble(self, key: str, value: bytes) -> bytes:
        if self.part not in key:
            return value
        self.garbled += 1
        return self.garbage

    def get(self, key: str) -> bytes:
        return self._garble(key, super().get(key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._garble(key, value) for key, value in zip(keys, super().multi_get(keys), strict=True)]


@pytest.mark.parametrize("garbage", [b"", b"\x80\xff nonsense", b"[1]", b"null", b'{"rank": {}}', b"9" * 40])
@pytest.mark.parametrize("key", [None, b"secret"])
def test_garbage_in_the_store_is_a_build_error(key: bytes | None, garbage: bytes) -> None:
    """Of whatever step: what the store holds is parsed by the rank that reads it, and authenticated from the second step on."""
    parts = ["here", "tokens", "begin/agree/said", "begin/agree/verdict", "hosts/identity", "hosts/verdict", "reach", "end/agree/said"]
    for part in [*parts, "end/agree/verdict", *(["gloo/connect"] if key else [])]:
        store = Garbling(part, garbage)
        results = ranks(store, [key, key], timeout=0.7)
        if not store.garbled:  # the machine is so slow that the build ended before that step
            store = Garbling(part, garbage)
            results = ranks(store, [key, key], timeout=10)
        assert store.garbled, part
        if results == [[0, 1]] * 2:  # facts that nobody else states are none to differ in
            assert (part.endswith("said"), garbage[:1]) == (True, b"{")
            continue
        assert any(isinstance(result, cg.BuildError) for result in results), (part, results)
        # A rank that had its answer before loses its peer.
        assert all(isinstance(result, cg.BuildError | cg.PeerLostError) for result in results), (part, results)


def test_a_value_moved_to_another_key_is_refused() -> None:
    plain = ThreadStore()
    store = SealedStore(plain, b"key")
    store.set("a", b"value")
    assert store.get("a") == b"value"
    plain.set("b", plain.get("a"))
    with pytest.raises(cg.BuildError, match=r"'b' .*not written by a rank with this authkey"):
        store.get("b")
    with pytest.raises(cg.BuildError, match="not written"):
        SealedStore(plain, b"another").get("a")


def test_a_word_that_is_not_signed_hands_no_memory_over() -> None:
    ours = _signed(lambda word: [word], b"node", 0)
    assert ours(b"pid and descriptor") == [b"pid and descriptor"]
    said: list[bytes] = []

    def overheard(word: bytes) -> list[bytes]:
        said.append(word)
        return [word]

    _signed(overheard, b"stranger", 0)(b"pid and descriptor")
    with pytest.raises(cg.BuildError, match="did not sign"):
        _signed(lambda _: said, b"node", 0)(b"mine")


@contextlib.contextmanager
def another_user() -> Iterator[tuple[Identity, int]]:
    """A process of another user, its identity, and the descriptor of a page of memory that it offers."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        probe, page = Probe(), segments.create(4096)
        from msgspec.msgpack import encode

        os.write(writing, encode((probe.identity(), page)))
        time.sleep(30)
        os._exit(0)
    from msgspec.msgpack import decode

    try:
        yield decode(os.read(reading, 4096), type=tuple[Identity, int])
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can open the memory of other users")
def test_memory_of_another_user_is_not_a_neighbours() -> None:
    with another_user() as (identity, page):
        assert os.open(f"/proc/{identity.pid}/fd/{page}", os.O_RDWR) >= 0, "else this test shows nothing"
        assert hosts._read_secret(identity) is None
        with pytest.raises(OSError, match="belongs to user 65534"):
            segments.open_peer(identity.pid, page, 4096)


FALSE_RANK = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from msgspec.msgpack import encode
from commgraph.deadline import Deadline
from commgraph.hosts import Probe
from commgraph.sealed import SealedStore
from commgraph.session import open_session

port, gives, uid = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.setuid(uid)
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=40))
session = open_session(store, 2, 3, Deadline.after(40))
world = dist.PrefixStore(f"commgraph/{session.name}", store)
world.set("begin/agree/said/2", world.get("begin/agree/said/1"))
theirs = world.get("hosts/identity/1")
with Probe() as probe:
    mine = encode(probe.identity())
    if gives == "another's":
        world.set("hosts/identity/2", theirs)
    elif gives == "its own, unsigned":
        world.set("hosts/identity/2", mine)
    else:
        SealedStore(world, b"a guess").set("hosts/identity/2", mine)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("gives", ["another's", "its own, unsigned", "its own, signed by a guess"])
def test_a_false_rank_at_the_store_is_named(processes: Processes, gives: str) -> None:
    """It finds the others, and says of itself what a true rank has said, without their authkey. It is another user's, if root runs this."""
    uid = 65534 if os.geteuid() == 0 else os.getuid()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    false = processes.start("-c", FALSE_RANK, str(store.port), gives, str(uid))
    told: list[str] = ["", ""]

    def run(rank: int) -> None:
        mine = TCPStore("127.0.0.1", store.port, is_master=False)
        with pytest.raises(cg.BuildError) as caught:
            cg.World.from_store(mine, rank=rank, world_size=3, authkey=b"secret", timeout=40)
        told[rank] = str(caught.value)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - begun < 30, "the false rank was told by its silence alone"
    false.communicate("go\n", timeout=30)
    assert false.returncode == 0
    for text in told:
        assert "rank 2 has not the authkey" in text, text
        assert "'hosts/identity/2'" in text, text


def test_a_bad_report_is_a_build_error() -> None:
    store = Garbling("/failed", b"\x80")

    def run(rank: int) -> Any:
        with cg.World.from_store(store, rank=rank, world_size=2, timeout=timedelta(seconds=20)) as world:
            try:
                world.context(cg.Layout(2, tp=2) if rank else cg.Layout(3), name="a")
            except cg.CommGraphError as error:
                return type(error), str(error)
            return None

    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda rank=rank: results.update({rank: run(rank)})) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert results[0][0] is cg.LayoutError
    assert results[1][0] is cg.BuildError
    assert "where a rank reports an error" in results[1][1]


JOB = """
import resource, sys, torch
import commgraph as cg
from commgraph.testing import spmd
from tests.world.test_guarantees import listening_ports

def run(world):
    ctx = world.context(cg.Layout(2, tp=2), name="a")
    if world.rank == 0:
        print(*listening_ports(), flush=True)
        sys.stdin.readline()
    ctx.tp.barrier()
    total = ctx.tp.all_reduce(torch.ones(100)).sum().item()
    with world.context(cg.Layout(2, pp=2), name="b") as late:
        late.pp.all_gather_object(world.rank)
    return total

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
print(spmd(run, 2), flush=True)
"""


def test_a_stranger_cannot_end_a_job_by_taking_its_descriptors(processes: Processes) -> None:
    job = processes.start("-c", JOB)
    with contextlib.ExitStack() as held:
        ports = [int(port) for port in job.stdout.readline().split()]
        assert ports, "else this test attacks nobody"
        for i in range(500):
            connection = held.enter_context(socket.socket())
            connection.setblocking(False)  # beyond the backlog the kernel lets it wait
            connection.connect_ex(("127.0.0.1", ports[i % len(ports)]))
        told, complaints = job.communicate("go\n", timeout=60)
    assert (job.returncode, told) == (0, "[200.0, 200.0]\n"), complaints
