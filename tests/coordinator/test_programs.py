"""Random programs on thread worlds, against a one-process oracle; and by name, what others got wrong."""

from __future__ import annotations

import io
import math
import operator
import pickle
import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.accelerators.kernel_table import KERNELS, KernelTable, Row
from commgraph.accelerators.kernel_table import Step as KernelStep
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from commgraph.testing._program import OPERATIONS, Program, Step, TensorSpec, fill
from commgraph.testing.strategies import programs, tensors
from tests.helpers import bits, on, on_ctx, same
from tests.processes import PROGRAMS, Processes
from tests.stand_ins import FakeDevice, Memory

REDUCTIONS = ("all_reduce", "all_reduce_", "reduce", "reduce_scatter", "reduce_scatterv", "combine")
BITWISE: dict[str, Callable[[int, int], int]] = {"band": operator.and_, "bor": operator.or_, "bxor": operator.xor}


# Comparison


def wrap(value: int, dtype: torch.dtype) -> int:
    """What an integer of that dtype holds of a Python int."""
    span = 1 << 8 * dtype.itemsize
    value %= span
    return value - span if dtype.is_signed and value >= span // 2 else value


def assert_reduced(result: torch.Tensor, pieces: Sequence[torch.Tensor], op: str) -> None:
    """`result` is the reduction of `pieces`: exact for integers, else within the rounding of the result and of float32 sums."""
    dtype = pieces[0].dtype
    assert result.dtype == dtype
    assert result.shape == pieces[0].shape
    whole = not (dtype.is_floating_point or dtype.is_complex)
    columns = list(zip(*(piece.flatten().tolist() for piece in pieces), strict=True)) if whole else []
    if op in BITWISE:
        assert result.flatten().tolist() == [reduce(BITWISE[op], column) for column in columns]
    elif dtype == torch.bool:
        either: Any = any if op in ("sum", "max") else all
        assert result.flatten().tolist() == [either(column) for column in columns]
    elif whole:
        combine: Any = {"sum": sum, "product": math.prod, "max": max, "min": min}[op]
        assert result.flatten().tolist() == [wrap(combine(column), dtype) for column in columns]
    else:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        stack = torch.stack([piece.to(wide) for piece in pieces])
        expected = {
            "sum": lambda: stack.sum(0),
            "avg": lambda: stack.mean(0),
            "max": lambda: stack.amax(0),
            "min": lambda: stack.amin(0),
            "product": lambda: stack.prod(0),
        }[op]()
        if op in ("max", "min"):
            assert torch.equal(result.to(wide), expected)
            return
        size = stack.abs().prod(0) if op == "product" else stack.abs().sum(0)
        inner = 2.0**-52 if dtype in (torch.float64, torch.complex128) else 2.0**-23
        # A kind without a mantissa (e8m0) rounds to the next power of two.
        outer = torch.finfo(dtype).eps if dtype != torch.float8_e8m0fnu else 0.5
        error = (result.to(wide) - expected).abs()
        assert (error <= 4 * len(pieces) * inner * size + outer * expected.abs() + torch.finfo(dtype).tiny).all(), (error, size)


# The oracle: what every rank gave is known, so what each must get is known, with no communication.


def expected(step: Step, ranks: Sequence[int], me: int, seed: Callable[[int], int], gather_first: Callable[[int], int]) -> Any:
    """What rank `me` of the group must get, reductions apart."""
    n = len(ranks)
    root = step.root % n
    before, after = ranks[me - 1], (root + 1 + step.hop % max(n - 1, 1)) % n
    operation = step.operation
    if operation == "barrier":
        return None
    if "object" in operation:
        objects = [{"rank": rank, "value": fill(step.tree, seed(rank))} for rank in ranks]
        if operation == "broadcast_object":
            # Of one rank the object itself, which is None where the caller did not mean to be the source.
            return objects[root]
        if operation == "broadcast_object_list":
            return [objects[root], ranks[root]]
        if operation == "all_gather_object":
            return objects
        return objects[me - 1] if n > 1 else None
    if operation == "broadcast_tensor_dict":
        return fill(step.tree, seed(ranks[root]))
    if operation == "tensor_dict_ring":
        return fill(step.tree, seed(gather_first(before))) if n > 1 else None
    given = [step.given(n, i, seed(rank)) for i, rank in enumerate(ranks)]
    dim = step.dim
    if operation in ("all_gather", "all_gatherv"):
        return torch.cat(given, dim)
    if operation == "all_gatherv_list":
        return [torch.cat(given, dim)] * 2
    if operation == "dispatch":
        return [torch.cat(given)] * 2
    if operation in ("scatter", "scatterv"):
        cut = [step.extent(i) for i in range(n)] if operation == "scatterv" else [given[root].shape[dim] // n] * n
        return given[root].split(cut, dim)[me]
    if operation in ("gather", "gatherv"):
        return torch.cat(given, dim) if me == root else None
    if operation == "broadcast":
        return given[root]
    if operation == "ring":
        return given[me - 1] if n > 1 else None
    if operation == "pair":
        return given[root] if n > 1 and me == after else None
    if operation == "all_to_all":
        return torch.cat([x.chunk(n, dim)[me] if x.shape[dim] else x for x in given], step.other_dim)
    assert operation == "all_to_allv"
    pieces = []
    for i, x in enumerate(given):
        cut = [step.pair_size(i, j) if step.same_dims else step.extent(j) for j in range(n)]
        pieces.append(x.narrow(dim, sum(cut[:me]), cut[me]))
    return torch.cat(pieces, step.other_dim)


def reduced_slices(step: Step, ranks: Sequence[int], me: int, seed: Callable[[int], int]) -> list[torch.Tensor]:
    """What is reduced to the result of rank `me`."""
    n = len(ranks)
    given = [step.given(n, i, seed(rank)) for i, rank in enumerate(ranks)]
    if step.operation in ("all_reduce", "all_reduce_", "reduce"):
        return given
    if step.operation == "combine":
        return [given[me]] * n  # every rank gives back what it was handed
    extent = given[0].shape[step.dim]
    cut = [extent // n] * n if step.operation == "reduce_scatter" else [step.extent(i) for i in range(n)]
    return [x.narrow(step.dim, sum(cut[:me]), cut[me]) for x in given]


def assert_apart(given: Any, result: Any, step: Step) -> None:
    """A result is a tensor of its own, contiguous where the library made it."""
    results = result if isinstance(result, list) else [result]
    for x in results:
        if isinstance(x, torch.Tensor) and isinstance(given, torch.Tensor) and x.numel():
            assert x.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
            assert step.out or x.is_contiguous()


def check(program: Program, results: Sequence[Sequence[tuple[Any, Any]]]) -> None:
    layout = program.layout
    for index, step in enumerate(program.steps):
        for rank in range(layout.world_size):
            given, result = results[rank][index]
            ranks = layout.ranks(step.group, rank)
            n, me = len(ranks), ranks.index(rank)

            def seed(of: int, index: int = index) -> int:
                return program.seed(index, of)

            def first(of: int, step: Step = step) -> int:
                return of if step.gather is None else layout.ranks(step.gather, of)[0]

            place = f"step {index} ({step.operation} on {step.group!r} {ranks}), rank {rank}"
            tensor = isinstance(given, torch.Tensor)
            in_place = step.operation in ("all_reduce_", "broadcast")
            if tensor and in_place:
                assert result is given, place
            elif tensor:
                assert same(given, step.given(n, me, seed(rank))), f"{place}: the input was changed"
                if n > 1:
                    assert_apart(given, result, step)
            if step.operation not in REDUCTIONS:
                assert same(result, expected(step, ranks, me, seed, first)), place
                continue
            if n == 1:
                assert same(result, step.given(n, me, seed(rank))), place
                assert step.out or result is given, f"{place}: one rank gets its very input back"
                continue
            if step.operation == "reduce" and me != step.root % n:
                assert result is None, place
                continue
            assert_reduced(result, reduced_slices(step, ranks, me, seed), step.op)
            if "all_reduce" in step.operation:
                assert same(result, results[ranks[0]][index][1]), f"{place}: other bits than on rank {ranks[0]}"


# Random programs

# A failure is shrunk for up to five minutes, hence the long timeouts below: cut off, it would not be told at all.
QUICK = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


@pytest.mark.timeout(600)
@settings(QUICK, max_examples=60)
@given(programs(max_steps=12))
def test_programs_give_what_one_process_computes(program: Program) -> None:
    check(program, spmd(program, program.world_size))


@pytest.mark.timeout(600)
@settings(QUICK, max_examples=15)
@given(st.sampled_from([3, 5, 6, 7]).flatmap(lambda n: programs(world_size=n, max_steps=12)))
def test_programs_on_odd_numbers_of_ranks(program: Program) -> None:
    check(program, spmd(program, program.world_size))


@pytest.mark.timeout(600)
@settings(QUICK, max_examples=10)
@given(programs(max_world_size=4, max_steps=8), st.integers(2, 3))
def test_programs_over_several_hosts(program: Program, nodes: int) -> None:
    check(program, spmd(program, program.world_size, nodes=min(nodes, program.world_size)))


@pytest.mark.timeout(600)
@settings(QUICK, max_examples=10)
@given(programs(max_world_size=4, max_steps=6))
def test_programs_give_the_same_bits_again(program: Program) -> None:
    first, again = (spmd(program, program.world_size) for _ in range(2))
    assert all(same([x for _, x in one], [x for _, x in other]) for one, other in zip(first, again, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [{"check": True}, {"shm": False}, {"message_queue": False}], ids=str)
@settings(QUICK, max_examples=10)
@given(program=programs(max_world_size=4, max_steps=6))
def test_programs_under_other_options(program: Program, options: dict[str, bool]) -> None:
    def run(world: cg.World) -> list[Any]:
        with world.context(program.layout, name="optional", options=cg.CommunicatorOptions(**options)) as context:
            return program.perform(context)

    check(program, spmd(run, program.world_size))


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:fakeccl cannot serve")  # so that what no kernel serves goes where the oracle expects it
@pytest.mark.parametrize("options", [{}, {"check": True}, {"custom_all_reduce_bytes": 16 << 10}], ids=str)
def test_programs_on_a_stand_in_for_a_device(options: dict[str, Any]) -> None:
    """Kernels over the peers' memory where they serve, the host's strategies elsewhere, and works on side streams."""
    calls: list[str] = []

    served = ("all_reduce", "all_reduce_", "all_gather", "reduce_scatter")
    others = ("reduce", "gather", "gatherv", "scatter", "scatterv", "broadcast", "all_to_all", "all_to_allv", "reduce_scatterv", "barrier")

    @settings(QUICK, max_examples=40)
    @given(
        n=st.integers(2, 4),
        program=programs(max_steps=8, operations=(*served, *others, "ring", "tensor_dict_ring", "broadcast_object")),
        dtypes=st.lists(st.sampled_from(["float32", "bfloat16", ""]), min_size=8),
    )
    def play(n: int, program: Program, dtypes: list[str]) -> None:
        # Of groups, sizes and dtypes that kernels serve, often.
        steps = [
            attrs.evolve(
                step,
                group="tp",
                gather=None,
                tensor=attrs.evolve(
                    step.tensor,
                    dtype=step.tensor.dtype if step.op in BITWISE else dtype or step.tensor.dtype,
                    shape=wider(step.tensor.shape),
                    bits=False,
                ),
            )
            for step, dtype in zip(program.steps, dtypes, strict=False)
            if step.op != "avg" or dtype
        ]
        calls.extend(play_on_device(Program(cg.Layout(n, tp=n), tuple(steps)), options))

    play()
    # Whatever was drawn, each kernel has its turn.
    each = [Step("all_reduce", "tp", TensorSpec("float32", (size,))) for size in (96, 192, 960)]
    calls += play_on_device(Program(cg.Layout(2, tp=2), tuple(each)), options)
    assert {"one_shot", "two_shot", "multimem"} <= set(calls)


def wider(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] * 48) if shape else shape


def play_on_device(program: Program, options: dict[str, Any]) -> list[str]:
    """Which kernels ran."""
    memory = Memory()
    calls: list[str] = []
    steps = (KernelStep(400, "one_shot"), KernelStep(1200, "two_shot"), KernelStep(1 << 20, "multimem"))
    rows = [
        Row("9.0", n, operation, "any", tuple(step for step in steps if step.kernel in kernels))
        for n in (2, 3, 4)
        for operation, kernels in KERNELS.items()
    ]

    def run(world: cg.World) -> list[Any]:
        platform = FakeDevice(memory, problem="there is none", wide=True)
        given = cg.CommunicatorOptions(**{"custom_all_reduce": KernelTable(rows), **options})
        with world.context(program.layout, name="device", options=given, platform=platform) as context:
            results = program.perform(context)
            for kernels in platform.kernels:
                calls.extend(kernels.calls)
                kernels.close()  # looks for what was written past the end
            return results

    check(program, spmd(run, program.world_size))
    return calls


class Players:
    """Ranks that are processes (tests/programs/player.py)."""

    def __init__(self, n: int, folder: Path, processes: Processes) -> None:
        self.ranks = [processes.start(PROGRAMS / "player.py", str(rank), str(n), folder / "meet") for rank in range(n)]

    def play(self, program: Program) -> list[list[tuple[Any, Any]]]:
        for rank in self.ranks:
            pickle.dump(program, rank.stdin.buffer)
            rank.stdin.flush()
        # torch's own way keeps apart what is one tensor, or one memory, and what is not.
        results = [torch.load(io.BytesIO(pickle.load(rank.stdout.buffer)), weights_only=False) for rank in self.ranks]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def stop(self) -> list[int]:
        for rank in self.ranks:
            rank.stdin.close()
        return [rank.wait(30) for rank in self.ranks]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("n", [2, 3])
def test_programs_on_processes(n: int, tmp_path: Path, processes: Processes) -> None:
    """Above, ranks are threads, which share more than memory that was meant to be shared."""
    players = Players(n, tmp_path, processes)

    # Without shrinking: after a failure the processes are of no further use.
    @settings(QUICK, max_examples=25, phases=[Phase.generate])
    @given(programs(world_size=n, max_steps=12))
    def play(program: Program) -> None:
        check(program, players.play(program))

    play()
    assert players.stop() == [0] * n


SILENT = {
    "barrier",
    "broadcast_object",
    "broadcast_object_list",
    "all_gather_object",
    "object_ring",
    "broadcast_tensor_dict",
    "tensor_dict_ring",
}


def ops_of(operation: str, dtype: torch.dtype) -> list[str]:
    if operation not in ("all_reduce", "all_reduce_", "reduce", "reduce_scatter", "reduce_scatterv"):
        return ["sum"]
    if not (dtype.is_floating_point or dtype.is_complex):
        return ["sum", "product", "max", "min", *BITWISE]
    ordered = ["max", "min"] if not dtype.is_complex else []
    return ["sum", "product", *ordered, *(["avg"] if dtype.is_floating_point or dtype.is_complex else [])]


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
def test_every_operation_over_every_dtype(options: dict[str, bool]) -> None:
    """Random programs may leave some of these out."""
    steps = [
        Step(operation, "tp", TensorSpec(str(x.dtype).removeprefix("torch."), (2, 3), strides), op=op, sizes=(2, 0, 3))
        for x in ALL
        for strides in ("plain", "transposed")  # by the fast path, where there is one, and by the general path
        for operation in OPERATIONS
        if operation not in SILENT
        for op in ops_of(operation, x.dtype)
    ]
    program = Program(cg.Layout(3, tp=3), tuple(steps))
    check(program, on_ctx(3, program.perform, **options))


def test_large_reductions_have_the_bits_of_small_ones() -> None:
    """Beyond some size a tensor takes another way, in pieces; uneven ones here. What the small way gives was checked above."""

    def body(group: GroupCoordinator) -> None:
        for x in ALL:
            for op in ops_of("all_reduce", x.dtype):
                given = TensorSpec(str(x.dtype).removeprefix("torch."), (5, 8191)).make(group.rank)
                whole = group.all_reduce(given, op=op).flatten()
                if x.dtype.is_complex and op == "product":
                    continue  # torch's vectors and what is left over at their end round these differently
                for part in (slice(0, 9), slice(13_640, 13_670), slice(40_950, 40_955)):
                    assert same(whole[part], group.all_reduce(given.flatten()[part], op=op)), (x.dtype, op, part)

    on(3, body)


ALL = [
    torch.empty(0, dtype=dtype)
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    )
]


def test_the_strategies_draw_every_dtype_and_operation() -> None:
    seen: set[str] = set()
    dtypes: set[torch.dtype] = set()

    # The same examples each time: chance once left eight of 26 operations out.
    @settings(max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(max_steps=25), tensors())
    def look(program: Program, x: torch.Tensor) -> None:
        seen.update(step.operation for step in program.steps)
        dtypes.update([x.dtype, *(getattr(torch, step.tensor.dtype) for step in program.steps)])
        assert 1 <= program.world_size <= 6
        assert "Program(" in repr(program)

    look()
    # By chance a few may be missing.
    assert len(seen) > len(OPERATIONS) - 6
    assert len(dtypes) > len(ALL) - 6
    assert seen <= set(OPERATIONS)
    assert dtypes <= {x.dtype for x in ALL}


@settings(max_examples=100)
@given(tensors(max_dims=3, bits=True), tensors(dtypes=[torch.int16], min_dims=2, strides=["transposed"]))
def test_tensors_are_of_every_kind(x: torch.Tensor, y: torch.Tensor) -> None:
    assert x.dim() <= 3
    assert not x.requires_grad
    assert y.dtype == torch.int16
    assert y.dim() >= 2


# Mistakes that other libraries made


@pytest.mark.parametrize("n", [2, 3])
def test_reduce_scatter_is_right_along_every_dim_of_a_4d_tensor(n: int) -> None:
    shape = (6, 12, 6, 6)
    given = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).double() for i in range(n)]

    def body(group: GroupCoordinator) -> list[torch.Tensor]:
        return [group.reduce_scatter(given[group.rank], dim) for dim in range(-4, 4)]

    total = reduce(torch.add, given)
    for rank, pieces in enumerate(on(n, body)):
        for dim, piece in zip(range(-4, 4), pieces, strict=True):
            assert torch.equal(piece, total.chunk(n, dim)[rank]), f"dim {dim}"
            assert piece.is_contiguous()


@pytest.mark.parametrize("numel", [1, 100, 100_000])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_reduce_never_changes_its_input(n: int, numel: int) -> None:
    def body(group: GroupCoordinator) -> None:
        x = torch.full((numel,), float(group.rank + 1))
        kept, version = x.clone(), x._version
        y = group.all_reduce(x)
        assert torch.equal(x, kept)
        assert x._version == version
        if n > 1:
            assert torch.equal(y, torch.full((numel,), n * (n + 1) / 2))
            y.zero_()
            assert torch.equal(x, kept)

    on(n, body)


@pytest.mark.parametrize("n", [2, 4])
def test_objects_come_from_any_source(n: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for src in range(n):
            mine = f"of {group.rank}"
            assert group.broadcast_object(mine, src) == f"of {src}"
            assert group.broadcast_object_list([mine, None], src) == [f"of {src}", None]

    on(n, body)


def test_two_senders_to_one_receiver_do_not_collide() -> None:
    def body(group: GroupCoordinator) -> Any:
        me = group.rank_in_group
        if me:
            for i in range(20):
                group.send(torch.tensor([me * 100 + i]), 0)
                group.send_object((me, i), 0)
            return None
        got = []
        for i in range(20):
            # Now one first, now the other.
            for src in (1, 2) if i % 2 else (2, 1):
                received = (int(group.recv(1, torch.int64, src)), group.recv_object(src))
                got.append(received == (src * 100 + i, (src, i)))
        return all(got)

    assert on(3, body)[0] is True


def test_ranks_of_a_group_are_not_global_ranks() -> None:
    """The last tp group of a larger world: global ranks 4 and 5 are 0 and 1 there."""

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(6, tp=2, pp=3), name="a") as context:
            tp, pp = context.tp, context.pp
            assert tp.ranks == tuple(range(world.rank - world.rank % 2, world.rank - world.rank % 2 + 2))
            x = torch.tensor([world.rank])
            assert int(tp.broadcast(x.clone(), 1)) == tp.ranks[1] == tp.last_rank
            assert pp.broadcast_object(world.rank, 2) == pp.ranks[2] == world.rank % 2 + 4
            gathered = pp.gather(x, 1)
            assert (gathered is None) == (pp.rank_in_group != 1)
            if gathered is not None:
                assert tuple(gathered.tolist()) == pp.ranks
            if tp.is_first_rank:
                tp.send(x, 1)
                with pytest.raises(ValueError, match="not a global rank"):
                    tp.send(x, 4)
            else:
                assert int(tp.recv(1, torch.int64, 0)) == tp.first_rank == world.rank - 1
            assert (tp.next_rank, tp.prev_rank) == (tp.ranks[1 - tp.rank_in_group],) * 2

    spmd(run, 6)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_empty_tensors_are_gathered(n: int) -> None:
    def body(group: GroupCoordinator) -> None:
        assert group.all_gather(torch.empty(0), 0).shape == (0,)
        assert group.all_gather(torch.empty(3, 0), 0).shape == (3 * n, 0)
        assert group.all_gatherv(torch.empty(0, 4), 0, [0] * n).shape == (0, 4)  # type: ignore[union-attr]
        assert group.all_reduce(torch.empty(2, 0)).shape == (2, 0)
        assert group.reduce_scatter(torch.empty(0, 2), 0).shape == (0, 2)
        assert group.all_to_all(torch.empty(0)).shape == (0,)
        # And what follows is not disturbed.
        assert int(group.all_reduce(torch.tensor(1))) == n

    on(n, body)


@pytest.mark.parametrize("n", [3, 5])
def test_small_gathers_one_after_the_other_with_a_slow_root(n: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for i in range(30):
            if group.is_first_rank and i % 10 == 0:
                time.sleep(0.02)
            got = group.gather(torch.tensor([group.rank * 1000 + i]), 0)
            if got is not None:
                assert got.tolist() == [rank * 1000 + i for rank in range(n)]

    on(n, body)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("numel", [10, 50_000])
def test_bits_are_equal_whoever_is_slow(n: int, numel: int) -> None:
    """Sums of numbers of very different size: each order of the ranks gives other bits."""

    def body(group: GroupCoordinator) -> list[torch.Tensor]:
        x = torch.randn(numel, generator=torch.Generator().manual_seed(group.rank)) * 10.0 ** (3 * (group.rank % 3))
        sums = []
        for slow in range(n):
            time.sleep(0.01 if group.rank == slow else 0.0)
            sums += [group.all_reduce(x)]
        return sums

    results = on(n, body)
    for sums in results:
        for x in sums:
            assert bits(x) == bits(results[0][0])


def test_a_piece_of_a_reduction_has_the_bits_of_the_whole() -> None:
    """Whichever way a size takes, and reduce_scatter too: a fixed order over ranks."""

    def body(group: GroupCoordinator) -> None:
        x = torch.randn(60_000, generator=torch.Generator().manual_seed(group.rank)) * 10.0 ** (2 * group.rank)
        whole = group.all_reduce(x)
        assert torch.equal(group.all_reduce(x[:100]), whole[:100])
        assert torch.equal(group.all_gather(group.reduce_scatter(x, 0), 0), whole)
        assert torch.equal(group.all_reduce_(x.clone()), whole)

    on(3, body)


def test_one_entry_counts_as_contiguous_whatever_its_strides() -> None:
    def body(group: GroupCoordinator) -> None:
        x = torch.arange(3.0)[1::2] + group.rank
        x = torch.stack([x, x], 1)[:, 1]
        assert x.stride() == (2,)
        assert x.is_contiguous()
        assert float(group.all_reduce(x)) == 3
        assert group.all_gather(x, 0).tolist() == [1, 2]
        assert float(group.broadcast(x, 1)) == 2

    on(2, body)


def test_nan_and_infinity_survive() -> None:
    def body(group: GroupCoordinator) -> list[list[float]]:
        x = torch.tensor([math.nan if group.rank == 1 else 1.0, math.inf, -math.inf if group.rank else math.inf])
        return [group.all_reduce(x, op=op).tolist() for op in ("sum", "max", "min")]

    for sums, largest, smallest in on(3, body):
        assert math.isnan(sums[0])
        assert sums[1] == math.inf
        assert math.isnan(sums[2])
        assert math.isnan(largest[0])
        assert math.isnan(smallest[0])
        assert largest[1:] == [math.inf, math.inf]
        assert smallest[1:] == [math.inf, -math.inf]


def test_lazily_conjugated_and_negated_tensors() -> None:
    def body(group: GroupCoordinator) -> None:
        z = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -float(group.rank)]))
        gathered = group.all_gather(z.conj(), 0)
        assert gathered.tolist() == [1 - 3j, 2 + 0j, 1 - 3j, 2 + 1j]
        assert group.all_gather(z.conj().imag, 0).tolist() == [-3.0, 0.0, -3.0, 1.0]
        assert group.all_reduce(z.conj()).tolist() == [2 - 6j, 4 + 1j]
        into = z.clone().conj()
        group.broadcast(into, 0)
        assert into.tolist() == [1 - 3j, 2 + 0j]
        out = torch.zeros(4, dtype=torch.complex64).conj()
        assert group.all_gather(z, 0, out=out) is out
        assert out.tolist() == [1 + 3j, 2 + 0j, 1 + 3j, 2 - 1j]

    on(2, body)


@pytest.mark.parametrize("n", [2, 5])
def test_out_may_hold_the_input(n: int) -> None:
    def body(group: GroupCoordinator) -> None:
        me = group.rank_in_group
        whole = torch.zeros(n, 3)
        whole[me] = me + 1.0
        assert group.all_gather(whole[me : me + 1], 0, out=whole)[:, 0].tolist() == [i + 1.0 for i in range(n)]
        shifted = torch.zeros(n, 3)
        shifted[(me + 1) % n] = me + 1.0
        group.all_gather(shifted[(me + 1) % n][None], 0, out=shifted)
        assert shifted[:, 0].tolist() == [i + 1.0 for i in range(n)]
        crossed = torch.arange(n * 1000.0) + me
        group.all_to_all(crossed, out=crossed)
        assert crossed[::1000].tolist() == [1000.0 * me + i for i in range(n)]
        summed = torch.arange(float(n)) * (me + 1)
        group.reduce_scatter(summed, 0, out=summed[me : me + 1])
        assert float(summed[me]) == me * n * (n + 1) / 2

    on(n, body)


def test_shared_communicators_keep_their_calls_apart() -> None:
    """`tp` and `world` are the same ranks here, and share."""

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(3, tp=3), name="a") as context:
            assert context.tp.shares_with
            for i in range(5):
                assert float(context.tp.all_reduce(torch.tensor(float(i)))) == 3.0 * i
                assert context.world.all_gather_object((i, world.rank)) == [(i, r) for r in range(3)]
                assert context.ep.broadcast_object(i, i % 3) == i

    spmd(run, 3)
