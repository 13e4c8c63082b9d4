"""The collectives of `commgraph.nn.functional`: derivatives under one replicated loss, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import commgraph as cg
from commgraph.nn.functional import copy_to, gather_from, reduce_from, reduce_scatter_to, scatter_to
from tests.helpers import normal, on

TP = pytest.mark.parametrize("tp", [1, 2, 4])


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Ranks, a shape whose dim they share equally (it may be empty), that dim."""
    tp = draw(st.sampled_from((2, 4)))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = tp * draw(st.integers(0, 3))
    return tp, shape, dim


few = settings(max_examples=12, deadline=None)


@few
@given(cases(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_every_function_forward_and_backward(case: tuple[int, list[int], int], dtype: torch.dtype) -> None:
    tp, shape, dim = case
    # Small integers: sums are exact in every dtype, so that results are compared bit by bit.
    ranks = [normal(*shape, seed=1 + r).mul(4).round().to(dtype) for r in range(tp)]
    whole, total = normal(*shape).mul(4).round().to(dtype), torch.stack(ranks).sum(0)
    size = shape[dim] // tp

    def run(group: cg.GroupCoordinator) -> None:
        def own(x: Tensor) -> Tensor:
            return x.narrow(dim, group.rank_in_group * size, size)

        def check(function: Callable[..., Tensor], x: Tensor, y: Tensor, grad_y: Tensor, grad_x: Tensor, **options: Any) -> None:
            leaf, before = x.clone().requires_grad_(), x.clone()
            result = function(leaf, group, **options)
            result.backward(grad_y)
            torch.testing.assert_close(result, y, rtol=0, atol=0)
            torch.testing.assert_close(leaf.grad, grad_x, rtol=0, atol=0)
            torch.testing.assert_close(leaf.detach(), before, rtol=0, atol=0)
            with torch.no_grad():
                torch.testing.assert_close(function(leaf, group, **options), y, rtol=0, atol=0)
            assert not function(x, group, **options).requires_grad

        mine = ranks[group.rank_in_group]
        check(copy_to, whole, whole, mine, total)
        check(reduce_from, mine, total, whole, whole)
        check(gather_from, own(whole), whole, total, own(total), dim=dim)
        check(gather_from, own(whole), whole, mine, own(total), dim=dim, reduce_grad=True)
        check(scatter_to, whole, own(whole), own(total), total, dim=dim)
        check(reduce_scatter_to, mine, own(total), own(whole), whole, dim=dim)

    on(tp, run)


def test_one_rank_gives_its_input_back() -> None:
    def run(group: cg.GroupCoordinator) -> None:
        for x in (torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)):
            for function in (copy_to, reduce_from, gather_from, scatter_to, reduce_scatter_to):
                assert function(x, group) is x
                with torch.no_grad():
                    assert function(x, group) is x
            for checked in (gather_from, scatter_to, reduce_scatter_to):
                with pytest.raises(ValueError, match="dim=2 is out of range"):
                    checked(x, group, 2)

    on(1, run)


def weights(group: cg.GroupCoordinator, size: int) -> Tensor:
    return normal(size, seed=10 + group.rank_in_group)


CHAINS: dict[str, Callable[[Tensor, cg.GroupCoordinator], Tensor]] = {
    "copy and reduce": lambda x, g: reduce_from((copy_to(x, g) * weights(g, 4)).sin(), g),
    "scatter and gather": lambda x, g: gather_from(scatter_to(x, g).sin() ** 2, g),
    "sequence parallel": lambda x, g: gather_from(
        reduce_scatter_to((gather_from(scatter_to(x, g, 0).sin(), g, 0, reduce_grad=True) * weights(g, 4)).cos(), g, 0).exp(), g, 0
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_first_and_second_derivatives_agree_with_differences(name: str) -> None:
    def run(group: cg.GroupCoordinator) -> None:
        x = normal(2, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: CHAINS[name](x, group), x)
        assert torch.autograd.gradgradcheck(lambda x: CHAINS[name](x, group), x, normal(2, 4, seed=1).requires_grad_())

    on(2, run)


@TP
def test_gradients_are_counted_once_where_the_adjoint_of_the_sum_of_losses_counts_them_tp_times(tp: int) -> None:
    class SumOfLosses(torch.autograd.Function):
        @staticmethod
        def forward(node: Any, x: Tensor, group: cg.GroupCoordinator) -> Tensor:
            node.group = group
            return group.all_reduce(x)

        @staticmethod
        def backward(node: Any, grad: Tensor) -> tuple[Tensor, None]:
            return node.group.all_reduce(grad), None

    x, full = normal(3, 8), normal(8, seed=1)
    whole = full.clone().requires_grad_()
    (x @ whole).square().sum().backward()

    def gradient(group: cg.GroupCoordinator, reduce: Callable[[Tensor, cg.GroupCoordinator], Tensor]) -> Tensor:
        weight = full.chunk(tp)[group.rank_in_group].clone().requires_grad_()
        reduce(x.chunk(tp, dim=-1)[group.rank_in_group] @ weight, group).square().sum().backward()
        assert weight.grad is not None
        return weight.grad

    def run(group: cg.GroupCoordinator) -> None:
        assert whole.grad is not None
        expected = whole.grad.chunk(tp)[group.rank_in_group]
        torch.testing.assert_close(gradient(group, reduce_from), expected)
        torch.testing.assert_close(gradient(group, SumOfLosses.apply), tp * expected)

    on(tp, run)


def test_bad_input_raises_and_the_group_goes_on() -> None:
    def run(group: cg.GroupCoordinator) -> None:
        x = torch.ones(4, 3, requires_grad=True)
        with pytest.raises(ValueError, match=r"scatter_to on group 'tp' \(rank \d\): dim -1 of x \(4, 3\) has 3 elements, which 2 ranks"):
            scatter_to(x, group)
        with pytest.raises(ValueError, match=r"scatter_to .* dim=2 is out of range for shape \(4, 3\)"):
            scatter_to(x, group, 2)
        with pytest.raises(ValueError, match="3 elements"):
            reduce_scatter_to(x, group)
        with pytest.raises(ValueError, match="dim=5"):
            gather_from(x, group, 5)
        assert scatter_to(x, group, 0).shape == (2, 3)
        torch.testing.assert_close(reduce_from(x, group), 2 * torch.ones(4, 3))

    on(2, run)


def test_gradients_of_any_strides() -> None:
    def run(group: cg.GroupCoordinator) -> None:
        x = normal(4, 6).requires_grad_()
        copy_to(x, group).sum().backward()  # an expanded scalar
        torch.testing.assert_close(x.grad, torch.full((4, 6), 2.0, dtype=torch.float64))
        y = normal(6, 4, seed=1).T.requires_grad_()
        torch.testing.assert_close(gather_from(y, group, 0), torch.cat((y, y)))

    on(2, run)
