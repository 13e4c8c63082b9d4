"""torch.distributed.checkpoint under a default group: other numbers of ranks, fully_shard, asynchronous saving, refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import commgraph as cg
from commgraph.nn import (
    LocalShards,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    clip_grad_norm_,
    full_state_dict,
    load_full_state_dict,
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    sharded_optimizer_state_dict,
    sharded_state_dict,
)

folder = Path(sys.argv[1])
IDS = torch.arange(12).view(2, 6) % 9


class Block(nn.Module):
    """Grouped queries, of which two ranks of four hold equal keys, and a gated MLP."""

    def __init__(self, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = QKVParallelLinear(8, 3, 4, 2, ctx=ctx)
        self.out = RowParallelLinear(12, 8, ctx=ctx)
        self.gate_up = MergedColumnParallelLinear(8, [12, 12], False, ctx=ctx)
        self.down = RowParallelLinear(12, 8, ctx=ctx)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split(self.qkv.local_sizes, -1)
        times = q.shape[-1] // k.shape[-1]
        x = x + self.out(q * (k * v).unflatten(-1, (-1, 3)).repeat_interleave(times, -2).flatten(-2))
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = x + self.down(gate.sigmoid() * up)
        return y


class Model(nn.Module):
    """Nine words, which no number of ranks here divides."""

    def __init__(self, ctx: cg.ParallelContext) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(9, 8, ctx=ctx)
        self.blocks = nn.ModuleList([Block(ctx), Block(ctx)])
        self.head = ParallelLMHead(9, 8, ctx=ctx)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def wrapped(model: Model, ctx: cg.ParallelContext) -> Model:
    """Return the model with fully_shard over dp around every block and the rest."""
    mesh = DeviceMesh.from_group(ctx.dp.torch_group("cpu"), "cpu", mesh_dim_names=("dp",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make(tp: int, *, wrap: bool) -> tuple[Model, torch.optim.Optimizer]:
    ctx = contexts[tp]
    torch.manual_seed(1)
    model = Model(ctx)
    if wrap:
        wrapped(model, ctx)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: Model, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Tensor]:
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.roll(1).flatten()).backward()
        norms.append(clip_grad_norm_(model, 0.5))
        optimizer.step()
    return {name: tensor.clone() for name, tensor in full_state_dict(model).items()} | {"norms": torch.stack(norms)}


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}


def load(name: str, tp: int, *, wrap: bool) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = make(tp, wrap=wrap)
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(torch.nan)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / name)
    load_sharded_state_dict(model, state["model"])
    load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
    return model, optimizer


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    expected = {name: tensor for name, tensor in expected.items() if name != "norms" or "norms" in got}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


dist.init_process_group("gloo")
with cg.World.from_torch() as world:
    contexts = {tp: world.context(cg.Layout(4, tp=tp, dp=4 // tp), name=f"tp={tp}") for tp in (1, 2, 4)}
    for tp, wrap in ((2, True), (4, False)):
        name = f"{tp}"
        model, optimizer = make(tp, wrap=wrap)
        saved = train(model, optimizer, 2)
        if wrap:
            assert isinstance(sharded_state_dict(model)["blocks.0.norm.weight"], DTensor)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / name)
        future = dcp.async_save(state_of(model, optimizer), checkpoint_id=folder / f"{name} later")
        further = train(model, optimizer, 2)
        assert isinstance(future, Future)
        future.result()
        for which, other, other_wrap in ((name, 1, True), (f"{name} later", 6 - tp, not wrap)):
            model, optimizer = load(which, other, wrap=other_wrap)
            equal(full_state_dict(model), saved)
            equal(train(model, optimizer, 2), further)
        # Full tensors go into wrapped layers, too.
        model, _ = make(tp, wrap=wrap)
        load_full_state_dict(model, {name: tensor for name, tensor in saved.items() if name != "norms"})
        equal(full_state_dict(model), saved)

    # Plain states of sharded models are refused, whoever made them.
    model, optimizer = make(4, wrap=False)
    plain: tuple[Callable[[], Any], ...] = (
        model.state_dict,
        lambda: {"model": model},
        lambda: get_state_dict(model, optimizer)[0],
        lambda: dict(model.named_parameters()),
    )
    for number, state in enumerate(plain):
        with pytest.raises(BaseException, match=r"one rank's shard of a commgraph.nn layer.*sharded_state_dict"):
            dcp.save(state(), checkpoint_id=folder / f"plain {number}")
    assert isinstance(sharded_state_dict(model)["head.weight"], LocalShards)
    if world.rank == 0:
        print("done", flush=True)
dist.destroy_process_group()
