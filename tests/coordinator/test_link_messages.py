"""Native messages of groups over several hosts: those of the general path, whichever path sender and receiver take."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.errors import CollectiveMismatchError, CollectiveTimeoutError, ConcurrentCallError, ContextClosedError, PeerLostError
from commgraph.shm import native_module
from tests.helpers import on

pytestmark = pytest.mark.skipif(native_module.load() is None, reason="no native module")

# Ranks and hosts: links alone, two ranks on each host, hosts of different sizes.
SHAPES = [(2, 2), (4, 2), (3, 2)]
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)


def values(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    whole = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(number)).float()
    return whole > 0 if dtype == torch.bool else whole.to(dtype)


class Paths:
    """Takes the native and the general path in turn, each rank in another order."""

    def __init__(self, group: cg.GroupCoordinator) -> None:
        self.state, self.native = group._state, group._state.native_messages
        self.turn = itertools.count(group.rank_in_group)

    def choose(self) -> None:
        self.state.native_messages = None if next(self.turn) % 3 == 0 else self.native


@pytest.mark.parametrize(("n", "nodes"), SHAPES)
def test_sender_and_receiver_may_take_either_path(n: int, nodes: int) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        me, paths, number = group.rank_in_group, Paths(group), 0
        shapes: list[tuple[int, ...]] = [(1,), (3, 5), (70_000,), (0, 2), ()]
        for dtype, shape, tag in itertools.product(DTYPES, shapes, (0, 9)):
            for src, dst in itertools.permutations(range(n), 2):
                number += 1
                x = values(number, shape, dtype)
                paths.choose()
                if me == src:
                    group.send(x, dst, tag=tag)
                elif me == dst:
                    out = torch.empty(shape, dtype=dtype) if number % 2 else None
                    got = group.recv(shape, dtype, src, tag=tag, out=out)
                    assert out is None or got is out
                    assert got.dtype == dtype
                    assert torch.equal(got.view(torch.uint8) if shape else got, x.view(torch.uint8) if shape else x)
            paths.choose()
            x = values(me, shape, dtype)
            got = group.sendrecv(x, group.next_in_group, shape, dtype, group.prev_in_group)
            assert torch.equal(
                got.float() if not dtype.is_complex else got,
                values(group.prev_in_group, shape, dtype).to(torch.float32 if not dtype.is_complex else dtype),
            )

    on(n, body, nodes=nodes)


def test_plain_messages_are_native_once_there_is_a_link() -> None:
    def body(group: cg.GroupCoordinator) -> None:
        native, peer, x = group._state.native_messages, 1 - group.rank_in_group, torch.ones(3)
        assert native is not None
        assert not native.send(group, x, peer, 0, None), "there is no link as yet"
        group.sendrecv(x, peer, 3, x.dtype, peer)
        for tag in (0, 5):
            if peer:
                assert native.send(group, x, peer, tag, None)
                assert not native.send(group, torch.ones(3, 2).T, peer, tag, None)
                assert not native.send(group, x[:0], peer, tag, None)
            else:
                assert torch.equal(native.recv(group, 3, x.dtype, peer, tag, None, 5.0), x)
                assert native.recv(group, 0, x.dtype, peer, tag, None, None) is None
        assert native.offer(group, "isend", x, peer, 0)
        assert torch.equal(native.recv(group, (3,), x.dtype, peer, 0, None, None), x)
        assert native.swap(group, x, peer, (3,), x.dtype, peer, None, None, None) is not None
        for bad in (group.rank_in_group, 2, -1, "1", None, True):
            assert not native.send(group, x, bad, 0, None)

    on(2, body, nodes=2)


def test_small_messages_with_a_tag_wait_for_no_receiver() -> None:
    """More of them than the sockets hold, received in the opposite order."""
    count, size = 250, 60_000

    def body(group: cg.GroupCoordinator) -> None:
        group.sendrecv(torch.ones(1), 1 - group.rank_in_group, 1, torch.float32, 1 - group.rank_in_group)
        group.barrier()
        if group.rank_in_group == 0:
            works = []
            for i in range(count):
                x = torch.full((size,), i % 200, dtype=torch.uint8)
                if i % 2:
                    group.send(x, 1, tag=i + 1)
                else:
                    works.append(group.isend(x, 1, tag=i + 1))
                x.fill_(255) if i % 2 else None
            group.barrier()
            for work in works:
                work.wait()
            return
        group.barrier()
        for i in reversed(range(count)):
            assert (group.recv(size, torch.uint8, 0, tag=i + 1) == i % 200).all()

    on(2, body, nodes=2)


@pytest.mark.parametrize(("n", "nodes"), [(4, 2), (3, 2), (5, 2)])
def test_ranks_of_one_host_exchange_in_shared_memory(n: int, nodes: int) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        me, state, x = group.rank_in_group, group._state, torch.ones(n * 300)
        nodes_of = group.communicator("hierarchical")._places  # type: ignore[attr-defined]  # that strategy's
        near = [rank for rank in range(n) if rank != me and nodes_of[rank][0] == nodes_of[me][0]]
        links: Any = group.communicator("tcp")
        before = links.bytes_sent
        for _ in range(2):
            assert torch.equal(group.all_to_all(x), x)
        assert links.bytes_sent - before == 2 * 1200 * (n - 1 - len(near))
        works = [group.isend(x * me, peer, tag=tag) for peer in range(n) if peer != me for tag in (0, 1)]
        for peer in range(n):
            if peer != me:
                assert (group.recv(len(x), x.dtype, peer, tag=1) == peer).all()
                assert (group.recv(len(x), x.dtype, peer) == peer).all()
        for work in works:
            work.wait()
        for peer in [rank for rank in range(n) if rank != me]:
            group.sendrecv(x, peer, len(x), x.dtype, peer) if peer in near else None
        got = []
        works = [group.isend(x, peer) for peer in range(n) if peer != me]
        for _ in works:
            _, src = group.recv(len(x), x.dtype, cg.ANY)
            got.append(src)
        for work in works:
            work.wait()
        assert sorted(got) == [peer for peer in range(n) if peer != me]
        net = state.network.transport.messages  # type: ignore[union-attr]  # a TcpTransport
        assert [peer for peer in range(n) if peer != me and net.is_linked(peer)] == [
            peer for peer in range(n) if peer != me and peer not in near
        ]

    on(n, body, nodes=nodes)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 100, 20_000, 300_000]), st.booleans()), max_size=10))
def test_messages_and_collectives_between_each_other(program: list[tuple[int, int, bool]]) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        me, n, paths = group.rank_in_group, group.world_size, Paths(group)
        for number, (kind, size, flag) in enumerate(program):
            paths.choose()
            x = torch.full((size,), float(number * n + me))
            if kind == 0:
                assert (group.all_reduce(x) == sum(number * n + rank for rank in range(n))).all()
            elif kind == 1:
                got = group.sendrecv(x, (me + 1) % n, size, x.dtype, (me - 1) % n)
                assert (got == number * n + (me - 1) % n).all()
            else:
                work = group.isend(x, (me + 1) % n, tag=int(flag))
                paths.choose()
                assert (group.recv(size, x.dtype, (me - 1) % n, tag=int(flag)) == number * n + (me - 1) % n).all()
                work.wait()

    on(3, body, nodes=3)


def test_native_messages_end_in_the_errors_of_the_general_path() -> None:
    heard = threading.Barrier(2)

    def linked(group: cg.GroupCoordinator) -> int:
        peer = 1 - group.rank_in_group
        group.sendrecv(torch.ones(1), peer, 1, torch.float32, peer)
        return peer

    def late(group: cg.GroupCoordinator) -> None:
        peer = linked(group)
        if peer:
            heard.wait(50)
            return
        with pytest.raises(CollectiveTimeoutError, match=r"recv\(torch.float32 \(3,\), 0\).*did not end within a timeout of 0.2 s"):
            group.recv(3, torch.float32, peer, timeout=0.2)
        with pytest.raises(CollectiveTimeoutError):
            group.send(torch.ones(1), peer)
        heard.wait(50)

    on(2, late, nodes=2)

    def gone(group: cg.GroupCoordinator) -> None:
        peer = linked(group)
        if peer:
            heard.wait(50)
            group._state.close()
            with pytest.raises(ContextClosedError):
                group.send(torch.ones(1), peer)
            return
        heard.wait(50)
        with pytest.raises(PeerLostError):
            group.recv(3, torch.float32, peer)

    on(2, gone, nodes=2)

    def differs(group: cg.GroupCoordinator) -> None:
        """A message of another size that has the same tag is a forgery or a mistake of ours: as many bytes are never read."""
        peer = linked(group)
        links = group._state.network.transport  # type: ignore[union-attr]  # there is one
        native: Any = group._state.native_messages
        if peer:
            state = group._state
            number = state.counts[1, True, 0]
            from commgraph.communicators.tags import MESSAGE, make_tag, message_text

            tag = make_tag(MESSAGE, number, message_text(torch.float32, (3,)))
            x = torch.ones(5)
            links.messages.exchange([(peer, tag, x.data_ptr(), x.nbytes)], [], 10**10)  # type: ignore[union-attr]  # a TcpTransport
            heard.wait(50)
            return
        with pytest.raises((CollectiveMismatchError, PeerLostError)):
            native.recv(group, 3, torch.float32, peer, 0, None, 20.0)
        heard.wait(50)

    on(2, differs, nodes=2)


def test_a_second_message_of_a_lane_is_refused_and_other_lanes_go_on() -> None:
    """A receive from any rank holds up receives of its tag, and no sends."""

    def body(group: cg.GroupCoordinator) -> None:
        peer = 1 - group.rank_in_group
        group.sendrecv(torch.ones(1), peer, 1, torch.float32, peer)
        claims = group._state.turns.claims
        if peer:
            claims[1, True, 0] = "another thread's"
            with pytest.raises(ConcurrentCallError):
                group.send(torch.ones(2), 1)
            del claims[1, True, 0]
            claims[-1, False, 0] = "another thread's"
            with pytest.raises(ConcurrentCallError):
                group.recv(2, torch.float32, 1)
            group.send(torch.ones(2), 1)
            assert group.recv(2, torch.float32, 1, tag=3).tolist() == [3, 3]
            del claims[-1, False, 0]
        else:
            assert group.recv(2, torch.float32, 0).tolist() == [1, 1]
            group.send(torch.full((2,), 3.0), 0, tag=3)

    for nodes in (1, 2):
        on(2, body, nodes=nodes)
