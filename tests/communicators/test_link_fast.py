"""Native calls of groups over several hosts: the results of the general path, whichever way each rank takes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.communicators.reduction import reduce_pieces
from commgraph.errors import CollectiveMismatchError, CollectiveTimeoutError, ConcurrentCallError, ContextClosedError, PeerLostError
from commgraph.shm import native_module
from commgraph.testing import spmd
from tests.helpers import on

pytestmark = pytest.mark.skipif(native_module.load() is None, reason="no native module")

# Ranks and hosts: links alone, with gathers in one step and in several; with counterparts; hosts of different sizes are served by links.
SHAPES = [(2, 2), (4, 2), (5, 5)]


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return numbers whose sums are exact in every dtype."""
    whole = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(rank * 1000 + len(shape) + shape[0])).float()
    return whole > 0 if dtype == torch.bool else whole.to(dtype)


class Ways:
    """Calls the methods of a group natively and generally in turn, each rank in another order."""

    def __init__(self, group: cg.GroupCoordinator) -> None:
        self.group = group
        self.turn = itertools.count(group.rank_in_group)

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        fast = self.group._state.detects
        assert fast is not None
        fast.pause(next(self.turn) % 3 == 0)
        try:
            return getattr(self.group, method)(*args, **options)
        finally:
            fast.pause(False)


@pytest.mark.parametrize(("n", "nodes"), SHAPES)
def test_each_rank_may_take_either_way(n: int, nodes: int) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        me, call = group.rank_in_group, Ways(group)
        for dtype, length in itertools.product((torch.float32, torch.bfloat16, torch.int32, torch.bool), (1, 700, 20_011)):
            shape = (n, length)
            given = [values(rank, shape, dtype) for rank in range(n)]
            for op in ("sum", "avg", "max"):
                if op == "avg" and not dtype.is_floating_point:
                    continue
                total = torch.empty_like(given[0])
                reduce_pieces(given, op, total)
                assert torch.equal(call("all_reduce", given[me], op=op), total)
                x = given[me].clone()
                call("all_reduce_", x, op=op)
                assert torch.equal(x, total)
                assert torch.equal(call("reduce_scatter", given[me], 0, op=op), total[me : me + 1])
            for dim in (0, 1):
                assert torch.equal(call("all_gather", given[me], dim), torch.cat(given, dim))
            src = length % n
            x = given[me].clone()
            call("broadcast", x, src)
            assert torch.equal(x, given[src])
            got = call("gather", given[me], src, 0)
            assert got is None if me != src else torch.equal(got, torch.cat(given))
            assert torch.equal(call("all_to_all", torch.cat(given)), torch.cat([given[me]] * n))
            cut = [1 + (rank + length) % 2 for rank in range(n)]
            sent = [torch.cat(given)[: sum(cut)] + (rank if dtype != torch.bool else 0) for rank in range(n)]
            whole = call("all_to_all", sent[me].to(dtype), input_sizes=cut, output_sizes=[cut[me]] * n)
            assert torch.equal(whole, torch.cat([one.to(dtype).split(cut)[me] for one in sent]))
            call("barrier")

    on(n, body, nodes=nodes)


@pytest.mark.parametrize(("n", "nodes"), SHAPES)
def test_plain_calls_are_native_once_there_are_links(n: int, nodes: int) -> None:
    def body(group: cg.GroupCoordinator) -> list[bool]:
        x, fast = torch.ones(n, 3), group._fast
        calls: list[Callable[[], Any]] = [
            lambda: fast.all_reduce(x, "sum", None),
            lambda: fast.all_reduce_(x.clone(), "max", 5.0),
            lambda: fast.all_gather(x, -1, None, None),
            lambda: fast.reduce_scatter(x, 0, "sum", None, None),
            lambda: fast.broadcast(x.clone(), 0, None),
            lambda: fast.all_to_all(x, 0, 0, None, None, None, None),
            lambda: fast.all_to_all(x, 0, 0, [1] * n, [1] * n, None, None),
            lambda: fast.barrier(None),
        ]
        group.all_reduce(x)
        group.all_to_all(x)
        group.barrier()
        return [call() is not None for call in calls] + [fast.all_reduce(x.to_sparse(), "sum", None) is None]

    assert on(n, body, nodes=nodes) == [[True] * 9] * n


@pytest.mark.parametrize(("n", "nodes"), SHAPES[:2])
def test_native_calls_end_in_the_errors_of_the_general_path(n: int, nodes: int) -> None:
    def begun(group: cg.GroupCoordinator) -> None:
        group.all_reduce(torch.ones(4))
        group.barrier()

    heard = threading.Barrier(n)  # the late rank calls nothing else before the others have their errors: a close would differ

    def late(group: cg.GroupCoordinator) -> str:
        begun(group)
        if group.rank_in_group == n - 1:
            heard.wait(50)
            return ""
        with pytest.raises((CollectiveTimeoutError, PeerLostError)) as caught:
            group.all_reduce(torch.ones(4), timeout=0.5)
        with pytest.raises((CollectiveTimeoutError, PeerLostError)):
            group.barrier()
        heard.wait(50)
        return str(caught.value)

    assert f"rank {n - 1}" in "".join(on(n, late, nodes=nodes))

    def different(group: cg.GroupCoordinator) -> None:
        begun(group)
        with pytest.raises((CollectiveMismatchError, PeerLostError)) as caught:
            group.all_reduce(torch.ones(4 if group.rank_in_group else 8))
        assert "all_reduce" in str(caught.value)

    on(n, different, nodes=nodes)

    def closed(group: cg.GroupCoordinator) -> None:
        begun(group)
        group._state.close()
        with pytest.raises(ContextClosedError):
            group.all_reduce(torch.ones(4))

    on(n, closed, nodes=nodes)

    def twice(group: cg.GroupCoordinator) -> None:
        begun(group)
        held = group._state.turns.claim_whole()
        group._state.turns.claims[None] = 0  # another thread's
        with pytest.raises(ConcurrentCallError):
            group.all_reduce(torch.ones(4))
        group._state.turns.claims[None] = held
        group._state.turns.release_held(held)
        group.barrier()

    on(n, twice, nodes=nodes)


@pytest.mark.parametrize(("n", "nodes"), [(2, 1), *SHAPES])
@pytest.mark.parametrize("call", ["all_reduce", "barrier", "recv", "recv_object"])
def test_a_rank_that_has_closed_its_context_is_not_taken_for_a_dead_one(n: int, nodes: int, call: str) -> None:
    """Whether the peers have links to it or make one, call natively or generally."""
    closed = threading.Event()
    gone = n - 1

    def body(world: cg.World) -> str:
        context = world.context(cg.Layout(n, tp=n), name="target")
        tp = context.tp
        tp.all_reduce(torch.ones(3))
        if world.rank == gone:
            context._drop()
            closed.set()
            return ""
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: tp.all_reduce(torch.ones(3)),
            "barrier": lambda: tp.barrier(timeout=20),
            "recv": lambda: tp.recv(1, torch.float32, gone),
            "recv_object": lambda: tp.recv_object(gone),
        }
        assert closed.wait(50)
        with pytest.raises(PeerLostError) as caught:
            calls[call]()
        context._drop()
        return str(caught.value)

    said = spmd(body, n, nodes=nodes)
    assert any(f"rank {gone} has closed context 'target', and takes no part in call #" in one for one in said), said
    assert not any("(died" in one for one in said)


@pytest.mark.parametrize(
    "operation", ["gather", "reduce", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier"]
)
def test_a_first_call_natively_makes_the_links_that_it_needs(operation: str) -> None:
    """A build links each rank to its neighbours alone: what a native call needs beside them it leaves to the general path."""
    n = 9

    def body(group: cg.GroupCoordinator) -> None:
        me, x = group.rank_in_group, torch.ones(n)
        for root in (0, 4):
            expected: Any = torch.full((n,), float(n))
            got: Any
            if operation == "gather":
                got, expected = group.gather(x, root), None if me != root else torch.ones(n * n)
            elif operation == "reduce":
                got, expected = group.reduce(x, root), None if me != root else expected
            elif operation == "all_reduce":
                got = group.all_reduce(x)
            elif operation == "all_gather":
                got, expected = group.all_gather(x), torch.ones(n * n)
            elif operation == "reduce_scatter":
                got, expected = group.reduce_scatter(x), expected[:1]
            elif operation == "all_to_all":
                got, expected = group.all_to_all(x), x
            elif operation == "broadcast":
                got, expected = group.broadcast(x * (me == root), root), x
            else:
                group.barrier()
                continue
            assert got is expected is None or torch.equal(got, expected)

    on(n, body, nodes=n)
