"""The record of calls: every operation once, in order, with what it moved; readable from outside; nothing where it is off."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.coordinator.operators import OPERATIONS
from commgraph.shm import recorder as layout
from commgraph.shm.recorder import COLLECTIVE, DONE, FAILED, INCOMING, OPEN, OUTGOING, runs_of
from commgraph.testing import spmd
from commgraph.testing.faults import COUNTED
from commgraph.trace.read import Call as RecordedCall
from commgraph.trace.read import Group, RankRecord, calls_of, parse, read_file, read_process

Expected = tuple[str, int, int, str, tuple[int, ...], int]
"""Operation, kind, peer, dtype, shape, bytes (-1: at least one)."""
Call = Callable[[cg.GroupCoordinator, torch.Tensor, int], Any]


@attrs.frozen
class Form:
    """A use of an operation.

    Attributes:
        covers: names of the methods that it calls.
        call: on a group, with a tensor whose rows the ranks of the group divide, and a root.
        expect: what a rank's record of it holds, in any order where it is asynchronous.
    """

    covers: tuple[str, ...]
    call: Call
    expect: Callable[[cg.GroupCoordinator, torch.Tensor, int], list[Expected]]


def kind_of(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def tensors(name: str, call: Call, *, rooted: bool = False, times: int = 1, covers: str = "") -> Form:
    """A collective of one tensor, or of a list of so many."""
    return Form(
        (covers or name,),
        call,
        lambda g, x, root: [(name, COLLECTIVE, root if rooted else -1, kind_of(x), tuple(x.shape), times * x.nbytes)],
    )


def objects(name: str, call: Call, *, rooted: bool = False, covers: tuple[str, ...] = ()) -> Form:
    """A collective of which the record knows the bytes alone."""
    return Form(covers or (name,), call, lambda g, x, root: [(name, COLLECTIVE, root if rooted else -1, "", (), -1)])


def nothing(name: str, call: Call, covers: str = "") -> Form:
    return Form((covers or name,), call, lambda g, x, root: [(name, COLLECTIVE, -1, "", (), 0)])


def messages(sent: str, received: str, call: Call, *, of_tensors: bool) -> Form:
    """Each rank sends to the next one and receives from the one before."""

    def expect(g: cg.GroupCoordinator, x: torch.Tensor, root: int) -> list[Expected]:
        what = (kind_of(x), tuple(x.shape), x.nbytes) if of_tensors else ("", (), -1)
        return [(sent, OUTGOING, g.next_in_group, *what), (received, INCOMING, g.prev_in_group, *what)]

    return Form((sent, received), call, expect)


def ring(g: cg.GroupCoordinator, going: Callable[..., Any], coming: Callable[..., Any]) -> None:
    """Even ranks send first."""
    for step in (going, coming) if g.rank_in_group % 2 == 0 else (coming, going):
        step()


def both(*begun: cg.Work[Any]) -> None:
    for work in begun:
        work.wait()


def split(g: cg.GroupCoordinator, x: torch.Tensor) -> list[int]:
    """Uneven pieces of x."""
    return [len(x) - g.world_size + 1] + [1] * (g.world_size - 1)


def crossing(g: cg.GroupCoordinator, x: torch.Tensor) -> Any:
    """As much from rank i to rank j as the other way."""
    sizes = [len(x) // g.world_size] * g.world_size
    return g.all_to_all(x, input_sizes=sizes, output_sizes=sizes)


def through_experts(g: cg.GroupCoordinator, x: torch.Tensor, sizes: Any) -> None:
    dispatched = g.dispatch(x, x, sizes=sizes)
    g.combine(dispatched[0], dispatched)


def of_both(g: cg.GroupCoordinator, x: torch.Tensor, root: int) -> list[Expected]:
    return [(name, COLLECTIVE, -1, "", (), -1) for name in ("dispatch", "combine")]


def scattered(g: cg.GroupCoordinator, x: torch.Tensor, root: int) -> list[Expected]:
    times = g.world_size if g.rank_in_group == root else 1
    return [("scatter", COLLECTIVE, root, kind_of(x), (len(x) * times, *x.shape[1:]), x.nbytes * times)]


def at(g: cg.GroupCoordinator, root: int, value: Any) -> Any:
    return value if g.rank_in_group == root else None


FORMS: dict[str, Form] = {
    "all_reduce": tensors("all_reduce", lambda g, x, root: g.all_reduce(x)),
    "all_reduce of a list": tensors("all_reduce", lambda g, x, root: g.all_reduce([x, x]), times=2),
    "all_reduce, strided": tensors("all_reduce", lambda g, x, root: g.all_reduce(torch.stack([x, x], -1)[..., 0])),
    "all_reduce, with a timeout": tensors("all_reduce", lambda g, x, root: g.all_reduce(x, timeout=50)),
    "all_reduce_": tensors("all_reduce_", lambda g, x, root: g.all_reduce_(x, op="max")),
    "all_reduce_async": tensors("all_reduce", lambda g, x, root: g.all_reduce_async(x).wait(), covers="all_reduce_async"),
    "reduce": tensors("reduce", lambda g, x, root: g.reduce(x, root), rooted=True),
    "reduce_scatter": tensors("reduce_scatter", lambda g, x, root: g.reduce_scatter(x, 0)),
    "reduce_scatter of a list": tensors("reduce_scatter", lambda g, x, root: g.reduce_scatter([x, x], 0), times=2),
    "reduce_scatter_async": tensors(
        "reduce_scatter", lambda g, x, root: g.reduce_scatter_async(x, 0).wait(), covers="reduce_scatter_async"
    ),
    "reduce_scatterv": tensors("reduce_scatterv", lambda g, x, root: g.reduce_scatterv(x, 0, split(g, x))),
    "all_gather": tensors("all_gather", lambda g, x, root: g.all_gather(x, 0)),
    "all_gather of a list": tensors("all_gather", lambda g, x, root: g.all_gather([x, x], 0), times=2),
    "all_gather_async": tensors("all_gather", lambda g, x, root: g.all_gather_async(x, 0).wait(), covers="all_gather_async"),
    "all_gatherv": tensors("all_gatherv", lambda g, x, root: g.all_gatherv(x, 0)),
    "all_gatherv of a list": tensors("all_gatherv", lambda g, x, root: g.all_gatherv([x, x], 0), times=2),
    "gather": tensors("gather", lambda g, x, root: g.gather(x, root, 0), rooted=True),
    "gather_async": tensors("gather", lambda g, x, root: g.gather_async(x, root, 0).wait(), rooted=True, covers="gather_async"),
    "scatter": Form(("scatter",), lambda g, x, root: g.scatter(at(g, root, torch.cat([x] * g.world_size)), root, 0), scattered),
    "broadcast": tensors("broadcast", lambda g, x, root: g.broadcast(x, root), rooted=True),
    "broadcast of a list": tensors("broadcast", lambda g, x, root: g.broadcast([x, x.clone()], root), rooted=True, times=2),
    "broadcast_async": tensors("broadcast", lambda g, x, root: g.broadcast_async(x, root).wait(), rooted=True, covers="broadcast_async"),
    "all_to_all": tensors("all_to_all", lambda g, x, root: g.all_to_all(x)),
    "all_to_all with sizes": tensors("all_to_all", lambda g, x, root: crossing(g, x)),
    "all_to_all_async": tensors("all_to_all", lambda g, x, root: g.all_to_all_async(x).wait(), covers="all_to_all_async"),
    "barrier": nothing("barrier", lambda g, x, root: g.barrier()),
    "barrier_async": nothing("barrier", lambda g, x, root: g.barrier_async().wait(), "barrier_async"),
    "warmup": nothing("barrier", lambda g, x, root: g.warmup(), "warmup"),
    "sibling": nothing("sibling", lambda g, x, root: g.sibling(f"after {g._state.sequence}")),
    "empty": tensors("empty", lambda g, x, root: g.empty(x.shape, x.dtype)),
    "experts": Form(("dispatch", "combine"), lambda g, x, root: through_experts(g, x, None), of_both),
    "experts, equal": Form(("dispatch", "combine"), lambda g, x, root: through_experts(g, x, "equal"), of_both),
    "send, recv": messages(
        "send", "recv", lambda g, x, root: ring(g, lambda: g.send(x), lambda: g.recv(x.shape, x.dtype)), of_tensors=True
    ),
    "recv from any rank": messages(
        "send",
        "recv",
        lambda g, x, root: ring(g, lambda: g.send(x), lambda: g.recv(x.shape, x.dtype, cg.ANY)),
        of_tensors=True,
    ),
    "isend, irecv": messages(
        "isend", "irecv", lambda g, x, root: both(g.isend(x, tag=3), g.irecv(x.shape, x.dtype, tag=3)), of_tensors=True
    ),
    "sendrecv": messages(
        "sendrecv", "sendrecv", lambda g, x, root: g.sendrecv(x, g.next_in_group, x.shape, x.dtype, g.prev_in_group), of_tensors=True
    ),
    "batch": messages(
        "batch",
        "batch",
        lambda g, x, root: g.batch([cg.Send(x, g.next_in_group), cg.Recv(torch.empty_like(x), g.prev_in_group)]).wait(),
        of_tensors=True,
    ),
    "broadcast_object": objects("broadcast_object", lambda g, x, root: g.broadcast_object([1, 2], root), rooted=True),
    "broadcast_object_list": objects("broadcast_object_list", lambda g, x, root: g.broadcast_object_list([1, 2], root), rooted=True),
    "all_gather_object": objects("all_gather_object", lambda g, x, root: g.all_gather_object(g.rank)),
    "gather_object": objects("gather_object", lambda g, x, root: g.gather_object("x", root), rooted=True),
    "scatter_object": objects("scatter_object", lambda g, x, root: g.scatter_object(at(g, root, ["x"] * g.world_size), root), rooted=True),
    "send_object, recv_object": messages(
        "send_object",
        "recv_object",
        lambda g, x, root: ring(g, lambda: g.send_object({"a": 1}, g.next_in_group), lambda: g.recv_object(g.prev_in_group)),
        of_tensors=False,
    ),
    "isend_object, irecv_object": messages(
        "isend_object",
        "irecv_object",
        lambda g, x, root: both(g.isend_object("x", g.next_in_group), g.irecv_object(g.prev_in_group)),
        of_tensors=False,
    ),
    "broadcast_tensor_dict": objects(
        "broadcast_tensor_dict", lambda g, x, root: g.broadcast_tensor_dict(at(g, root, {"x": x, "n": (1, 2)}), root), rooted=True
    ),
    "send_tensor_dict, recv_tensor_dict": messages(
        "send_tensor_dict",
        "recv_tensor_dict",
        lambda g, x, root: ring(g, lambda: g.send_tensor_dict({"x": x, "n": 1}), g.recv_tensor_dict),
        of_tensors=False,
    ),
    "isend_tensor_dict, irecv_tensor_dict": messages(
        "isend_tensor_dict",
        "irecv_tensor_dict",
        lambda g, x, root: both(g.isend_tensor_dict({"x": x}), g.irecv_tensor_dict()),
        of_tensors=False,
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float64)
STEPS = st.tuples(
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(("tp", "pp", "world")),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
)


def fits(call: RecordedCall, expected: Expected) -> bool:
    operation, kind, peer, dtype, shape, nbytes = expected
    fine = call.nbytes > 0 if nbytes < 0 else call.nbytes == nbytes
    return (call.operation, call.kind, call.dtype, call.shape, call.peer) == (operation, kind, dtype, shape, peer) and fine


def check_record(steps: Sequence[tuple[str, str, list[int], torch.dtype]], nodes: int, shm: bool, folder: Path) -> None:
    """Run a program, and compare what it has called with the records of its ranks."""

    def body(world: cg.World) -> list[tuple[str, list[Expected]]]:
        options = cg.CommunicatorOptions(record=str(folder), shm=shm)
        expected = []
        with world.context(cg.Layout(4, tp=2, pp=2), name="target", options=options) as context:
            for i, (form, group, (rows, *others), dtype) in enumerate(steps):
                g = context[group]
                x = torch.ones((rows * g.world_size, *others), dtype=dtype)
                FORMS[form].call(g, x.clone(), i % g.world_size)
                expected.append((f"target/{group}", FORMS[form].expect(g, x, i % g.world_size)))
        return expected

    told = spmd(body, 4, nodes=nodes)
    records = {record.rank: record for record in map(read_file, folder.glob("*.cgrecord"))}
    assert sorted(records) == [0, 1, 2, 3]
    assert len({record.world for record in records.values()}) == 1
    for rank, expected in enumerate(told):
        *calls, last = calls_of(records[rank])
        assert last.operation == "close"
        for label, ones in expected:
            # What one step calls may begin in any order, where it is asynchronous.
            here, calls = sorted(calls[: len(ones)], key=lambda call: call.kind), calls[len(ones) :]
            for call, one in zip(here, sorted(ones, key=lambda one: one[1]), strict=True):
                assert fits(call, one), (call, one)
                assert call.group.label == label
                assert call.state == DONE
                assert 0 < call.begin <= call.end
                assert "test_record.py" in call.site, call
        assert not calls, calls
        for label in {label for label, _ in expected}:
            numbers = [c.sequence for c in calls_of(records[rank]) if c.group.label == label and c.kind == COLLECTIVE]
            assert numbers == sorted(set(numbers)), numbers


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=14), nodes=st.sampled_from((1, 2, 4)), shm=st.booleans())
def test_a_record_holds_each_operation_once_and_in_order(
    steps: list[tuple[str, str, list[int], torch.dtype]], nodes: int, shm: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_record(steps, nodes, shm, tmp_path_factory.mktemp("record"))


@pytest.mark.parametrize(("nodes", "shm"), [(1, True), (1, False), (2, True)])
def test_a_record_holds_every_operation(nodes: int, shm: bool, tmp_path: Path) -> None:
    """An operation that has no form here fails: the list is that of the class."""
    assert {name for form in FORMS.values() for name in form.covers} == set(COUNTED)
    check_record([(form, ("tp", "world")[i % 2], [2, 3], DTYPES[i % 4]) for i, form in enumerate(FORMS)], nodes, shm, tmp_path)


def in_a_graph(g: cg.GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """Every operation that has a torch operator, of four rows on two ranks."""
    g.barrier()
    g.send(x) if g.is_first_rank else g.recv(x.shape, x.dtype)
    y = g.all_reduce_(x.clone())
    y = y + g.all_reduce(x) + g.broadcast(x.clone(), 1) + g.scatter(torch.cat([x, x]), 0, 0)
    y = y + g.all_gather(g.reduce_scatter(y, 0), 0)
    whole = g.all_gatherv(g.reduce_scatterv(y, 0, [1, 3]), 0, [1, 3])
    assert isinstance(whole, torch.Tensor)
    y = y + whole
    y = y + g.all_to_all(y) + g.all_to_all(y, input_sizes=[2, 2], output_sizes=[2, 2])
    y = y + g.sendrecv(y, g.next_in_group, y.shape, y.dtype, g.prev_in_group)
    gathered, reduced = g.gather(y, 0, 0), g.reduce(y, 0)
    y = y if gathered is None or reduced is None else y + gathered[:4] + reduced
    dispatched = g.dispatch(y, y, sizes="equal")
    return g.combine(dispatched[0], dispatched)


# Methods by the name of their operator, where that differs: of the one, tracing makes a copy of the other.
METHODS = {"all_to_allv": "all_to_all", "reduce_on_one": "reduce", "all_reduce_": "all_reduce"}


def test_a_record_holds_every_operation_of_a_compiled_graph(tmp_path: Path) -> None:
    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="target", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            torch.compile(in_a_graph, backend="eager", fullgraph=True)(context.tp, torch.ones(4, 3))

    spmd(body, 2)
    in_order = "barrier send all_reduce all_reduce broadcast scatter reduce_scatter all_gather reduce_scatterv all_gatherv all_to_all "
    in_order += "all_to_all sendrecv sendrecv gather reduce dispatch combine"
    assert {METHODS.get(name, name) for name in OPERATIONS} == {*in_order.split(), "recv"}
    for record in map(read_file, tmp_path.glob("*.cgrecord")):
        calls = list(calls_of(record))[:-1]
        assert [call.operation for call in calls] == in_order.replace("send", "send" if record.rank == 0 else "recv", 1).split()
        for call in calls:
            assert call.group.label == "target/tp"
            assert "test_record.py" in call.site, call


def test_records_in_memory_are_read_from_outside_and_go_with_the_world() -> None:
    def of(name: str) -> dict[int, RankRecord]:
        return {record.rank: record for record in read_process(os.getpid()) if record.world == name}

    def body(world: cg.World) -> tuple[str, list[list[str]]]:
        name = world._builder.name
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=True)) as context:
            context.tp.all_reduce(torch.ones(3))
            found = of(name)
            context.tp.barrier()
        return name, [[call.what for call in calls_of(found[rank])] for rank in (0, 1)]

    names, said = zip(*spmd(body, 2), strict=True)
    assert [calls[0] for both in said for calls in both] == ["a/tp all_reduce #0"] * 4
    assert not [name for name in os.listdir("/dev/shm") if "record" in name]
    gc.collect()  # coordinators refer to each other
    assert of(names[0]) == {}


def test_nothing_is_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def body(world: cg.World) -> list[Any]:
        with (
            world.context(cg.Layout(2, tp=2), name="a") as context,
            world.context(cg.Layout(2, tp=2), name="b", options=cg.CommunicatorOptions(record=False)) as other,
        ):
            return [world.group._state.records, context.tp._state.records, other.tp._state.records]

    assert spmd(body, 2)[0] == [None, None, None]
    monkeypatch.setenv("COMMGRAPH_RECORD", str(tmp_path))
    asked = spmd(body, 2)[0]
    assert asked[0] is not None
    assert asked[1] is not None
    assert asked[2] is None
    records = [read_file(path) for path in tmp_path.glob("*.cgrecord")]
    assert {record.rank for record in records} == {0, 1}
    assert {call.operation for record in records for call in calls_of(record)} == {"close"}


def frames_of_recording(call: Callable[[], object]) -> list[str]:
    """Names of the Python functions of recording that a call runs."""
    found: list[str] = []

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(("recorded.py", "recorder.py")):
            found.append(frame.f_code.co_qualname)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def plain_calls(g: cg.GroupCoordinator) -> list[Callable[[], object]]:
    """Dicts, messages and objects both ways between two ranks, the first sends first; and collectives."""
    x = torch.ones(4)
    pairs: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: g.send_tensor_dict({"x": x}), g.recv_tensor_dict),
        (lambda: g.send(x), lambda: g.recv(4, torch.float32)),
        (lambda: g.send_object(1, g.next_in_group), lambda: g.recv_object(g.prev_in_group)),
    ]
    messages = [one for pair in pairs for one in (pair if g.is_first_rank else pair[::-1])]
    return [*messages, lambda: g.all_reduce(x), g.barrier, lambda: g.all_gather(x, 0)]


def test_a_plain_call_runs_no_python_of_the_record() -> None:
    """Neither where it is recorded, as native calls write their own entries, nor where it is not."""

    def body(world: cg.World) -> list[list[list[str]]]:
        found = []
        for record in (False, True):
            with world.context(cg.Layout(2, tp=2), name=f"a{record}", options=cg.CommunicatorOptions(record=record)) as context:
                for one in plain_calls(context.tp):
                    one()  # the first calls of a kind prepare what the next ones find
                found.append([frames_of_recording(one) for one in plain_calls(context.tp)])
        return found

    for off, on in spmd(body, 2):
        assert off == on == [[]] * len(off)


def calls_while(folder: Path, rank: int, operation: str) -> RecordedCall:
    """Wait until the last call of a rank is one of that operation, under way, with its place; return it."""
    while True:
        (record,) = [record for record in map(read_file, folder.glob("*.cgrecord")) if record.rank == rank]
        *_, last = [None, *calls_of(record)]
        # A native call that has begun looks for its place only where it waits, which is a moment later.
        if last is not None and (last.operation, last.state) == (operation, OPEN) and last.site:
            return last
        time.sleep(0.001)


def test_a_message_that_is_awaited_shows_what_and_where(tmp_path: Path) -> None:
    """The native call has its entry from its begin on."""
    ways: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "recv": (lambda g: g.recv((2, 3), torch.float64), lambda g: g.send(torch.ones(2, 3).double())),
        "recv_object": (lambda g: g.recv_object(0), lambda g: g.send_object("x", 1)),
        "recv_tensor_dict": (lambda g: g.recv_tensor_dict(), lambda g: g.send_tensor_dict({"x": torch.ones(2)})),
        "broadcast_object": (lambda g: g.broadcast_object(None, 0), lambda g: g.broadcast_object("x", 0)),
    }

    def body(world: cg.World) -> list[RecordedCall]:
        seen = []
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            for operation, (receive, send) in ways.items():
                if world.rank == 0:
                    seen.append(calls_while(tmp_path, 1, operation))
                (send if world.rank == 0 else receive)(context.tp)
        return seen

    seen, _ = spmd(body, 2)
    assert [call.operation for call in seen] == list(ways)
    assert all("test_record.py" in call.site for call in seen)
    first = seen[0]
    assert (first.dtype, first.shape, first.nbytes, first.peer) == ("float64", (2, 3), 48, 0)


def test_the_place_of_a_call_is_outside_of_the_library_but_in_its_programs(tmp_path: Path) -> None:
    """The demo, `commgraph bench` and the like call as a user's program does."""
    package = Path(cg.__file__).parent
    files = {str(package / "demo" / "main.py"): "demo/main.py", str(package / "world.py"): "test_record.py"}

    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            for file in files:
                made: dict[str, Any] = {}
                exec(compile("def call(g): g.all_gather_object(1)", file, "exec"), made)
                made["call"](context.tp)

    spmd(body, 2)
    for record in map(read_file, tmp_path.glob("*.cgrecord")):
        for call, place in zip(calls_of(record), files.values(), strict=False):
            assert place in call.site, call


def test_objects_and_dicts_that_come_in_another_order_are_recorded_once(tmp_path: Path) -> None:
    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            g, x = context.tp, torch.ones(5)
            if world.rank == 0:
                g.send_tensor_dict({"x": x})
                g.send_tensor_dict({"x": x, "not plain": (1, 2)})
                g.send(x)
                g.send_object(b"x" * 100, 1)
            else:
                assert g.recv_object(0) == b"x" * 100
                g.recv(5, torch.float32, 0)
                assert g.recv_tensor_dict(0).keys() == {"x"}
                assert g.recv_tensor_dict(0).keys() == {"x", "not plain"}

    spmd(body, 2)
    sent, came = sorted(map(read_file, tmp_path.glob("*.cgrecord")), key=lambda record: record.rank)
    facts = [{(c.operation.split("_", 1)[-1], c.sequence, c.nbytes) for c in list(calls_of(one))[:-1]} for one in (sent, came)]
    assert [(call.operation, call.sequence, call.state) for call in calls_of(came)][:-1] == [
        ("recv_object", 0, DONE),
        ("recv", 0, DONE),
        ("recv_tensor_dict", 0, DONE),
        ("recv_tensor_dict", 1, DONE),
    ]
    assert {fact for fact in facts[0] if fact[0] != "send"} == {fact for fact in facts[1] if fact[0] != "recv"}


def test_a_poll_in_vain_leaves_no_entry_and_a_mismatch_one_that_failed(tmp_path: Path) -> None:
    def body(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(record=tmp_path)) as context:
            g, other = context.tp, 1 - world.rank
            with pytest.raises(cg.CollectiveTimeoutError):
                g.recv_object(other, timeout=0)
            with pytest.raises(cg.CollectiveTimeoutError):
                g.broadcast_object(None, other, timeout=0)
            g.barrier()
            if world.rank == 0:
                g.broadcast_object("x", 0)
            else:
                with pytest.raises(cg.CollectiveMismatchError):
                    g.broadcast_object_list([None], 0)

    spmd(body, 2)
    first, second = sorted(map(read_file, tmp_path.glob("*.cgrecord")), key=lambda record: record.rank)
    assert [(call.operation, call.state) for call in calls_of(first)][:2] == [("barrier", DONE), ("broadcast_object", DONE)]
    assert [(call.operation, call.state) for call in calls_of(second)][:2] == [("barrier", DONE), ("broadcast_object_list", FAILED)]


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
        queue.wait_until_ready()
        assert [reader.dequeue()[1] for _ in range(3)] == [0, 1, 2]
    writer, read = sorted(map(read_file, tmp_path.glob("*.cgrecord")), key=lambda record: record.rank)
    *enqueued, waited = calls_of(writer)
    assert [(call.operation, call.sequence, call.nbytes > 100) for call in enqueued] == [("enqueue", i, True) for i in range(3)]
    assert waited.operation == "wait_until_ready"
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
