"""A program ends while daemon threads, each a rank, build contexts or call collectives. Arguments: "build" or "calls", "shm" or "gloo"."""

from __future__ import annotations

import sys
import threading
import time

import torch

import commgraph as cg

builds, options = sys.argv[1] == "build", cg.CommunicatorOptions(shm=sys.argv[2] == "shm")
store = torch.distributed.HashStore()
ready = threading.Semaphore(0)


def rank(number: int) -> None:
    world = cg.World.from_store(store, rank=number, world_size=2, timeout=20)
    ready.release()
    try:
        for name in map(str, range(10**6)):
            group = world.context(cg.Layout(2, tp=2), name=name, options=options).tp
            while not builds:
                group.all_reduce(torch.ones(8))
    except cg.CommGraphError:
        pass  # the interpreter has come to its exit handlers


for number in range(2):
    threading.Thread(target=rank, args=(number,), daemon=True).start()
for _ in range(2):
    ready.acquire()
time.sleep(0.3)
