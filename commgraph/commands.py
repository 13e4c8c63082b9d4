"""Common to all commands: how they end, and the ranks that they start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from commgraph.context import ParallelContext

__all__ = ["INTERRUPTED", "UNREAD", "ended_well", "run_ranks", "traffic"]

INTERRUPTED: Final = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""

UNREAD: Final = 128 + signal.SIGPIPE
"""Exit code where nobody reads the output any more, as in ``commgraph layout 64 | head``."""

# Seconds that the others may take to say what they saw, once a rank has failed.
_END_SECONDS = 3.0
# Seconds that a process may take to end by SIGTERM.
_TERM_SECONDS = 1.0


def ended_well(name: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code; Ctrl-C ends in one line, and a reader of the output that has gone in none."""
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        # Where it passed through `exec` of a text, as dataclasses are made in an import, CPython would end by the signal: this resets it.
        exec("")
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return UNREAD


def run_ranks(name: str, program: Callable[..., int], ranks: int, *arguments: Any) -> int:
    """Run ``program(rank, ranks, folder, *arguments)`` on processes of this machine, which may meet in the folder.

    Args:
        name: of the command, for messages.
        program: a function of a module; returns the exit code of its process.
        ranks: how many processes.
        arguments: can be pickled.

    Returns:
        0, or the exit code of the rank that failed first, which has said why.
    """
    # Spawned and not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    unread, say_unread = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="commgraph-") as folder:
        # An end by SIGTERM is an end like any other: the processes and the folder go with it.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        children = [
            spawn.Process(target=_rank, args=(program, rank, ranks, Path(folder), arguments, say_unread), daemon=True)
            for rank in range(ranks)
        ]
        try:
            _start(children)
            code = _first_failure(name, children, unread)
            if code not in (0, UNREAD):
                deadline = time.monotonic() + _END_SECONDS
                for child in children:
                    child.join(max(deadline - time.monotonic(), 0))
            return code
        finally:
            _end([child for child in children if child.pid is not None])
            signal.signal(signal.SIGTERM, before)


def traffic(*contexts: ParallelContext) -> dict[str, int]:
    """Return the bytes that this rank sent, by context and group; a group that shares its communicators counts under the first name."""
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for ctx in contexts:
        for name in ctx.layout.names:
            group = ctx[name]
            if group.world_size > 1 and f"{ctx.name}.{name}" not in seen:
                seen |= {f"{ctx.name}.{twin.name}" for twin in group.shares_with}
                counts["/".join([f"{ctx.name}.{name}", *(twin.name for twin in group.shares_with)])] = group.bytes_sent
    return counts


def _start(children: Sequence[BaseProcess]) -> None:
    """Start processes that do not heed Ctrl-C, which a terminal sends to all: it ends the one that started them, and that ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for child in children:
            child.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _end(children: Sequence[BaseProcess]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _TERM_SECONDS
    for child in children:
        child.join(max(deadline - time.monotonic(), 0))
        if child.is_alive():
            child.kill()
            child.join()


def _first_failure(name: str, children: Sequence[BaseProcess], unread: Connection) -> int:
    """Wait for all, or for the first that fails: its exit code."""
    waiting = list(children)
    while waiting:
        if unread in wait([unread, *(child.sentinel for child in waiting)]):
            return UNREAD
        for child in [child for child in waiting if not child.is_alive()]:
            waiting.remove(child)
            if child.exitcode:
                if child.exitcode < 0:
                    print(f"{name}: a rank was ended by signal {-child.exitcode}", file=sys.stderr)
                return max(child.exitcode, 1)
    return 0


def _rank(program: Callable[..., int], rank: int, ranks: int, folder: Path, arguments: tuple[Any, ...], say_unread: Connection) -> None:
    try:
        code = program(rank, ranks, folder, *arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Left by this rank alone, the others would report a lost peer: all of them are ended first.
        say_unread.send(None)
        time.sleep(_END_SECONDS)
        code = UNREAD
    sys.exit(code)
