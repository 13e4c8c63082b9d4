"""FSDP2 and DTensor over meshes of contexts, under torchrun: prints what differs from one process, and nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import commgraph as cg


def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    loss: torch.Tensor = model(x).square().mean().detach()
    return loss


def main() -> None:
    with cg.World.from_env() as world:
        ctx = world.context(cg.Layout(4, dp=2, tp=2), name="a")
        dist.init_process_group("gloo")
        for names in ((), ("tp", "tp"), ("tp", "nosuch"), ("tp", "ep")):
            try:
                ctx.mesh(*names)
            except cg.LayoutError:
                continue
            raise AssertionError(names)
        other = world.context(cg.Layout(4, dp=2, tp=2), name="b")
        mesh, twin = ctx.mesh("dp", "tp"), other.mesh("dp", "tp")
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]], mesh
        assert mesh != twin
        assert ctx.mesh("dp", "tp") == mesh
        # Two meshes over equal ranks, each with groups of its own.
        whole = torch.arange(12.0).reshape(4, 3)
        for one, group in ((mesh, ctx.dp), (twin, other.dp)):
            sub = one[one.mesh_dim_names[0]] if one.mesh_dim_names else one
            tensor = distribute_tensor(whole, sub, [Shard(0)])
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.full_tensor(), whole)
            assert tensor.to_local().shape[0] == 4 // group.world_size
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        x = torch.randn(6, 8)
        expected = [step(model, x) for _ in range(1)]
        torch.manual_seed(0)
        sharded = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        for layer in (*sharded, sharded):
            if not isinstance(layer, torch.nn.ReLU):
                fully_shard(layer, mesh=ctx.mesh("dp"))
        torch.testing.assert_close(step(sharded, x), expected[0])
        held = sum(parameter.to_local().numel() for parameter in sharded.parameters() if isinstance(parameter, DTensor))
        assert 0 < held < sum(parameter.numel() for parameter in model.parameters())
        other.close()
        ctx.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
