"""Tokens that a model of transformers draws, on ranks whose random states differ: ``sampled.py FOLDER SIZES DRAFT``, under a launcher.

SIZES are of a `Layout`, as JSON; with DRAFT ``1`` the model's first half of layers proposes tokens, whole on each rank. Each rank prints
its tokens as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import commgraph as cg
from commgraph.integrations.transformers import from_checkpoint


def main() -> None:
    folder, sizes, drafts = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "1"
    torch.set_num_threads(1)
    with cg.World.from_env() as world:
        model = from_checkpoint(AutoModelForCausalLM, folder, world.context(cg.Layout(world.size, **sizes), name="target"))
        extra = {}
        if drafts:
            config = AutoConfig.from_pretrained(folder)
            config.num_hidden_layers //= 2
            extra["assistant_model"] = from_checkpoint(config, folder, world.context(cg.Layout(world.size), name="draft"))
        torch.manual_seed(world.rank)
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            found = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=16, pad_token_id=0, **extra)
        print(json.dumps(found[0].tolist()))


if __name__ == "__main__":
    main()
