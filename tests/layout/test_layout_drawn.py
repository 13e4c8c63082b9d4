"""Drawings, hosts, comparisons and the command: properties over random layouts, against brute force over every rank."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commgraph import cli
from commgraph.errors import LayoutError
from commgraph.layout import Grid, Hosts, Layout, Positions, Split, crossing, difference, html, svg, warnings
from commgraph.layout.written import read_axes, read_groups
from commgraph.testing.strategies import layouts

NAMESPACE = "{http://www.w3.org/2000/svg}"


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def drawn_ranks(panel: ET.Element) -> list[int]:
    """Every rank that a panel shows, in a cell of its own or in the range of a run of hosts."""
    ranks = [int(cell.attrib["data-rank"]) for cell in panel.iter(f"{NAMESPACE}rect") if "data-rank" in cell.attrib]
    for box in panel.iter(f"{NAMESPACE}rect"):
        if "data-ranks" in box.attrib:
            first, last = map(int, box.attrib["data-ranks"].split("-"))
            ranks += range(first, last + 1)
    return sorted(ranks)


@settings(max_examples=40, deadline=None)
@given(layouts(max_world_size=900, parts=True), st.data())
def test_every_rank_is_drawn_once_in_each_panel_with_the_colour_of_its_group(layout: Layout, data: st.DataObject) -> None:
    nodes = data.draw(st.sampled_from(divisors(layout.world_size)))
    root = ET.fromstring(svg(layout, nodes))
    panels = [group for group in root if group.get("class") == "panel"]
    assert panels
    seen = []
    for panel in panels:
        names = panel.attrib["data-groups"].split(" = ")
        seen += names
        assert drawn_ranks(panel) == list(range(layout.world_size))
        colours: dict[str, set[int]] = {}
        for cell in (cell for cell in panel.iter(f"{NAMESPACE}rect") if "data-rank" in cell.attrib):
            rank = int(cell.attrib["data-rank"])
            ranks = layout.ranks(names[0], rank)
            assert all(layout.pattern(name) == layout.pattern(names[0]) for name in names)
            assert int(cell.attrib["data-group"]) == ranks[0]
            assert (cell.attrib["fill"] == "#fff") == (len(ranks) == 1)
            hosts = {member // (layout.world_size // nodes) for member in ranks}
            assert (cell.attrib["class"] == "x") == (len(hosts) > 1)
            if len(ranks) > 1:
                colours.setdefault(cell.attrib["fill"], set()).add(ranks[0])
        if len(colours) <= 32:
            assert all(len(firsts) == 1 for firsts in colours.values())
    expected = {name for name in layout.names if layout.size(name) > 1} - layout.host_groups
    assert set(seen) == expected or not expected


@settings(max_examples=60, deadline=None)
@given(layouts(max_world_size=160, parts=True), st.data())
def test_groups_across_hosts_are_counted_as_brute_force_counts_them(layout: Layout, data: st.DataObject) -> None:
    hosts = Hosts.of(layout.world_size, data.draw(st.sampled_from(divisors(layout.world_size))))
    for name in layout.names:
        found = crossing(layout.pattern(name), hosts)
        shared = [ranks for ranks in layout.groups(name) if len(ranks) > 1]
        across = [ranks for ranks in shared if len({hosts.of_rank(rank) for rank in ranks}) > 1]
        assert (found.within, found.across) == (len(shared) - len(across), len(across))
        assert found.first == (across[0][0] if across else None)
        whole = [all(set(range(r // hosts.size * hosts.size, (r // hosts.size + 1) * hosts.size)) <= set(g) for r in g) for g in across]
        assert (found.cut is None) == all(whole)


@pytest.mark.parametrize(
    ("layout", "nodes", "said"),
    [
        (Layout(16, tp=8), 2, []),
        (Layout(16, tp=16), 2, ["tp crosses hosts: 1 group of 1, e.g. that of rank 0, which is on 2 hosts", "tp=8 stays inside"]),
        (Layout(24, tp=6), 3, ["tp crosses hosts: 2 groups of 4, e.g. that of rank 6", "tp=2 stays inside", "ep cuts hosts"]),
        (Layout(16, dp=2, pp=2, tp=4), 2, ["ep cuts hosts: the group of rank 0 has 4 of the 8 ranks of host 0, and the other 4 elsewhere"]),
        (Layout(16, dp=2, tp=8), 2, []),  # whole hosts
        (Layout(16, tp=16, dcp=16), 2, ["dcp crosses hosts"]),
        (Layout(8), 8, []),
    ],
)
def test_usual_mistakes_are_said(layout: Layout, nodes: int, said: list[str]) -> None:
    found = warnings(layout, Hosts.of(layout.world_size, nodes))
    assert all(any(text in line for line in found) for text in said), found
    assert bool(found) == bool(said)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24).flatmap(lambda n: st.tuples(layouts(world_size=n, parts=True), layouts(world_size=n, parts=True))))
def test_a_difference_is_symmetric_and_counts_every_rank_whose_group_changes(pair: tuple[Layout, Layout]) -> None:
    one, other = pair
    changes = difference(one, other, shown=100)
    assert {change.name: change.mirrored for change in difference(other, one, shown=100)} == {change.name: change for change in changes}
    for change in changes:
        if change.before is None or change.after is None:
            assert change.changed == one.world_size
            continue
        wrong = [rank for rank in range(one.world_size) if one.ranks(change.name, rank) != other.ranks(change.name, rank)]
        assert change.changed == len(wrong)
        assert change.rank == (wrong[0] if wrong else 0)
        assert (change.before, change.after) == (one.ranks(change.name, change.rank), other.ranks(change.name, change.rank))
    assert not any(change.changed for change in difference(one, one))


def test_layouts_of_different_worlds_are_not_compared() -> None:
    with pytest.raises(LayoutError, match="8 and 4 ranks"):
        difference(Layout(8), Layout(4))


def test_groups_and_axes_are_read_as_they_are_written() -> None:
    assert read_axes("pp=2, attn_tp=4") == {"pp": 2, "attn_tp": 4}
    texts = ["a=pp+tp", "b=tp/2", "c=pp+tp/2:4", "d=pp[0,-1]", "e=0,1;4,5", "f={pp=2,edp=1,ep=4}ep", "g={x=8}x/2"]
    assert read_groups(texts) == {
        "a": ("pp", "tp"),
        "b": Split("tp", 2),
        "c": Split(("pp", "tp"), 2, stride=4),
        "d": Positions("pp", (0, -1)),
        "e": ((0, 1), (4, 5)),
        "f": Grid({"pp": 2, "edp": 1, "ep": 4}, "ep"),
        "g": Grid({"x": 8}, Split("x", 2)),
    }
    for wrong in ("tp", "a=", "a=tp/", "a=pp[]", "a={pp=2}", "a={pp}tp", "a=1;;2", "a=pp+"):
        with pytest.raises(LayoutError):
            read_groups([wrong])
    with pytest.raises(LayoutError, match="twice"):
        read_groups(["a=tp", "a=pp"])
    with pytest.raises(LayoutError, match="twice"):
        read_axes("tp=2,tp=4")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["layout", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_json_that_rebuilds_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "16", "--axes", "pp=2,dp=2,tp=4", "--groups", "engine=pp+tp", "embd=pp[0,-1]", "--nodes", "2", "--json")
    found = json.loads(out)
    layout = Layout.from_axes(16, {"pp": 2, "dp": 2, "tp": 4}, {"engine": ("pp", "tp"), "embd": Positions("pp", (0, -1))})
    assert code == 0
    assert found["digest"] == layout.digest
    again = Layout.from_axes(16, found["axes"], {group["name"]: group["ranks"] for group in found["groups"][4:]})
    assert again == layout
    tp = next(group for group in found["groups"] if group["name"] == "tp")
    assert (tp["size"], tp["count"], tp["within_hosts"], tp["across_hosts"], tp["complete"]) == (4, 4, 4, 0, True)


def test_the_command_compares_draws_and_warns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "8", "--tp", "4", "--diff", "--tp 2 --pp 2")
    assert code == 0
    assert "tp: 8 of 8 ranks are in another group, e.g. rank 0\n  - (0 1 2 3)   2 groups of 4\n  + (0 1)   4 groups of 2\n" in out
    assert out.endswith("equal: world, replica, dp, pcp, dcp\n")
    code, out, _ = run(capsys, "8", "--tp", "8", "--nodes", "2", "--svg", str(tmp_path / "a.svg"), "--html", str(tmp_path / "a.html"))
    assert code == 0
    assert "\nwarning: tp crosses hosts" in out
    assert (tmp_path / "a.svg").read_text() == svg(Layout(8, tp=8), 2)
    page = (tmp_path / "a.html").read_text()
    assert page == html(Layout(8, tp=8), 2)
    assert page.count("<svg") == page.count("</svg>") == 1
    assert page.count("tp crosses hosts") == 1  # and not once more in the drawing
    assert re.search(r"<td>tp</td><td>8</td><td>1</td><td>0</td><td>1</td><td>0</td>", page)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["8", "--tp", "3"], "world_size=8 is not a multiple"),
        (["8", "--nodes", "3"], "not a multiple of nodes=3"),
        (["8", "--axes", "tp=8", "--tp", "2"], "--tp does not go with it"),
        (["8", "--first-rank", "2"], "goes with --axes"),
        (["8", "--groups", "x"], "'x' is no group"),
        (["8", "--svg", "/nowhere/at/all.svg"], "No such file"),
        (["8", "--diff", "--tp 3"], "not a multiple"),
        (["8", "--unknown"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("commgraph layout: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_million_ranks_take_less_than_a_second() -> None:
    layout = Layout(1_000_000, dp=5, pp=4, tp=10, groups={"embd": Positions("pp", (0, -1)), "engine": ("pp", "tp")})
    started = time.thread_time()  # of this thread: other tests may be using the cores
    drawing = svg(layout, 125_000)
    page = html(layout, 125_000)
    changes = difference(layout, Layout(1_000_000, tp=8))
    assert time.thread_time() - started < 1
    assert len(drawing) < 1_000_000
    assert len(page) < 1_500_000
    assert sum(change.changed for change in changes) > 1_000_000
    for panel in (group for group in ET.fromstring(drawing) if group.get("class") == "panel"):
        shown = [int(cell.attrib["data-rank"]) for cell in panel.iter(f"{NAMESPACE}rect") if "data-rank" in cell.attrib]
        runs = [box.attrib["data-ranks"].split("-") for box in panel.iter(f"{NAMESPACE}rect") if "data-ranks" in box.attrib]
        assert len(shown) + sum(int(last) - int(first) + 1 for first, last in runs) == 1_000_000
