"""The record of calls: every operation once, in order, with what it moved; readable from outside; nothing where it is off."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.shm import recorder as layout
from commgraph.shm.recorder import COLLECTIVE, DONE, INCOMING, OUTGOING, runs_of
from commgraph.testing import spmd
from commgraph.trace.read import Call, Group, RankRecord, calls_of, parse, read_file, read_process

Expected = tuple[str, int, int, str, tuple[int, ...], int]
"""Operation, kind, peer, dtype, shape, bytes (-1: at least one)."""


@attrs.frozen
class Form:
    """An operation of a program: what to call, and what a rank's record of it holds."""

    call: Callable[[cg.GroupCoordinator, torch.Tensor, int], Any]
    expect: Callable[[cg.GroupCoordinator, torch.Tensor, int], list[Expected]]


def collective(name: str, call: Callable[[cg.GroupCoordinator, torch.Tensor, int], Any], *, rooted: bool = False) -> tuple[str, Form]:
    def expect(g: cg.GroupCoordinator, x: torch.Tensor, root: int) -> list[Expected]:
        return [(name, COLLECTIVE, root if rooted else -1, str(x.dtype).removeprefix("torch."), tuple(x.shape), x.nbytes)]

    return name, Form(call, expect)


def of_objects(name: str, call: Callable[[cg.GroupCoordinator, torch.Tensor, int], Any], *, rooted: bool = False) -> tuple[str, Form]:
    return name, Form(call, lambda g, x, root: [(name, COLLECTIVE, root if rooted else -1, "", (), -1)])


def ring(g: cg.GroupCoordinator, x: torch.Tensor, going: Callable[..., Any], coming: Callable[..., Any]) -> None:
    """Even ranks send first."""
    for step in (going, coming) if g.rank_in_group % 2 == 0 else (coming, going):
        step()


def ring_of(sent: str, received: str, dtype: bool, size: Callable[[torch.Tensor], int]) -> Callable[..., list[Expected]]:
    def expect(g: cg.GroupCoordinator, x: torch.Tensor, root: int) -> list[Expected]:
        kind, shape = (str(x.dtype).removeprefix("torch."), tuple(x.shape)) if dtype else ("", ())
        going = (sent, OUTGOING, g.next_in_group, kind, shape, size(x))
        coming = (received, INCOMING, g.prev_in_group, kind, shape, size(x))
        return [going, coming] if g.rank_in_group % 2 == 0 else [coming, going]

    return expect


FORMS: dict[str, Form] = dict(
    [
        collective("all_reduce", lambda g, x, root: g.all_reduce(x)),
        collective("all_reduce_", lambda g, x, root: g.all_reduce_(x, op="max")),
        collective("reduce", lambda g, x, root: g.reduce(x, root), rooted=True),
        collective("all_gather", lambda g, x, root: g.all_gather(x, 0)),
        collective("all_gatherv", lambda g, x, root: g.all_gatherv(x, 0)),
        collective("gather", lambda g, x, root: g.gather(x, root, 0), rooted=True),
        collective("broadcast", lambda g, x, root: g.broadcast(x, root), rooted=True),
        of_objects("broadcast_object", lambda g, x, root: g.broadcast_object([1, 2], root), rooted=True),
        of_objects("all_gather_object", lambda g, x, root: g.all_gather_object(g.rank)),
        of_objects("gather_object", lambda g, x, root: g.gather_object("x", root), rooted=True),
        of_objects("dispatch", lambda g, x, root: g.dispatch(x, x)),
    ]
)
FORMS |= {
    "strided": Form(
        lambda g, x, root: g.all_reduce(torch.stack([x, x], -1)[..., 0]),
        lambda g, x, root: [("all_reduce", COLLECTIVE, -1, str(x.dtype).removeprefix("torch."), tuple(x.shape), x.nbytes)],
    ),
    "with a timeout": Form(
        lambda g, x, root: g.all_reduce(x, timeout=50),
        lambda g, x, root: [("all_reduce", COLLECTIVE, -1, str(x.dtype).removeprefix("torch."), tuple(x.shape), x.nbytes)],
    ),
    "asynchronous": Form(
        lambda g, x, root: (g.all_reduce_async(x).wait(), g.all_gather_async(x, 0).wait()),
        lambda g, x, root: [
            (name, COLLECTIVE, -1, str(x.dtype).removeprefix("torch."), tuple(x.shape), x.nbytes) for name in ("all_reduce", "all_gather")
        ],
    ),
    "list": Form(
        lambda g, x, root: g.all_reduce([x, x]),
        lambda g, x, root: [("all_reduce", COLLECTIVE, -1, str(x.dtype).removeprefix("torch."), tuple(x.shape), 2 * x.nbytes)],
    ),
    "scatter": Form(
        lambda g, x, root: g.scatter(torch.cat([x] * g.world_size) if g.rank_in_group == root else None, root, 0),
        lambda g, x, root: [
            (
                "scatter",
                COLLECTIVE,
                root,
                str(x.dtype).removeprefix("torch."),
                (x.shape[0] * (g.world_size if g.rank_in_group == root else 1), *x.shape[1:]),
                x.nbytes * (g.world_size if g.rank_in_group == root else 1),
            )
        ],
    ),
    "barrier": Form(lambda g, x, root: g.barrier(), lambda g, x, root: [("barrier", COLLECTIVE, -1, "", (), 0)]),
    "send, recv": Form(
        lambda g, x, root: ring(g, x, lambda: g.send(x), lambda: g.recv(x.shape, x.dtype)),
        ring_of("send", "recv", True, lambda x: x.nbytes),
    ),
    "objects": Form(
        lambda g, x, root: ring(g, x, lambda: g.send_object({"a": 1}, g.next_in_group), lambda: g.recv_object(g.prev_in_group)),
        ring_of("send_object", "recv_object", False, lambda x: -1),
    ),
    "dicts": Form(
        lambda g, x, root: ring(g, x, lambda: g.send_tensor_dict({"x": x, "n": 1}), g.recv_tensor_dict),
        ring_of("send_tensor_dict", "recv_tensor_dict", False, lambda x: -1),
    ),
    "broadcast_tensor_dict": Form(
        lambda g, x, root: g.broadcast_tensor_dict({"x": x, "n": (1, 2)} if g.rank_in_group == root else None, root),
        lambda g, x, root: [("broadcast_tensor_dict", COLLECTIVE, root, "", (), -1)],
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float64)
STEPS = st.tuples(
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(("tp", "pp", "world")),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
)


def fits(call: Call, expected: Expected) -> bool:
    operation, kind, peer, dtype, shape, nbytes = expected
    fine = call.nbytes > 0 if nbytes < 0 else call.nbytes == nbytes
    return (call.operation, call.kind, call.dtype, call.shape, call.peer) == (operation, kind, dtype, shape, peer) and fine


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=14), nodes=st.sampled_from((1, 2, 4)), shm=st.booleans())
def test_a_record_holds_each_operation_once_and_in_order(
    steps: list[tuple[str, str, list[int], torch.dtype]], nodes: int, shm: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("record")

    def body(world: cg.World) -> list[tuple[str, Expected]]:
        options = cg.CommunicatorOptions(record=str(folder), shm=shm)
        expected: list[tuple[str, Expected]] = []
        with world.context(cg.Layout(4, tp=2, pp=2), name="target", options=options) as context:
            for i, (form, group, shape, dtype) in enumerate(steps):
                g, x = context[group], torch.ones(shape, dtype=dtype)
                FORMS[form].call(g, x.clone(), i % g.world_size)
                expected += [(f"target/{group}", one) for one in FORMS[form].expect(g, x, i % g.world_size)]
        return expected

    told = spmd(body, 4, nodes=nodes)
    records = {record.rank: record for record in map(read_file, folder.glob("*.cgrecord"))}
    assert sorted(records) == [0, 1, 2, 3]
    assert len({record.world for record in records.values()}) == 1
    for rank, expected in enumerate(told):
        *calls, last = calls_of(records[rank])
        assert last.operation == "close"
        assert [call.group.label for call in calls] == [label for label, _ in expected], steps
        for call, (_, one) in zip(calls, expected, strict=True):
            assert fits(call, one), (call, one)
            assert call.state == DONE
            assert 0 < call.begin <= call.end
            assert "test_record.py" in call.site or "asynchronous" in str(steps), call
        for label in {call.group.label for call in calls}:
            numbers = [call.sequence for call in calls if call.group.label == label and call.kind == COLLECTIVE]
            assert numbers == sorted(set(numbers)), numbers


def test_records_in_memory_are_read_from_outside_and_go_with_the_world() -> None:
    def body(world: cg.World) -> list[list[str]]:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=True)) as context:
            context.tp.all_reduce(torch.ones(3))
            found = {record.rank: record for record in read_process(os.getpid()) if record.facts["world"] == world._builder.name}
            context.tp.barrier()
        return [[call.what for call in calls_of(found[rank])] for rank in (0, 1)]

    for said in spmd(body, 2):
        assert said[0][0] == said[1][0] == "a/tp all_reduce #0"
    assert not [name for name in os.listdir("/dev/shm") if "record" in name]
    gc.collect()  # coordinators refer to each other
    assert read_process(os.getpid()) == []


def test_nothing_is_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def body(world: cg.World) -> list[Any]:
        with (
            world.context(cg.Layout(2, tp=2), name="a") as context,
            world.context(cg.Layout(2, tp=2), name="b", options=cg.CommunicatorOptions(record=False)) as other,
        ):
            return [world.group._state.recorder, context.tp._state.recorder, other.tp._state.recorder]

    assert spmd(body, 2)[0] == [None, None, None]
    monkeypatch.setenv("COMMGRAPH_RECORD", str(tmp_path))
    asked = spmd(body, 2)[0]
    assert asked[0] is not None
    assert asked[1] is not None
    assert asked[2] is None
    records = [read_file(path) for path in tmp_path.glob("*.cgrecord")]
    assert {record.rank for record in records} == {0, 1}
    assert {call.operation for record in records for call in calls_of(record)} == {"close"}


def test_a_world_has_one_record(tmp_path: Path) -> None:
    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=True)):
            world.context(cg.Layout(2, tp=2), name="b", options=cg.CommunicatorOptions(record=tmp_path))

    with pytest.raises(cg.ConfigurationError, match="recorded already, in memory"):
        spmd(body, 2)


def test_the_ring_keeps_the_latest_and_what_is_under_way(tmp_path: Path) -> None:
    def record_of_rank_0() -> RankRecord:
        (record,) = [record for record in map(read_file, tmp_path.glob("*.cgrecord")) if record.rank == 0]
        return record

    def body(world: cg.World) -> None:
        options = cg.CommunicatorOptions(record=tmp_path, record_calls=64)
        with world.context(cg.Layout(2, tp=2), name="a", options=options) as context:
            coming = context.tp.irecv(1, torch.float32) if world.rank == 0 else None
            while coming is not None and not any(call.operation == "irecv" for call in calls_of(record_of_rank_0())):
                time.sleep(0.001)  # its thread begins when the machine lets it
            for _ in range(300):
                context.tp.barrier()
            if coming is None:
                context.tp.send(torch.ones(1), 0)
            else:
                coming.wait()

    spmd(body, 2)
    record = record_of_rank_0()
    calls = list(calls_of(record))
    assert len(calls) == 64
    assert calls[0].operation == "irecv"
    assert [call.sequence for call in calls[1:-1]] == list(range(300 - 62, 300))
    assert record.begun >= 302  # numbers of entries that were under way are passed over
    assert record.dropped == 0


def test_clocks_of_hosts_are_compared(tmp_path: Path) -> None:
    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            context.tp.barrier()

    spmd(body, 2, nodes=2)
    first, second = sorted(map(read_file, tmp_path.glob("*.cgrecord")), key=lambda record: record.rank)
    assert first.clock_error == 0
    assert second.clock_error > 0
    assert abs(first.to_real - second.to_real) <= second.clock_error + 1_000_000  # one machine: the clocks do not differ


def test_a_queue_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMMGRAPH_RECORD", str(tmp_path))
    with cg.MessageQueue.create(1) as queue, cg.MessageQueue.attach(queue.handle, 0) as reader:
        with pytest.raises(cg.CollectiveTimeoutError):
            reader.dequeue(timeout=0.01)
        for i in range(3):
            queue.enqueue(["x" * 100, i])
        assert [reader.dequeue()[1] for _ in range(3)] == [0, 1, 2]
    writer, read = sorted(map(read_file, tmp_path.glob("*.cgrecord")), key=lambda record: record.rank)
    assert [(call.operation, call.sequence, call.nbytes > 100) for call in calls_of(writer)] == [("enqueue", i, True) for i in range(3)]
    assert [(call.operation, call.sequence, call.group.rank_of(call.peer)) for call in calls_of(read)] == [
        ("dequeue", i, 0) for i in range(3)
    ]


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (0, 2, 4), (5,), (0, 1, 4, 5, 8, 9), (3, 1, 2), tuple(range(0, 1000, 8))])
def test_ranks_of_a_group_are_runs(ranks: tuple[int, ...]) -> None:
    runs = tuple((first, last, step) for first, last, step in runs_of(ranks))
    group = Group("", "tp", "u", runs, 0)
    assert group.ranks == ranks
    assert [group.rank_of(i) for i in range(group.size)] == list(ranks)


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"x" * 5000, layout.MAGIC + bytes(4096)):
        with pytest.raises(ValueError, match="a file"):
            parse(data, "a file")
    for wrong in ("", 3, b"x"):
        with pytest.raises(cg.ConfigurationError, match="record="):
            cg.CommunicatorOptions(record=wrong)
    with pytest.raises(cg.ConfigurationError, match="record_calls"):
        cg.CommunicatorOptions(record_calls=1)
