"""`Layout` as a value and as arithmetic: properties over random layouts, against brute force that shares no code with it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import operator
import pickle
import subprocess
import sys
import tracemalloc

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commgraph.errors import ConfigurationError, LayoutError
from commgraph.layout import Grid, Layout, Positions, Split, describe, draw, table
from commgraph.testing.strategies import layouts
from tests.helpers import Groups, again_if_late, as_groups, within

AXES = ("replica", "dp", "pp", "pcp", "tp")


def joined(axes: dict[str, int], names: tuple[str, ...]) -> np.ndarray:
    """Brute force: one row for each group of the ranks that differ in `names` only, the last name fastest."""
    grid = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    order = list(axes)
    inner = [order.index(name) for name in names]
    outer = [index for index in range(len(order)) if index not in inner]
    return grid.transpose(outer + inner).reshape(-1, math.prod(axes[name] for name in names))


def with_positions(rows: np.ndarray, positions: list[int]) -> Groups:
    columns = list(dict.fromkeys(position % rows.shape[1] for position in positions))
    alone = [index for index in range(rows.shape[1]) if index not in columns]
    return tuple(sorted([*map(tuple, rows[:, columns].tolist()), *((rank,) for rank in rows[:, alone].flatten().tolist())]))


# Properties of every layout


@given(layouts(max_world_size=200))
def test_every_name_partitions_the_world_symmetrically(layout: Layout) -> None:
    for name in layout.names:
        groups = layout.groups(name)
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(layout.world_size))
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        assert max(map(len, groups)) == layout.size(name)
        assert len(groups) == layout.pattern(name).count
        for group in groups:
            assert all(layout.ranks(name, rank) == group for rank in group)
            assert layout.pattern(name).head(group[-1], 3) == group[:3]


@given(layouts(max_world_size=200, groups=False))
def test_named_groups_equal_reshape_and_transpose(layout: Layout) -> None:
    axes = dict(layout.axes)
    assert tuple(axes) == AXES
    for name in AXES:
        assert layout.groups(name) == as_groups(joined(axes, (name,)))
    assert layout.groups("world") == (tuple(range(layout.world_size)),)
    assert layout.groups("ep") == as_groups(joined(axes, ("dp", "pcp", "tp")))
    assert layout.groups("dcp") == as_groups(joined(axes, ("tp", "pcp")).reshape(-1, layout.size("dcp")))


@given(layouts(max_world_size=200, groups=False))
def test_axes_are_orthogonal(layout: Layout) -> None:
    for one, other in itertools.combinations(AXES, 2):
        for rank in range(layout.world_size):
            assert set(layout.ranks(one, rank)) & set(layout.ranks(other, rank)) == {rank}


@given(layouts(max_world_size=200))
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        position = layout.coordinate(rank)
        assert list(position) == list(layout.axes)
        assert layout.rank_of(**position) == rank
        assert layout.rank_of(**{name: place for name, place in position.items() if place}) == rank
        for name in AXES:
            assert layout.ranks(name, rank)[position[name]] == rank


@given(layouts(max_world_size=200, groups=False))
def test_ep_is_the_union_of_its_tp_groups(layout: Layout) -> None:
    for group in layout.groups("ep"):
        tensor_groups = list(dict.fromkeys(layout.ranks("tp", rank) for rank in group))
        assert tuple(itertools.chain.from_iterable(tensor_groups)) == group
        assert len({(layout.coordinate(rank)["replica"], layout.coordinate(rank)["pp"]) for rank in group}) == 1


@given(layouts(max_world_size=200, groups=False))
def test_every_dcp_group_lies_inside_one_tp_x_pcp_block(layout: Layout) -> None:
    for group in layout.groups("dcp"):
        blocks = {tuple(layout.coordinate(rank)[axis] for axis in ("replica", "dp", "pp")) for rank in group}
        assert len(blocks) == 1


@given(layouts(max_world_size=64))
def test_layouts_are_values(layout: Layout) -> None:
    for twin in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin.digest == layout.digest
    assert "\n" not in repr(layout)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        layout.world_size = 3  # type: ignore[misc]


@given(layouts(max_world_size=48), layouts(max_world_size=48))
def test_digests_differ_where_layouts_do(one: Layout, other: Layout) -> None:
    """The digest of a layout says whether two ranks mean the same."""
    assert (one.digest == other.digest) == (one == other)


@given(st.data())
def test_an_exact_world_size_can_be_asked_of_the_strategy(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    assert data.draw(layouts(world_size=size)).world_size == size


# Groups of the user's own


@st.composite
def small_axes(draw_: st.DrawFn) -> dict[str, int]:
    return {name: draw_(st.integers(1, 4)) for name in ("a", "b", "c", "d")[: draw_(st.integers(1, 4))]}


@given(st.data(), small_axes())
def test_unions_equal_brute_force(data: st.DataObject, axes: dict[str, int]) -> None:
    names = tuple(data.draw(st.permutations(list(axes))))[: data.draw(st.integers(1, 4))]
    layout = Layout.from_axes(math.prod(axes.values()), axes, {"own": names})
    assert layout.groups("own") == as_groups(joined(axes, names))


@given(st.data(), small_axes())
def test_splits_equal_brute_force_or_are_refused(data: st.DataObject, axes: dict[str, int]) -> None:
    names = tuple(data.draw(st.permutations(list(axes))))[: data.draw(st.integers(1, 4))]
    rows = joined(axes, names)
    count = rows.shape[1]
    size = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    stride = data.draw(st.sampled_from([n for n in range(1, count // size + 1) if count // size % n == 0]))
    expected = as_groups(rows.reshape(len(rows), -1, size, stride).swapaxes(2, 3).reshape(-1, size))
    # Within one axis every split that divides it works; across several, one of them may have to be cut unevenly, and it is refused.
    try:
        layout = Layout.from_axes(rows.size, axes, {"own": Split(names, size, stride=stride)})
    except LayoutError as error:
        refused = str(error)
    else:
        refused = ""
        assert layout.groups("own") == expected
    assert not refused or (len(names) > 1 and "do not divide each other" in refused)


def test_a_split_may_cross_axes_whose_ranks_count_on() -> None:
    assert Layout.from_axes(12, {"a": 2, "b": 6}, {"runs": Split(("a", "b"), 4)}).groups("runs") == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9, 10, 11),
    )
    with pytest.raises(LayoutError, match=r"size = 4 does not cut a\*b = 2\*6 = 12 into equal steps: 4 and 6 .*do not divide each other"):
        Layout.from_axes(12, {"b": 6, "a": 2}, {"runs": Split(("a", "b"), 4)})


@given(st.data(), small_axes())
def test_positions_equal_brute_force(data: st.DataObject, axes: dict[str, int]) -> None:
    names = tuple(data.draw(st.permutations(list(axes))))[: data.draw(st.integers(1, 4))]
    rows = joined(axes, names)
    count = rows.shape[1]
    positions = data.draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=5))
    layout = Layout.from_axes(rows.size, axes, {"own": Positions(names, positions)})
    assert layout.groups("own") == with_positions(rows, positions)
    for group in layout.groups("own"):
        assert all(layout.ranks("own", rank) == group for rank in group)


@given(st.data(), small_axes())
def test_grids_equal_brute_force(data: st.DataObject, axes: dict[str, int]) -> None:
    order = data.draw(st.permutations(list(axes)))
    grid = {f"g{name}": axes[name] for name in order}
    names = tuple(data.draw(st.permutations(list(grid))))[: data.draw(st.integers(1, 4))]
    layout = Layout.from_axes(
        math.prod(axes.values()),
        axes,
        {"own": Grid(grid, names), "ends": Grid(grid, Positions(names[0], (0, -1))), "one": Grid(grid, names[0])},
    )
    assert layout.groups("own") == as_groups(joined(grid, names))
    assert layout.groups("one") == as_groups(joined(grid, names[:1]))
    assert layout.groups("ends") == with_positions(joined(grid, names[:1]), [0, -1])


@given(st.data(), st.integers(1, 40))
def test_rank_lists_come_back_as_they_were_given(data: st.DataObject, world_size: int) -> None:
    ranks = data.draw(st.permutations(range(world_size)))
    cuts = sorted(data.draw(st.sets(st.integers(1, world_size), max_size=6)) | {0, world_size})
    lists = [ranks[start:end] for start, end in itertools.pairwise(cuts)]
    layout = Layout.from_groups(world_size, {"own": lists})
    assert layout.groups("own") == tuple(sorted(map(tuple, lists)))
    assert layout.axes == {"world": world_size}
    assert layout.names == ("world", "own")
    assert layout.size("own") == max(map(len, lists))
    for group in lists:
        assert all(layout.ranks("own", rank) == tuple(group) for rank in group)
    again = Layout.from_groups(world_size, {"own": layout.groups("own")})
    assert (again, again.digest) == (layout, layout.digest)
    assert pickle.loads(pickle.dumps(layout)) == layout


@given(layouts(max_world_size=64))
def test_equal_groups_have_equal_patterns_however_they_were_written(layout: Layout) -> None:
    by_name: dict[Groups, str] = {}
    for name in layout.names:
        twin = by_name.setdefault(layout.groups(name), name)
        assert layout.pattern(name) == layout.pattern(twin)
    regular = [name for name in layout.names if not name.startswith("own")]
    copied = Layout.from_groups(layout.world_size, {f"{name}-list": layout.groups(name) for name in regular})
    for name in regular:
        assert copied.pattern(f"{name}-list") == layout.pattern(name)


def test_positions_that_coincide_count_once() -> None:
    one_stage = Layout(4, tp=4, groups={"embd": Positions("pp", (0, -1))})
    assert one_stage.groups("embd") == ((0,), (1,), (2,), (3,))
    assert one_stage.size("embd") == 1
    two_stages = Layout(4, pp=2, tp=2, groups={"embd": Positions("pp", (0, -1))})
    assert two_stages.pattern("embd") == two_stages.pattern("pp")


# The documented example and the value's own members


def test_the_documented_dcp_example() -> None:
    layout = Layout(8, tp=4, pcp=2, dcp=2)
    assert layout.groups("dcp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert Layout(8, tp=4, pcp=2, dcp=8).groups("dcp") == ((0, 4, 1, 5, 2, 6, 3, 7),)
    assert Layout(8, tp=4, dcp=2).groups("dcp") == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_members() -> None:
    layout = Layout(16, tp=2, pp=2, dp=2, groups={"engine": ("pp", "pcp", "tp")})
    assert layout.names == ("world", *AXES, "dcp", "ep", "engine")
    assert layout.axes == {"replica": 2, "dp": 2, "pp": 2, "pcp": 1, "tp": 2}
    assert list(layout.axes) == list(AXES)
    with pytest.raises(TypeError):
        layout.axes["tp"] = 3  # type: ignore[index]
    assert layout.ranks("engine", 5) == (4, 5, 6, 7)
    assert layout.coordinate(13) == {"replica": 1, "dp": 1, "pp": 0, "pcp": 0, "tp": 1}
    assert layout.rank_of(replica=1, dp=1, tp=1) == 13
    assert repr(layout) == "Layout(16, replica=2, dp=2, pp=2, tp=2, groups=(engine))"
    assert repr(Layout(4, tp=4, dcp=2)) == "Layout(4, tp=4, dcp=2)"
    assert repr(Layout.from_axes(4, {"x": 4})) == "Layout.from_axes(4, x=4)"
    assert repr(Layout.from_groups(2, {"x": [[0, 1]]})) == "Layout.from_groups(2, groups=(x))"


def test_layouts_are_equal_by_what_they_hold() -> None:
    assert Layout(8, tp=2, groups={"x": "tp"}) == Layout(8, tp=2, groups={"x": Split("tp", 2)})
    assert Layout(8, tp=2, groups={"x": "tp"}) != Layout(8, tp=2, groups={"y": "tp"})
    axes = {"replica": 4, "dp": 1, "pp": 1, "pcp": 1, "tp": 2}
    assert Layout.from_axes(8, axes, {"dcp": Split("tp", 1), "ep": "tp"}) == Layout(8, tp=2)
    assert Layout.from_axes(8, axes) != Layout(8, tp=2)
    assert Layout(8, tp=2) != Layout(8, pp=2)
    assert Layout(8, tp=2, dcp=2) != Layout(8, tp=2)
    assert len({Layout(8, tp=2), Layout(8, tp=np.int64(2)), Layout(8)}) == 2
    assert json.dumps(Layout(np.int64(8), tp=np.int64(2)).ranks("tp", np.int64(3))) == "[2, 3]"


def test_the_digest_is_the_same_in_another_process() -> None:
    """The digest can be compared across ranks, whose string hashes differ; and importing a layout needs no torch."""
    code = (
        "import sys; from commgraph.layout import *;"
        "print(Layout(12, tp=2, pp=3, groups={'embd': Positions('pp', (0, -1)), 'odd': [[0, 3], range(4, 12), [2, 1]]}).digest,"
        " 'torch' in sys.modules)"
    )
    layout = Layout(12, tp=2, pp=3, groups={"embd": Positions("pp", (0, -1)), "odd": [[0, 3], range(4, 12), [2, 1]]})
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [layout.digest, "False"]
    assert len(bytes.fromhex(layout.digest)) == 32


# What it costs


def test_a_group_of_one_among_a_million_ranks_needs_no_table() -> None:
    tracemalloc.start()
    try:
        layout = Layout(1_000_000, tp=10, pp=10)
        assert layout.ranks("dp", 654_321) == (654_321,)
        assert layout.ranks("tp", 654_321) == tuple(range(654_320, 654_330))
        assert layout.coordinate(654_321) == {"replica": 6543, "dp": 0, "pp": 2, "pcp": 0, "tp": 1}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_a_world_of_a_trillion_ranks_costs_what_one_of_eight_does() -> None:
    layout = Layout(10**12, tp=8, pp=16, groups={"embd": Positions("pp", (0, -1)), "experts": Grid({"rest": 10**12 // 64, "ep": 64}, "ep")})
    rank = 10**12 - 1
    assert layout.ranks("pcp", rank) == (rank,)
    assert layout.ranks("tp", rank) == tuple(range(rank - 7, rank + 1))
    assert layout.ranks("embd", rank) == (rank - 120, rank)
    assert layout.ranks("experts", rank) == tuple(range(rank - 63, rank + 1))
    assert layout.rank_of(**layout.coordinate(rank)) == rank
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert len(describe(layout, rank)) + len(describe(layout)) < 20_000


@again_if_late
def test_a_layout_of_100_000_ranks_takes_less_than_a_second() -> None:
    """Start-up must not grow with the number of groups: all groups of one rank, from axes and from rank lists."""
    with within(1):
        layout = Layout(100_000, tp=8, pp=10, dp=5, groups={"engine": ("pp", "tp")})
        own = {name: layout.ranks(name, 77_777) for name in layout.names}
        assert layout.digest
        listed = Layout.from_groups(100_000, {"tp": [range(first, first + 8) for first in range(0, 100_000, 8)]})
        assert listed.ranks("tp", 77_777) == own["tp"]


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Layout(8, pp=3, tp=5, dcp=3),
            ["world_size=8 is not a multiple of dp*pp*pcp*tp = 1*3*1*5 = 15", "dcp=3 does not divide tp=5"],
        ),
        (lambda: Layout(16, pcp=2, tp=4, dcp=4), ["dcp=4", "pcp=2", "tp=4", "[1, 2, 8]"]),
        (
            lambda: Layout(0, tp=True, pp=2.5, dp=-1),
            ["world_size=0 is less than 1", "tp=True is not", "pp=2.5 is not", "dp=-1 is less than 1"],
        ),
        (lambda: Layout(8, tp="2"), ["tp='2' is not a whole number"]),
        (lambda: Layout(8, tp=3, groups={"x": "tpp", "y": "replica"}), ["8 is not a multiple", "'tpp'; did you mean 'tp'?"]),
        (lambda: Layout(8, groups={"x": "ep"}), ["no axis is called 'ep'", "replica, dp, pp, pcp, tp"]),
        (lambda: Layout(8, groups={"x": ("tp", "tp")}), ["'tp' is named more than once"]),
        (lambda: Layout(8, groups={"x": ("tp", [0])}), ["either every item is an axis name"]),
        (lambda: Layout(8, groups={"x": 5}), ["5 is no axis"]),
        (lambda: Layout(8, groups={"x": {"a": 8}}), ["Grid("]),
        (lambda: Layout(8, groups={"tp": "dp"}), ["'tp': this name is taken"]),
        (lambda: Layout(8, groups={"": "dp", "1a": "dp", 3: "dp"}), ["group ''", "group '1a'", "group 3"]),
        (lambda: Layout(8, groups=["tp"]), ["groups map names"]),
        (lambda: Layout(8, tp=2, groups={"x": Split("tp", 3)}), ["group 'x'", "size = 3 does not divide tp = 2"]),
        (lambda: Layout(8, tp=8, groups={"x": Split("tp", 2, stride=8)}), ["size*stride = 2*8 = 16 does not divide tp = 8"]),
        (lambda: Layout(8, tp=8, groups={"x": Split("tp", 0, stride="a")}), ["size=0", "stride='a'"]),
        (lambda: Layout(8, tp=8, groups={"x": Split((), 1)}), ["no axis is named"]),
        (lambda: Layout(8, pp=2, groups={"x": Positions("pp", (0, 2, -3))}), ["2, -3 is no position of pp", "0..1"]),
        (lambda: Layout(8, pp=2, groups={"x": Positions("pp", ())}), ["no position of pp"]),
        (lambda: Layout(8, groups={"x": Grid({"a": 3, "b": 2}, "c")}), ["a*b = 3*2 = 6 is not world_size=8", "no axis is called 'c'"]),
        (lambda: Layout(8, groups={"x": Grid({"a": 0, "b": 2}, "a")}), ["a=0 is less than 1"]),
        (lambda: Layout(8, groups={"x": Grid((("a", 2), ("a", 4)), "a")}), ["names an axis twice"]),
        (lambda: Layout.from_axes(8, {"a": 2, "b": 3}), ["a*b = 2*3 = 6 is not world_size=8"]),
        (lambda: Layout.from_axes(8, {}), ["no axes"]),
        (lambda: Layout.from_axes(8, {"a b": 8}), ["axis 'a b'"]),
        (lambda: Layout.from_axes(8, {"world": 2, "a": 4}), ["'world'"]),
        (lambda: Layout.from_axes(8, [("a", 8)]), ["axes map names"]),
        (
            lambda: Layout.from_groups(6, {"x": [[0, 1], [1, 9, True]], "y": [range(6), []]}),
            [
                "group 'x'",
                "each of 6 ranks at most once",
                "more than once: rank 1",
                "not a rank of 0..5: 9, True",
                "group 'y'",
                "no ranks in group 1",
            ],
        ),
        (lambda: Layout(8).ranks("dcpp", 0), ["'dcpp'; did you mean 'dcp'?", "world, replica, dp, pp, pcp, tp, dcp, ep"]),
        (lambda: Layout(8).groups("x"), ["no group is called 'x'"]),
        (lambda: Layout(8).size("x"), ["no group is called 'x'"]),
        (lambda: Layout(8).ranks("tp", 8), ["rank 8 is out of range", "0..7"]),
        (lambda: Layout(8).ranks("tp", -1), ["rank -1 is out of range"]),
        (lambda: Layout(8).coordinate(1.0), ["rank 1.0 is out of range"]),
        (lambda: Layout(8, tp=2).rank_of(tp=2, ppp=1, replica=-1), ["tp=2", "0..1", "did you mean 'pp'", "replica=-1", "0..3"]),
        (lambda: draw(Layout(8), axes="ttp"), ["did you mean 'tp'"]),
        (lambda: draw(Layout(8), axes=("tp", "tp")), ["more than once"]),
        (lambda: describe(Layout(8), 8), ["rank 8 is out of range"]),
    ],
)
def test_every_violated_equation_is_said_with_its_numbers(make: object, said: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        operator.call(make)  # type: ignore[arg-type]
    assert isinstance(caught.value, ConfigurationError | ValueError)
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Pictures


def test_a_small_layout_is_drawn_whole() -> None:
    assert draw(Layout(8, tp=2, pp=2)).splitlines() == [
        "8 ranks = replica 2 x pp 2 x tp 2: tp across, pp down, a block per replica",
        "",
        "replica 0              replica 1",
        "       tp 0   tp 1            tp 0   tp 1",
        "     ┌──────┬──────┐        ┌──────┬──────┐",
        "pp 0 │  0   │  1   │   pp 0 │  4   │  5   │",
        "pp 1 │  2   │  3   │   pp 1 │  6   │  7   │",
        "     └──────┴──────┘        └──────┴──────┘",
    ]
    assert draw(Layout(8, tp=2, pp=2), axes=("tp", "pp"), width=30, mark=6).splitlines()[2:7] == [
        "replica 0",
        "       pp 0   pp 1",
        "     ┌──────┬──────┐",
        "tp 0 │  0   │  2   │",
        "tp 1 │  1   │  3   │",
    ]
    assert "│ [6]  │" in draw(Layout(8, tp=2, pp=2), axes=("tp", "pp"), width=30, mark=6)


def test_one_rank_and_plain_rank_lists_have_no_axis_to_name() -> None:
    assert draw(Layout(1)).splitlines() == ["1 rank", "", "┌───┐", "│ 0 │", "└───┘"]
    assert draw(Layout.from_groups(3, {"x": [[0, 1], [2]]})).splitlines() == [
        "3 ranks",
        "",
        "┌───┬───┬───┐",
        "│ 0 │ 1 │ 2 │",
        "└───┴───┴───┘",
    ]


@settings(max_examples=60)
@given(layouts(max_world_size=200), st.data())
def test_pictures_keep_their_width_and_show_the_marked_rank(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world_size - 1))
    width = data.draw(st.integers(70, 120))
    picture = draw(layout, width=width, mark=rank).split("\n", 1)[1]
    assert f"[{rank}]" in picture
    assert max(map(len, picture.splitlines())) <= width + 20
    if "…" not in picture:
        assert all(f" {other} " in picture for other in range(layout.world_size) if other != rank)
    listing = table(layout, width=width).splitlines()
    assert [line.split()[0] for line in listing] == ["group", *layout.names]


def test_long_layouts_are_cut_short() -> None:
    picture = draw(Layout(64 * 16 * 500, tp=64, pp=16))
    assert "…" in picture
    assert len(picture.splitlines()) < 60
    assert max(map(len, picture.splitlines())) <= 100
    assert "tp 63" in picture
    assert "pp 15" in picture
    assert "replica 499" in picture


def test_the_table_lists_sizes_counts_and_the_first_groups() -> None:
    lines = table(Layout(8, tp=2, pp=2, groups={"embd": Positions("pp", (0, -1)), "odd": [[3, 0], [1, 2, 4, 5, 6, 7]]})).splitlines()
    assert lines[0].split() == ["group", "size", "groups", "ranks"]
    assert "tp          2       4  (0 1) (2 3) (4 5) (6 7)" in lines
    assert "dp          1       8  each rank alone" in lines
    assert "odd       ≤ 6       2  (1 2 4 5 6 7) (3 0)" in lines


def test_a_description_of_one_rank_names_its_place_and_its_groups() -> None:
    text = describe(Layout(8, tp=2, pp=2), 5)
    assert "[5]" in text
    assert "rank 5 sits at replica 1, dp 0, pp 0, pcp 0, tp 1" in text
    assert "  tp       (4 5)" in text
    assert "  dp       alone" in text
    assert table(Layout(8, tp=2, pp=2)) in describe(Layout(8, tp=2, pp=2))
