"""A worker of torchrun's whose host is lost in the first round: it says how many ranks each round has, and ends once there is one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

import commgraph as cg

with cg.World.from_env(timeout=60) as world, world.context(cg.Layout(world.size, tp=world.size), name="main") as context:
    found = int(context.tp.all_reduce(torch.ones(1)).item())
    sys.stdout.write(f"{world.size} ranks, sum {found}\n")
    sys.stdout.flush()
    if world.size == 2:
        Path(sys.argv[1], str(os.getppid())).touch()
    while world.size == 2:
        context.tp.all_reduce(torch.ones(1), timeout=120)
        time.sleep(0.05)
