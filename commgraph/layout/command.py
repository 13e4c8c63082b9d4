"""``commgraph layout``: prints, draws and compares layouts."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from commgraph.errors import LayoutError
from commgraph.layout.difference import Change, difference
from commgraph.layout.hosts import Hosts, crossing, warnings
from commgraph.layout.layout import Layout
from commgraph.layout.page import html
from commgraph.layout.picture import describe
from commgraph.layout.svg import svg
from commgraph.layout.written import HELP, read_axes, read_groups

__all__ = ["main", "rows"]

_AXES: Final = ("dp", "pp", "pcp", "tp", "dcp")
# Ranks of a layout up to which JSON lists the groups; beyond, it gives their rule and the first of them.
_MOST_LISTED: Final = 10_000
_FEW: Final = 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LayoutError(message)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        given = _parser().parse_args(argv)
        layout = _layout(given)
        hosts = Hosts.of(layout.world_size, given.nodes)
        for file, make in ((given.svg, svg), (given.html, html)):
            if file is not None:
                file.write_text(make(layout, given.nodes), encoding="utf-8")
        if given.diff is not None:
            other = _layout(_parser().parse_args([str(given.world_size), *shlex.split(given.diff)]))
            changes = difference(layout, other)
            print(json.dumps(_difference_rows(changes), indent=2) if given.json else _difference_text(layout, other, changes))
        elif given.json:
            print(json.dumps(rows(layout, hosts), indent=2))
        else:
            print(describe(layout, rank=given.rank))
            print("".join(f"\nwarning: {text}\n" for text in warnings(layout, hosts)), end="")
    except (LayoutError, OSError, ValueError) as error:
        print(f"commgraph layout: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("commgraph layout", description="Prints and draws where the ranks of a layout sit, and compares layouts.")
    parser.add_argument("world_size", type=int, help="ranks")
    for axis in _AXES:
        parser.add_argument(f"--{axis}", type=int, help=f"size of {axis} (default: 1)")
    parser.add_argument("--axes", metavar="NAME=SIZE,...", help="axes of your own in place of those, outermost first")
    parser.add_argument("--first-rank", type=int, metavar="RANK", help="with --axes: they cover a part of the world from this rank on")
    parser.add_argument("--groups", nargs="+", default=(), metavar="NAME=SPEC", help=f"further groups: {HELP}")
    parser.add_argument("--rank", type=int, help="a rank to mark, with the groups that it is in")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts, with equally many ranks each (default: 1)")
    parser.add_argument("--diff", metavar="OPTIONS", help="another layout of the same ranks to compare with, e.g. --diff '--tp 4 --pp 2'")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw there: hosts, ranks, a colour for each group")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the drawing there")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    return parser


def _layout(given: argparse.Namespace) -> Layout:
    groups = read_groups(given.groups) or None
    sizes = {axis: size for axis in _AXES if (size := getattr(given, axis)) is not None}
    if given.axes is None:
        if given.first_rank is not None:
            raise LayoutError("--first-rank goes with --axes: a layout of dp, pp, pcp and tp covers the world")
        return Layout(given.world_size, groups=groups, **sizes)
    if sizes:
        raise LayoutError(f"--axes names all axes: --{next(iter(sizes))} does not go with it")
    return Layout.from_axes(given.world_size, read_axes(given.axes), groups, first_rank=given.first_rank)


def rows(layout: Layout, hosts: Hosts) -> dict[str, Any]:
    """Return a layout as values that JSON can hold: axes, and for each name the sizes, how groups lie on hosts, and the groups.

    ``ranks`` lists all groups of a world of up to 10,000 ranks, and the first eight of a larger one.
    """
    groups = []
    for name in layout.names:
        pattern = layout.pattern(name)
        found = crossing(pattern, hosts)
        complete = layout.world_size <= _MOST_LISTED
        firsts = [first for first, _ in zip(pattern.firsts(), range(pattern.count if complete else _FEW), strict=False)]
        groups.append(
            {
                "name": name,
                "size": pattern.size,
                "count": pattern.count,
                "alone": pattern.alone,
                "within_hosts": found.within,
                "across_hosts": found.across,
                "rule": pattern.content() if complete or pattern.content()[0] != "listed" else ["listed"],
                "complete": complete,
                "ranks": [pattern.head(first, pattern.size if complete else _FEW) for first in firsts],
            }
        )
    return {
        "world_size": layout.world_size,
        "axes": dict(layout.axes),
        "first_rank": layout.first_rank,
        "nodes": hosts.count,
        "digest": layout.digest,
        "groups": groups,
        "warnings": warnings(layout, hosts),
    }


def _difference_rows(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {"name": change.name, "changed": change.changed, "sizes": change.sizes, "counts": change.counts}
        | ({"rank": change.rank, "before": change.before, "after": change.after} if change.changed else {})
        for change in changes
    ]


def _difference_text(before: Layout, after: Layout, changes: Sequence[Change]) -> str:
    same = [change.name for change in changes if not change.changed]
    lines = [f"- {before!r}", f"+ {after!r}", ""]
    for change in changes:
        if change.changed:
            lines.append(f"{change.name}: {change.changed} of {before.world_size} ranks are in another group, e.g. rank {change.rank}")
            lines += [f"  {sign} {_side(change, side)}" for side, sign in enumerate("-+")]
    if same:
        lines.append(f"equal: {', '.join(same)}")
    return "\n".join(lines)


def _side(change: Change, side: int) -> str:
    ranks = (change.before, change.after)[side]
    if ranks is None:
        return "no such group"
    size, count = change.sizes[side], change.counts[side]
    cut = " …" if len(ranks) == _FEW < size else ""
    return f"({' '.join(map(str, ranks))}{cut})   {count} group{'' if count == 1 else 's'} of {size}"
