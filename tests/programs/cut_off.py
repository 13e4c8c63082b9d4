"""A rank of a job over several hosts to which something happens while it works: what it hears, when, and how long closing takes.

    cut_off.py WORK DEADLINE     WORK: all_reduce, large, object, queue; DEADLINE: seconds of each call

Started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Times are those of the monotonic clock, which simulated hosts share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import commgraph as cg


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic(), **what}) + "\n")
    sys.stdout.flush()


def worker(work: str, deadline: float, tp: cg.GroupCoordinator) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what is done again and again, and what is closed in the end beside the World."""
    if work == "queue":
        key = b"a secret of the test"
        if tp.rank_in_group == 0:
            queue = cg.MessageQueue.create(tp.world_size - 1, n_local_readers=0, address=os.environ["MASTER_ADDR"], authkey=key)
            tp.broadcast_object(queue.handle, 0)
            queue.wait_until_ready(30)
            return lambda: queue.enqueue(b"x" * 100_000), queue.close
        reader = cg.MessageQueue.attach(tp.broadcast_object(None, 0), tp.rank_in_group - 1, authkey=key)
        reader.wait_until_ready(30)
        return reader.dequeue, reader.close
    x = torch.ones(4 << 20 if work == "large" else 1024)
    if work == "object":
        return lambda: tp.broadcast_object({"step": 1}, 0, timeout=deadline), lambda: None
    return lambda: tp.all_reduce(x, timeout=deadline), lambda: None


def main() -> None:
    work, deadline = sys.argv[1], float(sys.argv[2])
    world = cg.World.from_env(timeout=40)
    context = world.context(cg.Layout(world.size, tp=world.size), name="main")
    call, close = worker(work, deadline, context.tp)
    call()
    say(rank=world.rank, ready=True)
    begun = time.monotonic()
    try:
        while True:
            begun = time.monotonic()
            call()
            time.sleep(0.001)
    except cg.CollectiveError as error:
        say(rank=world.rank, heard=type(error).__name__, lost=error.rank, took=time.monotonic() - begun, text=str(error))
    begun = time.monotonic()
    close()
    context.close()
    world.close()
    say(rank=world.rank, closed=time.monotonic() - begun)


if __name__ == "__main__":
    main()
