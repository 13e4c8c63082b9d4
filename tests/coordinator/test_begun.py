"""All-reduces of small tensors that are begun natively: the caller has sent what its peers need, and no thread is needed."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.shm import native_module
from commgraph.work import LaneThread
from tests.helpers import on

pytestmark = pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module")


def threads_of(tp: GroupCoordinator) -> list[str]:
    return [thread.name for thread in threading.enumerate() if isinstance(thread, LaneThread)]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_thread_is_started_and_no_peer_waits_for_the_wait(n: int) -> None:
    arrived = threading.Barrier(n)

    def body(tp: GroupCoordinator) -> None:
        x = torch.arange(5.0) + tp.rank_in_group
        want = sum(torch.arange(5.0) + rank for rank in range(n))
        if tp.is_first_rank:
            work = tp.all_reduce_async(x)
            arrived.wait(30)  # the others have their results, though this rank does not wait
            assert work.is_completed()
            assert torch.equal(work.wait(), want)
            assert work.wait() is work.wait()
        else:
            assert torch.equal(tp.all_reduce(x), want)
            arrived.wait(30)
        assert not threads_of(tp)

    on(n, body)


@pytest.mark.parametrize("n", [2, 3])
def test_whatever_comes_next_comes_after_it(n: int) -> None:
    def body(tp: GroupCoordinator) -> None:
        total = float(sum(range(n)))
        x, large = torch.full((7,), float(tp.rank_in_group)), torch.full((100_000,), float(tp.rank_in_group))
        first, second = tp.all_reduce_async(x), tp.all_reduce_async(large)
        assert (second.wait() == total).all()
        assert first.is_completed()
        assert (first.wait() == total).all()
        tp.all_reduce_async(x)  # dropped
        gc.collect()
        assert (tp.all_gather(x, 0).view(n, 7) == torch.arange(float(n))[:, None]).all()
        late = tp.all_reduce_async(x, op="max")
        tp.barrier()
        assert late.is_completed()
        assert (late.wait() == n - 1).all()
        assert tp.broadcast_object("o", 0) == "o"
        if tp.rank_in_group % 2:
            assert (tp.all_reduce(x) == total).all()
        else:
            assert (tp.all_reduce_async(x).wait(timeout=30) == total).all()

    on(n, body)


def test_a_wait_that_ends_early_may_be_repeated_and_the_deadline_is_that_of_the_call() -> None:
    go, late = threading.Event(), threading.Event()

    def body(tp: GroupCoordinator) -> None:
        x = torch.ones(3)
        if tp.is_first_rank:
            work = tp.all_reduce_async(x)
            assert not work.is_completed()
            with pytest.raises(cg.CollectiveTimeoutError, match="wait again"):
                work.wait(timeout=0.05)
            go.set()
            assert (work.wait() == 2).all()
            with pytest.raises(cg.CollectiveTimeoutError, match=r"all_reduce on group 'tp' .*rank 1"):
                tp.all_reduce_async(x, timeout=0.2).wait()
            late.set()
        else:
            assert go.wait(30)
            assert (tp.all_reduce(x) == 2).all()
            assert late.wait(30)

    on(2, body)


def test_calls_that_differ_are_found_when_the_end_is_waited_for() -> None:
    def body(tp: GroupCoordinator) -> None:
        x = torch.ones(3 + tp.rank_in_group)
        with pytest.raises(cg.CollectiveMismatchError, match=r"\(3,\).*\(4,\)|\(4,\).*\(3,\)|3.*4|4.*3"):
            tp.all_reduce_async(x).wait()

    on(2, body)


def test_one_that_was_begun_when_its_context_closes() -> None:
    """A context that closes makes it, and it may be waited for later."""
    kept: dict[int, Any] = {}

    def body(tp: GroupCoordinator) -> None:
        kept[tp.rank_in_group] = tp.all_reduce_async(torch.ones(3))

    on(2, body)
    for work in kept.values():
        assert (work.wait() == 2).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["begin", "wait", "call", "large", "object", "poll"]), max_size=12), st.integers(2, 3), st.data())
def test_any_order_of_beginning_and_waiting(steps: list[str], n: int, data: st.DataObject) -> None:
    """Ranks that make the same calls, some begun and some at once, see the same sums; each waits when it likes."""
    choices = [[data.draw(st.sampled_from(["later", "now"])) for _ in steps] for _ in range(n)]

    def body(tp: GroupCoordinator) -> None:
        begun: list[tuple[Any, float]] = []
        for k, step in enumerate(steps):
            total = float(sum(range(n)) + n * k)
            x = torch.full((30_000 if step == "large" else 5,), float(tp.rank_in_group + k))
            if step in ("begin", "large"):
                if choices[tp.rank_in_group][k] == "now":
                    assert (tp.all_reduce(x) == total).all()
                else:
                    begun.append((tp.all_reduce_async(x), total))
            elif step == "call":
                assert (tp.all_reduce(x) == total).all()
            elif step == "object":
                assert tp.broadcast_object(k, 0) == k
            elif begun and step == "wait" and choices[tp.rank_in_group][k] == "now":
                work, want = begun.pop()
                assert (work.wait() == want).all()
            elif begun:
                begun[-1][0].is_completed()
        for work, want in begun:
            assert (work.wait() == want).all()

    on(n, body)
