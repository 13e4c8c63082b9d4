"""Contexts beside a default process group of somebody else's, which must stay as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import DeviceMesh, distributed_c10d
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import commgraph as cg

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.stand_ins import FakeDevice

dist.init_process_group("gloo")
default = dist.group.WORLD
theirs = dist.new_group([0, 1])
registered = dict(distributed_c10d._world.pg_names)


def check() -> None:
    assert dist.group.WORLD is default
    assert dict(distributed_c10d._world.pg_names) == registered
    x = torch.tensor(dist.get_rank())
    dist.all_reduce(x)
    assert int(x) == sum(range(dist.get_world_size()))


def through_tables(ctx: cg.ParallelContext) -> None:
    """Groups of ours, as other libraries use them."""
    tp, dp = ctx.tp.torch_group("cpu"), ctx.dp.torch_group("cpu")
    assert dist.get_process_group_ranks(tp) == list(ctx.tp.ranks)
    assert dist.get_rank(tp) == ctx.tp.rank_in_group
    x = torch.tensor(float(ctx.rank))
    dist.all_reduce(x, group=tp)
    assert float(x) == sum(ctx.tp.ranks)
    y = torch.tensor([float(ctx.rank)])
    dist.broadcast(y, ctx.dp.ranks[1], group=dp)
    assert y.item() == ctx.dp.ranks[1]
    assert funcol.all_reduce(torch.ones(2), "sum", tp).tolist() == [2, 2]
    grid = DeviceMesh.from_group([dp, tp], "cpu", mesh=torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.arange(8.0).view(2, 4)
    cut = distribute_tensor(whole, grid, [Replicate(), Shard(1)])
    assert torch.equal(cut.to_local(), whole.chunk(2, 1)[ctx.tp.rank_in_group])
    assert torch.equal(cut.full_tensor(), whole)
    # A group of one rank has one, too.
    assert dist.get_world_size(ctx.pp.torch_group("cpu")) == 1
    z = torch.ones(1)
    dist.all_reduce(z, group=ctx.pp.torch_group("cpu"))
    assert z.item() == 1
    # Ours go on beside it.
    assert ctx.tp.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]


with cg.World.from_torch() as world, cg.World.from_env() as another:
    assert (world.rank, world.size) == (another.rank, another.size) == (dist.get_rank(), dist.get_world_size())
    for _ in range(3):
        with world.context(cg.Layout(world.size, tp=2), name="a") as a, another.context(cg.Layout(world.size, pp=2), name="a") as b:
            assert int(a.tp.all_reduce(torch.tensor(world.rank))) == sum(a.tp.ranks)
            check()
            assert int(b.pp.all_reduce(torch.tensor(world.rank))) == sum(b.pp.ranks)
    check()
    with world.context(cg.Layout(world.size, dp=2, tp=2), name="mesh", options={"tp": cg.CommunicatorOptions(isolate=True)}) as mesh:
        through_tables(mesh)
    with (
        world.context(cg.Layout(world.size, tp=2), name="again") as twin,
        another.context(cg.Layout(world.size, tp=2), name="again") as mesh,
    ):
        # Equal groups of two worlds of this process: each its own, and each found under a name of its own.
        theirs_too, group = twin.tp.torch_group("cpu"), mesh.tp.torch_group("device")
        assert theirs_too is not group
        assert theirs_too.group_name != group.group_name
        for one in (theirs_too, group):
            assert funcol.all_reduce(torch.ones(2), "sum", one).tolist() == [2, 2]
        assert mesh.tp.torch_group("cpu") is group
        assert group is mesh.tp.cpu_group
    check()
    # A backend for device tensors beside the host's: two groups in the tables, and both gone with the context.
    device = FakeDevice(capability="")
    with world.context(cg.Layout(world.size, tp=2), name="device", platform=device) as ctx:
        on_host, on_device = ctx.tp.torch_group("cpu"), ctx.tp.torch_group("device")
        assert on_device is ctx.tp.device_group is not on_host
        assert on_host is ctx.tp.cpu_group
        assert on_device.group_name != on_host.group_name
        for one in (on_host, on_device):
            x = torch.tensor(float(ctx.rank))
            dist.all_reduce(x, group=one)
            assert float(x) == sum(ctx.tp.ranks)
            assert dist.get_process_group_ranks(one) == list(ctx.tp.ranks)
            assert ctx.tp.torch_group("device") is on_device
    check()
    with cg.World.from_torch() as second:  # a second one from the same default group meets the others' second one
        assert second.group.all_gather_object(2) == [2] * world.size
if dist.get_rank() < 2:
    with cg.World.from_torch(theirs) as pair:
        assert pair.size == 2
        assert pair.group.all_gather_object(pair.rank) == [0, 1]
else:
    with pytest.raises(cg.LaunchError, match="is not in the group"):
        cg.World.from_torch(theirs)
check()
dist.destroy_process_group()
with cg.World.from_env() as world:  # and it needs none
    with pytest.raises(cg.BackendUnavailableError, match="init_process_group first"):
        world.group.torch_group("cpu")
    assert world.group.all_gather_object(world.rank) == list(range(world.size))
if world.rank == 0:
    print("done", flush=True)
