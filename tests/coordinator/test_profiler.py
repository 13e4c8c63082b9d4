"""torch.profiler shows calls by context, group and operation; without a profiler nothing is paid for it."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import commgraph as cg
from commgraph.testing import spmd

OPERATIONS = {
    *("all_reduce", "all_reduce_", "reduce_scatter", "all_gather", "all_to_all", "gather", "scatter", "broadcast", "reduce", "barrier"),
    *("send", "recv", "isend", "irecv", "all_reduce_async", "broadcast_object", "all_gather_object", "send_object", "recv_object"),
    *("scatter_object", "gather_object", "broadcast_tensor_dict", "send_tensor_dict", "recv_tensor_dict"),
}


def run_all(g: cg.GroupCoordinator) -> None:
    x, me = torch.ones(4), g.rank_in_group
    tree = {"a": x}
    g.all_reduce(x)
    g.all_reduce_(x.clone())
    g.reduce_scatter(x)
    g.all_gather(x)
    g.all_to_all(x)
    g.gather(x)
    g.scatter(x if me == 0 else None)
    g.broadcast(x)
    g.reduce(x)
    g.barrier()
    g.all_reduce_async(x).wait()
    g.broadcast_object(me)
    g.all_gather_object(me)
    g.gather_object(me)
    g.scatter_object([1, 2] if me == 0 else None)
    g.broadcast_tensor_dict(tree if me == 0 else None)
    if me == 0:
        g.send(x, 1)
        g.isend(x, 1).wait()
        g.send_object(1, 1)
        g.send_tensor_dict(tree, 1)
    else:
        g.recv(4, x.dtype, 0)
        g.irecv(4, x.dtype, 0).wait()
        g.recv_object(0)
        g.recv_tensor_dict(0)


@pytest.mark.parametrize("shm", [True, False], ids=["shm", "gloo"])
def test_calls_are_named(shm: bool) -> None:
    def body(world: cg.World) -> set[str]:
        with world.context(cg.Layout(2, tp=2), name="target", options=cg.CommunicatorOptions(shm=shm)) as context:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run_all(context.tp)
                context.world.sibling("other").all_reduce(torch.ones(2))
                world.group.all_reduce(torch.ones(2))
            run_all(context.tp)  # not shown, and as before
        return {event.key for event in seen.key_averages()}

    # One after the other: there is one profiler in a process.
    names = spmd(lambda world: body(world) if world.rank == 0 else rest(world, shm), 2)[0]
    alone = {"send", "recv", "irecv", "recv_object", "recv_tensor_dict"}
    shown = {f"target/tp/{operation}" for operation in OPERATIONS - alone}
    assert (shown | {"target/tp/send", "target/other/all_reduce", "world/all_reduce"}) - names == set()


def rest(world: cg.World, shm: bool) -> set[str]:
    with world.context(cg.Layout(2, tp=2), name="target", options=cg.CommunicatorOptions(shm=shm)) as context:
        run_all(context.tp)
        context.world.sibling("other").all_reduce(torch.ones(2))
        world.group.all_reduce(torch.ones(2))
        run_all(context.tp)
    return set()
