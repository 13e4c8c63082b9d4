"""The paths of one operation agree: on how it ends when a rank is late, and on what it costs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.failures import Failures
from tests.helpers import count_calls, on

# Each of a group of four whose last rank is late. Rank 0 waits for it in all of them.
COLLECTIVES: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda g, x, **how: g.all_reduce(x, **how),
    "all_reduce_": lambda g, x, **how: g.all_reduce_(x, **how),
    "all_reduce of a list": lambda g, x, **how: g.all_reduce([x, x.double()], **how),
    "reduce": lambda g, x, **how: g.reduce(x, **how),
    "reduce_scatter": lambda g, x, **how: g.reduce_scatter(x, **how),
    "reduce_scatter of a list": lambda g, x, **how: g.reduce_scatter([x, x.double()], **how),
    "reduce_scatterv": lambda g, x, **how: g.reduce_scatterv(x, 0, [1, 2, 3, 2], **how),
    "all_gather": lambda g, x, **how: g.all_gather(x, **how),
    "all_gather of a list": lambda g, x, **how: g.all_gather([x, x.double()], **how),
    "all_gatherv": lambda g, x, **how: g.all_gatherv(x, 0, [8, 8, 8, 8], **how),
    "all_gatherv of a list": lambda g, x, **how: g.all_gatherv([x, x.double()], 0, [8, 8, 8, 8], **how),
    "gather": lambda g, x, **how: g.gather(x, **how),
    "gather of uneven pieces": lambda g, x, **how: g.gather(x, 0, 0, sizes=[8, 8, 8, 8], **how),
    "scatter": lambda g, x, **how: g.scatter(x, 3, **how),
    "broadcast": lambda g, x, **how: g.broadcast(x, 3, **how),
    "broadcast of a list": lambda g, x, **how: g.broadcast([x, x.double()], 3, **how),
    "all_to_all": lambda g, x, **how: g.all_to_all(x, **how),
    "all_to_all of uneven pieces": lambda g, x, **how: g.all_to_all(x, input_sizes=[2, 2, 2, 2], output_sizes=[2, 2, 2, 2], **how),
    "barrier": lambda g, x, **how: g.barrier(**how),
    "all_reduce_async": lambda g, x, **how: g.all_reduce_async(x, **how).wait(),
    "all_gather_async": lambda g, x, **how: g.all_gather_async(x, **how).wait(),
    "reduce_scatter_async": lambda g, x, **how: g.reduce_scatter_async(x, **how).wait(),
    "all_to_all_async": lambda g, x, **how: g.all_to_all_async(x, **how).wait(),
    "gather_async": lambda g, x, **how: g.gather_async(x, **how).wait(),
    "broadcast_async": lambda g, x, **how: g.broadcast_async(x, 3, **how).wait(),
    "barrier_async": lambda g, x, **how: g.barrier_async(**how).wait(),
}
SECONDS = 0.25


def plain(call: Callable[..., Any], group: GroupCoordinator) -> Any:
    """By the fast path, where there is one."""
    return call(group, torch.ones(8))


def with_timeout(call: Callable[..., Any], group: GroupCoordinator) -> Any:
    """With a deadline of its own."""
    return call(group, torch.ones(8), timeout=SECONDS)


def strided(call: Callable[..., Any], group: GroupCoordinator) -> Any:
    """By the general path."""
    return call(group, torch.ones(16)[::2])


WAYS = (plain, with_timeout, strided)


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_late_rank_is_a_timeout_and_no_mismatch(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that made one call on different paths, and wait for the last one, agree that they made one call."""
    read = Failures._read_faults
    monkeypatch.setattr(Failures, "_read_faults", lambda self, awaited, *, wait: read(self, awaited, wait=min(wait, 0.3)))
    ended = threading.Barrier(4)

    def body(group: GroupCoordinator) -> str:
        group.barrier(timeout=20)
        try:
            if group.rank < 3:
                WAYS[group.rank](COLLECTIVES[name], group)
        except cg.CollectiveError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            ended.wait(20)
        return "done"

    first, *others, _ = on(4, body, timeout=40, host_timeout=timedelta(seconds=SECONDS), **options)
    assert first.startswith("CollectiveTimeoutError"), first
    for told in others:
        # A rank that only has to give its part need not wait.
        only_gives = name == "reduce" or name.startswith("gather")
        assert told.startswith("CollectiveTimeoutError") or (only_gives and told == "done"), told


# Each call on rank 0 and an equal one, which takes another path, on rank 1; rank 2 is late. Results have 24 elements where x has 8.
X, STRIDED = torch.ones(24), torch.ones(48)[::2]
EQUAL_CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "all_gather, out": (lambda g: g.all_gather(X), lambda g: g.all_gather(X, out=torch.empty(72))),
    "all_gather, strided out": (lambda g: g.all_gather(X), lambda g: g.all_gather(X, out=torch.empty(144)[::2], timeout=SECONDS)),
    "all_gather_async, out": (lambda g: g.all_gather(X), lambda g: g.all_gather_async(STRIDED, out=torch.empty(72)).wait()),
    "all_gatherv, sizes": (lambda g: g.all_gatherv(X), lambda g: g.all_gatherv(STRIDED, 0, [24, 24, 24], timeout=SECONDS)),
    "all_gatherv, gradient": (lambda g: g.all_gatherv(X), lambda g: g.all_gatherv(X.clone().requires_grad_())),
    "all_gather of a list": (lambda g: g.all_gather([X, X]), lambda g: g.all_gather([STRIDED, X], timeout=SECONDS)),
    "reduce_scatter, out": (lambda g: g.reduce_scatter(X), lambda g: g.reduce_scatter(X, out=torch.empty(8))),
    "reduce_scatter, strided out": (lambda g: g.reduce_scatter(X), lambda g: g.reduce_scatter(STRIDED, out=torch.empty(16)[::2])),
    "reduce_scatter_async, out": (lambda g: g.reduce_scatter(X), lambda g: g.reduce_scatter_async(X, out=torch.empty(8)).wait()),
    "reduce_scatter, gradient": (lambda g: g.reduce_scatter(X), lambda g: g.reduce_scatter(X.clone().requires_grad_())),
    "all_to_all, out": (lambda g: g.all_to_all(X), lambda g: g.all_to_all(X, out=torch.empty(24), timeout=SECONDS)),
    "all_to_all, strided out": (lambda g: g.all_to_all(X), lambda g: g.all_to_all(STRIDED, out=torch.empty(48)[::2])),
    "all_to_all_async, out": (lambda g: g.all_to_all(X), lambda g: g.all_to_all_async(STRIDED, out=torch.empty(24)).wait()),
    "all_to_all, gradient": (lambda g: g.all_to_all(X), lambda g: g.all_to_all(X.clone().requires_grad_())),
    "all_to_all, sizes": (
        lambda g: g.all_to_all(X, input_sizes=[8, 8, 8], output_sizes=[8, 8, 8]),
        lambda g: g.all_to_all(STRIDED, input_sizes=(8, 8, 8), output_sizes=(8, 8, 8)),
    ),
    "all_reduce, gradient": (lambda g: g.all_reduce(X), lambda g: g.all_reduce(X.clone().requires_grad_())),
    "all_reduce, timedelta": (lambda g: g.all_reduce(X), lambda g: g.all_reduce(STRIDED, timeout=timedelta(seconds=SECONDS))),
    "all_reduce of a list": (lambda g: g.all_reduce([X, X]), lambda g: g.all_reduce([STRIDED, X], timeout=SECONDS)),
    "all_reduce_ of a list": (lambda g: g.all_reduce_([X.clone()]), lambda g: g.all_reduce_([torch.ones(48)[::2]], timeout=SECONDS)),
    "large all_reduce": (lambda g: g.all_reduce(torch.ones(200_000)), lambda g: g.all_reduce(torch.ones(400_000)[::2])),
    "large all_gather": (lambda g: g.all_gather(torch.ones(200_000)), lambda g: g.all_gather(torch.ones(400_000)[::2])),
    "broadcast_async": (lambda g: g.broadcast(X.clone()), lambda g: g.broadcast_async(torch.ones(48)[::2], timeout=SECONDS).wait()),
    "scatter": (lambda g: g.scatter(None, 2), lambda g: g.scatter(None, 2, timeout=SECONDS)),
    "gather_async": (lambda g: g.gather(X, 2), lambda g: g.gather_async(STRIDED, 2, sizes=[24, 24, 24], dim=0).wait()),
    "barrier_async": (lambda g: g.barrier(), lambda g: g.barrier_async(timeout=SECONDS).wait()),
    "broadcast_object": (lambda g: g.broadcast_object(None, 2), lambda g: g.broadcast_object(None, 2, timeout=SECONDS)),
    "all_gather_object": (lambda g: g.all_gather_object(1), lambda g: g.all_gather_object("1", timeout=SECONDS)),
    "broadcast_tensor_dict": (lambda g: g.broadcast_tensor_dict(None, 2), lambda g: g.broadcast_tensor_dict(None, 2, timeout=SECONDS)),
}


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
def test_equal_calls_on_other_paths_are_late_and_do_not_differ(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read = Failures._read_faults
    monkeypatch.setattr(Failures, "_read_faults", lambda self, awaited, *, wait: read(self, awaited, wait=min(wait, 0.3)))

    def cell(calls: tuple[Callable[..., Any], Callable[..., Any]]) -> list[str]:
        ended = threading.Barrier(3)

        def body(group: GroupCoordinator) -> str:
            group.barrier(timeout=20)
            try:
                if group.rank < 2:
                    calls[group.rank](group)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            finally:
                ended.wait(20)
            return "done"

        return on(3, body, timeout=40, host_timeout=timedelta(seconds=SECONDS), **options)[:2]

    with ThreadPoolExecutor(10) as pool:
        told = dict(zip(EQUAL_CALLS, pool.map(cell, EQUAL_CALLS.values()), strict=True))
    # Who only gives need not wait.
    right = ("CollectiveTimeoutError", "done")
    assert {name: said for name, said in told.items() if not all(text.startswith(right) for text in said)} == {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_ranks_on_different_paths_meet(name: str, way: Callable[..., Any]) -> None:
    def patient(group: GroupCoordinator, x: torch.Tensor, **how: float) -> Any:
        return COLLECTIVES[name](group, x, **dict.fromkeys(how, 20))

    def body(group: GroupCoordinator) -> None:
        for _ in range(2):
            (way if group.rank == 1 else plain)(patient, group)
        group.barrier()

    on(4, body, timeout=40)


# Python calls

AT_MOST: dict[str, tuple[Callable[[GroupCoordinator], Any], int]] = {
    "all_reduce": (lambda g: g.all_reduce(torch.ones(4)), 1),
    "all_reduce with a deadline": (lambda g: g.all_reduce(torch.ones(4), timeout=20), 1),
    "all_reduce_": (lambda g: g.all_reduce_(torch.ones(4)), 1),
    "reduce_scatter": (lambda g: g.reduce_scatter(torch.ones(4)), 1),
    "all_gather": (lambda g: g.all_gather(torch.ones(4)), 1),
    "all_to_all": (lambda g: g.all_to_all(torch.ones(4)), 1),
    "broadcast": (lambda g: g.broadcast(torch.ones(4)), 1),
    "barrier": (lambda g: g.barrier(), 1),
    "gather": (lambda g: g.gather(torch.ones(4)), 30),
    "all_gatherv": (lambda g: g.all_gatherv(torch.ones(4)), 30),
    "reduce": (lambda g: g.reduce(torch.ones(4)), 30),
}


@pytest.mark.parametrize("name", AT_MOST)
def test_a_call_enters_few_functions(name: str) -> None:
    call, most = AT_MOST[name]

    def body(group: GroupCoordinator) -> int:
        if group._fast is None:
            pytest.skip("there is no native module")
        for _ in range(3):
            call(group)
        return count_calls(lambda: call(group))

    counted = on(2, body)
    assert all((found == 1) if most == 1 else (found <= most) for found in counted), counted


class Twice(torch.autograd.Function):
    """A layer that reduces inside of its forward, where grad mode is off and x still requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[torch.Tensor], Any], counted: list[int]) -> torch.Tensor:
        assert x.requires_grad
        counted.append(count_calls(lambda: call(x)))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 2, None, None


FORWARD: dict[str, Callable[[GroupCoordinator, torch.Tensor], Any]] = {
    "all_reduce": lambda g, x: g.all_reduce(x),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x),
    "all_gather": lambda g, x: g.all_gather(x),
    "all_to_all": lambda g, x: g.all_to_all(x),
    "broadcast": lambda g, x: g.broadcast(x.clone().requires_grad_()),
    "all_reduce_": lambda g, x: g.all_reduce_(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("name", FORWARD)
def test_in_the_forward_of_a_function_the_fast_path_serves(name: str) -> None:
    def body(group: GroupCoordinator) -> list[int]:
        if group._fast is None:
            pytest.skip("there is no native module")
        counted: list[int] = []
        for _ in range(2):  # the first one has the call described
            x = torch.ones(4, requires_grad=True)
            Twice.apply(x, lambda x: FORWARD[name](group, x), counted).sum().backward()  # type: ignore[no-untyped-call]  # torch's
        return counted

    assert [counted[-1] for counted in on(2, body)] == [1, 1]


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"])
def test_with_a_gradient_the_fast_path_serves_below_autograd(name: str) -> None:
    """And the derivative, too."""

    def body(group: GroupCoordinator) -> None:
        fast = group._fast
        if fast is None:
            pytest.skip("there is no native module")
        calls = Native(fast)
        object.__setattr__(group, "_fast", calls)
        x = torch.ones(4, requires_grad=True)
        y = FORWARD[name](group, x)
        (y * torch.ones_like(y)).sum().backward()  # whose gradient is plain; that of a sum alone is expanded
        object.__setattr__(group, "_fast", fast)
        assert len(calls.served) == 2, calls.served
        assert x.grad is not None

    on(2, body)


class Native:
    """Native calls, and a list of those that served."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.served: list[str] = []

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self.fast, name)

        def call(*args: Any) -> Any:
            found = inner(*args)
            if found is not None:
                self.served.append(name)
            return found

        return call
