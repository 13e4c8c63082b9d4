"""One of two ranks, bound to a core before it builds: bound.py FILE RANK CORE prints whether its waits spin, of each of two contexts."""

from __future__ import annotations

import os
import sys

import commgraph as cg

init, rank, core = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {core})
with cg.World.connect(f"file://{init}", rank=rank, world_size=2) as world:
    for name, cores in (("bound", {core}), ("both on one", {0})):
        os.sched_setaffinity(0, cores)
        world.group.barrier()
        with world.context(cg.Layout(2, tp=2), name=name) as context:
            mailbox = context.tp._state.mailbox
            assert mailbox is not None
            print(name, mailbox.team.spins())
