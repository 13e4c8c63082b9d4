"""Rank 0 is stopped in the middle of large calls. Rank 1 gives up and uses its tensor again; then rank 0 goes on.

Arguments: MiB of a tensor, a file to meet at, and an operation. Prints in how many calls rank 1 gave up, and how many bytes of its tensor
changed after that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch

import commgraph as cg

TRIALS = 2
SIZE = int(sys.argv[1]) << 20
OPERATIONS: dict[str, Callable[[cg.GroupCoordinator, torch.Tensor, float], object]] = {
    "broadcast": lambda g, x, seconds: g.broadcast(x, timeout=seconds),
    "all_reduce_": lambda g, x, seconds: g.all_reduce_(x, timeout=seconds),
    "recv": lambda g, x, seconds: g.recv(SIZE, torch.uint8, out=x, timeout=seconds) if g.rank else g.send(x, timeout=seconds),
}


def main() -> None:
    # Not by a store that rank 0 serves: it would answer nobody while it is stopped.
    world = cg.World.connect(f"file://{sys.argv[2]}", rank=int(os.environ["RANK"]), world_size=2)
    pid = world.group.broadcast_object(os.getpid())
    options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=20))
    name, operation = sys.argv[3], OPERATIONS[sys.argv[3]]
    given_up = changed = 0
    for trial in range(TRIALS):
        ctx = world.context(cg.Layout(2, tp=2), name=f"{name} {trial}", options=options)
        # In shared memory a reduction could write to the tensors of all ranks.
        x = ctx.tp.empty(SIZE, torch.uint8) if name == "all_reduce_" else torch.empty(SIZE, dtype=torch.uint8)
        x.fill_(1 + world.rank)
        world.group.barrier()
        if world.rank == 0:
            with contextlib.suppress(cg.CollectiveError):
                operation(ctx.tp, x, 20)
        else:
            stopper = threading.Timer(SIZE / 2**28 * 0.01 * (trial + 0.5), os.kill, (pid, signal.SIGSTOP))
            stopper.start()
            try:
                operation(ctx.tp, x, 0.5)
                stopper.join()
            except cg.CollectiveTimeoutError:
                stopper.join()
                given_up += 1
                x.fill_(7)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)
                changed += int((x != 7).sum())
            finally:
                os.kill(pid, signal.SIGCONT)
        world.group.barrier(timeout=30)
        ctx.close(timeout=1)
    if world.rank:
        print(name, given_up, changed, flush=True)
    world.close()


if __name__ == "__main__":
    main()
