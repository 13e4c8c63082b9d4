"""The life of a model of parallel layers: made, loaded from a checkpoint and given back, copied, moved to another context."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import commgraph as cg
from commgraph.nn import (
    ColumnParallelLinear,
    LoadReport,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_state_dict,
    load_full_state_dict,
    rebind,
)
from commgraph.testing import spmd
from tests.helpers import on_ctx

LLAMA = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class Block(nn.Module):
    def __init__(self, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(6, 2, 4, 2, ctx=ctx)
        self.o_proj = RowParallelLinear(8, 6, ctx=ctx)
        self.gate_up_proj = MergedColumnParallelLinear(6, [8, 4], False, ctx=ctx)
        self.norm = nn.LayerNorm(6)


class Model(nn.Module):
    """One block between embedding and head; it keeps its context, and one of its groups, as models do."""

    def __init__(self, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.ctx, self.tp = ctx, ctx.tp
        self.embed_tokens = VocabParallelEmbedding(9, 6, ctx=ctx)
        self.layers = nn.ModuleList([Block(ctx)])
        self.lm_head = ParallelLMHead(9, 6, ctx=ctx)
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.tp.all_reduce(self.embed_tokens(ids).detach()))
        return y


SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (9, 6),
    "layers.0.q_proj.weight": (8, 6),
    "layers.0.q_proj.bias": (8,),
    "layers.0.k_proj.weight": (4, 6),
    "layers.0.k_proj.bias": (4,),
    "layers.0.v_proj.weight": (4, 6),
    "layers.0.v_proj.bias": (4,),
    "layers.0.o_proj.weight": (6, 8),
    "layers.0.o_proj.bias": (6,),
    "layers.0.gate_proj.weight": (8, 6),
    "layers.0.up_proj.weight": (4, 6),
    "layers.0.norm.weight": (6,),
    "layers.0.norm.bias": (6,),
    "lm_head.weight": (9, 6),
    "scale": (),
}
CHECKPOINT = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (name, shape) in enumerate(SHAPES.items())}


# Making.


def test_one_seed_gives_the_weights_of_the_unsharded_layer_on_any_number_of_ranks() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        linear, embedding = nn.Linear(6, 24), nn.Embedding(7, 6)
    turn = threading.Lock()  # torch's default generator is one for all threads

    def run(ctx: cg.ParallelContext) -> None:
        with turn, torch.random.fork_rng():
            for make in (
                lambda: ColumnParallelLinear(6, 24, ctx=ctx),
                lambda: RowParallelLinear(6, 24, ctx=ctx) if ctx.tp.world_size < 4 else ColumnParallelLinear(6, 24, ctx=ctx),
                lambda: MergedColumnParallelLinear(6, [8, 16], ctx=ctx),
                lambda: QKVParallelLinear(6, 3, 4, 2, ctx=ctx),
            ):
                torch.manual_seed(3)
                layers: list[ParallelLayer] = [make(), VocabParallelEmbedding(7, 6, ctx=ctx)]
                copies = [deepcopy(layer) for layer in layers]
                for copy, source in zip(copies, (linear, embedding), strict=True):
                    for name in copy.cuts:
                        copy.load_full(getattr(source, name), parameter=name)
                for layer, copy in zip(layers, copies, strict=True):
                    for name, parameter in layer.named_parameters():
                        assert torch.equal(parameter, copy.get_parameter(name)), (layer, name)

    for tp in (1, 2, 4):
        on_ctx(tp, run)


def test_sizes_that_do_not_divide() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        wrong: dict[str, Callable[[], object]] = {
            r"ColumnParallelLinear\(out_features=10\): 10 is not a multiple of 4, the size of group 'tp' of context 'a'": (
                lambda: ColumnParallelLinear(8, 10, ctx=ctx)
            ),
            r"RowParallelLinear\(in_features=6\)": lambda: RowParallelLinear(6, 8, ctx=ctx),
            r"MergedColumnParallelLinear\(output_sizes\[1\]=6\)": lambda: MergedColumnParallelLinear(8, [8, 6], ctx=ctx),
            r"blocks=3\): out_features must be a multiple of blocks, and blocks a multiple or a divisor of 4": (
                lambda: ColumnParallelLinear(8, 12, blocks=3, ctx=ctx)
            ),
            r"out_features=10, blocks=4": lambda: ColumnParallelLinear(8, 10, blocks=4, ctx=ctx),
            "at least one size": lambda: MergedColumnParallelLinear(8, [], ctx=ctx),
            r"QKVParallelLinear\(num_heads=6\)": lambda: QKVParallelLinear(8, 2, 6, ctx=ctx),
            r"QKVParallelLinear\(num_kv_heads=6\)": lambda: QKVParallelLinear(8, 2, 12, 6, ctx=ctx),
            r"num_heads=8, num_kv_heads=3": lambda: QKVParallelLinear(8, 2, 8, 3, ctx=ctx),
            "num_kv_heads=0": lambda: QKVParallelLinear(8, 2, 8, 0, ctx=ctx),
            "bias in each would be added": lambda: RowParallelLinear(8, 8, reduce_results=False, ctx=ctx),
        }
        for match, make in wrong.items():
            with pytest.raises(cg.ConfigurationError, match=match):
                make()
        with pytest.raises(TypeError, match=r"takes a ParallelContext, not a GroupCoordinator; .*group='ep'"):
            ColumnParallelLinear(8, 8, ctx=ctx.tp)
        with pytest.raises(ValueError, match=r"RowParallelLinear\(in_features=8.*x \(3, 8\) must end in 2 features"):
            RowParallelLinear(8, 8, ctx=ctx)(torch.ones(3, 8))

    on_ctx(4, run)


def test_what_a_layer_prints() -> None:
    def run(ctx: cg.ParallelContext) -> list[str]:
        layers = ColumnParallelLinear(4, 8, ctx=ctx), RowParallelLinear(4, 8, ctx=ctx), VocabParallelEmbedding(9, 4, ctx=ctx)
        return [repr(layer) for layer in layers]

    assert on_ctx(2, run)[1] == [
        "ColumnParallelLinear(in_features=4, out_features=8, bias=True, gather_output=False, group='tp' 1/2)",
        "RowParallelLinear(in_features=4, out_features=8, bias=True, input_is_parallel=True, reduce_results=True, group='tp' 1/2)",
        "VocabParallelEmbedding(9, 4, group='tp' 1/2)",
    ]


# Loading.


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_checkpoint_goes_in_and_comes_back(tp: int) -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = Model(ctx)
        assert load_full_state_dict(model, CHECKPOINT, mapping=LLAMA) == LoadReport((), ())
        back = full_state_dict(model, mapping=LLAMA)
        assert back.keys() == CHECKPOINT.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in CHECKPOINT.items())
        fused = full_state_dict(model)  # without a mapping what is fused stays so, and loads so
        qkv = [CHECKPOINT[f"layers.0.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(fused["layers.0.qkv_proj.weight"], torch.cat(qkv))
        other = Model(ctx)
        load_full_state_dict(other, fused)
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())

    on_ctx(tp, run)


def test_each_tensor_is_read_once_and_converted() -> None:
    class Reader(Mapping[str, Tensor]):
        def __init__(self) -> None:
            self.reads: list[str] = []

        def __getitem__(self, name: str) -> Tensor:
            self.reads.append(name)
            return CHECKPOINT[name].double()

        def __iter__(self) -> Iterator[str]:
            return iter(CHECKPOINT)

        def __len__(self) -> int:
            return len(CHECKPOINT)

    def run(ctx: cg.ParallelContext) -> None:
        model, reader = Model(ctx).bfloat16(), Reader()
        load_full_state_dict(model, reader, mapping=LLAMA)
        assert reader.reads == list(CHECKPOINT)
        full = full_state_dict(model, mapping=LLAMA)
        assert all(torch.equal(full[name], tensor.bfloat16()) for name, tensor in CHECKPOINT.items())

    on_ctx(2, run)


def test_names_that_do_not_fit_raise_before_anything_is_loaded() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = Model(ctx)
        before = deepcopy(model.state_dict())
        wrong = {name: tensor for name, tensor in CHECKPOINT.items() if "k_proj" not in name} | {"rotary.inv_freq": torch.ones(3)}
        message = r"Missing: layers.0.qkv_proj.weight\[k\], layers.0.qkv_proj.bias\[k\]. Unexpected: rotary.inv_freq"
        with pytest.raises(cg.ConfigurationError, match=message):
            load_full_state_dict(model, wrong, mapping=LLAMA)
        with pytest.raises(cg.ConfigurationError, match=r"Unexpected: layers.0.q_proj.weight"):
            load_full_state_dict(model, CHECKPOINT)
        twice = CHECKPOINT | {"layers.0.qkv_proj.weight": torch.ones(16, 6), "layers.0.w1.weight": torch.ones(8, 6)}
        with pytest.raises(cg.ConfigurationError, match=r"'layers.0.gate_proj.weight' and 'layers.0.w1.weight' would both .*weight\[0\]"):
            load_full_state_dict(model, twice, mapping=LLAMA | {"w1": ("gate_up_proj", 0)})
        with pytest.raises(cg.ConfigurationError, match=r"Unexpected: layers.0.up_proj.weight"):
            load_full_state_dict(model, CHECKPOINT, mapping=LLAMA | {"up_proj": ("gate_up_proj", 2)})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        report = load_full_state_dict(model, wrong, mapping=LLAMA, strict=False)
        assert report == LoadReport(("layers.0.qkv_proj.weight[k]", "layers.0.qkv_proj.bias[k]"), ("rotary.inv_freq",))
        missing = load_full_state_dict(model, wrong, mapping=LLAMA | {"rotary": None}, strict=False)
        assert missing.unexpected == ()

    on_ctx(2, run)


def test_names_are_mapped_by_whole_parts() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = nn.ModuleDict({"layers": nn.ModuleList([Block(ctx)])})
        theirs = {f"transformer.{name.replace('layers', 'h')}": tensor for name, tensor in CHECKPOINT.items() if name.startswith("layers")}
        mapping = {"transformer.h": "layers", **LLAMA}
        load_full_state_dict(model, theirs, mapping=mapping)
        # "up_proj" is part of the word "gate_up_proj", which stays whole.
        assert load_full_state_dict(model, full_state_dict(model), mapping=mapping) == LoadReport((), ())
        back = full_state_dict(model, mapping=mapping)
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())

    on_ctx(2, run)


def test_tied_weights_need_to_be_there_once() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = nn.ModuleDict({"embed": VocabParallelEmbedding(9, 6, ctx=ctx), "head": ParallelLMHead(9, 6, ctx=ctx)})
        model["head"].weight = model["embed"].weight
        weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
        for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
            load_full_state_dict(model, dict.fromkeys(names, weight))
            assert all(torch.equal(tensor, weight) for tensor in full_state_dict(model).values())
        with pytest.raises(cg.ConfigurationError, match=r"Missing: embed.weight, head.weight\."):
            load_full_state_dict(model, {})

    on_ctx(2, run)


def test_wrong_tensors_say_what_was_expected_and_where() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        rank = ctx.rank
        qkv = QKVParallelLinear(6, 2, 4, 2, ctx=ctx)
        column = ColumnParallelLinear(6, 4, bias=False, ctx=ctx)
        wrong: dict[str, Callable[[], object]] = {
            rf"QKVParallelLinear.weight: the full tensor has shape \(4, 6\), got \(8, 6\) \(rank {rank} of 2 in the group\)": (
                lambda: qkv.load_full(torch.ones(8, 6), "k")
            ),
            r"shape \(16, 6\), got \(8, 6\).*the shape of one rank's share: .* load_state_dict": lambda: qkv.load_full(torch.ones(8, 6)),
            r"has no shard 'x': it has 'q', 'k', 'v'": lambda: qkv.load_full(torch.ones(8, 6), "x"),
            r"no shard 0: it has one piece only": lambda: column.load_full(torch.ones(4, 6), 0),
            r"no such parameter here, there is weight": lambda: column.load_full(torch.ones(4), parameter="bias"),
            rf"layers.0.qkv_proj.weight\[v\] on rank {rank}: the full tensor has shape \(4, 6\), got \(5, 6\)": lambda: (
                load_full_state_dict(Model(ctx), CHECKPOINT | {"layers.0.v_proj.weight": torch.ones(5, 6)}, mapping=LLAMA)
            ),
            r"layers.0.norm.weight: the full tensor has shape \(6,\), got \(1,\)": lambda: load_full_state_dict(
                Model(ctx), CHECKPOINT | {"layers.0.norm.weight": torch.ones(1)}, mapping=LLAMA
            ),
        }
        for match, load in wrong.items():
            with pytest.raises(cg.ConfigurationError, match=match):
                load()

    on_ctx(2, run)


def test_a_model_built_without_memory() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        with torch.device("meta"):
            model = Model(ctx)
        assert all(parameter.is_meta for parameter in model.parameters())
        with pytest.raises(cg.ConfigurationError, match=r"embed_tokens.weight.* is on the meta device .*to_empty"):
            load_full_state_dict(model, CHECKPOINT, mapping=LLAMA)
        model.to_empty(device="cpu")
        load_full_state_dict(model, CHECKPOINT, mapping=LLAMA)
        assert all(torch.equal(tensor, CHECKPOINT[name]) for name, tensor in full_state_dict(model, mapping=LLAMA).items())
        start, stop = model.lm_head.vocab_range
        assert not model.lm_head.weight[stop - start :].any()  # padding has no memory's leftovers in it

    on_ctx(2, run)


def test_copies_share_the_context_and_states_hold_shares_alone() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = Model(ctx)
        copy = deepcopy(model)
        assert copy.ctx is ctx
        assert copy.lm_head.group is ctx.tp
        assert copy.lm_head.weight is not model.lm_head.weight
        ids = torch.tensor([1, 8])
        assert torch.equal(copy(ids), model(ids))
        state = model.state_dict()
        assert state["lm_head.weight"].shape == (5, 6)
        assert not any("ctx" in name for name in state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = Model(ctx)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(ids), model(ids))
        with pytest.raises(TypeError, match=r"context 'a' holds connections.*save a model by its state_dict"):
            torch.save(model, io.BytesIO())

    on_ctx(2, run)


# Moving.


def contexts(world: cg.World, *names: str, **sizes: int) -> list[cg.ParallelContext]:
    return [world.context(cg.Layout(world.size, **sizes), name=name) for name in names]


def test_a_model_moves_to_another_context_of_the_same_layout() -> None:
    def run(world: cg.World) -> None:
        first, second = contexts(world, "first", "second", tp=2)
        model, ids = Model(first), torch.tensor([1, 8])
        before = model(ids)
        assert rebind(model, second) is model
        assert model.ctx is second
        assert model.tp is second.tp
        assert all(module.ctx is second for module in model.modules() if isinstance(module, ParallelLayer))
        first.close()
        assert torch.equal(model(ids), before)
        (third,) = contexts(world, "first", tp=2)
        assert rebind(model.lm_head, third).group is third.tp

    spmd(run, 2)


def test_a_model_does_not_move_where_ranks_sit_differently() -> None:
    def run(world: cg.World) -> None:
        (here,) = contexts(world, "here", tp=2)
        (there,) = contexts(world, "there", tp=2, pp=2)
        grouped = world.context(cg.Layout(4, tp=2, groups={"engine": ("dp", "tp")}), name="grouped")
        own = [
            world.context(cg.Layout.from_groups(4, {"tp": ranks}), name=f"own {ranks}") for ranks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
        ]
        model = Model(here)
        for new, message in (
            (there, r"'there' cannot take the place of 'here': replica=2 there and 1 here; pp=1 there and 2 here"),
            (grouped, r"group 'engine' is only here"),
            (own[0], r"the axes are replica, dp, pp, pcp, tp there and world here; group 'replica' is only there"),
        ):
            with pytest.raises(cg.LayoutMismatchError, match=message):
                rebind(model, new)
        with pytest.raises(cg.LayoutMismatchError, match="the tp groups are of other ranks"):
            rebind(ColumnParallelLinear(4, 4, ctx=own[0]), own[1])
        here.close()
        with pytest.raises(cg.ContextClosedError, match="'here'"):
            rebind(model, here)
        assert model.ctx is here
        assert all(module.ctx is here for module in model.modules() if isinstance(module, ParallelLayer))

    spmd(run, 4)


def test_a_model_with_several_contexts_moves_one_at_a_time() -> None:
    def run(world: cg.World) -> None:
        target, draft, other = contexts(world, "target", "draft", "other", tp=2)
        parts = {"target": Model(target), "draft": Model(draft)}
        model = nn.ModuleDict(parts)
        with pytest.raises(cg.ConfigurationError, match=r"or old= must say which.*'target'.* at 'target.ctx', .*'draft'.* at 'draft.ctx'"):
            rebind(model, other)
        with pytest.raises(cg.ConfigurationError, match=r"old=.*'other'.* is not in the model"):
            rebind(model, other, old=other)
        with pytest.raises(cg.ConfigurationError, match="it has: none"):
            rebind(nn.Linear(2, 2), other)
        rebind(model, other, old=draft)
        assert parts["target"].ctx is target
        assert parts["draft"].lm_head.ctx is other
        assert parts["draft"].tp is other.tp

    spmd(run, 2)


def test_of_a_file_each_rank_reads_its_part_alone(tmp_path: Path) -> None:
    save_file(CHECKPOINT, tmp_path / "model.safetensors")
    read: list[int] = []

    class Counting:
        def __init__(self, part: Any) -> None:
            self.get_shape, self.part = part.get_shape, part

        def __getitem__(self, index: Any) -> Tensor:
            got: Tensor = self.part[index]
            read.append(got.numel())
            return got

    def run(ctx: cg.ParallelContext) -> None:
        model = Model(ctx)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            load_full_state_dict(model, {name: Counting(file.get_slice(name)) for name in CHECKPOINT}, mapping=LLAMA)
            with pytest.raises(cg.ConfigurationError, match=r"o_proj.weight on rank \d: the full tensor has shape \(6, 8\), got \(6,\)"):
                load_full_state_dict(model, {"layers.0.o_proj.weight": file.get_slice("layers.0.o_proj.bias")}, strict=False)
        assert all(torch.equal(tensor, CHECKPOINT[name]) for name, tensor in full_state_dict(model, mapping=LLAMA).items())

    on_ctx(2, run)
    whole = ("norm", "o_proj.bias", "scale")  # on both ranks
    assert sum(read) == sum(tensor.numel() * (1 + any(part in name for part in whole)) for name, tensor in CHECKPOINT.items())
