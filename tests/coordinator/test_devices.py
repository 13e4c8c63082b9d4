"""Groups on devices, with a stand-in for one: how many communicators they make, and the one order of several groups on a device.

Kernels are tested in tests/communicators/test_custom_all_reduce.py, and the choice among strategies in tests/platforms/test_platforms.py.
"""

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
from tests.stand_ins import FakeDevice, Memory


def on_fakes(n: int, body: Callable[[cg.World, FakeDevice], Any]) -> list[Any]:
    memory = Memory()
    return spmd(lambda world: body(world, FakeDevice(memory)), n)


def backends(context: cg.ParallelContext) -> int:
    return sum(line.strip().startswith("fakeccl: torch's") for line in context.explain().splitlines())


# How many communicators


def test_groups_of_one_rank_cost_nothing_and_equal_groups_share() -> None:
    def body(world: cg.World, platform: FakeDevice) -> None:
        # tp, ep and a group of the user's are the same four ranks: one communicator. dp, pp, pcp and dcp are one rank each: none.
        layout = cg.Layout(4, tp=4, groups={"engine": ("pp", "tp")})
        with world.context(layout, name="a", platform=platform) as ctx:
            assert platform.backends == 1
            assert len(platform.kernels) == 1
            assert {other.name for other in ctx.tp.shares_with} >= {"ep", "engine"}
            assert ctx.dp.communicators == {}
            assert "dp: ranks " in ctx.explain()
            assert "one rank, no communicator" in ctx.explain()
        # Asked for, each has its own, and explain() counts them.
        isolated = cg.CommunicatorOptions(isolate={"ep"})
        with world.context(layout, name="b", platform=platform, options=isolated) as ctx:
            assert platform.backends == 1 + 2
            assert ctx.ep.shares_with == ()
            lines = ctx.explain().splitlines()
            assert (
                lines[-1].strip().startswith("12 communicators in 3 groups")
            )  # 5 for each of tp and ep, the host's included, and 2 for the world
        # Those that serve host tensors only have none at all.
        with world.context(layout, name="c", platform=platform, groups=()) as ctx:
            assert platform.backends == 3
            assert backends(ctx) == 0

    on_fakes(4, body)


def noted(ran: list[str], name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran.append(name)
        return inner(*args, **kwargs)

    return call


def test_warmup_allocates_what_first_use_would() -> None:
    """Every operation of the backend, and every kernel, has run before the first call of a user's."""

    def body(world: cg.World, platform: FakeDevice) -> None:
        with world.context(cg.Layout(2, tp=2), name="a", platform=platform) as ctx:
            backend: Any = ctx.tp.communicator("fakeccl")
            ran: list[str] = []
            for name in ("all_reduce_", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
                setattr(backend, name, noted(ran, name, getattr(backend, name)))
            ctx.warmup()
            assert set(ran) == {"all_reduce_", "all_gather", "reduce_scatter", "all_to_all", "broadcast"}
            assert platform.kernels[0].calls
            before = ctx.explain().splitlines()[-1]
            ctx.tp.all_reduce(torch.ones(64))
            assert ctx.explain().splitlines()[-1] == before

    on_fakes(2, body)


# The order of several groups on one device


@again_if_late
def test_what_is_begun_in_another_order_on_a_device_raises_on_every_rank() -> None:
    """Two groups of the same two ranks: one begins the call of the first, the other that of the second, and each would wait."""

    def body(world: cg.World, platform: FakeDevice) -> str:
        options = cg.CommunicatorOptions(check=True, isolate={"ep"}, custom_all_reduce=False)
        context = world.context(cg.Layout(2, tp=2), name="a", platform=platform, options=options)
        x = torch.ones(4)
        for _ in range(2):
            assert context.tp.all_reduce(x).tolist() == [2.0] * 4
            assert context.ep.all_reduce(x).tolist() == [2.0] * 4
        started = time.monotonic()
        with pytest.raises(cg.CollectiveMismatchError) as caught:
            (context.tp if world.rank == 0 else context.ep).all_reduce(x)
        in_time(time.monotonic() - started, 2)
        with pytest.raises(cg.CollectiveError):
            (context.tp if world.rank == 0 else context.ep).all_reduce(x)
        context.close()
        return str(caught.value)

    for text in on_fakes(2, body):
        assert "in group a/0/tp" in text
        assert "in group a/0/ep" in text
        assert "rank 0: call #2" in text
        assert "rank 1: call #2" in text
        assert "begin what they have in common in one order" in text
        assert "test_devices.py" in text


def test_after_a_mismatch_another_context_begins_anew() -> None:
    def body(world: cg.World, platform: FakeDevice) -> None:
        options = cg.CommunicatorOptions(check=True, custom_all_reduce=False)
        other = world.context(cg.Layout(3, tp=3), name="other", platform=platform, options=options)
        for _ in range(2):
            first = world.context(cg.Layout(3, tp=3), name="a", platform=platform, options=options)
            with pytest.raises(cg.CollectiveMismatchError, match="called different things"):
                first.tp.all_reduce(torch.ones(4 + world.rank))
            first.close()
            with world.context(cg.Layout(3, tp=3), name="b", platform=platform, options=options) as second:
                assert second.tp.all_reduce(torch.ones(4)).tolist() == [3.0] * 4
            # One that was there before goes on as well.
            assert other.tp.all_reduce(torch.ones(4)).tolist() == [3.0] * 4
        other.close()

    on_fakes(3, body)


def test_contexts_on_one_device_have_one_order() -> None:
    """A target and a draft model: their calls interleave in the same way on all ranks, or all ranks are told."""

    def body(world: cg.World, platform: FakeDevice) -> str:
        options = cg.CommunicatorOptions(check=True, custom_all_reduce=False)
        target = world.context(cg.Layout(4, tp=2, dp=2), name="target", platform=platform, options=options)
        draft = world.context(cg.Layout(4, tp=4), name="draft", platform=platform, options=options)
        x = torch.ones(4)
        for _ in range(3):
            assert target.tp.all_reduce(x).tolist() == [2.0] * 4
            assert draft.tp.all_reduce(x).tolist() == [4.0] * 4
            assert target.dp.all_reduce(x).tolist() == [2.0] * 4

        def step() -> None:
            for group in (draft.tp, target.tp) if world.rank == 3 else (target.tp, draft.tp):  # the draft of one is a step ahead
                group.all_reduce(x)

        with pytest.raises(cg.CollectiveError) as caught:
            step()
        target.close()
        draft.close()
        return f"{type(caught.value).__name__}: {caught.value}"

    texts = on_fakes(4, body)
    assert all(text.startswith(("CollectiveMismatchError", "PeerLostError")) for text in texts), texts
    assert sum("in group target" in text and "in group draft" in text for text in texts) >= 2


def test_groups_that_have_no_rank_in_common_have_no_order_to_keep() -> None:
    def body(world: cg.World, platform: FakeDevice) -> None:
        options = cg.CommunicatorOptions(check=True, custom_all_reduce=False)
        with world.context(cg.Layout(4, tp=2, dp=2), name="a", platform=platform, options=options) as ctx:
            for _ in range(2 if world.rank < 2 else 7):
                assert ctx.tp.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
            assert ctx.dp.all_reduce(torch.ones(4)).tolist() == [2.0] * 4

    on_fakes(4, body)


def test_host_calls_may_come_in_between_as_they_like() -> None:
    """The order is that of the device: what is made and not enqueued has one for each group, as ever."""
    first = threading.Barrier(2)

    def body(world: cg.World, platform: FakeDevice) -> None:
        options = cg.CommunicatorOptions(check=True, custom_all_reduce=False)
        with world.context(cg.Layout(2, tp=2), name="a", platform=platform, options=options) as ctx:
            if world.rank == 0:
                work = ctx.world.all_gather_object
                first.wait(10)
                assert ctx.tp.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
                assert work(0) == [0, 1]
            else:
                first.wait(10)
                assert ctx.tp.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
                assert ctx.world.all_gather_object(1) == [0, 1]

    on_fakes(2, body)


def test_what_is_begun_and_not_waited_for_has_its_place_in_the_order() -> None:
    """Of one group and then of another, by the same thread: the order of the program, whether anybody waits or not."""

    def body(world: cg.World, platform: FakeDevice) -> None:
        options = cg.CommunicatorOptions(check=True, isolate={"ep"}, custom_all_reduce=False)
        with world.context(cg.Layout(3, tp=3), name="a", platform=platform, options=options) as ctx:
            x = torch.full((4,), 1.0 + world.rank)
            for _ in range(10):
                works = [group.all_reduce_async(x) for group in (ctx.tp, ctx.ep, ctx.tp)]
                assert ctx.ep.all_gather(x).tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
                assert [work.wait().tolist() for work in works] == [[6.0] * 4] * 3

    on_fakes(3, body)
