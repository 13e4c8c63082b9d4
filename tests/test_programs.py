"""Random programs of operations over random layouts, on thread worlds, held against an oracle that has all inputs in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.testing import spmd
from commgraph.testing._program import Program, Step
from commgraph.testing.strategies import programs

EIGHT_BITS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
# Relative to the largest number that takes part: sums of a few numbers, rounded once (small floats) or at each step.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.complex64: 1e-6,
    torch.complex128: 1e-14,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).as_strided((x.numel(),), (1,)).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape, dtype and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(type(a) is type(b) and a == b)


def wide_integers(x: torch.Tensor) -> list[int]:
    flat = x.contiguous().view(-1)
    if x.dtype == torch.uint64:
        return [value % 2**64 for value in flat.view(torch.int64).tolist()]
    return flat.to(torch.int64).tolist()


def reduced_integers(inputs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """With Python's integers, wrapped at the end as the dtype wraps."""
    dtype = inputs[0].dtype
    columns = zip(*map(wide_integers, inputs), strict=True)
    if dtype == torch.bool:
        values = [any(c) if op in ("sum", "max") else all(c) for c in columns]
        return torch.tensor(values, dtype=torch.bool).view(inputs[0].shape)
    if not all(x.numel() for x in inputs):
        return inputs[0].clone(memory_format=torch.contiguous_format)
    totals = []
    for column in columns:
        total = column[0]
        for value in column[1:]:
            total = {"sum": total + value, "product": total * value, "max": max(total, value), "min": min(total, value)}[op]
        totals.append(total)
    bits = 8 * dtype.itemsize
    signed = [(total + 2**63) % 2**64 - 2**63 if bits == 64 else total % 2**bits for total in totals]
    wrapped = torch.tensor(signed, dtype=torch.int64).view(torch.uint8).view(-1, 8)[:, : dtype.itemsize].contiguous()
    return wrapped.view(dtype).view(inputs[0].shape)


def check_reduction(inputs: Sequence[torch.Tensor], op: str, got: torch.Tensor) -> None:
    dtype = inputs[0].dtype
    assert got.dtype == dtype
    assert got.shape == inputs[0].shape
    if not (dtype.is_floating_point or dtype.is_complex):
        assert same(got, reduced_integers(inputs, op))
        return
    small = str(dtype).removeprefix("torch.") in EIGHT_BITS
    wide = torch.float32 if small else torch.complex128 if dtype.is_complex else torch.float64
    stacked = torch.stack([x.to(wide) for x in inputs])
    expected = {
        "sum": lambda: stacked.sum(0),
        "avg": lambda: stacked.mean(0),
        "product": lambda: stacked.prod(0),
        "max": lambda: stacked.amax(0),
        "min": lambda: stacked.amin(0),
    }[op]()
    if small:
        # Sums of so few bits are exact in float32, so there is one right rounding.
        torch.testing.assert_close(got.float(), expected.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    elif op in ("max", "min"):
        assert torch.equal(got.to(wide), expected)
    else:
        size = float(stacked.abs().sum(0).max()) if op != "product" and stacked.numel() else 0.0
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.to(wide), expected, rtol=10 * tolerance, atol=tolerance * max(size, 1e-2))


def cut(sizes: Sequence[int], x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return x.split(list(sizes), dim)


def check_step(step: Step, inputs: Sequence[Any], got: Sequence[Any]) -> None:
    """One operation of one group: what every rank gave, and what every rank got, in group order."""
    n, name, root = len(inputs), step.operation, step.root % len(inputs)
    spread = [step.extent(i) for i in range(n)]
    if name in ("all_reduce", "all_reduce_"):
        for result in got:
            assert same(result, got[0]), "the ranks got different bits"
        check_reduction(inputs, step.op, got[0])
    elif name in ("reduce_scatter", "reduce_scatterv"):
        sizes = spread if name == "reduce_scatterv" else [inputs[0].shape[step.dim] // n] * n
        parts = [cut(sizes, x, step.dim) for x in inputs]
        for i, result in enumerate(got):
            check_reduction([part[i] for part in parts], step.op, result)
    elif name in ("all_gather", "all_gatherv"):
        assert all(same(result, torch.cat(list(inputs), step.dim)) for result in got)
    elif name == "all_gatherv_list":
        whole = torch.cat(list(inputs), step.dim)
        assert all(same(result, [whole, whole]) for result in got)
    elif name in ("all_to_all", "all_to_allv"):
        for j, result in enumerate(got):
            pieces = []
            for i, x in enumerate(inputs):
                if name == "all_to_all":
                    sizes = [x.shape[step.dim] // n] * n
                else:
                    sizes = [step.crossing(i, k) for k in range(n)] if step.same_dims else spread
                pieces.append(cut(sizes, x, step.dim)[j])
            assert same(result, torch.cat(pieces, step.other_dim))
    elif name == "gather":
        for i, result in enumerate(got):
            assert same(result, torch.cat(list(inputs), step.dim) if i == root or n == 1 else None)
    elif name in ("broadcast", "broadcast_object", "broadcast_tensor_dict"):
        assert all(same(result, inputs[root]) for result in got)
    elif name == "all_gather_object":
        assert all(same(result, list(inputs)) for result in got)
    elif name in ("ring", "object_ring", "tensor_dict_ring"):
        for i, result in enumerate(got):
            assert same(result, None if n == 1 else inputs[i - 1])
    elif name == "pair":
        to = (root + 1 + step.hop % max(n - 1, 1)) % n
        for i, result in enumerate(got):
            assert same(result, inputs[root] if n > 1 and i == to else None)
    else:
        assert name in ("barrier", "broadcast_object_list"), name


def check_program(program: Program, **how: Any) -> None:
    n = program.world_size
    done = spmd(program, n, **how)
    for index, step in enumerate(program.steps):
        seeds = [program.seed(index, rank) for rank in range(n)]
        for ranks in program.layout.groups(step.group):
            size = len(ranks)
            given_now = [done[rank][index][0] for rank in ranks]
            got = [done[rank][index][1] for rank in ranks]
            inputs = given_now
            if isinstance(given_now[0], torch.Tensor):
                inputs = [step.given(size, i, seeds[rank]) for i, rank in enumerate(ranks)]
                if step.operation not in ("all_reduce_", "broadcast"):
                    assert all(map(same, given_now, inputs)), f"{step.operation} changed its input"
            if step.operation == "broadcast_object_list":
                root = ranks[step.root % size]
                assert all(same(result, [done[root][index][0], root]) for result in got)
            check_step(step, inputs, got)
            if size > 1:
                for x, result in zip(given_now, got, strict=True):
                    if isinstance(result, torch.Tensor) and not step.out and result is not x:
                        assert result.is_contiguous()
                        assert not result.numel() or result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            elif not step.out and step.operation in (
                "all_reduce",
                "all_gather",
                "all_gatherv",
                "reduce_scatter",
                "all_to_all",
                "gather",
                "broadcast",
            ):
                assert got[0] is given_now[0], "one rank gets its very input back"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_programs_give_what_the_oracle_gives(program: Program) -> None:
    check_program(program)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(max_world_size=4), st.integers(2, 3))
def test_programs_over_several_hosts_too(program: Program, nodes: int) -> None:
    check_program(program, nodes=min(nodes, program.world_size))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(world_size=7, max_steps=4))
def test_programs_of_seven_ranks(program: Program) -> None:
    check_program(program)


@pytest.mark.parametrize("dim", range(-4, 4))
def test_reduce_scatter_along_every_dim_of_a_4d_tensor(dim: int) -> None:
    """vLLM's moves axes the wrong way for dim >= 2 (#30546)."""
    n = 3
    inputs = [torch.randn(3, 6, 9, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(n)]

    def program(world: cg.World) -> torch.Tensor:
        return world.context(cg.Layout(n, tp=n), name="main").tp.reduce_scatter(inputs[world.rank], dim)

    total = inputs[0] + inputs[1] + inputs[2]
    for got, expected in zip(spmd(program, n), total.chunk(n, dim), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("numel", [1, 1000, 50_001])
def test_the_bits_of_a_reduction_are_those_of_the_order_of_ranks(n: int, numel: int) -> None:
    """Small and large tensors take different ways; each adds up in the order of the ranks, whoever is slow."""
    inputs = [torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 10**rank for rank in range(n)]

    def program(world: cg.World) -> torch.Tensor:
        tp = world.context(cg.Layout(n, tp=n), name="main").tp
        if world.rank == n // 2:
            threading_pause()
        return tp.all_reduce(inputs[world.rank])

    expected = inputs[0].clone()
    for x in inputs[1:]:
        expected += x
    assert all(same(got, expected) for got in spmd(program, n))


def threading_pause() -> None:
    import time

    time.sleep(0.05)


def test_back_to_back_gathers_to_a_slow_root_keep_apart() -> None:
    """In vLLM's shared memory the next gather overwrites what a slow root has not read."""

    def program(world: cg.World) -> list[list[float]]:
        tp = world.context(cg.Layout(3, tp=3), name="main").tp
        got = []
        for round_ in range(20):
            if tp.is_first_rank and round_ % 5 == 0:
                threading_pause()
            out = tp.gather(torch.full((4,), float(10 * round_ + world.rank)), 0)
            if out is not None:
                got.append(out[::4].tolist())
        return got

    assert spmd(program, 3)[0] == [[10.0 * r, 10.0 * r + 1, 10.0 * r + 2] for r in range(20)]


def test_two_senders_to_one_receiver_do_not_collide() -> None:
    def program(world: cg.World) -> list[Any]:
        tp = world.context(cg.Layout(3, tp=3), name="main").tp
        if tp.rank_in_group:
            for i in range(5):
                tp.send_object((tp.rank_in_group, i), 0)
                tp.send(torch.tensor([tp.rank_in_group, i]), 0)
            return []
        got: list[Any] = []
        for i in range(5):
            for src in (2, 1):
                objects = tp.recv_object(src) == (src, i)
                got.append(objects and tp.recv(2, torch.int64, src).tolist() == [src, i])
        return got

    assert all(spmd(program, 3)[0])


def test_src_and_dst_are_ranks_in_the_group() -> None:
    def program(world: cg.World) -> tuple[Any, ...]:
        pp = world.context(cg.Layout(4, pp=2, tp=2), name="main").pp
        x = torch.tensor([world.rank])
        return pp.ranks, pp.broadcast(x.clone(), 1).item(), pp.broadcast_object(world.rank, 1), pp.gather(x, 1)

    results = spmd(program, 4)
    assert [r[:3] for r in results] == [((0, 2), 2, 2), ((1, 3), 3, 3), ((0, 2), 2, 2), ((1, 3), 3, 3)]
    assert [None if r[3] is None else r[3].tolist() for r in results] == [None, None, [0, 2], [1, 3]]
