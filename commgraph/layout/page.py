"""A layout as one page of HTML: the picture, the table of its groups, and what is usually a mistake."""

from __future__ import annotations

from typing import Final
from xml.etree import ElementTree as ET

from commgraph.layout.hosts import Hosts, crossing, warnings
from commgraph.layout.layout import Layout
from commgraph.layout.picture import describe
from commgraph.layout.svg import drawing

__all__ = ["html"]

_STYLE: Final = (
    "body{font:15px system-ui,sans-serif;color:#1f2328;margin:1.5rem;max-width:72rem}table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #d0d7de}td:first-child,th:first-child{text-align:left}"
    "pre{font-size:13px;overflow:auto}.w{color:#9a3412}svg{max-width:100%;height:auto}"
)


def html(layout: Layout, nodes: int = 1) -> str:
    """Return a page that needs nothing else: the drawing of `svg`, how many groups cross hosts, warnings, and the layout as text.

    Args:
        layout: what to show.
        nodes: hosts, which have equally many ranks each, in the order of ranks.

    Raises:
        LayoutError: the ranks cannot be divided among so many hosts.
    """
    hosts = Hosts.of(layout.world_size, nodes)
    root = ET.Element("html", lang="en")
    head, body = ET.SubElement(root, "head"), ET.SubElement(root, "body")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "title").text = repr(layout)
    ET.SubElement(head, "style").text = _STYLE
    ET.SubElement(body, "h1").text = repr(layout)
    for text in warnings(layout, hosts):
        ET.SubElement(body, "p", {"class": "w"}).text = f"⚠ {text}"
    table = ET.SubElement(body, "table")
    _row(table, "th", ("group", "ranks in a group", "groups", "inside a host", "across hosts", "ranks alone"))
    for name in layout.names:
        pattern = layout.pattern(name)
        found = crossing(pattern, hosts)
        _row(table, "td", (name, pattern.size, pattern.count - pattern.alone, found.within, found.across, pattern.alone))
    body.append(drawing(layout, nodes, headed=False))
    details = ET.SubElement(body, "details")
    ET.SubElement(details, "summary").text = "as text"
    ET.SubElement(details, "pre").text = describe(layout)
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def _row(table: ET.Element, tag: str, cells: tuple[object, ...]) -> None:
    row = ET.SubElement(table, "tr")
    for cell in cells:
        ET.SubElement(row, tag).text = f"{cell:,}" if isinstance(cell, int) else str(cell)
