"""FSDP2 over the data-parallel group of a context, around layers that are cut over its tensor-parallel group.

torchrun --nproc-per-node 4 fsdp_over_a_mesh.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import commgraph as cg
from commgraph.integrations.transformers import parallelize


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    whole = LlamaForCausalLM(config)
    ids = torch.randint(3, 128, (4, 10), generator=torch.Generator("cpu").manual_seed(1))
    with cg.World.from_env() as world:
        dist.init_process_group("gloo")  # FSDP2 finds its groups through the default one
        ctx = world.context(cg.Layout(4, dp=2, tp=2), name="training")
        model = parallelize(copy.deepcopy(whole), ctx)
        mesh = ctx.mesh("dp")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        half = ctx.dp.rank_in_group
        rows = ids[2 * half : 2 * half + 2]
        model(input_ids=rows, labels=rows).loss.backward()  # reduces gradients over dp as it goes
        whole(input_ids=ids, labels=ids).loss.backward()
        norm = model.model.norm.weight.grad.full_tensor()
        torch.testing.assert_close(norm, whole.model.norm.weight.grad, rtol=1e-4, atol=1e-6)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in whole.parameters())
        print(f"rank {world.rank} holds {held / total:.0%} of the parameters")
        ctx.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
