"""Work on a device: which stream comes after which, and what is enqueued at once. The device is a stand-in, its streams a list of words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.accelerators.torch_backend import TorchCommunicator
from commgraph.testing import spmd
from tests.stand_ins import FakeDevice, FakeStreams, Memory


def on_device(n: int, body: Callable[[cg.GroupCoordinator, FakeStreams], Any], **options: Any) -> list[Any]:
    """`body(group, streams)` on a group whose backend enqueues, and is asked on which stream."""
    memory = Memory()

    def run(world: cg.World) -> Any:
        platform = FakeDevice(memory)
        chosen = cg.CommunicatorOptions(custom_all_reduce=False, **options)
        with world.context(cg.Layout(n, tp=n), name="a", platform=platform, options=chosen) as context:
            streams = platform.streams_made
            backend = context.tp.communicator("fakeccl")
            for name in ("all_reduce", "all_gather", "reduce_scatter", "exchange"):
                _overhear(backend, name, streams)
            return body(context.tp, streams)

    return spmd(run, n)


def _overhear(backend: Any, name: str, streams: FakeStreams) -> None:
    inner = getattr(backend, name)

    def heard(*args: Any, **kwargs: Any) -> Any:
        streams.note(name)
        return inner(*args, **kwargs)

    setattr(backend, name, heard)


def test_a_collective_runs_on_a_side_stream_and_wait_orders_the_current_one() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        x = torch.full((4,), 1.0 + tp.rank)
        work = tp.all_reduce_async(x)
        # It was enqueued here and now, not by a thread, after what the caller's stream had to do.
        assert [said[:2] for said in streams.said] == [
            ("record_event", "main"),
            ("wait_event", "side 1"),
            ("all_reduce", "side 1"),
            ("record_stream", "side 1"),
            ("record_event", "side 1"),
        ]
        assert streams.said[3][2] == x.data_ptr(), "dropping x is safe"
        assert streams.current() == "main"
        end = streams.said[4][1:]
        streams.pending.add(end)
        assert not work.is_completed()
        del streams.said[:]
        y = work.wait()
        # The stream waits and not the host: the device has still not come to the end.
        assert [said[:2] for said in streams.said] == [("wait_event", "main"), ("record_stream", "main")]
        assert streams.said[0][2] == end
        assert streams.said[1][2] == y.data_ptr()
        streams.pending.clear()
        assert work.is_completed()
        assert y.tolist() == [3.0] * 4
        # Another stream that waits comes after it, too.
        del streams.said[:]
        with streams.use("other"):
            assert work.wait() is y
        assert streams.said == [("wait_event", "other", end), ("record_stream", "other", y.data_ptr())]

    on_device(2, body)


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_blocking_call_comes_after_what_was_begun_before_it(operation: str) -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        x = torch.full((4,), 1.0 + tp.rank)
        work = getattr(tp, f"{operation}_async")(x, **({} if operation == "all_reduce" else {"dim": 0}))
        end = streams.said[-1][1:]
        streams.pending.add(end)
        del streams.said[:]
        tp.all_reduce(x)
        assert streams.said == [("wait_event", "main", end), ("all_reduce", "main")]
        del streams.said[:]
        # And so does the next one as long as the device has not come so far; then nobody waits any more.
        tp.all_reduce(x)
        assert ("wait_event", "main", end) in streams.said
        streams.pending.clear()
        tp.all_reduce(x)
        del streams.said[:]
        tp.all_reduce(x)
        assert streams.said == [("all_reduce", "main")]
        work.wait()

    on_device(2, body)


def test_works_of_one_group_are_enqueued_in_order_on_one_stream() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        works = [tp.all_reduce_async(torch.full((4,), float(i))) for i in range(5)]
        assert {said[1] for said in streams.said if said[0] == "all_reduce"} == {"side 1"}
        for i in (3, 0, 4, 1, 2):
            assert works[i].wait().tolist() == [2.0 * i] * 4

    on_device(2, body)


def test_a_strategy_that_holds_up_the_host_is_called_in_turn_on_the_same_stream() -> None:
    """Bytes that no backend adds up go by way of the host: a thread does it, on the side stream, and in its turn."""

    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        import threading

        staged: Any = tp.communicator("staged")
        threads: list[threading.Thread] = []
        inner = staged.all_reduce

        def heard(*args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            streams.note("staged")
            return inner(*args, **kwargs)

        staged.all_reduce = heard
        # On the host another strategy would serve it first; that of a device is not asked.
        tp._state.strategies.communicators = tuple(one for one in tp._state.strategies.communicators if one.name in ("fakeccl", "staged"))
        slow = tp.all_reduce_async(torch.ones(4, dtype=torch.int16))
        fast = tp.all_reduce_async(torch.ones(4))
        assert slow.wait().tolist() == [2] * 4
        assert fast.wait().tolist() == [2.0] * 4
        assert len(threads) == 1  # that of the lane, or the one that waits
        calls = [said for said in streams.said if said[0] in ("staged", "all_reduce")]
        assert calls == [("staged", "side 1"), ("all_reduce", "side 1")]

    on_device(2, body)


def test_while_a_graph_is_captured_nothing_goes_to_a_thread_and_nothing_waits_for_what_is_outside() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        x = torch.full((4,), 1.0 + tp.rank)
        before = tp.all_reduce_async(x)
        outside = streams.said[-1][1:]
        streams.pending.add(outside)
        del streams.said[:]
        with tp.graph_capture() as captured:
            streams.capturing = True
            work = tp.all_reduce_async(x)
            inside = streams.said[-1][1:]
            assert work.is_completed(), "what is recorded has no end to wait for"
            y = work.wait()
            tp.all_reduce(y)
            assert ("wait_event", captured.stream, inside) in streams.said
            streams.capturing = False
        assert not any(said[0] == "wait_event" and said[2] == outside for said in streams.said)
        del streams.said[:]
        # Nor does anything outside wait for what was only recorded.
        tp.all_reduce(x)
        assert not any(said[0] == "wait_event" and said[2] == inside for said in streams.said)
        before.wait()

    on_device(2, body)


def test_each_graph_waits_for_its_own() -> None:
    """One after the other, as for each size of a batch, with nothing eager in between."""

    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        marks: list[set[Any]] = []
        for _ in range(3):
            del streams.said[:]
            with tp.graph_capture():
                streams.capturing = True
                work = tp.all_reduce_async(torch.ones(4))
                tp.all_reduce(torch.ones(4))
                if len(marks) != 1:
                    work.wait()
                assert work.is_completed()
                streams.capturing = False
            assert work.is_completed()
            assert "ended" in repr(work)
            own = {said[1:] for said in streams.said if said[0] == "record_event"}
            assert {said[2] for said in streams.said if said[0] == "wait_event"} <= own, "it waited for a mark of another graph"
            marks.append(own)

    on_device(2, body)


def test_a_batch_is_one_exchange() -> None:
    """By themselves the receives would be enqueued before the sends that the peer waits for: a deadlock on one communicator."""

    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        other = 1 - tp.rank_in_group
        outs = [torch.empty(4), torch.empty(2, 3)]
        works = tp.batch(
            [
                cg.Recv(outs[0], other),
                cg.Send(torch.full((4,), 1.0 + tp.rank), other),
                cg.Recv(outs[1], other),
                cg.Send(torch.full((2, 3), 10.0 + tp.rank), other),
            ]
        )
        assert [said for said in streams.said if said[0] == "exchange"] == [("exchange", "side 1")]
        filled = works.wait()
        assert filled[0] is outs[0]
        assert filled[1] is None
        assert outs[0].tolist() == [1.0 + other] * 4
        assert outs[1].tolist() == [[10.0 + other] * 3] * 2

    on_device(2, body)


def test_messages_have_a_stream_for_each_peer_and_direction() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        received = None
        # As the stand-in's backend does hold up the host, each side's message is taken before the next is begun.
        if tp.rank_in_group == 0:
            sent = tp.isend(torch.ones(4), 1)
            received = tp.irecv(4, torch.float32, 1).wait()
        else:
            received = tp.irecv(4, torch.float32, 0).wait()
            sent = tp.isend(torch.ones(4) * 2, 0)
        sent.wait()
        assert {said[1] for said in streams.said if said[0] == "exchange"} == {"side 1", "side 2"}
        assert received.tolist() == [2.0 - tp.rank_in_group] * 4

    on_device(2, body)


def test_dicts_are_received_on_a_side_stream() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        if tp.rank_in_group == 0:
            tp.isend_tensor_dict({"a": torch.arange(4.0), "b": "word"}, 1).wait()
        else:
            got = tp.irecv_tensor_dict(0).wait()
            assert got["b"] == "word"
            assert got["a"].tolist() == [0, 1, 2, 3]
        assert any(said[0] == "wait_event" and said[1] == "side 1" and said[2][0] == "main" for said in streams.said)
        assert any(said[0] == "wait_event" and said[1] == "main" and said[2][0] == "side 1" for said in streams.said)

    on_device(2, body)


def test_an_operation_that_fails_is_raised_by_wait() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        backend: Any = tp.communicator("fakeccl")

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the device is on fire")

        backend.all_reduce = broken
        work = tp.all_reduce_async(torch.ones(4))
        with pytest.raises(RuntimeError, match="on fire"):
            work.wait()
        assert work.is_completed()

    on_device(2, body)


# torch's groups


def test_device_group_is_torchs_group_of_the_backend() -> None:
    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        group = tp.device_group
        assert group is not None
        assert group is not tp.cpu_group
        assert (group.rank(), group.size()) == (tp.rank_in_group, tp.world_size)
        x = torch.full((3,), 1.0 + tp.rank)
        group.allreduce([x]).wait()
        assert x.tolist() == [3.0] * 3
        backend = tp.communicator("fakeccl")
        assert isinstance(backend, TorchCommunicator)
        assert backend.process_group is group

    on_device(2, body)


def test_devices_have_a_deadline_of_their_own() -> None:
    """`timeout` of the options for what is enqueued, `host_timeout` for the host, and that of a call for either."""

    def body(tp: cg.GroupCoordinator, streams: FakeStreams) -> None:
        backend: Any = tp.communicator("fakeccl")
        seen: list[float] = []
        for name in ("all_reduce", "exchange"):
            setattr(backend, name, _timed(getattr(backend, name), seen))
        tp.all_reduce(torch.ones(4))
        tp.all_reduce(torch.ones(4), timeout=7)
        tp.all_reduce_async(torch.ones(4)).wait()
        if tp.rank_in_group == 0:
            tp.send(torch.ones(4), 1)
            tp.isend(torch.ones(4), 1, timeout=8).wait()
        else:
            tp.recv(4, torch.float32, 0)
            tp.irecv(4, torch.float32, 0, timeout=8).wait()
        assert [round(seconds) for seconds in seen] == [50, 7, 50, 50, 8]

    on_device(2, body, timeout=timedelta(seconds=50), host_timeout=timedelta(seconds=20))


def _timed(inner: Callable[..., Any], seen: list[float]) -> Callable[..., Any]:
    def call(*args: Any, deadline: cg.Deadline, **kwargs: Any) -> Any:
        seen.append(deadline.seconds)
        return inner(*args, deadline=deadline, **kwargs)

    return call


def test_host_tensors_in_a_group_of_a_device_have_nothing_to_do_with_streams() -> None:
    """Where the device is not the host: here by a platform whose device tensors are none."""

    class Elsewhere(FakeDevice):
        device_type = "cuda"

        def streams(self, device: torch.device) -> FakeStreams:
            return self.streams_made

    def run(world: cg.World) -> None:
        world.device = torch.device("cuda", 0)
        platform = Elsewhere(capability="", problem="there is none")
        with world.context(cg.Layout(2, tp=2), name="a", platform=platform) as context:
            tp, other = context.tp, 1 - world.rank
            assert tp.all_reduce_async(torch.ones(3)).wait().tolist() == [2.0] * 3
            out = torch.empty(300_000)
            tp.batch([cg.Recv(out, other), cg.Send(torch.full((300_000,), 1.0 + world.rank), other)]).wait()
            assert (out == 1.0 + other).all()
            assert tp.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
            assert platform.streams_made.said == []

    with pytest.warns(RuntimeWarning, match="fakeccl cannot serve cuda tensors"):
        spmd(run, 2)
