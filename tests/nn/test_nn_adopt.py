"""Modules that were written without commgraph become parallel layers where they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import commgraph as cg
from commgraph.nn import (
    ParallelLayer,
    clip_grad_norm_,
    full_state_dict,
    load_full_state_dict,
    rebind,
    sharded_parameters,
    sharded_state_dict,
)
from commgraph.nn.functional import copy_to, reduce_from
from commgraph.testing import spmd
from tests.helpers import normal, on_ctx


class Scaled(nn.Linear):
    """A subclass that does more than its base, as embeddings of real models do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Experts(nn.Module):
    """Fused gates and up projections of all experts, and a bias that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(normal(2, 6, 8 + 8, seed=1))
        self.down = nn.Parameter(normal(2, 8, 6, seed=2))
        self.bias = nn.Parameter(normal(6, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("...i,eio->e...o", x, self.gate_up).chunk(2, -1)
        return torch.einsum("e...i,eio->...o", gate.sigmoid() * up, self.down)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.experts = Scaled(6, 10).double(), nn.Linear(10, 6, bias=False).double(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(self.down(self.up(x).tanh()))
        return y + self.experts.bias


class Column(ParallelLayer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(copy_to(x, self.group))
        return y


class Row(ParallelLayer):
    def forward(self, x: Tensor) -> Tensor:
        return reduce_from(super().forward(x), self.group)


class Both(ParallelLayer):
    def forward(self, x: Tensor) -> Tensor:
        return reduce_from(super().forward(copy_to(x, self.group)), self.group)


def shard(block: Block, ctx: cg.ParallelContext) -> None:
    """Ten features, which four ranks hold with padding."""
    up, down, experts = Column.adopt(block.up, ctx=ctx), Row.adopt(block.down, ctx=ctx), Both.adopt(block.experts, ctx=ctx)
    up.cut("weight", 0, pad=True)
    up.cut("bias", 0, pad=True)
    down.cut("weight", -1, pad=True)
    experts.cut("gate_up", -1, {"gate": 8, "up": 8})
    experts.cut("down", 1)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_adopted_model_is_the_one_it_was(tp: int) -> None:
    whole = Block()
    x = normal(3, 6)
    expected = whole(x)
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients.values() if gradient is not None])

    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(tp, tp=tp), name="a")
        block = deepcopy(whole)
        block.zero_grad()
        shard(block, ctx)
        assert isinstance(block.up, Scaled)
        assert {name: one.full_shape for name, one in sharded_parameters(block).items()} == (
            {}
            if tp == 1
            else {
                "up.weight": (10, 6),
                "up.bias": (10,),
                "down.weight": (6, 10),
                "experts.gate_up": (2, 6, 16),
                "experts.down": (2, 8, 6),
            }
        )
        for model in (block, deepcopy(block), rebind(deepcopy(block), world.context(ctx.layout, name="b"))):
            y = model(x)
            torch.testing.assert_close(y, expected)
            y.square().sum().backward()
            torch.testing.assert_close(clip_grad_norm_(model, 1e9), norm.float(), check_dtype=False)
            state = full_state_dict(model)
            assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data = parameter.grad
            for name, gradient in full_state_dict(model).items():
                torch.testing.assert_close(gradient, gradients[name])

    spmd(run, tp)


def test_an_adopted_model_without_memory_is_loaded() -> None:
    whole = Block()

    def run(ctx: cg.ParallelContext) -> None:
        block: Any = deepcopy(whole).to("meta")
        shard(block, ctx)
        block.to_empty(device="cpu")
        load_full_state_dict(block, whole.state_dict())
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in full_state_dict(block).items())
        assert sharded_state_dict(block)["up.weight"].shape == (10, 6)
        with pytest.raises(NotImplementedError, match="ColumnScaled has no way to draw weight: load it"):
            block.up.reset_parameters()

    on_ctx(2, run)


def test_modules_that_cannot_be_adopted_or_cut_so() -> None:
    def run(ctx: cg.ParallelContext) -> None:
        linear = nn.Linear(4, 12)
        with pytest.raises(cg.LayoutError, match="nosuch"):
            Column.adopt(linear, ctx=ctx, group="nosuch")
        assert type(linear) is nn.Linear
        layer: Any = Column.adopt(linear, ctx=ctx)
        with pytest.raises(cg.ConfigurationError, match="is a parallel layer already"):
            Row.adopt(layer, ctx=ctx)
        layer.cut("weight", 0, {"a": 4, "b": 8}, blocks=2)
        assert layer.weight.shape == (6, 4)
        wrong: dict[str, Callable[[], Any]] = {
            "'weight' is cut already": lambda: layer.cut("weight", 0),
            "'scale' is no parameter; there are weight, bias": lambda: layer.cut("scale", 0),
            r"bias has 12 along dim 0, not the sum of \{'a': 4, 'b': 4\}": lambda: layer.cut("bias", 0, {"a": 4, "b": 4}),
            r"ColumnLinear\(bias\['a'\]=3\): 3 is not a multiple of 2": lambda: layer.cut("bias", 0, {"a": 3, "b": 9}),
            r"must be multiples of blocks=5": lambda: layer.cut("bias", 0, blocks=5),
            r"blocks=3, and blocks a multiple or a divisor of 2": lambda: layer.cut("bias", 0, blocks=3),
        }
        for message, cut in wrong.items():
            with pytest.raises(cg.ConfigurationError, match=message):
                cut()
        assert layer.bias.shape == (12,)

    on_ctx(2, run)
