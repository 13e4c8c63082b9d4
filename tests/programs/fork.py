"""A process with open groups starts children by multiprocessing's fork, as data loaders do. Both go on."""

from __future__ import annotations

import multiprocessing

import torch

import commgraph as cg

world = cg.World.from_env()
ctx = world.context(cg.Layout(world.size, tp=world.size), name="a")
for _ in range(2):
    child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
    child.start()
    child.join(30)
    assert child.exitcode == 0, child.exitcode
    assert int(ctx.tp.all_reduce(torch.tensor(1))) == world.size
world.close()
if world.rank == 0:
    print("done", flush=True)
