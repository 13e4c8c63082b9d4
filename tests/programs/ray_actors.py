"""Ranks as actors of Ray: a World by an address, and one of the default process group that the actors made; argument: a free port."""

from __future__ import annotations

import sys

import ray
import torch
import torch.distributed as dist

import commgraph as cg

RANKS = 2


class Rank:
    def connect(self, rank: int, port: int) -> list[float]:
        with cg.World.connect(f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=60) as world:
            return self.use(world)

    def join(self, rank: int, port: int) -> list[float]:
        """As frameworks on Ray do: torch's default group first."""
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
        try:
            with cg.World.from_torch() as world:
                return self.use(world)
        finally:
            dist.destroy_process_group()

    def use(self, world: cg.World) -> list[float]:
        with world.context(cg.Layout(world.size, tp=world.size), name="main") as context:
            assert context.tp.communicators["all_reduce"][0] == "shm"
            assert context.tp.all_gather_object(world.rank) == list(range(RANKS))
            found: list[float] = context.tp.all_reduce(torch.full((2,), world.rank + 1.0)).tolist()
            return found


ray.init(num_cpus=RANKS, include_dashboard=False, configure_logging=False)
actors = [ray.remote(num_cpus=1)(Rank).remote() for _ in range(RANKS)]
for number, call in enumerate(("connect", "join")):
    found = ray.get([getattr(actor, call).remote(rank, int(sys.argv[1]) + number) for rank, actor in enumerate(actors)], timeout=120)
    assert found == [[3.0, 3.0]] * RANKS, (call, found)
ray.shutdown()
print("done", flush=True)
