"""ExpertParallelMLP against the same layer on one rank: values and gradients, over layouts, with rows that differ in number by rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.nn import ExpertParallelMLP, full_state_dict, load_full_state_dict
from commgraph.testing import spmd

HIDDEN, INNER, EXPERTS, TOP = 6, 5, 8, 3

# Layout, whether the rows are split over tp, options.
LAYOUTS: dict[str, tuple[dict[str, int], bool, dict[str, Any]]] = {
    "dp=4": ({"dp": 4}, False, {}),
    "tp=4": ({"tp": 4}, False, {}),
    "dp=2 tp=2": ({"dp": 2, "tp": 2}, False, {}),
    "dp=2 tp=2 over gloo": ({"dp": 2, "tp": 2}, False, {"shm": False}),
    "dp=2 tp=2 routed": ({"dp": 2, "tp": 2}, False, {"experts": EXPERTS}),
    "dp=2 tp=2 split": ({"dp": 2, "tp": 2}, True, {}),
    "dp=2 tp=2 split routed": ({"dp": 2, "tp": 2}, True, {"experts": EXPERTS}),
    "dp=2 pcp=2": ({"dp": 2, "pcp": 2}, False, {}),
    "dp=2 pcp=2 split": ({"dp": 2, "pcp": 2}, True, {}),
    "tp=2 pcp=2 split": ({"tp": 2, "pcp": 2}, True, {}),
}


def full_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "router": torch.randn(EXPERTS, HIDDEN, generator=random),
        "gate_up_proj": torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=random),
        "down_proj": torch.randn(EXPERTS, HIDDEN, INNER, generator=random),
    }


def rows_of(place: int, counts: list[int]) -> torch.Tensor:
    return torch.randn(counts[place], HIDDEN, generator=torch.Generator().manual_seed(100 + place))


def alone(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """One rank with the rows of all: results, gradients of the rows, gradients of the parameters of the sum of all losses."""

    def run(world: cg.World) -> Any:
        with world.context(cg.Layout(1), name="alone") as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx, dtype=dtype)
            load_full_state_dict(layer, full_tensors())
            xs = [rows_of(place, counts).to(dtype).requires_grad_() for place in range(len(counts))]
            ys = layer(torch.cat(xs)).split(counts)
            sum(loss(y, place) for place, y in enumerate(ys)).backward()  # type: ignore[union-attr]  # a tensor
            return [y.detach() for y in ys], [x.grad for x in xs], {name: p.grad for name, p in layer.named_parameters()}

    return spmd(run, 1)[0]  # type: ignore[no-any-return]  # what run gave


def loss(y: torch.Tensor, place: int) -> torch.Tensor:
    return (y * y).sum() * (place + 1) + y.sum()


@pytest.mark.parametrize("counts", [[3, 5, 2, 4], [4, 0, 3, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_layer_of_one_rank(name: str, counts: list[int]) -> None:
    axes, split, options = LAYOUTS[name]
    n = 4
    places = n if split else n // axes.get("tp", 1)
    counts = counts[:places]
    wanted, wanted_x, wanted_parameters = alone(counts)

    def run(world: cg.World) -> tuple[int, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], tuple[int, int]]:
        with world.context(cg.Layout(n, **axes), name="a", options=cg.CommunicatorOptions(**options)) as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx, sequence_parallel=split, dtype=torch.float64)
            load_full_state_dict(layer, full_tensors())
            place = layer._exchange.rank_in_group
            x = rows_of(place, counts).double().requires_grad_()
            y = layer(x, sizes=counts if counts[0] == 3 else None)
            loss(y, place).backward()
            with torch.no_grad():  # without a gradient it takes the way without operators
                assert torch.equal(layer(x, sizes=counts), y)
            assert x.grad is not None
            grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
            return place, y.detach(), x.grad, grads, layer.experts

    seen = spmd(run, n)
    for place, y, x_grad, grads, (first, end) in seen:
        torch.testing.assert_close(y, wanted[place])
        torch.testing.assert_close(x_grad, wanted_x[place])
        for parameter in ("gate_up_proj", "down_proj"):
            torch.testing.assert_close(grads[parameter], wanted_parameters[parameter][first:end])


@pytest.mark.parametrize("split", [False, True])
def test_the_router_has_the_gradient_of_this_data_parallel_ranks_loss(split: bool) -> None:
    counts = [2, 3, 4, 1] if split else [5, 5]
    *_, wanted = alone(counts)

    def run(world: cg.World) -> torch.Tensor:
        with world.context(cg.Layout(4, dp=2, tp=2), name="a") as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx, sequence_parallel=split, dtype=torch.float64)
            load_full_state_dict(layer, full_tensors())
            place = layer._exchange.rank_in_group
            loss(layer(rows_of(place, counts).double()), place).backward()
            assert layer.router.grad is not None
            # Equal on the ranks of tp; added up over dp, as those of any replicated parameter.
            assert torch.equal(ctx.tp.broadcast(layer.router.grad.clone()), layer.router.grad)
            return ctx.dp.all_reduce(layer.router.grad)

    for grad in spmd(run, 4):
        torch.testing.assert_close(grad, wanted["router"])


def test_compiled_it_is_the_same() -> None:
    counts = [3, 5]

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, dp=2), name="a") as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx, dtype=torch.float64)
            x = rows_of(world.rank, counts).double().requires_grad_()
            want = layer(x, sizes=counts)
            loss(want, world.rank).backward()
            wanted = x.grad
            x.grad = None
            y = torch.compile(lambda x: layer(x, sizes=counts), backend="aot_eager", fullgraph=True)(x)
            loss(y, world.rank).backward()
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(x.grad, wanted)

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(run, 2)


def test_seeds_and_checkpoints_are_those_of_the_whole_layer() -> None:
    def run(world: cg.World) -> dict[str, torch.Tensor]:
        with world.context(cg.Layout(world.size, dp=world.size), name="a") as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx)
            layer.reset_parameters(torch.Generator().manual_seed(3))
            return full_state_dict(layer)

    (whole,), *others = (spmd(run, n) for n in (1, 2, 4))
    for states in others:
        for state in states:
            assert state.keys() == whole.keys() == full_tensors().keys()
            assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_half_precision_and_leading_dims() -> None:
    def run(world: cg.World) -> torch.Tensor:
        with world.context(cg.Layout(world.size, tp=world.size), name="a") as ctx:
            layer = ExpertParallelMLP(HIDDEN, INNER, EXPERTS, TOP, ctx=ctx, renormalize=False, dtype=torch.bfloat16)
            load_full_state_dict(layer, full_tensors())
            with torch.no_grad():
                y: torch.Tensor = layer(rows_of(0, [12]).bfloat16().view(2, 2, 3, HIDDEN), sizes="equal")
            assert y.dtype == torch.bfloat16
            return y

    (whole,), shared = spmd(run, 1), spmd(run, 4)
    assert whole.shape == (2, 2, 3, HIDDEN)
    for y in shared:
        torch.testing.assert_close(y, whole, rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_said_when_it_is_made() -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, dp=2, tp=2), name="a", options=cg.CommunicatorOptions(experts=4)) as ctx:
            with pytest.raises(cg.ConfigurationError, match="num_experts=6"):
                ExpertParallelMLP(HIDDEN, INNER, 6, 2, ctx=ctx)
            with pytest.raises(cg.ConfigurationError, match="top_k=9"):
                ExpertParallelMLP(HIDDEN, INNER, 8, 9, ctx=ctx)
            with pytest.raises(cg.ConfigurationError, match=r"CommunicatorOptions\(experts=4\)"):
                ExpertParallelMLP(HIDDEN, INNER, 8, 2, ctx=ctx)
            layer = ExpertParallelMLP(HIDDEN, INNER, 4, 2, ctx=ctx)
            with pytest.raises(ValueError, match="must end in 6 features"):
                layer(torch.ones(3, 5))
            assert "of 4, top_k=2" in repr(layer)
        with (
            world.context(cg.Layout(4, pcp=2, tp=2), name="b") as ctx,
            pytest.raises(cg.ConfigurationError, match="sequence_parallel=True"),
        ):
            ExpertParallelMLP(HIDDEN, INNER, 8, 2, ctx=ctx)

    spmd(run, 4)
