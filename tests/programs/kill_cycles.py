"""Kills a random rank at a random moment, again and again, and looks at what is left: the survivors' errors, /dev/shm, standard error."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import commgraph as cg


def step(ctx: cg.ParallelContext, kind: int, root: int, shared: torch.Tensor) -> None:
    """One call of many kinds; `kind` and `root` are the same on every rank."""
    tp = ctx.tp
    if kind == 0:
        tp.all_reduce_(torch.ones(1000))
    elif kind == 1:
        tp.all_reduce(torch.ones(2_000_000))
    elif kind == 2:
        tp.broadcast_object({"a": list(range(100))}, root)
    elif kind == 3:
        tp.broadcast_object(torch.ones(1_000_000), root)
    elif kind == 4 and tp.rank_in_group == 0:
        tp.send_tensor_dict({"x": torch.ones(500_000), "y": 1}, 1)
    elif kind == 4 and tp.rank_in_group == 1:
        tp.recv_tensor_dict(0)
    elif kind == 5:
        tp.all_gather(torch.ones(10_000), 0)
    elif kind == 6:
        tp.all_gather_object(root)
    elif kind == 7:
        tp.all_reduce_(shared.fill_(1))


def rank_main(rank: int, n: int, path: str, seed: int, ready: Connection) -> None:
    torch.set_num_threads(1)
    world = cg.World.connect(f"file://{path}", rank=rank, world_size=n)
    with contextlib.suppress(cg.CollectiveError), world:
        ctx = world.context(cg.Layout(n, tp=n), name="a")
        source = random.Random(seed)
        shared = ctx.tp.empty((300_000,), torch.float32)
        ready.send("ready")
        try:
            while True:
                step(ctx, source.randrange(8), source.randrange(n), shared)
        except cg.CollectiveError as error:
            ready.send((time.time(), type(error).__name__, error.rank))
            raise


def cycle(number: int, source: random.Random) -> float:
    """One job, one death; the longest time until a survivor raised, in seconds."""
    n = source.choice([2, 3, 4])
    context = multiprocessing.get_context("fork")  # torch is imported once
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(n)]
        arguments = [(rank, n, f"{folder}/meet", number, pipes[rank][1]) for rank in range(n)]
        processes = [context.Process(target=rank_main, args=given, daemon=True) for given in arguments]
        for process in processes:
            process.start()
        try:
            for mine, _ in pipes:
                assert mine.poll(60), f"cycle {number}: a rank did not get ready"
                assert mine.recv() == "ready"
            time.sleep(source.random() * 0.3)
            victim, worst = source.randrange(n), 0.0
            killed = time.time()
            os.kill(processes[victim].pid or 0, signal.SIGKILL)  # and not waited for: a zombie is dead, too
            for rank, (mine, _) in enumerate(pipes):
                if rank == victim:
                    continue
                assert mine.poll(10), f"cycle {number}: rank {rank} of {n} noticed nothing of the death of rank {victim}"
                raised, kind, lost = mine.recv()
                worst = max(worst, raised - killed)
                assert (kind, lost) == ("PeerLostError", victim), (
                    f"cycle {number}: rank {rank} of {n} got {kind} of rank {lost}, not {victim}"
                )
                processes[rank].join(20)
                assert processes[rank].exitcode == 0, f"cycle {number}: rank {rank} ended with {processes[rank].exitcode}"
        finally:
            for process in processes:
                process.kill()
                process.join()
    assert worst < 2, f"cycle {number}: a survivor raised only after {worst:.2f} s"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = random.Random(given.seed)
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    worst = [cycle(number, source) for number in range(given.cycles)]
    after = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    assert after <= before, f"left in /dev/shm: {sorted(after - before)}"
    worst.sort()
    print(f"{given.cycles} cycles, every survivor raised PeerLostError; median {worst[len(worst) // 2]:.3f} s, worst {worst[-1]:.3f} s")


if __name__ == "__main__":
    main()
    sys.exit(0)
