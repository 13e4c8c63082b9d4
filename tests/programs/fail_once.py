"""Fails in the first attempt, after the world was made and while a context is half built; torchrun then starts it again.

Each agent of torchrun counts the restarts of its own workers only, so the file says which attempt this is.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import commgraph as cg

failed = Path(sys.argv[1])
first = not failed.exists()
world = cg.World.from_env(timeout=timedelta(seconds=30))
if first:
    world.group.barrier()
    if world.rank == 1:
        time.sleep(0.5)  # rank 0 has said in the store that it begins to build
        failed.touch()
        os._exit(3)
    world.context(cg.Layout(2, tp=2), name="a")
with world.context(cg.Layout(2, tp=2), name="a") as ctx:
    assert ctx.tp.all_gather_object(world.rank) == [0, 1]
world.close()
if world.rank == 0:
    print(f"attempt {int(failed.exists())} done", flush=True)
