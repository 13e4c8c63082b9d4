"""Every operation as a differentiable function of a group and a tensor, beside what one process computes from all ranks' tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import attrs
import torch

from commgraph.coordinator import GroupCoordinator

Outputs = list[torch.Tensor]


@attrs.frozen
class Case:
    """An operation.

    Attributes:
        run: on one rank; gives one tensor.
        oracle: of all ranks' tensors; gives all ranks' results.
        shape: of a rank's tensor, which may differ by rank: (ranks, rank) -> shape.
        differentiable: whether a gradient passes.
    """

    run: Callable[[GroupCoordinator, torch.Tensor], torch.Tensor]
    oracle: Callable[[Sequence[torch.Tensor]], Outputs]
    shape: Callable[[int, int], tuple[int, ...]] = lambda n, rank: (2 * n, 3)
    differentiable: bool = True


def summed(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(xs)).sum(0)


def rows(n: int) -> list[int]:
    """Uneven pieces, an empty one among them."""
    return [2 * ((i + 1) % n) for i in range(n)]


def crossing(n: int, i: int, j: int) -> int:
    """Rows from rank i to rank j."""
    return (i + 2 * j) % 3


def _ring(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """Sends and receives that hang, or give other numbers, if one of them goes missing or comes too early."""
    tp.barrier()
    if tp.is_first_rank:
        tp.send(x)
        got = tp.recv(x.shape, x.dtype)
        tp.send(got + x)
        return tp.recv(x.shape, x.dtype)
    first = tp.recv(x.shape, x.dtype)
    tp.send(first + x)
    second = tp.recv(x.shape, x.dtype)
    tp.send(second + 1)
    return second


def _ring_oracle(xs: Sequence[torch.Tensor]) -> Outputs:
    n = len(xs)
    sums = [summed(xs[: i + 1]) for i in range(n)]
    second = sums[-1] + xs[0]
    return [second + (n - 1), *(second + i for i in range(n - 1))]


def _all_to_all(xs: Sequence[torch.Tensor], cut: int, join: int) -> Outputs:
    return [torch.cat([x.chunk(len(xs), cut)[me] for x in xs], join) for me in range(len(xs))]


def _all_to_allv(xs: Sequence[torch.Tensor]) -> Outputs:
    n = len(xs)
    pieces = [x.split([crossing(n, i, j) for j in range(n)]) for i, x in enumerate(xs)]
    return [torch.cat([pieces[i][me] for i in range(n)]) for me in range(n)]


def _gather(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    gathered = tp.gather(x, 1, 0)
    return x * 2 if gathered is None else gathered + 1


def _gather_uneven(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    gathered = tp.gather(x, 1, 0, sizes=rows(tp.world_size))
    return x * 2 if gathered is None else gathered + 1


def _reduce(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    total = tp.reduce(x, 1, op="max")
    return x * 2 if total is None else total + 1


def _scatter(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """On every rank a tensor, for its shape; the values are those of rank 1."""
    return tp.scatter(x, 1, 0) + tp.scatter(x * 2, 0, 0)


def _bits(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    whole = x.long()
    joined = tp.all_reduce(whole, op="band") + tp.all_reduce(whole, op="bor") * 10 + tp.all_reduce(whole, op="bxor") * 100
    return joined.to(x.dtype) + tp.reduce_scatter(whole, 0, op="bxor").repeat(tp.world_size, 1) + x


def _bits_oracle(xs: Sequence[torch.Tensor]) -> Outputs:
    whole = [x.detach().long() for x in xs]
    band, bor, bxor = (reduce(op, whole) for op in (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor))
    joined = (band + bor * 10 + bxor * 100).to(xs[0].dtype)
    return [joined + piece.repeat(len(xs), 1) + x for piece, x in zip(bxor.chunk(len(xs)), xs, strict=True)]


def _begun_too(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """The graphs differ by rank at their end, so the broadcast comes first by its data: docs/reference/operators.md, order in a graph."""
    filled = tp.broadcast_async(x.sin(), 1).wait()
    crossed = tp.all_to_all_async(filled)
    tp.barrier_async().wait()
    gathered = tp.gather_async(crossed.wait(), 0, 0).wait()
    return filled if gathered is None else filled + gathered[: len(x)]


def _begun_too_oracle(xs: Sequence[torch.Tensor]) -> Outputs:
    first = _all_to_all([xs[1].sin()] * len(xs), 0, 0)[0]
    return [xs[1].sin() + first if rank == 0 else xs[1].sin() for rank in range(len(xs))]


def _lists(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    a, b = tp.all_reduce([x, x * 2])
    c, d = tp.all_gather((a, b), 0)
    e, f = tp.reduce_scatter([c, d], 0, op="avg")
    g, h = tp.all_reduce_([e * 1, f * 1])
    i, j = tp.broadcast([g * 1, h + tp.rank_in_group], 1)
    return i + j


def _lists_oracle(xs: Sequence[torch.Tensor]) -> Outputs:
    return [summed(xs) * 3 * len(xs) + 1] * len(xs)


def _in_place(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = tp.all_reduce_(y)
    return y + z


def _out(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], x.shape[1] * tp.world_size)
    tp.all_gather(x, 1, out=out)
    return tp.reduce_scatter(out, 1, out=torch.empty_like(x)) + 1


def _begun(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    total, whole = tp.all_reduce_async(x), tp.all_gather_async(x, 0)
    piece = tp.reduce_scatter_async(whole.wait(), 0, out=torch.empty_like(x))
    return total.wait() + piece.wait()


def _broadcast(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    return tp.broadcast(y, 1) + y


def _listed(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    a, b = tp.all_gatherv([x, x.flip(1)], 0, rows(tp.world_size))
    return a * 2 + b


def _dispatched(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    n = tp.world_size
    a, b = torch.ops.commgraph.dispatch([x, x * 3], tp, rows(n), tp._token)
    y: torch.Tensor = torch.ops.commgraph.combine(a * b, tp, rows(n), tp._token)
    return y


def _dispatched_evenly(tp: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    (a,) = torch.ops.commgraph.dispatch([x], tp, None, tp._token)
    y: torch.Tensor = torch.ops.commgraph.combine(a * a * (tp.rank_in_group + 1), tp, None, tp._token)
    return y


def _split(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> Outputs:
    return list(x.split(list(sizes), dim))


CASES = MappingProxyType(
    {
        "all_reduce": Case(lambda tp, x: tp.all_reduce(x), lambda xs: [summed(xs)] * len(xs)),
        "all_reduce avg": Case(lambda tp, x: tp.all_reduce(x, op="avg"), lambda xs: [summed(xs) / len(xs)] * len(xs)),
        "all_reduce max": Case(lambda tp, x: tp.all_reduce(x, op="max"), lambda xs: [torch.stack(list(xs)).amax(0)] * len(xs)),
        "all_reduce min": Case(lambda tp, x: tp.all_reduce(x, op="min"), lambda xs: [torch.stack(list(xs)).amin(0)] * len(xs)),
        "all_reduce product": Case(lambda tp, x: tp.all_reduce(x, op="product"), lambda xs: [torch.stack(list(xs)).prod(0)] * len(xs)),
        "all_reduce_": Case(_in_place, lambda xs: [4 * summed(xs)] * len(xs)),
        "reduce_scatter": Case(lambda tp, x: tp.reduce_scatter(x, 0), lambda xs: list(summed(xs).chunk(len(xs)))),
        "reduce_scatter avg": Case(
            lambda tp, x: tp.reduce_scatter(x.t(), op="avg"), lambda xs: [p.t() for p in (summed(xs) / len(xs)).chunk(len(xs))]
        ),
        "reduce_scatter max": Case(
            lambda tp, x: tp.reduce_scatter(x, 0, op="max"), lambda xs: list(torch.stack(list(xs)).amax(0).chunk(len(xs)))
        ),
        "reduce_scatter product": Case(
            lambda tp, x: tp.reduce_scatter(x, 0, op="product"), lambda xs: list(torch.stack(list(xs)).prod(0).chunk(len(xs)))
        ),
        "reduce_scatterv": Case(
            lambda tp, x: tp.reduce_scatterv(x, 0, rows(tp.world_size)),
            lambda xs: _split(summed(xs), rows(len(xs))),
            lambda n, rank: (sum(rows(n)), 3),
        ),
        "all_gather": Case(lambda tp, x: tp.all_gather(x), lambda xs: [torch.cat(list(xs), -1)] * len(xs)),
        "all_gatherv": Case(
            lambda tp, x: tp.all_gatherv(x, 0, rows(tp.world_size)),  # type: ignore[arg-type, return-value]  # one tensor in, one out
            lambda xs: [torch.cat(list(xs))] * len(xs),
            lambda n, rank: (rows(n)[rank], 3),
        ),
        "all_gatherv of a list": Case(
            _listed, lambda xs: [torch.cat([2 * x + x.flip(1) for x in xs])] * len(xs), lambda n, rank: (rows(n)[rank], 3)
        ),
        "gather": Case(
            _gather, lambda xs: [torch.cat(list(xs)) + 1 if rank == 1 else 2 * x for rank, x in enumerate(xs)], differentiable=False
        ),
        "gather of uneven pieces": Case(
            _gather_uneven,
            lambda xs: [torch.cat(list(xs)) + 1 if rank == 1 else 2 * x for rank, x in enumerate(xs)],
            lambda n, rank: (rows(n)[rank], 3),
            differentiable=False,
        ),
        "reduce": Case(
            _reduce,
            lambda xs: [torch.stack(list(xs)).amax(0) + 1 if rank == 1 else 2 * x for rank, x in enumerate(xs)],
            differentiable=False,
        ),
        "scatter": Case(
            _scatter, lambda xs: [a + 2 * b for a, b in zip(xs[1].chunk(len(xs)), xs[0].chunk(len(xs)), strict=True)], differentiable=False
        ),
        "scatter of uneven pieces": Case(
            lambda tp, x: tp.scatter(x, 1, 0, sizes=rows(tp.world_size)),
            lambda xs: _split(xs[1], rows(len(xs))),
            lambda n, rank: (sum(rows(n)), 3),
            differentiable=False,
        ),
        "bits": Case(_bits, _bits_oracle, differentiable=False),
        "reduce_scatterv product": Case(
            lambda tp, x: tp.reduce_scatterv(x, 0, rows(tp.world_size), op="product"),
            lambda xs: _split(torch.stack(list(xs)).prod(0), rows(len(xs))),
            lambda n, rank: (sum(rows(n)), 3),
        ),
        "reduce_scatterv max": Case(
            lambda tp, x: tp.reduce_scatterv(x, 0, rows(tp.world_size), op="max"),
            lambda xs: _split(torch.stack(list(xs)).amax(0), rows(len(xs))),
            lambda n, rank: (sum(rows(n)), 3),
        ),
        "all_to_all": Case(lambda tp, x: tp.all_to_all(x), lambda xs: _all_to_all(xs, 0, 0)),
        "all_to_all over two dims": Case(lambda tp, x: tp.all_to_all(x, scatter_dim=0, gather_dim=1), lambda xs: _all_to_all(xs, 0, 1)),
        "all_to_all of uneven pieces": Case(
            lambda tp, x: tp.all_to_all(
                x,
                input_sizes=[crossing(tp.world_size, tp.rank_in_group, j) for j in range(tp.world_size)],
                output_sizes=[crossing(tp.world_size, i, tp.rank_in_group) for i in range(tp.world_size)],
            ),
            _all_to_allv,
            lambda n, rank: (sum(crossing(n, rank, j) for j in range(n)), 3),
        ),
        "broadcast": Case(_broadcast, lambda xs: [xs[1].sin() * 2] * len(xs)),
        "out": Case(_out, lambda xs: [len(xs) * x + 1 for x in xs]),
        "begun and waited for": Case(_begun, lambda xs: [summed(xs) + len(xs) * x for x in xs], differentiable=False),
        "lists": Case(_lists, _lists_oracle),
        "begun and waited for, the others": Case(_begun_too, _begun_too_oracle, differentiable=False),
        "send and recv": Case(_ring, _ring_oracle, differentiable=False),
        "sendrecv": Case(
            lambda tp, x: tp.sendrecv(x, tp.next_in_group, x.shape, x.dtype, tp.prev_in_group),
            lambda xs: [xs[i - 1].clone() for i in range(len(xs))],
            differentiable=False,
        ),
        "dispatch and combine": Case(_dispatched, lambda xs: [len(xs) * 3 * x * x for x in xs], lambda n, rank: (rows(n)[rank], 3)),
        "dispatch and combine of equal rows": Case(_dispatched_evenly, lambda xs: [x * x * (len(xs) * (len(xs) + 1) // 2) for x in xs]),
    }
)


def given(name: str, n: int, rank: int) -> torch.Tensor:
    """A rank's tensor; of small whole numbers, some of them equal on several ranks."""
    generator = torch.Generator().manual_seed(100 * n + rank)
    return torch.randint(-3, 4, CASES[name].shape(n, rank), generator=generator).float()


def weight(y: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank's loss multiplies its result with, so that every entry and every rank has a gradient of its own."""
    return torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 5 + rank + 1


def expected(name: str, n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every rank's result, and the gradient of its tensor with respect to the sum of all ranks' losses."""
    xs = [given(name, n, rank).requires_grad_() for rank in range(n)]
    ys = CASES[name].oracle(xs)
    loss: Any = sum((y * weight(y, rank)).sum() for rank, y in enumerate(ys))
    loss.backward()
    return [y.detach() for y in ys], [torch.zeros_like(x) if x.grad is None else x.grad for x in xs]
