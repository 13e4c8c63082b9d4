"""A world without peers: every operation's shapes, any number of ranks, whole models traced in one process."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.demo.config import LlamaConfig
from commgraph.demo.model import ShardedLlama
from commgraph.demo.reference import KVCache, rotary
from commgraph.testing import fake_world, spmd
from commgraph.testing._program import OPERATIONS, Program, TensorSpec
from commgraph.testing.strategies import programs


def every_shape(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Any]:
    """One call of each operation on x, ``[n * 2, 3]``; shapes of what comes."""
    n = group.world_size
    sizes = list(range(n))
    piece = x[: group.rank_in_group]
    results: dict[str, Any] = {
        "all_reduce": group.all_reduce(x),
        "all_reduce_": group.all_reduce_(x.clone()),
        "all_gather": group.all_gather(x, 1),
        "all_gatherv": group.all_gatherv(piece, 0, sizes),
        "reduce_scatter": group.reduce_scatter(x, 0),
        "reduce_scatterv": group.reduce_scatterv(x.new_empty(sum(sizes), 3), 0, sizes),
        "all_to_all": group.all_to_all(x, scatter_dim=0, gather_dim=1),
        "all_to_allv": group.all_to_all(x.new_empty(sum(sizes), 3), input_sizes=sizes, output_sizes=[group.rank_in_group] * n),
        "gather": group.gather(x, 1),
        "gatherv": group.gather(piece, group.rank_in_group, 0, sizes=sizes),
        "scatter": group.scatter(x, 1, 0),
        "scatterv": group.scatter(x.new_empty(sum(sizes), 3), 0, 0, sizes=sizes),
        "reduce": group.reduce(x, group.rank_in_group),
        "reduce elsewhere": group.reduce(x, 1, op="max"),
        "bits": group.reduce_scatterv(x.new_empty((sum(sizes), 3), dtype=torch.int32), 0, sizes, op="bxor"),
        "broadcast_async": group.broadcast_async(x.clone(), 1).wait(),
        "all_to_all_async": group.all_to_all_async(x, gather_dim=1).wait(),
        "gather_async": group.gather_async(x, 1).wait(),
        "broadcast": group.broadcast(x.clone(), 1),
        "recv": group.recv((4, 5), torch.bfloat16, device=x.device),
    }
    group.send(x)
    group.barrier()
    assert group.barrier_async().wait() is None
    dispatched = group.dispatch(piece, x.new_empty(len(piece), 8), sizes=sizes)
    results["dispatch"] = dispatched[0]
    results["combine"] = group.combine(dispatched[0], dispatched)
    assert all(y.device == x.device for y in results.values() if y is not None)
    return {name: None if y is None else tuple(y.shape) for name, y in results.items()}


EXPECTED = {
    "all_reduce": (8, 3),
    "all_reduce_": (8, 3),
    "all_gather": (8, 12),
    "all_gatherv": (6, 3),
    "reduce_scatter": (2, 3),
    "reduce_scatterv": (2, 3),
    "all_to_all": (2, 12),
    "all_to_allv": (8, 3),
    "gather": None,
    "gatherv": (6, 3),
    "scatter": (2, 3),
    "scatterv": (2, 3),
    "reduce": (8, 3),
    "reduce elsewhere": None,
    "bits": (2, 3),
    "broadcast_async": (8, 3),
    "all_to_all_async": (2, 12),
    "gather_async": None,
    "broadcast": (8, 3),
    "recv": (4, 5),
    "dispatch": (6, 3),
    "combine": (2, 3),
}


def test_every_operation_answers_shapes_of_meta_tensors() -> None:
    with fake_world(8, 2) as world:
        tp = world.context(cg.Layout(8, tp=4), name="a").tp
        assert every_shape(tp, torch.empty(8, 3, device="meta")) == EXPECTED
        # With a gradient they go through the operators.
        x = torch.empty(8, 3, device="meta", requires_grad=True)
        y = tp.all_gather(tp.all_reduce(x), 0)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (8, 3)
        work = tp.all_reduce_async(torch.empty(3, device="meta"))
        assert work.wait().shape == (3,)
        assert tp.batch([cg.Send(x.detach()), cg.Recv(torch.empty(2, device="meta"))]).wait()[1].shape == (2,)  # type: ignore[union-attr]
        assert tp.empty(4, torch.float32).is_meta
        assert tp.sibling("x").all_gather(torch.empty(1, device="meta")).shape == (4,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_and_of_fake_tensors(device: str) -> None:
    with fake_world(8, 2, device=device) as world, FakeTensorMode():
        tp = world.context(cg.Layout(8, tp=4), name="a").tp
        assert every_shape(tp, torch.empty(8, 3, device=device)) == EXPECTED


def test_and_of_fake_tensors_of_a_device_that_is_not_here() -> None:
    """Operators know no device; a torch that was built without this one refuses some of its own, copies for one."""
    with fake_world(8, 2, device="cuda") as world, FakeTensorMode():
        tp = world.context(cg.Layout(8, tp=4), name="a").tp
        x = torch.empty(8, 3, device="cuda")
        for y, shape in (
            (tp.all_reduce(x), (8, 3)),
            (tp.all_gather(x), (8, 12)),
            (tp.reduce_scatter(x, 0), (2, 3)),
            (tp.all_to_all(x), (8, 3)),
        ):
            assert (tuple(y.shape), y.device.type) == (shape, "cuda")
        assert tp.recv(3, torch.float32).device.type == "cuda"


@pytest.mark.parametrize("backend", ["captured", "aot_eager"])
def test_compiled_code_over_fake_tensors_of_a_device_picks_the_operators(backend: str) -> None:
    """Without such a device: its tensors are fake, and so is the world. What a torch without it cannot do, as copy_, is left out."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with fake_world(8, 2, device="cuda") as world, FakeTensorMode(allow_non_fake_inputs=True):
        context = world.context(cg.Layout(8, tp=4, dp=2), name="a")
        tp, ep = context.tp, context.ep

        def step(x: torch.Tensor) -> tuple[Any, ...]:
            y = tp.reduce_scatter(tp.all_gather(tp.all_reduce(x), 0), 0)
            return y, ep.all_to_all(torch.cat([y] * 8)), tp.all_gatherv(y, sizes=[8] * 4), tp.gather(y, 2, 0)

        compiled = torch.compile(step, backend=capture if backend == "captured" else backend, fullgraph=True)
        x = torch.empty(8, 4, device="cuda", dtype=torch.bfloat16)
        results = [y for y in compiled(x) if y is not None]
        assert [tuple(y.shape) for y in results] == [(8, 4), (64, 4), (32, 4), (32, 4)]
        assert {(y.device.type, y.dtype) for y in results} == {("cuda", torch.bfloat16)}
    if backend == "captured":
        (graph,) = graphs
        picked = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("commgraph.")]
        assert picked == [
            f"commgraph.{name}" for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_gatherv", "gather")
        ]


COUNTED = ("dispatch", "combine")
META = tuple(name for name in OPERATIONS if "object" not in name and "dict" not in name)


@settings(deadline=None, max_examples=40)
@given(programs(max_world_size=5, max_steps=6, operations=META))
def test_random_programs_have_the_shapes_that_real_ranks_see(program: Program) -> None:
    # Messages that are waited for later cannot be traced, nor rows be counted, nor shapes be guessed that only the source knows.
    steps = [
        attrs.evolve(step, later=None)
        if step.operation in ("ring", "pair")
        else attrs.evolve(step, out=True)
        if step.operation in (*COUNTED, "scatter", "scatterv")
        else step
        for step in program.steps
    ]
    program = attrs.evolve(program, steps=tuple(steps))
    real = spmd(program, program.world_size)
    for rank in range(program.world_size):
        with fake_world(program.world_size, rank, device="cpu") as world, FakeTensorMode() as mode, fake_inputs(mode):
            assert described(program(world)) == described(real[rank])


@contextmanager
def fake_inputs(mode: FakeTensorMode) -> Iterator[None]:
    """Give programs fake tensors, which make theirs in a shelter from every mode."""
    make = TensorSpec.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorSpec, "make", lambda spec, seed: mode.from_tensor(make(spec, seed)))
        yield


def described(x: Any) -> Any:
    """Shapes, dtypes and whether they are contiguous in the place of tensors."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype, x.is_contiguous()
    return [described(y) for y in x] if isinstance(x, list | tuple) else x


class Stage(nn.Module):
    """What one rank runs of a Llama: the demo's blocks, with hidden states of a known size between the stages."""

    def __init__(self, config: LlamaConfig, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.whole, self.pp = ShardedLlama(config, ctx=ctx, dtype=torch.bfloat16), ctx.pp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        model, config = self.whole.model, self.whole.config
        cos, sin = rotary(torch.arange(tokens.shape[1], device=tokens.device), config)
        if self.pp.is_first_rank:
            x = model.embed_tokens(tokens)
        else:
            x = self.pp.recv((*tokens.shape, config.hidden_size), torch.bfloat16, device=tokens.device)
        cache = KVCache()
        for layer in model.layers.values():
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype), None, cache)
        if self.pp.is_last_rank:
            x = self.whole.lm_head(model.norm(x))
        else:
            self.pp.send(x)
        y: torch.Tensor = x
        return y


def test_a_whole_model_on_256_ranks_without_a_process() -> None:
    """A Llama of 70 billion parameters over dp=4, pp=8, tp=8, traced as its ranks would run it: 80 layers, of which each stage has ten."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128
    )
    layout = cg.Layout(256, dp=4, pp=8, tp=8)
    parameters = 0
    for rank in (0, 64 + 8 + 3, 255):
        with fake_world(256, rank, device="cpu") as world, FakeTensorMode(), torch.no_grad():
            ctx = world.context(layout, name="target")
            stage = Stage(config, ctx)
            tokens = torch.empty(2, 128, dtype=torch.int64)
            first, last = ctx.pp.is_first_rank, ctx.pp.is_last_rank
            calls: Counter[str] = Counter()
            with Calls(calls):  # type: ignore[no-untyped-call]  # torch's mode has no types
                out = stage(tokens)
            assert out.shape == ((2, 128, 128256) if last else (2, 128, 8192))
            expected = Counter(all_reduce=20 + first, send=not last, recv=not first, all_gather=last)
            assert calls == expected, (rank, calls)
            # The same from the graph of an export.
            graph = torch.export.export(stage, (tokens,)).graph
            found = Counter(node.target.name().split("::")[1] for node in graph.nodes if "commgraph" in str(node.target))
            assert found == +expected
            parameters += sum(p.numel() for p in stage.parameters()) * 8 * (6 if rank not in (0, 255) else 1)
    assert 69e9 < parameters < 72e9


class Calls(TorchDispatchMode):
    """Counts the operators of commgraph."""

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "commgraph":
            self.calls[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def test_real_tensors_and_objects_of_peers_are_refused() -> None:
    with fake_world(4, 1) as world:
        tp = world.context(cg.Layout(4, tp=4), name="a").tp
        for call in (tp.all_reduce, tp.all_gather, tp.send):
            with pytest.raises(cg.UnsupportedTensorError, match="has data, and there are no peers"):
                call(torch.ones(3))
        receives: list[Callable[[], Any]] = [lambda: tp.recv_object(0), lambda: tp.broadcast_object(None, 0)]
        for receive in receives:
            with pytest.raises(cg.BackendUnavailableError, match="there is no such peer"):
                receive()
        with pytest.raises(cg.UnsupportedTensorError, match="x is None, and no peer gives its shape"):
            tp.scatter(None, 0)
        assert tp.broadcast_object("mine", 1) == "mine"
        tp.send_object("lost", 2)
        # Nothing of it did any harm.
        assert tp.all_reduce(torch.empty(3, device="meta")).shape == (3,)
        assert "shapes only" in tp.communicator("fake").describe()
    with pytest.raises(cg.LaunchError, match="rank=4 of world_size=4"):
        fake_world(4, 4)
    with pytest.raises(cg.ContextClosedError):
        tp.all_reduce(torch.empty(3, device="meta"))


def test_a_world_of_a_hundred_thousand_ranks_costs_nothing() -> None:
    started = time.thread_time()
    world = fake_world(100_000, 77_777)
    context = world.context(cg.Layout(100_000, dp=125, pp=10, tp=8), name="a")
    assert context.tp.all_gather(torch.empty(2, device="meta")).shape == (16,)
    assert world.split([3, 77_777]).rank == 1
    assert time.thread_time() - started < 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del world, context
        gc.collect()
