"""`commgraph report -o NAME.html`: one page that needs nothing else, drawn by plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from commgraph.shm.recorder import FAILED, OPEN
from commgraph.trace import flows, times
from commgraph.trace.columns import Columns
from commgraph.trace.flows import Flows, Places, Use
from commgraph.trace.times import Span, Stragglers

__all__ = ["write_page"]

Array = npt.NDArray[Any]

# Of a matrix and of the graph: more are not told apart on a screen.
_PLACES: Final = 64
# Of the timeline.
_ROWS: Final = 512
_BINS: Final = 400
_BARS: Final = 3000
# Groups with a matrix of their own, and lines from place to place in the graph.
_GROUPS: Final = 24
_EDGES: Final = 400
_TABLE_ROWS: Final = 60
_WIDTHS: Final = (1, 2, 4, 7)
_COLOURS: Final = ("#0969da", "#bf5700", "#1a7f37", "#8250df", "#cf222e", "#9a6700", "#1b7c83", "#bf3989", "#57606a", "#4d2d00")
# A page that could load anything would not be one file: the browser refuses it.
_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_STYLE: Final = (
    "body{font:15px system-ui,sans-serif;color:#1f2328;margin:1.5rem auto;max-width:76rem;padding:0 1rem}h2{margin-top:2.5rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:14px}"
    "td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #d0d7de}"
    "td{white-space:nowrap}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2),td.t,th.t{text-align:left}"
    "td.t{white-space:normal;overflow-wrap:anywhere}.w{color:#9a3412}.n{color:#57606a;max-width:60rem}"
)


def write_page(columns: Columns, path: Path, bandwidths: Mapping[str, float] = MappingProxyType({})) -> int:
    """Write the page; return how many calls it is about.

    Args:
        columns: the calls.
        path: of the page.
        bandwidths: of links, in bytes a second, by what they are called: drawn as lines beside what was achieved.
    """
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs

    places = flows.places_of(columns, _PLACES)
    rows = flows.places_of(columns, _ROWS)
    moved, late, span = flows.flows_of(columns, places), times.stragglers(columns), times.span_of(columns)
    colours = _colours(columns, moved)
    calls = sum(map(len, columns.ranks))
    parts: list[str] = [_head(columns, span, calls)]

    def section(title: str, text: str, *content: str | go.Figure) -> None:
        parts.append(f"<h2>{_text(title)}</h2><p class=n>{_text(text)}</p>")
        for one in content:
            if isinstance(one, str):
                parts.append(one)
            else:
                one.update_layout(template="plotly_white", margin={"t": 50, "b": 50, "l": 80, "r": 30}, font={"size": 13})
                config = {"displaylogo": False, "responsive": True}
                parts.append(one.to_html(full_html=False, include_plotlyjs=False, config=config))

    section("Who sent how much to whom", _flow_words(moved, places), _matrix(go, moved, places), _rank_table(columns, moved))
    section(
        "The graph",
        f"Each point is a {places.unit}{', each box a host' if places.unit != 'host' else ''}. Lines are drawn for the {_EDGES} largest "
        "flows of a group, thicker for more bytes; arrows say the direction. A click on a group in the legend hides it.",
        _graph(go, moved, places, columns),
    )
    section(
        "Time by group and operation",
        "Sums over all ranks of calls that have ended well. Time in a call is time spent waiting for others, too.",
        _use_bars(go, moved, colours),
        _use_table(moved),
    )
    section("Stragglers", _late_words(columns, late), *_stragglers(go, columns, late))
    section(
        "Bandwidth",
        "Bytes moved by a rank (counted as in the matrix) over its time in the calls, by the bytes that it gave to a call. Waiting for "
        "others counts as time, so that a straggler makes its group's bandwidth small."
        + (
            " Dotted: what the figures of --links say."
            if bandwidths
            else " Give --links FILE, of commgraph bench --fit, to see the measured bandwidth of the links beside it."
        ),
        _bandwidth(go, moved, bandwidths, colours),
    )
    section(
        "Timeline",
        f"Above: the part of time that each {rows.unit} is in calls, in {_BINS} intervals. Below: "
        + ("all calls" if calls <= _BARS else f"of {calls:,} calls some {_BARS:,}: the longest of each rank, and the longest of all")
        + ". Drag to zoom, double-click to go back. commgraph report -o NAME.json writes all calls for ui.perfetto.dev.",
        _timeline(go, columns, rows, span, colours),
    )
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Communication of {columns.world_size} ranks</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    return calls


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: int | None = None) -> str:
    """Return a table; `words`: a column with text that may be long, beside the first two."""
    styles = [" class=t" if at == words else "" for at in range(len(head))]
    lines = ["".join(f"<th{style}>{_text(name)}</th>" for name, style in zip(head, styles, strict=True))]
    lines += ["".join(f"<td{style}>{_text(cell)}</td>" for cell, style in zip(row, styles, strict=True)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _bytes(value: float) -> str:
    """Return ``1.5 MiB``."""
    power = min(int(math.log2(value) // 10), 6) if value >= 1 else 0
    return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def _rate(value: float) -> str:
    """Return ``1.5 GB/s``."""
    power = min(int(math.log10(value) // 3), 4) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}/s"


def _seconds(value: float) -> str:
    """Return ``1.5 ms``."""
    for limit, scale, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1, 1e3, "ms")):
        if abs(value) < limit:
            return f"{value * scale:.4g} {unit}"
    return f"{value:.4g} s"


def _listing(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _head(columns: Columns, span: Span, calls: int) -> str:
    facts = columns.ranks[0].facts
    hosts = {one.facts["node"] for one in columns.ranks}
    first = (
        f"<h1>Communication of {columns.world_size} ranks</h1><p>{calls:,} calls of {len(columns.ranks)} ranks on {len(hosts)} "
        f"host{'s' if len(hosts) > 1 else ''} in {_seconds((span.end - span.begin) / 1e9)}: {_text(facts.get('program', ''))}</p>"
    )
    lines = [first]
    if missing := columns.missing:
        lines.append(
            f"<p class=w>No record was given of {len(missing)} of {columns.world_size} ranks: {_listing(missing)}. What they sent is not "
            "here, but for messages that others received from them.</p>"
        )
    if lost := sum(one.lost for one in columns.ranks):
        lines.append(
            f"<p class=w>{lost:,} earlier calls are not here: the rings have overwritten them "
            "(CommunicatorOptions(record_calls=...) makes them longer).</p>"
        )
    for state, what in ((OPEN, "had not ended when the records were read"), (FAILED, "ended with an error")):
        if count := sum(int((one.state == state).sum()) for one in columns.ranks):
            lines.append(f"<p class=w>{count:,} calls {what}: they are in the timeline, and not in the sums of bytes and times.</p>")
    return "".join(lines)


def _flow_words(moved: Flows, places: Places) -> str:
    left_out = f" {_bytes(moved.unattributed)} were received from ranks that the records do not name." if moved.unattributed else ""
    return (
        f"Rows send to columns; each is a {places.unit}. Messages count from their sender to their receiver. Of collectives a record "
        "says what a rank gave, not which way the bytes took: counted is the least that the operation has to move, evenly over the other "
        "ranks of the group. With n ranks and b bytes given: all_reduce 2 b/n to each other rank, all_gather b to each, broadcast b from "
        f"the root to each, scatter b/n from the root to each, reduce and gather b to the root, all others b/n to each.{left_out}"
    )


def _largest_groups(moved: Flows) -> list[tuple[str, Array]]:
    """Return the matrices of the groups that moved most, and of all others as one."""
    ordered = sorted(moved.matrices.items(), key=lambda item: -item[1].sum())
    found = ordered[:_GROUPS]
    if rest := ordered[_GROUPS:]:
        found.append((f"{len(rest)} other groups", np.sum([matrix for _, matrix in rest], axis=0)))
    return found


def _matrix(go: Any, moved: Flows, places: Places) -> Any:
    shown = _largest_groups(moved)
    size = len(places.names)
    total = np.sum([matrix for _, matrix in shown], axis=0) if shown else np.zeros((size, size))
    choices = [("all groups", total), *shown]
    top = total.max()
    low, high = 0, math.ceil(math.log2(top)) if top >= 2 else 1
    ticks = list(range(0, high + 1, max(1, high // 8)))
    figure = go.Figure()
    for number, (label, matrix) in enumerate(choices):
        with np.errstate(divide="ignore"):
            shade = np.where(matrix > 0, np.log2(np.maximum(matrix, 1)), np.nan)
        figure.add_heatmap(
            z=shade,
            x=places.names,
            y=places.names,
            name=label,
            visible=number == 0,
            customdata=[[_bytes(value) for value in row] for row in matrix.tolist()],
            hovertemplate=f"{places.unit} %{{y}} to %{{x}}: %{{customdata}}<extra>{_text(label)}</extra>",
            zmin=low,
            zmax=high,
            colorscale="Blues",
            colorbar={"title": "bytes", "tickvals": ticks, "ticktext": [_bytes(2.0**tick) for tick in ticks]},
            xgap=1,
            ygap=1,
        )
    buttons = [
        {
            "label": f"{label}: {_bytes(matrix.sum())}",
            "method": "update",
            "args": [{"visible": [other == number for other in range(len(choices))]}],
        }
        for number, (label, matrix) in enumerate(choices)
    ]
    figure.update_layout(
        height=620,
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "top"}],
        xaxis={"title": f"to {places.unit}", "type": "category", "constrain": "domain"},
        yaxis={"title": f"from {places.unit}", "type": "category", "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    )
    return figure


def _rank_table(columns: Columns, moved: Flows) -> str:
    order = np.argsort(-(moved.sent + moved.received), kind="stable")[:16]
    rows = [(int(rank), _bytes(moved.sent[rank]), _bytes(moved.received[rank])) for rank in order]
    head = f"<p class=n>In all {_bytes(float(moved.sent.sum()))}."
    more = f" The {len(rows)} of {columns.world_size} ranks that moved most:" if columns.world_size > len(rows) else ""
    return head + more + "</p>" + _table(("rank", "sent", "received"), rows)


def _positions(places: Places) -> tuple[Array, list[tuple[int, float, float]]]:
    """Return where each place is drawn, and (host, left, bottom) of boxes of side 1: hosts in rows, their places on a circle.

    Where every host is one place, all are on one circle and there are no boxes.
    """
    hosts = sorted(set(places.node.tolist()))
    size = len(places.names)
    if size == len(hosts) > 1:
        return _circle(size, 0.5), []
    per_row = math.ceil(math.sqrt(len(hosts)))
    found, boxes = np.zeros((size, 2)), []
    for number, host in enumerate(hosts):
        left, bottom = 1.25 * (number % per_row), -1.25 * (number // per_row)
        boxes.append((host, left, bottom))
        inside = np.flatnonzero(places.node == host)
        found[inside] = np.array([left + 0.5, bottom + 0.5]) + _circle(len(inside), 0.36 if len(inside) > 1 else 0.0)
    return found, boxes


def _circle(count: int, radius: float) -> Array:
    angle = np.pi / 2 - 2 * np.pi * np.arange(count) / count
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _graph(go: Any, moved: Flows, places: Places, columns: Columns) -> Any:
    at, boxes = _positions(places)
    figure = go.Figure()
    # Of a point, in the units of the axes.
    radius = 0.05 if len(at) <= 16 else 0.02
    shown = [(label, np.where(np.eye(len(matrix), dtype=bool), 0, matrix)) for label, matrix in _largest_groups(moved)]
    top = max((matrix.max() for _, matrix in shown), default=0)
    for number, (label, matrix) in enumerate(shown):
        colour = _COLOURS[number % len(_COLOURS)]
        order = np.argsort(-matrix, axis=None)[:_EDGES]
        source, target = np.unravel_index(order[matrix.ravel()[order] > 0], matrix.shape)
        amount = matrix[source, target]
        line = at[target] - at[source]
        along = line / np.linalg.norm(line, axis=1, keepdims=True)
        # Both directions of a pair are seen, and so are groups over the same ranks.
        aside = np.stack([-along[:, 1], along[:, 0]], 1) * radius * (0.3 + 0.12 * (number % len(_COLOURS)))
        begin, end = at[source] + radius * along + aside, at[target] - radius * along + aside
        width = np.minimum(len(_WIDTHS) - 1, np.log10(np.maximum(top / np.maximum(amount, 1e-9), 1)).astype(int))
        scale = 1.0 if len(amount) <= 64 else 0.25
        for rank, one in enumerate(sorted(set(width.tolist()))):
            some = width == one
            gap = np.full((some.sum(), 1), np.nan)
            figure.add_scatter(
                x=np.hstack([begin[some, :1], end[some, :1], gap]).ravel(),
                y=np.hstack([begin[some, 1:], end[some, 1:], gap]).ravel(),
                mode="lines",
                line={"width": _WIDTHS[-1 - one] * scale, "color": colour},
                opacity=0.6,
                name=label,
                legendgroup=label,
                showlegend=rank == 0,
                hoverinfo="skip",
            )
        middle = begin + 0.62 * (end - begin)
        figure.add_scatter(
            x=middle[:, 0],
            y=middle[:, 1],
            mode="markers",
            # An arrow in the direction of the line: plotly's angle goes clockwise from above.
            marker={
                "symbol": "triangle-up",
                "size": 8 if len(amount) <= 64 else 4,
                "color": colour,
                "angle": np.degrees(np.arctan2(line[:, 0], line[:, 1])),
            },
            text=[f"{places.names[a]} to {places.names[b]}: {_bytes(n)}" for a, b, n in zip(source, target, amount, strict=True)],
            hoverinfo="text",
            name=label,
            legendgroup=label,
            showlegend=False,
        )
    # A place without a record is orange.
    known = set(np.unique(places.of[[one.rank for one in columns.ranks]]).tolist())
    fill = ["#f6f8fa" if i in known else "#ffd8b5" for i in range(len(at))]
    figure.add_scatter(
        x=at[:, 0],
        y=at[:, 1],
        mode="markers+text",
        text=places.names,
        hovertext=[f"{places.unit} {name}{'' if i in known else ' (no record)'}" for i, name in enumerate(places.names)],
        hoverinfo="text",
        marker={
            "size": 24,
            "color": fill,
            "line": {"width": 1, "color": "#1f2328"},
        },
        textfont={"size": 11 if len(at) <= 16 else 8},
        showlegend=False,
    )
    names = {one.facts["node"]: str(one.facts["host"]) for one in columns.ranks}
    for host, left, bottom in boxes:
        figure.add_shape(type="rect", x0=left, y0=bottom, x1=left + 1, y1=bottom + 1, line={"color": "#8c959f", "width": 1}, layer="below")
        title = f"host {host}: {names[host]}" if host in names else "host not known"
        figure.add_annotation(x=left, y=bottom + 1, text=_text(title), showarrow=False, xanchor="left", yanchor="bottom")
    hidden = {"visible": False}
    figure.update_layout(height=640, xaxis=hidden, yaxis={**hidden, "scaleanchor": "x"}, legend={"title": {"text": "group"}})
    return figure


def _colours(columns: Columns, moved: Flows) -> dict[str, str]:
    """Return the colour of each operation, on the whole page: those that take most time differ."""
    names = dict.fromkeys([*(operation for (_, operation), _ in _ordered(moved)), *sorted(columns.operations)])
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}


def _ordered(moved: Flows) -> list[tuple[tuple[str, str], Use]]:
    return sorted(moved.uses.items(), key=lambda item: -item[1].seconds)


def _use_bars(go: Any, moved: Flows, colours: Mapping[str, str]) -> Any:
    figure = go.Figure()
    shown = _ordered(moved)[:_TABLE_ROWS]
    groups = sorted({label for (label, _), _ in shown}, key=lambda label: sum(use.seconds for (one, _), use in shown if one == label))
    for operation in dict.fromkeys(operation for (_, operation), _ in shown):
        own = {label: use for (label, name), use in shown if name == operation}
        figure.add_bar(
            x=[use.seconds for use in own.values()],
            y=list(own),
            orientation="h",
            name=operation,
            marker={"color": colours[operation]},
            hovertext=[f"{operation}: {_seconds(use.seconds)} in {use.calls:,} calls" for use in own.values()],
            hoverinfo="text",
        )
    figure.update_layout(
        barmode="stack",
        height=190 + 28 * max(len(groups), 4),
        xaxis={"title": "seconds in calls, of all ranks together"},
        yaxis={"categoryorder": "array", "categoryarray": groups, "type": "category"},
    )
    return figure


def _use_table(moved: Flows) -> str:
    ordered = _ordered(moved)
    total = sum(use.seconds for _, use in ordered) or 1.0
    rows = [
        (
            label,
            operation,
            f"{use.calls:,}",
            _bytes(use.given),
            _bytes(use.moved),
            _seconds(use.seconds),
            f"{100 * use.seconds / total:.1f} %",
            _seconds(use.seconds / use.calls),
            _seconds(use.longest),
            _rate(use.bandwidth) if use.moved else "",
        )
        for (label, operation), use in ordered[:_TABLE_ROWS]
    ]
    more = f"<p class=n>{len(ordered) - _TABLE_ROWS} more rows took less time.</p>" if len(ordered) > _TABLE_ROWS else ""
    head = ("group", "operation", "calls", "given", "moved", "time", "of all", "mean", "longest", "bandwidth of a rank")
    return _table(head, rows) + more


def _late_words(columns: Columns, late: Stragglers) -> str:
    errors = [one.clock_error for one in columns.ranks]
    if len({one.facts["node"] for one in columns.ranks}) == 1:
        clocks = ""
    elif min(errors) < 0:
        clocks = " The clocks of the hosts were not compared: times between hosts say little."
    else:
        clocks = f" Clocks of hosts differ by up to {_seconds(max(errors) / 1e9)}: smaller differences between hosts say nothing."
    left_out = f" {late.left_out:,} collectives are not in all records, and left out." if late.left_out else ""
    return (
        f"The last rank to begin, in {late.compared:,} collectives that are in the records of all ranks of their group. It is late by the "
        "time after the last but one, which is what this rank alone costs; what others waited for it is added up over the ranks of the "
        f"group.{left_out}{clocks}"
    )


def _stragglers(go: Any, columns: Columns, late: Stragglers) -> list[Any]:
    if not late.compared:
        return ["<p>There is nothing to compare.</p>"]
    shown = np.arange(columns.world_size) if columns.world_size <= _PLACES else np.sort(np.argsort(-late.seconds, kind="stable")[:_PLACES])
    figure = go.Figure()
    figure.add_bar(
        x=[str(rank) for rank in shown],
        y=late.seconds[shown],
        marker={"color": _COLOURS[0]},
        hovertext=[
            f"rank {rank}: last {late.times[rank]:,} times, late by {_seconds(late.seconds[rank])}, "
            f"others waited {_seconds(late.waited[rank])}"
            for rank in shown
        ],
        hoverinfo="text",
    )
    title = "rank" if len(shown) == columns.world_size else f"rank: the {len(shown)} that were late most"
    figure.update_layout(height=340, xaxis={"title": title, "type": "category"}, yaxis={"title": "seconds late, added up"})
    by_use = [
        (label, operation, f"{count:,}", _seconds(seconds), _seconds(seconds / count), rank, _seconds(own))
        for label, operation, count, seconds, rank, own in late.by_use[:_TABLE_ROWS]
    ]
    worst = [
        (one.label, one.operation, f"#{one.sequence}", one.rank, _seconds(one.seconds), _seconds(one.waited), one.site)
        for one in late.worst
    ]
    return [
        figure,
        _table(("group", "operation", "collectives", "late in all", "mean", "slowest rank", "of it"), by_use),
        f"<p class=n>The {len(worst)} latest:</p>",
        _table(("group", "operation", "number", "last rank", "late by", "others waited", "where it called"), worst, words=6),
    ]


def _bandwidth(go: Any, moved: Flows, bandwidths: Mapping[str, float], colours: Mapping[str, str]) -> Any:
    figure = go.Figure()
    for operation in sorted({operation for operation, _ in moved.by_size}):
        sizes = sorted(size for name, size in moved.by_size if name == operation and moved.by_size[name, size].bandwidth)
        uses = [moved.by_size[operation, size] for size in sizes]
        figure.add_scatter(
            x=[use.given / use.calls for use in uses],
            y=[use.bandwidth for use in uses],
            mode="lines+markers",
            name=operation,
            marker={"color": colours[operation]},
            text=[f"{operation} of {_bytes(use.given / use.calls)}: {_rate(use.bandwidth)}, {use.calls:,} calls" for use in uses],
            hoverinfo="text",
        )
    given = [use.given / use.calls for use in moved.by_size.values()] or [1.0]
    for name, value in bandwidths.items():
        figure.add_scatter(
            x=[min(given), max(given)],
            y=[value, value],
            mode="lines",
            line={"dash": "dot", "color": "#57606a"},
            name=f"{name}: {_rate(value)}",
            text=f"{name}: {_rate(value)}",
            hoverinfo="text",
        )
    figure.update_layout(
        height=420,
        showlegend=True,
        xaxis={"title": "bytes given to a call", "type": "log", "exponentformat": "SI", "dtick": 1},
        yaxis={"title": "bytes a second", "type": "log", "exponentformat": "SI", "dtick": 1},
    )
    return figure


def _timeline(go: Any, columns: Columns, rows: Places, span: Span, colours: Mapping[str, str]) -> Any:
    from plotly.subplots import make_subplots

    length = (span.end - span.begin) / 1e9
    unit, scale = ("us", 1e3) if length < 1e-3 else ("ms", 1e6) if length < 1 else ("s", 1e9)
    edges, part = times.busy(columns, rows, span, _BINS)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, shared_yaxes="all", vertical_spacing=0.06)
    figure.add_heatmap(
        x=(edges / scale).round(6),
        y=rows.names,
        z=part.round(3),
        zmin=0,
        zmax=1,
        colorscale="YlOrRd",
        colorbar={"title": "in calls", "len": 0.45, "y": 0.78, "tickformat": ".0%"},
        hovertemplate=f"{rows.unit} %{{y}} at %{{x}} {unit}: %{{z:.0%}}<extra></extra>",
        row=1,
        col=1,
    )
    bars: dict[str, list[tuple[float, float, str, str]]] = {}
    for index, at in times.longest(columns, span, _BARS):
        one = columns.ranks[index]
        end = np.where(one.end[at] == 0, span.end, one.end[at])
        for i, begin, taken in zip(at.tolist(), (one.begin[at] - span.begin).tolist(), (end - one.begin[at]).tolist(), strict=True):
            group, operation = columns.groups[one.group[i]], columns.operations[one.operation[i]]
            state = {OPEN: ", under way", FAILED: ", failed"}.get(int(one.state[i]), "")
            text = (
                f"rank {one.rank}: {group.label} {operation} #{one.sequence[i]}, {_bytes(int(one.nbytes[i]))}, "
                f"{_seconds(taken / 1e9)}{state}, "
                f"{columns.sites[one.site[i]]}"
            )
            bars.setdefault(operation, []).append((begin / scale, taken / scale, rows.names[rows.of[one.rank]], _text(text)))
    for operation, found in sorted(bars.items()):
        figure.add_bar(
            base=[begin for begin, _, _, _ in found],
            x=[taken for _, taken, _, _ in found],
            y=[row for _, _, row, _ in found],
            width=0.8,
            orientation="h",
            name=operation,
            marker={"color": colours[operation], "line": {"width": 0}},
            hovertext=[text for _, _, _, text in found],
            hoverinfo="text",
            row=2,
            col=1,
        )
    count = len(rows.names)
    figure.update_yaxes(title=rows.unit, type="category", range=[count - 0.5, -0.5], tick0=0, dtick=max(1, count // 16))
    figure.update_xaxes(range=[0, edges[-1] / scale])
    figure.update_xaxes(title=f"{unit} since the first call", row=2, col=1)
    figure.update_layout(height=min(1000, 460 + 12 * count), barmode="overlay", legend={"y": 0.42, "yanchor": "top"}, bargap=0)
    return figure
