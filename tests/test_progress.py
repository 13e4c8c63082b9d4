"""Progress of long work: lines where nobody watches, a bar on a terminal."""

from __future__ import annotations

import importlib.util
import io
import time

import pytest

from commgraph import progress


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
