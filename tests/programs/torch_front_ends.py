"""torch's front ends over the backend commgraph, each against an unsharded run of the same: run on two ranks by torchrun.

torchrun --nproc-per-node 2 tests/programs/torch_front_ends.py FOLDER [names]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import commgraph as cg
import commgraph.torch_backend
from commgraph.nn import ColumnParallelLinear, RowParallelLinear, load_sharded_state_dict, sharded_state_dict

folder = Path(sys.argv[1])


def model() -> nn.Sequential:
    """The same on every rank and in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def batch() -> torch.Tensor:
    """Four rows, of which each rank takes two."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def rows() -> torch.Tensor:
    return batch().chunk(2)[dist.get_rank()]


def trained(module: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def reference() -> dict[str, torch.Tensor]:
    """The weights of a model that was trained in one process on the whole batch."""
    whole = model()
    trained(whole, batch())
    return whole.state_dict()


def equal(state: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(state[name], x)


def mesh(*shape: int, names: tuple[str, ...] = ("dp",)) -> DeviceMesh:
    made = init_device_mesh("cpu", shape or (2,), mesh_dim_names=names)
    assert isinstance(made.get_group(names[0]), commgraph.torch_backend.ProcessGroup)
    return made


def ddp() -> None:
    for how in ({}, {"bucket_cap_mb": 0.0001, "static_graph": True}, {"gradient_as_bucket_view": True, "find_unused_parameters": True}):
        module = DistributedDataParallel(model(), **how)
        trained(module, rows())
        equal(module.module.state_dict(), reference())


def ddp_with_a_hook() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    module = DistributedDataParallel(model())
    module.register_comm_hook(dist.group.WORLD, allreduce_hook)
    trained(module, rows())
    equal(module.module.state_dict(), reference())


def fsdp() -> None:
    module = model()
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh())
    fully_shard(module, mesh=mesh())
    trained(module, rows())
    equal({name: x.full_tensor() for name, x in module.state_dict().items()}, reference())
    # torch.distributed.checkpoint of the shards, loaded by an unsharded model and by another sharded one.
    dcp.save({"model": get_model_state_dict(module)}, checkpoint_id=folder / "fsdp")
    whole = model()
    state = {"model": whole.state_dict()}
    dcp.load(state, checkpoint_id=folder / "fsdp")
    equal(whole.state_dict(), reference())
    other: Any = fully_shard(model(), mesh=mesh())
    part = {"model": get_model_state_dict(other)}
    dcp.load(part, checkpoint_id=folder / "fsdp")
    set_model_state_dict(other, part["model"])
    equal({name: x.full_tensor() for name, x in other.state_dict().items()}, reference())


def tensor_parallel() -> None:
    module = parallelize_module(model(), mesh(names=("tp",)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    trained(module, batch())
    equal({name: x.full_tensor() for name, x in module.state_dict().items()}, reference())


def dtensor() -> None:
    line, x = mesh(), torch.arange(30.0).view(5, 6)
    cut = distribute_tensor(x, line, [Shard(0)])
    assert cut.to_local().shape[0] in (2, 3)
    assert torch.equal(cut.full_tensor(), x)
    turned = cut.redistribute(line, [Shard(1)])
    assert torch.equal(turned.to_local(), x.chunk(2, 1)[dist.get_rank()])
    product: Any = cut.t() @ cut
    assert torch.equal(product.redistribute(line, [Replicate()]).to_local(), x.t() @ x)
    total: Any = DTensor.from_local(torch.ones(2), line, [Shard(0)]).sum()
    assert torch.equal(total.full_tensor(), torch.tensor(4.0))


def meshes() -> None:
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    assert plane["dp"].size() == 2
    assert dist.get_world_size(plane["tp"].get_group()) == 1
    assert plane["dp", "tp"]._flatten().size() == 2


def pipelining() -> None:
    module, rank = model(), dist.get_rank()
    part: Any = module[:2] if rank == 0 else module[2:]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, _: y.square().mean())
    if rank == 0:
        schedule.step(batch())
    else:
        schedule.step(target=torch.zeros(4, 6))
    whole = model()
    sum(whole(x).square().mean() for x in batch().chunk(2)).backward()  # type: ignore[union-attr]  # two losses
    for p, of in zip(part.parameters(), (whole[:2] if rank == 0 else whole[2:]).parameters(), strict=True):
        assert of.grad is not None
        torch.testing.assert_close(p.grad, of.grad / 2)


def layers_of_commgraph() -> None:
    """A model sharded by commgraph.nn with tp=2, saved by torch's checkpoint over this backend, and loaded with tp=1."""
    with cg.World.from_torch() as world:
        states = {}
        for tp in (2, 1):
            with world.context(cg.Layout(2, tp=tp), name=f"tp{tp}") as ctx:
                torch.manual_seed(tp)  # other weights than those that are loaded
                first, second = ColumnParallelLinear(6, 10, ctx=ctx), RowParallelLinear(10, 4, ctx=ctx)
                layers = nn.ModuleList([first, second])
                state = {"model": sharded_state_dict(layers)}
                if tp == 2:
                    dcp.save(state, checkpoint_id=folder / "nn")
                    states[tp] = ctx.tp.all_gather(first.weight.detach(), 0), ctx.tp.all_gather(second.weight.detach(), 1)
                else:
                    dcp.load(state, checkpoint_id=folder / "nn")
                    load_sharded_state_dict(layers, state["model"])
                    states[tp] = first.weight.detach(), second.weight.detach()
        assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))


def functional_and_compiled() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = fc.all_reduce(x, "sum", group)
        gathered = fc.all_gather_single(x, 0, group)
        part = fc.reduce_scatter_single(gathered, "sum", 0, group)
        turned = fc.all_to_all_single(gathered, None, None, group)
        return total + 1, gathered * 2, part - 1, turned + 0, fc.broadcast(x, 1, group) + 0

    x = torch.arange(4.0) + 10 * rank
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        total, gathered, part, turned, sent = function(x)
        both = torch.cat([torch.arange(4.0), torch.arange(4.0) + 10])
        assert torch.equal(total, 2 * torch.arange(4.0) + 11)
        assert torch.equal(gathered, both * 2)
        assert torch.equal(part, 2 * both.chunk(2)[rank] - 1)
        assert torch.equal(turned, both.chunk(2)[rank].repeat(2))
        assert torch.equal(sent, torch.arange(4.0) + 10)


def objects_and_messages() -> None:
    rank = dist.get_rank()
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, {"rank": rank, "set": {1, rank}})
    assert seen == [{"rank": 0, "set": {0, 1}}, {"rank": 1, "set": {1}}]
    some: list[Any] = ["a", {1: 2}] if rank == 0 else [None, None]
    dist.broadcast_object_list(some, 0)
    assert some == ["a", {1: 2}]
    got: list[Any] = [None]
    dist.scatter_object_list(got, ["x", ("y",)] if rank == 0 else None, 0)
    assert got == ["x" if rank == 0 else ("y",)]
    all_of: list[Any] | None = [None, None] if rank == 1 else None
    dist.gather_object(rank, all_of, 1)
    assert rank == 0 or all_of == [0, 1]
    x = torch.full((3,), float(rank))
    if rank == 0:
        dist.send(x, 1, tag=5)
        assert dist.recv(x) == 1
        dist.send_object_list([{"a": 1}], 1)
    else:
        dist.recv(x, 0, tag=5)
        dist.send(x + 7, 0)
        box: list[Any] = [None]
        dist.recv_object_list(box, 0)
        assert box == [{"a": 1}]
    assert x.tolist() == [7.0 if rank == 0 else 0.0] * 3
    out, y = torch.zeros(1), torch.tensor([float(rank)])
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, y, 1 - rank), dist.P2POp(dist.irecv, out, 1 - rank)]):
        work.wait()
    assert out.item() == 1 - rank
    with dist._coalescing_manager(async_ops=True) as together:
        tensors = [torch.ones(2) * rank, torch.ones(3)]
        for tensor in tensors:
            dist.all_reduce(tensor)
    together.wait()
    assert [tensor.tolist() for tensor in tensors] == [[1.0] * 2, [2.0] * 3]
    # Complex numbers and bools, which torch itself hands over as others.
    z = torch.tensor([1 + 2j]) * (rank + 1)
    dist.all_reduce(z)
    assert z.item() == 3 + 6j
    flag = torch.tensor([rank == 1])
    dist.all_reduce(flag, dist.ReduceOp.BOR)
    assert flag.item()


def groups_of_groups() -> None:
    """Groups of some ranks, of other options and of another backend, in one process."""
    alone = dist.new_group([0], backend="commgraph")
    checked = dist.new_group(backend="commgraph", pg_options=cg.CommunicatorOptions(check=True), timeout=timedelta(seconds=20))
    gloo = dist.new_group(backend="gloo")
    x = torch.ones(2)
    if dist.get_rank() == 0:
        dist.all_reduce(x, group=alone)
    dist.all_reduce(x, group=gloo)
    call: Callable[..., Any] = partial(dist.broadcast, x, 0) if dist.get_rank() else partial(dist.all_reduce, x)
    with pytest.raises(cg.CollectiveMismatchError, match="broadcast"):
        call(group=checked)
    dist.destroy_process_group(gloo)
    dist.destroy_process_group(checked)


def nobody_comes() -> None:
    """A deadline; the other groups go on."""
    short = dist.new_group(timeout=timedelta(seconds=0.5))
    if dist.get_rank() == 0:
        with pytest.raises(cg.CollectiveTimeoutError, match="rank 1"):
            dist.all_reduce(torch.ones(1), group=short)
    dist.barrier()


PARTS: tuple[Callable[[], None], ...] = (
    ddp,
    ddp_with_a_hook,
    fsdp,
    tensor_parallel,
    dtensor,
    meshes,
    pipelining,
    layers_of_commgraph,
    functional_and_compiled,
    objects_and_messages,
    groups_of_groups,
    nobody_comes,
)


def main() -> None:
    dist.init_process_group("cpu:commgraph", timeout=timedelta(seconds=60))
    assert isinstance(dist.group.WORLD, commgraph.torch_backend.ProcessGroup)
    for part in PARTS:
        if len(sys.argv) < 3 or part.__name__ in sys.argv[2:]:
            part()
            if dist.get_rank() == 0:
                print(part.__name__, flush=True)
    assert dist.group.WORLD.world.group.bytes_sent > 0
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
