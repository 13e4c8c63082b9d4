"""One rank is killed in the middle of its work. The others print how they heard of it: rank, error, who was lost, seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch

import commgraph as cg

victim, place = int(sys.argv[1]), sys.argv[2]
world = cg.World.from_env(timeout=timedelta(seconds=60))
ctx = world.context(cg.Layout(world.size, tp=world.size), name="a")
ctx.tp.barrier()
killed_at = ctx.tp.broadcast_object(time.monotonic() + 0.5, victim)  # by the clock that all processes of a host share
if world.rank == victim:
    time.sleep(max(killed_at - time.monotonic(), 0))
    os.kill(os.getpid(), signal.SIGKILL)
try:
    if place == "all_reduce":
        ctx.tp.all_reduce(torch.ones(1000))
    else:
        ctx.tp.recv_object(victim)
except cg.CollectiveError as error:
    heard = f"{type(error).__name__} {error.rank} {time.monotonic() - killed_at:.1f}"
else:
    heard = "nothing"
begun = time.monotonic()
try:
    ctx.tp.barrier()
except cg.CollectiveError as error:
    again = type(error).__name__
else:
    again = "nothing"
world.close()
print(f"rank {world.rank}: {heard}, then {again}, closed in {time.monotonic() - begun:.1f}", flush=True)
