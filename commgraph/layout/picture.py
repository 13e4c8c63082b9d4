"""Layouts as plain text: a picture of where ranks sit, and a table of who is grouped with whom.

The text is cut short with "…", so that the cost is that of the text and never that of the world.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.checks import some, unknown, whole
from commgraph.layout.layout import Layout
from commgraph.layout.patterns import Pattern

__all__ = ["describe", "draw", "table"]

_MORE = "…"
_ROWS = 8  # rows of a block, and ranks of a group, that are shown before the rest is cut
_BLOCK_GAP = "   "


def draw(layout: Layout, *, axes: str | Iterable[str] | None = None, width: int = 100, mark: int | None = None) -> str:
    """Draws where the ranks of a layout sit.

    The innermost axis with more than one position runs across, the next one down, and each position of the remaining ones is a block of
    its own. Axes of size 1 are left out. Long axes are cut short with "…", with their last position kept.

    Args:
        layout: what to draw.
        axes: axis names, the last one across, the one before it down; axes that are not named become blocks. Default: as above.
        width: columns of text to use; at least one block is drawn, however narrow that is.
        mark: a global rank to show in brackets.

    Returns:
        Lines of text without a trailing newline. Of a layout over a part of the world only the part is drawn.

    Raises:
        LayoutError: an axis that the layout lacks, or is named twice; `mark` is no rank of it, or outside the part that its axes cover.

    Example:
        >>> print(draw(Layout(8, tp=2, pp=2)))
        8 ranks = replica 2 x pp 2 x tp 2: tp across, pp down, a block per replica
        <BLANKLINE>
        replica 0              replica 1
               tp 0   tp 1            tp 0   tp 1
             ┌──────┬──────┐        ┌──────┬──────┐
        pp 0 │  0   │  1   │   pp 0 │  4   │  5   │
        pp 1 │  2   │  3   │   pp 1 │  6   │  7   │
             └──────┴──────┘        └──────┴──────┘
    """
    marked = {} if mark is None else layout.coordinate(mark)
    outer = _order(layout, axes)
    across = outer.pop() if outer else None
    down = outer.pop() if outer else None
    lines = [_caption(layout, outer, down, across)]

    grid = _Block(layout, outer, down, across, width, mark)
    per_line = max(1, (width + len(_BLOCK_GAP)) // (grid.width + len(_BLOCK_GAP)))
    marked_block = _ravel(layout, outer, marked) if marked else 0
    shown = _cut(math.prod(layout.axes[name] for name in outer), max(4, 2 * per_line), marked_block)
    blocks = [grid.more() if index is None else grid.text(_unravel(layout, outer, index)) for index in shown]
    for start in range(0, len(blocks), per_line):
        beside = zip(*blocks[start : start + per_line], strict=True)
        left_out = shown[start : start + per_line] == (None,)
        lines += ["", *([_MORE] if left_out else (_BLOCK_GAP.join(row).rstrip() for row in beside))]
    return "\n".join(lines)


def table(layout: Layout, *, width: int = 100) -> str:
    """Lists the groups of a layout: name, ranks in a group, number of groups, the first few of them, and how many ranks are alone.

    Args:
        layout: what to list.
        width: columns of text to use.

    Returns:
        Lines of text without a trailing newline, the first one a heading.
    """
    rows = [("group", "size", "groups")]
    for name in layout.names:
        pattern = layout.pattern(name)
        uneven = pattern.size * pattern.count != layout.world_size
        rows.append((name, f"≤ {pattern.size}" if uneven else str(pattern.size), str(pattern.count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths) - 6
    members = ["ranks", *(_groups(layout.pattern(name), room) for name in layout.names)]
    return "\n".join(
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {count:>{widths[2]}}  {text}"
        for (name, size, count), text in zip(rows, members, strict=True)
    )


def describe(layout: Layout, rank: int | None = None, *, width: int = 100) -> str:
    """Picture and table of a layout, or of one rank in it.

    Args:
        layout: what to describe.
        rank: a global rank to point out: it is marked in the picture, unless it is outside the part of the world that the axes cover,
            and its own groups take the place of the table.
        width: columns of text to use.

    Returns:
        Lines of text without a trailing newline.

    Raises:
        LayoutError: the layout has no such rank.
    """
    if rank is None:
        return "\n\n".join([repr(layout), draw(layout, width=width), table(layout, width=width)])
    number = whole(rank)
    outside = number is not None and number in range(layout.world_size) and number not in layout.grid_ranks
    parts = [repr(layout), draw(layout, width=width, mark=None if outside else rank)]
    place = "" if outside else ", ".join(f"{name} {position}" for name, position in layout.coordinate(rank).items())
    indent = max(map(len, layout.names))
    own = [f"rank {rank} sits at {place}" if place else f"rank {rank} is outside the grid"]
    for name in layout.names:
        pattern = layout.pattern(name)
        own.append(f"  {name:<{indent}}  {_group(pattern, rank) if len(pattern.head(rank, 2)) > 1 else 'alone'}")
    return "\n\n".join([*parts, "\n".join(own)])


def _order(layout: Layout, axes: str | Iterable[str] | None) -> list[str]:
    """The axes to draw, outermost first."""
    named = [] if axes is None else [axes] if isinstance(axes, str) else list(axes)
    problems = [unknown("axis", name, layout.axes) for name in dict.fromkeys(named) if name not in layout.axes]
    if repeated := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        problems.append(f"axis {some(repeated)} is named more than once")
    if problems:
        raise LayoutError("; ".join(problems))
    # An axis that the caller names is drawn even when it has one position only.
    return [name for name, size in layout.axes.items() if size > 1 and name not in named] + named


def _caption(layout: Layout, outer: Sequence[str], down: str | None, across: str | None) -> str:
    ranks, rest = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks", ""
    if layout.grid_ranks != range(layout.world_size):
        first, last = layout.grid_ranks[0], layout.grid_ranks[-1]
        ranks = f"{f'rank {first}' if first == last else f'ranks {first}..{last}'} of {layout.world_size}"
        rest = f"; {layout.world_size - (last - first + 1)} outside"
    if down is None:
        return f"{ranks} along {across}{rest}" if _label(across, 0) else ranks + rest
    sizes = [f"{name} {layout.axes[name]}" for name in layout.axes if name in (*outer, down, across)]
    parts = [f"{across} across", f"{down} down", *([f"a block per {' and '.join(outer)}"] if outer else [])]
    return f"{ranks} = {' x '.join(sizes)}: {', '.join(parts)}{rest}"


@attrs.frozen(init=False)
class _Block:
    """One grid of ranks: the format that all blocks of a picture share."""

    layout: Layout
    down: str | None
    across: str | None
    mark: int | None
    rows: tuple[int | None, ...]
    columns: tuple[int | None, ...]
    label: int
    cell: int
    width: int

    def __init__(self, layout: Layout, outer: Sequence[str], down: str | None, across: str | None, width: int, mark: int | None) -> None:
        rows = layout.axes[down] if down else 1
        columns = layout.axes[across] if across else 1
        label = len(_label(down, rows - 1)) + 1 if down else 0
        digits = len(str(layout.world_size - 1)) + (0 if mark is None else 2)
        cell = max(len(_label(across, columns - 1)), digits) + 2
        marked = {} if mark is None else layout.coordinate(mark)
        shown_rows = _cut(rows, _ROWS, marked.get(down or "", 0))
        shown_columns = _cut(columns, max(3, (width - label - 1) // (cell + 1)), marked.get(across or "", 0))
        grid = label + 1 + sum((3 if column is None else cell) + 1 for column in shown_columns)
        title = _title({name: layout.axes[name] - 1 for name in outer})
        self.__attrs_init__(layout, down, across, mark, shown_rows, shown_columns, label, cell, max(grid, len(title)))

    def text(self, outer: dict[str, int]) -> list[str]:
        """The lines of the block at the given position of the outer axes."""
        body = [self._line(row, outer) for row in self.rows]
        heads = " ".join(self._fit(_MORE if column is None else _label(self.across, column), column) for column in self.columns)
        top = [" " * (self.label + 1) + heads] if heads.strip(f"{_MORE} ") else []
        lines = [*([_title(outer)] if outer else []), *top, self._rule("┌┬┐"), *body, self._rule("└┴┘")]
        return [line.ljust(self.width) for line in lines]

    def more(self) -> list[str]:
        """As many lines, which say that blocks were left out."""
        return ["", "", "", *([_MORE] + [""] * (len(self.rows) - 1)), ""]

    def _line(self, row: int | None, outer: dict[str, int]) -> str:
        label = "" if self.down is None else _MORE if row is None else _label(self.down, row)
        cells = []
        for column in self.columns:
            number = _MORE
            if row is not None and column is not None:
                place = {**outer, **({self.down: row} if self.down else {}), **({self.across: column} if self.across else {})}
                rank = self.layout.rank_of(**place)
                number = f"[{rank}]" if rank == self.mark else str(rank)
            cells.append(self._fit(number, column))
        return f"{label:<{self.label}}│{'│'.join(cells)}│"

    def _fit(self, text: str, column: int | None) -> str:
        return text.center(3 if column is None else self.cell)

    def _rule(self, corners: str) -> str:
        left, middle, right = tuple(corners)
        return " " * self.label + left + middle.join("─" * (3 if column is None else self.cell) for column in self.columns) + right


def _label(axis: str | None, position: int) -> str:
    # Along the axis of all ranks, which layouts of rank lists have, a position is the rank itself: nothing to add.
    return "" if axis in (None, "world") else f"{axis} {position}"


def _title(position: dict[str, int]) -> str:
    return ", ".join(_label(name, place) for name, place in position.items())


def _cut(count: int, limit: int, keep: int) -> tuple[int | None, ...]:
    """About `limit` of `count` positions: the first ones, `keep` and the last, with None for those left out in between."""
    if count <= limit:
        return tuple(range(count))
    head = limit - 2 if keep < limit - 2 or keep == count - 1 else max(1, limit - 4)
    shown: list[int | None] = list(range(head))
    for position in sorted({keep, count - 1} - set(range(head))):
        shown += [position] if shown[-1] == position - 1 else [None, position]
    return tuple(shown)


def _ravel(layout: Layout, axes: Sequence[str], position: dict[str, int]) -> int:
    index = 0
    for name in axes:
        index = index * layout.axes[name] + position[name]
    return index


def _unravel(layout: Layout, axes: Sequence[str], index: int) -> dict[str, int]:
    position: dict[str, int] = {}
    for name in reversed(axes):
        index, position[name] = divmod(index, layout.axes[name])
    return dict(reversed(position.items()))


def _group(pattern: Pattern, rank: int) -> str:
    """One group; the first ranks of it where it is long."""
    ranks = pattern.head(rank, _ROWS + 1)
    return f"({' '.join(map(str, ranks[:_ROWS]))}{' ' + _MORE if len(ranks) > _ROWS else ''})"


def _groups(pattern: Pattern, room: int) -> str:
    """As many groups of several ranks as fit into `room` columns, and at least one; then how many ranks are alone."""
    if pattern.size == 1:
        return "each rank alone"
    alone = f", {pattern.alone} alone" if pattern.alone else ""
    room = max(1, room - len(alone))
    text = ""
    for index, first in enumerate(islice(pattern.shared(), room)):
        group = _group(pattern, first)
        more = index + 1 < pattern.count - pattern.alone
        if index and len(text) + 1 + len(group) + (2 if more else 0) > room:
            return f"{text} {_MORE}{alone}"
        text = f"{text} {group}".lstrip()
    return text + alone
