"""Siblings: the same ranks once more, with communicators of their own."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.testing import spmd
from tests.helpers import again_if_late, in_time


def test_operations_of_a_sibling_overlap_with_those_of_the_first() -> None:
    """Two threads of a rank are in a collective each; and the ranks need not call the two groups in the same order."""

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a") as context:
            tp = context.tp
            aside = tp.sibling("aside")
            assert (aside.name, aside.ranks, aside.rank_in_group, aside.world_size) == ("aside", tp.ranks, tp.rank_in_group, 2)
            assert aside.shares_with == ()
            assert tp not in aside.shares_with
            assert aside.communicators == tp.communicators
            name = tp.communicators["send"][-1]
            assert aside.communicator(name) is not tp.communicator(name)
            sizes = {tp: 3, aside: 4}
            first, second = (tp, aside) if tp.is_first_rank else (aside, tp)
            got: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: got.append(first.all_reduce(torch.ones(sizes[first]))))
            thread.start()
            time.sleep(0.02)
            assert second.all_reduce(torch.ones(sizes[second])).tolist() == [2] * sizes[second]
            thread.join()
            assert got[0].tolist() == [2] * sizes[first]
            sent, received = aside.isend(torch.ones(2)), aside.irecv(2, torch.float32)
            assert received.wait().sum() == 2
            sent.wait()
            assert aside.all_gather_object(world.rank) == [0, 1]
            assert aside.empty(10, torch.float32).shape == (10,)

    spmd(run, 2)
    spmd(run, 2, nodes=2)


def test_the_context_owns_and_closes_it() -> None:
    def run(world: cg.World) -> None:
        context = world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(check=True))
        one, two = context.tp.sibling("one"), context.tp.sibling("two")
        nested = one.sibling("nested")
        assert len(context._distinct()) == 4
        context.warmup()
        before = int(context.explain().splitlines()[-1].split()[0])
        two.close()
        with pytest.raises(cg.ContextClosedError, match="two"):
            two.barrier()
        three = context.tp.sibling("three")
        assert int(context.explain().splitlines()[-1].split()[0]) == before
        three.isend(torch.ones(1 << 20))
        assert three.recv(1 << 20, torch.float32).sum() == 1 << 20
        context.close()
        for closed in (one, nested, three):
            with pytest.raises(cg.ContextClosedError):
                closed.all_reduce(torch.ones(2))

    spmd(run, 2)


def test_of_the_worlds_own_group_and_of_one_rank() -> None:
    def run(world: cg.World) -> None:
        assert world.group.sibling("beside").all_gather_object(world.rank) == list(range(world.size))
        tp = world.context(cg.Layout(world.size), name="a").tp
        alone = tp.sibling("alone")
        x = torch.ones(2)
        assert alone.all_reduce(x) is x
        assert alone.world_size == 1

    spmd(run, 1)
    spmd(run, 3)


def test_ranks_that_give_other_names_and_names_that_are_none() -> None:
    def run(world: cg.World) -> None:
        tp = world.context(cg.Layout(2, tp=2), name="a").tp
        for name in ("", 3):
            with pytest.raises(ValueError, match="a non-empty string is needed"):
                tp.sibling(name)  # type: ignore[arg-type]
        with pytest.raises(cg.LayoutMismatchError, match=r"the ranks disagree about its name:\n.*'?x0"):
            tp.sibling(f"x{world.rank}")
        assert tp.sibling("x").all_reduce(torch.ones(1)).item() == 2

    spmd(run, 2)


@again_if_late
def test_a_name_that_is_none_on_one_rank_is_an_error_on_all_at_once() -> None:
    def run(world: cg.World) -> None:
        tp = world.context(cg.Layout(2, tp=2), name="a").tp
        begun = time.monotonic()
        if world.rank:
            with pytest.raises(ValueError, match="a non-empty string is needed"):
                tp.sibling("")
        else:
            with pytest.raises(cg.BuildError, match=r"sibling 'x' of group .*rank 1 could not build it: ValueError: .*name=''"):
                tp.sibling("x")
        in_time(time.monotonic() - begun, 2)
        assert tp.sibling("x").all_reduce(torch.ones(1)).item() == 2

    spmd(run, 2)


def test_one_that_cannot_be_built_on_one_rank_is_built_on_none() -> None:
    def run(world: cg.World) -> None:
        tp = world.context(cg.Layout(2, tp=2), name="a").tp
        state = tp._state
        if world.rank == 1:
            again: Any = state.rebuild

            class Failing:
                """The builder, whose last step fails."""

                def __getattr__(self, name: str) -> Any:
                    return getattr(again.func.__self__, name)

                def state(self, *args: Any, **kwargs: Any) -> Any:
                    again.func.__self__.state(*args, **kwargs).close()
                    raise OSError("no room")

            state.rebuild = functools.partial(again.func.__func__, Failing(), **again.keywords)
            with pytest.raises(OSError, match="no room"):
                tp.sibling("x")
            state.rebuild = again
        else:
            with pytest.raises(cg.BuildError, match="rank 1 could not build it: OSError: no room"):
                tp.sibling("x")
        assert tp.all_reduce(torch.ones(1)).item() == 2

    spmd(run, 2)


def test_a_context_that_another_thread_closes_after_the_ranks_have_met() -> None:
    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a") as context:
            context.tp._state.rebuild = None  # as closing has it, which may come between a call's two steps
            with pytest.raises(cg.ContextClosedError, match=r"sibling on group 'tp' \(rank"):
                context.tp.sibling("x")

    spmd(run, 2)
