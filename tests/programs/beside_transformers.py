"""commgraph beside transformers' own tensor parallelism, on one model, in the same two processes, by turns; under torchrun.

Arguments: the folder of a checkpoint, and how many rounds (3). Prints a line each, medians over the rounds: seconds to load and seconds of
a processor within them (which others on a busy machine change less), MiB of anonymous memory, greedy and prompt tokens a second.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import commgraph as cg
from commgraph.integrations.transformers import from_checkpoint

TOKENS, PROMPT = 12, 256


def anonymous() -> int:
    """Bytes of memory that belong to no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    begin = time.perf_counter()
    found = run()
    dist.barrier()
    return time.perf_counter() - begin, found


@torch.no_grad()
def decode(model: Any) -> Any:
    ids = torch.arange(3, 11).unsqueeze(0)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )


@torch.no_grad()
def prefill(model: Any) -> Any:
    return model(torch.arange(3, 3 + PROMPT).unsqueeze(0), logits_to_keep=1).logits


def main() -> None:
    folder, rounds = sys.argv[1], int((sys.argv[2:] or ["3"])[0])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")  # transformers needs it; commgraph does not
    from transformers.distributed import DistributedConfig

    with cg.World.from_torch() as world:
        ctx = world.context(cg.Layout(2, tp=2), name="model")
        loads: dict[str, Callable[[], Any]] = {
            "commgraph": lambda: from_checkpoint(transformers.LlamaForCausalLM, folder, ctx),
            "transformers": lambda: transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)),
        }
        models: dict[str, Any] = {}
        said: dict[str, dict[str, list[float]]] = {
            name: {"load": [], "cpu": [], "memory": [], "decode": [], "prefill": []} for name in loads
        }
        for turn in range(rounds):
            for name in sorted(loads, reverse=bool(turn % 2)):
                models.pop(name, None)
                before, began = anonymous(), time.process_time()
                seconds, models[name] = timed(loads[name])
                said[name]["load"].append(seconds)
                said[name]["cpu"].append(time.process_time() - began)
                said[name]["memory"].append((anonymous() - before) / 2**20)
        for model in models.values():
            decode(model)
            prefill(model)
        for turn in range(rounds):
            for name in sorted(loads, reverse=bool(turn % 2)):
                said[name]["decode"].append(TOKENS / timed(functools.partial(decode, models[name]))[0])
                said[name]["prefill"].append(PROMPT / timed(functools.partial(prefill, models[name]))[0])
        if world.rank == 0:
            for name, figures in said.items():
                middle = {key: sorted(values)[len(values) // 2] for key, values in figures.items()}
                print(name, " ".join(f"{key} {value:.3f}" for key, value in middle.items()), flush=True)
        ctx.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
