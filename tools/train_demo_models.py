"""Train the two byte-level language models that ``commgraph demo`` runs.

    python tools/train_demo_models.py --out commgraph/demo/weights

The text is English that comes with Python itself: the prose of ``pydoc_data.topics`` (the language reference, as ``help()`` shows it), some
160 KB without code, grammar, tables and markup. The target sees it thirty-seven times over and learns much of it by heart, on purpose: its
greedy continuations read well. The draft learns the target's distribution, on that text and on text that the target wrote, since that is
what it has to guess in speculative decoding.

Every batch follows from the seed and the step, so a run is repeatable (same Python, same torch, same number of threads) and, with
``--checkpoints``, may be interrupted. On two cores the target takes about half an hour, the draft a quarter.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from commgraph.demo.config import DEFAULT_PROMPT, LlamaConfig, decode, encode
from commgraph.demo.reference import KVCache, Llama, speculate

TARGET: Final = LlamaConfig(hidden_size=192, intermediate_size=448, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=24)
DRAFT: Final = LlamaConfig(hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32)
BATCH_BYTES: Final = 2048
PROMPTS: Final = (
    DEFAULT_PROMPT,
    "A class is",
    "If the list is empty,",
    "The value of the expression",
    "The with statement is used to",
    "This module provides",
    "Return the",
    "Once upon a time",
)

Loss = Callable[[int, int], Tensor]  # (length of the windows, seed of the batch) -> scalar


# The text


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of plain English in ``text``, each on one line, without markup; code, grammar and tables are left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if re.match(r"( *)[^ *].*\n\1 ", block):
            lines = lines[1:]  # the first was the term of a definition list
        words = " ".join(lines).translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0x2014: "-", 0x2013: "-"})
        line = re.sub(r"^\* |\*\*|``|(?<=\W)\*(?=\w)|(?<=\w)\*(?=\W)", "", " ".join(words.split()))
        letters = sum(c.isalpha() or c == " " for c in line)
        if (
            line.isascii()
            and re.match(r"[A-Z]", line)
            and line.endswith((".", ":"))
            and letters > 0.92 * len(line)
            and not re.search(r">>>|::=|\.\.\. |\[\d+\]|[|{}<>@]|__future__ import|--", line)
        ):
            yield line


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes ``[N]`` to train on and to test on (every fiftieth paragraph)."""
    lines = list(dict.fromkeys(line for topic in pydoc_data.topics.topics.values() for line in paragraphs(topic) if len(line) >= 60))
    held_out = set(lines[::50])
    parts = ("\n".join(line for line in lines if (line in held_out) == held) + "\n" for held in (False, True))
    train, test = (torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8) for part in parts)
    return train, test


# Training


@attrs.frozen
class Run:
    """How long and from where; ``checkpoints`` is a folder, or None to keep nothing in between."""

    name: str
    steps: int
    peak_rate: float
    seed: int
    checkpoints: Path | None


def windows(data: Tensor, length: int, seed: int) -> Tensor:
    """A batch ``[BATCH_BYTES // length, length + 1]`` from random places of ``data``."""
    starts = torch.randint(len(data) - length, (BATCH_BYTES // length,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + length + 1] for start in starts.tolist()]).long()


def initialise(model: Llama, seed: int) -> None:
    """Normal weights; the projections that write to the residual stream start smaller, by its depth."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.05 / (math.sqrt(2 * model.config.num_layers) if residual else 1), generator=generator)


def train(model: Llama, run: Run, loss_of: Loss, report: Callable[[], str]) -> None:
    """AdamW, warm-up and cosine; the last sixth of the steps sees windows as long as ``max_positions``, the others half as long."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    scales = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}], betas=(0.9, 0.99), fused=True
    )
    first, saved = 0, run.checkpoints / f"{run.name}.pt" if run.checkpoints else None
    if saved and saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, mean = time.monotonic(), 0.0
    for step in range(first, run.steps):
        rate = run.peak_rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / run.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = model.config.max_positions // (1 if step >= run.steps * 5 // 6 else 2)
        loss = loss_of(length, run.seed * 1_000_003 + step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == first else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            speed = (step + 1 - first) * BATCH_BYTES / (time.monotonic() - began)
            print(f"{run.name} {step + 1}/{run.steps}: loss {mean / math.log(2):.3f} bits per byte, {speed:.0f} bytes/s", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == run.steps:
            print(report(), flush=True)
            if saved:
                saved.parent.mkdir(parents=True, exist_ok=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, saved.with_suffix(".tmp"))
                saved.with_suffix(".tmp").replace(saved)


def cross_entropy(model: Llama, tokens: Tensor) -> Tensor:
    """Nats per byte of ``model`` on ``tokens`` ``[B, T + 1]``."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Llama, data: Tensor) -> float:
    """Bits per byte over a few batches from fixed places of ``data``, with 256 bytes of context at most."""
    return sum(cross_entropy(model, windows(data, 256, seed)).item() for seed in range(8)) / 8 / math.log(2)


def stored(model: Llama) -> Llama:
    """``model`` with its parameters rounded as the file will hold them."""
    rounded = Llama(model.config).eval().requires_grad_(False)
    rounded.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    return rounded


def save(model: Llama, path: Path) -> None:
    """Write ``model`` as float16 with its configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata=model.config.to_metadata())
    path.chmod(0o644)
    print(f"wrote {path}: {sum(t.numel() for t in tensors.values())} parameters, {path.stat().st_size} bytes", flush=True)


def train_target(data: Tensor, test: Tensor, run: Run) -> Llama:
    """The target: next-byte prediction on ``data`` ``[N]``."""
    model = Llama(TARGET)
    initialise(model, run.seed)

    def report() -> str:
        text = decode(model.generate(encode(DEFAULT_PROMPT), 200))
        return f"  seen text {bits_per_byte(model, data):.3f}, held-out {bits_per_byte(model, test):.3f}: {DEFAULT_PROMPT}{text!r}"

    train(model, run, lambda length, seed: cross_entropy(model, windows(data, length, seed)), report)
    return stored(model)


# The draft


@torch.no_grad()
def written(target: Llama, data: Tensor, count: int, seed: int) -> Tensor:
    """What ``target`` writes after ``count`` short prompts out of ``data``: ``[count, max_positions + 1]``, half greedy, half sampled."""
    generator = torch.Generator().manual_seed(seed)
    begins = (data[:-1] == ord("\n")).nonzero().flatten() + 1
    begins = begins[begins < len(data) - 64]
    rows = []
    for _ in range(count // 128):
        length = int(torch.randint(6, 48, (), generator=generator))
        starts = begins[torch.randint(len(begins), (128,), generator=generator)]
        starts[::2] = torch.randint(len(data) - 64, (64,), generator=generator)  # every other one begins anywhere
        tokens = torch.stack([data[start : start + length] for start in starts.tolist()]).long()
        cache = KVCache()
        logits = target(tokens, cache)[:, -1]
        while tokens.shape[1] <= target.config.max_positions:
            greedy = logits.argmax(-1)
            sampled = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator).flatten()
            new = torch.where(torch.arange(len(tokens)) % 4 < 2, greedy, sampled)[:, None]
            tokens = torch.cat((tokens, new), dim=1)
            logits = target(new, cache)[:, -1]
        rows.append(tokens)
    return torch.cat(rows)


def train_draft(target: Llama, data: Tensor, run: Run, sequences: int) -> Llama:
    """The draft: it learns the distribution of ``target``, and above all its first choice, on ``data`` and on what ``target`` writes."""
    model = Llama(DRAFT)
    initialise(model, run.seed)
    span = target.config.max_positions
    texts = torch.cat((data.long().unfold(0, span + 1, span // 2), written(target, data, sequences, run.seed)))  # [N, span + 1]
    with torch.no_grad():
        truths = torch.cat([target(rows[:, :-1]).half() for rows in texts.split(32)])  # [N, span, vocab_size]
    print(f"{len(texts)} lessons; the target wrote {decode(texts[-3].tolist())!r}", flush=True)

    def loss_of(length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(texts), (BATCH_BYTES // length,), generator=generator)
        start = int(torch.randint(span - length + 1, (), generator=generator))
        truth = truths[rows, start : start + length].flatten(0, 1).float()
        logits = model(texts[rows, start : start + length]).flatten(0, 1)
        return 0.5 * F.cross_entropy(logits, truth.softmax(-1)) + 0.5 * F.cross_entropy(logits, truth.argmax(-1))

    train(model, run, loss_of, lambda: f"  accepted {acceptance(target, model, 4):.1%}")
    return stored(model)


def acceptance(target: Llama, draft: Llama, draft_length: int) -> float:
    """Accepted share of the draft's proposals in greedy speculative decoding, over 200 bytes after each of the prompts."""
    results = [speculate(target, draft, encode(prompt), 200, draft_length=draft_length) for prompt in PROMPTS]
    return sum(result.accepted for result in results) / sum(result.proposed for result in results)


def main() -> None:
    """Train both, write both, say how good they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for target.safetensors and draft.safetensors")
    parser.add_argument("--checkpoints", type=Path, default=None, help="folder to resume from; none: start afresh, keep nothing")
    parser.add_argument("--target-steps", type=int, default=3000)
    parser.add_argument("--draft-steps", type=int, default=4000)
    parser.add_argument("--sequences", type=int, default=1024, help="sequences that the target writes for the draft to learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data, test = corpus()
    print(f"text: {len(data)} bytes to train on, {len(test)} held out", flush=True)
    target = train_target(data, test, Run("target", args.target_steps, 2.5e-3, args.seed, args.checkpoints))
    save(target, args.out / "target.safetensors")
    draft = train_draft(target, data, Run("draft", args.draft_steps, 3e-3, args.seed + 1, args.checkpoints), args.sequences)
    save(draft, args.out / "draft.safetensors")

    for name, model in (("target", target), ("draft", draft)):
        print(f"{name}: {bits_per_byte(model, data):.3f} bits per byte on seen text, {bits_per_byte(model, test):.3f} on held-out text")
    for prompt in PROMPTS:
        result = speculate(target, draft, encode(prompt), 200, draft_length=4)
        print(f"accepted {result.acceptance:.1%}: {prompt}|{decode(result.tokens)!r}")
    for draft_length in (2, 3, 4, 5):
        print(f"accepted at draft length {draft_length}: {acceptance(target, draft, draft_length):.1%}")


if __name__ == "__main__":
    main()
