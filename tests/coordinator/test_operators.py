"""torch.ops.commgraph: every operation in eager, compiled, exported; values, gradients, graphs. The whole matrix: ``nox -s compile``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import commgraph as cg
from commgraph import compat
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import fake_world, spmd
from tests import helpers
from tests.coordinator.operator_cases import CASES, crossing, expected, given, rows, weight

WITH_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on the host")
BACKENDS = (
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=WITH_COMPILER),
    "export",
)


class Calls(torch.nn.Module):
    """A function of a group and tensors, as torch.export wants it."""

    def __init__(self, run: Callable[..., Any], tp: GroupCoordinator) -> None:
        super().__init__()
        self.run, self.tp = run, tp

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.run(self.tp, *tensors)


# torch.export patches what all threads use, and the ranks here are threads. Nothing is sent while it traces.
EXPORTING = threading.Lock()


def made(how: str, run: Callable[..., Any], tp: GroupCoordinator, *tensors: torch.Tensor) -> Callable[..., Any]:
    if how == "direct":
        return Calls(run, tp)
    if how == "export":
        with EXPORTING:
            return torch.export.export(Calls(run, tp), tensors).module()
    return torch.compile(Calls(run, tp), backend=how, fullgraph=True)


def on(n: int, body: Callable[[GroupCoordinator], Any]) -> list[Any]:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    return helpers.on(n, body, timeout=280)  # the C++ compiler takes a minute on a busy machine


def check_case(how: str, name: str, n: int) -> None:
    case = CASES[name]
    values, gradients = expected(name, n)

    def body(tp: GroupCoordinator) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = given(name, n, tp.rank).requires_grad_(case.differentiable)
        y = made(how, case.run, tp, x)(x)
        if case.differentiable:
            (y * weight(y, tp.rank)).sum().backward()
        assert torch.equal(x, given(name, n, tp.rank)), "the input was changed"
        return y.detach(), x.grad

    for rank, (y, grad) in enumerate(on(n, body)):
        assert torch.equal(y, values[rank]), f"rank {rank}"
        if case.differentiable:
            torch.testing.assert_close(grad, gradients[rank])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_operation_has_its_values_and_its_gradient(name: str, n: int) -> None:
    check_case("direct", name, n)


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", BACKENDS)
def test_every_operation_traced(how: str, name: str, n: int) -> None:
    check_case(how, name, n)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("how", "cases"),
    [
        *(pytest.param(how, tuple(CASES), id=how) for how in ("eager", "aot_eager", "export")),
        # It takes longer to compile than all others together.
        pytest.param("inductor", ("all_reduce", "all_gather", "scatter", "send and recv"), marks=WITH_COMPILER, id="inductor, some"),
        pytest.param("inductor", tuple(CASES), marks=[WITH_COMPILER, pytest.mark.matrix], id="inductor"),
    ],
)
def test_one_graph_of_all_operations(how: str, cases: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break; a second context with the same layout runs the same graph over its own group; inductor's calls the kernels."""
    operator = torch.ops.commgraph.all_reduce.default
    in_graph = Mock(wraps=getattr(operator, compat.IN_GRAPH))
    monkeypatch.setattr(operator, compat.IN_GRAPH, in_graph)
    n = 2
    names = [name for name in cases if CASES[name].differentiable]
    others = [name for name in cases if name not in names]
    wanted = {name: expected(name, n) for name in cases}

    def everything(tp: GroupCoordinator, *xs: torch.Tensor) -> list[torch.Tensor]:
        return [CASES[name].run(tp, x) for name, x in zip([*names, *others], xs, strict=True)]

    def body(tp: GroupCoordinator, backend: Any) -> None:
        first: GroupCoordinator | None = None
        xs = [given(name, n, tp.rank).requires_grad_(name in names) for name in [*names, *others]]
        run = made(backend if how != "export" else how, everything, tp, *xs)
        for group in (tp, None) if how == "export" else (tp, second[tp.rank].tp):
            if group is None:
                continue
            if isinstance(getattr(run, "tp", None), GroupCoordinator):
                run.tp = group  # type: ignore[attr-defined]  # of the module
            before = group._state.sequence
            for x in xs:
                x.grad = None
            ys = run(*xs)
            losses = [(y * weight(y, tp.rank)).sum() for y in ys[: len(names)]]
            torch.stack(losses).sum().backward()
            assert group._state.sequence > before + len(cases) // 2, "the graph ran over another group"
            for name, y, x in zip([*names, *others], ys, xs, strict=True):
                assert torch.equal(y, wanted[name][0][tp.rank]), name
                if name in names:
                    torch.testing.assert_close(x.grad, wanted[name][1][tp.rank])
            first = first or group

    second: dict[int, cg.ParallelContext] = {}
    counted: list[Any] = [how] * n if how == "export" else [CompileCounterWithBackend(how) for _ in range(n)]

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(n, tp=n), name="main") as ctx, world.context(cg.Layout(n, tp=n), name="second") as other:
            second[world.rank] = other
            body(ctx.tp, counted[world.rank])

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(run, n, timeout=280)
    assert in_graph.called == (how == "inductor")
    if how != "export":
        # By each rank's own backend: whoever comes second may find the frame compiled by the other, which is the same code.
        assert 1 <= sum(counter.frame_count for counter in counted) <= n


def test_contexts_of_other_sizes_are_other_graphs() -> None:
    def body(world: cg.World) -> None:
        counter = CompileCounterWithBackend("eager")

        def step(x: torch.Tensor, ctx: cg.ParallelContext) -> torch.Tensor:
            return ctx.tp.all_reduce(x) * ctx.tp.world_size + ctx.dp.rank_in_group

        compiled = torch.compile(step, backend=counter, fullgraph=True)
        x = torch.ones(3) + world.rank
        with (
            world.context(cg.Layout(2, tp=2), name="target") as target,
            world.context(cg.Layout(2, tp=1, dp=2), name="draft") as draft,
            world.context(cg.Layout(2, tp=2), name="twin") as twin,
        ):
            for ctx in (target, draft, twin, target, draft):
                assert torch.equal(compiled(x, ctx), step(x, ctx))
            assert counter.frame_count == 2
            # A group of one rank leaves nothing in the graph.
            graphs = [len([node for node in graph.graph.nodes if "commgraph" in str(node.target)]) for graph in counter.graphs]
            assert sorted(graphs) == [0, 1]

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    # One rank after the other compiles; spmd's threads share what dynamo caches by code, and each has its own `step`.
    spmd(body, 2)


def test_no_names_ports_or_addresses_in_graphs() -> None:
    """Graphs are the same text on every rank and in every run; of processes, below."""
    texts: dict[tuple[int, str], str] = {}

    def body(world: cg.World) -> None:
        def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            texts[world.rank, name] = graph.print_readable(print_output=False)  # type: ignore[no-untyped-call]  # torch's
            return graph

        for name in ("some_context", "another_context"):
            with world.context(cg.Layout(2, tp=2), name=name) as ctx:

                def step(x: torch.Tensor, ctx: cg.ParallelContext = ctx) -> torch.Tensor:
                    y = ctx.tp.all_reduce(x)
                    ctx.tp.barrier()
                    return ctx.tp.reduce_scatter(ctx.tp.all_gather(y, 0), 0, op="avg")

                torch.compile(step, backend=keep, fullgraph=True)(torch.ones(4))

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(body, 2)
    text = texts[0, "some_context"]
    assert set(texts.values()) == {text}
    assert "commgraph.all_reduce" in text
    # Comments say where in the source a line came from.
    code = re.sub(r"#.*", "", text)
    assert not re.search(r"_context|0x[0-9a-f]{6}|:\d{4,}|\btp\b\"", code), code


def test_a_compiled_call_refuses_a_closed_context() -> None:
    def body(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="main")

        def step(x: torch.Tensor) -> torch.Tensor:
            return ctx.tp.all_reduce(x) + 1

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
        ctx.close()
        with pytest.raises(cg.ContextClosedError):
            compiled(torch.ones(2))
        with pytest.raises(cg.ContextClosedError):
            torch.ops.commgraph.all_reduce(torch.ones(2), ctx.tp, "sum")

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(body, 2)


def test_what_torch_looks_at_goes_through_operators() -> None:
    def body(tp: GroupCoordinator) -> None:
        x = torch.ones(4, 3)
        with EXPORTING:
            graph = make_fx(lambda x: tp.all_gather(tp.all_reduce(x), 1), tracing_mode="fake")(x)
        assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == [
            "commgraph.all_reduce.default",
            "commgraph.all_gather.default",
        ]
        with torch._subclasses.FakeTensorMode():
            fake = torch.empty(4, 6)
            assert tp.reduce_scatter(fake, 0).shape == (2, 6)
            assert tp.all_to_all(fake, gather_dim=1).shape == (2, 12)
            assert tp.recv((3, 2), torch.bfloat16).dtype == torch.bfloat16
        tp.barrier()
        with FlopCounterMode(display=False) as counter:
            assert torch.equal(tp.all_reduce(x), x * 2)
            tp.all_reduce_(x)
        assert counter.get_total_flops() == 0
        assert torch.equal(x, torch.full((4, 3), 2.0))

    on(2, body)


def test_sizes_may_be_symbols() -> None:
    def body(world: cg.World) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        with world.context(cg.Layout(2, tp=2), name="main") as ctx:

            def step(x: torch.Tensor, mine: int, theirs: int) -> torch.Tensor:
                sizes = [mine, theirs] if world.rank == 0 else [theirs, mine]
                whole = ctx.tp.all_gatherv(x, 0, sizes)
                assert isinstance(whole, torch.Tensor)
                return ctx.tp.reduce_scatterv(whole, 0, sizes) + ctx.tp.all_reduce(whole.sum())

            compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
            for pair in ((2, 3), (4, 7), (9, 5), (6, 6), (8, 3)):
                mine, theirs = pair if world.rank == 0 else pair[::-1]
                x = torch.ones(mine, 3)
                assert torch.equal(compiled(x, mine, theirs), step(x, mine, theirs))
            assert counter.frame_count <= 2

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(body, 2)


def test_second_derivatives() -> None:
    """Of a function that mixes the ranks: against the same in one process."""
    n = 2

    def joint(xs: list[torch.Tensor]) -> torch.Tensor:
        total = torch.stack(xs).sum(0)
        return sum(((total * total * x).sum() + (torch.cat(xs) ** 3).sum() * (i + 1) for i, x in enumerate(xs)), torch.zeros(()))

    xs = [torch.arange(3.0) + 1 + i for i in range(n)]
    wanted = []
    inputs = [x.clone().requires_grad_() for x in xs]
    first = torch.autograd.grad(joint(inputs), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), inputs)  # type: ignore[arg-type]  # a tensor, and no int
    wanted = list(second)

    def body(tp: GroupCoordinator) -> torch.Tensor:
        x = xs[tp.rank].clone().requires_grad_()
        total = tp.all_reduce(x)
        whole = tp.all_gatherv(x, 0, [3, 3])
        assert isinstance(whole, torch.Tensor)
        loss = (total * total * x).sum() + (whole**3).sum() * (tp.rank + 1)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (again,) = torch.autograd.grad((grad * grad).sum(), x)
        return again

    for rank, got in enumerate(on(n, body)):
        torch.testing.assert_close(got, wanted[rank])


def test_what_has_no_derivative_says_so() -> None:
    def body(tp: GroupCoordinator) -> None:
        leaf = torch.ones(2, requires_grad=True)
        for call in (lambda: tp.all_reduce_(leaf), lambda: tp.broadcast(leaf), lambda: tp.gather(leaf), lambda: tp.send(leaf)):
            with pytest.raises(cg.UnsupportedTensorError, match=r"requires a gradient.*[Nn]othing was sent|leaf"):
                call()  # type: ignore[no-untyped-call]  # torch's
        with pytest.raises(ValueError, match="timeout= cannot go with"):
            tp.all_reduce(leaf, timeout=3.0)
        with pytest.raises(ValueError, match=r"op='mean' is not one of"):
            tp.all_reduce(leaf, op="mean")
        with pytest.raises(ValueError, match=rf"rank {tp.rank}.*input_sizes without output_sizes"):
            tp.all_to_all(leaf, input_sizes=[1, 1])
        with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match=rf"all_gather on group 'tp' \(rank {tp.rank},.*dim=3"):
            tp.all_gather(torch.empty(2, 2), 3)
        with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="do not add up to dim 0"):
            tp.reduce_scatterv(torch.empty(2, 2), 0, [1, 2])
        # Nothing was sent, so the group goes on; under no_grad a leaf is a tensor like any other.
        with torch.no_grad():
            assert torch.equal(tp.all_reduce_(leaf), torch.full((2,), 2.0))

    on(2, body)


def test_operators_neither_change_nor_return_their_inputs() -> None:
    def body(tp: GroupCoordinator) -> None:
        x, token = torch.ones(2, 3), tp._token
        ops: Any = torch.ops.commgraph
        n = tp.world_size
        for y in (
            ops.all_reduce(x, tp, "sum"),
            ops.reduce_scatter(x, tp, 0, "sum"),
            ops.all_gather(x, tp, 0),
            ops.all_to_all(x, tp, 0, 1),
            ops.broadcast(x, tp, 0),
            ops.reduce_on_one(x, tp, 0),
            ops.reduce(x, tp, 0, "max", token) if tp.rank == 0 else ops.reduce(x, tp, 0, "max", token).new_ones(2, 3),
            ops.scatter(x, tp, 0, 0, [2, 0][:n] if n == 2 else [2], token),
            ops.all_gatherv(x, tp, 0, [2] * n, token),
            ops.reduce_scatterv(x, tp, 0, [2, 0][:n] if n == 2 else [2], "sum", token),
            ops.all_to_allv(x, tp, 0, 0, [2 // n] * n, [2 // n] * n, token),
            ops.gather(x, tp, 0, 0, None, token),
            ops.dispatch([x], tp, None, token)[0],
            ops.combine(x, tp, None, token),
        ):
            assert y.is_contiguous()
            assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(x, torch.ones(2, 3))

    for n in (1, 2):
        on(n, body)


SAMPLES: dict[str, Callable[[torch.Tensor, GroupCoordinator], tuple[Any, ...]]] = {
    "all_reduce": lambda x, tp: (x, tp, "sum"),
    "reduce_scatter": lambda x, tp: (x, tp, 1, "max"),
    "all_gather": lambda x, tp: (x, tp, -1),
    "all_to_all": lambda x, tp: (x, tp, 0, 1),
    "broadcast": lambda x, tp: (x, tp, 0),
    "reduce": lambda x, tp: (x.detach(), tp, 0, "sum", tp._token),
    "reduce_on_one": lambda x, tp: (x, tp, 0),
    "scatter": lambda x, tp: (x.detach(), tp, 0, 0, None, tp._token),
    "all_gatherv": lambda x, tp: (x, tp, 0, [4], tp._token),
    "reduce_scatterv": lambda x, tp: (x, tp, 0, [4], "avg", tp._token),
    "all_to_allv": lambda x, tp: (x, tp, 0, 0, [4], [4], tp._token),
    "gather": lambda x, tp: (x.detach(), tp, 0, 0, None, tp._token),
    "dispatch": lambda x, tp: ([x, torch.randn(4, 1, requires_grad=True)], tp, [4], tp._token),
    "combine": lambda x, tp: (x, tp, None, tp._token),
    "barrier": lambda x, tp: (tp, tp._token),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """One rank: torch runs an operator many times over, and only on this one. Of two, in processes: below."""

    def body(tp: GroupCoordinator) -> None:
        x = torch.randn(4, 3, requires_grad=name not in ("gather", "reduce", "scatter"))
        torch.library.opcheck(getattr(torch.ops.commgraph, name).default, SAMPLES[name](x, tp))

    on(1, body)


@pytest.mark.parametrize("name", ["send", "recv", "sendrecv"])
def test_opcheck_of_messages(name: str) -> None:
    """One rank has nobody to send to, and of two that call alike neither would receive: in a world without peers."""
    with fake_world(2) as world:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        samples: dict[str, tuple[Any, ...]] = {
            "send": (torch.empty(4, 3, device="meta"), tp, 1, tp._token),
            "recv": (tp, [4, 3], torch.float32, 1, torch.device("meta"), tp._token),
            "sendrecv": (torch.empty(4, 3, device="meta"), tp, 1, [4, 3], torch.float32, 1, torch.device("meta"), tp._token),
        }
        torch.library.opcheck(getattr(torch.ops.commgraph, name).default, samples[name])


def test_the_page_lists_the_operators() -> None:
    page = (helpers.ROOT / "docs/reference/operators.md").read_text()
    listed = set(re.findall(r"^commgraph::(\w+\(.*)$", page, re.MULTILINE))
    schemas = {
        str(getattr(torch.ops.commgraph, name).default._schema).removeprefix("commgraph::").replace("__torch__.torch.classes.", "")
        for name in (*SAMPLES, "send", "recv", "sendrecv", "fused_scaled_matmul_reduce_scatter")
    }
    names = {schema[: schema.index("(")] for schema in schemas}
    assert {schema[: schema.index("(")] for schema in listed} == names
    assert {re.sub(r"\bGroupCoordinator group", "PyObject group", schema) for schema in listed} == schemas


@pytest.mark.timeout(300)
@WITH_COMPILER
@pytest.mark.matrix
def test_processes_compile_the_same_code(tmp_path: Path) -> None:
    """The demo's blocks on two processes, twice: equal to eager, opcheck, target beside draft; and the code is the same text each time."""
    codes = set()
    for attempt in range(2):
        command = [sys.executable, str(helpers.ROOT / "tests/programs/compiled.py")]
        ranks = [
            subprocess.Popen(
                [
                    *command,
                    str(rank),
                    "2",
                    str(tmp_path / f"meet{attempt}"),
                    str(tmp_path / f"cache{attempt}{rank}"),
                    *(["briefly"] * attempt),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            out, _ = rank.communicate(timeout=250)
            assert rank.returncode == 0
            codes.add(out.strip().splitlines()[-1])
    assert len(codes) == 1, codes


def test_helpers_of_the_cases() -> None:
    """The oracle's own numbers add up."""
    assert all(sum(rows(n)) > 0 and min(rows(n)) == 0 for n in (2, 3))
    assert {crossing(3, i, j) for i in range(3) for j in range(3)} == {0, 1, 2}
