"""Every operation on two contexts, in each of a launcher's processes; then an end of the kind that the first argument names.

close: leaves the world as it should be left. exit: the interpreter ends with everything open. Rank 0 prints "done" where all was right.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

import torch

import commgraph as cg

end = sys.argv[1]
before = dict(os.environ)
world = cg.World.from_env(timeout=timedelta(seconds=30))
assert dict(os.environ) == before
n, r = world.size, world.rank
target = world.context(cg.Layout(n, tp=2, pp=n // 2) if n % 2 == 0 else cg.Layout(n, tp=n), name="target")
draft = world.context(cg.Layout(n), name="draft")
world_of_one = world.split([r])

for name in target.layout.names:
    g = target[name]
    m, me = g.world_size, g.rank_in_group
    ranks = torch.tensor(g.ranks, dtype=torch.float32)
    x = torch.full((2, m), float(r))
    assert torch.equal(g.all_reduce(x), torch.full((2, m), float(sum(g.ranks))))
    assert torch.equal(g.all_reduce_(x.clone(), op="max"), torch.full((2, m), float(max(g.ranks))))
    assert torch.equal(g.all_gather(torch.tensor([float(r)])), ranks)
    assert torch.equal(g.reduce_scatter(x), torch.full((2, 1), float(sum(g.ranks))))
    uneven = g.all_gatherv(torch.full((me + 1,), r), sizes=[i + 1 for i in range(m)])
    assert isinstance(uneven, torch.Tensor)
    assert uneven.shape == (m * (m + 1) // 2,)
    assert g.reduce_scatterv(torch.ones(m * (m + 1) // 2), sizes=[i + 1 for i in range(m)]).tolist() == [float(m)] * (me + 1)
    assert torch.equal(g.all_to_all(torch.full((m, 1), float(r))).flatten(), ranks)
    gathered = g.gather(torch.tensor([float(r)]), dst=m - 1)
    assert gathered is None if me != m - 1 else torch.equal(gathered, ranks)
    assert g.broadcast(torch.tensor([r]), src=m - 1).tolist() == [g.last_rank]
    assert g.broadcast_object({"from": r}, src=m - 1) == {"from": g.last_rank}
    assert g.broadcast_object_list([r, str(r)], src=0) == [g.first_rank, str(g.first_rank)]
    assert g.all_gather_object((r, os.getpid()))[me] == (r, os.getpid())
    sent = g.broadcast_tensor_dict({"a": {"b": torch.arange(3)}, "c": 1} if me == 0 else None, src=0)
    assert sent["c"] == 1
    if m > 1:
        if me % 2 == 0 and me + 1 < m:
            g.send(torch.tensor([r]))
            g.send_object([r], me + 1)
            g.send_tensor_dict({"x": torch.tensor([r]), "y": "text"})
        elif me % 2:
            assert g.recv((1,), torch.int64).tolist() == [g.prev_rank]
            assert g.recv_object(me - 1) == [g.prev_rank]
            received = g.recv_tensor_dict()
            assert (received["x"].tolist(), received["y"]) == ([g.prev_rank], "text")
    g.barrier()
assert draft.tp.all_gather_object(r) == [r]
assert world_of_one.size == 1
assert sorted(target.world.all_gather_object(world.local_rank)) == list(range(n))  # in an order of the launcher's
assert (world.node_count, world.local_size) == (1, n)

if end == "close":
    world.close()
    assert target.closed
else:
    # Nobody waits for anybody: ranks come to their ends at different times, each with open groups and a receive under way.
    if n > 1:
        with contextlib.suppress(cg.CollectiveTimeoutError, cg.PeerLostError):
            target.world.recv_object((target.world.rank_in_group + 1) % n, timeout=0.05)
if r == 0:
    print("done", flush=True)
