"""``commgraph generate``: a model of transformers writes text on several processes of this machine."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import commgraph as cg
from commgraph import launch
from commgraph.commands import run_ranks, traffic
from commgraph.errors import CommGraphError, ConfigurationError
from commgraph.integrations.transformers import from_checkpoint
from commgraph.progress import progress

__all__ = ["main"]


@attrs.frozen(kw_only=True)
class _Arguments:
    model: Path
    prompt: str
    tp: int
    pp: int
    draft: Path | None
    draft_tp: int
    tokens: int
    chat: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or one rank of it where a launcher started this process.

    Returns:
        0; 1 if the ranks could not communicate; 2 if the sizes or the files do not fit.
    """
    given = _parse(list(sys.argv[1:] if argv is None else argv))
    rank = 0
    try:
        launched = launch.detect(os.environ)
        rank = launched.rank
        if launched.launcher == "single" and given.tp * given.pp > 1:
            return run_ranks("commgraph generate", _rank, given.tp * given.pp, given)
        with cg.World.from_env() as world:
            return _run(world, given)
    except CommGraphError as error:
        return _complain(error, rank)


def _parse(argv: Sequence[str]) -> _Arguments:
    parser = argparse.ArgumentParser("commgraph generate", description=__doc__)
    parser.add_argument("prompt", help="what to continue, or with --chat to answer")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="checkpoint: config, safetensors files, tokenizer")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    parser.add_argument("--draft", type=Path, metavar="FOLDER", help="checkpoint of a model that proposes tokens")
    parser.add_argument("--draft-tp", type=int, default=1, help="tensor parallel size of the draft (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    return _Arguments(**vars(parser.parse_args(argv)))


def _rank(rank: int, ranks: int, folder: Path, given: _Arguments) -> int:
    """One rank of those that this command starts."""
    try:
        with cg.World.connect(f"file://{folder}/meeting", rank=rank, world_size=ranks) as world:
            return _run(world, given)
    except CommGraphError as error:
        return _complain(error, rank)


def _complain(error: CommGraphError, rank: int) -> int:
    wrong = isinstance(error, ConfigurationError)
    if not wrong or rank == 0:  # every rank finds the same mistake
        what = str(error) if wrong else f"rank {rank}: {type(error).__name__}: {error}"
        print(f"commgraph generate: {what}", file=sys.stderr)
    return 2 if wrong else 1


class _Counting:
    """A streamer, which transformers tells of each token."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Counts tokens; the first call brings the prompt."""
        for _ in range(0 if self.is_prompt else value.numel()):
            self.advance()
        self.is_prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


def _run(world: cg.World, given: _Arguments) -> int:
    """One rank."""
    import transformers

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    transformers.logging.set_verbosity_error()
    target_ctx = world.context(cg.Layout(world.size, tp=given.tp, pp=given.pp), name="target")
    contexts = [target_ctx]
    begin = time.perf_counter()
    model = from_checkpoint(transformers.AutoModelForCausalLM, given.model, target_ctx)
    extra: dict[str, Any] = {}
    if given.draft is not None:
        contexts.append(world.context(cg.Layout(world.size, tp=given.draft_tp), name="draft"))
        extra["assistant_model"] = from_checkpoint(transformers.AutoModelForCausalLM, given.draft, contexts[-1])
    loaded = time.perf_counter() - begin
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    if given.chat:
        chat = [{"role": "user", "content": given.prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(given.prompt, return_tensors="pt")
    inputs = {name: value.to(target_ctx.device) for name, value in inputs.items()}
    before = traffic(*contexts)
    world.group.barrier()
    begin = time.perf_counter()
    with progress("commgraph generate", given.tokens, "tokens", None if world.rank == 0 else io.StringIO()) as advance, torch.no_grad():
        if world.rank == 0:
            extra["streamer"] = _Counting(advance)
        output = model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False, **extra)
    seconds = time.perf_counter() - begin
    moved = {name: count - before[name] for name, count in traffic(*contexts).items()}
    total = sum(map(Counter, world.group.all_gather_object(moved)), Counter())
    if world.rank == 0:
        written = output[0, inputs["input_ids"].shape[1] :]
        print(tokenizer.decode(written, skip_special_tokens=True))
        print(f"\n{len(written)} tokens in {seconds:.1f} s: {len(written) / seconds:.1f} tokens/s; loaded in {loaded:.1f} s")
        print("bytes sent, over all ranks: " + (", ".join(f"{name} {count:,}" for name, count in sorted(total.items())) or "none"))
    for ctx in reversed(contexts):
        ctx.close()
    return 0
