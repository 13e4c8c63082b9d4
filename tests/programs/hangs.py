"""A rank of a job that hangs: ``hangs.py KIND RANK WORLD_SIZE STORE``. Prints ``ready`` before."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import commgraph as cg

KINDS = ("skips", "order", "stopped", "loop", "nobody_sends")


def hang(world: cg.World, kind: str, timeout: float, ready: Callable[[], None], stop: Callable[[], None] | None = None) -> None:
    """Two stages of two ranks; rank 1 or the first stage makes the mistake. `stop`: stops the thread of rank 1, for ``"stopped"``."""
    layout = cg.Layout(4, tp=2, pp=2)
    options = cg.CommunicatorOptions(record=True, host_timeout=timeout)
    with world.context(layout, name="target", options=options) as context:
        other = context.tp.sibling("other")
        for _ in range(3):
            context.tp.all_reduce(torch.ones(4))
        ready()
        mistaken = world.rank == 1
        if kind == "skips" and mistaken:
            context.pp.recv(4, torch.float32, 1)
        if kind == "order" and mistaken:
            other.all_reduce(torch.ones(4))
        if kind == "loop" and mistaken:
            spin(context)
        while kind == "stopped":
            context.tp.all_reduce(torch.ones(4))
            if mistaken and stop is not None:
                stop()
        if kind == "nobody_sends":
            if context.pp.is_last_rank:
                context.pp.recv(4, torch.float32)
            context.tp.all_reduce(torch.ones(4))
            return
        context.tp.all_reduce(torch.ones(4))
        if kind == "order":
            other.all_reduce(torch.ones(4))
        context.pp.all_reduce(torch.ones(4))


def spin(context: cg.ParallelContext) -> None:
    """Computes until the group is closed or aborted."""
    while not context.tp._state.is_closed:
        sum(range(1000))


if __name__ == "__main__":
    kind, rank, size, store = sys.argv[1:]
    torch.set_num_threads(1)
    with cg.World.connect(f"file://{store}", rank=int(rank), world_size=int(size), timeout=300) as world:
        hang(world, kind, 300, lambda: print("ready", flush=True))
