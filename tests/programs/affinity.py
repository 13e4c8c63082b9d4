"""Two ranks that nobody pinned exchange on one core, and look at their affinities afterwards. Prints "done" where all was right.

The arguments are a file to meet in and the rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import torch

import commgraph as cg

init, rank = sys.argv[1], int(sys.argv[2])
world = cg.World.connect(f"file://{init}", rank=rank, world_size=2)
group = world.context(cg.Layout(2, tp=2), name="affinity").tp
x = torch.ones(768)
allowed = os.sched_getaffinity(0)
first = min(allowed)


def exchange(seconds: float) -> None:
    """Uneven steps, so that each rank waits for the other longer than it spins."""
    until = time.monotonic() + seconds
    for step in range(1 << 30):
        end = time.monotonic() + (0.0006 if step % 2 == rank else 0.0001)
        while time.monotonic() < end:
            pass
        group.all_reduce_(x, op="max")
        if step % 64 == 0 and group.broadcast_object(time.monotonic() > until if rank == 0 else None, 0):
            return


# Brought together on one core, and free to leave it.
for _ in range(3):
    os.sched_setaffinity(0, {first})
    os.sched_setaffinity(0, allowed)
    exchange(0.25)
    assert os.sched_getaffinity(0) == allowed, f"{os.sched_getaffinity(0)} in place of {allowed}"

# On one core by the user's wish: there is nowhere to go.
os.sched_setaffinity(0, {first})
exchange(0.4)
assert os.sched_getaffinity(0) == {first}, f"{os.sched_getaffinity(0)} in place of {first}"
os.sched_setaffinity(0, allowed)

# Changed by another thread while the ranks wait for each other.
thread = threading.Timer(0.15, os.sched_setaffinity, (threading.get_native_id(), {max(allowed)}))
thread.start()
exchange(0.5)
thread.join()
assert os.sched_getaffinity(0) == {max(allowed)}, f"{os.sched_getaffinity(0)} in place of {max(allowed)}"

# Idle for a second: the wait costs next to nothing, whatever went before.
os.sched_setaffinity(0, allowed)
exchange(0.1)
group.barrier()
if rank == 0:
    time.sleep(1)
    group.barrier()
else:
    cpu, wall = time.thread_time(), time.monotonic()
    group.barrier()
    share = (time.thread_time() - cpu) / (time.monotonic() - wall)
    assert share < 0.01, f"an idle rank takes {100 * share:.2f} % of a core"
world.close()
print("done", flush=True)
