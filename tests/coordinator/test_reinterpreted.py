"""A message is received in the shape in which it was sent, or not at all; and other calls that a rank makes wrong alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.shm import native_module, segments
from commgraph.testing import spmd
from tests.helpers import on

SHAPES: tuple[tuple[list[int], list[int]], ...] = (([2, 6], [3, 4]), ([12], [3, 4]), ([1], []), ([2, 6], [6, 2]), ([2, 6], [2, 6, 1]))
FORMS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], Callable[[Any, list[int]], Any]]] = {
    "plain": (lambda g, x: g.send(x, 1), lambda g, size: g.recv(size, torch.float32, 0)),
    "out": (lambda g, x: g.send(x, 1), lambda g, size: g.recv(size, torch.float32, 0, out=torch.zeros(size))),
    "strided": (lambda g, x: g.send(x.double()[...].float(), 1), lambda g, size: g.recv(size, torch.float32, 0, tag=0, device="cpu")),
    "tag": (lambda g, x: g.send(x, 1, tag=7), lambda g, size: g.recv(size, torch.float32, 0, tag=7)),
    "any": (lambda g, x: g.send(x, 1), lambda g, size: g.recv(size, torch.float32, cg.ANY, timeout=1)),
    "begun": (lambda g, x: g.isend(x, 1).wait(), lambda g, size: g.irecv(size, torch.float32, 0).wait()),
    "batch": (lambda g, x: g.batch([cg.Send(x, 1)]).wait(), lambda g, size: g.batch([cg.Recv(torch.zeros(size), 0)]).wait()),
    "large": (lambda g, x: g.send(x.expand(1 << 16, *x.shape).contiguous(), 1), lambda g, size: g.recv([1 << 16, *size], torch.float32, 0)),
}


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except cg.CollectiveError as error:
        return type(error).__name__
    return "came"


@pytest.mark.parametrize("shm", [True, False])
def test_a_message_keeps_its_shape(shm: bool) -> None:
    if shm and native_module.why_missing() is not None:
        pytest.skip("no native module")
    wrong = []
    for form, (send, receive) in FORMS.items():
        for sent, asked in SHAPES if shm and form == "plain" else SHAPES[:1]:

            def body(g: GroupCoordinator, send: Any = send, receive: Any = receive, sent: Any = sent, asked: Any = asked) -> str:
                x = torch.arange(float(torch.Size(sent).numel())).view(sent)
                return outcome(lambda: receive(g, asked) if g.rank else send(g, x))

            ended = on(2, body, shm=shm, host_timeout=20 if shm else 1)
            if ended[1] not in ("CollectiveMismatchError", *(() if shm and form != "any" else ("CollectiveTimeoutError",))):
                wrong.append((form, sent, asked, ended))
    assert not wrong


@pytest.mark.parametrize("sent", [[2, 6], [12], [], [1], [3, 0, 2]])
def test_every_shape_comes_as_it_was_sent(sent: list[int]) -> None:
    def body(g: GroupCoordinator) -> bool:
        x = torch.randn(sent, generator=torch.Generator().manual_seed(1))
        found = []
        for _ in range(2):  # natively, by the table of shapes that were seen, and generally
            if g.rank:
                found += [g.recv(sent, torch.float32, 0), g.irecv(sent, torch.float32, 0).wait(), g.recv(sent, torch.float32, 0, tag=3)]
            else:
                g.send(x, 1)
                g.isend(x, 1).wait()
                g.send(x, 1, tag=3)
        return all(y.shape == x.shape and torch.equal(x, y) for y in found)

    assert on(2, body) == [True, True]


def test_a_message_to_itself_keeps_its_shape() -> None:
    def body(g: GroupCoordinator) -> str:
        g.isend(torch.ones(2, 6), g.rank_in_group)
        return outcome(lambda: g.irecv([3, 4], torch.float32, g.rank_in_group).wait())

    assert on(2, body) == ["CollectiveMismatchError"] * 2


@pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")
@pytest.mark.parametrize("culprit", ["create", "open_peer"])
def test_memory_that_one_rank_cannot_have(culprit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`empty` raises a public error on every rank, which names the operation and the group, and the group goes on."""
    real = getattr(segments, culprit)
    armed: list[bool] = []

    def fails(*args: int) -> int:
        if armed:
            armed.pop()
            raise (cg.BuildError if culprit == "create" else OSError)("no room")
        return int(real(*args))

    monkeypatch.setattr(segments, culprit, fails)

    def body(g: GroupCoordinator) -> tuple[str, float]:
        if g.rank == 0:
            armed.append(True)
        g.barrier()
        with pytest.raises(cg.BuildError, match=r"empty on group 'tp' \(rank \d, .*rank \d in the group could not") as caught:
            g.empty([1 << 16], torch.float32)
        return str(caught.value), float(g.all_reduce(torch.ones(1)))

    assert [after for _, after in on(3, body)] == [3.0] * 3


def test_dispatch_of_no_tensor() -> None:
    def body(g: GroupCoordinator) -> float:
        for given in (None, 3, [1.0]):
            with pytest.raises(TypeError, match=r"dispatch on group 'tp'.*hidden_states is a"):
                g.dispatch(given, torch.ones(2, 2))
        with pytest.raises(TypeError, match=r"extra_tensors\[0\] is a int"):
            g.dispatch(torch.ones(2, 2), torch.ones(2, 2), extra_tensors=[1])  # type: ignore[list-item]  # the mistake
        with pytest.raises(TypeError, match="extra_tensors is a int"):
            g.dispatch(torch.ones(2, 2), torch.ones(2, 2), extra_tensors=1)
        return float(g.all_reduce(torch.ones(1)))

    assert on(2, body) == [2.0, 2.0]


EMPTY: dict[str, Callable[[GroupCoordinator, torch.Tensor], object]] = {
    "all_reduce": lambda group, x: group.all_reduce(x),
    "all_reduce_": lambda group, x: group.all_reduce_(x),
    "reduce": lambda group, x: group.reduce(x, dst=0),
    "reduce_scatter": lambda group, x: group.reduce_scatter(x, 0),
    "all_gather": lambda group, x: group.all_gather(x, 0),
    "gather": lambda group, x: group.gather(x, dst=2, dim=0),
    "broadcast": lambda group, x: group.broadcast(x, src=1),
    "all_to_all": lambda group, x: group.all_to_all(x),
    "coalesced": lambda group, x: group.all_reduce([x, x]),
    "all_reduce_async": lambda group, x: group.all_reduce_async(x).wait(),
}


@pytest.mark.skipif(native_module.load() is None, reason="no native module: gloo, which does not find it")
@pytest.mark.parametrize("operation", EMPTY)
def test_an_empty_tensor_on_one_rank_gives_nobody_wrong_numbers(operation: str) -> None:
    """Nothing comes of it, in whose place the header of the rank's next call is found. gloo would give the others a result without it."""

    def program(world: cg.World) -> None:
        ctx = world.context(cg.Layout(3, tp=3), name="a")
        x = torch.ones(6, 2) if world.rank != 1 else torch.ones(0, 2)
        waits = world.rank != 1 and (operation not in ("reduce", "gather") or world.rank == {"reduce": 0, "gather": 2}[operation])
        if waits:
            with pytest.raises(cg.CollectiveMismatchError):
                EMPTY[operation](ctx.tp, x)
        else:
            assert EMPTY[operation](ctx.tp, x) is None or world.rank == 1
        with pytest.raises(cg.CollectiveMismatchError):
            ctx.tp.barrier()

    spmd(program, 3, nodes=3, timeout=30)
