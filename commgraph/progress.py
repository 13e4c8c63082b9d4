"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, TextIO

__all__ = ["LINE_SECONDS", "progress"]

# Seconds between two plain lines: a log of a long run stays short.
LINE_SECONDS: Final = 10.0


@contextlib.contextmanager
def progress(name: str, total: int, what: str, stream: TextIO | None = None, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show how far a loop is, on standard error: results on standard output stay what they are.

    Args:
        name: of the command.
        total: steps.
        what: the steps are, in the plural.
        stream: where to, in place of standard error.
        shown: False shows nothing, e.g. on other ranks than the first.

    Yields:
        A function to call after each step.
    """
    stream = sys.stderr if stream is None else stream
    if not shown:
        yield lambda: None
        return
    # rich comes with the extra `demo`.
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(name, total, what, stream) as stepped:
            yield stepped
        return
    done, said = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            stream.write(f"{name}: {done} of {total} {what}\n")
            stream.flush()

    yield advance


@contextlib.contextmanager
def _bar(name: str, total: int, what: str, stream: TextIO) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    # What is printed meanwhile appears above the bar, unless standard output goes elsewhere than to the terminal.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(file=stream), transient=True, redirect_stdout=redirect, redirect_stderr=False) as bars:
        bar = bars.add_task(name, total=total)
        yield lambda: bars.advance(bar)
