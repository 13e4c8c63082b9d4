"""The fused scaled matmul and reduce-scatter: numbers, shapes of three and more dims, and the errors of scales that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import fake_world, spmd

FP8 = torch.float8_e4m3fn


def given(rank: int, lead: tuple[int, ...], by_rows: bool, dtype: torch.dtype = FP8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(11 + rank)
    a = torch.randn(*lead, 16, generator=random).to(dtype)
    b = torch.randn(16, 8, generator=random).to(dtype)
    a_scale = torch.rand(*lead, 1, generator=random) + 0.5 if by_rows else torch.tensor(0.5)
    b_scale = torch.rand(1, 8, generator=random) + 0.5 if by_rows else torch.tensor([2.0])
    return [a, b, a_scale, b_scale]


def fused(group: GroupCoordinator, tensors: list[torch.Tensor], op: str, dim: int, shape: tuple[int, ...], **more: Any) -> torch.Tensor:
    a = tensors[0]
    # What torch's kernel asks for: the dim of A, which is a matrix or was one before.
    reshaped = dim if a.dim() == len(shape) else 0
    y: torch.Tensor = torch.ops.commgraph.fused_scaled_matmul_reduce_scatter(*tensors, op, dim, reshaped, group, list(shape), **more)
    return y


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    ("lead", "out", "dim"),
    [
        ((8,), (8, 8), 0),
        ((8,), (8, 8), 1),
        ((3, 4), (3, 4, 8), 1),
        ((3, 4), (3, 4, 8), 2),
        ((8,), (2, 4, 8), 1),
        ((2, 3, 4), (2, 3, 4, 8), 2),
    ],
)
def test_it_is_the_matmul_summed_and_cut(lead: tuple[int, ...], out: tuple[int, ...], dim: int, by_rows: bool, op: str, n: int) -> None:
    def product(rank: int) -> torch.Tensor:
        a, b, a_scale, b_scale = (x.double() for x in given(rank, lead, by_rows))
        return ((a * a_scale) @ (b * b_scale) + torch.arange(8.0)).view(out)

    total = sum(product(rank) for rank in range(n)) / (n if op == "avg" else 1)

    def run(world: cg.World) -> torch.Tensor:
        with world.context(cg.Layout(n, tp=n), name="a") as ctx:
            tensors = given(world.rank, lead, by_rows)
            y = fused(ctx.tp, tensors, op, dim, out, bias=torch.arange(8.0), out_dtype=torch.float32)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(x) for x in tensors]
                shape = fused(ctx.tp, fakes, op, dim, out, out_dtype=torch.float32)
            assert (shape.shape, shape.dtype, shape.stride()) == (y.shape, y.dtype, y.stride())
            assert fused(ctx.tp, tensors, op, dim, out, out_dtype=torch.bfloat16).dtype == torch.bfloat16
            return y

    for rank, y in enumerate(spmd(run, n)):
        torch.testing.assert_close(y.double(), torch.as_tensor(total).chunk(n, dim)[rank], rtol=1e-4, atol=1e-4)


def test_compiled_and_checked_by_torch() -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(world.size, tp=world.size), name="a") as ctx:
            tensors = given(world.rank, (2, 4), True)
            want = fused(ctx.tp, tensors, "sum", 1, (2, 4, 8), out_dtype=torch.float32)

            def step(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
                return fused(ctx.tp, [a, b, a_scale, b_scale], "sum", 1, (2, 4, 8), out_dtype=torch.float32) + 0

            assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors), want)
            if world.size == 1:
                # Of 8-bit floats torch's own comparison knows too little.
                samples = (*given(0, (2, 4), True, torch.bfloat16), "sum", 1, 1, ctx.tp, [2, 4, 8])
                torch.library.opcheck(torch.ops.commgraph.fused_scaled_matmul_reduce_scatter.default, samples, {"out_dtype": torch.float32})

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    spmd(run, 1)
    spmd(run, 2)


WRONG: dict[str, tuple[str, Callable[[list[torch.Tensor]], tuple[Any, ...]]]] = {
    "rows": (
        r"A_scale has shape \(8, 1\).*one for each row of A \(2, 4, 16\), with the same leading dims",
        lambda t: (t[0], t[1], t[2].view(8, 1), t[3]),
    ),
    "columns": (r"A_scale has shape \(2, 4, 16\).*1 for its last dim", lambda t: (t[0], t[1], t[2].expand(2, 4, 16), t[3])),
    "b_scale": (r"B_scale has shape \(8,\).*\(1, 8\)", lambda t: (t[0], t[1], t[2], t[3].view(8))),
    "b": (r"B has shape \(8, 16\): A \(2, 4, 16\) needs a matrix of 16 rows", lambda t: (t[0], t[1].t(), t[2], t[3])),
    "vector": (r"A has shape \(16,\)", lambda t: (t[0][0, 0], t[1], t[2][0, 0], t[3])),
}


@pytest.mark.parametrize("real", [True, False])
def test_what_does_not_fit(real: bool) -> None:
    def check(group: GroupCoordinator, tensors: list[torch.Tensor]) -> None:
        call = torch.ops.commgraph.fused_scaled_matmul_reduce_scatter
        for words, change in WRONG.values():
            with pytest.raises(ValueError, match=words):
                call(*change(tensors), "sum", 1, 1, group, [2, 4, 8])
        for words, args in {
            "reduce_op='max' is not one of sum, avg": ("max", 1, 1, group, [2, 4, 8]),
            "orig_scatter_dim=3 is out of range": ("sum", 3, 1, group, [2, 4, 8]),
            "scatter_dim_after_maybe_reshape=3 is out of range": ("sum", 1, 3, group, [2, 4, 8]),
            "has other rows than A": ("sum", 1, 1, group, [3, 4, 8]),
            "does not divide by 2 ranks": ("sum", 0, 1, group, [1, 8, 8]),
        }.items():
            with pytest.raises(ValueError, match=words):
                call(*tensors, *args)
        with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
            call(*tensors, "sum", 1, 1, group, [2, 4, 8], torch.ones(3, device=tensors[0].device))

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            check(ctx.tp, given(world.rank, (2, 4), True))
            assert ctx.tp.all_reduce(torch.ones(1)).item() == 2

    if real:
        spmd(run, 2)
    else:
        with fake_world(2) as world, world.context(cg.Layout(2, tp=2), name="a") as ctx:
            check(ctx.tp, [x.to("meta") for x in given(0, (2, 4), True)])
