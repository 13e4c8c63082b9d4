"""Sharded checkpoints: whatever ranks write, any other number of ranks reads."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import commgraph as cg
from commgraph.nn import (
    ColumnParallelLinear,
    ExpertParallelMLP,
    LocalShards,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_state_dict,
    load_full_state_dict,
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    save_checkpoint,
    sharded_optimizer_state_dict,
    sharded_parameters,
    sharded_state_dict,
)
from commgraph.testing import spmd
from tests.processes import PROGRAMS, Processes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # each rank reads by itself

APART = {
    "q_proj": ("qkv", "q"),
    "k_proj": ("qkv", "k"),
    "v_proj": ("qkv", "v"),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
}


class Counter(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


class Model(nn.Module):
    """Every kind of layer, tied weights, a norm and buffers."""

    def __init__(self, ctx: cg.ParallelContext, kv_heads: int = 2, vocabulary: int = 9, bias: bool = True) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(vocabulary, 6, ctx=ctx)
        self.norm = nn.LayerNorm(6)
        self.qkv = QKVParallelLinear(6, 2, 4, kv_heads, bias, ctx=ctx)
        self.out = RowParallelLinear(8, 6, bias, ctx=ctx)
        self.gate_up = MergedColumnParallelLinear(6, [8, 4], bias, ctx=ctx)
        self.column = ColumnParallelLinear(6, 12, bias, ctx=ctx)
        self.experts = ExpertParallelMLP(6, 3, 8, 2, ctx=ctx)
        self.head = ParallelLMHead(vocabulary, 6, ctx=ctx)
        self.head.weight = self.embed.weight
        self.counter = Counter()
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def filled(full: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the names and shapes of `full`; tied ones equal."""
    made: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(full.items()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        made[name] = made["embed.weight"] if name == "head.weight" else torch.randn(tensor.shape, generator=generator)
    return made


def reading(state: dict[str, Any], folder: Path, turn: threading.Lock) -> None:
    with turn:  # torch.distributed.checkpoint keeps a version in a module
        dcp.load(state, checkpoint_id=folder)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.sampled_from([(1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (1, 4), (2, 2)]),
    kv_heads=st.sampled_from([1, 2, 4]),
    vocabulary=st.integers(5, 13),
    bias=st.booleans(),
    apart=st.booleans(),
    dp=st.booleans(),
)
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int], kv_heads: int, vocabulary: int, bias: bool, apart: bool, dp: bool
) -> None:
    folder, turn = tmp_path_factory.mktemp("checkpoint"), threading.Lock()
    mapping = APART if apart else None
    before, after = sizes

    def save(world: cg.World) -> dict[str, Tensor]:
        ctx = world.context(cg.Layout(world.size, tp=before, dp=world.size // before), name="a")
        model = Model(ctx, kv_heads, vocabulary, bias)
        full = filled(full_state_dict(model))
        load_full_state_dict(model, full)
        model.counter.steps = 7
        save_checkpoint({"model": sharded_state_dict(model, mapping=mapping)}, folder, world.group)
        return full

    def load(world: cg.World) -> dict[str, Tensor]:
        ctx = world.context(cg.Layout(world.size, tp=after, dp=world.size // after), name="b")
        model = Model(ctx, kv_heads, vocabulary, bias)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        state = {"model": sharded_state_dict(model, mapping=mapping)}
        reading(state, folder, turn)
        load_sharded_state_dict(model, state["model"], mapping=mapping)
        assert model.counter.steps == 7
        assert not any(parameter.isnan().any() for parameter in model.parameters())  # padding neither
        return full_state_dict(model)

    (expected, *_) = spmd(save, before * (1 + dp))
    for full in spmd(load, after):
        assert full.keys() == expected.keys()
        assert all(torch.equal(full[name], expected[name]) for name in full)
    # An unsharded reader sees the full tensors, each once.
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {name.removeprefix("model."): tuple(entry.size) for name, entry in metadata.items() if hasattr(entry, "size")}
    if not apart:
        assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    else:
        assert shapes["q_proj.weight"] == (8, 6)
        assert shapes["up_proj.weight"] == (4, 6)
        assert not any(name.startswith(("qkv.", "gate_up.")) for name in shapes)


def stages(world: cg.World, pp: int, tp: int, name: str) -> tuple[nn.ModuleDict, dict[str, str]]:
    """A stage of two linear layers, numbered from 0 on each, and the tied embedding and head on the first and last."""
    ctx = world.context(cg.Layout(world.size, pp=pp, tp=tp), name=name)
    stage, per = ctx.pp.rank_in_group, 4 // pp
    layers = [ColumnParallelLinear(4, 8, gather_output=True, ctx=ctx) for _ in range(per)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    if ctx.pp.first_rank == ctx.rank:
        model["embed"] = VocabParallelEmbedding(9, 4, ctx=ctx)
    if ctx.pp.last_rank == ctx.rank:
        model["head"] = ParallelLMHead(9, 4, ctx=ctx)
    if pp == 1:
        model["head"].weight = model["embed"].weight
    return model, {f"layers.{stage * per + number}": f"layers.{number}" for number in range(per)} if stage else {}


def test_stages_of_a_pipeline_and_weights_tied_across_it(tmp_path: Path) -> None:
    turn = threading.Lock()

    def save(world: cg.World) -> None:
        model, mapping = stages(world, 2, 2, "a")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(world.rank + 10 * ("embed" in name or "head" in name))
        save_checkpoint(sharded_state_dict(model, mapping=mapping), tmp_path, world.group)

    def load(world: cg.World, pp: int, tp: int) -> dict[str, Tensor]:
        model, mapping = stages(world, pp, tp, "b")
        state = sharded_state_dict(model, mapping=mapping)
        reading(state, tmp_path, turn)
        load_sharded_state_dict(model, state, mapping=mapping)
        return full_state_dict(model, mapping=mapping)

    spmd(save, 4)
    (whole,) = spmd(lambda world: load(world, 1, 1), 1)
    for layer in range(4):  # layers 0 and 1 were on ranks 0 and 1, layers 2 and 3 on ranks 2 and 3; 4 of 8 features on each
        ranks = torch.tensor([0.0, 1.0] if layer < 2 else [2.0, 3.0])
        assert torch.equal(whole[f"layers.{layer}.bias"], ranks.repeat_interleave(4))
    assert torch.equal(whole["head.weight"], whole["embed.weight"])  # one tensor, loaded under both names
    for full in spmd(lambda world: load(world, 4, 1), 4):
        assert all(torch.equal(tensor, whole[name]) for name, tensor in full.items() if name != "embed.weight")


def test_two_contexts_in_one_model(tmp_path: Path) -> None:
    turn = threading.Lock()

    def make(world: cg.World, first: int, second: int) -> nn.ModuleDict:
        contexts = [world.context(cg.Layout(world.size, tp=tp, dp=world.size // tp), name=str(i)) for i, tp in enumerate((first, second))]
        return nn.ModuleDict({"target": Model(contexts[0]), "draft": Model(contexts[1], 1)})

    def save(world: cg.World) -> dict[str, Tensor]:
        model = make(world, 4, 2)
        full = {
            f"{part}.{name}": tensor for part in model for name, tensor in filled(full_state_dict(model[part]), part == "draft").items()
        }
        load_full_state_dict(model, full)
        save_checkpoint(sharded_state_dict(model), tmp_path, world.group)
        return full

    def load(world: cg.World) -> dict[str, Tensor]:
        model = make(world, 1, 2)
        state = sharded_state_dict(model)
        reading(state, tmp_path, turn)
        load_sharded_state_dict(model, state)
        return full_state_dict(model)

    (expected, *_) = spmd(save, 4)
    for full in spmd(load, 2):
        assert all(torch.equal(full[name], tensor) for name, tensor in expected.items())


def steps(model: Model, optimizer: torch.optim.Optimizer, full_gradients: dict[str, Tensor], count: int) -> None:
    """Optimizer steps with gradients given for the full tensors, so that nothing but the layout differs between ranks."""
    for _ in range(count):
        for name, parameter in model.named_parameters():
            layer, _, last = name.rpartition(".")
            module = model.get_submodule(layer)
            parameter.grad = torch.zeros_like(parameter)
            if isinstance(module, ParallelLayer) and last in module.cuts:
                module.cuts[last].fill(parameter.grad, full_gradients[name], what=name)
            else:
                parameter.grad.copy_(full_gradients[name])
        optimizer.step()


def test_the_state_of_optimizers(tmp_path: Path) -> None:
    turn = threading.Lock()

    def make(world: cg.World, tp: int) -> tuple[Model, torch.optim.Optimizer]:
        model = Model(world.context(cg.Layout(world.size, tp=tp), name="a"))
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        return model, torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01)

    def train(world: cg.World, tp: int, count: int, *, save: bool = False, load: bool = False) -> dict[str, Tensor]:
        model, optimizer = make(world, tp)
        load_full_state_dict(model, values := filled(full_state_dict(model)))
        gradients = filled(values, 1)
        if load:
            with turn:
                state = {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}
                dcp.load(state, checkpoint_id=tmp_path)
                load_sharded_state_dict(model, state["model"])
                load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
        steps(model, optimizer, gradients, count)
        if save:
            state = {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}
            assert isinstance(state["optimizer"]["state.qkv.weight.exp_avg"], LocalShards)
            save_checkpoint(state, tmp_path, world.group)
        return full_state_dict(model)

    (expected,) = spmd(lambda world: train(world, 1, 5), 1)
    spmd(lambda world: train(world, 4, 3, save=True), 4)
    for tp in (1, 2):
        for full in spmd(partial(train, tp=tp, count=2, load=True), tp):
            for name, tensor in full.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_state_of_a_weight_tied_on_one_stage_is_found_by_two(tmp_path: Path) -> None:
    turn = threading.Lock()

    def make(world: cg.World, pp: int) -> tuple[nn.ModuleDict, torch.optim.Optimizer, dict[str, Any]]:
        model = stages(world, pp, 1, "a")[0]
        model.pop("layers")  # their names differ by stage; those of embedding and head do not
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5 + pp, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(pp))
        optimizer.step()
        return model, optimizer, sharded_optimizer_state_dict(model, optimizer)

    def save(world: cg.World, pp: int) -> None:
        save_checkpoint(make(world, pp)[2], tmp_path / str(pp), world.group)

    def load(world: cg.World, saved: int, pp: int) -> None:
        model, optimizer, state = make(world, pp)
        reading(state, tmp_path / str(saved), turn)
        load_sharded_optimizer_state_dict(model, optimizer, state)
        for parameter in model.parameters():
            assert bool((optimizer.state[parameter]["momentum_buffer"] == saved).all())
        assert optimizer.param_groups[0]["lr"] == 0.5 + saved

    for saved, pp in ((1, 2), (2, 1)):
        spmd(partial(save, pp=saved), saved)
        spmd(partial(load, saved=saved, pp=pp), pp)


def test_a_state_that_has_no_full_tensor_is_refused() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        layer = nn.Sequential(ColumnParallelLinear(4, 8, ctx=ctx))
        optimizer = torch.optim.Adafactor(layer.parameters())
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        with pytest.raises(cg.ConfigurationError, match=r"state\.0\.weight\.\w+_var has shape .* cannot be saved"):
            sharded_optimizer_state_dict(layer, optimizer)

    spmd(run, 2)


def test_shards_are_refused_by_torch_where_it_would_take_them_for_copies(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.planner import SavePlan

    def plan(state: dict[str, Any]) -> SavePlan:
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(state, None, True)
        return planner.create_local_plan()

    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        model = Model(ctx)
        changes: tuple[Callable[[], Any], ...] = (
            lambda: model,
            lambda: deepcopy(model),
            lambda: model.to(torch.float64),
            partial(model.to_empty, device="cpu"),
            lambda: (model.load_state_dict(deepcopy(model.state_dict()), assign=True), model)[1],
        )
        for change in changes:
            changed = change()
            for state in (changed.state_dict(), dict(changed.named_parameters())):
                with pytest.raises(cg.ConfigurationError, match=r"embed.weight: one rank's shard .*sharded_state_dict"):
                    plan(state)
        # Without a default group torch's saving would be that of one process.
        with pytest.raises(cg.ConfigurationError, match=r"without a default process group.*save_checkpoint"):
            plan(sharded_state_dict(model))
        # Replicated tensors and a group of one rank are as they were.
        assert len(plan({"router": model.state_dict()["experts.router"]}).items) == 1
        alone = world.split([world.rank]).context(cg.Layout(1), name="alone")
        assert len(plan(Model(alone).state_dict()).items) == len(Model(alone).state_dict())
        # Pickles are plain.
        load_full_state_dict(model, filled(full_state_dict(model)))  # to_empty left anything, NaN too
        file = io.BytesIO()
        torch.save([model.state_dict(), list(model.parameters())], file)
        file.seek(0)
        state, _ = torch.load(file)
        assert torch.equal(state["embed.weight"], model.embed.weight)
        assert state["embed.weight"].__dict__ == {}

    spmd(run, 2)


def test_local_shards_are_copied_and_nothing_else() -> None:
    def run(world: cg.World) -> None:
        model = Model(world.context(cg.Layout(world.size, tp=world.size), name="a"), vocabulary=5)
        state = sharded_state_dict(model)
        weight = state["qkv.weight"]
        assert weight.shape == (16, 6)
        assert state["embed.weight"].shape == (5, 6)
        copies: list[Any] = [weight.clone(), deepcopy(weight), weight.to(torch.float64), torch.zeros_like(weight).copy_(weight)]
        for copy in copies:
            assert copy.boxes == weight.boxes
            assert all(torch.equal(mine.to(theirs.dtype), theirs) for mine, theirs in zip(copy.tensors, weight.tensors, strict=True))
            assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in zip(copy.tensors, weight.tensors, strict=True))
        for operation in (lambda: torch.add(weight, 1), lambda: weight[0], weight.sum, lambda: weight.copy_(torch.ones(16, 6))):
            with pytest.raises(TypeError, match=r"LocalShards\(\(16, 6\)"):
                operation()
        file = io.BytesIO()
        torch.save(weight, file)
        file.seek(0)
        assert torch.load(file, weights_only=False).boxes == weight.boxes
        # A copy in other memory is loaded, one of other boxes and a full tensor are not.
        copied = {name: deepcopy(value) for name, value in state.items()}
        for value in copied.values():
            for tensor in value.tensors if isinstance(value, LocalShards) else [value] if isinstance(value, Tensor) else []:
                tensor.fill_(3)
        load_sharded_state_dict(model, copied)
        assert all(bool((tensor == 3).all()) for tensor in full_state_dict(model).values())
        start, stop = model.head.vocab_range
        assert not model.head.weight[stop - start :].any()
        with pytest.raises(cg.ConfigurationError, match=r"column.weight: LocalShards.* the state has a Tensor .*load_full_state_dict"):
            load_sharded_state_dict(model, state | {"column.weight": torch.ones(12, 6)})
        with pytest.raises(cg.ConfigurationError, match=r"Missing: column.weight. Unexpected: more"):
            load_sharded_state_dict(model, {k: v for k, v in state.items() if k != "column.weight"} | {"more": 1})
        # A tied weight may be there once.
        assert load_sharded_state_dict(model, {k: v for k, v in state.items() if k != "head.weight"}).missing == ()

    spmd(run, 4)


def test_a_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    class Full(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            raise OSError("no space left")

    def run(world: cg.World) -> str:
        state = sharded_state_dict(Model(world.context(cg.Layout(2, tp=2), name="a")))
        writer = Full(tmp_path) if world.rank else dcp.FileSystemWriter(tmp_path)
        with pytest.raises((cg.CollectiveError, OSError)) as caught:
            save_checkpoint(state, writer, world.group)
        assert world.group.all_reduce(torch.ones(1)).item() == 2  # the group goes on
        return str(caught.value)

    assert spmd(run, 2) == ["save_checkpoint on rank 0 over group 'world': rank 1: OSError: no space left", "no space left"]


def test_what_is_sharded_and_how() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(4, tp=2, dp=2), name="a")
        model = Model(ctx)
        found = sharded_parameters(model)
        assert {(name, one.group.name, one.dim, one.full_shape) for name, one in found.items() if "weight" in name or "proj" in name} == {
            ("embed.weight", "tp", 0, (9, 6)),
            ("head.weight", "tp", 0, (9, 6)),
            ("qkv.weight", "tp", 0, (16, 6)),
            ("out.weight", "tp", 1, (6, 8)),
            ("gate_up.weight", "tp", 0, (12, 6)),
            ("column.weight", "tp", 0, (12, 6)),
            ("experts.gate_up_proj", "ep", 0, (8, 6, 6)),
            ("experts.down_proj", "ep", 0, (8, 6, 3)),
        }
        assert "norm.weight" not in found
        assert "out.bias" not in found
        assert "experts.router" not in found
        assert found["column.weight"].parameter is model.column.weight

    spmd(run, 4)


def test_torch_saves_and_loads_in_processes(tmp_path: Path, processes: Processes) -> None:
    """Under a default group: between tp=2 with fully_shard, tp=4 and tp=1, asynchronously, and what is refused."""
    assert processes.launch(4, PROGRAMS / "checkpoints.py", tmp_path, timeout=170) == ["done\n", "", "", ""]
