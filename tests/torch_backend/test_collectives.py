"""Every operation of the backend's process group against what its definition says, ranks as threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph import compat
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore
from commgraph.torch_backend import ProcessGroup

Body = Callable[[ProcessGroup], Any]
OPS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda xs: xs.sum(0),
    dist.ReduceOp.AVG: lambda xs: xs.sum(0) / xs.shape[0],
    dist.ReduceOp.PRODUCT: lambda xs: xs.prod(0),
    dist.ReduceOp.MIN: lambda xs: xs.amin(0),
    dist.ReduceOp.MAX: lambda xs: xs.amax(0),
}
BITS: dict[Any, Callable[[int, int], int]] = {
    dist.ReduceOp.BAND: int.__and__,
    dist.ReduceOp.BOR: int.__or__,
    dist.ReduceOp.BXOR: int.__xor__,
}


def on_groups(n: int, body: Body, **how: Any) -> list[Any]:
    """Run `body` with the process group of each rank."""
    store = ThreadStore()
    return spmd(lambda world: body(ProcessGroup(world, store)), n, **how)


def options(kind: str, *, asynchronous: bool = False, **fields: Any) -> Any:
    made = compat.operation_options(kind)
    made.asyncOp = asynchronous
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def strided(values: torch.Tensor, strides: str) -> torch.Tensor:
    """Return a copy of a 2-D tensor with memory of another order, or with gaps."""
    if strides == "transposed":
        return values.t().clone(memory_format=torch.contiguous_format).t()
    if strides == "gaps":
        out = torch.zeros(values.shape[0], 2 * values.shape[1], dtype=values.dtype)[:, ::2]
        out.copy_(values)
        return out
    return values.clone()


def wait(work: Any) -> None:
    work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None


shapes = st.tuples(st.integers(0, 4), st.integers(1, 5))
layouts = st.sampled_from(["dense", "transposed", "gaps"])


@settings(max_examples=10)
@given(
    n=st.integers(1, 3), op=st.sampled_from(list(OPS)), shape=shapes, strides=layouts, asynchronous=st.booleans(), root=st.integers(0, 2)
)
def test_reductions(n: int, op: Any, shape: tuple[int, int], strides: str, asynchronous: bool, root: int) -> None:
    xs = torch.arange(n * shape[0] * shape[1], dtype=torch.float64).view(n, *shape) % 7 + 1
    total, root = OPS[op](xs), root % n

    def body(group: ProcessGroup) -> None:
        x = strided(xs[group.rank()], strides)
        wait(group.allreduce([x], options("Allreduce", asynchronous=asynchronous, reduceOp=op)))
        assert torch.equal(x, total)
        ys = [strided(xs[group.rank()], strides), xs[group.rank()].float()]
        wait(group.allreduce_coalesced(ys, options("AllreduceCoalesced", asynchronous=asynchronous, reduceOp=op)))
        assert torch.equal(ys[0], total)
        assert torch.allclose(ys[1], total.float())
        z = strided(xs[group.rank()], strides)
        wait(group.reduce([z], options("Reduce", asynchronous=asynchronous, reduceOp=op, rootRank=root)))
        assert torch.equal(z, total if group.rank() == root else xs[group.rank()])
        pieces = [strided(xs[group.rank()] + i, strides) for i in range(n)]
        out = strided(torch.zeros(shape, dtype=torch.float64), strides)
        wait(group.reduce_scatter([out], [pieces], options("ReduceScatter", asynchronous=asynchronous, reduceOp=op)))
        assert torch.equal(out, OPS[op](xs + group.rank()))
        out2 = strided(torch.zeros(shape, dtype=torch.float64), strides)
        settings = options("ReduceScatter", asynchronous=asynchronous, reduceOp=op)
        wait(group.reduce_scatter_single(out2, torch.cat(pieces), settings))
        assert torch.equal(out2, out)
        outs = [torch.zeros(shape, dtype=torch.float64) for _ in range(2)]
        wait(group.reduce_scatter_single_coalesced(outs, [torch.cat(pieces), torch.cat(pieces)], settings))
        assert all(torch.equal(one, out) for one in outs)

    on_groups(n, body)


@pytest.mark.parametrize("op", list(BITS))
def test_reductions_of_bits(op: Any) -> None:
    def body(group: ProcessGroup) -> list[int]:
        x = torch.tensor([[12, 7], [10, 9]])[group.rank()]
        group.allreduce([x], options("Allreduce", reduceOp=op)).wait()
        return x.tolist()

    assert on_groups(2, body) == [[BITS[op](12, 10), BITS[op](7, 9)]] * 2


def test_the_short_forms_of_torchs_methods() -> None:
    def body(group: ProcessGroup) -> None:
        x = torch.tensor([float(group.rank())])
        group.allreduce(x).wait()
        assert x.item() == 1
        y = torch.tensor([float(group.rank() + 3)])
        group.allreduce([y], dist.ReduceOp.MAX).wait()
        assert y.item() == 4
        group.broadcast(y.add_(group.rank()), 1).wait()
        assert y.item() == 5

    on_groups(2, body)


def test_premultiplied_sum() -> None:
    op: Any = dist.ReduceOp.PREMUL_SUM(0.25)  # type: ignore[operator]  # torch's stub takes it for a constant

    def body(group: ProcessGroup) -> None:
        for asynchronous in (False, True):
            x, out = torch.tensor([1.0, 2.0]) + group.rank(), torch.zeros(1)
            group.reduce_scatter_single(out, x, options("ReduceScatter", asynchronous=asynchronous, reduceOp=op)).wait()
            assert out.item() == (3 + 2 * group.rank()) / 4
            assert x.tolist() == [1.0 + group.rank(), 2.0 + group.rank()]
            group.allreduce([x], options("Allreduce", asynchronous=asynchronous, reduceOp=op)).wait()
            assert x.tolist() == [0.75, 1.25]

    on_groups(2, body)


def test_a_sparse_sum_over_other_places_on_each_rank() -> None:
    def body(group: ProcessGroup) -> torch.Tensor:
        places = torch.tensor([[0, 2], [1, 3]]) if group.rank() else torch.tensor([[2], [3]])
        x = torch.sparse_coo_tensor(places, torch.ones(places.shape[1]), (4, 5), check_invariants=True)
        group.allreduce([x], options("Allreduce")).wait()
        return x.to_dense()

    expected = torch.zeros(4, 5)
    expected[0, 1], expected[2, 3] = 1, 2
    assert all(torch.equal(x, expected) for x in on_groups(2, body))


@settings(max_examples=10)
@given(n=st.integers(1, 3), shape=shapes, strides=layouts, asynchronous=st.booleans(), root=st.integers(0, 2))
def test_gathers_and_scatters(n: int, shape: tuple[int, int], strides: str, asynchronous: bool, root: int) -> None:
    xs, root = torch.arange(n * shape[0] * shape[1]).view(n, *shape), root % n

    def empty(count: int = n) -> list[torch.Tensor]:
        return [strided(torch.full(shape, -1), strides) for _ in range(count)]

    def equal(outs: Sequence[torch.Tensor]) -> bool:
        return all(torch.equal(out, x) for out, x in zip(outs, xs, strict=True))

    def body(group: ProcessGroup) -> None:
        me, how = group.rank(), {"asynchronous": asynchronous}
        x, outs = strided(xs[me], strides), empty()
        wait(group.allgather([outs], [x], options("Allgather", **how)))
        assert equal(outs)
        out = strided(torch.full((n * shape[0], shape[1]), -1), strides)
        wait(group.all_gather_single(out, x, options("Allgather", **how)))
        assert torch.equal(out, xs.flatten(0, 1))
        whole = [torch.full((n, *shape), -1), torch.full((n * shape[0] * shape[1],), -1)]
        wait(group.all_gather_single_coalesced(whole, [x, x], options("Allgather", **how)))
        assert equal(whole[0])
        assert torch.equal(whole[1], xs.flatten())
        lists = [empty(2) for _ in range(n)]
        wait(group.allgather_coalesced(lists, [x, x], options("Allgather", **how)))
        assert all(equal([outs[i] for outs in lists]) for i in range(2))
        outs = empty()
        wait(group.gather([outs] if me == root else [], [x], options("Gather", rootRank=root, **how)))
        assert me != root or equal(outs)
        (out,) = empty(1)
        given_ = [[strided(y, strides) for y in xs]] if me == root else []
        wait(group.scatter([out], given_, options("Scatter", rootRank=root, **how)))
        assert torch.equal(out, xs[me])
        x = strided(xs[me], strides)
        wait(group.broadcast([x], options("Broadcast", rootRank=root, **how)))
        assert torch.equal(x, xs[root])
        wait(group.barrier(options("Barrier", **how)))

    on_groups(n, body)


@settings(max_examples=10)
@given(sizes=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=3, max_size=3), asynchronous=st.booleans())
def test_uneven_pieces(sizes: list[list[int]], asynchronous: bool) -> None:
    """`sizes[i][j]` rows go from rank i to rank j."""
    rows = [torch.arange(2 * sum(of)).view(-1, 2) + 100 * i for i, of in enumerate(sizes)]
    pieces = [x.split(of) for x, of in zip(rows, sizes, strict=True)]

    def body(group: ProcessGroup) -> None:
        me, settings = group.rank(), options("AllToAll", asynchronous=asynchronous)
        received = [pieces[i][me] for i in range(3)]
        out = torch.full((sum(len(x) for x in received), 2), -1)
        wait(group.all_to_all_single(out, rows[me], [len(x) for x in received], sizes[me], settings))
        assert torch.equal(out, torch.cat(received))
        outs = [torch.full_like(x, -1) for x in received]
        wait(group.alltoall(outs, list(pieces[me]), settings))
        assert all(torch.equal(a, b) for a, b in zip(outs, received, strict=True))
        gathered = [torch.full((sizes[i][0], 2), -1) for i in range(3)]
        wait(group.allgather([gathered], [pieces[me][0]], options("Allgather", asynchronous=asynchronous)))
        assert all(torch.equal(gathered[i], pieces[i][0]) for i in range(3))

    on_groups(3, body)


def test_messages_by_tag_and_from_any_rank() -> None:
    def body(group: ProcessGroup) -> None:
        me, n = group.rank(), group.size()
        right, left = (me + 1) % n, (me - 1) % n
        sent = [group.send([torch.full((2, 3), 10 * me + tag).t()], right, tag) for tag in (1, 2)]
        for tag in (2, 1):
            x = torch.zeros(2, 3, dtype=torch.int64).t()
            work: Any = group.recv([x], left, tag)
            wait(work)
            assert work.source_rank() == left
            assert x.tolist() == [[10 * left + tag] * 2] * 3
        for work in sent:
            wait(work)
        if me == 0:
            seen = {}
            for _ in range(n - 1):
                x = torch.zeros(1)
                work = group.recv_anysource([x], 7)
                wait(work)
                seen[work._source_rank()] = x.item()
            assert seen == {i: float(i) for i in range(1, n)}
        else:
            group.send([torch.tensor([float(me)])], 0, 7).wait()
        own, x = group.send([torch.ones(1)], me), torch.zeros(1)
        group.recv([x], me).wait()
        own.wait()
        assert x.item() == 1

    on_groups(3, body)


def test_work_that_was_begun_completes_a_future_in_order() -> None:
    def body(group: ProcessGroup) -> None:
        x = torch.full((300_000,), float(group.rank()))
        works = [group.allreduce([x], options("Allreduce", asynchronous=True)) for _ in range(3)]
        futures = [work.get_future() for work in works]
        assert futures[-1].wait()[0] is x
        assert all(future.done() for future in futures)
        assert x[0].item() == 4.0  # 0 + 1, then twice that, twice
        assert works[0].get_future().wait()[0] is x
        assert works[0].result()[0] is x
        with pytest.raises(RuntimeError, match="a message has none"):
            group.send([x], group.rank()).get_future()
        group.recv([x], group.rank()).wait()

    on_groups(2, body)


def test_a_call_whose_peer_does_not_come_fails_its_future() -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank() == 0:
            group.set_timeout(timedelta(seconds=0.3))
            work: Any = group.allreduce([torch.ones(2)])
            with pytest.raises(RuntimeError, match="rank 1"):
                work.get_future().wait()
            with pytest.raises(cg.CollectiveTimeoutError, match="rank 1"):
                work.wait()
            assert work.is_completed()
            assert not work.is_success()
            assert isinstance(work.exception(), cg.CollectiveTimeoutError)
        group.monitored_barrier(timedelta(seconds=30))

    on_groups(2, body)


@pytest.mark.parametrize(("wait_all", "missing"), [(False, "Rank 1 "), (True, "Ranks 1, 2 ")])
def test_a_monitored_barrier_names_who_is_missing(wait_all: bool, missing: str) -> None:
    def body(group: ProcessGroup) -> str:
        if group.rank() in (1, 2):
            return ""
        with pytest.raises(RuntimeError) as caught:
            group.monitored_barrier(timedelta(seconds=0.3), wait_all_ranks=wait_all)
        return str(caught.value)

    first, *_, last = on_groups(4, body)
    assert first.startswith(missing)
    assert "Rank 3 successfully reached" in last
    assert missing in last


def test_aborting_from_another_thread_ends_a_call() -> None:
    import threading

    def body(group: ProcessGroup) -> None:
        if group.rank() == 0:
            threading.Timer(0.2, group.abort).start()
            with pytest.raises((cg.ContextClosedError, cg.PeerLostError)):
                group.barrier().wait()
            with pytest.raises(cg.ContextClosedError):
                group.barrier().wait()
        else:
            with pytest.raises(cg.PeerLostError):
                group.barrier().wait()

    # Rank 1 comes late, so that its barrier would be the one that rank 0 waits for.
    def late(group: ProcessGroup) -> None:
        if group.rank():
            threading.Event().wait(0.5)
        body(group)

    on_groups(2, late)


def test_splitting() -> None:
    def body(group: ProcessGroup) -> None:
        part = group.split_group([2, 0], timeout=timedelta(seconds=20), group_name="part")
        assert (part is None) == (group.rank() == 1)
        if part is not None:
            x = torch.tensor([float(group.rank())])
            part.allreduce([x]).wait()
            assert x.item() == 2
            assert part.rank() == {2: 0, 0: 1}[group.rank()]
            assert part.group_name == "part"

    on_groups(3, body)


def test_bad_input_says_what_is_needed() -> None:
    def body(group: ProcessGroup) -> None:
        x = torch.ones(4)
        for call, error, text in (
            (lambda: group.allreduce([x, x]), ValueError, "2 tensors"),
            (lambda: group.allreduce([x.to("meta")]), cg.UnsupportedTensorError, "one group for each kind"),
            (lambda: group.allreduce([3]), TypeError, "a int instead of a tensor"),
            (lambda: group.allgather([[x]], [x]), ValueError, "1 tensors for 2 ranks"),
            (lambda: group.all_gather_single(x, x), ValueError, "8 are needed"),
            (lambda: group.reduce_scatter_single(x, x), ValueError, "8 are needed"),
            (lambda: group.all_to_all_single(x, x, [1, 2], [2, 2]), ValueError, "add up to its 4 rows"),
            (lambda: group.all_to_all_single(torch.ones(3), torch.ones(3)), ValueError, "do not divide by 2"),
            (lambda: group.scatter([x], [[x, x], [x, x]], options("Scatter", rootRank=group.rank())), ValueError, "2 lists"),
            (lambda: group.send([x], 5), ValueError, "5"),
            (lambda: group._get_backend(torch.device("cuda")), RuntimeError, "no backend for cuda"),
        ):
            with pytest.raises(error, match=text):
                call()
        group.allreduce([x]).wait()
        assert x.tolist() == [2.0] * 4

    on_groups(2, body)


def test_tensors_that_need_gradients_are_filled_behind_autograds_back() -> None:
    def body(group: ProcessGroup) -> None:
        weight = torch.nn.Parameter(torch.full((3,), float(group.rank() + 1)))
        group.allreduce([weight], options("Allreduce")).wait()
        group.broadcast([weight], options("Broadcast", asynchronous=True)).wait()
        assert weight.tolist() == [3.0] * 3
        assert weight.is_leaf
        assert weight.grad is None

    on_groups(2, body)


def test_over_several_hosts() -> None:
    """By the network between hosts."""

    def body(group: ProcessGroup) -> None:
        x = torch.full((70_000,), float(group.rank()))
        group.allreduce([x]).wait()
        assert x[-1].item() == 6
        out = torch.zeros(4)
        group.all_gather_single(out, torch.tensor([float(group.rank())])).wait()
        assert out.tolist() == [0, 1, 2, 3]
        work = group.send([x], (group.rank() + 1) % 4, 3)
        y = torch.zeros_like(x)
        group.recv([y], (group.rank() - 1) % 4, 3).wait()
        work.wait()
        assert torch.equal(x, y)

    on_groups(4, body, nodes=2)
