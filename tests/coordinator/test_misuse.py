"""Bad input: refused before anything is sent, and the group works afterwards; refused on one rank only, the others are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.testing import spmd
from tests.helpers import again_if_late, in_time

X = torch.ones(4, 6)
REFUSED = (cg.UnsupportedTensorError, ValueError, TypeError)

# What is called, and what its message must name beside operation and group.
BAD: dict[str, tuple[Callable[[cg.GroupCoordinator], Any], str]] = {
    "no tensor": (lambda g: g.all_reduce(1.0), "float"),
    "meta": (lambda g: g.all_reduce(X.to("meta")), "meta"),
    "sparse": (lambda g: g.all_gather(X.to_sparse()), "sparse"),
    "gradient": (lambda g: g.all_reduce_(X.clone().requires_grad_()), "leaf"),
    "reduction": (lambda g: g.all_reduce(X, op="mean"), "'mean'"),
    "average of integers": (lambda g: g.all_reduce(torch.ones(2, dtype=torch.int32), op="avg"), "int32"),
    "maximum of complex": (lambda g: g.all_reduce_(torch.ones(2, dtype=torch.complex64), op="max"), "order"),
    "expanded in place": (lambda g: g.all_reduce_(torch.ones(1).expand(3)), "expanded"),
    "dim": (lambda g: g.all_gather(X, 2), "dim=2"),
    "dim of a scalar": (lambda g: g.all_gather(torch.tensor(1.0)), "reshape"),
    "uneven reduce_scatter": (lambda g: g.reduce_scatter(torch.ones(3, 5), 1), "5"),
    "sum of sizes": (lambda g: g.reduce_scatterv(X, 0, [1, 2]), "[1, 2]"),
    "number of sizes": (lambda g: g.all_gatherv(X, 0, [4]), "[4]"),
    "own size": (lambda g: g.all_gatherv(X, 0, [5, 5]), "[5, 5]"),
    "negative size": (lambda g: g.reduce_scatterv(X, 0, [5, -1]), "-1"),
    "out's shape": (lambda g: g.all_gather(X, 0, out=torch.empty(4, 6)), "(8, 6)"),
    "out's dtype": (lambda g: g.reduce_scatter(X, 0, out=torch.empty(2, 6, dtype=torch.float64)), "float64"),
    "src": (lambda g: g.broadcast(X, 2), "src=2"),
    "src no integer": (lambda g: g.broadcast(X, 1.0), "1.0"),
    "dst": (lambda g: g.gather(X, -1), "dst=-1"),
    "to itself": (lambda g: g.send(X, g.rank_in_group), "itself"),
    "from itself": (lambda g: g.recv_object(g.rank_in_group), "itself"),
    "object src": (lambda g: g.broadcast_object(1, 7), "src=7"),
    "object": (lambda g: g.all_gather_object(lambda: None), "pickle"),
    "list": (lambda g: g.broadcast_object_list((1, 2)), "tuple"),
    "dict": (lambda g: g.send_tensor_dict([X]), "list"),
    "output sizes": (lambda g: g.all_to_all(X, input_sizes=[1, 3]), "output_sizes"),
    "uneven all_to_all": (lambda g: g.all_to_all(torch.ones(3, 5), scatter_dim=1), "5"),
    "size": (lambda g: g.recv((-1,), torch.float32), "-1"),
    "device": (lambda g: g.recv(3, torch.float32, device="meta"), "meta"),
    "timeout": (lambda g: g.barrier(timeout=-1), "timeout=-1"),
    "timeout's type": (lambda g: g.all_reduce(X, timeout="1s"), "1s"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_on_every_rank_is_refused_and_the_group_goes_on(name: str) -> None:
    call, named = BAD[name]

    def program(world: cg.World) -> tuple[str, float]:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        with pytest.raises(REFUSED) as caught:
            call(tp)
        # Nothing was sent: what comes next pairs with what comes next.
        assert tp.broadcast_object(world.rank, 1) == 1
        return str(caught.value), tp.all_reduce(torch.ones(1)).item()

    for message, total in spmd(program, 2):
        assert total == 2
        assert "'tp'" in message
        assert named in message


@pytest.mark.parametrize("name", ["meta", "reduction", "dim", "object src", "uneven all_to_all"])
def test_bad_input_on_one_rank_ends_the_others_in_time_and_for_good(name: str) -> None:
    call, _ = BAD[name]

    def program(world: cg.World) -> bool:
        tp = world.context(cg.Layout(3, tp=3), name="main").tp
        if world.rank == 1:
            with pytest.raises(REFUSED):
                call(tp)
            # It goes on to its next call, which must not be taken for the one that it did not make.
        with pytest.raises((cg.CollectiveTimeoutError, cg.CollectiveMismatchError)) as first:
            tp.all_reduce(torch.ones(5 if world.rank == 1 else 4), timeout=2)
        with pytest.raises(type(first.value)):
            tp.barrier()
        return True

    assert spmd(program, 3) == [True] * 3


def test_one_rank_checks_its_arguments_all_the_same() -> None:
    with cg.World.from_env({}) as world, world.context(cg.Layout(1), name="main") as ctx:
        for call in (
            lambda: ctx.tp.all_reduce(X, op="mean"),
            lambda: ctx.tp.all_gather(X, 5),
            lambda: ctx.tp.send(X),
            lambda: ctx.tp.recv(3, torch.float32),
            lambda: ctx.tp.send_object(1, 0),
            ctx.tp.recv_tensor_dict,
        ):
            with pytest.raises(ValueError, match="'tp'"):
                call()
        out = torch.empty(4, 6)
        assert ctx.tp.all_gather(X, 0, out=out) is out
        assert torch.equal(out, X)
        assert ctx.tp.all_gather_object(3) == [3]
        assert ctx.tp.broadcast_object_list([1, 2]) == [1, 2]


@again_if_late
def test_with_check_a_different_call_raises_on_every_rank_at_once_and_says_where() -> None:
    options = cg.CommunicatorOptions(check=True)

    def program(world: cg.World) -> str:
        tp = world.context(cg.Layout(3, tp=3), name="main", options=options).tp
        tp.barrier()
        started = time.monotonic()
        with pytest.raises(cg.CollectiveMismatchError) as caught:
            tp.all_reduce(torch.ones(5 if world.rank == 2 else 4))
        in_time(time.monotonic() - started, 2)
        assert caught.value.sequence == 1
        return str(caught.value)

    for message in spmd(program, 3):
        assert "rank 2: call #1, all_reduce(sum torch.float32 (5,))" in message
        assert "rank 0: call #1, all_reduce(sum torch.float32 (4,))" in message
        assert "test_misuse.py:" in message
        assert "'tp'" in message


def test_without_check_a_skipped_call_ends_at_the_deadline_and_says_who_was_where() -> None:
    def program(world: cg.World) -> str:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        call = tp.all_reduce if world.rank == 0 else tp.all_gather
        with pytest.raises((cg.CollectiveTimeoutError, cg.CollectiveMismatchError)) as caught:
            call(torch.ones(4), timeout=1.5)
        return str(caught.value)

    for message in spmd(program, 2):
        assert "all_reduce" in message
        assert "all_gather" in message


def test_a_receive_that_runs_out_keeps_its_place() -> None:
    ran_out = threading.Semaphore(0)

    def program(world: cg.World) -> list[Any]:
        tp = world.context(cg.Layout(2, tp=2), name="main").tp
        got: list[Any] = []
        if world.rank == 0:
            assert ran_out.acquire(timeout=30)
            tp.broadcast_object("first", 0)
            assert ran_out.acquire(timeout=30)
            tp.send_object("second", 1)
            return got
        receives: tuple[Callable[[], Any], ...] = (
            lambda: tp.broadcast_object(None, 0, timeout=0.1),
            lambda: tp.recv_object(0, timeout=0.1),
        )
        for receive in receives:
            tries = 0
            while True:
                tries += 1
                try:
                    got.append(receive())
                    break
                except cg.CollectiveTimeoutError:
                    assert tries < 200
                    if tries == 1:
                        ran_out.release()
            assert tries > 1
        return got

    assert spmd(program, 2)[1] == ["first", "second"]


class Thing:
    """Picklable, and no plain data."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]  # equal by class alone


def test_between_hosts_only_plain_data_travels_without_an_authkey(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"a": (1, 2.5, None), "b": [b"x", {"y"}], "t": torch.bfloat16}

    def without(world: cg.World) -> Any:
        assert world.node_count == 2
        with pytest.raises(TypeError, match="authkey"):
            world.group.all_gather_object(Thing())
        return world.group.broadcast_object(plain if world.rank == 0 else None)

    assert spmd(without, 2, nodes=2) == [plain, plain]
    monkeypatch.setenv("COMMGRAPH_AUTHKEY", "secret")
    assert spmd(lambda world: world.group.all_gather_object(Thing()), 2, nodes=2) == [[Thing(), Thing()]] * 2


def test_slices_of_a_tensor_dict_are_gathered_and_overrides_are_kept() -> None:
    sent: dict[str, Any] = {
        "hidden": torch.arange(12.0).view(3, 4),
        "odd": torch.arange(3),
        "nested": {"residual": torch.ones(8)},
        "empty": torch.empty(0, 4),
        "n": 7,
    }

    def program(world: cg.World) -> Any:
        ctx = world.context(cg.Layout(4, pp=2, tp=2), name="main")
        before = ctx.pp.bytes_sent
        how: dict[str, Any] = {"all_gather_group": ctx.tp, "all_gather_tensors": {"nested.residual": False}}
        if ctx.pp.is_first_rank:
            ctx.pp.send_tensor_dict(sent, **how)
            return ctx.pp.bytes_sent - before
        got = ctx.pp.recv_tensor_dict(**how)
        assert list(got) == list(sent)
        assert got["n"] == 7
        assert torch.equal(got["nested"]["residual"], sent["nested"]["residual"])
        return all(torch.equal(got[name], sent[name]) for name in ("hidden", "odd", "empty"))

    first, *_, last = spmd(program, 4)
    assert last is True
    # Half of `hidden`, all of the others, and the description.
    assert 24 + 24 + 32 < first < 24 + 24 + 32 + 1024
