"""The demo's command line: starts the ranks, lets them generate, and compares their tokens with those of an unsharded model."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import commgraph as cg
from commgraph import launch
from commgraph.commands import run_ranks, traffic
from commgraph.demo.config import DEFAULT_PROMPT, WEIGHTS, LlamaConfig, decode, encode, weights_path
from commgraph.demo.engine import Engine, Generated
from commgraph.demo.model import ShardedLlama, check_sizes
from commgraph.demo.reference import Llama, load_checkpoint
from commgraph.errors import CommGraphError, ConfigurationError
from commgraph.layout import draw
from commgraph.progress import LINE_SECONDS

__all__ = ["main"]

# Sums taken in another order differ in their last bits; in float64 they cannot turn one greedy choice into another.
_TARGET_DTYPE: Final = torch.float64
_WARMUP_TOKENS: Final = 4


@attrs.frozen(kw_only=True)
class _Arguments:
    prompt: tuple[str, ...]
    tokens: int
    tp: int
    pp: int
    dp: int
    draft_tp: int
    draft_length: int
    nproc: int
    weights: Path

    def layouts(self) -> tuple[cg.Layout, cg.Layout]:
        """Return the layouts of the target and the draft.

        Raises:
            ConfigurationError: sizes that cannot work, with the reason.
        """
        target = cg.Layout(self.nproc, dp=self.dp, pp=self.pp, tp=self.tp, groups={"engine": ("pp", "tp")})
        draft = cg.Layout(self.nproc, tp=self.draft_tp)
        if self.tp * self.pp % self.draft_tp:
            raise ConfigurationError(
                f"each engine has tp * pp = {self.tp} * {self.pp} = {self.tp * self.pp} ranks, not whole drafts of {self.draft_tp}"
            )
        shapes = self._shapes()
        check_sizes(shapes["target"], "target", tp=self.tp, pp=self.pp)
        check_sizes(shapes["draft"], "draft", tp=self.draft_tp)
        self._check_length(shapes["target"])
        return target, draft

    def _shapes(self) -> dict[str, LlamaConfig]:
        paths = {name: weights_path(name, self.weights) for name in ("target", "draft")}
        if missing := [str(path) for path in paths.values() if not path.is_file()]:
            raise ConfigurationError(
                f"there is no {' and no '.join(missing)}: wheels come without the models' weights, which lie in the folder "
                "commgraph/demo/weights of a checkout and of the source distribution; say where: --weights FOLDER"
            )
        return {name: load_checkpoint(path)[0] for name, path in paths.items()}

    def _check_length(self, config: LlamaConfig) -> None:
        if self.tokens < 1 or self.draft_length < 1:
            raise ConfigurationError(f"--tokens {self.tokens} --draft-length {self.draft_length}: there is at least one of each")
        for prompt in self.prompt:
            length = len(encode(prompt))
            if not 1 <= length <= config.max_positions - self.tokens:
                raise ConfigurationError(
                    f"a prompt of {length} bytes and {self.tokens} tokens after it: the prompt may not be empty, and the model has "
                    f"{config.max_positions} positions for both"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo, or one rank of it where a launcher started this process.

    Returns:
        0; 1 if the tokens differ from those of the unsharded model, or the ranks could not communicate; 2 if the sizes cannot work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        launched = launch.detect(os.environ)
        rank = launched.rank
        arguments = _parse(argv, launched)
        layouts = arguments.layouts()
        if launched.launcher == "single" and arguments.nproc > 1:
            return run_ranks("commgraph demo", _rank, arguments.nproc, arguments, layouts)
        with cg.World.from_env() as world:
            return _run(world, arguments, *layouts)
    except ConfigurationError as error:
        if rank == 0:  # every rank finds the same mistake
            print(f"commgraph demo: {error}", file=sys.stderr)
        return 2
    except CommGraphError as error:
        return _complain(error, rank)


def _parse(argv: Sequence[str], launched: launch.Launch) -> _Arguments:
    parser = argparse.ArgumentParser("commgraph demo", description=__doc__)
    parser.add_argument("--prompt", action="append", help=f"what to continue, once per engine if repeated (default: {DEFAULT_PROMPT!r})")
    parser.add_argument("--tokens", type=int, default=160, help="bytes to write (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallel size of the target (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages of the target (default: %(default)s)")
    parser.add_argument("--dp", type=int, default=1, help="copies of the target in one job (default: %(default)s)")
    parser.add_argument("--draft-tp", type=int, default=1, help="tensor parallel size of the draft (default: %(default)s)")
    parser.add_argument("--draft-length", type=int, default=4, help="tokens proposed per step (default: %(default)s)")
    parser.add_argument("--nproc", type=int, help="processes (default: dp * pp * tp, or what the launcher started)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FOLDER", help="of the models (default: %(default)s)")
    given = parser.parse_args(argv)
    if launched.launcher != "single":
        if given.nproc not in (None, launched.world_size):
            raise ConfigurationError(f"--nproc {given.nproc}, but {launched.launcher} started {launched.world_size} processes")
        given.nproc = launched.world_size
    given.nproc = given.dp * given.pp * given.tp if given.nproc is None else given.nproc
    given.prompt = tuple(given.prompt or [DEFAULT_PROMPT])
    return _Arguments(**vars(given))


def _rank(rank: int, ranks: int, folder: Path, arguments: _Arguments, layouts: tuple[cg.Layout, cg.Layout]) -> int:
    """One rank of those that this command starts."""
    try:
        with cg.World.connect(f"file://{folder}/meeting", rank=rank, world_size=ranks) as world:
            return _run(world, arguments, *layouts)
    except CommGraphError as error:
        return _complain(error, rank)


def _complain(error: CommGraphError, rank: int) -> int:
    print(f"commgraph demo: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


class _Output(Console):
    """A console that leaves it to the command what to do where nobody reads."""

    def on_broken_pipe(self) -> None:
        """Raise, in place of an exit of this rank alone."""
        raise BrokenPipeError


def _run(world: cg.World, arguments: _Arguments, layout: cg.Layout, draft_layout: cg.Layout) -> int:
    """One rank."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    console = _Output(quiet=world.rank != 0, highlight=False)
    with (
        world.context(layout, name="target") as target_ctx,
        world.context(draft_layout, name="draft") as draft_ctx,
    ):
        for ctx in (target_ctx, draft_ctx):
            console.print(f"[bold]{ctx.name}[/]  {draw(ctx.layout)}\n", markup=True, no_wrap=True)
        target = ShardedLlama.load(weights_path("target", arguments.weights), ctx=target_ctx, dtype=_TARGET_DTYPE)
        draft = ShardedLlama.load(weights_path("draft", arguments.weights), ctx=draft_ctx, dtype=torch.float32)
        engine = Engine(target_ctx["engine"], target, draft)
        number = world.rank // engine.group.world_size
        prompt = arguments.prompt[number % len(arguments.prompt)]

        # With and without the draft once before anything is timed: first calls are slow.
        for length in (0, arguments.draft_length):
            engine.generate(encode(prompt), min(_WARMUP_TOKENS, arguments.tokens), draft_length=length)
        before = traffic(target_ctx, draft_ctx)
        written = []
        with _progress(console) as bars:
            for text, length in (("target alone", 0), ("with the draft", arguments.draft_length)):
                world.group.barrier()
                bar = bars.add_task(text, total=arguments.tokens, said="")

                show = _watcher(console, bars, bar, text, arguments.tokens)
                written.append(engine.generate(encode(prompt), arguments.tokens, draft_length=length, progress=show))
        plain, speculative = written
        moved = {name: count - before[name] for name, count in traffic(target_ctx, draft_ctx).items()}

        same_alone = plain.tokens == speculative.tokens
        same_unsharded = True
        if engine.group.is_first_rank:
            oracle = Llama.load(weights_path("target", arguments.weights)).to(_TARGET_DTYPE)
            same_unsharded = oracle.generate(encode(prompt), arguments.tokens) == plain.tokens
        # As plain data, which travels between hosts without an authkey, too.
        mine: Any = None
        if engine.group.is_first_rank:
            mine = (prompt, attrs.asdict(speculative), attrs.asdict(plain), same_alone, same_unsharded)
        told: list[Any] = [report for report in world.group.all_gather_object(mine) if report is not None]
        reports = [(text, Generated(**fast), Generated(**slow), *same) for text, fast, slow, *same in told]
        total = sum(map(Counter, world.group.all_gather_object(moved)), Counter())
        for index, report in enumerate(reports):
            _print_report(console, index if len(reports) > 1 else None, *report)
        console.print("[bold]bytes sent[/], over all ranks: " + ", ".join(f"{name} {count:,}" for name, count in sorted(total.items())))
        return 0 if all(alone and unsharded for *_, alone, unsharded in reports) else 1


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    return Progress(*columns, console=console)


def _watcher(console: Console, bars: Progress, bar: TaskID, text: str, total: int) -> Callable[[Generated], None]:
    """Return a function that shows how far a run is: a bar on a terminal, elsewhere a line now and then."""
    said = time.monotonic()

    def show(so_far: Generated) -> None:
        nonlocal said
        bars.update(bar, completed=len(so_far.tokens), said=_speed(so_far))
        if not console.is_terminal and time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{text}: {len(so_far.tokens)} of {total} tokens, {_speed(so_far)}")

    return show


def _speed(so_far: Generated) -> str:
    drafted = f", {so_far.acceptance:.0%} of the draft accepted" if so_far.proposed else ""
    return f"{so_far.speed:.0f} tokens/s{drafted}"


def _print_report(
    console: Console, engine: int | None, prompt: str, speculative: Generated, plain: Generated, same_alone: bool, same_unsharded: bool
) -> None:
    console.print(f"\n[bold]{'text' if engine is None else f'text of engine {engine}'}[/]  (prompt in bold)")
    console.print(f"[bold]{_plain(prompt)}[/]{_plain(decode(speculative.tokens))}")
    console.print(
        f"\n  {speculative.proposed} tokens proposed by the draft, {speculative.accepted} taken by the target: {speculative.acceptance:.0%}"
    )
    for how, run in (("by the target alone", plain), ("with the draft", speculative)):
        console.print(f"  {run.speed:.1f} tokens/s {how}, in {run.steps} steps of the target")
    for same, what in ((same_alone, "the target alone"), (same_unsharded, "one unsharded process")):
        console.print(f"  [green]same tokens as {what}[/]" if same else f"  [bold red]DIFFERS from {what}[/]")


def _plain(text: str) -> str:
    """`text` with nothing in it that rich takes for markup."""
    return text.replace("[", "\\[")
