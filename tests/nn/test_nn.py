"""The layers of `commgraph.nn`: outputs and gradients of the unsharded layers, on any number of ranks."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import commgraph as cg
from commgraph.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_state_dict,
    load_full_state_dict,
)
from commgraph.nn.functional import gather_from, reduce_scatter_to, scatter_to
from commgraph.testing import spmd
from tests.helpers import normal, on_ctx

TP = pytest.mark.parametrize("tp", [1, 2, 4])
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Maker(Protocol):
    """What makes a model of a context, be it a function, a class or a partial of one."""

    def __call__(self, *, ctx: cg.ParallelContext) -> nn.Module: ...


def check(tp: int, make: Maker, whole: nn.Module, x: Tensor, mapping: Any = None) -> None:
    """Output, gradient of x and the full gradient of every parameter are those of `whole`; the state survives the way there and back."""
    state = whole.state_dict()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = whole(leaf)
    weights = normal(*y.shape, seed=99).to(y.dtype)  # so that no two gradients are equal
    (y * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters(remove_duplicate=False)}

    def run(ctx: cg.ParallelContext) -> None:
        model = make(ctx=ctx)
        load_full_state_dict(model, state, mapping=mapping)
        full = full_state_dict(model, mapping=mapping)
        assert full.keys() == state.keys()
        for name, tensor in full.items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
        mine = x.clone().requires_grad_(x.is_floating_point())
        result = model(mine)
        close(result, y)
        (result * weights).sum().backward()
        if x.is_floating_point():
            close(mine.grad, leaf.grad)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
        for name, gradient in full_state_dict(model, mapping=mapping).items():
            close(gradient, gradients[name])

    on_ctx(tp, run)


SHAPES = pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@TP
@SHAPES
def test_column(tp: int, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    for bias in (True, False):
        whole = nn.Linear(8, 12, bias=bias, dtype=torch.float64)
        check(tp, partial(ColumnParallelLinear, 8, 12, bias, True, dtype=torch.float64), whole, x)


@TP
@SHAPES
def test_row(tp: int, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    for bias in (True, False):
        whole = nn.Linear(8, 5, bias=bias, dtype=torch.float64)
        check(tp, partial(RowParallelLinear, 8, 5, bias, input_is_parallel=False, dtype=torch.float64), whole, x)


@DTYPES
def test_dtypes(dtype: torch.dtype) -> None:
    x = normal(3, 8, dtype=dtype)
    check(2, lambda ctx: ColumnParallelLinear(8, 4, ctx=ctx, gather_output=True, dtype=dtype), nn.Linear(8, 4, dtype=dtype), x)
    check(4, lambda ctx: RowParallelLinear(8, 4, ctx=ctx, input_is_parallel=False, dtype=dtype), nn.Linear(8, 4, dtype=dtype), x)
    check(4, lambda ctx: VocabParallelEmbedding(7, 4, ctx=ctx, dtype=dtype), nn.Embedding(7, 4, dtype=dtype), torch.arange(7))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((1, 2, 4)), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.booleans())
def test_merged_columns_keep_the_order_of_the_pieces(tp: int, features: int, counts: list[int], bias: bool) -> None:
    sizes = [tp * count for count in counts]
    whole = nn.Linear(features, sum(sizes), bias=bias, dtype=torch.float64)
    check(
        tp,
        lambda ctx: MergedColumnParallelLinear(features, sizes, ctx=ctx, bias=bias, gather_output=True, dtype=torch.float64),
        whole,
        normal(3, features),
    )


class Attention(nn.Module):
    """Unsharded, with the names of a Llama checkpoint."""

    def __init__(self, heads: int, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, heads * 4, bias=bias, dtype=torch.float64)
        self.k_proj = nn.Linear(8, kv_heads * 4, bias=bias, dtype=torch.float64)
        self.v_proj = nn.Linear(8, kv_heads * 4, bias=bias, dtype=torch.float64)
        self.o_proj = nn.Linear(heads * 4, 8, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return y


class ShardedAttention(nn.Module):
    def __init__(self, heads: int, kv_heads: int, bias: bool, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(8, 4, heads, kv_heads, bias, ctx=ctx, dtype=torch.float64)
        self.o_proj = RowParallelLinear(heads * 4, 8, bias, ctx=ctx, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        assert self.qkv_proj.local_sizes == [4 * self.qkv_proj.local_num_heads] + 2 * [4 * self.qkv_proj.local_num_kv_heads]
        y: Tensor = self.o_proj(attend(*self.qkv_proj(x).split(self.qkv_proj.local_sizes, dim=-1)))
        return y


def attend(*qkv: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(-3, -2) for y in qkv)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(-3, -2).flatten(-2)


class SeparateAttention(nn.Module):
    """With three projections by themselves."""

    def __init__(self, heads: int, kv_heads: int, bias: bool, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.q_proj = ColumnParallelLinear(8, heads * 4, bias, ctx=ctx, blocks=heads, dtype=torch.float64)
        self.k_proj = ColumnParallelLinear(8, kv_heads * 4, bias, ctx=ctx, blocks=kv_heads, dtype=torch.float64)
        self.v_proj = ColumnParallelLinear(8, kv_heads * 4, bias, ctx=ctx, blocks=kv_heads, dtype=torch.float64)
        self.o_proj = RowParallelLinear(heads * 4, 8, bias, ctx=ctx, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return y


QKV = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}


@TP
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_attention_with_its_key_value_heads_cut_or_copied(tp: int, kv_heads: int, bias: bool) -> None:
    check(tp, lambda ctx: ShardedAttention(8, kv_heads, bias, ctx), Attention(8, kv_heads, bias), normal(2, 5, 8), QKV)


@TP
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_projections_by_themselves_cut_by_heads(tp: int, kv_heads: int) -> None:
    check(tp, lambda ctx: SeparateAttention(8, kv_heads, True, ctx), Attention(8, kv_heads, True), normal(2, 5, 8))
    gathered = partial(ColumnParallelLinear, 6, kv_heads * 3, gather_output=True, blocks=kv_heads, dtype=torch.float64)
    check(tp, gathered, nn.Linear(6, kv_heads * 3, dtype=torch.float64), normal(3, 6))


@TP
def test_a_padding_token_has_no_vector_and_no_gradient(tp: int) -> None:
    ids = torch.tensor([[0, 4, 8], [4, 4, 2]])
    for padding in (0, 4, -1):
        whole = nn.Embedding(9, 6, padding, dtype=torch.float64)
        check(tp, partial(VocabParallelEmbedding, 9, 6, padding, dtype=torch.float64), whole, ids)

    def run(ctx: cg.ParallelContext) -> None:
        drawn = full_state_dict(VocabParallelEmbedding(9, 6, -2, ctx=ctx))["weight"]
        assert not drawn[7].any()
        assert drawn[6].any()
        for padding in (9, -10):
            with pytest.raises(cg.ConfigurationError, match="out of range"):
                VocabParallelEmbedding(9, 6, padding, ctx=ctx)

    on_ctx(tp, run)


@TP
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_qkv_gathered(tp: int, kv_heads: int) -> None:
    whole = nn.Linear(6, (4 + 2 * kv_heads) * 3, dtype=torch.float64)
    check(tp, lambda ctx: QKVParallelLinear(6, 3, 4, kv_heads, gather_output=True, ctx=ctx, dtype=torch.float64), whole, normal(3, 6))


def test_copies_of_a_key_value_head_stay_equal_in_training() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        model = ShardedAttention(8, 2, True, ctx)
        for layer in (model.qkv_proj, model.o_proj):
            layer.reset_parameters(generator())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            model(normal(5, 8, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        kv = model.qkv_proj.weight.detach()[model.qkv_proj.local_sizes[0] :]
        copies = ctx.tp.all_gather(kv, 0).chunk(4)
        assert torch.equal(copies[0], copies[1])
        assert torch.equal(copies[2], copies[3])
        assert not torch.equal(copies[0], copies[2])

    on_ctx(4, run)


@TP
def test_a_gated_mlp(tp: int) -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(6, 8).double(), nn.Linear(6, 8).double()
            self.down_proj = nn.Linear(8, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return y

    class ShardedMLP(nn.Module):
        def __init__(self, ctx: cg.ParallelContext) -> None:
            super().__init__()
            self.gate_up_proj = MergedColumnParallelLinear(6, [8, 8], ctx=ctx, dtype=torch.float64)
            self.down_proj = RowParallelLinear(8, 6, ctx=ctx, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            y: Tensor = self.down_proj(F.silu(gate) * up)
            return y

    mapping = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    check(tp, ShardedMLP, MLP(), normal(2, 3, 6), mapping)


@TP
@pytest.mark.parametrize("vocabulary", [1, 5, 8, 13])
def test_embedding_and_head_with_cross_entropy(tp: int, vocabulary: int) -> None:
    ids = torch.randint(vocabulary, (3, 4), generator=generator())

    class Loss(nn.Module):
        def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.embedding, self.head = embedding, head

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.head(self.embedding(ids).tanh())
            assert logits.shape == (*ids.shape, vocabulary)
            return F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 0).flatten(), reduction="none")

    def sharded(ctx: cg.ParallelContext) -> nn.Module:
        embedding = VocabParallelEmbedding(vocabulary, 6, ctx=ctx, dtype=torch.float64)
        return Loss(embedding, ParallelLMHead(vocabulary, 6, bias, ctx=ctx, dtype=torch.float64))

    for bias in (False, True):
        whole = Loss(nn.Embedding(vocabulary, 6), nn.Linear(6, vocabulary, bias=bias)).double()
        check(tp, sharded, whole, ids)


@TP
def test_a_head_tied_to_its_embedding(tp: int) -> None:
    def tied(embedding: nn.Module, head: nn.Module) -> nn.Module:
        head.weight = embedding.weight
        return nn.Sequential(embedding, head)

    check(
        tp,
        lambda ctx: tied(VocabParallelEmbedding(7, 4, ctx=ctx, dtype=torch.float64), ParallelLMHead(7, 4, ctx=ctx, dtype=torch.float64)),
        tied(nn.Embedding(7, 4).double(), nn.Linear(4, 7, bias=False).double()),
        torch.tensor([[0, 6, 3], [5, 6, 1]]),
    )


@TP
def test_a_head_gives_its_own_logits_without_padding(tp: int) -> None:
    weight, x = normal(5, 3), normal(2, 3, seed=1)

    def run(ctx: cg.ParallelContext) -> int:
        head = ParallelLMHead(5, 3, gather_output=False, ctx=ctx, dtype=torch.float64)
        head.load_full(weight)
        start, stop = head.vocab_range
        close(head(x), (x @ weight.T)[:, start:stop])
        assert head.weight.shape == (-(-5 // tp), 3)
        assert not head.weight[stop - start :].any()
        return stop - start

    assert sum(on_ctx(tp, run)) == 5


def test_ids_out_of_range_raise_everywhere_and_the_group_goes_on() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        layer = VocabParallelEmbedding(5, 3, ctx=ctx)
        for wrong in (5, -1, 2**40):
            with pytest.raises(ValueError, match=rf"1 of 2 ids are out of range 0 to 4, the first is {wrong}\."):
                layer(torch.tensor([3, wrong]))
        assert layer(torch.tensor([4], dtype=torch.int32)).shape == (1, 3)
        assert layer(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 3)

    on_ctx(1, run)
    on_ctx(4, run)


@TP
def test_sequence_parallel_around_a_pair_of_layers(tp: int) -> None:
    class Block(nn.Module):
        """The tokens are split over the ranks on entry, and again after the layers."""

        def __init__(self, ctx: cg.ParallelContext) -> None:
            super().__init__()
            self.ctx = ctx
            self.up = ColumnParallelLinear(6, 8, bias=False, ctx=ctx, dtype=torch.float64)
            self.down = RowParallelLinear(8, 6, bias=False, reduce_results=False, ctx=ctx, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            tp = self.ctx.tp
            x = gather_from(scatter_to(x, tp, 0).tanh(), tp, 0, reduce_grad=True)
            y = self.down(F.linear(x, self.up.weight).relu())
            return gather_from(reduce_scatter_to(y, tp, 0), tp, 0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8, bias=False).double(), nn.Linear(8, 6, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x.tanh()).relu())
            return y

    check(tp, Block, Whole(), normal(8, 6))


@TP
def test_a_gradient_penalty_differentiates_twice(tp: int) -> None:
    up, down, x = normal(8, 6), normal(4, 8, seed=1), normal(3, 6, seed=2)

    def penalty(first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(second(first(leaf).tanh()).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        assert leaf.grad is not None
        assert isinstance(first.weight.grad, Tensor)
        return leaf.grad, first.weight.grad

    first, second = nn.Linear(6, 8, bias=False).double(), nn.Linear(8, 4, bias=False).double()
    first.load_state_dict({"weight": up})
    second.load_state_dict({"weight": down})
    grad_x, grad_up = penalty(first, second)

    def run(ctx: cg.ParallelContext) -> None:
        first = ColumnParallelLinear(6, 8, False, ctx=ctx, dtype=torch.float64)
        second = RowParallelLinear(8, 4, False, ctx=ctx, dtype=torch.float64)
        first.load_full(up)
        second.load_full(down)
        mine_x, mine_up = penalty(first, second)
        close(mine_x, grad_x)
        close(mine_up, grad_up.chunk(tp)[ctx.tp.rank_in_group])

    on_ctx(tp, run)


def test_another_group_of_the_context() -> None:
    weight, x = normal(4, 6), normal(2, 6, seed=1)

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, dp=2, tp=2), name="test") as ctx:
            for group, size in (("dp", 2), ("tp", 2), ("ep", 4), ("pp", 1)):
                layer = ColumnParallelLinear(6, 4, False, True, ctx=ctx, group=group, dtype=torch.float64)
                layer.load_full(weight)
                assert layer.group is ctx[group]
                assert layer.weight.shape == (4 // size, 6)
                close(layer(x), x @ weight.T)
            with pytest.raises(cg.LayoutError, match="no group 'attn_tp'"):
                ColumnParallelLinear(6, 4, ctx=ctx, group="attn_tp")

    spmd(run, 4)


def test_a_target_and_a_draft_of_another_size_in_the_same_processes() -> None:
    weight, x = normal(8, 6), normal(2, 6, seed=1)

    def run(world: cg.World) -> None:
        target = world.context(cg.Layout(4, tp=4), name="target")
        drafts = [world.context(cg.Layout(4, tp=tp), name=f"draft {tp}") for tp in (1, 2)]
        layers: list[ParallelLayer] = [RowParallelLinear(6, 8, False, False, ctx=ctx, dtype=torch.float64) for ctx in drafts]
        layers.append(ColumnParallelLinear(6, 8, False, True, ctx=target, dtype=torch.float64))
        for layer in layers:
            layer.load_full(weight)
        for layer in layers * 2:
            close(layer(x), x @ weight.T)

    spmd(run, 4)
