"""Layouts that name only some ranks: rank lists that leave ranks out, and grids over a part of the world."""

from __future__ import annotations

import itertools
import math
import pickle
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.errors import LayoutError
from commgraph.layout import Grid, GroupSpec, Layout, Positions, Split, describe, draw, table
from commgraph.testing import spmd
from commgraph.testing.strategies import layouts

Groups = tuple[tuple[int, ...], ...]
STANDARD = ("replica", "dp", "pp", "pcp", "tp")


def with_the_rest_alone(world_size: int, lists: Sequence[Sequence[int]]) -> Groups:
    named = set(itertools.chain.from_iterable(lists))
    alone = [(rank,) for rank in range(world_size) if rank not in named]
    return tuple(sorted([*map(tuple, lists), *alone]))


@st.composite
def rank_lists(draw_: st.DrawFn, world_size: int) -> list[list[int]]:
    """Disjoint lists over some of the ranks, in any order."""
    ranks = draw_(st.permutations(range(world_size)))[: draw_(st.integers(0, world_size))]
    cuts = sorted(draw_(st.sets(st.integers(0, len(ranks)), max_size=6)) | {0, len(ranks)})
    return [list(ranks[start:end]) for start, end in itertools.pairwise(cuts)]


# Rank lists that leave ranks out


@given(st.data(), st.integers(1, 40))
def test_a_rank_in_no_list_is_alone(data: st.DataObject, world_size: int) -> None:
    lists = data.draw(rank_lists(world_size))
    layout = Layout.from_groups(world_size, {"own": lists})
    expected = with_the_rest_alone(world_size, lists)
    assert layout.groups("own") == expected
    assert layout.size("own") == max(map(len, expected))
    pattern = layout.pattern("own")
    assert pattern.count == len(expected)
    assert pattern.alone == sum(len(group) == 1 for group in expected)
    assert list(pattern.shared()) == [group[0] for group in expected if len(group) > 1]
    for group in expected:
        assert all(layout.ranks("own", rank) == group for rank in group)
        assert all(pattern.head(rank, 2) == group[:2] for rank in group)


@given(st.data(), st.integers(1, 40))
def test_a_list_of_one_rank_says_what_leaving_it_out_does(data: st.DataObject, world_size: int) -> None:
    lists = data.draw(rank_lists(world_size))
    sparse = Layout.from_groups(world_size, {"own": [ranks for ranks in lists if len(ranks) > 1]})
    for twin in (
        Layout.from_groups(world_size, {"own": lists}),
        Layout.from_groups(world_size, {"own": with_the_rest_alone(world_size, lists)}),
        Layout.from_groups(world_size, {"own": lists[::-1]}),
        pickle.loads(pickle.dumps(sparse)),
    ):
        assert (twin, hash(twin), twin.digest) == (sparse, hash(sparse), sparse.digest)
    if sparse.size("own") > 1:
        assert sparse.digest != Layout.from_groups(world_size, {"own": []}).digest


def test_no_list_at_all_leaves_each_rank_alone() -> None:
    layout = Layout.from_groups(3, {"own": []})
    assert layout.groups("own") == ((0,), (1,), (2,))
    assert layout.pattern("own") == Layout(3).pattern("tp")


def test_rank_lists_leave_ranks_out_beside_axes_too() -> None:
    layout = Layout(8, tp=2, groups={"odd": [[7, 1]]})
    assert layout.ranks("odd", 1) == (7, 1)
    assert layout.ranks("odd", 0) == (0,)


def test_lists_among_a_trillion_ranks_cost_what_they_hold() -> None:
    tracemalloc.start()
    try:
        layout = Layout.from_groups(10**12, {"pair": [[10**12 - 1, 5]], "node": [range(800, 808), range(808, 816)], "none": []})
        assert layout.ranks("pair", 5) == (10**12 - 1, 5)
        assert layout.ranks("node", 809) == tuple(range(808, 816))
        assert layout.ranks("pair", 6) == layout.ranks("none", 6) == (6,)
        assert layout.digest
        assert "(999999999999 5), 999999999998 alone" in table(layout)
        assert "(800 801" in describe(layout, 800)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


# Grids over a part of the world


@st.composite
def some_parts(draw_: st.DrawFn) -> tuple[int, int, dict[str, int]]:
    axes = {name: draw_(st.integers(1, 4)) for name in ("a", "b", "c")[: draw_(st.integers(1, 3))]}
    first = draw_(st.integers(0, 9))
    return first + math.prod(axes.values()) + draw_(st.integers(0, 9)), first, axes


@st.composite
def some_specs(draw_: st.DrawFn, axes: dict[str, int]) -> GroupSpec:
    names = tuple(draw_(st.permutations(list(axes))))[: draw_(st.integers(1, len(axes)))]
    count = math.prod(axes[name] for name in names)
    positions = draw_(st.lists(st.integers(-count, count - 1), min_size=1, max_size=4))
    grid = {f"g{name}": axes[name] for name in draw_(st.permutations(list(axes)))}
    specs: tuple[GroupSpec, ...] = (
        names,
        names[0],
        Positions(names, positions),
        Split(names[0], axes[names[0]]),
        Grid(grid, tuple(f"g{name}" for name in names)),
        Grid(grid, Positions(tuple(f"g{name}" for name in names), positions)),
    )
    return draw_(st.sampled_from(specs))


@given(st.data(), some_parts())
def test_a_part_is_the_layout_of_its_own_ranks_moved_up(data: st.DataObject, part: tuple[int, int, dict[str, int]]) -> None:
    """Against the layout of a world that ends with the part: no code is shared but that of whole worlds, which is tested by itself."""
    world_size, first, axes = part
    specs = {f"own{index}": data.draw(some_specs(axes)) for index in range(data.draw(st.integers(0, 2)))}
    layout = Layout.from_axes(world_size, axes, specs, first_rank=first)
    alone = Layout.from_axes(math.prod(axes.values()), axes, specs)
    assert layout.names == alone.names
    assert layout.axes == alone.axes
    assert layout.grid_ranks == range(first, first + alone.world_size)
    assert layout.groups("world") == (tuple(range(world_size)),)
    for name in layout.names[1:]:
        moved = [tuple(rank + first for rank in group) for group in alone.groups(name)]
        groups = with_the_rest_alone(world_size, moved)
        pattern = layout.pattern(name)
        assert layout.groups(name) == groups
        assert layout.size(name) == alone.size(name)
        assert (pattern.count, pattern.alone) == (len(groups), sum(len(group) == 1 for group in groups))
        assert list(pattern.shared()) == [group[0] for group in groups if len(group) > 1]
        for group in groups:
            assert all(layout.ranks(name, rank) == group for rank in group)
            assert all(pattern.head(rank, 2) == group[:2] for rank in group)
    for rank in range(world_size):
        if rank in layout.grid_ranks:
            assert layout.coordinate(rank) == alone.coordinate(rank - first)
            assert layout.rank_of(**layout.coordinate(rank)) == rank
        else:
            with pytest.raises(LayoutError, match=rf"rank {rank} has no position: .* covers the ranks {first}\.\."):
                layout.coordinate(rank)


@given(some_parts(), some_parts())
def test_parts_are_values(one: tuple[int, int, dict[str, int]], other: tuple[int, int, dict[str, int]]) -> None:
    first, second = (Layout.from_axes(world, axes, first_rank=begin) for world, begin, axes in (one, other))
    assert pickle.loads(pickle.dumps(first)) == first
    assert (first == second) == (first.digest == second.digest) == (one[:2] == other[:2] and list(one[2].items()) == list(other[2].items()))
    assert first != second or hash(first) == hash(second)


@given(some_parts())
def test_a_part_that_is_the_whole_world_is_no_part(part: tuple[int, int, dict[str, int]]) -> None:
    _, _, axes = part
    size = math.prod(axes.values())
    layout = Layout.from_axes(size, axes, first_rank=0)
    assert layout == Layout.from_axes(size, axes)
    assert repr(layout) == repr(Layout.from_axes(size, axes))
    assert "outside" not in draw(layout)


@given(some_parts())
def test_the_groups_of_a_part_equal_those_of_rank_lists(part: tuple[int, int, dict[str, int]]) -> None:
    world_size, first, axes = part
    layout = Layout.from_axes(world_size, axes, first_rank=first)
    copied = Layout.from_groups(world_size, {f"{name}-list": layout.groups(name) for name in axes})
    for name in axes:
        assert copied.pattern(f"{name}-list") == layout.pattern(name)


@given(layouts(max_world_size=60, parts=True))
def test_every_name_of_a_drawn_layout_partitions_the_world(layout: Layout) -> None:
    assert tuple(layout.axes) == STANDARD
    for name in layout.names:
        groups = layout.groups(name)
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(layout.world_size))
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        assert (max(map(len, groups)), len(groups)) == (layout.size(name), layout.pattern(name).count)
        assert all(layout.ranks(name, rank) == group for group in groups for rank in group)
    for rank in layout.grid_ranks:
        assert layout.rank_of(**layout.coordinate(rank)) == rank
    assert (pickle.loads(pickle.dumps(layout)), "\n" in repr(layout)) == (layout, False)


@settings(max_examples=60)
@given(layouts(max_world_size=60, parts=True), st.data())
def test_every_drawn_layout_is_drawn_and_described(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world_size - 1))
    text = describe(layout, rank)
    assert (f"[{rank}]" in text) == (f"rank {rank} sits at" in text) == (rank in layout.grid_ranks)
    assert [line.split()[0] for line in table(layout).splitlines()] == ["group", *layout.names]


def test_drawn_layouts_hold_what_was_asked_for() -> None:
    seen: set[str] = set()

    @given(layouts(world_size=7, parts=True))
    def look(layout: Layout) -> None:
        assert layout.world_size == 7
        seen.add("part" if len(layout.grid_ranks) < 7 else "whole")
        seen.update(name for name in layout.names if name == "listed")

    look()
    assert seen == {"part", "whole", "listed"}


def test_a_trainer_and_a_generator_in_one_world() -> None:
    trainer = Layout.from_axes(8, {"fsdp": 4}, first_rank=0)
    generator = Layout.from_axes(8, {"dp": 2, "tp": 2}, {"engine": ("dp", "tp"), "pair": [[0, 4]]}, first_rank=4)
    assert trainer.groups("fsdp") == ((0, 1, 2, 3), (4,), (5,), (6,), (7,))
    assert generator.groups("tp") == ((0,), (1,), (2,), (3,), (4, 5), (6, 7))
    assert generator.groups("engine") == ((0,), (1,), (2,), (3,), (4, 5, 6, 7))
    assert generator.groups("pair")[0] == (0, 4)
    assert generator.groups("world") == trainer.groups("world") == (tuple(range(8)),)
    assert generator.coordinate(6) == {"dp": 1, "tp": 0}
    assert generator.rank_of(dp=1, tp=1) == 7
    assert generator.first_rank == 4
    assert repr(trainer) == "Layout.from_axes(8, fsdp=4, first_rank=0)"
    assert repr(generator) == "Layout.from_axes(8, dp=2, tp=2, first_rank=4, groups=(engine, pair))"
    assert Layout.from_axes(8, {"tp": 1}, first_rank=3) != Layout.from_axes(8, {"tp": 1}, first_rank=4)


def test_a_part_among_a_trillion_ranks_costs_what_one_of_eight_does() -> None:
    layout = Layout.from_axes(10**12, {"pp": 10**6, "tp": 8}, {"ends": Positions("pp", (0, -1))}, first_rank=10**11)
    assert layout.ranks("tp", 10**11 + 9) == tuple(range(10**11 + 8, 10**11 + 16))
    assert layout.ranks("tp", 7) == (7,)
    assert layout.ranks("ends", 10**11 + 3) == (10**11 + 3, 10**11 + 3 + 8 * (10**6 - 1))
    assert len(describe(layout)) + len(describe(layout, 3)) + len(describe(layout, 10**11)) < 20_000


def test_a_part_is_drawn_with_what_is_outside() -> None:
    layout = Layout.from_axes(8, {"pp": 2, "tp": 2}, first_rank=3)
    assert draw(layout).splitlines() == [
        "ranks 3..6 of 8 = pp 2 x tp 2: tp across, pp down; 4 outside",
        "",
        "       tp 0   tp 1",
        "     ┌──────┬──────┐",
        "pp 0 │  3   │  4   │",
        "pp 1 │  5   │  6   │",
        "     └──────┴──────┘",
    ]
    assert draw(Layout.from_axes(8, {"tp": 3}, first_rank=1)).startswith("ranks 1..3 of 8 along tp; 5 outside\n")
    assert draw(Layout.from_axes(8, {"tp": 1}, first_rank=1)).startswith("rank 1 of 8; 7 outside\n")
    assert "tp      ≤ 2       6  (3 4) (5 6), 4 alone" in table(layout)
    text = describe(layout, 7)
    assert "rank 7 is outside the grid" in text
    assert "tp     alone" in text
    with pytest.raises(LayoutError, match="rank 7 has no position"):
        draw(layout, mark=7)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Layout.from_axes(8, {"tp": 4}), ["tp = 4 is not world_size=8", "first_rank"]),
        (
            lambda: Layout.from_axes(8, {"pp": 2, "tp": 2}, first_rank=6),
            ["pp*tp = 2*2 = 4 ranks from first_rank=6 on end at rank 9"],
        ),
        (lambda: Layout.from_axes(8, {"tp": 9}, first_rank=0), ["tp = 9 ranks from first_rank=0", "rank 8", "world_size=8"]),
        (lambda: Layout.from_axes(8, {"tp": 4}, first_rank=-1), ["first_rank=-1 is less than 0"]),
        (lambda: Layout.from_axes(8, {"tp": 4}, first_rank=1.5), ["first_rank=1.5 is not a whole number"]),  # type: ignore[arg-type]
        (
            lambda: Layout.from_axes(8, {"tp": 0, "pp": 2}, {"x": "dp", "y": [[1, 1]], "z": Grid({"a": 3}, "a")}, first_rank="a"),  # type: ignore[arg-type]
            ["first_rank='a'", "tp=0 is less than 1", "no axis is called 'dp'", "more than once: rank 1"],
        ),
        (lambda: Layout.from_axes(8, {}, first_rank=1), ["no axes"]),
        (lambda: Layout.from_axes(8, {"world": 4}, first_rank=4), ["'world' is the group of all ranks", "another name"]),
        (
            lambda: Layout.from_axes(8, {"tp": 4}, {"x": Grid({"a": 8}, "a")}, first_rank=4),
            ["the grid's a = 8 is not 4, the number of ranks from first_rank=4"],
        ),
        (lambda: Layout.from_axes(8, {"tp": 4}, {"x": Split("tp", 3)}, first_rank=4), ["size = 3 does not divide tp = 4"]),
        (lambda: Layout.from_axes(8, {"tp": 4}, first_rank=4).coordinate(8), ["rank 8 is out of range"]),
        (lambda: Layout.from_axes(8, {"tp": 4}, first_rank=4).rank_of(tp=4), ["tp=4 is out of range", "0..3"]),
        (lambda: Layout.from_axes(8, {"tp": 4}, first_rank=4).coordinate(3), ["tp = 4 covers the ranks 4..7 of 0..7"]),
        (lambda: describe(Layout.from_axes(8, {"tp": 4}, first_rank=4), 8), ["rank 8 is out of range"]),
        (lambda: Layout(8, groups={"x": Grid({"a": 8}, [[0, 1]])}), ["is no axis"]),  # type: ignore[list-item]
        (lambda: Layout.from_groups(4, {"x": [[0, 1], [1, 4]], "y": [[2], []]}), ["rank 1", "0..3: 4", "'y'", "no ranks in group 1"]),
    ],
)
def test_what_no_part_can_be_is_said_with_its_numbers(make: Callable[[], object], said: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Contexts of such layouts


def test_the_programs_of_the_page_run() -> None:
    page = Path(cg.__file__).parent.parent / "docs/how-to/parts-of-a-world.md"
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, names)
    assert {"step", "layout", "divide"} <= names.keys()


@settings(max_examples=10)
@given(layouts(world_size=4, parts=True))
def test_the_groups_of_a_context_are_those_of_its_layout(layout: Layout) -> None:
    def run(world: cg.World) -> dict[str, Any]:
        ctx = world.context(layout, name="part")
        return {name: (ctx[name].ranks, int(ctx[name].all_reduce(torch.tensor(10**world.rank)))) for name in layout.names}

    for rank, found in enumerate(spmd(run, 4)):
        assert found == {name: (layout.ranks(name, rank), sum(10**other for other in layout.ranks(name, rank))) for name in layout.names}


def test_two_parts_of_one_world_work_side_by_side() -> None:
    def run(world: cg.World) -> Any:
        trainer = world.context(Layout.from_axes(4, {"fsdp": 2}, first_rank=0), name="trainer")
        generator = world.context(Layout.from_axes(4, {"tp": 2}, {"weights": [[0, 2], [1, 3]]}, first_rank=2), name="generator")
        x = torch.tensor([float(world.rank)])
        if world.rank in trainer.layout.grid_ranks:
            x = trainer["fsdp"].all_reduce(x)
        x = generator["weights"].broadcast(x)
        return float(generator.tp.all_reduce(x)), generator.tp.world_size

    assert spmd(run, 4) == [(1.0, 1), (1.0, 1), (2.0, 2), (2.0, 2)]
