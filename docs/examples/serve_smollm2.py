"""Serves a causal model of Hugging Face on every process, cut by tensor or pipeline parallelism, with a draft in the same processes.

    torchrun --nproc-per-node 3 serve_smollm2.py FOLDER --tp 3
    torchrun --nproc-per-node 2 serve_smollm2.py FOLDER --pp 2

FOLDER holds a checkpoint: config, safetensors files and tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import commgraph as cg
from commgraph.integrations.transformers import from_checkpoint

QUESTION = "Name three things that a good library needs."


def draft_config(folder: Path, layers: int) -> Any:
    """The configuration of a draft that is the first layers of the model itself."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    return config


def serve(world: cg.World, folder: Path, *, tp: int = 1, pp: int = 1, tokens: int = 48, draft_layers: int = 20) -> dict[str, list[int]]:
    """Generates greedily, without and with the draft: the same tokens, which every rank returns."""
    target_ctx = world.context(cg.Layout(world.size, tp=tp, pp=pp), name="target")
    draft_ctx = world.context(cg.Layout(world.size), name="draft")  # whole on each rank
    target = from_checkpoint(AutoModelForCausalLM, folder, target_ctx)
    draft = from_checkpoint(draft_config(folder, draft_layers), folder, draft_ctx)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    written = {}
    for name, arguments in (("alone", {}), ("with the draft", {"assistant_model": draft})):
        with torch.no_grad():
            output = target.generate(**inputs, max_new_tokens=tokens, do_sample=False, **arguments)
        written[name] = output[0, length:].tolist()
    if world.rank == 0:
        print(tokenizer.decode(written["alone"]))
    return written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    given = parser.parse_args()
    with cg.World.from_env() as world:
        written = serve(world, given.folder, tp=given.tp, pp=given.pp)
        assert written["alone"] == written["with the draft"]


if __name__ == "__main__":
    main()
