"""A rank of a job over several hosts: every kind of operation once, then the facts of its world, as one line of JSON.

Started by torchrun, or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

import commgraph as cg


def main() -> None:
    begun = time.monotonic()
    with cg.World.from_env(timeout=float(os.environ.get("SECONDS_TO_BUILD", "30"))) as world:
        built = time.monotonic() - begun
        context = world.context(cg.Layout(world.size, tp=world.size), name="main")
        tp, n, me = context.tp, world.size, world.rank
        if os.environ.get("DIES"):
            die(tp)
            return
        x = torch.arange(1000.0) + me
        assert torch.equal(tp.all_reduce(x), torch.arange(1000.0) * n + sum(range(n)))
        large = torch.full((1_000_000,), me + 1.0)
        assert torch.equal(tp.all_reduce(large), torch.full_like(large, n * (n + 1) / 2))
        assert tp.all_gather(torch.tensor([me])).tolist() == list(range(n))
        assert tp.reduce_scatter(torch.arange(float(2 * n))).tolist() == [n * 2.0 * me, n * (2.0 * me + 1)]
        assert torch.equal(tp.broadcast(x.clone(), 0), torch.arange(1000.0))
        assert tp.broadcast_object({"from": me}, 0) == {"from": 0}
        assert tp.all_gather_object(me) == list(range(n))
        received = tp.sendrecv(x, tp.next_in_group, x.shape, x.dtype, tp.prev_in_group)
        assert torch.equal(received, torch.arange(1000.0) + tp.prev_in_group)
        found = tp.broadcast_tensor_dict({"x": x, "n": me} if me == 0 else None)
        assert found["n"] == 0
        assert torch.equal(found["x"], torch.arange(1000.0))
        tp.barrier()
        facts = {"rank": me, "nodes": list(world.nodes.values()), "serves": tp.communicators["all_reduce"], "seconds": round(built, 2)}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def die(tp: cg.GroupCoordinator) -> None:
    """Rank 1 kills itself after a first call, or the link is cut in the meantime; a rank says how it heard of that."""
    tp.all_reduce(torch.ones(4))
    if os.environ["DIES"] == "link":
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        time.sleep(2)
    elif tp.rank_in_group == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        tp.all_reduce(torch.ones(4), timeout=60)
    except cg.PeerLostError as error:
        sys.stdout.write(json.dumps({"lost": error.rank, "seconds": time.monotonic() - begun}) + "\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
