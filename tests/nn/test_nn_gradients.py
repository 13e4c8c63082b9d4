"""The norm of gradients, and clipping by it, against the unsharded model."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import commgraph as cg
from commgraph.nn import (
    ColumnParallelLinear,
    ExpertParallelMLP,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    clip_grad_norm_,
    full_state_dict,
    total_grad_norm,
)
from commgraph.testing import spmd

NORMS = (2.0, 1.0, 3.5, math.inf)


class Model(nn.Module):
    """Every kind of layer, tied weights, and parameters that every rank holds whole."""

    def __init__(self, ctx: cg.ParallelContext, kv_heads: int = 2, vocabulary: int = 9) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(vocabulary, 6, ctx=ctx)
        self.norm = nn.LayerNorm(6)
        self.qkv = QKVParallelLinear(6, 2, 4, kv_heads, ctx=ctx)
        self.out = RowParallelLinear(8, 6, ctx=ctx)
        self.gate_up = MergedColumnParallelLinear(6, [8, 4], ctx=ctx)
        self.unused = ColumnParallelLinear(6, 12, ctx=ctx)
        self.experts = ExpertParallelMLP(6, 3, 8, 2, ctx=ctx)
        self.head = ParallelLMHead(vocabulary, 6, ctx=ctx)
        self.head.weight = self.embed.weight


def with_gradients(model: nn.Module, full: dict[str, Tensor]) -> None:
    """Give parameters their part of full gradients; those without one keep None."""
    for name, parameter in model.named_parameters():
        if name not in full:
            continue
        parameter.grad = torch.zeros_like(parameter)
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, ParallelLayer) and last in module.cuts:
            module.cuts[last].fill(parameter.grad, full[name], what=name)
        else:
            parameter.grad.copy_(full[name])


def gradients_for(model: nn.Module) -> dict[str, Tensor]:
    """Random full gradients, some missing; the tied weight has one."""
    shapes = {name: tensor.shape for name, tensor in full_state_dict(model).items() if "unused" not in name and name != "head.weight"}
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (name, shape) in enumerate(shapes.items())}


@settings(max_examples=6, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2, 4]),
    vocabulary=st.integers(5, 13),
    listed=st.booleans(),
)
def test_the_norm_is_that_of_the_unsharded_model(tp: int, dp: int, kv_heads: int, vocabulary: int, listed: bool) -> None:
    def run(world: cg.World) -> None:
        model = Model(world.context(cg.Layout(world.size, tp=tp, dp=dp), name="a"), kv_heads, vocabulary)
        model = deepcopy(model).double()
        full = {name: gradient.double() for name, gradient in gradients_for(model).items()}
        for norm_type in NORMS:
            with_gradients(model, full)
            expected = torch.nn.utils.get_total_norm(list(full.values()), norm_type)
            got = total_grad_norm(model.parameters() if listed else model, norm_type)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
            for most, foreach in ((0.5, None), (0.25, True), (100.0, False)):
                with_gradients(model, full)
                clip_grad_norm_(model.parameters() if listed else model, most, norm_type, foreach=foreach)
                scaled = {name: gradient * min(most / (float(expected) + 1e-6), 1) for name, gradient in full.items()}
                copy = deepcopy(model)
                with_gradients(copy, scaled)
                for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
                    if theirs.grad is not None:
                        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
                    else:
                        assert mine.grad is None

    spmd(run, tp * dp)


def test_a_pipeline_adds_up_and_a_tied_head_counts_once() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(4, pp=2, tp=2), name="a")
        # The first stage has an embedding, the last a copy of it as its head, and a norm on a rank that has no layer but the head.
        if ctx.pp.rank_in_group == 0:
            model = nn.ModuleDict({"embed": VocabParallelEmbedding(9, 4, ctx=ctx)})
        else:
            model = nn.ModuleDict({"head": ParallelLMHead(9, 4, ctx=ctx), "norm": nn.LayerNorm(4)})
        weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
        norm = torch.arange(4.0)
        with_gradients(model, {"embed.weight": weight, "head.weight": weight, "norm.weight": norm})
        copies = [model["head"].weight] if "head" in model else []
        for norm_type in NORMS:
            expected = torch.nn.utils.get_total_norm([weight, norm], norm_type)
            torch.testing.assert_close(total_grad_norm(model, norm_type, copies=copies), expected)
            torch.testing.assert_close(total_grad_norm(model.parameters(), norm_type, copies=copies), expected)
        torch.testing.assert_close(total_grad_norm(model), torch.nn.utils.get_total_norm([weight, weight, norm]))
        clip_grad_norm_(model, 1.0, copies=copies)
        scale = 1 / torch.nn.utils.get_total_norm([weight, norm])
        (tied,) = (full for name, full in full_of_gradients(model, ctx).items() if "norm" not in name)
        torch.testing.assert_close(tied, weight * scale)  # scaled on both stages, and equal there

        # A stage without layers of ours names the context.
        bare = nn.Linear(2, 2) if ctx.pp.rank_in_group else ColumnParallelLinear(2, 2, ctx=ctx)
        for parameter in bare.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert float(total_grad_norm(bare, ctx=ctx)) == pytest.approx(math.sqrt(12))

    spmd(run, 4)


def full_of_gradients(model: nn.ModuleDict, ctx: cg.ParallelContext) -> dict[str, Tensor]:
    return {
        name: ctx.tp.all_gather(parameter.grad, 0)[:9] if "norm" not in name else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_groups_of_several_contexts_add_up() -> None:
    def run(world: cg.World) -> None:
        target = world.context(cg.Layout(4, tp=4), name="target")
        draft = world.context(cg.Layout(4, tp=2, dp=2), name="draft")
        model = nn.ModuleDict({"target": Model(target), "draft": Model(draft, 1)})
        full = gradients_for(model)
        full.pop("draft.head.weight", None)
        full.pop("target.head.weight", None)
        with_gradients(model, full)
        torch.testing.assert_close(total_grad_norm(model), torch.nn.utils.get_total_norm(list(full.values())))
        other = world.context(cg.Layout(4, pp=2, tp=2), name="other")
        both = nn.ModuleList([model, ColumnParallelLinear(2, 2, ctx=other)])
        with pytest.raises(cg.ConfigurationError, match=r"contexts 'draft', 'other', 'target', whose pipelines differ: say by ctx="):
            total_grad_norm(both)

    spmd(run, 4)


def test_norms_that_are_not_finite_and_arguments() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        layer = ColumnParallelLinear(2, 4, ctx=ctx)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        for value in (math.nan, math.inf):
            weight, bias = (parameter.grad for parameter in layer.parameters())
            assert weight is not None
            assert bias is not None
            weight[0, 0] = value if ctx.rank else 1.0  # one rank alone has it, and all raise
            before = bias.clone()
            with pytest.raises(RuntimeError, match=r"order 2.0 .* is (nan|inf), so they cannot be clipped"):
                clip_grad_norm_(layer, 1.0, error_if_nonfinite=True)
            assert torch.equal(bias, before)
            assert not total_grad_norm(layer).isfinite()
        for norm_type in (0, -1, math.nan):
            with pytest.raises(cg.ConfigurationError, match="must be greater than 0"):
                total_grad_norm(layer, norm_type)
        layer.zero_grad()
        assert float(clip_grad_norm_(layer, 1.0)) == 0
        # Half precision is added up in single.
        half = ColumnParallelLinear(64, 128, bias=False, ctx=ctx, dtype=torch.bfloat16)
        half.weight.grad = torch.full_like(half.weight, 1 + 2**-7)
        norm = total_grad_norm(half.weight)
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx((1 + 2**-7) * math.sqrt(64 * 128), rel=1e-6)

    spmd(run, 2)
