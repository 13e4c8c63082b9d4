"""Where each rank sits: `Layout`, the group specs it understands, pictures of it and comparisons. Needs neither torch nor a process."""

from __future__ import annotations

from commgraph.layout.difference import Change, difference
from commgraph.layout.hosts import Crossing, Hosts, crossing, warnings
from commgraph.layout.layout import Layout
from commgraph.layout.page import html
from commgraph.layout.picture import describe, draw, table
from commgraph.layout.specs import Grid, GroupSpec, Positions, Split
from commgraph.layout.svg import svg

__all__ = [
    "Change",
    "Crossing",
    "Grid",
    "GroupSpec",
    "Hosts",
    "Layout",
    "Positions",
    "Split",
    "crossing",
    "describe",
    "difference",
    "draw",
    "html",
    "svg",
    "table",
    "warnings",
]
