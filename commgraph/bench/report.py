"""Rows as a table on the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from commgraph.bench.figures import Row, size_text
from commgraph.errors import ConfigurationError

__all__ = ["Run", "heading", "introduction", "line", "number_text", "read", "text", "write"]

_FORMAT = 1

_HEADS = (
    ("operation", 15),
    ("size", 10),
    ("dtype", 9),
    ("who", 21),
    ("strategy", 24),
    ("placement", 11),
    ("samples", 8),
    ("p10", 11),
    ("median", 11),
    ("p90", 11),
    ("unit", 11),
    ("algbw GB/s", 11),
    ("busbw GB/s", 11),
)
_NUMBERS = frozenset({"size", "samples", "p10", "median", "p90", "algbw GB/s", "busbw GB/s"})


@attrs.define
class Run:
    """Measurements of one run.

    Attributes:
        machine: where, from `machine.describe`.
        how: ``ranks``, ``started`` (as `Job.started`), and ``sampling``, as text.
        rows: all of them, in the order in which they were measured.
        notes: what could not be measured, a line each.
    """

    machine: Mapping[str, str]
    how: Mapping[str, Any]
    rows: list[Row] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)

    def note(self, line: str) -> bool:
        """Adds a line, once; says whether it was new."""
        new = line not in self.notes
        if new:
            self.notes.append(line)
        return new


def write(runs: Sequence[Run], path: Path) -> None:
    """Writes runs as JSON."""
    path.write_text(json.dumps({"format": _FORMAT, "runs": [attrs.asdict(run) for run in runs]}, indent=1) + "\n")


def read(path: Path) -> list[Run]:
    """Reads what `write` wrote.

    Raises:
        ConfigurationError: the file is missing or something else.
    """
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            raise ConfigurationError(f"{path} has format {found['format']}; this commgraph reads {_FORMAT}")
        return [Run(run["machine"], run["how"], [Row(**row) for row in run["rows"]], run["notes"]) for run in found["runs"]]
    except (OSError, LookupError, TypeError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{path} is no file of `commgraph bench --json`: {type(error).__name__}: {error}") from None


def heading() -> str:
    """The table's first line."""
    return _columns([name for name, _ in _HEADS])


def line(row: Row) -> str:
    """One row of the table."""
    return _columns(
        [
            row.operation,
            size_text(row.size) if row.size else "-",
            row.dtype or "-",
            row.who,
            row.strategy or "-",
            row.placement or "-",
            str(row.samples),
            *(number_text(value) for value in (row.p10, row.median, row.p90)),
            row.unit,
            *("-" if value is None else f"{value:.3f}" for value in (row.algbw, row.busbw)),
        ]
    )


def text(run: Run) -> str:
    """The whole table, with its notes."""
    return "\n".join([*introduction(run), heading(), *map(line, run.rows), *(f"# {note}" for note in run.notes)])


def introduction(run: Run) -> list[str]:
    """Return the comment lines above the table: the machine, and how the run was made."""
    return [f"# {', '.join(f'{key} {value}' for key, value in facts.items())}" for facts in (run.machine, run.how)]


def number_text(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _columns(cells: Sequence[str]) -> str:
    pairs = zip(cells, _HEADS, strict=True)
    return " ".join(f"{cell:>{width}}" if name in _NUMBERS else f"{cell:{width}}" for cell, (name, width) in pairs).rstrip()
