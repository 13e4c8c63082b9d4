"""dispatch and combine: against one broadcast per rank and a sum over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from tests.helpers import on

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def tokens(rank: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(rows * width).reshape(rows, width) % 7 + rank).to(dtype)


def routed(rank: int, rows: int, k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank * 31 + rows)
    ids = (
        torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(rows)])
        if rows
        else torch.empty(0, k, dtype=torch.int64)
    )
    return torch.rand(rows, k, generator=generator), ids


def worked(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """What these experts add: expert e multiplies by e + 1, and its weight."""
    y = torch.zeros_like(x)
    for expert in experts:
        share = (weights * (ids == expert)).sum(-1, keepdim=True).to(x.dtype)
        y += share * x * (expert + 1)
    return y


@QUICK
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.integers(0, 5), min_size=n, max_size=n)),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from(["sizes", "counted", "gloo", "hosts"]),
    st.integers(0, 2),
)
def test_gathered_against_broadcasts(rows: list[int], width: int, dtype: torch.dtype, how: str, extras: int) -> None:
    n = len(rows)

    def body(group: GroupCoordinator) -> None:
        me = group.rank_in_group
        x, logits = tokens(me, rows[me], width, dtype), torch.full((rows[me], 3), float(me))
        extra = [torch.full((rows[me], i + 1), me, dtype=torch.int32) for i in range(extras)]
        d = group.dispatch(x, logits, sizes=None if how == "counted" else rows, extra_tensors=extra)
        everyone = [tokens(rank, rows[rank], width, dtype) for rank in range(n)]
        for rank in range(n):
            everyone[rank] = group.broadcast(everyone[rank] if rank == me else torch.empty_like(everyone[rank]), rank)
        states, routing, *carried = d
        assert torch.equal(states, torch.cat(everyone))
        assert routing.shape == (sum(rows), 3)
        assert [tuple(y.shape) for y in carried] == [(sum(rows), i + 1) for i in range(extras)]
        assert d.sizes is not None
        assert list(d.sizes) == rows
        begin = sum(rows[:me])
        if n == 1:
            assert states is x
        mine = group.combine(states * (me + 1), d)
        whole = group.all_reduce(states * (me + 1))
        assert torch.equal(mine, whole[begin : begin + rows[me]])

    on(n, body, nodes=min(n, 2) if how == "hosts" else 1, shm=how != "gloo")


@QUICK
@given(
    st.sampled_from([2, 3, 4]).flatmap(lambda n: st.lists(st.integers(0, 6), min_size=n, max_size=n)),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_routed_gives_what_gathered_gives(rows: list[int], k: int, dtype: torch.dtype) -> None:
    n = len(rows)
    experts = 2 * n

    def body(group: GroupCoordinator) -> tuple[torch.Tensor, int]:
        me = group.rank_in_group
        x, (weights, ids) = tokens(me, rows[me], 4, dtype), routed(me, rows[me], k, experts)
        if rows[me]:
            ids[0, 0] = -1  # no expert
        d = group.dispatch(x, weights, ids, extra_tensors=[ids * 2])
        states, weights_, ids_, extra = d
        assert torch.equal(extra, ids_ * 2)
        assert d.sizes is not None
        assert sum(d.sizes) == states.shape[0]
        local = range(me * 2, me * 2 + 2)
        if d.route is not None:
            assert all(bool(((row >= local[0]) & (row <= local[-1])).any()) for row in ids_), "a row that no expert here needs"
        y = group.combine(worked(states, weights_, ids_, local), d)
        wanted = worked(x, weights, ids, range(experts))
        torch.testing.assert_close(
            y, wanted, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-1 if dtype is torch.bfloat16 else 1e-5
        )
        return y, states.shape[0]

    gathered, spared = on(n, body), on(n, body, experts=experts)
    assert sum(count for _, count in spared) <= sum(count for _, count in gathered)


@pytest.mark.parametrize("experts", [None, 4])
def test_gradients_reach_the_ranks_that_the_rows_came_from(experts: int | None) -> None:
    rows = [3, 0]
    wanted = []
    for rank in range(2):
        x, (weights, ids) = tokens(rank, rows[rank], 4, torch.float32).requires_grad_(), routed(rank, rows[rank], 2, 4)
        (worked(x, weights.requires_grad_(), ids, range(4)) * (rank + 2)).sum().backward()
        wanted.append((x.grad, weights.grad))

    def body(group: GroupCoordinator) -> None:
        me = group.rank_in_group
        x, (weights, ids) = tokens(me, rows[me], 4, torch.float32).requires_grad_(), routed(me, rows[me], 2, 4)
        d = group.dispatch(x, weights.requires_grad_(), ids)
        (group.combine(worked(*d, range(2 * me, 2 * me + 2)), d) * (me + 2)).sum().backward()  # type: ignore[call-arg]  # three tensors
        torch.testing.assert_close(x.grad, wanted[me][0])
        torch.testing.assert_close(weights.grad, wanted[me][1])

    on(2, body, experts=experts)


def test_compiled_with_sizes_and_with_equal_rows() -> None:
    def body(group: GroupCoordinator) -> None:
        me = group.rank_in_group

        def step(x: torch.Tensor, logits: torch.Tensor, sizes: Any) -> torch.Tensor:
            d = group.dispatch(x, logits, sizes=sizes)
            states, routing = d
            return group.combine(states * routing.sum(-1, keepdim=True), d)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for rows, sizes in (([2, 3], [2, 3]), ([4, 4], "equal"), ([0, 3], [0, 3])):
            x, logits = tokens(me, rows[me], 3, torch.float32), torch.ones(rows[me], 2)
            assert torch.equal(compiled(x, logits, sizes), step(x, logits, sizes))
        with pytest.raises(Exception, match="sizes=None counts the rows"):
            torch.compile(step, fullgraph=True, backend="eager")(torch.ones(1, 3), torch.ones(1, 2), None)

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    on(2, body)


def test_it_works_on_the_host_where_others_raise_not_implemented() -> None:
    """vLLM's expert parallel on CPU has no v-operations (#57837)."""

    def body(world: cg.World) -> None:
        with world.context(cg.Layout(4, dp=2, tp=2), name="moe") as ctx:
            for group, rows in ((ctx.dp, [1, 4]), (ctx.ep, [3, 0, 2, 1])):
                me = group.rank_in_group
                d = group.dispatch(torch.full((rows[me], 2), float(me)), torch.zeros(rows[me], 4), sizes=rows)
                assert d[0][:, 0].tolist() == [float(rank) for rank, count in enumerate(rows) for _ in range(count)]
                assert torch.equal(group.combine(d[0], d), torch.full((rows[me], 2), float(me) * len(rows)))

    spmd(body, 4)


def test_bad_input_is_told_before_anything_is_sent() -> None:
    def body(group: GroupCoordinator) -> None:
        x, logits = torch.ones(2, 3), torch.ones(2, 4)
        ids = torch.zeros(2, 1, dtype=torch.int64)
        wrong: list[tuple[type[Exception], str, Any]] = [
            (TypeError, "router_logits.*topk_weights", lambda: group.dispatch(x)),
            (TypeError, "router_logits.*topk_weights", lambda: group.dispatch(x, 3)),  # type: ignore[arg-type]
            (TypeError, "router_logits.*topk_weights", lambda: group.dispatch(x, logits, ids, ids)),
            (ValueError, "same number of rows", lambda: group.dispatch(x, logits[:1])),
            (ValueError, r"extra_tensors\[0\]", lambda: group.dispatch(x, logits, extra_tensors=[ids[:1]])),
            (cg.UnsupportedTensorError, "topk_ids are torch.float32", lambda: group.dispatch(x, torch.ones(2, 1), torch.ones(2, 1))),
            (ValueError, "not the same shape", lambda: group.dispatch(x, torch.ones(2, 3), ids)),
            (ValueError, "says 5 here", lambda: group.dispatch(x, logits, sizes=[5, 5])),
            (ValueError, "'even'", lambda: group.dispatch(x, logits, sizes="even")),
            (ValueError, "options.experts says there are 4", lambda: group.dispatch(x, torch.ones(2, 1), ids + 4)),
        ]
        for kind, text, call in wrong:
            with pytest.raises(kind, match=text) as told:
                call()
            assert f"dispatch on group 'tp' (rank {group.rank}" in str(told.value)
        d = group.dispatch(x, logits)
        with pytest.raises(ValueError, match="has not the 4 rows"):
            group.combine(x, d)
        with pytest.raises(TypeError, match="what `dispatch` returned is needed"):
            group.combine(x, (x, logits))  # type: ignore[arg-type]
        assert torch.equal(group.combine(d[0], d), x * 2)

    on(2, body, experts=4)
    with pytest.raises(cg.ConfigurationError, match="experts=0"):
        cg.CommunicatorOptions(experts=0)
