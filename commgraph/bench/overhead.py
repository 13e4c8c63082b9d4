"""Overhead of a coordinator over its strategy: each kind of call, in turn with the plain call of the same tensor."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

from commgraph.bench.library import Buffers, repeat
from commgraph.bench.ours import Tensors
from commgraph.bench.timing import Contender
from commgraph.coordinator import GroupCoordinator
from commgraph.deadline import Deadline
from commgraph.nn import functional

__all__ = ["overhead"]

_SECONDS = 60.0


class _Copy(Function):
    """An autograd function around a copy, with which calls with a gradient are compared."""

    @staticmethod
    def forward(node: Any, x: torch.Tensor, group: GroupCoordinator) -> torch.Tensor:
        node.group = group
        return x.clone()

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def overhead(library: Tensors, buffers: Buffers) -> list[Contender]:
    """Return `ctx.tp.all_reduce` of a tensor, the strategy's method by itself, and the other operations on the same tensor."""
    x, group, name = buffers.x, library.group, library.strategy("all_reduce", buffers)
    strategy, tags = group.communicator(name), itertools.count(1)

    def method() -> object:
        return strategy.all_reduce(x, "sum", tag=next(tags) % 2**28, deadline=Deadline.after(_SECONDS))

    calls: dict[str, Callable[[], object]] = {f"ctx.tp, {name}": lambda: group.all_reduce(x), f"{name}'s method": method}
    if strategy.fast is not None:
        native = strategy.fast.open(lambda operation, args: 0, _SECONDS)
        calls[f"{name}'s fast path"] = lambda: native.all_reduce(x, "sum", None)
    calls |= _uneven(group, x) | _objects(group, x) | _gradients(group, x)
    calls["all_reduce_async, waited for"] = lambda: group.all_reduce_async(x).wait()
    if shutil.which("g++") is not None:  # which inductor needs on the host
        calls |= _compiled(group, x)
    return [Contender("commgraph", variant, repeat(call)) for variant, call in calls.items()]


def _uneven(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Calls with a deadline of their own, to or from one rank, and of pieces with sizes."""
    n, first = group.world_size, group.is_first_rank
    cut, pieces = [len(part) for part in x.tensor_split(n)], list(x.tensor_split(8))
    return {
        "with timeout=": lambda: group.all_reduce(x, timeout=_SECONDS),
        "gather": lambda: group.gather(x, 0, 0),
        "scatter": lambda: group.scatter(x if first else None, 0, 0, sizes=cut if first else None),
        "reduce": lambda: group.reduce(x),
        "all_gatherv": lambda: group.all_gatherv(x, 0, [len(x)] * n),
        "reduce_scatterv": lambda: group.reduce_scatterv(x, 0, cut),
        "all_reduce of a list of eight": lambda: group.all_reduce(pieces),
        "all_to_all with sizes": lambda: group.all_to_all(x, input_sizes=cut, output_sizes=[cut[group.rank_in_group]] * n),
    }


def _objects(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Objects, and dicts with and without one."""
    plain, mixed = ({"x": x}, {"x": x, "n": 7}) if group.is_first_rank else (None, None)
    return {
        "all_gather_object": lambda: group.all_gather_object({"n": 7}),
        "tensor dict": lambda: group.broadcast_tensor_dict(plain),
        "tensor dict with an int": lambda: group.broadcast_tensor_dict(mixed),
    }


def _gradients(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward."""
    leaf = x.clone().requires_grad_()
    n = group.world_size
    even = len(x) // n * n
    whole, grad, joined = leaf[:even].detach().requires_grad_(), torch.ones_like(x[:even]), torch.ones_like(torch.cat([x[:even]] * n))

    def both(forward: Callable[[], torch.Tensor], given: torch.Tensor) -> Callable[[], object]:
        def call() -> None:
            whole.grad = None
            forward().backward(given)

        return call

    return {
        "autograd.Function around a copy": both(lambda: _Copy.apply(whole, group), grad),  # type: ignore[no-untyped-call]  # torch's
        "reduce_from": both(lambda: functional.reduce_from(whole, group), grad),
        "copy_to": both(lambda: functional.copy_to(whole, group), grad),
        "gather_from": both(lambda: functional.gather_from(whole, group, 0), joined),
        "scatter_to": both(lambda: functional.scatter_to(whole, group, 0), grad[: even // n]),
        "reduce_scatter_to": both(lambda: functional.reduce_scatter_to(whole, group, 0), grad[: even // n]),
        "all_reduce with a gradient": both(lambda: group.all_reduce(whole), grad),
    }


def _compiled(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A graph with a collective in it, and one with a copy in its place."""
    compiled = torch.compile(lambda x: group.all_reduce(x * 2) + 1, fullgraph=True)
    copied = torch.compile(lambda x: (x * 2).clone() + 1, fullgraph=True)
    return {"compiled": lambda: compiled(x), "compiled, a copy in its place": lambda: copied(x)}
