"""A rank of two on two hosts, for one case of their making: it says how it ended, and after how many seconds, as one line of JSON.

cases_over_hosts.py CASE     started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commgraph as cg

SECONDS = float(os.environ.get("SECONDS_TO_BUILD", "20"))
ME, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PLACE = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


class Own:
    """An object of a class of the user's."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own)

    __hash__ = None  # type: ignore[assignment]  # as of any class that defines equality alone


def use(world: cg.World) -> list[int]:
    with world.context(cg.Layout(world.size, tp=world.size), name="main") as context:
        total = context.tp.all_reduce(torch.ones(3)).tolist()
        assert total == [float(world.size)] * 3
    return list(world.nodes.values())


def environment() -> Any:
    with cg.World.from_env(timeout=SECONDS) as world:
        return use(world)


def connect() -> Any:
    with cg.World.connect(PLACE, rank=ME, world_size=SIZE, timeout=SECONDS) as world:
        return use(world)


def torch_group() -> Any:
    """A job whose default group is torch's own."""
    dist.init_process_group("gloo", init_method=PLACE, rank=ME, world_size=SIZE)
    try:
        with cg.World.from_torch(timeout=SECONDS) as world:
            return use(world)
    finally:
        dist.destroy_process_group()


def own_object() -> Any:
    """An object that is no plain data: refused on its source alone, with nothing sent, so that the group goes on."""
    with cg.World.from_env(timeout=SECONDS) as world:
        said = "sent"
        if ME == 0:
            try:
                world.group.broadcast_object(Own(), 0)
            except TypeError as error:
                said = str(error)
        found = world.group.broadcast_object({"plain": [1, 2.0, "three"]}, 0)
        assert found == {"plain": [1, 2.0, "three"]}
        return said


def own_object_signed() -> Any:
    with cg.World.from_env(timeout=SECONDS) as world:
        return world.group.broadcast_object([Own()] if ME == 0 else None, 0) == [Own()]


def strategies() -> Any:
    """Rank 1 raises in the build of a context."""
    with cg.World.from_env(timeout=SECONDS) as world:
        world.context(cg.Layout(SIZE, tp=SIZE) if ME == 0 else cg.Layout(SIZE + 1), name="main")


def death() -> Any:
    """Rank 1 is killed before it takes part in the build of a context."""
    with cg.World.from_env(timeout=SECONDS) as world:
        world.group.barrier()
        if ME == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        use(world)


def store_death() -> Any:
    """Rank 0 is killed, and the store with it, while the others build a context."""
    with cg.World.from_env(timeout=SECONDS) as world:
        world.group.barrier()
        if ME == 0:
            time.sleep(0.5)  # the others wait in the build
            os.kill(os.getpid(), signal.SIGKILL)
        use(world)


def failure() -> Any:
    """Rank 1 raises between calls, as a program with a mistake does; rank 0 is in a call."""
    with cg.World.from_env(timeout=SECONDS) as world, world.context(cg.Layout(SIZE, tp=SIZE), name="main") as context:
        context.tp.barrier()
        if ME == 1:
            raise KeyError("a mistake")
        context.tp.all_reduce(torch.ones(4), timeout=60)


def loop() -> Any:
    """Works until a file of its host is there; every result is checked."""
    with cg.World.from_env(timeout=SECONDS) as world, world.context(cg.Layout(SIZE, tp=SIZE), name="main") as context:
        tp, calls, going = context.tp, 0, 1.0
        x = torch.arange(50_000.0)
        print("ready", flush=True)
        while going:
            assert torch.equal(tp.all_reduce(x), x * SIZE)
            assert tp.broadcast_object({"call": calls}, calls % SIZE) == {"call": calls}
            going = tp.all_reduce(torch.tensor(float(not Path("/tmp/stop").exists())), op="min").item()
            calls += 1
        return calls


def main() -> None:
    case: Callable[[], Any] = globals()[sys.argv[1]]
    begun = time.monotonic()
    try:
        found: dict[str, Any] = {"ended": case()}
    except (cg.CommGraphError, KeyError) as error:
        found = {"raised": type(error).__name__, "text": str(error)}
    print(json.dumps({"rank": ME, "seconds": round(time.monotonic() - begun, 2), **found}), flush=True)
    raise SystemExit("raised" in found)


if __name__ == "__main__":
    main()
