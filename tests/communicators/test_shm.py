"""The strategy for ranks of one host: its values, its memory, its two ways into a call, and what happens where it is missing."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.shm.host_memory import Sizes
from commgraph.testing import spmd
from tests import helpers
from tests.helpers import ROOT, same, until_it_waits
from tests.processes import Processes

T = TypeVar("T")

OPS = ("sum", "avg", "max", "min", "product")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALLEST = 16 * 1024  # of CommunicatorOptions.shm_bytes: small tensors go through in pieces, as large ones do otherwise


def on(n: int, body: Callable[[GroupCoordinator], T], *, timeout: float = 60, **options: Any) -> list[T]:
    """`body` on a group of n ranks, which are threads; what it returns on each."""

    def run(group: GroupCoordinator) -> T:
        assert next(iter(group.communicators["all_reduce"])) == "shm"
        return body(group)

    return helpers.on(n, run, timeout=timeout, **options)


def integers(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(BITS[x.element_size()]) if x.dtype != torch.bool else x.to(torch.int8)


# Values.


def special(dtype: torch.dtype) -> torch.Tensor:
    """Values that kernels get wrong: at the ends of the dtype, halfway between two of its values, and none at all."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if dtype in WHOLES:
        info = torch.iinfo(dtype)
        values = [info.min, info.min + 1, info.max, info.max - 1, info.max // 2 + 1, 0, 1, 2, 3, 7, info.max // 3]
        return (
            torch.tensor([value - (1 << 64) if value > 2**63 - 1 else value for value in values], dtype=torch.int64)
            .to(BITS[dtype.itemsize])
            .view(dtype)
        )
    info_ = torch.finfo(dtype)
    tie = 1 + info_.eps / 2  # halfway between two values of the dtype, in sums of some of these
    values_ = [0.0, -0.0, 1.0, -1.0, info_.eps, info_.eps / 2, tie, 1 + 1.5 * info_.eps, info_.max, -info_.max, info_.max / 2, info_.tiny]
    values_ += [
        info_.smallest_normal / 2,
        info_.smallest_normal * info_.eps,
        -info_.smallest_normal * info_.eps,
        math.inf,
        -math.inf,
        math.nan,
    ]
    return torch.tensor([*values_, 3.0, 1 / 3, 1e-3, 255.0, 257.0, -65520.0], dtype=torch.float64).to(dtype)


def given(dtype: torch.dtype, rank: int, n: int, count: int) -> torch.Tensor:
    """What one rank gives: every pair of special values of the first two ranks, then anything."""
    values = special(dtype)
    pairs = torch.tensor(list(itertools.product(range(len(values)), repeat=2)))
    column = pairs[:, rank] if rank < 2 else torch.arange(len(pairs)) * (rank + 3) % len(values)
    random = torch.Generator().manual_seed(rank)
    if dtype == torch.bool:
        rest = torch.randint(0, 2, (count,), generator=random).bool()
    elif dtype in WHOLES:
        rest = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=random).to(BITS[dtype.itemsize]).view(dtype)
    else:
        rest = torch.randn(count, generator=random, dtype=torch.float64).to(dtype)
    # Indexed as bits: torch knows no indexing of most unsigned kinds.
    chosen = integers(values)[column].view(dtype) if dtype != torch.bool else values[column]
    return torch.cat([chosen, rest])


def reference(pieces: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction in rank order by torch: small floats in float32 and rounded once, whole numbers as they wrap."""
    dtype, n = pieces[0].dtype, len(pieces)
    if dtype == torch.bool:
        stack = torch.stack(list(pieces))
        return stack.any(0) if op in ("sum", "max") else stack.all(0)
    if dtype in WHOLES:
        wide = [integers(piece) for piece in pieces]
        if op in ("max", "min"):
            # Unsigned numbers are ordered as signed ones are after the highest bit was turned.
            turn = torch.iinfo(BITS[dtype.itemsize]).min if not dtype.is_signed else 0
            turned = torch.stack([piece ^ turn for piece in wide])
            return ((turned.amax(0) if op == "max" else turned.amin(0)) ^ turn).view(dtype)
        total = wide[0]
        for piece in wide[1:]:
            total = total + piece if op == "sum" else total * piece
        return total.view(dtype)
    floats = [piece.to(torch.float64 if dtype == torch.float64 else torch.float32) for piece in pieces]
    total = floats[0]
    for piece in floats[1:]:
        combine: Any = {"max": torch.maximum, "min": torch.minimum, "product": torch.mul}.get(op, torch.add)
        total = combine(total, piece)
    return (total / n if op == "avg" else total).to(dtype)


def agrees(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal, any NaN to any other, zeros of either sign to each other."""
    if not found.dtype.is_floating_point:
        return same(found, wanted)
    return found.dtype == wanted.dtype and torch.equal(found.isnan(), wanted.isnan()) and bool(((found == wanted) | wanted.isnan()).all())


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("shm_bytes", [SMALLEST, 1 << 20])
def test_reductions_agree_with_torch(n: int, shm_bytes: int) -> None:
    """Every dtype and op, in one step and in pieces; NaN, infinities, subnormals, ties, wrapping; the same bits on every rank."""
    count = 20_000 if shm_bytes == SMALLEST else 500
    cases = [(dtype, op) for dtype in (*FLOATS, *WHOLES, torch.bool) for op in OPS if op != "avg" or dtype in FLOATS]
    pieces = {dtype: [given(dtype, rank, n, count - count % n) for rank in range(n)] for dtype in (*FLOATS, *WHOLES, torch.bool)}
    wanted = {(dtype, op): reference(pieces[dtype], op) for dtype, op in cases}

    def body(group: GroupCoordinator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results = []
        for dtype, op in cases:
            x = pieces[dtype][group.rank]
            before = x.clone()
            y = group.all_reduce(x, op=op)
            assert same(x, before), (dtype, op)
            z = group.all_reduce_(before, op=op)
            assert z is before
            assert same(y, z), (dtype, op)
            assert agrees(y, wanted[dtype, op]), (dtype, op)
            size = len(x) // n * n
            piece = group.reduce_scatter(integers(x)[:size].view(dtype) if dtype != torch.bool else x[:size], 0, op=op)
            results.append((y, piece))
        return results

    results = on(n, body, shm_bytes=shm_bytes)
    for case, ranks in zip(cases, zip(*results, strict=True), strict=True):
        first = ranks[0][0]
        assert all(same(first, y) for y, _ in ranks), case
        scattered = torch.cat([integers(piece) for _, piece in ranks])
        # In pieces of other sizes, so of a NaN only that it is one.
        whole = integers(first)[: len(scattered)]
        if case[0] in FLOATS:
            assert agrees(scattered.view(case[0]), whole.view(case[0])), case
        else:
            assert torch.equal(scattered, whole), case


def test_bits_agree_where_every_entry_is_another_nan() -> None:
    """A NaN carries bits that name it, and of two NaNs one wins: the same on every rank, however its tensor lies in memory."""

    def body(group: GroupCoordinator) -> list[torch.Tensor]:
        results = []
        for dtype, quiet in ((torch.float32, 0x7FC00000), (torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00), (torch.float64, 0x7FF8 << 48)):
            for op in OPS:
                numbers = torch.arange(1000) % 60 + group.rank
                x = torch.empty(1000 + group.rank, dtype=BITS[dtype.itemsize])[group.rank :]
                x.copy_(numbers.to(x.dtype) | quiet)
                results.append(group.all_reduce(x.view(dtype), op=op))
        return results

    first, *others = on(3, body)
    for ranks in others:
        assert all(same(x, y) and x.isnan().all() for x, y in zip(first, ranks, strict=True))


# Sizes.


def whole(group: GroupCoordinator, rank: int, entries: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return ((torch.arange(entries) * 7 + rank * 1001) % 113).to(dtype)


def every_operation(group: GroupCoordinator, entries: int, dtype: torch.dtype = torch.int32) -> None:
    """Every operation on `entries` (in each piece, where it has pieces), against what is known of the others."""
    n, me = group.world_size, group.rank
    all_ = [whole(group, rank, entries, dtype) for rank in range(n)]
    x = all_[me].clone()
    total = torch.stack([piece.to(torch.int64) for piece in all_]).sum(0).to(dtype)
    assert torch.equal(group.all_reduce(x), total)
    assert torch.equal(group.all_reduce_(x.clone(), op="max"), torch.stack(all_).amax(0))
    assert torch.equal(group.all_gather(x), torch.cat(all_))
    assert torch.equal(group.reduce_scatter(torch.cat([x + i for i in range(n)])), total + n * me)
    assert torch.equal(group.all_to_all(torch.cat([x + i for i in range(n)])), torch.cat([piece + me for piece in all_]))
    for src in range(n):
        assert torch.equal(group.broadcast(all_[src].clone() if me == src else torch.zeros_like(x), src), all_[src])
        gathered = group.gather(x, src)
        assert gathered is None if me != src else torch.equal(gathered, torch.cat(all_))
    if me == 0:
        group.send(x, 1)
    elif me == 1:
        assert torch.equal(group.recv((entries,), dtype, 0), all_[0])
    assert torch.equal(x, all_[me])


@pytest.mark.parametrize("n", [2, 3])
def test_sizes_around_every_threshold(n: int) -> None:
    """A few bytes; a slot, a slot cut among the ranks, several of them, each a little more and a little less."""
    slots = [SMALLEST // n // 64 * 64, SMALLEST, 2 * SMALLEST, 3 * SMALLEST]
    sizes = [1, 2, 63, 64, 65, 100, *(slot + more for slot in slots for more in (-65, -1, 0, 1, 64))]

    def body(group: GroupCoordinator) -> None:
        for size in sizes:
            every_operation(group, size, torch.uint8)
        for size in (1, 15, 16, 17, 25, *((slot + more) // 4 for slot in slots for more in (-4, 0, 4))):
            every_operation(group, size)

    on(n, body, shm_bytes=SMALLEST, queue_bytes=SMALLEST)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_sizes_around_the_end_of_one_step(n: int) -> None:
    """512 KiB are reduced in one step by three ranks and more together; a slot of the usual size ends at 1 MiB."""
    one_step = 512 * 1024 // n // 4

    def body(group: GroupCoordinator) -> None:
        for entries in (one_step - 1, one_step, one_step + 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1):
            all_ = [whole(group, rank, entries) for rank in range(n)]
            assert torch.equal(group.all_reduce(all_[group.rank]), sum(all_[1:], all_[0]))
            assert torch.equal(group.all_reduce_(all_[group.rank].clone()), sum(all_[1:], all_[0]))

    on(n, body)


def test_pieces_along_every_dim_in_pieces_of_a_slot() -> None:
    """Strided blocks of the user's tensors, larger than a slot, of equal and of uneven sizes."""

    def body(group: GroupCoordinator) -> None:
        n, me = 3, group.rank
        all_ = [torch.arange(36 * 60 * 12).view(36, 60, 12) * 3 + rank for rank in range(n)]
        x = all_[me]
        for dim in range(3):
            assert torch.equal(group.all_gather(x, dim), torch.cat(all_, dim))
            piece = group.reduce_scatter(x, dim)
            assert torch.equal(piece, sum(all_[1:], all_[0]).chunk(n, dim)[me])
            assert torch.equal(group.all_to_all(x, scatter_dim=dim, gather_dim=dim), torch.cat([y.chunk(n, dim)[me] for y in all_], dim))
            sizes = [x.shape[dim] - 3, 0, 3]
            assert torch.equal(group.reduce_scatterv(x, dim, sizes), sum(all_[1:], all_[0]).split(sizes, dim)[me])
            mine = x.split(sizes, dim)[me]
            gathered = group.all_gatherv(mine, dim, sizes)
            assert isinstance(gathered, torch.Tensor)
            assert torch.equal(gathered, torch.cat([y.split(sizes, dim)[rank] for rank, y in enumerate(all_)], dim))

    on(3, body, shm_bytes=SMALLEST)


@pytest.mark.parametrize("n", [2, 3])
def test_large_pieces_are_read_where_they_lie(n: int) -> None:
    """Whether they are runs of memory or strided, on either side, beside pieces that are staged; the way in is found out, not believed."""

    def body(tp: GroupCoordinator) -> None:
        reaches: bool = tp.communicator("shm")._group.has_cma  # type: ignore[attr-defined]  # the native group
        assert ("read where they lie" in tp.communicator("shm").describe()) == reaches
        me = tp.rank_in_group
        for shape in ((n * 40_000,), (n * 4, 30_000), (n * 200, n * 3, 90), (1_200_000,)):
            everyone = [torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) * (rank + 1) for rank in range(n)]
            x = everyone[me].clone()
            for dim in range(len(shape)):
                assert torch.equal(tp.all_gather(x, dim), torch.cat(everyone, dim))
                for other in range(len(shape)):
                    if shape[dim] % n == 0:
                        pieces = [theirs.chunk(n, dim)[me] for theirs in everyone]
                        assert torch.equal(tp.all_to_all(x, scatter_dim=dim, gather_dim=other), torch.cat(pieces, other))
            for src in range(n):
                given = everyone[src].clone() if me == src else torch.zeros(shape)
                assert torch.equal(tp.broadcast(given, src), everyone[src])
                gathered = tp.gather(x, src, 0)
                assert gathered is None if me != src else torch.equal(gathered, torch.cat(everyone))  # type: ignore[arg-type]
            assert torch.equal(x, everyone[me])
        # Some ranks have little, some much, some nothing.
        rows = [0, 3, 20_000][:n] if n == 3 else [1, 20_000]
        piece = torch.full((rows[me], 8), float(me))
        assert torch.equal(tp.all_gatherv(piece, 0, rows), torch.cat([torch.full((r, 8), float(i)) for i, r in enumerate(rows)]))  # type: ignore[arg-type]

    on(n, body)


@pytest.mark.parametrize("deadline", [None, 0.1])
@pytest.mark.parametrize("entries", [1000, 300_000])
def test_a_tensor_that_was_given_up_is_freed(entries: int, deadline: float | None) -> None:
    """A sender that comes late finds that the receiver has taken its memory back."""

    given_up = threading.Event()

    def run(world: cg.World) -> bool | None:
        options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=0.3))
        with world.context(cg.Layout(2, tp=2), name="main", options=options) as ctx:
            if ctx.tp.is_first_rank:
                assert given_up.wait(30)
                with pytest.raises(cg.CollectiveError):
                    ctx.tp.broadcast(torch.ones(entries), 0)
                return None
            x = torch.zeros(entries)
            ref = weakref.ref(x)
            with pytest.raises(cg.CollectiveTimeoutError):
                ctx.tp.broadcast(x, 0, timeout=deadline)
            given_up.set()
            del x
        gc.collect()
        return ref() is None

    assert spmd(run, 2)[1]


@pytest.mark.parametrize("deadline", [None, 0.1])
@pytest.mark.parametrize("operation", ["all_reduce", "all_reduce_", "reduce_scatter"])
def test_a_late_thread_does_not_touch_what_others_have_taken_back(operation: str, deadline: float | None) -> None:
    """Threads reduce where their tensors lie: those of one that has given up are its own again, and may go."""

    others_gave_up, all_did = threading.Barrier(3), threading.Barrier(3)

    def run(world: cg.World) -> bool:
        options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=0.3))
        with world.context(cg.Layout(3, tp=3), name="main", options=options) as ctx:
            x = torch.zeros(300_000)
            ref = weakref.ref(x)
            if ctx.tp.is_first_rank:
                others_gave_up.wait(30)
            with pytest.raises(cg.CollectiveError):
                getattr(ctx.tp, operation)(x, timeout=deadline)
            x.fill_(5)
            if not ctx.tp.is_first_rank:
                others_gave_up.wait(30)
            all_did.wait(30)
            assert x.eq(5).all()
            del x
        gc.collect()
        return ref() is None

    assert spmd(run, 3) == [True] * 3


@pytest.mark.parametrize("n", [2, 3, 4])
def test_threads_reduce_where_their_tensors_lie(n: int) -> None:
    """In place and not, around the sizes from which they do so; the tensors are free for other use at once."""

    def body(tp: GroupCoordinator) -> None:
        me = tp.rank_in_group
        for entries in (8 * 1024 - 1, 8 * 1024, 64 * 1024, 64 * 1024 + 1, 256 * 1024, 256 * 1024 + 17, 700_000 // n * n):
            whole = torch.arange(entries) % 1000
            expected = whole * sum(range(1, n + 1))
            for dtype in (torch.float32, torch.int64):
                x = (whole * (me + 1)).to(dtype)
                strided = torch.stack([x, x], 1)[:, 0]
                total = tp.all_reduce(x)
                assert torch.equal(x, (whole * (me + 1)).to(dtype))
                assert torch.equal(tp.all_reduce(strided), total)
                assert torch.equal(total, expected.to(dtype))
                assert tp.all_reduce_(x) is x
                assert torch.equal(x, total)
                x.fill_(me)
                assert tp.all_reduce_(x, op="max").eq(n - 1).all()
                if entries % n == 0:
                    x = (whole * (me + 1)).to(dtype)
                    assert torch.equal(tp.reduce_scatter(x, 0), expected.chunk(n)[me].to(dtype))
                    x.zero_()
                    assert torch.equal(tp.reduce_scatter(strided.view(n, -1), 0)[0], expected.chunk(n)[me].to(dtype))

    on(n, body)


def test_every_group_has_room_for_a_line_of_each_rank() -> None:
    """A slot is cut among the ranks, in whole lines of 64 bytes: of none there would be nothing to send."""
    for n, shm_bytes in itertools.product((2, 3, 64, 255, 257, 363, 400, 1000), (SMALLEST, 1 << 20, 1 << 30)):
        sizes = Sizes.plan(n, shm_bytes=shm_bytes, queue_bytes=1 << 20, queues=True)
        assert sizes.slot_bytes // n >= 64, sizes
        assert sizes.slot_bytes % 4096 == 0


# Tensors in shared memory.


def shared(group: GroupCoordinator, entries: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    x = group.empty((entries,), dtype)
    assert x.shape == (entries,)
    assert x.dtype == dtype
    return x.copy_(whole(group, group.rank, entries, dtype))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("entries", [1, 25, 5_000, 40_001])
def test_shared_tensors_serve_every_operation(n: int, entries: int) -> None:
    """In place, out of place, slices of them; on all ranks or on some; with one and with several pieces of a slot."""

    def body(group: GroupCoordinator) -> None:
        me = group.rank
        all_ = [whole(group, rank, entries) for rank in range(n)]
        total = sum(all_[1:], all_[0])
        whole_, wider = shared(group, entries), shared(group, 3 * entries + 5)
        for mixed in (False, True):
            for offset in (0, 1, entries + 3):

                def mine(source: torch.Tensor, offset: int = offset, mixed: bool = mixed) -> torch.Tensor:
                    """What this rank gives, where it is shared: in a tensor, or in a part of one that begins elsewhere on each rank."""
                    if mixed and me == 1:
                        return source.clone()
                    home = whole_ if offset == 0 else wider[offset + me : offset + me + entries]
                    return home.copy_(source)

                assert torch.equal(group.all_reduce(mine(all_[me])), total)
                x = mine(all_[me])
                assert group.all_reduce_(x) is x
                assert torch.equal(x, total)
                assert torch.equal(group.all_gather(mine(all_[me])), torch.cat(all_))
                gathered = group.gather(mine(all_[me]), n - 1)
                assert gathered is None if me != n - 1 else torch.equal(gathered, torch.cat(all_))
                for src in (0, n - 1):
                    x = mine(all_[me])
                    group.broadcast(x, src)
                    assert torch.equal(x, all_[src])
                    # The next call may change what others have read.
                    x.zero_()
                if me == 0:
                    group.send(mine(all_[me]), 1)
                elif me == 1:
                    assert torch.equal(group.recv((entries,), torch.int32, 0), all_[0])
                    landing = mine(all_[me])
                    landing.zero_()

    on(n, body, shm_bytes=SMALLEST)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_shared_tensors_that_are_cut_and_joined(mixed: bool, n: int) -> None:
    """Reduce-scatter, exchange and gather of shared tensors, from them and into them, in place too."""
    entries = 20_000

    def body(group: GroupCoordinator) -> None:
        me = group.rank
        all_ = [whole(group, rank, n * entries) for rank in range(n)]
        total = sum(all_[1:], all_[0])
        x, out = shared(group, n * entries), shared(group, n * entries)
        if mixed and me == n - 1:
            x, out = x.clone(), out.clone()
        mine = slice(me * entries, (me + 1) * entries)
        assert torch.equal(group.reduce_scatter(x), total[mine])
        assert torch.equal(x, all_[me])
        piece = out[:entries]
        assert group.reduce_scatter(x, out=piece) is piece
        assert torch.equal(piece, total[mine])
        sizes = [5, n * entries - 5] if n == 2 else [5, 0, n * entries - 5]
        assert torch.equal(group.reduce_scatterv(x, 0, sizes), total.split(sizes)[me])
        # Into this rank's own place of the very tensor that is read.
        y = x if not mixed else x.clone()
        assert torch.equal(group.reduce_scatter(y, out=y[mine]), total[mine])
        x.copy_(all_[me])
        group.barrier()
        assert torch.equal(group.all_to_all(x, out=out), torch.cat([z[mine] for z in all_]))
        # All pieces of a gather in one tensor, where each rank's own is in place already.
        out[mine] = all_[me][:entries]
        assert group.all_gather(out[mine], out=out) is out
        assert torch.equal(out, torch.cat([z[:entries] for z in all_]))
        # Rows: no piece is a run of memory.
        square = x.copy_(all_[me]).view(100, -1)
        assert torch.equal(group.reduce_scatter(square, 1), total.view(100, -1).chunk(n, 1)[me])
        assert torch.equal(group.all_gather(square, 1), torch.cat([z.view(100, -1) for z in all_], 1))
        assert torch.equal(
            group.all_to_all(square, scatter_dim=1, gather_dim=0), torch.cat([z.view(100, -1).chunk(n, 1)[me] for z in all_])
        )

    on(n, body, shm_bytes=SMALLEST)


@pytest.mark.parametrize("sharing", [(), (0,), (1,), (0, 1)])
def test_sizes_that_do_not_fit_together_are_told_wherever_the_tensors_lie(sharing: tuple[int, ...]) -> None:
    """Each of the two believes what crosses to be something else, and both read it before anything has crossed."""

    def body(group: GroupCoordinator) -> None:
        x = shared(group, 60_000)
        if group.rank not in sharing:
            x = x.clone()
        out = torch.zeros([40_000, 70_000][group.rank], dtype=x.dtype)
        with pytest.raises(cg.CollectiveMismatchError):
            group.all_to_all(x, input_sizes=[20_000, 40_000], output_sizes=[[20_000, 20_000], [30_000, 40_000]][group.rank], out=out)
        theirs = out[20_000:] if group.rank == 0 else out[:30_000]
        assert not theirs.any()

    on(2, body)


@pytest.mark.parametrize("mebibytes", [1, 5])
def test_large_results_are_right_by_both_ways_of_writing_them(mebibytes: int) -> None:
    """Each way is tried several times before one is chosen."""

    def body(group: GroupCoordinator) -> None:
        entries, me = mebibytes << 18, group.rank
        for call in range(12):
            mine, theirs = (torch.arange(entries, dtype=torch.float32) + 1000 * rank + call for rank in (me, 1 - me))
            assert torch.equal(group.all_gather(mine), torch.cat([mine, theirs] if me == 0 else [theirs, mine]))
            both = torch.cat([mine, mine + 0.5])
            crossed = [mine, theirs] if me == 0 else [theirs + 0.5, mine + 0.5]
            assert torch.equal(group.all_to_all(both), torch.cat(crossed))

    on(2, body)


def test_shared_tensors_of_every_kind() -> None:
    def body(group: GroupCoordinator) -> None:
        for dtype in (*FLOATS, *WHOLES, torch.bool, torch.complex64):
            x = group.empty((3, 500), dtype)
            assert x.shape == (3, 500)
            assert x.is_contiguous()
            x.view(BITS.get(x.element_size(), torch.int64) if x.dtype != torch.complex64 else torch.complex64).fill_(1)
            if dtype in FLOATS:
                x.fill_(1)
                assert (group.all_reduce_(x) == 2).all()
        assert group.empty((0, 4), torch.float32).shape == (0, 4)
        assert group.empty((), torch.float64).shape == ()
        assert group.empty(7, torch.float64).shape == (7,)

    on(2, body)


def test_a_shared_tensor_is_of_its_own_group() -> None:
    """A tensor that another group shares, or whose place was another's before, is one like any other here."""

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, tp=4), name="a") as a, world.context(cg.Layout(4, tp=2), name="b") as b:
            x = a.tp.empty((50_000,), torch.float32).fill_(1)
            assert (b.tp.all_reduce_(x) == 2).all()
            assert (a.tp.all_reduce_(x) == 8).all()
            y = b.tp.empty((50_000,), torch.float32).fill_(1)
            assert (a.tp.all_reduce_(y) == 4).all()

    spmd(run, 4)


def test_shared_tensors_outlive_their_group() -> None:
    def run(world: cg.World) -> list[torch.Tensor]:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            x = ctx.tp.empty((30_000,), torch.float32).fill_(world.rank + 1)
            y, z = ctx.tp.all_reduce(x), ctx.tp.all_gather(x)
        del ctx
        gc.collect()
        x += 1
        return [x, y, z]

    for rank, (x, y, z) in enumerate(spmd(run, 2)):
        gc.collect()
        assert (x == rank + 2).all()
        assert (y == 3).all()
        assert z[0] == 1
        assert z[-1] == 2


def test_ranks_that_ask_for_different_shared_tensors_are_told() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        with pytest.raises(cg.CollectiveMismatchError, match=r"\(3,\).*\n.*\(4,\)|empty"):
            ctx.tp.empty((3 + world.rank,), torch.float32)

    spmd(run, 2)


# Memory of results.


@pytest.mark.parametrize("entries", [1, 1000, 50_000, 1_000_000])
def test_results_of_repeated_calls_come_from_memory_that_was_used(entries: int) -> None:
    """Fresh pages cost more than the copy. What is still referenced is not touched."""

    def body(group: GroupCoordinator) -> None:
        n, me = group.world_size, group.rank
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
            group.all_reduce,
            group.all_gather,
            lambda x: group.reduce_scatter(x.repeat(n)),
            lambda x: group.all_to_all(x.repeat(n)),
        ]
        for call in calls:
            x = torch.full((entries,), 1.0 + me)
            kept = [(y, y.clone()) for y in (call(x + i) for i in range(3))]
            assert len({y.data_ptr() for y, _ in kept}) == 3
            assert all(torch.equal(y, copy) for y, copy in kept)
            # Views keep it, too; and whatever is dropped last is what the next result gets.
            view = kept[0][0][:1]
            del kept[0]
            again = call(x)
            assert again.data_ptr() != view.data_ptr()
            place = again.data_ptr()
            del again
            assert call(x).data_ptr() == place

    on(2, body)


def test_results_survive_the_close_of_their_context() -> None:
    def run(world: cg.World) -> list[torch.Tensor]:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            x = torch.arange(100_000.0) + world.rank
            results = [ctx.tp.all_reduce(x), ctx.tp.all_gather(x), ctx.tp.reduce_scatter(x), ctx.tp.all_reduce(x[:3])]
            results.append(ctx.tp.broadcast_object({"x": x}, src=0)["x"])
        del ctx
        gc.collect()
        return results

    for results in spmd(run, 2):
        gc.collect()
        # Other memory is taken, and must not be this.
        other = [torch.full((100_000,), -1.0) for _ in range(8)]
        plain = torch.arange(100_000.0)
        assert torch.equal(results[0], 2 * plain + 1)
        assert torch.equal(results[1], torch.cat([plain, plain + 1]))
        assert results[2][0] in (1, 100_001)
        assert results[3].tolist() == [1, 3, 5]
        assert torch.equal(results[4], plain)
        del other


def test_results_freed_on_another_thread() -> None:
    def body(group: GroupCoordinator) -> None:
        results = [group.all_reduce(torch.ones(40_000)) for _ in range(20)]
        thread = threading.Thread(target=results.clear)
        thread.start()
        more = [group.all_reduce(torch.ones(40_000)) for _ in range(20)]
        thread.join()
        assert all((y == 2).all() for y in more)

    on(2, body)


# Two ways into a call: plain tensors past the coordinator's checks, everything else through them.


def plain(x: torch.Tensor, _: int) -> torch.Tensor:
    return x


def strided(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0] if rank % 2 else x


def parameter(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.Parameter(x, requires_grad=False) if rank % 2 else x


def inference(x: torch.Tensor, rank: int) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone() if rank % 2 else x


@pytest.mark.parametrize("kind", [plain, strided, parameter, inference])
@pytest.mark.parametrize("deadline", [False, True])
@pytest.mark.parametrize("entries", [6, 9_000])
def test_ranks_may_come_by_different_ways(kind: Callable[[torch.Tensor, int], torch.Tensor], deadline: bool, entries: int) -> None:
    """Rank 1 hands over a tensor that is not plain, or a deadline, which rank 0 does not."""

    def body(group: GroupCoordinator) -> None:
        n, me = group.world_size, group.rank
        more: dict[str, Any] = {"timeout": 30} if deadline and me % 2 else {}
        all_ = [(torch.arange(float(2 * entries)) * 3 + rank).view(2, entries) for rank in range(n)]
        total = sum(all_[1:], all_[0])

        def mine() -> torch.Tensor:
            x = kind(all_[me].clone(), me)
            assert torch.equal(x, all_[me])
            return x

        with torch.inference_mode(kind is inference):
            for dim in (0, 1, -1):
                if entries * 2 % n == 0 and all_[0].shape[dim] % n == 0:
                    assert torch.equal(group.reduce_scatter(mine(), dim, **more), total.chunk(n, dim)[me])
                    swapped = torch.cat([x.chunk(n, dim)[me] for x in all_], dim)
                    assert torch.equal(group.all_to_all(mine(), scatter_dim=dim, gather_dim=dim, **more), swapped)
                assert torch.equal(group.all_gather(mine(), dim, **more), torch.cat(all_, dim))
            for op in OPS:
                assert agrees(group.all_reduce(mine(), op=op, **more), reference(all_, op))
                x = mine()
                assert group.all_reduce_(x, op=op, **more) is x
                assert agrees(x.detach(), reference(all_, op))
            for src in range(n):
                x = mine()
                assert group.broadcast(x, src, **more) is x
                assert torch.equal(x, all_[src])
            group.barrier(**more)
        # Both ways count.
        assert len(set(group.all_gather_object(group._state.sequence))) == 1

    for n in (2, 3):
        on(n, body, shm_bytes=SMALLEST)


def test_what_is_not_plain_is_still_refused() -> None:
    """The short way must let nothing through that the long way refuses; after a refusal on every rank the group goes on."""

    def body(group: GroupCoordinator) -> None:
        needs_grad = torch.ones(4, requires_grad=True)
        refused: list[Any] = [torch.ones(4).to_sparse(), torch.ones(4, device="meta"), [1.0, 2.0], None]
        for call in (group.all_reduce, group.all_reduce_, group.all_gather, group.reduce_scatter, group.all_to_all, group.broadcast):
            for x in refused:
                with pytest.raises(cg.UnsupportedTensorError):
                    call(x)
        for one_way in (group.all_reduce_, group.broadcast, group.gather, group.send):
            with pytest.raises(cg.UnsupportedTensorError):
                one_way(needs_grad)
        # It takes the way through autograd, and not the short one.
        assert group.all_reduce(needs_grad).grad_fn is not None
        assert group.all_gather(needs_grad * 2).grad_fn is not None
        for wrong in ("total", None, 3):
            with pytest.raises(ValueError, match="op"):
                group.all_reduce(torch.ones(2), op=wrong)
        with pytest.raises((ValueError, cg.UnsupportedTensorError)):
            group.all_reduce(torch.ones(2, dtype=torch.int32), op="avg")
        with pytest.raises(ValueError, match="dim"):
            group.all_gather(torch.ones(2), 1)
        with pytest.raises((ValueError, cg.UnsupportedTensorError)):
            group.reduce_scatter(torch.ones(3))
        with pytest.raises((ValueError, cg.UnsupportedTensorError)):
            group.all_gather(torch.ones(2), out=torch.ones(3))
        frozen = torch.ones(4).expand(3, 4)
        with pytest.raises((ValueError, cg.UnsupportedTensorError)):
            group.all_reduce_(frozen)
        assert group.all_reduce(torch.ones(1)).item() == 2

    on(2, body)


def test_lazily_negated_and_conjugated_tensors() -> None:
    """Their memory is not their values."""

    def body(group: GroupCoordinator) -> None:
        z = torch.complex(torch.arange(6.0), torch.arange(6.0) + 1 + group.rank)
        for entries in (1, 6):
            part = z[:entries].conj()
            imaginary = part.imag
            assert imaginary.is_neg()
            wanted = -(2 * (torch.arange(6.0) + 1) + 1)[:entries]
            assert torch.equal(group.all_reduce(imaginary), wanted)
            assert torch.equal(group.all_reduce_(imaginary.clone()), wanted)
            assert torch.equal(group.all_gather(imaginary).view(2, entries)[group.rank], imaginary)
            assert torch.equal(group.all_reduce(part).imag, wanted)

    on(2, body)


def test_out_that_overlaps_the_input() -> None:
    """Results of a call with a given `out` do not depend on where `out` lies, even where it lies in the input."""

    def body(group: GroupCoordinator) -> None:
        n, me, entries = 2, group.rank, 20_000
        all_ = [whole(group, rank, n * entries) for rank in range(n)]
        for home in (torch.empty(n * entries + 64, dtype=torch.int32), group.empty((n * entries + 64,), torch.int32)):
            for offset in (0, 16, entries, entries + 16):
                x = home[: n * entries].copy_(all_[me])
                group.barrier()
                found = group.reduce_scatter(x, out=home[offset : offset + entries])
                assert torch.equal(found, sum(all_[1:], all_[0]).chunk(n)[me]), offset
                x = home[: n * entries].copy_(all_[me])
                group.barrier()
                found = group.all_to_all(x, out=home[64:] if offset else x)
                assert torch.equal(found, torch.cat([z.chunk(n)[me] for z in all_])), offset

    on(2, body, shm_bytes=SMALLEST)


# Messages.


def test_kinds_of_messages_may_be_received_in_any_order() -> None:
    def body(group: GroupCoordinator) -> None:
        x = torch.arange(100_000.0)
        if group.rank == 0:
            for i in range(3):
                group.send(x + i, 1)
                group.send_object({"i": i, "x": x + i}, 1)
                group.send_tensor_dict({"i": i, "x": x + i}, 1)
            return
        for i in range(3):
            assert group.recv_tensor_dict(0)["i"] == i
        for i in range(3):
            assert torch.equal(group.recv_object(0)["x"], x + i)
        for i in range(3):
            assert torch.equal(group.recv(x.shape, x.dtype, 0), x + i)

    on(2, body, queue_bytes=SMALLEST)


# Threads.


def test_two_contexts_from_two_threads() -> None:
    def run(world: cg.World) -> list[bool]:
        contexts = [world.context(cg.Layout(3, tp=3), name=name) for name in ("a", "b")]
        fine = [False, False]

        def work(which: int) -> None:
            tp = contexts[which].tp
            for i in range(150):
                x = torch.full((i * 37 % 5000 + 1,), float(which + world.rank))
                assert torch.equal(tp.all_reduce(x), torch.full_like(x, 3.0 * which + 3))
                assert tp.broadcast_object((which, i), src=i % 3) == (which, i)
                assert tp.all_gather(x[:1]).tolist() == [which, which + 1, which + 2]
            fine[which] = True

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return fine

    assert spmd(run, 3) == [[True, True]] * 3


def test_a_second_thread_in_the_same_group_is_told() -> None:
    """One thread at a time uses a group. Another is refused, and the call that waits is not disturbed."""

    def run(world: cg.World) -> str:
        tp = world.context(cg.Layout(2, tp=2), name="a").tp
        results: list[torch.Tensor] = []
        told = ""
        if world.rank == 0:
            waiting = threading.Thread(target=lambda: results.append(tp.all_reduce(torch.ones(3))))
            waiting.start()
            until_it_waits(waiting)
            for call in (lambda: tp.all_reduce(torch.ones(3)), lambda: tp.barrier(timeout=5), lambda: tp.broadcast_object(1)):
                with pytest.raises(RuntimeError, match="another thread") as caught:
                    call()
                told = str(caught.value)
            world.group.barrier()
            waiting.join()
        else:
            world.group.barrier()
            results.append(tp.all_reduce(torch.ones(3)))
        assert results[0].tolist() == [2, 2, 2]
        return told

    assert "one thread at a time" in spmd(run, 2)[0]


INTRUDER = """
import os, threading, torch
from datetime import timedelta
import commgraph as cg
from commgraph.testing import spmd

def run(world):
    options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=3))  # of a call that comes when the other one has just ended
    tp = world.context(cg.Layout(2, tp=2), name="a", options=options).tp
    x, results, refused = torch.ones(16 << 20), [], 0
    if world.rank:
        return float(tp.all_reduce(x).sum())
    working = threading.Thread(target=lambda: results.append(tp.all_reduce(x)))
    working.start()
    while not tp._state.sequence:
        pass
    while not results:
        try:
            tp.barrier()
        except RuntimeError:
            refused += 1
        except cg.CollectiveError:
            break
    working.join()
    return float(results[0].sum()), refused

def main(world):
    os.write(1, f"{run(world)}\\n".encode())
    world.store.add("done", 1)
    world.store.set(f"done {world.rank}", "")
    world.store.wait(["done 0", "done 1"])
    os._exit(0)

spmd(main, 2)
"""


def test_a_second_thread_does_not_disturb_a_call_that_copies(processes: Processes) -> None:
    """The call that is refused comes while the other one runs without the interpreter; in a process of its own, which might not survive."""
    done = processes.run("-c", INTRUDER, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"({2.0 * (16 << 20)}, " in done.stdout, done.stdout
    assert f"{2.0 * (16 << 20)}\n" in done.stdout, done.stdout


def test_close_on_another_thread_ends_a_wait() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        errors: list[BaseException] = []

        def wait(call: Callable[[], Any]) -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        for call in (partial(ctx.tp.recv_object, 1), ctx.tp.barrier):
            if world.rank == 0:
                thread = threading.Thread(target=wait, args=(call,))
                thread.start()
                threading.Event().wait(0.1)
                for name in ctx.layout.names:
                    ctx[name].close()
                thread.join(5)
                assert not thread.is_alive()
        if world.rank == 0:
            assert all(isinstance(error, cg.ContextClosedError) for error in errors), errors
            assert len(errors) == 2
        world.group.barrier()

    spmd(run, 2)


# Several hosts.


@pytest.mark.parametrize(("n", "nodes"), [(4, 2), (5, 2), (5, 3), (6, 3)])
def test_groups_over_several_hosts_reduce_inside_each(n: int, nodes: int) -> None:
    def run(world: cg.World) -> list[Any]:
        with world.context(cg.Layout(n, tp=n), name="a", options=cg.CommunicatorOptions(shm_bytes=SMALLEST)) as ctx:
            tp = ctx.tp
            assert tp.communicators["all_reduce"] == ("hierarchical", "tcp")
            # Where hosts have different numbers of ranks, there are no counterparts.
            assert tp.communicators["all_gather"] == (("tcp",) if n % nodes else ("hierarchical", "tcp"))
            results: list[Any] = []
            for dtype, op in itertools.product((torch.float32, torch.bfloat16, torch.int16, torch.uint32, torch.bool), OPS):
                if op == "avg" and not dtype.is_floating_point:
                    continue
                x = given(dtype, world.rank, n, 9000)
                results.append((dtype, op, tp.all_reduce(x, op=op)))
                wide = torch.stack([x, x], -1)[..., 0]
                assert same(tp.all_reduce_(wide, op=op), results[-1][2])
            assert tp.all_reduce(torch.ones(0)).shape == (0,)
            assert tp.all_reduce(torch.tensor(2.0)).item() == 2 * n
            assert tp.broadcast_object(world.rank, src=1) == 1
            assert "hierarchical" in ctx.explain()
            return results

    ranks = spmd(run, n, nodes=nodes)
    for results in zip(*ranks, strict=True):
        dtype, op, first = results[0]
        assert all(same(first, x) for _, _, x in results), (dtype, op)
        wanted = reference([given(dtype, rank, n, 9000) for rank in range(n)], op)
        if dtype.is_floating_point:
            # In another order than the ranks': not the same bits as on one host.
            usual = slice(len(first) - 9000, None)
            torch.testing.assert_close(first[usual], wanted[usual], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
        else:
            assert same(first, wanted), (dtype, op)


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_a_mismatch_over_several_hosts_is_told_to_all(odd: int) -> None:
    def run(world: cg.World) -> str:
        tp = world.context(cg.Layout(4, tp=4), name="a").tp
        tp.all_reduce(torch.ones(1))
        with pytest.raises(cg.CollectiveError) as caught:
            tp.all_reduce(torch.ones(3 if world.rank == odd else 4), timeout=3)
        assert isinstance(caught.value, (cg.CollectiveMismatchError, cg.CollectiveTimeoutError)), caught.value
        return type(caught.value).__name__

    kinds = spmd(run, 4, nodes=2, timeout=30)
    assert kinds[odd] == kinds[odd ^ 1] == "CollectiveMismatchError", "those of its own host find out"


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_lost_peer_over_several_hosts_is_named_by_its_global_rank(lost: int) -> None:
    """Ranks 2 and 3 of the group of 2 to 5 are 4 and 5 of the world; each host knows its own by yet other numbers."""

    def run(world: cg.World) -> int | None:
        layout = cg.Layout.from_groups(6, {"mine": [[2, 3, 4, 5], [0], [1]]})
        ctx = world.context(layout, name="a")
        group = ctx["mine"]
        if group.world_size == 1:
            return None
        group.all_reduce(torch.ones(1))
        if group.rank_in_group == lost:
            group.close()
            ctx._drop()
            return None
        with pytest.raises(cg.PeerLostError) as caught:
            group.all_reduce(torch.ones(1), timeout=10)
        return caught.value.rank

    # Hosts of two ranks each: 2 and 3 on one, 4 and 5 on another.
    named = spmd(run, 6, nodes=3, timeout=30)
    assert [rank for rank in named[2:] if rank is not None] == [lost + 2] * 3, named


# What is told.


def test_explain_tells_strategies_refusals_and_bytes() -> None:
    """explain() says how many bytes."""

    def run(world: cg.World) -> list[str]:
        texts = []
        for shm, queue in ((True, True), (True, False), (False, True)):
            options = cg.CommunicatorOptions(shm=shm, message_queue=queue, shm_bytes=SMALLEST)
            with world.context(cg.Layout(4, tp=2), name="a", options={"tp": options}, groups=["tp"]) as ctx:
                before = ctx.explain()
                ctx.tp.empty((1000,), torch.float32)
                texts += [before, ctx.explain()]
        return texts

    both, grown, no_queue, _, neither, same = spmd(run, 4)[0]
    tp = re.search(r"  tp: .*?(?=\n  \w+:|\n  \d)", both, re.DOTALL)
    assert tp is not None
    assert (
        "all_reduce, reduce, all_gather, reduce_scatter, all_to_all, gather, scatter, broadcast, barrier, send, recv: shm, then tcp"
        in tp[0]
    )
    assert re.search(
        r"shm: shared memory of one host, \d+ bytes \(slots of 16384, rings of \d+ and \d+\);.* (avx512|avx2|sse2|neon|plain C)\n", tp[0]
    )
    total, more = (int(found[1]) for text in (both, grown) if (found := re.search(r"(\d+) bytes of shared memory", text)))
    assert more - total == 2 * 4096
    assert "8192 bytes of shared tensors" in grown
    assert "send, recv: gloo" in no_queue
    assert "shm: not used, turned off by options.shm=False" in neither
    assert same == neither, "nothing is shared, so empty() adds nothing"

    def far(world: cg.World) -> str:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            return ctx.explain()

    assert "shm: not used, no two of the 2 ranks share a host" in spmd(far, 2, nodes=2)[0]


def mapped_bytes() -> int:
    """Shared memory of ours that this process has mapped."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "memfd:commgraph" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_every_rank_holds_what_explain_says() -> None:
    before = mapped_bytes()

    def run(world: cg.World) -> tuple[int, int]:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            said = int(re.findall(r"(\d+) bytes of shared memory", ctx.explain())[0])
            ctx.world.barrier()
            mapped = mapped_bytes()
            ctx.world.barrier()
            return said, mapped

    (said, mapped), _ = spmd(run, 2)
    # The two ranks are threads of one process, and the world has a group of its own.
    assert mapped - before == 4 * said
    assert mapped_bytes() == before


def test_a_context_that_was_closed_holds_no_shared_memory() -> None:
    """A model may outlive its context, and keeps it; what the context keeps then is facts."""
    before = mapped_bytes()

    def run(world: cg.World) -> cg.ParallelContext:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        ctx.tp.all_reduce(torch.ones(1))
        return ctx

    contexts = spmd(run, 2)
    assert mapped_bytes() == before
    assert contexts[0].tp.world_size == 2


# Without the native module.

WITHOUT = """
import importlib.abc, sys, warnings

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "commgraph.shm._native":
            raise ImportError("refused by a test")

if WHERE:
    sys.meta_path.insert(0, Refuse())
warnings.simplefilter("default")
"""
PROGRAM = """
import sys, warnings
import torch
import commgraph as cg
from commgraph.testing import spmd

told = []
warnings.showwarning = lambda message, category, *_: told.append((category.__name__, str(message)))

def run(world):
    with world.context(cg.Layout(3, tp=3), name="a") as ctx, world.context(cg.Layout(3), name="alone") as alone:
        tp, me = ctx.tp, world.rank
        assert set(tp.communicators["all_reduce"]) == {"gloo"}
        assert tp.all_reduce(torch.ones(3)).tolist() == [3, 3, 3]
        assert tp.all_reduce_(torch.ones(3, dtype=torch.bfloat16)).tolist() == [3, 3, 3]
        assert tp.all_gather(torch.tensor([me])).tolist() == [0, 1, 2]
        assert tp.reduce_scatter(torch.ones(3)).tolist() == [3]
        assert tp.all_to_all(torch.tensor([10 * me, 10 * me + 1, 10 * me + 2])).tolist() == [me, 10 + me, 20 + me]
        assert tp.broadcast(torch.tensor([me]), 2).tolist() == [2]
        assert tp.gather(torch.tensor([me]), 1) is None or me == 1
        assert tp.broadcast_object({"from": me}, 1) == {"from": 1}
        assert tp.all_gather_object(me) == [0, 1, 2]
        assert tp.broadcast_tensor_dict({"x": torch.ones(2)} if me == 0 else None)["x"].tolist() == [1, 1]
        if me == 0:
            tp.send(torch.ones(2), 1); tp.send_object("o", 1); tp.send_tensor_dict({"x": torch.ones(1)}, 1)
        elif me == 1:
            tp.recv((2,), torch.float32, 0); assert tp.recv_object(0) == "o"; tp.recv_tensor_dict(0)
        x = tp.empty((5,), torch.float32).fill_(1)
        assert tp.all_reduce_(x).tolist() == [3] * 5
        ctx.warmup()
        tp.barrier()
        assert alone.tp.all_reduce(torch.ones(1)).tolist() == [1]
        return ctx.explain()

texts = spmd(run, 3, nodes=NODES)
mine = [text for kind, text in told if "native module" in text]
assert len(mine) == 1 and told[0][0] == "RuntimeWarning", told
assert REASON in mine[0] and "gloo" in mine[0], mine
assert all("no native module" in text and REASON in text for text in texts), texts[0]
print("done")
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_without_the_native_module_everything_works_on_gloo(tmp_path: Path, nodes: int) -> None:
    """One warning says why, and explain() says it again."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.replace("WHERE", "True"))
    program = PROGRAM.replace("NODES", str(nodes)).replace("REASON", repr("refused by a test"))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_ranks_of_which_one_lacks_the_native_module_agree(tmp_path: Path) -> None:
    """Routing is the same on every rank: where one cannot, none does, and all say why."""
    program = f"""
import sys
rank = int(sys.argv[1])
{WITHOUT.replace("WHERE", "rank == 1")}
import torch, commgraph as cg
with cg.World.connect("file://{tmp_path}/store", rank=rank, world_size=2) as world, world.context(cg.Layout(2, tp=2), name="a") as ctx:
    assert ctx.tp.communicators["all_reduce"] == ("gloo",)
    assert ctx.tp.all_reduce(torch.ones(1)).item() == 2
    assert "shm: not used, rank 1 in the group: no native module (ImportError: refused by a test)" in ctx.explain(), ctx.explain()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert "RuntimeWarning" not in errors[0]
    assert errors[1].count("RuntimeWarning: commgraph's native module is missing") == 1


@pytest.mark.long  # with build requirements from the package index; the suite names such a wheel, and runs without the module
def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] in ("commgraph", "pyproject.toml", "setup.py", "README.md", "LICENSE") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env={**os.environ, "CC": "/bin/false"})
    if done.returncode and re.search(r"setuptools.*(No matching|connection|Retrying)|Could not find a version", done.stderr, re.DOTALL):
        pytest.skip(f"the build requirements cannot be fetched here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    assert not list(target.rglob("_native*.so"))
    assert list(target.rglob("native_module.py"))
    program = PROGRAM.replace("NODES", "1").replace("REASON", repr("No module named 'commgraph.shm._native'"))
    program += f"\nassert cg.__file__.startswith({str(target)!r}), cg.__file__\n"
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr


def test_messages_by_the_short_way_pair_with_those_by_the_long_one() -> None:
    """Plain tensors take it, all others do not; both count alike, whichever side takes which, and nothing overtakes anything."""

    def run(world: cg.World) -> list[int]:
        with world.context(cg.Layout(2, pp=2), name="a") as context:
            pp = context.pp
            short, taken = pp._state.native_messages, 0
            assert short is not None
            strided = torch.arange(12.0).view(3, 4).T
            kinds = [torch.arange(12.0).view(4, 3), strided, torch.empty(0, 3), torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor(5)]
            if pp.is_first_rank:
                for i, x in enumerate(kinds * 3):
                    if i % 2:
                        pp.send(x, timeout=20)  # the long way
                    else:
                        taken += short.send(pp, x, 1, 0, None)
                        pp.send(x)
                    if i % 4 == 0:
                        pp.send_object(i, 1)
                return [taken]
            for i, x in enumerate(kinds * 3):
                for again in range(2 if i % 2 == 0 and x.is_contiguous() and x.numel() else 1):
                    out = torch.zeros(x.shape, dtype=x.dtype)
                    version = out._version
                    if (i + again) % 3 == 0:
                        got = pp.recv(x.shape, x.dtype, out=out)
                        assert got is out
                        assert not x.numel() or out._version > version
                    elif (i + again) % 3 == 1:
                        got = pp.recv(tuple(x.shape), x.dtype)
                    else:
                        got = pp.recv(list(x.shape), x.dtype, timeout=20)
                    assert torch.equal(got, x)
                    assert got.shape == x.shape
                if i % 4 == 0:
                    assert pp.recv_object(0) == i
            with torch.inference_mode():
                assert pp._state.native_messages is short
            return []

    assert spmd(run, 2)[0] == [5]


def test_messages_of_other_sizes_are_found_out_by_the_short_way_too() -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, pp=2), name="a") as context:
            if context.pp.is_first_rank:
                context.pp.send(torch.ones(3))
                with pytest.raises(cg.CollectiveError):
                    context.pp.recv(1, torch.float32)
            else:
                with pytest.raises(cg.CollectiveMismatchError, match=r"recv.*called different things"):
                    context.pp.recv(4, torch.float32)

    spmd(run, 2)
