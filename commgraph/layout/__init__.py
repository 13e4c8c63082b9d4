"""Where each rank sits: `Layout`, the group specs it understands, and pictures of it. Needs neither torch nor a process."""

from __future__ import annotations

from commgraph.layout.layout import Layout
from commgraph.layout.picture import describe, draw, table
from commgraph.layout.specs import Grid, GroupSpec, Positions, Split

__all__ = ["Grid", "GroupSpec", "Layout", "Positions", "Split", "describe", "draw", "table"]
