"""What is begun and waited for later: order, overlap, deadlines, what becomes of it when nobody waits."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.failures import Call, Members
from commgraph.shm.mailbox import Mailbox
from commgraph.testing import spmd
from commgraph.work import Job, Lane, LaneThread, Work

WAYS = pytest.mark.parametrize("options", [{}, {"shm": False}, {"check": True}, {"message_queue": False}], ids=str)


def each(n: int, run: Callable[[GroupCoordinator], Any], nodes: int = 1, **options: Any) -> list[Any]:
    """`run` on every rank of a pipeline of n."""

    def begin(world: cg.World) -> Any:
        with world.context(cg.Layout(n, pp=n), name="a", options=cg.CommunicatorOptions(**options)) as context:
            return run(context.pp)

    return spmd(begin, n, nodes=nodes)


def lane_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, LaneThread)]


# Messages


@WAYS
def test_four_stages_keep_several_micro_batches_in_flight(options: dict[str, Any]) -> None:
    """Every stage has posted all its receives before the first micro-batch comes, and the first one all its sends."""
    batches, stages = 6, 4
    begun = threading.Barrier(stages)

    def run(pp: GroupCoordinator) -> list[float]:
        coming = [] if pp.is_first_rank else [pp.irecv((300, 100), torch.float32) for _ in range(batches)]
        going = []
        if pp.is_first_rank:
            going = [pp.isend(torch.full((300, 100), float(i))) for i in range(batches)]
        begun.wait(30)
        seen = []
        for work in coming:
            x = work.wait() * 2 + 1
            seen.append(float(x[0, 0]))
            assert (x == x[0, 0]).all()
            if not pp.is_last_rank:
                going.append(pp.isend(x))
        for sent in going:
            sent.wait()
        return seen

    first, *others = each(stages, run, **options)
    assert first == []
    for stage, seen in enumerate(others, start=1):
        assert seen == [i * 2.0**stage + 2.0**stage - 1 for i in range(batches)]


@WAYS
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_ring_of_all_ranks_at_once_beyond_what_any_ring_holds(n: int, options: dict[str, Any]) -> None:
    def run(pp: GroupCoordinator) -> None:
        x, out = torch.full((3 << 20,), float(pp.rank_in_group)), torch.empty(3 << 20)
        # Half the ranks list the send first: in a batch no order is the wrong one.
        messages: list[cg.Send | cg.Recv] = [cg.Send(x), cg.Recv(out)]
        work = pp.batch(messages if pp.rank_in_group % 2 else messages[::-1])
        result = work.wait()
        assert [x is out for x in result] == ([False, True] if pp.rank_in_group % 2 else [True, False])
        assert (out == pp.prev_in_group).all()
        sent, received = pp.isend(x, pp.prev_in_group), pp.irecv(x.shape, x.dtype, pp.next_in_group)
        assert (received.wait() == pp.next_in_group).all()
        sent.wait()

    each(n, run, **options)


def test_a_batch_pairs_with_single_messages_of_either_kind() -> None:
    def run(pp: GroupCoordinator) -> None:
        xs = [torch.full((k + 1,), float(k)) for k in range(4)]
        if pp.is_first_rank:
            pp.batch([cg.Send(x, 1) for x in xs]).wait()
            pp.send(xs[3])
            pp.isend(xs[2]).wait()
        else:
            assert torch.equal(pp.recv(1, torch.float32), xs[0])
            second = pp.irecv(2, torch.float32)
            # Waits for the one that was begun before it.
            assert torch.equal(pp.recv(3, torch.float32), xs[2])
            assert second.is_completed()
            assert torch.equal(second.wait(), xs[1])
            outs = [torch.empty(4), torch.empty(4), torch.empty(3)]
            filled = pp.batch([cg.Recv(out, 0) for out in outs]).wait()
            assert all(x is out for x, out in zip(filled, outs, strict=True))
            assert all(map(torch.equal, outs, (xs[3], xs[3], xs[2])))

    each(2, run)


def test_a_batch_of_strided_and_empty_tensors_and_none_at_all() -> None:
    def run(pp: GroupCoordinator) -> None:
        assert pp.batch([]).wait() == []
        x = torch.arange(12.0).view(3, 4).T
        out = torch.zeros(8, 3)[::2]
        empty = torch.empty(0, 3)
        pp.batch([cg.Send(x), cg.Send(empty), cg.Recv(out), cg.Recv(empty.clone())]).wait()
        assert torch.equal(out, x)

    each(2, run)
    each(2, run, shm=False)


def test_dicts_in_flight_with_slices_that_are_gathered_in_wait() -> None:
    def run(world: cg.World) -> None:
        context = world.context(cg.Layout(4, pp=2, tp=2), name="a")
        pp, tp = context.pp, context.tp
        residual = torch.full((5,), float(tp.rank_in_group))
        if pp.is_first_rank:
            works = [
                pp.isend_tensor_dict(
                    {"hidden": torch.full((4, 6), float(i)), "residual": residual, "i": i, "no": {"empty": torch.empty(0, 2)}},
                    all_gather_group=tp,
                    all_gather_tensors={"residual": False},
                )
                for i in range(5)
            ]
            for work in works:
                assert work.wait() is None
        else:
            awaited = [pp.irecv_tensor_dict(all_gather_group=tp, all_gather_tensors={"residual": False}) for _ in range(5)]
            for i, one in enumerate(awaited):
                got = one.wait()
                assert (got["hidden"] == i).all()
                assert got["hidden"].shape == (4, 6)
                assert torch.equal(got["residual"], residual)
                assert got["i"] == i
                assert got["no"]["empty"].shape == (0, 2)
                assert one.wait() is got
        context.close()

    spmd(run, 4)


def test_objects_of_a_dict_are_taken_when_it_is_begun() -> None:
    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            names = ["a"]
            # The first fills the ring, so that the second has to wait for its turn.
            works = [pp.isend_tensor_dict({"x": torch.ones(8 << 20)}), pp.isend_tensor_dict({"names": names})]
            names.append("b")
            pp.barrier()
            for work in works:
                work.wait()
        else:
            pp.barrier()
            pp.recv_tensor_dict()
            assert pp.recv_tensor_dict() == {"names": ["a"]}

    each(2, run)
    each(2, run, shm=False)


@pytest.mark.parametrize("shm", [True, False])
def test_messages_of_a_dict_are_counted(shm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sends a size, a pickle and each tensor as a message of its own, each after the one before it has been taken.

    Here a dict is one record in shared memory; over the network its description is one message, and the tensors follow all at once.
    """
    counted: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    put, exchange = Mailbox.send, GlooTransport.exchange

    def counting_put(self: Mailbox, *args: Any, **kwargs: Any) -> Any:
        counted["records"] += 1
        return put(self, *args, **kwargs)

    def counting_exchange(self: GlooTransport, sends: Any, receives: Any, **kwargs: Any) -> Any:
        if self.rank_in_group == 0:
            counted["messages"] += len(sends)
            counted["exchanges"] += bool(sends)
        return exchange(self, sends, receives, **kwargs)

    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            before = Counter(counted)
            pp.isend_tensor_dict({"hidden": torch.ones(64, 64), "residual": torch.ones(64, 64), "step": 3}).wait()
            counted.subtract(before)
            sent.update(counted)
        else:
            pp.recv_tensor_dict()

    monkeypatch.setattr(Mailbox, "send", counting_put)
    monkeypatch.setattr(GlooTransport, "exchange", counting_exchange)
    each(2, run, shm=shm)
    assert +sent == ({"records": 1} if shm else {"messages": 3, "exchanges": 2})


# Collectives


@WAYS
def test_collectives_come_about_in_the_order_in_which_they_were_begun(options: dict[str, Any]) -> None:
    def run(pp: GroupCoordinator) -> None:
        n = pp.world_size
        sums = [pp.all_reduce_async(torch.full((3,), float(i)), op="sum") for i in range(8)]
        gathered = pp.all_gather_async(torch.full((2, 2), float(pp.rank_in_group)), 0)
        out = torch.empty(2)
        piece = pp.reduce_scatter_async(torch.arange(2.0 * n), out=out)
        filled = torch.full((3,), float(pp.rank_in_group))
        sent = pp.broadcast_async(filled, 1)
        crossed = pp.all_to_all_async(torch.arange(2.0 * n) + 100 * pp.rank_in_group)
        on_one = pp.gather_async(filled[: pp.rank_in_group], n - 1, 0, sizes=list(range(n)))
        met = pp.barrier_async()
        # A blocking one waits for all of them, also through the short way.
        assert pp.all_reduce(torch.ones(2)).tolist() == [n, n]
        begun: list[cg.Work[Any]] = [*sums, gathered, piece, sent, crossed, on_one, met]
        assert all(work.is_completed() for work in begun)
        assert sent.wait() is filled
        assert filled.tolist() == [1, 1, 1]
        assert crossed.wait()[::2].tolist() == [2.0 * pp.rank_in_group + 100 * i for i in range(n)]
        joined = on_one.wait()
        # It was begun after the broadcast, and so gathers what that filled in.
        assert (None if joined is None else joined.tolist()) == ([1.0] * (n * (n - 1) // 2) if pp.is_last_rank else None)
        assert met.wait() is None
        assert piece.wait() is out
        assert out.tolist() == [n * 2.0 * pp.rank_in_group, n * (2.0 * pp.rank_in_group + 1)]
        assert gathered.wait()[:, 0].tolist() == [float(i // 2) for i in range(2 * n)]
        for i in reversed(range(8)):
            assert (sums[i].wait() == n * i).all()
        # One rank may wait where another does not.
        y = pp.all_reduce_async(torch.ones(4)).wait() if pp.is_first_rank else pp.all_reduce(torch.ones(4))
        assert (y == n).all()

    each(3, run, **options)
    each(4, run, nodes=2, **options)


@WAYS
def test_a_refused_call_counts_in_its_turn(options: dict[str, Any]) -> None:
    """Whether calls that were begun before it have ended is each rank's own affair; how many calls it has made is not."""

    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            work = pp.all_reduce_async(torch.ones(2))
            for call in (pp.all_reduce, pp.gather, pp.all_reduce_async):
                with pytest.raises(ValueError, match="timeout=-1"):
                    call(torch.ones(2), timeout=-1)
            assert not work.is_completed()
            pp.send_object("now", 1)
        else:
            pp.recv_object(0)
            work = pp.all_reduce_async(torch.ones(2))
            work.wait()
            for call in (pp.all_reduce, pp.gather, pp.all_reduce_async):
                with pytest.raises(ValueError, match="timeout=-1"):
                    call(torch.ones(2), timeout=-1)
        pp.barrier()
        assert pp._state.sequence == 5
        assert work.wait().tolist() == [2, 2]

    each(2, run, **options)


@WAYS
def test_they_overlap_with_the_caller_and_with_messages(options: dict[str, Any]) -> None:
    """A collective whose peer is late stands in nobody's way: its caller goes on, and messages between the same two ranks pass it."""

    def run(pp: GroupCoordinator) -> None:
        work = None
        if pp.is_first_rank:
            work = pp.all_reduce_async(torch.ones(1 << 20))
            assert not work.is_completed()
            pp.send(torch.ones(2))
            assert pp.recv(2, torch.float32).tolist() == [2, 2]
            pp.send_object("go on", 1)
            assert not work.is_completed()
        else:
            pp.send(pp.recv(2, torch.float32) * 2)
            assert pp.recv_object(0) == "go on"
            time.sleep(0.05)
        y = pp.all_reduce(torch.ones(1 << 20)) if work is None else work.wait()
        assert (y == 2).all()
        pp.barrier()

    each(2, run, **options)


def test_the_short_way_is_open_again_afterwards() -> None:
    def run(pp: GroupCoordinator) -> None:
        pp.all_reduce_async(torch.ones(2)).wait()
        pp.barrier()
        assert pp._fast.all_reduce(torch.ones(2), "sum", None).tolist() == [2, 2]

    each(2, run)


def test_one_rank_has_everything_at_once() -> None:
    def run(world: cg.World) -> None:
        tp = world.context(cg.Layout(1), name="a").tp
        x, out = torch.ones(3), torch.empty(3)
        assert tp.all_reduce_async(x).wait() is x
        assert tp.all_gather_async(x, out=out).wait() is out
        assert tp.reduce_scatter_async(x).wait() is x
        assert tp.all_reduce_async(x).is_completed()
        assert tp.broadcast_async(x).wait() is x
        assert tp.gather_async(x).wait() is x
        assert tp.all_to_all_async(x, out=out).wait() is out
        assert tp.barrier_async().wait() is None
        assert tp.isend(x * 2, 0).is_completed()
        assert torch.equal(tp.irecv(3, torch.float32).wait(), x * 2)
        assert tp.batch([cg.Send(x * 3), cg.Recv(out)]).wait() == [None, out]
        assert torch.equal(out, x * 3)

    spmd(run, 1)


def test_a_gradient_is_refused_and_inference_mode_goes_along() -> None:
    def run(pp: GroupCoordinator) -> None:
        x = torch.ones(3, requires_grad=True)
        for call in (pp.all_reduce_async, pp.all_gather_async, pp.broadcast_async, pp.all_to_all_async, pp.gather_async, pp.isend):
            with pytest.raises(cg.UnsupportedTensorError, match="requires a gradient"):
                call(x)
        with torch.no_grad():
            assert not pp.all_reduce_async(x).wait().requires_grad
        with torch.inference_mode():
            made = torch.ones(2)
            work, filled = pp.all_reduce_async(made), pp.all_gather_async(made, out=torch.empty(2 * pp.world_size))
        assert work.wait().is_inference()
        assert filled.wait().sum() == 2 * pp.world_size

    each(2, run)


# Bad input


def test_bad_input_raises_when_it_is_begun() -> None:
    def run(pp: GroupCoordinator) -> None:
        x = torch.ones(3)
        cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
            (ValueError, "op='mean'", lambda: pp.all_reduce_async(x, op="mean")),
            (ValueError, "dim=3", lambda: pp.all_gather_async(x, 3)),
            (ValueError, "3 elements, which 2 ranks", lambda: pp.reduce_scatter_async(x)),
            (cg.UnsupportedTensorError, "out is", lambda: pp.all_gather_async(x, out=torch.empty(5))),
            (cg.UnsupportedTensorError, "out is", lambda: pp.reduce_scatter_async(torch.ones(4), out=torch.empty(5))),
            (ValueError, "timeout=-1", lambda: pp.all_reduce_async(x, timeout=-1)),
            (ValueError, "timeout=-1", lambda: pp.barrier_async(timeout=-1)),
            (ValueError, "src=2", lambda: pp.broadcast_async(x, 2)),
            (ValueError, "dst=-1", lambda: pp.gather_async(x, -1)),
            (ValueError, r"sizes=\[1, 1\]", lambda: pp.gather_async(x, sizes=[1, 1])),
            (ValueError, "without output_sizes", lambda: pp.all_to_all_async(x, input_sizes=[1, 2])),
            (cg.UnsupportedTensorError, "expanded", lambda: pp.broadcast_async(x[:1].expand(3))),
            (cg.UnsupportedTensorError, r"messages\[1\] is a Tensor", lambda: pp.batch([cg.Send(x), x])),  # type: ignore[list-item]
            (ValueError, r"messages\[0\].dst=2 is not a rank", lambda: pp.batch([cg.Send(x, 2)])),
            (ValueError, "tag=-1 is not a tag", lambda: pp.batch([cg.Recv(x, tag=-1)])),
            (cg.UnsupportedTensorError, r"messages\[0\].out is expanded", lambda: pp.batch([cg.Recv(torch.ones(1).expand(3))])),
            (cg.UnsupportedTensorError, "messages is a Send", lambda: pp.batch(cg.Send(x))),  # type: ignore[arg-type]
            (TypeError, "cannot pickle", lambda: pp.isend_tensor_dict({"f": lambda: 1})),
            (TypeError, "not a list", lambda: pp.isend_tensor_dict([1])),  # type: ignore[arg-type]
            (ValueError, "size=", lambda: pp.irecv((-1,), torch.float32)),
        ]
        for kind, words, call in cases:
            with pytest.raises(kind, match=words) as caught:
                call()
            assert "group 'pp'" in str(caught.value)
        # Every rank was refused alike, so the group goes on; nothing was sent.
        assert pp.all_reduce_async(x).wait().tolist() == [2, 2, 2]
        pp.batch([cg.Send(x), cg.Recv(torch.empty(3))]).wait()

    each(2, run)


def test_a_refusal_on_one_rank_alone_is_found_out_by_the_others() -> None:
    """It counts in its turn: what comes next does not pair with what the others called."""

    def run(pp: GroupCoordinator) -> type[Exception]:
        begun = pp.all_reduce_async(torch.ones(3))
        if pp.is_first_rank:
            with pytest.raises(ValueError, match="op="):
                pp.all_reduce_async(torch.ones(3), op="mean")
        else:
            pp.all_reduce_async(torch.ones(3))
        assert begun.wait().tolist() == [2, 2, 2]
        with pytest.raises(cg.CollectiveError) as caught:
            pp.all_reduce_async(torch.ones(3), timeout=5).wait()
        return caught.type

    assert set(each(2, run)) <= {cg.CollectiveMismatchError, cg.PeerLostError}


# Ends


@WAYS
def test_what_nobody_waits_for_comes_about_all_the_same(options: dict[str, Any]) -> None:
    def run(pp: GroupCoordinator) -> None:
        n = pp.world_size
        for i in range(20):
            pp.isend(torch.full((50,), float(i)))
            pp.all_reduce_async(torch.ones(1 << 16))
        gc.collect()
        pp.isend(torch.full((1 << 21,), 5.0))
        for i in range(20):
            assert (pp.recv(50, torch.float32) == i).all()
        assert (pp.recv(1 << 21, torch.float32) == 5).all()
        assert pp.all_reduce(torch.ones(1)).item() == n

    each(3, run, **options)


@WAYS
def test_close_lets_messages_and_collectives_end_but_not_receives(options: dict[str, Any]) -> None:
    summed: list[cg.Work[torch.Tensor]] = []
    never: list[cg.Work[torch.Tensor]] = []

    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            pp.isend(torch.ones(1 << 21))
        else:
            time.sleep(0.2)  # meanwhile the other one closes
            assert (pp.recv(1 << 21, torch.float32) == 1).all()
        never.append(pp.irecv(3, torch.float32))
        summed.append(pp.all_reduce_async(torch.ones(3)))

    started = time.monotonic()
    each(2, run, **options)
    assert time.monotonic() - started < 10
    assert all(work.wait(0).sum() == 6 for work in summed)
    for work in never:
        with pytest.raises((cg.ContextClosedError, cg.PeerLostError), match="closed"):
            work.wait(5)
    assert not lane_threads()


def test_a_wait_that_is_too_short_harms_nothing() -> None:
    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            work = pp.irecv(3, torch.float32)
            with pytest.raises(cg.CollectiveTimeoutError, match=r"irecv on group 'pp' .*not at its end after 0.05 s") as caught:
                work.wait(timedelta(seconds=0.05))
            assert caught.value.group == "pp"
            with pytest.raises(ValueError, match="timeout='x'"):
                work.wait("x")
            # Neither does a blocking call whose deadline passes while it waits for its turn.
            with pytest.raises(cg.CollectiveTimeoutError, match="it was not begun"):
                pp.recv(3, torch.float32, timeout=0.05)
            pp.barrier()
            assert work.wait(5).tolist() == [1, 1, 1]
            assert "ended" in repr(work)
        else:
            pp.barrier()
            pp.send(torch.ones(3))

    each(2, run)


@WAYS
def test_a_deadline_of_the_operation_itself_breaks_the_group(options: dict[str, Any]) -> None:
    gave_up = threading.Event()

    def run(pp: GroupCoordinator) -> None:
        if pp.is_first_rank:
            work = pp.all_reduce_async(torch.ones(3), timeout=0.2)
            later = pp.all_reduce_async(torch.ones(3))
            message = pp.irecv(3, torch.float32)
            for waiting in (work, later, message, work):
                with pytest.raises(
                    cg.CollectiveTimeoutError, match=r"all_reduce on group 'pp' .*test_work.py.*did not end within"
                ) as caught:
                    waiting.wait(10)
                # Where it was begun, not the thread that made it.
                assert "threading.py" not in str(caught.value)
            with pytest.raises(cg.CollectiveTimeoutError):
                pp.isend(torch.ones(3))
            gave_up.set()
        else:
            assert gave_up.wait(10)

    each(2, run, **options)


def test_any_thread_may_wait() -> None:
    def run(pp: GroupCoordinator) -> None:
        work, got = pp.all_reduce_async(torch.ones(3)), []
        waiting = [threading.Thread(target=lambda: got.append(work.wait())) for _ in range(3)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        assert all(x is got[0] for x in got)
        assert got[0].tolist() == [2, 2, 2]

    each(2, run)


def test_a_thread_stays_no_longer_than_there_is_something_to_do() -> None:
    def run(pp: GroupCoordinator) -> int:
        for _ in range(3):
            pp.all_reduce_async(torch.ones(3)).wait()
        pp.barrier()
        deadline = time.monotonic() + 5
        while lane_threads() and time.monotonic() < deadline:
            time.sleep(0.05)
        return len(lane_threads())

    assert each(2, run) == [0, 0]


def test_buffers_go_with_the_work() -> None:
    """A thread that waits for its next job holds nothing of the last one."""

    def run(pp: GroupCoordinator) -> None:
        import weakref

        x = torch.ones(3)
        gone = weakref.ref(x)
        work = pp.all_reduce_async(x)
        work.wait()
        pp.barrier()
        del x, work
        gc.collect()
        assert gone() is None

    each(2, run)


def test_closing_a_world_lets_messages_of_its_own_group_end() -> None:
    def run(world: cg.World) -> None:
        aside = world.group.sibling("aside")
        if world.rank == 0:
            world.group.isend(torch.ones(1 << 21))
            aside.isend(torch.full((1 << 21,), 2.0))
            world.close()
        else:
            time.sleep(0.2)  # meanwhile the other one closes
            assert (world.group.recv(1 << 21, torch.float32) == 1).all()
            assert (aside.recv(1 << 21, torch.float32) == 2).all()

    spmd(run, 2)


def test_work_that_is_waited_for_within_the_call_before_it_is_refused() -> None:
    """As a signal handler does: that wait would never end. The work goes on."""
    lane, call = Lane("lane"), Call("tp", "all_reduce_async", Members("uid", (0, 1), 0), 0)

    def begin(run: Callable[[], Any]) -> Work[Any]:
        job = Job(run, "here", has_arrived=lambda: True)
        lane.submit(job)
        return Work(call, [job], lambda results: results[0])

    def interrupted() -> Work[Any]:
        second = begin(lambda: "second")
        with pytest.raises(cg.ConcurrentCallError, match="'tp'"):
            second.wait()
        return second

    assert begin(interrupted).wait().wait() == "second"
