"""Contexts beside a default process group of somebody else's, which must stay as it was."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import commgraph as cg

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


with cg.World.from_torch() as world, cg.World.from_env() as another:
    assert (world.rank, world.size) == (another.rank, another.size) == (dist.get_rank(), dist.get_world_size())
    for _ in range(3):
        with world.context(cg.Layout(world.size, tp=2), name="a") as a, another.context(cg.Layout(world.size, pp=2), name="a") as b:
            assert int(a.tp.all_reduce(torch.tensor(world.rank))) == sum(a.tp.ranks)
            check()
            assert int(b.pp.all_reduce(torch.tensor(world.rank))) == sum(b.pp.ranks)
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
    assert world.group.all_gather_object(world.rank) == list(range(world.size))
if world.rank == 0:
    print("done", flush=True)
