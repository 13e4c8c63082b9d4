"""The group tables of vLLM, Megatron-Core and SGLang, each written down independently and compared with the layout that expresses it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from commgraph.layout import Grid, Layout, Positions, Split
from tests.helpers import Groups, as_groups

# vLLM: ExternalDP x DP x PP x PCP x TP


@pytest.mark.parametrize("replica", [1, 2])
@pytest.mark.parametrize(
    ("dp", "pp", "pcp", "tp", "dcp"),
    [(1, 1, 1, 8, 4), (2, 2, 1, 4, 2), (2, 3, 2, 4, 2), (4, 1, 2, 2, 4), (3, 2, 1, 1, 1), (1, 2, 3, 2, 3), (2, 1, 2, 3, 1)],
)
def test_vllm(replica: int, dp: int, pp: int, pcp: int, tp: int, dcp: int) -> None:
    world = replica * dp * pp * pcp * tp
    layout = Layout(world, dp=dp, pp=pp, pcp=pcp, tp=tp, dcp=dcp, groups={"engine": ("pp", "pcp", "tp")})
    ranks = np.arange(world).reshape(-1, dp, pp, pcp, tp)
    assert layout.groups("tp") == as_groups(ranks.reshape(-1, tp))
    assert layout.groups("pcp") == as_groups(ranks.swapaxes(3, 4).reshape(-1, pcp))
    assert layout.groups("pp") == as_groups(ranks.swapaxes(2, 4).reshape(-1, pp))
    assert layout.groups("dp") == as_groups(ranks.swapaxes(1, 4).reshape(-1, dp))
    assert layout.groups("replica") == as_groups(ranks.swapaxes(0, 4).reshape(-1, replica))
    assert layout.groups("ep") == as_groups(ranks.swapaxes(1, 2).reshape(-1, dp * pcp * tp))
    assert layout.groups("dcp") == as_groups(ranks.swapaxes(3, 4).reshape(-1, dcp))
    assert layout.groups("engine") == as_groups(ranks.reshape(-1, pp * pcp * tp))


def test_vllm_rank_lists() -> None:
    """The inner data-parallel world of one node, as `init_model_parallel_group` takes it: lists, in any order, uneven."""
    layout = Layout.from_groups(6, {"inner_dp": [[4, 5], [0, 1, 2, 3]], "back": [[5, 3, 1], [4, 2, 0]]})
    assert layout.groups("inner_dp") == ((0, 1, 2, 3), (4, 5))
    assert layout.groups("back") == ((4, 2, 0), (5, 3, 1))
    assert layout.ranks("back", 3) == (5, 3, 1)


# Megatron-Core: an order string names the fastest axis first; experts have a grid of their own over the same ranks


def megatron_groups(order: str, sizes: dict[str, int], token: str) -> Groups:
    """Ranks that agree in every axis outside `token`; found by comparing every rank's digits, the first axis of `order` fastest."""
    names, members = order.split("-"), token.split("-")
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes[name] for name in names)):
        rest, key = rank, []
        for name in names:
            rest, digit = divmod(rest, sizes[name])
            key += [] if name in members else [digit]
        found.setdefault(tuple(key), []).append(rank)
    return as_groups(found.values())


def axes_of(order: str, sizes: dict[str, int]) -> dict[str, int]:
    return {name: sizes[name] for name in reversed(order.split("-"))}


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-pp-ep-dp", "tp-pp-dp-cp-ep", "pp-dp-tp-cp-ep"])
@pytest.mark.parametrize(
    ("tp", "cp", "dp", "pp", "etp", "ep"),
    [(2, 1, 4, 2, 1, 4), (2, 2, 2, 2, 2, 2), (4, 1, 2, 3, 1, 8), (1, 2, 6, 1, 2, 3), (2, 3, 2, 2, 1, 1)],
)
def test_megatron(order: str, tp: int, cp: int, dp: int, pp: int, etp: int, ep: int) -> None:
    world = tp * cp * dp * pp
    edp = world // (etp * ep * pp)
    dense = {"tp": tp, "cp": cp, "ep": 1, "dp": dp, "pp": pp}
    expert = {"tp": etp, "cp": 1, "ep": ep, "dp": edp, "pp": pp}
    dense_axes = {name: size for name, size in axes_of(order, dense).items() if name != "ep"}
    grid = axes_of(order, expert)
    tokens = ["tp-cp", "cp-dp", "tp-dp", "tp-pp", "tp-cp-dp"]
    expert_tokens = {"etp": "tp", "ep": "ep", "edp": "dp", "etp_ep": "tp-ep", "etp_ep_pp": "tp-ep-pp"}

    def outer_first(token: str, axes: dict[str, int]) -> tuple[str, ...]:
        return tuple(name for name in axes if name in token.split("-"))

    layout = Layout.from_axes(
        world,
        dense_axes,
        {token: outer_first(token, dense_axes) for token in tokens}
        | {name: Grid(grid, outer_first(token, grid)) for name, token in expert_tokens.items()}
        | {"embd": Positions("pp", (0, -1)), "pos_embd": Positions("pp", (0,))},
    )
    for token in ["tp", "cp", "dp", "pp", *tokens]:
        assert layout.groups(token) == megatron_groups(order, dense, token)
    for name, token in expert_tokens.items():
        assert layout.groups(name) == megatron_groups(order, expert, token)
    stages = megatron_groups(order, dense, "pp")
    ends = [dict.fromkeys((stage[0], stage[-1])) for stage in stages]
    middle = [(rank,) for stage in stages for rank in stage[1:-1]]
    assert layout.groups("embd") == as_groups([*ends, *middle])
    assert layout.size("pos_embd") == 1


def test_megatron_published_example() -> None:
    """The sixteen-GPU example that Megatron-Core's documentation spells out: tensor 2, pipeline 4."""
    layout = Layout.from_axes(16, {"pp": 4, "dp": 2, "tp": 2}, {"mp": ("pp", "tp"), "embd": Positions("pp", (0, -1))})
    assert layout.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15))
    assert layout.groups("tp") == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert layout.groups("pp") == ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    assert layout.groups("mp") == ((0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15))
    assert [layout.ranks("embd", rank) for rank in (0, 4, 8, 12)] == [(0, 12), (4,), (8,), (0, 12)]


def test_megatron_inside_and_across_optimizer_instances() -> None:
    """Several distributed-optimizer instances: the expert data-parallel group cut into runs, and what joins equal places of the runs."""
    grid = {"pp": 2, "edp": 4, "ep": 2}
    layout = Layout.from_axes(
        16,
        {"pp": 2, "dp": 8},
        {"intra": Grid(grid, Split("edp", 2)), "inter": Grid(grid, Split("edp", 2, stride=2)), "edp": Grid(grid, "edp")},
    )
    assert layout.ranks("edp", 0) == (0, 2, 4, 6)
    assert [layout.ranks("intra", rank) for rank in (0, 4)] == [(0, 2), (4, 6)]
    assert [layout.ranks("inter", rank) for rank in (0, 2)] == [(0, 4), (2, 6)]


# SGLang: inside the tensor-parallel ranks of a stage, attention has dp x tp and the experts have ep x tp


@pytest.mark.parametrize(("pp", "tp", "attn_dp", "ep"), [(1, 8, 4, 8), (2, 8, 2, 4), (2, 4, 1, 2), (1, 16, 16, 4), (3, 4, 4, 1)])
def test_sglang(pp: int, tp: int, attn_dp: int, ep: int) -> None:
    attn_tp, moe_tp = tp // attn_dp, tp // ep
    inside = ("attn_dp", "attn_tp")
    layout = Layout.from_axes(
        pp * tp,
        {"pp": pp, "attn_dp": attn_dp, "attn_tp": attn_tp},
        {"tp": inside, "moe_tp": Split(inside, moe_tp), "moe_ep": Split(inside, ep, stride=moe_tp)},
    )
    starts = range(0, pp * tp, tp)
    assert layout.groups("tp") == tuple(tuple(range(start, start + tp)) for start in starts)
    assert layout.groups("attn_tp") == tuple(
        tuple(range(start + d * attn_tp, start + (d + 1) * attn_tp)) for start in starts for d in range(attn_dp)
    )
    assert layout.groups("moe_tp") == tuple(
        tuple(range(start + e * moe_tp, start + (e + 1) * moe_tp)) for start in starts for e in range(ep)
    )
    assert layout.groups("moe_ep") == tuple(tuple(range(start + t, start + tp, moe_tp)) for start in starts for t in range(moe_tp))
    for rank, (name, axis) in itertools.product(range(pp * tp), [("attn_tp", "attn_tp"), ("attn_dp", "attn_dp")]):
        inner = rank % tp
        assert layout.coordinate(rank)[axis] == (inner % attn_tp if name == "attn_tp" else inner // attn_tp)
    grid = {"pp": pp, "moe_ep": ep, "moe_tp": moe_tp}
    same = Layout.from_axes(pp * tp, grid, {"ep_here": "moe_ep", "ep_there": Grid(grid, "moe_ep")})
    assert same.pattern("ep_here") == same.pattern("ep_there") == layout.pattern("moe_ep")
