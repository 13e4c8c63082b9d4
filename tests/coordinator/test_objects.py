"""Python objects between ranks: what travels where, what is refused, and receives that run out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from tests.helpers import bits, on


class Point:
    """Picklable, and no plain data."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and bool(self.x == other.x)

    __hash__ = None  # type: ignore[assignment]  # equal by content


class Sour:
    """Fails while it is pickled, as somebody's own __reduce__ may."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def explode(*_: Any) -> None:
    raise ZeroDivisionError("while unpickling")


class Trap:
    def __reduce__(self) -> Any:
        return explode, (1,)


PLAIN: dict[Any, Any] = {
    "none": None,
    1: [True, -(2**80), 1.5, 2 + 3j],
    (2, "x"): {"set": {1, 2}, "frozen": frozenset({b"x"}), "bytes": bytearray(b"\x00y")},
    "torch": [torch.bfloat16, torch.Size((2, 3)), torch.device("cpu")],
    "text": "\ud800 é",
}


def every_way(group: GroupCoordinator, obj: Any, src: int = 0) -> list[Any]:
    """The object of `src`, by each operation."""
    mine = obj if group.rank_in_group == src else None
    got = [
        group.broadcast_object(mine, src),
        group.broadcast_object_list([mine], src)[0],
        group.all_gather_object(mine)[src],
    ]
    for rank in range(group.world_size):
        if rank != src and group.rank_in_group == src:
            group.send_object(obj, rank)
        elif rank != src and group.rank_in_group == rank:
            got.append(group.recv_object(src))
    return got


@pytest.mark.parametrize("n", [2, 3, 6])
def test_any_picklable_object_on_one_host_from_any_rank(n: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for src in range(n):
            objects: list[Any] = [PLAIN, Point([1, Point(2)]), [], None, timedelta(1), Point, len, ValueError("x").args]
            for obj in objects:
                for got in every_way(group, obj, src):
                    assert got == obj
                    assert type(got) is type(obj)

    on(n, body)


@pytest.mark.parametrize("size", [0, 1, 4000, 4087, 4088, 4089, 5000, 100_000])
def test_sizes_around_one_message(size: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for src in (0, 1):
            assert all(got == b"x" * size for got in every_way(group, b"x" * size, src))

    on(2, body)


def test_large_objects() -> None:
    """Tens of megabytes, by every way and to several receivers at once."""

    def body(group: GroupCoordinator) -> None:
        data = bytes(range(256)) * 120_000
        assert all(got == data for got in every_way(group, data, 1))
        tensor = torch.arange(4_000_000, dtype=torch.int64)
        assert all(torch.equal(got.x, tensor) for got in every_way(group, Point(tensor), 2))

    on(3, body)


def test_gathered_objects_of_different_sizes() -> None:
    def body(group: GroupCoordinator) -> None:
        for unit in (1, 700, 50_000):
            got = group.all_gather_object(b"x" * (unit * group.rank**2))
            assert [len(x) for x in got] == [unit * rank**2 for rank in range(5)]

    on(5, body)


@pytest.mark.parametrize("shm", [True, False])
@pytest.mark.parametrize("nodes", [1, 3])
def test_gathered_objects_around_one_block(nodes: int, shm: bool) -> None:
    """Short frames come in the first exchange, longer ones in the second: none, one, some or all of them."""

    def body(group: GroupCoordinator) -> None:
        for turn, around in enumerate((*range(995, 1030), 0, 50_000)):
            sizes = [around + 7 * ((rank + turn) % 3) for rank in range(group.world_size)]
            expected = [bytes([rank]) * size for rank, size in enumerate(sizes)]
            assert group.all_gather_object(expected[group.rank]) == expected
            assert group.gather_object(expected[group.rank], dst=turn % 3) == (expected if group.rank == turn % 3 else None)

    on(3, body, nodes=nodes, shm=shm)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.uint64, torch.complex64, torch.bool],
    ids=str,
)
def test_tensors_inside_objects(dtype: torch.dtype, nodes: int) -> None:
    x = torch.randint(2, (3, 4), generator=torch.Generator().manual_seed(1)).to(dtype)

    def body(group: GroupCoordinator) -> None:
        objects = [x, x.t(), x[:, ::2], x[0, 0], x[:0], x[:1].expand(5, 4)]
        for got in every_way(group, {"t": objects}):
            for received, sent in zip(got["t"], objects, strict=True):
                assert received.dtype == dtype
                assert received.shape == sent.shape
                assert bits(received) == bits(sent)
                if received is not sent and received.numel() and received.stride().count(0) == 0:
                    received.zero_()

    on(2, body, nodes=nodes)


def test_what_is_received_is_nobody_elses() -> None:
    def body(group: GroupCoordinator) -> None:
        mine: dict[str, Any] = {"list": [1], "t": torch.ones(2)}
        for got in every_way(group, mine):
            if group.rank:
                got["list"].append(2)
                got["t"].zero_()
        assert mine["list"] == [1]
        assert mine["t"].tolist() == [1, 1]

    on(2, body)


# Refused

BAD: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "lock": threading.Lock,
    "generator": lambda: iter(lambda: 0, 1),
    "inside": lambda: {"a": [Point(lambda: 0)]},
    "its own KeyError": lambda: Sour(KeyError("x")),
    "its own AttributeError": lambda: Sour(AttributeError("x")),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_pickled_is_refused_and_nothing_was_sent(kind: str) -> None:
    """The source may go on with another object: those that wait for one get it."""

    def body(group: GroupCoordinator) -> None:
        sent = group.bytes_sent
        if group.is_first_rank:
            ways: list[Callable[[Any], Any]] = [
                group.broadcast_object,
                lambda obj: group.broadcast_object_list([obj]),
                lambda obj: group.send_object(obj, 1),
                lambda obj: group.send_tensor_dict({"x": obj}),
                lambda obj: group.broadcast_tensor_dict({"x": obj}),
            ]
            for send in ways:
                with pytest.raises(TypeError, match=r"on group 'tp' \(rank 0.*Nothing was sent"):
                    send(BAD[kind]())
            assert group.bytes_sent == sent
            group.broadcast_object("good")
            group.broadcast_object_list(["good"])
            group.send_object("good", 1)
            group.send_tensor_dict({"x": "good"})
            group.broadcast_tensor_dict({"x": "good"})
        else:
            assert group.broadcast_object() == "good"
            assert group.broadcast_object_list([None]) == ["good"]
            assert group.recv_object(0) == "good"
            assert group.recv_tensor_dict() == {"x": "good"}
            assert group.broadcast_tensor_dict() == {"x": "good"}
        with pytest.raises(TypeError, match="all_gather_object on group 'tp'"):
            group.all_gather_object(BAD[kind]())
        assert group.all_gather_object(group.rank) == [0, 1]

    on(2, body)


def test_objects_that_contain_themselves() -> None:
    itself: list[Any] = []
    itself.append(itself)

    def on_one_host(group: GroupCoordinator) -> None:
        (got,) = {id(x): x for x in every_way(group, itself)[:1]}.values()
        assert got[0] is got

    def between(group: GroupCoordinator) -> None:
        with pytest.raises(ValueError, match=r"all_gather_object on group 'tp'.*contains itself"):
            group.all_gather_object(itself)
        assert group.all_gather_object(1) == [1, 1]

    on(2, on_one_host)
    on(2, between, nodes=2)


def test_what_fails_while_it_is_unpickled_spares_the_group() -> None:
    def body(group: GroupCoordinator) -> None:
        for size in (0, 10_000):
            if group.is_first_rank:
                group.broadcast_object([Trap(), b"x" * size])
                group.send_object([Trap(), b"x" * size], 1)
            else:
                with pytest.raises(ZeroDivisionError, match="while unpickling"):
                    group.broadcast_object()
                with pytest.raises(ZeroDivisionError, match="while unpickling"):
                    group.recv_object(0)
        assert group.all_gather_object(group.rank) == [0, 1]

    on(2, body)


def test_lists_of_different_lengths() -> None:
    def body(group: GroupCoordinator) -> None:
        items: list[Any] = [1, 2] if group.is_first_rank else [None]
        if group.is_first_rank:
            assert group.broadcast_object_list(items) is items
        else:
            with pytest.raises(ValueError, match="1 entries here and 2 on rank 0"):
                group.broadcast_object_list(items)
            assert items == [None]
        assert group.all_gather_object(1) == [1, 1]

    on(2, body)


# Between hosts


def test_plain_data_alone_travels_between_hosts_without_an_authkey() -> None:
    def body(group: GroupCoordinator) -> None:
        for src in (0, 1):
            assert all(got == PLAIN for got in every_way(group, PLAIN, src))
        sent = group.bytes_sent
        for obj in (Point(1), [Point(1)], len, timedelta(1), torch.nn.Parameter(torch.ones(2))):
            ways: tuple[Callable[[], Any], ...] = (
                lambda obj=obj: group.broadcast_object(obj, group.rank_in_group),  # type: ignore[misc]
                lambda obj=obj: group.all_gather_object(obj),  # type: ignore[misc]
                lambda obj=obj: group.send_object(obj, group.next_in_group),  # type: ignore[misc]
                lambda obj=obj: group.send_tensor_dict({"x": [obj]}),  # type: ignore[misc]
            )
            for way in ways:
                with pytest.raises(TypeError, match=r"on group 'tp'.*authkey"):
                    way()
        assert group.bytes_sent == sent
        assert group.all_gather_object(group.rank) == [0, 1]

    on(2, body, nodes=2)


def test_groups_within_a_host_take_any_object() -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, pp=2, tp=2), name="a") as context:
            assert world.node_count == 2
            assert context.tp.all_gather_object(Point(world.rank)) == [Point(rank) for rank in context.tp.ranks]
            for far in (context.pp, context.world):
                with pytest.raises(TypeError, match="authkey"):
                    far.all_gather_object(Point(1))
                assert far.all_gather_object(1) == [1] * far.world_size

    spmd(run, 4, nodes=2)


def test_any_object_between_hosts_with_an_authkey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMGRAPH_AUTHKEY", "a secret")

    def body(group: GroupCoordinator) -> None:
        for src in (0, 1):
            assert all(got == Point(PLAIN) for got in every_way(group, Point(PLAIN), src))
        with pytest.raises(TypeError, match="cannot pickle"):
            group.all_gather_object(lambda: 0)

    on(2, body, nodes=2)


def from_store(bodies: list[Callable[[cg.World], Any]], keys: list[bytes | None]) -> list[Any]:
    """Worlds of a caller's own store, on threads."""
    store = dist.HashStore()
    results: list[Any] = [None] * len(bodies)

    def run(rank: int) -> None:
        try:
            with cg.World.from_store(store, rank=rank, world_size=len(bodies), timeout=timedelta(seconds=20), authkey=keys[rank]) as world:
                results[rank] = bodies[rank](world)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_an_authkey_handed_over() -> None:
    def body(world: cg.World) -> Any:
        return world.group.all_gather_object(Point(world.rank))

    assert from_store([body] * 2, [b"secret"] * 2) == [[Point(0), Point(1)]] * 2


def test_other_authkeys_on_other_ranks_build_nothing() -> None:
    errors = from_store([lambda world: "built"] * 2, [b"secret", b"another"])
    assert all(isinstance(error, cg.LayoutMismatchError) and "authkey" in str(error) for error in errors), errors
    assert not any(b"secret" in str(error).encode() for error in errors)


# Receives that run out


def poll(receive: Callable[[], Any], ran_out: threading.Semaphore) -> tuple[Any, int]:
    """Receive until it does not run out; say once that it has, twice."""
    tries = 0
    while True:
        tries += 1
        assert tries < 1000
        try:
            return receive(), tries
        except cg.CollectiveTimeoutError:
            if tries == 2:
                ran_out.release()


def wait_for(receivers: int, ran_out: threading.Semaphore) -> None:
    """Return once each of so many receives has run out twice."""
    for _ in range(receivers):
        assert ran_out.acquire(timeout=30)


@pytest.mark.parametrize("n", [2, 4])
def test_a_receive_that_ran_out_keeps_its_place(n: int) -> None:
    ran_out = threading.Semaphore(0)

    def body(group: GroupCoordinator) -> int:
        total = 0
        for i, size in enumerate((3, 100_000, 0)):
            src = (i + 1) % n
            obj = Point(b"x" * size)
            if group.rank == src:
                wait_for(n - 1, ran_out)
                group.broadcast_object(obj, src)
                wait_for(n - 1, ran_out)
                for rank in range(n):
                    if rank != src:
                        group.send_object(obj, rank)
                wait_for(n - 1, ran_out)
                group.broadcast_object_list([obj], src)
                continue
            for receive in (
                lambda src=src: group.broadcast_object(None, src, timeout=0.02),  # type: ignore[misc]
                lambda src=src: group.recv_object(src, timeout=0.02),  # type: ignore[misc]
                lambda src=src: group.broadcast_object_list([None], src, timeout=0.02)[0],  # type: ignore[misc]
            ):
                got, tries = poll(receive, ran_out)
                total += tries
                assert got == obj
        assert float(group.all_reduce(torch.ones(()))) == n
        return total

    assert all(total >= 9 for total in on(n, body))


def test_a_tensor_dict_is_polled_for() -> None:
    ran_out = threading.Semaphore(0)

    def body(group: GroupCoordinator) -> None:
        tree: dict[str, Any] = {"a": torch.arange(6.0), "n": 3}
        if group.is_first_rank:
            wait_for(1, ran_out)
            group.send_tensor_dict(tree)
            wait_for(1, ran_out)
            group.broadcast_tensor_dict(tree)
            return
        for receive in (lambda: group.recv_tensor_dict(timeout=0.05), lambda: group.broadcast_tensor_dict(timeout=0.05)):
            got, tries = poll(receive, ran_out)
            assert tries > 1
            assert got["n"] == 3
            assert got["a"].tolist() == tree["a"].tolist()

    on(2, body)


def test_other_calls_may_come_between_two_tries() -> None:
    def body(group: GroupCoordinator) -> None:
        one = torch.ones(2)
        if group.rank == 1:
            with pytest.raises(cg.CollectiveTimeoutError, match="unharmed: call again"):
                group.recv_object(0, timeout=0.05)
            with pytest.raises(cg.CollectiveTimeoutError, match=r"nothing came from rank 2 \(2 in the group\)"):
                group.recv_object(2, timeout=0.05)
        assert group.all_reduce(one).tolist() == [3, 3]
        assert group.broadcast_object(group.rank, 2) == 2
        if group.rank == 0:
            group.send(one, 1)
            group.send_object("from 0", 1)
        elif group.rank == 2:
            group.send_object("from 2", 1)
        else:
            assert group.recv(2, torch.float32, 0).tolist() == [1, 1]
            assert group.recv_object(2) == "from 2"
            assert group.recv_object(0) == "from 0"

    on(3, body)


def commgraph_threads(*, beside: Sequence[threading.Thread] = ()) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("commgraph") and thread not in beside]


@pytest.mark.parametrize("shm", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_a_receive_left_behind_leaves_no_thread_after_close(check: bool, shm: bool) -> None:
    def body(group: GroupCoordinator) -> None:
        if group.rank == 1:
            for _ in range(2):
                with pytest.raises(cg.CollectiveTimeoutError):
                    group.recv_object(0, timeout=0.02)
                with pytest.raises(cg.CollectiveTimeoutError):
                    group.broadcast_object(None, 0, timeout=0.02)
            waiting = any(not name.startswith("commgraph-rank") for name in commgraph_threads(beside=before))
            assert waiting == (check or not shm)  # shared memory needs no thread to wait

    before = threading.enumerate()  # what another test may have left is not this one's
    # Isolated: the barrier in close is not the next call of a group with an announcement that nobody joined.
    on(2, body, check=check, isolate=True, shm=shm)
    deadline = time.monotonic() + 20
    while commgraph_threads(beside=before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not commgraph_threads(beside=before)


def test_receives_left_behind_end_though_every_other_rank_left_before() -> None:
    """Ranks 0 and 2 wait for each other when 1 and 3 have gone: what closes their connections must not stop at one that is closed."""
    gone = threading.Barrier(4)

    def body(group: GroupCoordinator) -> None:
        if group.rank % 2:
            gone.wait(20)
            group.close()
            gone.wait(20)
            return
        with pytest.raises(cg.CollectiveTimeoutError):
            group.recv_object((group.rank + 2) % 4, timeout=0.02)
        gone.wait(20)
        gone.wait(20)

    before = threading.enumerate()
    on(4, body, isolate=True, shm=False)
    deadline = time.monotonic() + 20
    while commgraph_threads(beside=before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not commgraph_threads(beside=before)


def test_a_peer_that_leaves_ends_a_receive() -> None:
    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            time.sleep(0.1)
            group.close()
            return
        with pytest.raises(cg.PeerLostError, match="rank 0 has closed context 'a'"):
            group.recv_object(0, timeout=20)
        with pytest.raises(cg.PeerLostError):
            group.recv_object(0)

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(isolate=True)) as context:
            body(context.tp)

    spmd(run, 2)


@pytest.mark.parametrize("sizes", [(3_000_000, 3_000_000, 3_000_000), (10, 3_000_000, 10), (400_000, 600_000, 0)])
def test_objects_larger_than_the_rings_are_gathered(sizes: tuple[int, ...]) -> None:
    """Every rank puts its own before it reads: what does not fit must not make all of them wait for each other."""

    def body(group: GroupCoordinator) -> None:
        x = torch.full((sizes[group.rank],), group.rank, dtype=torch.int8)
        mine: dict[str, Any] = {"rank": group.rank, "x": x, "text": "y" * sizes[group.rank]}
        for _ in range(3):
            for rank, got in enumerate(group.all_gather_object(mine, timeout=20)):
                assert (got["rank"], len(got["text"])) == (rank, sizes[rank])
                assert torch.equal(got["x"], torch.full((sizes[rank],), rank, dtype=torch.int8))
                got["x"] += 1  # writable
            x.fill_(group.rank)
            assert group.broadcast_object(group.rank, 1) == 1

    on(3, body)


def test_large_objects_to_all_and_to_one() -> None:
    def body(group: GroupCoordinator) -> None:
        big = torch.arange(5_000_000, dtype=torch.int32)
        for src in range(3):
            kept = [group.broadcast_object({"x": big + src, "src": src} if group.rank == src else None, src) for _ in range(3)]
            for got in kept:
                assert got["src"] == src
                assert torch.equal(got["x"], big + src)
        if group.rank == 0:
            group.send_object([big, "end"], 2)
        elif group.rank == 2:
            got = group.recv_object(0)
            assert torch.equal(got[0], big)

    on(3, body)
