"""Every operation under the transforms of torch.func and in forward mode, on one of several processes: right, or a clear error.

Processes, because torch keeps the level of forward mode for all threads. Arguments: rank, size, file to meet at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.nn import VocabParallelEmbedding, functional
from tests.coordinator.operator_cases import CASES, Case, given, weight

# Texts of clear errors: commgraph's, and torch's for operators that are called by name and for a tensor that vmap cannot fill.
CLEAR = (
    "carries a tangent",
    "within torch.func",
    "which does not pass",
    "forward AD",
    "inplace arithmetic",
    "setup_context",
    "Batching rule not implemented",
    "requires a gradient",
)

# Of layers: forward mode knows neither partial nor replicated tensors, so each is the collective that it calls.
LAYERS = MappingProxyType(
    {
        "reduce_from": Case(lambda tp, x: functional.reduce_from(x, tp), CASES["all_reduce"].oracle),
        "copy_to": Case(lambda tp, x: functional.copy_to(x, tp), lambda xs: [x * 1 for x in xs]),
        "gather_from": Case(lambda tp, x: functional.gather_from(x, tp), CASES["all_gather"].oracle),
        "reduce_scatter_to": Case(lambda tp, x: functional.reduce_scatter_to(x, tp, 0), CASES["reduce_scatter"].oracle),
        "scatter_to": Case(
            lambda tp, x: functional.scatter_to(x, tp, 0), lambda xs: [x.chunk(len(xs))[rank] * 1 for rank, x in enumerate(xs)]
        ),
        "dispatch and combine by methods": Case(
            lambda tp, x: tp.combine((sent := tp.dispatch(x, x * 2, sizes="equal"))[0] * sent[1], sent),
            lambda xs: [len(xs) * 2 * x * x for x in xs],
        ),
    }
)


def tensors(name: str, case: Case, n: int, seed: int = 0) -> list[torch.Tensor]:
    if name in CASES:
        return [given(name, n, rank) + seed for rank in range(n)]
    return [torch.randn(case.shape(n, rank), generator=torch.Generator().manual_seed(seed + rank)) for rank in range(n)]


def attempt(what: str, differentiable: bool, act: Callable[[], Any], right: Any) -> None:
    """Do it: right or, where it may, a clear error."""
    unclear = ""
    try:
        got = act()
    except (RuntimeError, TypeError, ValueError) as error:
        unclear = repr(error) if differentiable or not any(text in str(error) for text in CLEAR) else ""
    else:
        torch.testing.assert_close(got, right, msg=lambda text: f"{what}: {text}")
    assert not unclear, f"{what}: {unclear}"


def jvp_of(function: Callable[..., Any], *primals: torch.Tensor, along: Sequence[torch.Tensor]) -> Any:
    """Return the tangent of a function's result."""
    return jvp(function, primals, tuple(along))[1]


def check(tp: GroupCoordinator, name: str, case: Case) -> None:
    n, me = tp.world_size, tp.rank_in_group
    xs, ts = tensors(name, case, n), tensors(name, case, n, 7)
    if name not in CASES:
        ts = [t / 3 for t in ts]
    x, t = xs[me].clone(), ts[me].clone()
    ways = (case.differentiable and not name.startswith("dispatch and combine")) or name.endswith("methods")
    tangents = jvp_of(lambda *all_of: tuple(y * 1 for y in case.oracle(all_of)), *xs, along=ts)

    def run(v: torch.Tensor) -> torch.Tensor:
        return case.run(tp, v)

    def loss(v: torch.Tensor) -> torch.Tensor:
        y = run(v)
        return (y * weight(y, me)).sum()

    def by_levels() -> Any:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(case.run(tp, forward_ad.make_dual(x, t)))
            assert found.tangent is not None, f"{name}: no tangent"
            return found.tangent.clone()

    attempt(f"{name}, jvp", ways, partial(jvp_of, run, x, along=[t]), tangents[me])
    attempt(f"{name}, dual tensors", ways, by_levels, tangents[me])

    # A rank whose tensor has no tangent makes the same calls.
    one = jvp_of(lambda first: tuple(y * 1 for y in case.oracle([first, *xs[1:]])), xs[0], along=ts[:1])

    def by_one() -> Any:
        with forward_ad.dual_level():
            y = case.run(tp, forward_ad.make_dual(x, t) if me == 0 else x.clone())
            tangent = forward_ad.unpack_dual(y).tangent
            return torch.zeros_like(y) if tangent is None else tangent.clone()

    if ways:
        attempt(f"{name}, one rank's tangent", ways, by_one, one[me])

    if name in CASES and case.differentiable:
        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
        attempt(f"{name}, grad", ways, partial(grad(loss), x), leaf.grad)
        attempt(
            f"{name}, grad in vmap", False, partial(vmap(grad(loss)), x.unsqueeze(0)), None if leaf.grad is None else leaf.grad.unsqueeze(0)
        )

    batches = [torch.stack([a, b, a * b]) for a, b in zip(xs, ts, strict=True)]
    results = [case.oracle([batch[i] for batch in batches])[me] for i in range(3)]
    batched = ways and name not in ("out", "lists", "all_reduce_")
    attempt(f"{name}, vmap", batched, partial(vmap(run), batches[me]), torch.stack(results))
    attempt(
        f"{name}, vmap over another dim",
        batched,
        partial(vmap(run, in_dims=1, out_dims=1), batches[me].movedim(0, 1)),
        torch.stack(results, 1),
    )


def check_messages(tp: GroupCoordinator) -> None:
    """Messages have no derivatives: refused on the sender before anything is sent."""
    x, to = torch.ones(3), tp.next_in_group
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "send": lambda v: tp.send(v, to),
        "isend": lambda v: tp.isend(v, to),
        "batch": lambda v: tp.batch([cg.Send(v, to)]),
        "sendrecv": lambda v: tp.sendrecv(v, to, v.shape, v.dtype, tp.prev_in_group),
        "send_tensor_dict": lambda v: tp.send_tensor_dict({"a": v}, to),
        "isend_tensor_dict": lambda v: tp.isend_tensor_dict({"a": v}, to),
        "broadcast_tensor_dict": lambda v: tp.broadcast_tensor_dict({"a": v}, tp.rank_in_group),
        "all_reduce_async": tp.all_reduce_async,
        "all_gather_async": tp.all_gather_async,
        "reduce_scatter_async": lambda v: tp.reduce_scatter_async(v.repeat(tp.world_size)),
        "all_to_all_async": lambda v: tp.all_to_all_async(v.repeat(tp.world_size)),
        "broadcast_async": tp.broadcast_async,
        "gather_async": tp.gather_async,
    }
    for call in calls.values():
        for transformed in (partial(jvp_of, call, along=[x]), grad(call), lambda v, call=call: vmap(call)(v.unsqueeze(0))):
            with pytest.raises(cg.UnsupportedTensorError, match=r"within torch\.func"):
                transformed(x)
        with forward_ad.dual_level(), pytest.raises(cg.UnsupportedTensorError, match="carries a tangent"):
            call(forward_ad.make_dual(x, x))
    assert torch.equal(tp.all_reduce(x), x * tp.world_size)


def check_embedding(ctx: cg.ParallelContext) -> None:
    layer = VocabParallelEmbedding(7, 3, ctx=ctx)
    rows = layer.weight.shape[0]
    whole = torch.randn(rows * ctx.tp.world_size, 3, generator=torch.Generator().manual_seed(0))
    change = whole.sin()
    mine = slice(rows * ctx.tp.rank_in_group, rows * (ctx.tp.rank_in_group + 1))
    ids = torch.tensor([[0, 6], [3, 4]])

    def look_up(weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(layer, {"weight": weight}, (ids,))
        return found

    torch.testing.assert_close(jvp_of(look_up, whole[mine], along=[change[mine]]), change[ids])
    torch.testing.assert_close(vmap(layer)(ids), layer(ids))
    gradient = grad(lambda weight: look_up(weight).sum())(whole[mine])
    torch.testing.assert_close(gradient, torch.bincount(ids.flatten(), minlength=len(whole))[mine].float().unsqueeze(1).expand(-1, 3))


def check_second_derivatives(tp: GroupCoordinator) -> None:
    """Forward over reverse, reverse over forward."""
    x = torch.arange(1.0, 4) + tp.rank_in_group

    def loss(v: torch.Tensor) -> torch.Tensor:
        return tp.all_reduce(v * v).pow(2).sum() / tp.world_size

    total = sum((torch.arange(1.0, 4) + rank) ** 2 for rank in range(tp.world_size))
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(grad(loss)(x), 4 * x * total)
    # With respect to this rank's x alone: the other ranks' parts of `total` change along with their own basis vectors, alike.
    second = hessian(loss)(x)
    assert second.shape == (3, 3)
    both = sum(torch.arange(1.0, 4) + rank for rank in range(tp.world_size))
    assert isinstance(both, torch.Tensor)
    torch.testing.assert_close(second, torch.diag(4 * total + 8 * x * both))


def main() -> None:
    rank, size, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    with cg.World.connect(f"file://{place}", rank=rank, world_size=size) as world:
        for shm in (True, False):
            options = cg.CommunicatorOptions(shm=shm)
            with world.context(cg.Layout(size, tp=size), name=f"shm={shm}", options=options) as ctx:
                for name, case in (CASES | LAYERS).items():
                    if name == "send and recv":
                        continue  # the sender refuses, and the receiver would wait
                    try:
                        check(ctx.tp, name, case)
                    except BaseException as error:
                        error.add_note(f"(in case {name!r}, shm={shm})")
                        raise
                check_messages(ctx.tp)
                check_embedding(ctx)
                check_second_derivatives(ctx.tp)
    print("right")


if __name__ == "__main__":
    main()
