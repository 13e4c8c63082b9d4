"""Trains with one layout and generates with another in the same processes, as reinforcement learning does. No file lies in between.

torchrun --nproc-per-node 4 train_and_generate.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import commgraph as cg
from commgraph.integrations.transformers import parallelize
from commgraph.nn import clip_grad_norm_, full_state_dict, load_full_state_dict

STEPS = 3


def small_model() -> Any:
    """Drawn weights, the same on every rank. Where ranks are threads it is made once, before: transformers sets default dtypes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def batch(step: int) -> torch.Tensor:
    return torch.randint(3, 128, (4, 10), generator=torch.Generator("cpu").manual_seed(step))


def generate(model: Any) -> list[list[int]]:
    prompt = torch.arange(3, 9).reshape(2, 3)
    with torch.no_grad():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return output.tolist()


def train(model: Any, rows: slice, ctx: cg.ParallelContext | None = None) -> None:
    """A few steps on `rows` of each batch; gradients are averaged over the data-parallel ranks of `ctx`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters() if ctx is not None else ():
            if ctx is not None and parameter.grad is not None:
                parameter.grad = ctx.dp.all_reduce(parameter.grad, op="avg")
        clip_grad_norm_(model, 1.0) if ctx is not None else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def run(world: cg.World, whole: Any) -> list[list[int]]:
    """Trains over dp=2 and tp=2, moves the weights to a model over tp=4 and generates with that."""
    training = world.context(cg.Layout(4, dp=2, tp=2), name="training")
    rollout = world.context(cg.Layout(4, tp=4), name="rollout")
    policy = parallelize(copy.deepcopy(whole), training)
    actor = parallelize(copy.deepcopy(whole), rollout)
    half = training.dp.rank_in_group
    train(policy, slice(2 * half, 2 * half + 2), training)
    load_full_state_dict(actor, full_state_dict(policy))
    return generate(actor.eval())


def main() -> None:
    whole = small_model()
    with cg.World.from_env() as world:
        tokens = run(world, whole)
        train(whole, slice(None))
        assert tokens == generate(whole.eval())
        if world.rank == 0:
            print(tokens)


if __name__ == "__main__":
    main()
