"""Dictionaries of tensors and objects: nesting, odd tensors, and slices through an all-gather group."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import commgraph as cg
from commgraph import ambient
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.tensor_dict import Plan, join_dict, result_tensors, split_dict
from commgraph.testing import spmd
from commgraph.testing._program import fill
from commgraph.testing.strategies import _trees, tensors  # the trees that `programs` draws
from tests.helpers import bits, on, same

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.int64,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def tree_of(seed: int) -> dict[Any, Any]:
    """Of everything, and in an order that is not sorted."""
    random = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(2, 3, generator=random),
        "a": {
            "deep": {"er": torch.randn(3, 2, 2, generator=random).permute(2, 0, 1), 7: torch.tensor(seed), ("t", 1): {}},
            "none": None,
        },
        "": {},
        "0-d": torch.tensor(2.5 + seed),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(3, 0, dtype=torch.int8),
        "expanded": torch.randn(1, 3, generator=random).expand(4, 3),
        "sliced": torch.arange(10)[1::3],
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "values": [1, "x", (seed, b"y"), {"in a list": 1}],
        "dtype": torch.bfloat16,
        "dtypes": {str(dtype): torch.randint(2, (3,), generator=random).to(dtype) for dtype in DTYPES},
    }


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_broadcast_from_any_rank(n: int, nodes: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for src in range(n):
            mine = tree_of(group.rank) if group.rank == src else None
            got = group.broadcast_tensor_dict(mine, src)
            assert same(got, tree_of(src))
            if group.rank == src:
                assert got is mine
            else:
                assert all(x.is_contiguous() for x in (got["expanded"], got["a"]["deep"]["er"], got["sliced"]))
                got["expanded"].zero_()

    on(n, body, nodes=nodes)


@pytest.mark.parametrize("nodes", [1, 2])
def test_send_to_any_rank(nodes: int) -> None:
    def body(group: GroupCoordinator) -> None:
        for src, dst in ((0, 1), (2, 0), (1, 2), (1, 0)):
            if group.rank == src:
                kept = tree_of(src)
                group.send_tensor_dict(kept, dst)
                assert same(kept, tree_of(src))
            elif group.rank == dst:
                assert same(group.recv_tensor_dict(src), tree_of(src))

    on(3, body, nodes=nodes)


def test_the_next_and_the_previous_rank_by_default() -> None:
    def body(group: GroupCoordinator) -> None:
        for round_ in range(3):
            if group.is_first_rank:
                group.send_tensor_dict({"n": round_, "t": torch.ones(2)})
                got = group.recv_tensor_dict()
            else:
                got = group.recv_tensor_dict()
                group.send_tensor_dict({"n": got["n"], "t": got["t"] + 1})
            assert got["n"] == round_
            assert got["t"].tolist() == [1 + (group.rank - 1) % 3] * 2

    on(3, body)


@pytest.mark.parametrize("queue_bytes", [16 << 10, 1 << 20])
def test_large_tensors_beside_small_ones(queue_bytes: int) -> None:
    """More than a ring holds, in tensors that go through it and in such that do not."""
    tree: dict[str, Any] = {
        "large": torch.arange(300_000.0),
        "turned": torch.arange(400_000.0).view(1000, 400).t(),
        "small": [torch.arange(9.0)] * 20,
        "many": {str(i): torch.arange(float(i * 1000)) for i in range(30)},
        "last": torch.arange(600_000, dtype=torch.int16),
    }

    def run(world: cg.World) -> None:
        options = cg.CommunicatorOptions(queue_bytes=queue_bytes)
        with world.context(cg.Layout(3, pp=3), name="a", options=options) as ctx:
            for _ in range(3):
                sent = ctx.pp.isend_tensor_dict(tree)
                got = ctx.pp.recv_tensor_dict()
                sent.wait()
                assert same({**got, "small": None}, {**tree, "small": None})
                assert all(torch.equal(x, tree["small"][0]) for x in got["small"])

    spmd(run, 3, timeout=60)


@pytest.mark.parametrize("nodes", [1, 2])
def test_large_tensors_arrive_in_memory_that_was_used(nodes: int) -> None:
    """Fresh pages cost time. What is still referenced is not touched."""
    size = 300_000

    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            for i in (1.0, 2.0, 3.0):
                group.broadcast_tensor_dict({"a": torch.full((size,), i)}, src=0)
            for i in (1.0, 2.0, 3.0):
                group.send_tensor_dict({"a": torch.full((size,), i)}, 1)
            return
        receives: list[Callable[[], dict[Any, Any]]] = [lambda: group.broadcast_tensor_dict(None, src=0), lambda: group.recv_tensor_dict(0)]
        for receive in receives:
            kept, dropped = receive(), receive()
            where = dropped["a"].data_ptr()
            del dropped
            again = receive()
            assert again["a"].data_ptr() == where != kept["a"].data_ptr()
            assert (again["a"] == 3).all()
            assert (kept["a"] == 1).all()

    on(2, body, nodes=nodes)


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_dict_has_its_own_description(nodes: int) -> None:
    """Also after dicts that are equal to it, and are not the same."""
    two, three = torch.arange(2.0), torch.arange(3.0)
    trees: list[dict[Any, Any]] = [
        {"a": two},
        {"a": two},
        {"a": three},
        {"b": three},
        {"a": {"b": three}},
        {"a": two, "b": three},
        {"a": two},
    ]
    trees += [{key: two} for key in (1, True, 1.0, "1")] + [{"a": value, "b": two} for value in (1, True, 1.0, [1], [True], [1])]
    trees += [{}, {"a": {}}, {"a": two.to(torch.int64)}, {"a": two[:0]}, {"a": two[:0]}, {"a": two}]

    def body(group: GroupCoordinator) -> None:
        for _ in range(2):
            for tree in trees:
                if group.rank == 0:
                    group.send_tensor_dict(tree, 1)
                    group.broadcast_tensor_dict(tree, src=0)
                    continue
                for received in (group.recv_tensor_dict(0), group.broadcast_tensor_dict(None, src=0)):
                    assert same(received, tree)
                    assert [type(key) for key in received] == [type(key) for key in tree]
                    received["new"] = 0  # the caller's own

    on(2, body, nodes=nodes)


def test_a_dict_over_links_that_is_refused_leaves_the_next_one_alone() -> None:
    def body(group: GroupCoordinator) -> None:
        good = {"a": torch.arange(4.0)}
        if group.rank == 0:
            group.send_tensor_dict(good, 1)
            for bad in (
                {"a": torch.arange(4.0), "b": object()},
                {"a": torch.ones(2, requires_grad=True)},
                {"a": torch.ones(2, 2).to_sparse()},
                {"a": torch.ones(2, device="meta")},
                [torch.ones(2)],
            ):
                with pytest.raises((TypeError, ValueError, RuntimeError), match="send_tensor_dict"):
                    group.send_tensor_dict(bad, 1)  # type: ignore[arg-type]  # a list is among them
            group.send_tensor_dict(good, 1)
            return
        for _ in range(2):
            assert same(group.recv_tensor_dict(0), good)

    on(2, body, nodes=2)


def test_no_tensors_and_nothing_at_all() -> None:
    def body(group: GroupCoordinator) -> None:
        trees: list[dict[str, Any]] = [{}, {"a": {}}, {"a": {"b": {}}}, {"x": 1}, {"e": torch.empty(0)}]
        for tree in trees:
            if group.is_first_rank:
                group.send_tensor_dict(tree)
            else:
                assert same(group.recv_tensor_dict(), tree)
            assert same(group.broadcast_tensor_dict(dict(tree) if group.rank else None, 1), tree)

    on(2, body)


def test_other_mappings_and_what_is_in_them() -> None:
    """Any mapping is a dict of tensors; inside, dicts alone are entered, and other containers travel whole."""

    def body(group: GroupCoordinator) -> None:
        inner = OrderedDict(t=torch.ones(2), n=1)
        given = MappingProxyType({"ordered": inner, "list": [torch.zeros(1)]})
        got: Any = group.broadcast_tensor_dict(given if group.is_first_rank else None)
        assert type(got["ordered"]) is OrderedDict
        assert got["ordered"]["t"].tolist() == [1, 1]
        assert got["list"][0].tolist() == [0]

    on(2, body)


# Through an all-gather group


def through(layout: cg.Layout, tree: Callable[[int], Mapping[Any, Any]], *, gather: str = "tp", shm: bool = True, **how: Any) -> list[Any]:
    """Each stage sends its tree to the next; what each rank got, and the bytes that each sent over pp."""

    def run(world: cg.World) -> Any:
        with world.context(layout, name="a", options=cg.CommunicatorOptions(shm=shm)) as context:
            pp, group = context.pp, context[gather]
            before = pp.bytes_sent
            got = None
            if not pp.is_first_rank:
                got = pp.recv_tensor_dict(None, group, **how)
            if not pp.is_last_rank:
                pp.send_tensor_dict(tree(pp.rank_in_group), None, group, **how)
            return got, pp.bytes_sent - before

    return spmd(run, layout.world_size, timeout=30)


LAYOUTS = [
    cg.Layout(4, pp=2, tp=2),
    cg.Layout(6, pp=2, tp=3),
    cg.Layout(6, pp=3, tp=2),
    cg.Layout(8, pp=2, tp=2, dp=2),
    cg.Layout(3, pp=3),
    cg.Layout(4, pp=2, tp=2, pcp=1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("override", [None, {}, {"z": False, "a.deep.er": False}, {"z": True}])
@pytest.mark.parametrize("shm", [True, False])
def test_slices_are_gathered(layout: cg.Layout, override: dict[str, bool] | None, shm: bool) -> None:
    for rank, (got, _) in enumerate(through(layout, tree_of, all_gather_tensors=override, shm=shm)):
        stage = layout.ranks("pp", rank).index(rank)
        assert (got is None) == (stage == 0)
        assert got is None or same(got, tree_of(stage - 1))


@pytest.mark.parametrize("shm", [True, False])
def test_each_rank_sends_its_slice_and_no_more(shm: bool) -> None:
    layout = cg.Layout(8, pp=2, tp=4)
    tree = {"even": torch.arange(4000.0), "odd": torch.arange(4001.0), "kept": torch.arange(400.0), "n": {"even": torch.ones(8)}}
    described = set()
    for override, entries in (
        (None, 1000 + 4001 + 100 + 2),
        ({"kept": False}, 1000 + 4001 + 400 + 2),
        ({"n.even": False}, 1000 + 4001 + 100 + 8),
        ({"even": True, "odd": False}, 1000 + 4001 + 100 + 2),
    ):
        results = through(layout, lambda _: tree, all_gather_tensors=override, shm=shm)
        described |= {sent - 4 * entries for _, sent in results[:4]}
        assert all(same(got, tree) for got, _ in results[4:])
    # Over gloo the description is one message of a fixed size, in shared memory it is as long as it is.
    (size,) = described
    assert 0 < size < 1024 if shm else size == 4096


def test_what_differs_between_the_ranks_must_not_be_sliced() -> None:
    """Sequence parallelism: each rank's own residual reaches its counterpart whole if the override says so."""
    layout = cg.Layout(4, pp=2, tp=2)

    def run(world: cg.World) -> Any:
        with world.context(layout, name="a") as context:
            how: dict[str, Any] = {"all_gather_group": context.tp, "all_gather_tensors": {"residual": False}}
            if context.pp.is_first_rank:
                context.pp.send_tensor_dict({"hidden": torch.arange(4.0), "residual": torch.full((4,), float(world.rank))}, **how)
                return None
            return context.pp.recv_tensor_dict(**how)

    for rank, got in enumerate(spmd(run, 4)[2:]):
        assert got["hidden"].tolist() == [0, 1, 2, 3]
        assert got["residual"].tolist() == [rank] * 4


def test_an_all_gather_group_of_one_rank_changes_nothing() -> None:
    for got, sent in through(cg.Layout(2, pp=2), lambda _: {"x": torch.ones(5)}, all_gather_tensors={"x": True}, shm=False):
        assert sent in (0, 4096 + 20)
        assert got is None or got["x"].tolist() == [1] * 5


@pytest.mark.parametrize("override", [{"odd": True}, {"even": True, "none": False}, {"n": True}])
def test_overrides_that_cannot_be_are_refused_before_anything_is_sent(override: dict[str, bool]) -> None:
    tree = {"even": torch.ones(4), "odd": torch.ones(3), "n": 1}

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, pp=2, tp=2), name="a") as context:
            pp, how = context.pp, {"all_gather_group": context.tp}
            if pp.is_first_rank:
                with pytest.raises(ValueError, match=r"send_tensor_dict on group 'pp' \(rank .*all_gather_tensors"):
                    pp.send_tensor_dict(tree, **how, all_gather_tensors=override)
                pp.send_tensor_dict(tree, **how)
            else:
                assert same(pp.recv_tensor_dict(**how), tree)

    spmd(run, 4)


@pytest.mark.parametrize("shm", [True, False])
def test_an_override_on_one_side_only_ends_in_time(shm: bool) -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, pp=2, tp=2), name="a", options=cg.CommunicatorOptions(shm=shm)) as context:
            pp = context.pp
            kinds = (cg.CollectiveTimeoutError, cg.CollectiveMismatchError)
            if pp.is_first_rank:
                # In shared memory a message is taken by the ring: its sender is done.
                with contextlib.nullcontext() if shm else pytest.raises(kinds):
                    pp.send_tensor_dict({"x": torch.ones(4)}, None, context.tp, {"x": False}, timeout=0.4)
            else:
                with pytest.raises(kinds):
                    pp.recv_tensor_dict(None, context.tp, timeout=0.4)

    spmd(run, 4, timeout=20)


# The description alone


@given(_trees(), st.integers(0, 100))
def test_taken_apart_and_joined_again(tree: dict[Any, Any], seed: int) -> None:
    filled = fill(tree, seed)
    entries, parts = split_dict(filled)
    assert same(join_dict(entries, parts), filled)
    shells = result_tensors(entries, torch.device("cpu"), {}, ambient.empty)
    assert [(x.dtype, x.shape) for x in shells] == [(x.dtype, x.shape) for x in parts]


@given(st.lists(tensors(max_dims=3), max_size=4), st.integers(1, 5))
def test_slices_make_up_the_whole(given_: list[torch.Tensor], n: int) -> None:
    tree = {str(i): x for i, x in enumerate(given_)}
    entries, parts = split_dict(tree)
    for x, cut in zip(parts, Plan(n, 0).sliced(entries), strict=True):
        assert cut == (n > 1 and x.numel() > 0 and x.numel() % n == 0)
        if cut:
            assert bits(torch.cat([Plan(n, i).slice(x) for i in range(n)])) == bits(x.flatten())


def test_a_dict_that_occurs_twice_is_no_circle() -> None:
    shared = {"t": torch.ones(1)}
    entries, parts = split_dict({"a": shared, "b": {"c": shared}})
    assert len(parts) == 2
    assert same(join_dict(entries, parts), {"a": shared, "b": {"c": shared}})
    shared["again"] = shared  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"contains itself at a\.again"):
        split_dict({"a": shared})
