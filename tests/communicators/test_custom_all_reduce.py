"""Kernels over the peers' memory, on a stand-in for a device: which size goes to which, what comes out, and who may have them."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.accelerators.custom_all_reduce import CustomAllReduce, probe_peer_access, strategy
from commgraph.accelerators.custom_all_reduce.renumbered import Renumbered
from commgraph.accelerators.kernel_table import KERNELS, OTHERS, KernelTable, Row, Step, merged
from commgraph.communicators.base import OPERATIONS, Communicator
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.deadline import Deadline
from commgraph.platforms import GroupFacts
from commgraph.testing import check_communicator, spmd
from tests.helpers import again_if_late, in_time
from tests.stand_ins import GOOD, FakeDevice, HostKernels, Memory, by_name

CPU = torch.device("cpu")

NAME = "custom_all_reduce"


def on_fakes(
    n: int, body: Callable[[cg.ParallelContext, FakeDevice], Any], layout: Any = None, made: Any = None, **options: Any
) -> list[Any]:
    """`body(context, platform)` on ranks whose device is played by the host; `made(rank, memory)` makes their platforms."""
    memory = Memory()

    def run(world: cg.World) -> Any:
        platform = FakeDevice(memory) if made is None else made(world.rank, memory)
        with world.context(layout or cg.Layout(n, tp=n), name="a", platform=platform, options=cg.CommunicatorOptions(**options)) as context:
            return body(context, platform)

    return spmd(run, n)


def why_not(context: cg.ParallelContext) -> str:
    return next(line.strip() for line in context.explain().splitlines() if line.strip().startswith(NAME))


# The table


def test_the_table_that_is_shipped_has_vllms_thresholds() -> None:
    table = KernelTable.shipped()
    assert table.sizes("9.0") == (2, 4, 8)
    expected = {
        ("9.0", 2): [(64 << 20, "one_shot"), (64 << 20 | 1, OTHERS)],
        ("9.0", 4): [(512 << 10, "one_shot"), (32 << 20, "multimem"), ((32 << 20) + 16, OTHERS)],
        ("9.0", 8): [(256 << 10, "one_shot"), (64 << 20, "multimem"), ((64 << 20) + 16, OTHERS)],
        ("8.0", 4): [(512 << 10, "one_shot"), (8 << 20, "two_shot"), ((8 << 20) + 16, OTHERS)],
        ("10.0", 4): [(512 << 10, "one_shot"), (8 << 20, "two_shot")],
        ("10.0", 8): [(256 << 10, "one_shot"), (8 << 20, "multimem")],
    }
    for (capability, ranks), steps in expected.items():
        plan = table.plan(capability, ranks, multicast=True)
        for nbytes, kernel in steps:
            assert plan.kernel("all_reduce", "bfloat16", nbytes) == kernel, (capability, ranks, nbytes)
    # Without multicast the next best kernel, and for a gather none.
    plan = table.plan("9.0", 8, multicast=False)
    assert plan.kernel("all_reduce", "float32", 1 << 20) == "two_shot"
    assert plan.kernel("all_gather", "float32", 1024) == OTHERS
    assert table.plan("9.0", 8, multicast=True).kernel("all_gather", "int8", 1024) == "multimem"


def test_devices_without_a_row_take_that_of_the_next_older_ones() -> None:
    table = KernelTable.shipped()
    assert table.about("8.9") == table.about("8.0")
    assert table.about("12.0") == table.about("10.0")
    assert table.about("7.5") == ()
    assert table.about("gfx942") == ()


rows = st.builds(
    Row,
    capability=st.sampled_from(["8.0", "9.0", "gfx942"]),
    ranks=st.sampled_from([2, 4, 8]),
    operation=st.just("all_reduce"),
    dtype=st.sampled_from(["any", "float32", "bfloat16"]),
    steps=st.lists(
        st.tuples(st.integers(1, 1 << 30), st.sampled_from([*sorted(KERNELS["all_reduce"]), OTHERS])), max_size=5, unique_by=lambda s: s[0]
    ).map(lambda steps: tuple(Step(*step) for step in sorted(steps))),
)
tables = st.lists(rows, max_size=8, unique_by=lambda row: (row.capability, row.ranks, row.dtype)).map(KernelTable)


@settings(deadline=None)
@given(table=tables)
def test_a_table_comes_back_as_it_was_written(table: KernelTable, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("table") / "table.json"
    table.write(path)
    again = KernelTable.read(path)
    assert again == table
    assert again.digest == table.digest
    assert repr(again) == f"<KernelTable of {len(table.rows)} rows, {table.digest}>"
    options = cg.CommunicatorOptions(custom_all_reduce=path)  # type: ignore[arg-type]  # converted
    assert options == cg.CommunicatorOptions(custom_all_reduce=table)
    assert table.digest in options.describe()


@given(table=tables, nbytes=st.integers(1, 1 << 31), dtype=st.sampled_from(["float32", "bfloat16", "int8"]))
def test_a_plan_says_what_its_row_says(table: KernelTable, nbytes: int, dtype: str) -> None:
    for row in table.rows:
        plan = table.plan(row.capability, row.ranks, multicast=True)
        said = plan.kernel("all_reduce", row.dtype, nbytes)
        right = next((step.kernel for step in row.steps if nbytes <= step.max_bytes), OTHERS)
        if row.dtype != "any" and row.steps:
            assert said == right
        assert plan.kernel("all_reduce", dtype, nbytes) in KERNELS["all_reduce"] | {OTHERS}
        assert plan.kernel("all_reduce", dtype, nbytes) == OTHERS or nbytes <= plan.max_bytes
        assert all(
            step.kernel != "multimem" for steps in table.plan(row.capability, row.ranks, multicast=False).steps.values() for step in steps
        )


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.sampled_from(["one_shot", "two_shot", OTHERS])), unique_by=lambda s: s[0]))
def test_merged_steps_choose_as_the_single_ones(measured: list[tuple[int, str]]) -> None:
    measured.sort()
    steps = merged(measured)
    Row("9.0", 2, "all_reduce", "any", steps)
    KernelTable([Row("9.0", 2, "all_reduce", "any", steps)])
    for size, kernel in measured:
        assert next((step.kernel for step in steps if size <= step.max_bytes), OTHERS) == kernel
    assert all(one.kernel != other.kernel for one, other in itertools.pairwise(steps))
    assert not steps or steps[-1].kernel != OTHERS


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row("9.0", 2, "all_to_all", "any", ()), "no operation 'all_to_all', only all_reduce, all_gather, reduce_scatter"),
        (Row("9.0", 2, "all_reduce", "int8", ()), "dtype 'int8' is none of any, bfloat16, float32"),
        (Row("9.0", 1, "all_reduce", "any", ()), "1 ranks do not communicate"),
        (Row("9.0", 2, "all_gather", "any", (Step(10, "one_shot"),)), "all_gather has no kernel one_shot, only multimem"),
        (Row("9.0", 2, "all_reduce", "any", (Step(10, "one_shot"), Step(5, "two_shot"))), r"its sizes \[10, 5\] do not grow"),
    ],
)
def test_rows_that_cannot_be(row: Row, words: str) -> None:
    with pytest.raises(cg.ConfigurationError, match=words):
        KernelTable([row])
    with pytest.raises(cg.ConfigurationError, match="two rows for"):
        KernelTable([Row("9.0", 2, "all_reduce", "any", ())] * 2)


def made_by_hand(**fields: Any) -> list[Any]:
    """A struct checks nothing when it is made."""
    return [
        Row(**{"capability": "9.0", "ranks": 2, "operation": "all_reduce", "dtype": "any", "steps": (Step(1024, "one_shot"),)} | fields)
    ]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        5,
        "x",
        [None],
        [{}],
        [object()],
        made_by_hand(capability=None),
        made_by_hand(capability="\ud800"),
        made_by_hand(ranks="2"),
        made_by_hand(ranks=True),
        made_by_hand(ranks=2.5),
        made_by_hand(operation=["all_reduce"]),
        made_by_hand(dtype=None),
        made_by_hand(steps=None),
        made_by_hand(steps=(None,)),
        made_by_hand(steps=(Step(1.5, "one_shot"),)),  # type: ignore[arg-type]  # what is refused
        made_by_hand(steps=(Step(1024, None),)),  # type: ignore[arg-type]  # likewise
    ],
)
def test_rows_of_other_kinds_are_told_by_place(rows: Any) -> None:
    with pytest.raises(cg.ConfigurationError, match="kernel table: "):
        KernelTable(rows)


def test_digits_that_are_no_version() -> None:
    table = KernelTable(made_by_hand(capability="\u00b2"))
    assert table.about("9.0") == ()
    assert table.about("\u00b2") == table.rows


def test_files_that_are_no_table(tmp_path: Path) -> None:
    deep = "[" * 100_000
    for path, text in (
        (tmp_path / "a", None),
        (tmp_path / "b", "[{}]"),
        (tmp_path / "c", "no"),
        (tmp_path / "d", deep),
        (tmp_path, None),
        ("a\0b", None),
    ):
        if text is not None:
            Path(path).write_text(text)
        with pytest.raises(cg.ConfigurationError, match="no kernel table can be read from"):
            cg.CommunicatorOptions(custom_all_reduce=path)  # type: ignore[arg-type]  # converted
    with pytest.raises(cg.ConfigurationError, match=r"custom_all_reduce=3\): True, False, a commgraph.KernelTable or the path"):
        cg.CommunicatorOptions(custom_all_reduce=3)  # type: ignore[arg-type]  # what is refused


# The strategy


def whole_table(limit: int = 1 << 12, sizes: Sequence[int] = (2, 3, 4)) -> KernelTable:
    """Every kernel serves something: the small ones one shot, then two, then multicast."""
    steps = (Step(limit // 4, "one_shot"), Step(limit // 2, "two_shot"), Step(limit, "multimem"))
    return KernelTable(
        [
            row
            for n in sizes
            for row in (
                Row("9.0", n, "all_reduce", "any", steps),
                Row("9.0", n, "all_gather", "any", (Step(limit, "multimem"),)),
                Row("9.0", n, "reduce_scatter", "any", (Step(limit, "one_shot"),)),
            )
        ]
    )


def factory(memory: Memory, room: int) -> Callable[[GroupFacts, GlooCommunicator], Communicator]:
    def make(facts: GroupFacts, host: GlooCommunicator) -> Communicator:
        n, me = len(facts.ranks), facts.rank_in_group
        kernels = HostKernels(memory, f"{n} of {room}", me, n, room)
        plan = whole_table().plan("9.0", n, multicast=True)
        made = CustomAllReduce(kernels, plan, host, CPU)
        made.warmup()
        assert set(kernels.calls) == {"one_shot", "two_shot", "multimem"}
        return made

    return make


@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", [4096, 192])
def test_it_passes_the_conformance_suite(room: int) -> None:
    """With a buffer that holds everything, and with one through which most goes in pieces."""
    check_communicator(factory(Memory(), room), world_sizes=(2, 3), ends_waits=False)


@settings(max_examples=25, deadline=None)
@given(
    n=st.sampled_from([2, 4]),
    units=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    op=st.sampled_from(["sum", "avg", "max"]),
    room=st.sampled_from([64, 1024, 4096]),
    strided=st.booleans(),
    dim=st.sampled_from([0, 1]),
)
def test_values_bits_and_pieces(n: int, units: int, dtype: torch.dtype, op: str, room: int, strided: bool, dim: int) -> None:
    """Against one process, for what fits, what goes in pieces, and what is too large for the table; every rank gets the same bits."""
    columns = 16 // dtype.itemsize
    generator = torch.Generator().manual_seed(units)
    inputs = [torch.randn(units * n, columns * n, generator=generator).to(dtype) for _ in range(n)]
    memory = Memory()

    def run(world: cg.World) -> list[torch.Tensor]:
        host = world.group.communicator("tcp")
        kernels = HostKernels(memory, "a", world.rank, n, room)
        made = CustomAllReduce(kernels, whole_table(64 << 10).plan("9.0", n, multicast=True), host, CPU)
        x = inputs[world.rank]
        x = x.t().contiguous().t() if strided else x
        before = x.clone()
        tags = itertools.count()
        each = [x.shape[dim] // n] * n
        mine = x.split(each, dim)[world.rank]
        gathered = torch.empty(x.shape, dtype=dtype)
        scattered = torch.empty(mine.shape, dtype=dtype)
        summed = made.all_reduce(x, op, tag=next(tags), deadline=Deadline.after(30))
        made.all_gather(mine, dim, each, gathered, tag=next(tags), deadline=Deadline.after(30))
        made.reduce_scatter(x, dim, each, op, scattered, tag=next(tags), deadline=Deadline.after(30))
        assert torch.equal(x, before)
        if made.accepts("all_reduce", x.shape, dtype, CPU, capturing=False) and op != "max":
            assert kernels.calls
        made.close()
        return [summed, gathered, scattered]

    results = spmd(run, n)
    wide = torch.stack([x.double() for x in inputs])
    wanted = {"sum": wide.sum(0), "avg": wide.mean(0), "max": wide.amax(0)}[op]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.06}
    for rank, (summed, gathered, scattered) in enumerate(results):
        assert torch.allclose(summed.double(), wanted, **tolerance)
        assert torch.equal(summed, results[0][0])
        assert torch.equal(gathered, torch.cat([x.tensor_split(n, dim)[i] for i, x in enumerate(inputs)], dim))
        assert torch.allclose(scattered.double(), wanted.tensor_split(n, dim)[rank], **tolerance)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 64), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    operation=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
)
def test_which_kernel_serves_is_a_function_of_size_and_dtype(shape: list[int], dtype: torch.dtype, operation: str) -> None:
    (made,) = CustomAllReduce_alone
    size = torch.Size(shape).numel() * dtype.itemsize
    parts = 1 if operation == "all_reduce" else 2
    fits = 0 < size <= 4096 and size % (16 * parts) == 0 and (operation == "all_gather" or dtype in (torch.float32, torch.bfloat16))
    answers = {made.accepts(operation, shape, dtype, CPU, capturing=capturing) for capturing in (False, True) for _ in range(2)}
    assert answers == {fits}
    assert not made.accepts(operation, shape, dtype, torch.device("meta"), capturing=False)


class _Nothing(Communicator):
    name = "nothing"
    operations = frozenset()

    def accepts(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class _NoKernels(HostKernels):
    def __init__(self) -> None:
        self.room, self.multicast = 4096, True


CustomAllReduce_alone = (CustomAllReduce(_NoKernels(), whole_table().plan("9.0", 2, multicast=True), _Nothing(0, 2), CPU),)


# Who has it


def test_it_comes_first_and_what_it_does_not_serve_goes_on() -> None:
    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> None:
        tp = ctx.tp
        assert tp.communicators["all_reduce"] == (NAME, "fakeccl", "shm", "tcp", "staged")
        assert tp.communicators["all_to_all"] == ("fakeccl", "shm", "tcp", "staged")
        kernels = platform.kernels[0]
        ctx.warmup()
        assert kernels.calls
        kernels.calls.clear()
        assert tp.all_reduce(torch.full((8,), 1.0 + ctx.rank)).tolist() == [3.0] * 8
        assert kernels.calls == ["one_shot"]
        for x in (torch.ones(3), torch.ones(8, dtype=torch.int64)):  # no multiple of 16 bytes, and nothing that a kernel adds
            assert tp.all_reduce(x).tolist() == [2] * x.numel()
        assert kernels.calls == ["one_shot"]
        assert tp.reduce_scatter(torch.full((8,), 1.0 + ctx.rank), 0).tolist() == [3.0] * 4
        assert kernels.calls == ["one_shot"] * 2
        text = ctx.explain()
        assert f"reduce_scatter: {NAME}, then fakeccl, then shm" in text
        assert f"{NAME}: kernels over a buffer of 65536 bytes: all_reduce of any: one_shot up to 67108864" in text
        assert by_name(tp)[NAME].memory() == 65536

    on_fakes(2, body, custom_all_reduce_bytes=65536)


def test_several_ranks_and_groups_each_have_a_buffer() -> None:
    """Data, tensor and expert parallel groups at once; the trial is made once for all four ranks, and not again for a part of them."""

    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> int:
        for group in (ctx.ep, ctx.tp, ctx.dp):
            x = torch.full((64,), 1.0 + ctx.rank)
            assert group.all_reduce(x).tolist() == [sum(rank + 1.0 for rank in group.ranks)] * 64
        assert len(platform.kernels) == 3
        return platform.trials

    trials = on_fakes(4, body, cg.Layout(4, dp=2, tp=2))
    assert trials in ([1] * 4, [2] * 4, [3] * 4)


@pytest.mark.parametrize(
    ("n", "made", "options", "words"),
    [
        (3, {}, {}, "3 ranks, needs 2, 4 or 8"),
        (2, {}, {"custom_all_reduce": False}, "options.custom_all_reduce=False"),
        (2, {}, {"deterministic": True}, "options.deterministic=True, and it serves some sizes only"),
        (2, {"capability": "7.5"}, {}, "its table has no row for devices of kind 7.5"),
        (2, {}, {"custom_all_reduce": whole_table(sizes=(4,))}, "2 ranks, needs 4"),
        (2, {"capability": ["9.0", "8.0"]}, {}, "devices of different kinds: 8.0, 9.0"),
        (2, {"peer_problem": ["", "this torch has no kernels"]}, {}, "rank 1: this torch has no kernels"),
        (
            4,
            {"trial": "print('" + GOOD.replace("400", "25") + "')"},
            {},
            "4 devices without links of their own: 25 GB/s to the slowest, needs 80",
        ),
    ],
)
def test_who_has_it_not_and_why(n: int, made: dict[str, Any], options: dict[str, Any], words: str) -> None:
    """The same answer on every rank, whichever of them is the reason."""

    def make(rank: int, memory: Memory) -> FakeDevice:
        return FakeDevice(memory, **{name: value[rank] if isinstance(value, list) else value for name, value in made.items()})

    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> str:
        assert ctx.tp.all_reduce(torch.ones(8)).tolist() == [float(n)] * 8
        return why_not(ctx)

    assert on_fakes(n, body, made=make, **options) == [f"{NAME}: not used, {words}"] * n


def test_two_devices_need_no_links_of_their_own() -> None:
    def make(rank: int, memory: Memory) -> FakeDevice:
        return FakeDevice(memory, trial="print('" + GOOD.replace("400", "10").replace("true", "false") + "')", multicast=False)

    texts = on_fakes(2, lambda ctx, platform: why_not(ctx), made=make)
    assert all(text.startswith(f"{NAME}: kernels over a buffer of 8388608 bytes, without multicast") for text in texts)


def test_ranks_of_several_hosts_have_none() -> None:
    memory = Memory()

    def run(world: cg.World) -> str:
        with world.context(cg.Layout(4, tp=4), name="a", platform=FakeDevice(memory)) as ctx:
            return why_not(ctx)

    assert spmd(run, 4, nodes=2) == [f"{NAME}: not used, its 4 ranks are on 2 hosts"] * 4


def test_threads_of_one_process_have_none() -> None:
    class Honest(FakeDevice):
        def peer_process(self) -> str:
            return str(os.getpid())

    assert (
        on_fakes(2, lambda ctx, platform: why_not(ctx), made=lambda rank, memory: Honest(memory))
        == [f"{NAME}: not used, two of its ranks are threads of one process"] * 2
    )


@pytest.mark.parametrize("where", ["capability", "peer_trial", "make_backend", "make_kernels"])
@again_if_late
def test_a_rank_that_fails_to_build_its_part_keeps_nobody_waiting(where: str) -> None:
    """Also where the others are in a library that would wait for it as long as its deadline is."""
    memory = Memory()

    def run(world: cg.World) -> str:
        platform = FakeDevice(memory)
        if world.rank == 1:

            def broken(*args: Any) -> Any:
                raise OSError(f"{where} is broken")

            setattr(platform, where, broken)
        started = time.monotonic()
        with pytest.raises(OSError if world.rank == 1 else cg.BuildError, match=f"{where} is broken") as caught:
            world.context(cg.Layout(2, tp=2), name="a", platform=platform)
        in_time(time.monotonic() - started, 2)
        # The world is as it was, and so is the name.
        with world.context(cg.Layout(2, tp=2), name="a", platform=FakeDevice(memory)) as ctx:
            assert ctx.tp.all_reduce(torch.ones(64)).tolist() == [2.0] * 64
        return str(caught.value)

    first, _ = spmd(run, 2)
    assert "rank 1 could not build it: OSError" in first


def test_calls_on_several_streams_take_turns() -> None:
    """One buffer: what is begun on another stream comes after the last call, but in a graph, which may not wait for what is outside."""

    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> None:
        streams, x = platform.streams_made, torch.ones(64)
        ctx.tp.all_reduce(x)
        ctx.tp.all_reduce(x)
        assert streams.said == []
        with streams.use("other"):
            ctx.tp.all_reduce(x)
            ctx.tp.all_reduce(x)
        assert streams.said == [("record_event", "main", 0), ("wait_event", "other", ("main", 0))]
        streams.capturing = True
        ctx.tp.all_reduce(x)
        assert len(streams.said) == 2
        streams.capturing = False

    on_fakes(2, body)


def test_closing_is_bounded_where_the_device_never_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(strategy, "_CLOSE_SECONDS", 0.2)
    kept: list[HostKernels] = []
    ends = threading.Event()
    monkeypatch.setattr(HostKernels, "drain", lambda self: ends.wait(20))

    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> None:
        ctx.tp.all_reduce(torch.ones(64))
        kept.extend(platform.kernels)

    on_fakes(2, body)
    ends.set()
    assert all((kernels._name, kernels._rank) in kernels._memory.buffers for kernels in kept), "its memory was given back"
    assert sum("the device is still busy after 0.2 s" in record.message for record in caplog.records) == 2


def test_rendezvous_keys_do_not_depend_on_what_the_process_did_before() -> None:
    """Called from C++ as torch does: by one rank as its third exchange, by the other as its first."""
    shared = dist.HashStore()
    kept = [Renumbered(shared) for _ in range(2)]
    ranks = [dist.PrefixStore("SymmetricMemory", store) for store in kept]
    for step in range(3):
        payloads = [bytes([step, rank, 0, 255]) for rank in range(2)]
        for rank, (store, number) in enumerate(zip(ranks, (7 + step, step), strict=True)):
            store.set(f"{number}/{rank}", payloads[rank])  # type: ignore[arg-type]  # torch takes bytes
        for store, number in zip(ranks, (7 + step, step), strict=True):
            assert store.multi_get([f"{number}/{rank}" for rank in range(2)]) == payloads
    # Numbers of another kind have a count of their own; whatever else there is stays as it is.
    mine = Renumbered(shared)
    assert [mine._key(key) for key in ("a/5/0", "b/9/1", "a/5/1", "a/8/0", "plain", "x/y/1")] == [
        "a/0/0",
        "b/0/1",
        "a/0/1",
        "a/1/0",
        "plain",
        "x/y/1",
    ]


kinds = st.fixed_dictionaries(
    {},
    optional={
        "capability": st.sampled_from(["9.0", "9.0", "8.0", "7.5"]),
        "peer_problem": st.sampled_from(["", "", "this torch has no kernels"]),
        "problem": st.sampled_from(["", "", "this torch has no NCCL"]),
        "trial": st.sampled_from([f"print('{GOOD}')", f"print('{GOOD.replace('true', 'false')}')", "import os; os.abort()"]),
    },
)
calls = st.tuples(
    st.sampled_from([name for name in OPERATIONS if name != "barrier"]),
    st.lists(st.sampled_from([0, 1, 3, 16, 64, 4096, 1 << 20]), max_size=2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.booleans(),
)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:fakeccl cannot serve")
@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(kinds, min_size=2, max_size=4),
    asked=st.lists(calls, min_size=10, max_size=10),
    options=st.fixed_dictionaries({}, optional={"deterministic": st.booleans(), "custom_all_reduce": st.booleans(), "shm": st.booleans()}),
)
def test_whatever_the_ranks_have_they_all_pick_the_same(ranks: list[dict[str, Any]], asked: list[Any], options: dict[str, bool]) -> None:
    """Kinds of devices, what torch has, whether peers are reached: each rank has its own, and all come to one chain and one choice."""

    def body(ctx: cg.ParallelContext, platform: FakeDevice) -> tuple[Any, ...]:
        tp = ctx.tp
        chosen = []
        for operation, shape, dtype, capturing in asked:
            platform.streams_made.capturing = capturing
            try:
                chosen.append(tp._state.strategies.route(operation, shape, dtype, CPU).name)
            except cg.UnsupportedTensorError:
                chosen.append("refused while capturing")
        platform.streams_made.capturing = False
        assert tp.all_reduce(torch.ones(64)).tolist() == [float(len(ranks))] * 64
        said = [line for line in ctx.explain().splitlines() if ": not used, " in line]
        return dict(tp.communicators), chosen, said

    first, *others = on_fakes(len(ranks), body, made=lambda rank, memory: FakeDevice(memory, **ranks[rank]), **options)
    assert all(other == first for other in others)
    # And it is there exactly if nothing speaks against it on any rank.
    fine = (
        len(ranks) in (2, 4)
        and len({kind.get("capability", "9.0") for kind in ranks}) == 1
        and ranks[0].get("capability", "9.0") != "7.5"
        and not any(kind.get("peer_problem") or "abort" in kind.get("trial", "") for kind in ranks)
        and options.get("custom_all_reduce", True)
        and not options.get("deterministic", False)
    )
    assert (NAME in first[0]["all_reduce"]) == fine
    assert ("fakeccl" in first[0]["all_reduce"]) == (not any(kind.get("problem") for kind in ranks))


# Peer access, tried out by children


LIES = {
    "hangs": ("import time; time.sleep(600)", "moving data to its peers did not end within 2 s"),
    "corrupts": (
        """print('commgraph peers: {"problem":"7 of 8388608 bytes that it read from rank 0 of the group were wrong"}')""",
        "7 of 8388608 bytes that it read from rank 0 of the group were wrong",
    ),
    "crashes": ("import os, signal; print('CUDA error'); os.kill(os.getpid(), signal.SIGSEGV)", "was ended by signal 11"),
    "fails": ("import sys; sys.exit('no such device')", "ended with code 1: no such device"),
    "says nothing": ("", "ended with code 0: it said nothing"),
}


@pytest.mark.parametrize("lie", LIES)
@again_if_late
def test_peer_access_is_shown_by_moving_data_and_all_ranks_come_to_one_verdict(lie: str) -> None:
    """A real child of one rank misbehaves as drivers do: all ranks do without, in time, and nothing of the child is left."""
    program, words = LIES[lie]
    memory = Memory()
    started = time.monotonic()

    class Short(FakeDevice):
        trial_seconds = 2.0

    def run(world: cg.World) -> str:
        platform = Short(memory, trial=program if world.rank == 1 else f"print('{GOOD}')")
        with world.context(cg.Layout(4, tp=4), name="a", platform=platform) as ctx:
            assert ctx.tp.communicators["all_reduce"][0] == "fakeccl"
            assert ctx.tp.all_reduce(torch.ones(64)).tolist() == [4.0] * 64
            assert not platform.kernels
            return why_not(ctx)

    texts = spmd(run, 4)
    assert len(set(texts)) == 1
    assert f"{NAME}: not used, rank 1: " in texts[0]
    assert words in texts[0]
    in_time(time.monotonic() - started, 2 + 4)


def test_the_children_meet_where_they_are_told() -> None:
    """Children that exchange something by the store whose port they get: what the real ones do before they touch a device."""
    program = (
        "import sys, datetime, torch.distributed as dist\n"
        "port, rank, size = map(int, sys.argv[1:4])\n"
        "store = dist.TCPStore('127.0.0.1', port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))\n"
        "store.set(f'here/{rank}', str(rank))\n"
        "said = [store.get(f'here/{peer}').decode() for peer in range(size)]\n"
        "print('libraries print things, too')\n"
        'print(f\'commgraph peers: {{"problem":"","multicast":{str(rank != 2).lower()},"gigabytes":{100 + rank}}}\')\n'
        "store.set(f'done/{rank}', ''); store.wait([f'done/{peer}' for peer in range(size)])\n"
    )

    def run(world: cg.World) -> Any:
        import sys

        def tell(word: bytes) -> list[bytes]:
            return world.group.all_gather_object(word)

        return probe_peer_access(
            tell,
            lambda port: [sys.executable, "-c", program, str(port), str(world.rank), str(world.size)],
            range(3),
            world.rank,
            seconds=60,
        )

    proofs = spmd(run, 3)
    assert len(set(proofs)) == 1
    assert (proofs[0].problem, proofs[0].multicast, proofs[0].gigabytes) == ("", False, 100)


def test_the_real_trial_says_what_is_missing_here() -> None:
    """The child that a GPU machine runs, run here: it says in one line that there is no CUDA, and the parent that it failed."""
    from commgraph.accelerators.custom_all_reduce.peers import command_of

    def run(world: cg.World) -> str:
        def tell(word: bytes) -> list[bytes]:
            return world.group.all_gather_object(word)

        return probe_peer_access(tell, command_of(world.rank, 2, 0), range(2), world.rank, seconds=60).problem

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so it would succeed")
    for problem in spmd(run, 2):
        assert problem.startswith("rank 0: its probe of the peers' memory ended with code 1: ")
        assert "CUDA" in problem
