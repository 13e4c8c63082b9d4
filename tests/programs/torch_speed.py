"""Times torch.distributed over commgraph and over gloo in the same two processes, in turns.

    torchrun --nproc-per-node 2 tests/programs/torch_speed.py [rounds]

Each rank is bound to a core, where there are as many. Prints a 4 KiB `torch.distributed.all_reduce` (microseconds), a step of DDP with
50 MB of gradients (milliseconds), that step without synchronisation, and the time that the step spends in its all-reduces, by a hook that
waits for each bucket.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commgraph.torch_backend  # noqa: F401 - which registers the backend


def timed(call: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    cores, place = sorted(os.sched_getaffinity(0)), int(os.environ["LOCAL_RANK"])
    if place < len(cores):
        os.sched_setaffinity(0, {cores[place]})
    dist.init_process_group("cpu:commgraph")
    groups: dict[str, Any] = {"commgraph": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(12)]  # 50.3 MB of float32
    whole: dict[str, Any] = {}
    timed_models: dict[str, Any] = {}
    inside = [0.0]

    def hook(group, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and not those that are strings
        buffer = bucket.buffer().div_(2)
        begun = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        inside[0] += time.perf_counter() - begun
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    for name, group in groups.items():
        whole[name] = DistributedDataParallel(copy.deepcopy(nn.Sequential(*layers)), process_group=group)
        timed_models[name] = DistributedDataParallel(copy.deepcopy(nn.Sequential(*layers)), process_group=group)
        timed_models[name].register_comm_hook(group, hook)
    x, small = torch.randn(2, 1024), torch.ones(1024)
    seen: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        seen.setdefault(what, []).append(seconds)

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    def alone(name: str) -> None:
        with whole[name].no_sync():
            step(whole[name])

    for turn in range(rounds + 1):
        for name, group in groups.items():
            dist.barrier()
            reduce = timed(partial(dist.all_reduce, small, group=group), 300 if name == "commgraph" else 60)
            dist.barrier()
            without = timed(partial(alone, name), 3)
            dist.barrier()
            synchronised = timed(partial(step, whole[name]), 3)
            dist.barrier()
            inside[0] = 0.0
            timed(partial(step, timed_models[name]), 3)
            if turn:  # the first round warms up
                note(f"all_reduce {name}", reduce * 1e6)
                note(f"step alone {name}", without * 1e3)
                note(f"step {name}", synchronised * 1e3)
                note(f"communication {name}", inside[0] / 3 * 1e3)
    if dist.get_rank() == 0:
        for what, values in sorted(seen.items()):
            print(f"{what:28} median {statistics.median(values):9.2f}  least {min(values):9.2f}")
        for what in ("all_reduce", "communication"):
            gloo, ours = (statistics.median(seen[f"{what} {name}"]) for name in ("gloo", "commgraph"))
            print(f"{what}: gloo takes {gloo / ours:.1f} times as long")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
