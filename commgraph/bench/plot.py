"""Rows as curves over the size."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from commgraph.bench.figures import Row
from commgraph.bench.report import Run
from commgraph.errors import ConfigurationError

__all__ = ["available", "check", "draw"]

_COLUMNS = 3
_STYLES = ("-", "--", ":", "-.")


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check() -> None:
    """Raise, before anything is measured, where nothing could be drawn.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    if not available():
        raise ConfigurationError("--plot needs matplotlib: pip install 'commgraph[bench]'")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw a panel for each operation and dtype measured at several sizes: medians as lines, 10th to 90th percentile as a band.

    A library has one colour in all panels, and a placement one kind of line.

    Raises:
        ConfigurationError: nothing was measured at several sizes, or matplotlib cannot write such a file.
    """
    panels: dict[str, list[Row]] = {}
    for run in runs:
        for row in run.rows:
            if row.unit == "us" and row.size:
                panels.setdefault(f"{row.operation}, {row.dtype or 'objects'}, {run.how['ranks']} ranks", []).append(row)
    panels = {title: rows for title, rows in panels.items() if len({row.size for row in rows}) > 1}
    if not panels:
        raise ConfigurationError(f"--plot {path}: nothing was measured at more than one size")
    everything = [row for rows in panels.values() for row in rows]
    colours = {library: f"C{number % 10}" for number, library in enumerate(_distinct((row.who, row.strategy) for row in everything))}
    styles = {where: _STYLES[number] for number, where in enumerate(_distinct(row.placement for row in everything))}

    figure_module: Any = importlib.import_module("matplotlib.figure")  # not pyplot, which keeps state and looks for a display
    line: Any = importlib.import_module("matplotlib.lines").Line2D
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure = figure_module.Figure(figsize=(5 * columns, 4 * lines + 1), layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for (title, rows), axes in zip(panels.items(), places, strict=False):
        _panel(axes, title, rows, colours, styles)
    handles = [line([], [], color=colour, label=", ".join(filter(None, library))) for library, colour in colours.items()]
    handles += [line([], [], color="black", linestyle=style, label=where) for where, style in styles.items() if where]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), fontsize="small")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "commgraph"}  # text as text, and equal rows as equal files
    try:
        with importlib.import_module("matplotlib").rc_context(settings):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--plot {path}: {error}") from None


def _panel(axes: Any, title: str, rows: Sequence[Row], colours: dict[tuple[str, str], str], styles: dict[str, str]) -> None:
    for library, where in _distinct(((row.who, row.strategy), row.placement) for row in rows):
        curve = [row for row in rows if ((row.who, row.strategy), row.placement) == (library, where)]
        curve.sort(key=lambda row: row.size)
        sizes = [row.size for row in curve]
        how = {"color": colours[library], "linestyle": styles[where], "marker": "o", "markersize": 3}
        axes.plot(sizes, [row.median for row in curve], **how)
        axes.fill_between(sizes, [row.p10 for row in curve], [row.p90 for row in curve], color=colours[library], alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="bytes", ylabel="us", yscale="log")
    axes.set_xscale("log", base=2)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
