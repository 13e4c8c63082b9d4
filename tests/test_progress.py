"""Progress of long work: lines where nobody watches, a bar on a terminal."""

from __future__ import annotations

import importlib.util
import io
import re
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from commgraph import progress
from commgraph.demo import main as demo
from commgraph.demo.engine import Generated


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    with progress.progress("commgraph plan", 8, "layouts", stream) as advance:
        for _ in range(8):
            advance()
    lines = stream.getvalue().splitlines()
    assert lines
    assert len(lines) < 8
    assert lines[0] == "commgraph plan: 3 of 8 layouts"


def test_short_work_says_nothing() -> None:
    stream = io.StringIO()
    with progress.progress("commgraph plan", 2, "layouts", stream) as advance:
        advance()
        advance()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_a_terminal_without_rich_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    with progress.progress("commgraph plan", 2, "layouts", stream) as advance:
        advance()
    assert "commgraph plan" in stream.getvalue()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = Terminal()
    with progress.progress("commgraph plan", 2, "layouts", plain) as advance:
        advance()
    assert plain.getvalue() == ""


def test_other_ranks_show_nothing() -> None:
    stream = Terminal()
    with progress.progress("commgraph bench", 1, "cases", stream, shown=False) as advance:
        advance()
    assert stream.getvalue() == ""


def test_the_demo_says_how_far_it_is_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    with Progress(console=console, auto_refresh=False, disable=True) as bars:
        show = demo._watcher(console, bars, bars.add_task("alone", total=9, said=""), "target alone", 9)
        for count in range(1, 10):
            show(Generated(tokens=[0] * count, seconds=float(count)))
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) < 9
    assert re.fullmatch(r"target alone: \d of 9 tokens, 1 tokens/s", lines[0])
