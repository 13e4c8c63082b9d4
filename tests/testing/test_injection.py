"""Faults that users inject: they happen at the n-th call of one rank, the others hear of them, and unused they cost nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import Fault, inject_faults, spmd
from commgraph.testing.faults import COUNTED

X = torch.ones(3)
CALLS: dict[str, Callable[[GroupCoordinator], Any]] = {
    "all_reduce": lambda g: g.all_reduce(X),
    "all_gather_async": lambda g: g.all_gather_async(X).wait(),
    "barrier": lambda g: g.barrier(),
    "broadcast_object": lambda g: g.broadcast_object([1], 1),
    "all_gather_object": lambda g: g.all_gather_object(1),
    "broadcast_tensor_dict": lambda g: g.broadcast_tensor_dict({"x": X}, 1),
    "dispatch": lambda g: g.dispatch(X, X),
}


@pytest.mark.parametrize(("name", "shm"), [(name, i % 2 == 0) for i, name in enumerate(CALLS)])
@pytest.mark.parametrize("kind", ["kill", "cut"])
def test_the_others_lose_a_rank_at_its_third_call(kind: str, name: str, shm: bool) -> None:
    shm = shm == (kind == "kill")
    options = cg.CommunicatorOptions(shm=shm, message_queue=shm)

    def program(world: cg.World) -> tuple[int, Exception]:
        tp = world.context(cg.Layout(3, tp=3), name="main", options=options).tp
        for calls in range(1, 10):
            try:
                CALLS[name](tp)
                tp.all_reduce_(torch.ones(1))  # a rank that only puts an object waits for nobody
            except cg.CommGraphError as error:
                return calls, error
        raise AssertionError("nothing has happened")

    results = spmd(program, 3, timeout=20, faults=[Fault(rank=1, call=3, kind=kind, operation=name)])
    assert (results[1] is None) == (kind == "kill")
    for result in results:
        if result is not None:
            calls, error = result
            assert isinstance(error, cg.PeerLostError), error
            assert (calls, error.rank) == (3, 1), error


def test_a_delayed_rank_is_late_and_no_more() -> None:
    def program(world: cg.World) -> tuple[float, float]:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        started = time.monotonic()
        tp.barrier()
        between = time.monotonic()
        assert tp.all_reduce(torch.ones(1)).item() == 2
        return between - started, time.monotonic() - between

    for kind in ("delay", "stop"):  # a thread is not stopped, the others would be, too
        delayed, other = spmd(program, 2, faults=[Fault(rank=0, call=2, kind=kind, seconds=0.3)])
        assert delayed[1] >= 0.3
        assert sum(other) >= 0.3


def test_calls_are_counted_by_operation_and_by_group() -> None:
    faults = (
        Fault(rank=0, call=2, kind="delay", operation="barrier", group="pp", seconds=0.2),
        Fault(rank=0, call=6, kind="delay", seconds=0.4),
        Fault(rank=0, call=1, kind="delay", operation="all_reduce", group="sibling", seconds=0.6),
    )

    def program(world: cg.World) -> list[float]:
        ctx = world.context(cg.Layout(2, tp=2), name="main")
        took = []

        def timed(call: Callable[[], Any]) -> None:
            started = time.monotonic()
            call()
            took.append(time.monotonic() - started)

        for call in (world.group.barrier, ctx.pp.barrier, lambda: ctx.tp.all_reduce(X), ctx.pp.barrier, ctx.tp.barrier, ctx.tp.barrier):
            timed(call)
        sibling = ctx.tp.sibling("sibling")
        timed(lambda: sibling.all_reduce(X))
        return took

    took, _ = spmd(program, 2, faults=faults)
    assert [seconds // 0.2 for seconds in took] == [0, 0, 0, 1, 0, 2, 3]


def test_without_a_fault_of_its_own_a_rank_pays_nothing() -> None:
    def program(world: cg.World) -> list[str]:
        ctx = world.context(cg.Layout(2, tp=2), name="main")
        inject_faults(ctx, Fault(rank=1, kind="delay", call=99))
        return [name for name in COUNTED if name in vars(ctx.tp)]

    assert spmd(program, 2, faults=[Fault(rank=1, kind="cut", call=99)]) == [[], list(COUNTED)]


def test_a_killed_rank_makes_no_more_calls() -> None:
    after: list[str] = []

    def program(world: cg.World) -> str:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        try:
            tp.barrier()
        except cg.PeerLostError:
            return "survived"
        finally:
            if world.rank == 1:
                try:
                    tp.barrier()
                finally:
                    after.append("finally")
        return "not reached"

    assert spmd(program, 2, faults=[Fault(rank=1, kind="kill")]) == ["survived", None]
    assert after == ["finally"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": -1, "kind": "kill"},
        {"rank": 0, "kind": "crash"},
        {"rank": 0, "kind": "kill", "call": 0},
        {"rank": 0, "kind": "kill", "operation": "close"},
        {"rank": 0, "kind": "delay", "seconds": 0},
        {"rank": 0, "kind": "delay", "seconds": "1"},
    ],
)
def test_a_fault_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(cg.ConfigurationError, match="Fault"):
        Fault(**wrong)


def test_a_fault_of_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(cg.ConfigurationError, match="ranks 0 to 1"):
        spmd(lambda world: None, 2, faults=[Fault(rank=2, kind="kill")])
    with pytest.raises(TypeError, match="str"):
        spmd(lambda world: None, 2, faults=["kill"])  # type: ignore[list-item]  # the wrong type is the test
