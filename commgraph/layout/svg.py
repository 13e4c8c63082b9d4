"""Layouts as pictures: hosts as boxes, ranks as cells, a colour for each group, lines where a group crosses hosts."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final
from xml.etree import ElementTree as ET

import attrs

from commgraph.layout.hosts import Crossing, Hosts, crossing, warnings
from commgraph.layout.layout import Layout
from commgraph.layout.patterns import Pattern

__all__ = ["Picture", "drawing", "svg"]

_CELL_HEIGHT: Final = 24
_PAD, _HEAD, _GAP, _MARGIN = 6, 20, 22, 16
_LINE: Final = 18  # of text
_WIDTH: Final = 1100  # that rows of hosts fill
_MOST_CELLS: Final = 512  # ranks of a world, and of a host, that is drawn with a cell for each
_FIRST_CELLS: Final = 64  # ranks on the first hosts of a larger world that get cells
_MOST_BOXES: Final = 12  # boxes that stand for runs of hosts
_MOST_LINKS: Final = 96
_LEAST_DEPTH, _MOST_DEPTH = 22, 44  # of an arc, whose lowest point is three quarters of that below the cells: between two rows of hosts
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328;text-anchor:middle}.l{text-anchor:start}.t{font-weight:600;font-size:14px}"
    ".m{fill:#656d76}.w{fill:#9a3412}.h{fill:#f6f8fa;stroke:#afb8c1}.s{fill:#eaeef2;stroke:#afb8c1;stroke-dasharray:3 2}"
    ".c{stroke:#fff}.x{stroke:#9a3412;stroke-width:1.6;stroke-dasharray:4 2}.k{fill:none;stroke-width:1.8;stroke-opacity:.75}"
    ".p{fill:#fff}"
)


@attrs.frozen
class _Panel:
    """The groups of one name, or of several names whose groups are the same."""

    title: str
    pattern: Pattern
    crossing: Crossing


@attrs.frozen
class _Box:
    """A host with a cell for each rank, or a run of hosts without."""

    first_host: int
    hosts: int

    @property
    def is_host(self) -> bool:
        return self.hosts == 1


@attrs.frozen
class Picture:
    """Facts that a picture shows: layout, hosts, the names it has panels for, warnings.

    Attributes:
        layout: which ranks form which groups.
        hosts: where they are.
        names: of the groups that get a panel; names with equal groups share one.
        said: warnings.
    """

    layout: Layout
    hosts: Hosts
    names: tuple[str, ...]
    said: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, nodes: int = 1) -> Picture:
        """Choose what is worth a panel: the groups of several ranks, without ``world`` and ``replica`` if there are others.

        Raises:
            LayoutError: the ranks cannot be divided among so many hosts.
        """
        hosts = Hosts.of(layout.world_size, nodes)
        shared = [name for name in layout.names if layout.size(name) > 1]
        names = [name for name in shared if name not in layout.host_groups] or shared[:1] or ["world"]
        return cls(layout, hosts, tuple(names), warnings(layout, hosts))

    def panels(self) -> Iterator[_Panel]:
        """One panel for each different partition."""
        named: dict[Pattern, list[str]] = {}
        for name in self.names:
            named.setdefault(self.layout.pattern(name), []).append(name)
        for pattern, names in named.items():
            yield _Panel(" = ".join(names), pattern, crossing(pattern, self.hosts))

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a rank's cell, which holds its number."""
        return max(34, 8 * len(str(self.hosts.world_size - 1)) + 12), _CELL_HEIGHT

    def boxes(self) -> tuple[_Box, ...]:
        """Hosts in order, each with its cells where they are few; otherwise the first ones and the last, and runs of hosts between them."""
        count, size = self.hosts.count, self.hosts.size
        if count * size <= _MOST_CELLS:
            return tuple(_Box(host, 1) for host in range(count))
        if size > _MOST_CELLS:
            return self._runs(0, count)
        head = max(1, min(_FIRST_CELLS // size, count - 2))
        return (*(_Box(host, 1) for host in range(head)), *self._runs(head, count - 1), _Box(count - 1, 1))

    def _runs(self, begin: int, end: int) -> tuple[_Box, ...]:
        length = max(1, math.ceil((end - begin) / _MOST_BOXES))
        # A run of one host would be drawn with cells.
        return tuple(_Box(first, min(length, end - first)) for first in range(begin, end, length))


def svg(layout: Layout, nodes: int = 1) -> str:
    """Draw a layout as SVG: for each kind of group a panel with the hosts as boxes, and in them the ranks as cells.

    The cells of a group have one colour; a rank that is alone is white. The cells of a group that crosses hosts have a dashed border, and
    lines join its parts on different hosts. Where there are more than 512 ranks, the first hosts and the last are drawn with cells, and
    each box between them stands for a run of hosts.

    Args:
        layout: what to draw.
        nodes: hosts, which have equally many ranks each, in the order of ranks.

    Returns:
        An SVG document.

    Raises:
        LayoutError: the ranks cannot be divided among so many hosts.
    """
    root = drawing(layout, nodes)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def drawing(layout: Layout, nodes: int = 1, *, headed: bool = True) -> ET.Element:
    """Return the element of `svg`; `headed`: with the layout and its warnings as text."""
    picture = Picture.of(layout, nodes)
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = _STYLE
    background = _add(root, "rect", 0, 0, 0, 0, "p")
    lines = [(_hosts_text(picture.hosts), "l m")]
    if headed:
        lines = [(repr(layout), "t l"), *lines, *((f"⚠ {text}", "l w") for text in picture.said)]
    y = _MARGIN
    for text, style in lines:
        for part in _wrapped(text):
            y += _LINE
            _text(root, _MARGIN, y - 5, part, style)
    width = 0
    for panel in picture.panels():
        y, right = _draw_panel(root, picture, panel, y + _GAP)
        width = max(width, right)
    longest = max(len(part) for text, _ in lines for part in _wrapped(text))
    width, height = max(width, round(longest * 6.6) + _MARGIN) + _MARGIN, y + _MARGIN
    for element in (root, background):
        element.set("width", str(width))
        element.set("height", str(height))
    root.set("viewBox", f"0 0 {width} {height}")
    return root


def _draw_panel(root: ET.Element, picture: Picture, panel: _Panel, y: int) -> tuple[int, int]:
    """Draw the hosts once, coloured by one kind of group; return where it ends below and at the right."""
    group = ET.SubElement(root, "g", {"class": "panel", "data-groups": panel.title})
    _text(group, _MARGIN, y + 12, _caption(panel), "l t")
    y += _LINE + 4
    columns = _columns(picture)
    rows = math.ceil(picture.hosts.size / columns)
    cell = picture.cell
    width, height = columns * cell[0] + 2 * _PAD, rows * cell[1] + _HEAD + _PAD
    boxes = picture.boxes()
    if not any(box.is_host for box in boxes):
        width, height = 150, 3 * _LINE + _PAD
    per_row = max(1, (_WIDTH + _GAP) // (width + _GAP))
    numbers: dict[int, int] = {}
    places: dict[int, tuple[int, int]] = {}
    # In this order: lines lie above hosts and below cells, whose numbers stay legible.
    layers = [ET.SubElement(group, "g", {"class": layer}) for layer in ("hosts", "links", "cells")]
    for index, box in enumerate(boxes):
        left, top = _MARGIN + index % per_row * (width + _GAP), y + index // per_row * (height + _GAP)
        _draw_box(layers[0], box, picture, (left, top, width, height))
        if box.is_host and picture.hosts.size <= _MOST_CELLS:
            places |= _draw_cells(layers[2], picture, panel, box, (left + _PAD, top + _HEAD), columns, numbers)
    _draw_links(layers[1], picture, panel, places, numbers)
    used = min(len(boxes), per_row)
    return y + math.ceil(len(boxes) / per_row) * (height + _GAP) - _GAP, _MARGIN + used * (width + _GAP) - _GAP


def _draw_box(group: ET.Element, box: _Box, picture: Picture, place: tuple[int, int, int, int]) -> None:
    left, top, width, height = place
    size = picture.hosts.size
    middle = left + width // 2
    if box.is_host and size <= _MOST_CELLS:
        _add(group, "rect", left, top, width, height, "h", rx="5")
        _text(group, middle, top + 14, f"host {box.first_host}", "m")
        return
    first, last = box.first_host * size, (box.first_host + box.hosts) * size - 1
    _add(group, "rect", left, top, width, height, "s", rx="5").set("data-ranks", f"{first}-{last}")
    hosts = f"host {box.first_host}" if box.is_host else f"hosts {box.first_host}-{box.first_host + box.hosts - 1}"
    for line, text in enumerate((hosts, f"ranks {first}-{last}")):
        _text(group, middle, top + height // 2 - 4 + line * _LINE, text, "" if line == 0 else "m")


def _draw_cells(
    group: ET.Element, picture: Picture, panel: _Panel, box: _Box, corner: tuple[int, int], columns: int, numbers: dict[int, int]
) -> dict[int, tuple[int, int]]:
    """Draw the ranks of one host; return where the middle of each is. `numbers` counts the groups of several ranks by their first one."""
    width, height = picture.cell
    places = {}
    for index in range(picture.hosts.size):
        rank = box.first_host * picture.hosts.size + index
        x, y = corner[0] + index % columns * width, corner[1] + index // columns * height
        head = panel.pattern.head(rank, 2)
        colour = _colour(numbers.setdefault(head[0], len(numbers)), 0.84) if len(head) > 1 else "#fff"
        style = "x" if _crosses(panel.pattern, rank, picture) else "c"
        cell = _add(group, "rect", x + 1, y + 1, width - 2, height - 2, style, rx="3", fill=colour)
        cell.set("data-rank", str(rank))
        cell.set("data-group", str(head[0]))
        ET.SubElement(cell, "title").text = _tip(picture.layout, rank)
        places[rank] = (x + width // 2, y + height // 2)
        _text(group, places[rank][0], places[rank][1] + 4, str(rank), "")
    return places


def _crosses(pattern: Pattern, rank: int, picture: Picture) -> bool:
    # A group of more ranks than a host has need not be listed: it crosses.
    head = pattern.head(rank, picture.hosts.size + 1)
    return len({picture.hosts.of_rank(member) for member in head}) > 1


def _draw_links(links: ET.Element, picture: Picture, panel: _Panel, places: dict[int, tuple[int, int]], numbers: dict[int, int]) -> None:
    """Join each group's consecutive ranks that are on different hosts and have cells."""
    if not panel.crossing.across or len(numbers) > _MOST_LINKS:
        return
    pairs: list[tuple[int, int, int]] = []
    for first, number in numbers.items():
        members = [rank for rank in panel.pattern.head(first, _MOST_CELLS) if rank in places]
        steps = itertools.pairwise(members)
        pairs += [(one, other, number) for one, other in steps if picture.hosts.of_rank(one) != picture.hosts.of_rank(other)]
    if len(pairs) > _MOST_LINKS:
        return
    for at, (one, other, number) in enumerate(pairs):
        (x, y), (u, v) = places[one], places[other]
        # Beside each other, by an arc below the cells, each at a depth of its own; else down and up.
        depth = _LEAST_DEPTH + (_MOST_DEPTH - _LEAST_DEPTH) * (at + 1) // len(pairs)
        (a, b), (c, d) = ((x, y + depth), (u, v + depth)) if y == v else ((x, (y + v) // 2), (u, (y + v) // 2))
        line = ET.SubElement(links, "path", {"class": "k", "stroke": _colour(number, 0.4)})
        line.set("d", f"M{x} {y}C{a} {b} {c} {d} {u} {v}")
        line.set("data-link", f"{one}-{other}")


def _caption(panel: _Panel) -> str:
    pattern, found = panel.pattern, panel.crossing
    shared = pattern.count - pattern.alone
    even = pattern.size * shared + pattern.alone == pattern.world_size
    text = f"{panel.title}: {_number(shared, 'group')} of {'' if even else 'up to '}{_number(pattern.size, 'rank')}"
    if pattern.alone:
        text += f", {_number(pattern.alone, 'rank')} alone"
    if found.across:
        return f"{text}; {found.across if found.within else 'all' if found.across > 1 else 'it'} {_verb(found.across, 'cross')} hosts"
    return text


def _verb(count: int, verb: str) -> str:
    return f"{verb}es" if count == 1 else verb


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _hosts_text(hosts: Hosts) -> str:
    return f"{_number(hosts.count, 'host')} of {_number(hosts.size, 'rank')}"


def _tip(layout: Layout, rank: int) -> str:
    place = ", ".join(f"{name} {at}" for name, at in layout.coordinate(rank).items()) if rank in layout.grid_ranks else "outside the grid"
    return f"rank {rank}: {place}"


def _columns(picture: Picture) -> int:
    """Cells in a row: the innermost axis of several positions where that fits, so that a row is a group of it."""
    size = picture.hosts.size
    inner = next((count for count in reversed(tuple(picture.layout.axes.values())) if count > 1), 1)
    if 4 <= inner <= 16 and size % inner == 0:
        return inner
    return min(size, 8)


def _colour(index: int, lightness: float) -> str:
    # Steps of the golden angle keep the hues of neighbours apart, however many there are.
    parts = colorsys.hls_to_rgb(index * 137.508 % 360 / 360, lightness, 0.7)
    return "#" + "".join(f"{round(part * 255):02x}" for part in parts)


def _wrapped(text: str, limit: int = 150) -> Sequence[str]:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > limit:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".lstrip()
    return [*lines, line]


def _add(parent: ET.Element, tag: str, x: int, y: int, width: int, height: int, style: str, **more: str) -> ET.Element:
    where = {"x": str(x), "y": str(y), "width": str(width), "height": str(height)}
    return ET.SubElement(parent, tag, {"class": style, **where, **more})


def _text(parent: ET.Element, x: int, y: int, text: str, style: str) -> None:
    element = ET.SubElement(parent, "text", {"x": str(x), "y": str(y)})
    if style:
        element.set("class", style)
    element.text = text
