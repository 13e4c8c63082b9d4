"""A mixture of experts: attention is data parallel, each rank with prompts of its own, and experts lie on the ranks of ep.

torchrun --nproc-per-node 4 mixture_of_experts.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import commgraph as cg
from commgraph.integrations.transformers import parallelize


def small_model() -> Any:
    """Drawn weights, the same on every rank. Where ranks are threads it is made once, before: transformers sets default dtypes."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def prompt_of(rank: int) -> torch.Tensor:
    """Prompts of different lengths: the ranks' rows are uneven."""
    return torch.arange(3, 8 + 3 * rank).unsqueeze(0)


def generate(model: Any, prompt: torch.Tensor) -> list[int]:
    tokens = 4 + prompt.shape[1] % 3  # ranks also end at different steps
    with torch.no_grad():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return output[0].tolist()


def run(world: cg.World, whole: Any) -> tuple[list[int], float]:
    """Generates each rank's own continuation, and returns it with the part of the parameters that the rank holds."""
    ctx = world.context(cg.Layout(world.size, dp=world.size), name="moe")
    model = parallelize(copy.deepcopy(whole), ctx, experts="ep")
    held = sum(parameter.numel() for parameter in model.parameters()) / sum(parameter.numel() for parameter in whole.parameters())
    return generate(model, prompt_of(world.rank)), held


def main() -> None:
    whole = small_model()
    with cg.World.from_env() as world:
        tokens, held = run(world, whole)
        print(f"rank {world.rank} holds {held:.0%} of the model and wrote {tokens}")
        assert tokens == generate(whole, prompt_of(world.rank))


if __name__ == "__main__":
    main()
