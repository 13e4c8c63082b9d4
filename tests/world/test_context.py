"""Contexts: built whole or not at all, frozen, several at once. The ranks are threads over real gloo groups."""

from __future__ import annotations

import copy
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from unittest import mock

import attrs
import pytest
import torch

import commgraph as cg
from commgraph import meeting
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore
from tests.helpers import CountingStore, again_if_late, in_time, same, within


def outcomes(fn: Callable[[cg.World], Any], world_size: int, *, timeout: float = 20) -> list[Any]:
    """What `fn` returned on each rank, or the error in its place: `spmd` would end at the first."""

    def run(world: cg.World) -> Any:
        try:
            return fn(world)
        except Exception as error:
            return error

    return spmd(run, world_size, timeout=timeout)


# What a context offers.


def test_every_group_of_the_layout_and_no_other() -> None:
    def run(world: cg.World) -> None:
        layout = cg.Layout(8, dp=2, pp=2, tp=2, dcp=2, groups={"engine": ("pp", "tp"), "ends": cg.Positions("pp", (0, -1))})
        ctx = world.context(layout, name="target")
        assert (ctx.layout, ctx.name, ctx.rank, ctx.world_size, ctx.device) == (layout, "target", world.rank, 8, world.device)
        assert ctx.is_first_rank == (world.rank == 0)
        for name in layout.names:
            group = ctx[name]
            assert (group.name, group.ranks, group.rank) == (name, layout.ranks(name, world.rank), world.rank)
            assert group.ranks[group.rank_in_group] == world.rank
            assert int(group.all_reduce(torch.tensor(world.rank))) == sum(group.ranks)
        for name in ("world", "replica", "dp", "pp", "pcp", "tp", "dcp", "ep"):
            assert getattr(ctx, name) is ctx[name]
        with pytest.raises(cg.LayoutError, match=r"no group 'engines'.*engine"):
            ctx["engines"]
        assert tuple(ctx) == layout.names
        assert all(name in ctx for name in layout.names)
        assert "engines" not in ctx
        assert 0 not in ctx
        assert not hasattr(ctx, "engines")
        with pytest.raises(AttributeError, match=r"no 'engine'; groups of your own are found as context\['engine'\]"):
            getattr(ctx, "engine")  # noqa: B009 - a type checker knows that it is not there
        ctx.check_layout(dp=2, pp=2, tp=2, ep=4, engine=4)
        with pytest.raises(cg.LayoutMismatchError, match=r"tp=2, expected 4; pp=2, expected 1"):
            ctx.check_layout(tp=4, dp=2, pp=1)
        with pytest.raises(cg.LayoutError):
            ctx.check_layout(tensor=2)

    spmd(run, 8)


def test_a_layout_of_axes_of_ones_own() -> None:
    def run(world: cg.World) -> Any:
        ctx = world.context(cg.Layout.from_axes(4, {"stage": 2, "lane": 2}), name="a")
        with pytest.raises(cg.LayoutError, match=r"no group 'tp'.*stage, lane"):
            _ = ctx.tp
        assert tuple(ctx) == ("world", "stage", "lane")
        assert [hasattr(ctx, name) for name in ("world", "tp", "dp", "replica")] == [True, False, False, False]
        assert getattr(ctx, "tp", None) is None
        return int(ctx["stage"].all_reduce(torch.tensor(world.rank))), ctx["lane"].ranks, ctx.world.ranks

    assert spmd(run, 4) == [(2, (0, 1), (0, 1, 2, 3)), (4, (0, 1), (0, 1, 2, 3)), (2, (2, 3), (0, 1, 2, 3)), (4, (2, 3), (0, 1, 2, 3))]


def test_a_layout_of_arbitrary_rank_lists() -> None:
    def run(world: cg.World) -> Any:
        ctx = world.context(cg.Layout.from_groups(4, {"pair": [[3, 0], [1, 2]], "most": [[0, 1, 2], [3]]}), name="a")
        return ctx["pair"].all_gather_object(world.rank), ctx["most"].world_size, ctx["pair"].rank_in_group

    assert spmd(run, 4) == [([3, 0], 3, 1), ([1, 2], 3, 0), ([1, 2], 3, 1), ([3, 0], 1, 0)]


def test_which_groups_serve_device_tensors_is_the_platforms_to_know() -> None:
    class Noting(cg.CpuPlatform):
        def communicators(self, facts: Any, transport: Any) -> Any:
            seen[threading.current_thread().name, facts.ranks] = facts.wants_device
            return super().communicators(facts, transport)

    seen: dict[tuple[str, tuple[int, ...]], bool] = {}

    def run(world: cg.World) -> None:
        world.context(cg.Layout(4, tp=2, pp=2), name="a", platform=Noting(), groups=("pp",))

    spmd(run, 4)
    assert {ranks: wants for (_, ranks), wants in seen.items()}[0, 2] is True
    assert {ranks for (_, ranks) in seen} == {(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)}


def test_equal_groups_share_unless_isolated() -> None:
    def run(world: cg.World) -> None:
        layout = cg.Layout(4, tp=4)  # tp, ep and world are the same four ranks
        shared = world.context(layout, name="shared")
        assert {group.name for group in shared.tp.shares_with} == {"world", "ep"}
        assert shared.pp.shares_with == ()
        for options in (cg.CommunicatorOptions(isolate="ep"), {"ep": cg.CommunicatorOptions(isolate=True)}):
            ctx = world.context(layout, name="isolated", options=options)
            assert ctx.ep.shares_with == ()
            assert {group.name for group in ctx.tp.shares_with} == {"world"}
            ctx.close()
        alone = world.context(layout, name="alone", options=cg.CommunicatorOptions(isolate=True))
        assert all(alone[name].shares_with == () for name in layout.names)
        assert shared.explain().count("communicators in 1 groups") == 1
        assert "communicators in 3 groups" in alone.explain()
        # Sharing is per options too: other deadlines are other communicators.
        other = world.context(layout, name="other", options={"tp": cg.CommunicatorOptions(timeout=timedelta(seconds=9))})
        assert other.tp.shares_with == ()
        assert other.options["tp"].timeout == timedelta(seconds=9)
        assert other.options["ep"] == cg.CommunicatorOptions()

    spmd(run, 4)


def test_explain_says_who_is_served_by_what() -> None:
    def run(world: cg.World) -> str:
        return world.context(cg.Layout(2, tp=2), name="target").explain()

    text = spmd(run, 2)[1]
    assert "'target': rank 1 of" in text
    assert "tp: ranks (0, 1)" in text
    assert "shares communicators with" in text
    assert "pp: ranks (1,): one rank, no communicator" in text
    assert "all_reduce" in text
    assert "shm, then tcp" in text
    assert "bytes of shared memory" in text


def test_who_is_what_is_logged_once_per_context(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="commgraph")
    spmd(lambda world: world.context(cg.Layout(2, tp=2), name="target"), 2)
    lines = [record.getMessage() for record in caplog.records if "'target'" in record.getMessage() and record.levelno == logging.INFO]
    assert len(lines) == 2
    assert any("tp 1/2" in line for line in lines)


def test_warmup_and_buffers_are_collective_and_harmless() -> None:
    def run(world: cg.World) -> Any:
        ctx = world.context(cg.Layout(4, tp=2, pp=2), name="a")
        ctx.warmup()
        ctx.prepare_communication_buffers(torch.nn.Linear(2, 2))
        return int(ctx.tp.all_reduce(torch.tensor(1)))

    assert spmd(run, 4) == [2] * 4


def test_a_context_cannot_be_changed() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        for target, name in ((ctx, "tp"), (ctx, "layout"), (ctx, "anything"), (ctx, "_groups"), (ctx.tp, "ranks"), (ctx.tp, "name")):
            with pytest.raises(AttributeError):
                setattr(target, name, None)
            with pytest.raises(AttributeError):
                delattr(target, name)
        with pytest.raises(attrs.exceptions.NotAnAttrsClassError):
            attrs.evolve(ctx, name="b")  # type: ignore[misc]
        with pytest.raises(TypeError):
            ctx.options["tp"] = cg.CommunicatorOptions()  # type: ignore[index]
        with pytest.raises(TypeError):
            ctx.tp.communicators["all_reduce"] = ()  # type: ignore[index]
        assert copy.copy(ctx) is copy.deepcopy(ctx) is ctx
        assert copy.copy(ctx.tp) is copy.deepcopy(ctx.tp) is ctx.tp
        layer = torch.nn.Linear(2, 2)
        layer.__dict__["ctx"] = ctx
        assert copy.deepcopy(layer).__dict__["ctx"] is ctx

    spmd(run, 2)


# Whole or not at all.


def test_a_name_in_use_is_refused_on_every_rank_and_free_again_after_close() -> None:
    def run(world: cg.World) -> Any:
        layout = cg.Layout(2, tp=2)
        first = world.context(layout, name="a")
        with pytest.raises(cg.ConfigurationError, match="open already"):
            world.context(layout, name="a")
        assert int(first.tp.all_reduce(torch.tensor(1))) == 2
        for _ in range(3):
            first.close()
            first = world.context(layout, name="a")
            assert int(first.tp.all_reduce(torch.tensor(1))) == 2
        for name in ("", None, 3, "a/b"):
            with pytest.raises(cg.ConfigurationError, match="needs a name"):
                world.context(layout, name=name)
        return True

    assert all(spmd(run, 2))


@pytest.mark.parametrize(
    ("field", "usual", "other"),
    [
        ("the layout", {"layout": cg.Layout(4, tp=2)}, {"layout": cg.Layout(4, tp=4)}),
        ("the layout", {"layout": cg.Layout(4, tp=2)}, {"layout": cg.Layout(4, tp=2, groups={"x": ("tp",)})}),
        ("the layout", {"layout": cg.Layout(4, tp=2, dp=2)}, {"layout": cg.Layout(4, tp=2, pp=2)}),
        ("the options", {"options": None}, {"options": cg.CommunicatorOptions(check=True)}),
        ("the options", {"options": {}}, {"options": {"tp": cg.CommunicatorOptions(isolate=True)}}),
        ("the options", {"options": {}}, {"options": cg.CommunicatorOptions(timeout=timedelta(seconds=3))}),
        ("the options", {"groups": ("tp",)}, {"groups": ("tp", "dp")}),
    ],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_what_ranks_disagree_about_is_named_on_every_rank(field: str, usual: dict[str, Any], other: dict[str, Any], odd: int) -> None:
    def build(world: cg.World) -> Any:
        asked = {"layout": cg.Layout(4, tp=2), **(other if world.rank == odd else usual)}
        return world.context(asked.pop("layout"), name="target", **asked)

    errors = outcomes(build, 4)
    rest = ", ".join(str(rank) for rank in range(4) if rank != odd)
    for rank, error in enumerate(errors):
        assert type(error) is cg.LayoutMismatchError, error
        text = str(error)
        assert text.startswith(f"rank {rank}: context 'target': the ranks disagree about {field}:")
        assert f"ranks {odd}: " in text
        assert f"ranks {rest}: " in text


def test_options_that_mean_the_same_agree_however_they_were_written() -> None:
    def build(world: cg.World) -> bool:
        layout = cg.Layout(4, tp=2, pp=2) if world.rank % 2 else cg.Layout(4, dp=1, tp=2, pp=2, pcp=1)
        default = cg.CommunicatorOptions()
        options = [None, default, {}, {"tp": default}][world.rank]
        groups = None if world.rank == 0 else [name for name in reversed(layout.names) if name not in ("world", "replica")]
        with world.context(layout, name="a", options=options, groups=groups) as ctx:
            return int(ctx.tp.all_reduce(torch.tensor(1))) == 2

    assert spmd(build, 4) == [True] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"check": "yes"},
        {"shm": None},
        {"message_queue": 1},
        {"deterministic": "x"},
        {"backend": 5},
        {"backend": ""},
        {"isolate": None},
        {"isolate": 5},
        {"isolate": [5]},
        {"backend_settings": [("max_ctas", 1), ("max_ctas", 2)]},
    ],
)
def test_options_of_other_kinds_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(cg.ConfigurationError, match=f"^CommunicatorOptions\\({name}="):
        cg.CommunicatorOptions(**options)


def test_settings_may_come_from_anything_that_is_gone_through_once() -> None:
    given: Any = (pair for pair in [("min_ctas", 2), ("max_ctas", 8)])
    assert cg.CommunicatorOptions(backend_settings=given).backend_settings == (("max_ctas", 8), ("min_ctas", 2))


class Failing(cg.CpuPlatform):
    """Cannot serve the given ranks."""

    def __init__(self, rank: int, error: Exception) -> None:
        self.rank = rank
        self.error = error

    def communicators(self, facts: Any, transport: Any) -> Any:
        if facts.ranks[facts.rank_in_group] == self.rank and len(facts.ranks) == 2:
            raise self.error
        return super().communicators(facts, transport)


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("error", [cg.BackendUnavailableError("no such device"), RuntimeError("driver exploded"), OSError("disk")])
@again_if_late
def test_one_rank_that_fails_in_a_build_fails_it_on_all(bad: int, error: Exception) -> None:
    def run(world: cg.World) -> Any:
        begun = time.monotonic()
        try:
            world.context(cg.Layout(4, tp=2, pp=2), name="a", platform=Failing(bad, error))
        except Exception as raised:
            in_time(time.monotonic() - begun, 2)
            # Nothing is left half made, and the next build works.
            with world.context(cg.Layout(4, tp=2, pp=2), name="a") as ctx:
                assert int(ctx.tp.all_reduce(torch.tensor(1))) == 2
            return raised

    for rank, raised in enumerate(spmd(run, 4, timeout=30)):
        if rank == bad:
            assert raised is error
        else:
            assert type(raised) is cg.BuildError
            assert f"rank {bad} could not build it: {type(error).__name__}: {error}" in str(raised)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ({"layout": cg.Layout(4, tp=2)}, cg.LayoutError, "is for 4 ranks, this world has 3"),
        ({"layout": "tp=2"}, TypeError, "a commgraph.Layout is needed"),
        ({"groups": ("tensor",)}, cg.LayoutError, "tensor"),
        ({"options": {"tensor": cg.CommunicatorOptions()}}, cg.LayoutError, "tensor"),
        ({"options": cg.CommunicatorOptions(isolate="tensor")}, cg.LayoutError, "isolate names"),
        ({"options": {"tp": 5}}, cg.ConfigurationError, "give CommunicatorOptions"),
        ({"options": 5}, cg.ConfigurationError, "give CommunicatorOptions"),
        ({"options": cg.CommunicatorOptions(backend="nccl")}, cg.BuildError, "nccl"),
    ],
)
@again_if_late
def test_a_wrong_argument_on_one_rank_raises_on_all_at_once(bad: int, asked: dict[str, Any], kind: type[Exception], text: str) -> None:
    def build(world: cg.World) -> Any:
        mine = {"layout": cg.Layout(3, tp=3), **(asked if world.rank == bad else {})}
        return world.context(mine.pop("layout"), name="a", **mine)

    with within(2):
        errors = outcomes(build, 3)
    for rank, error in enumerate(errors):
        assert isinstance(error, kind if rank == bad else cg.BuildError), error
        assert text in str(error)


@pytest.mark.parametrize("absent", [0, 2])
@again_if_late
def test_a_rank_that_never_comes_is_named_within_the_timeout(absent: int) -> None:
    store, given_up = ThreadStore(), threading.Barrier(3)

    def run(rank: int) -> Any:
        world = cg.World.from_store(store, rank=rank, world_size=3, timeout=timedelta(seconds=1.5))
        try:
            if rank == absent:
                given_up.wait(30)
                return None
            begun = time.monotonic()
            with pytest.raises(cg.BuildError, match=f"rank {absent}") as caught:
                world.context(cg.Layout(3, tp=3), name="a")
            took = time.monotonic() - begun
            given_up.wait(30)
            return took, str(caught.value)
        finally:
            world.close(timeout=timedelta(seconds=10))

    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda r=r: results.update({r: run(r)})) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    present = [results[rank] for rank in range(3) if rank != absent]
    assert present[0][0] >= 1.5, present
    in_time(max(seconds for seconds, _ in present), 1.5 + 2)


def test_a_strategy_that_only_one_rank_has_is_found_at_build() -> None:
    """Routing is compared at the end of a build: a call that one rank serves by another strategy than its peers would hang them."""

    class Lopsided(cg.CpuPlatform):
        def __init__(self, odd: bool) -> None:
            self.odd = odd

        def communicators(self, facts: Any, transport: Any) -> Any:
            made = super().communicators(facts, transport)
            if self.odd:
                for communicator in made:
                    communicator.name = "another"  # type: ignore[misc]  # a rank that differs is what is tested
            return made

    errors = outcomes(lambda world: world.context(cg.Layout(3, tp=3), name="a", platform=Lopsided(world.rank == 1)), 3)
    for error in errors:
        assert type(error) is cg.LayoutMismatchError
        assert "the strategies of group" in str(error)
        assert "ranks 1: " in str(error)
        assert "ranks 0, 2: " in str(error)


def test_a_failed_build_closes_what_it_had_made() -> None:
    def run(world: cg.World) -> None:
        made: list[Any] = []

        class Counting(Failing):
            def communicators(self, facts: Any, transport: Any) -> Any:
                made.append(transport)
                return super().communicators(facts, transport)

        with pytest.raises((cg.BuildError, RuntimeError)):
            world.context(cg.Layout(4, tp=2, pp=2), name="a", platform=Counting(3, RuntimeError("no")))
        assert made
        assert all(transport.has_aborted for transport in made)

    spmd(run, 4)


# Several at once.


def layouts_of_eight(size: int) -> list[cg.Layout]:
    return [
        cg.Layout(size, tp=size),
        cg.Layout(size, pp=size),
        cg.Layout(size, tp=2, pp=size // 2),
        cg.Layout(size, dp=2, tp=size // 2),
        cg.Layout(size, pcp=2, tp=2, dcp=2),
        cg.Layout(size, dp=size),
        cg.Layout.from_axes(size, {"tp": 2, "pp": size // 2}),
        cg.Layout.from_groups(size, {"tp": [list(range(size - 1, -1, -1))], "pp": [[rank] for rank in range(size)]}),
    ]


def program(ctx: cg.ParallelContext, seed: int, steps: int) -> Iterator[torch.Tensor]:
    """Results that depend on context, rank, order and step; the same sequence of calls on every rank."""
    choices = random.Random(seed)
    values = torch.Generator().manual_seed(seed * 1000 + ctx.rank)
    names = sorted(ctx.layout.names)
    for _ in range(steps):
        group = ctx[choices.choice(names)]
        x = torch.randn(choices.randint(1, 5), group.world_size * choices.randint(1, 3), generator=values)
        operation = choices.choice(("all_reduce", "all_gather", "reduce_scatter", "broadcast", "object"))
        if operation == "object":
            yield torch.tensor(group.all_gather_object(x.tolist()))
        elif operation == "broadcast":
            yield group.broadcast(x.clone(), src=group.world_size - 1)
        else:
            yield getattr(group, operation)(x)


def test_eight_contexts_from_two_threads_give_the_bits_of_sequential_runs() -> None:
    """Four ranks, eight contexts each; two threads per rank take turns over four contexts each, in orders of their own."""
    size, steps = 4, 30

    def sequentially(world: cg.World) -> list[list[torch.Tensor]]:
        results = []
        for i, layout in enumerate(layouts_of_eight(size)):
            with world.context(layout, name=f"context {i}") as ctx:
                results.append(list(program(ctx, i, steps)))
        return results

    def interleaved(world: cg.World) -> list[list[torch.Tensor]]:
        contexts = [world.context(layout, name=f"context {i}") for i, layout in enumerate(layouts_of_eight(size))]
        results: list[list[torch.Tensor]] = [[] for _ in contexts]
        errors: list[BaseException] = []

        def work(mine: list[int], at_once: int) -> None:
            try:
                running = {i: program(contexts[i], i, steps) for i in mine}
                while running:
                    for i in list(running):
                        results[i] += (piece := list(itertools.islice(running[i], at_once)))
                        if not piece:
                            del running[i]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=([0, 2, 4, 6], 1)), threading.Thread(target=work, args=([1, 3, 5, 7], 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    expected, got = spmd(sequentially, size), spmd(interleaved, size)
    for rank in range(size):
        for i in range(8):
            assert same(expected[rank][i], got[rank][i]), f"rank {rank}, context {i}"
    # Something would be found if a context answered with another's groups: they do not all give the same.
    assert not same(got[0][0], got[0][1])


def test_a_context_is_built_on_one_thread_while_another_uses_older_ones() -> None:
    def run(world: cg.World) -> Any:
        older = world.context(cg.Layout(4, tp=2, pp=2), name="older")
        stop = threading.Event()
        rounds, errors = [0], []

        def use() -> None:
            try:
                # All ranks stop at the same round: rank 0 says when.
                while older.world.broadcast_object(stop.is_set() if world.rank == 0 else None) is not True:
                    assert int(older.tp.all_reduce(torch.tensor(world.rank))) == sum(older.tp.ranks)
                    rounds[0] += 1
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        try:
            for i in range(5):
                with world.context(cg.Layout(4, tp=4), name=f"newer {i % 2}") as ctx:
                    assert int(ctx.tp.all_reduce(torch.tensor(world.rank))) == 6
        finally:
            stop.set()
            thread.join(20)
        assert not errors
        return rounds[0]

    rounds = spmd(run, 4)
    assert len(set(rounds)) == 1
    assert rounds[0] > 5


def test_two_contexts_of_other_names_are_built_on_two_threads_at_once() -> None:
    def run(world: cg.World) -> Any:
        sums: dict[str, int] = {}

        def build(name: str, layout: cg.Layout) -> None:
            for _ in range(3):
                with world.context(layout, name=name) as ctx:
                    sums[name] = int(ctx.tp.all_reduce(torch.tensor(world.rank)))

        threads = [
            threading.Thread(target=build, args=("a", cg.Layout(4, tp=2))),
            threading.Thread(target=build, args=("b", cg.Layout(4, tp=4))),
        ]
        for thread in threads if world.rank % 2 else threads[::-1]:  # the ranks begin in another order
            thread.start()
        for thread in threads:
            thread.join(30)
        return sums

    assert spmd(run, 4) == [{"a": 1, "b": 6}, {"a": 1, "b": 6}, {"a": 5, "b": 6}, {"a": 5, "b": 6}]


def test_contexts_are_closed_in_any_order_and_the_others_go_on() -> None:
    def run(world: cg.World) -> None:
        contexts = {name: world.context(cg.Layout(2, tp=2), name=name) for name in "abcd"}
        for name in "cadb":
            contexts.pop(name).close()
            for ctx in contexts.values():
                assert int(ctx.tp.all_reduce(torch.tensor(1))) == 2

    spmd(run, 2)


def test_use_after_close() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="target")
        ctx.close()
        ctx.close()
        assert ctx.closed
        assert "closed" in repr(ctx)
        for call in (
            lambda: ctx.tp.all_reduce(torch.ones(1)),
            lambda: ctx.tp.broadcast_object(1),
            ctx.tp.barrier,
            lambda: ctx.tp.send(torch.ones(1)),
            lambda: ctx.pp.all_reduce(torch.ones(1)),  # one rank: nothing was closed, and yet
            ctx.warmup,
        ):
            with pytest.raises(cg.ContextClosedError, match="closed"):
                call()
        assert ctx.tp.cpu_group is None
        assert world.group.all_gather_object(world.rank) == [0, 1]

    spmd(run, 2)


def test_one_group_of_a_context_is_closed_alone() -> None:
    def run(world: cg.World) -> None:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        ctx.tp.close()
        with pytest.raises(cg.ContextClosedError):
            ctx.tp.barrier()
        # ep shares the communicators, which live until the last one is closed.
        assert int(ctx.ep.all_reduce(torch.tensor(1))) == 2

    spmd(run, 2)


@again_if_late
def test_an_exception_inside_a_context_releases_its_peers_and_spares_the_world() -> None:
    def run(world: cg.World) -> Any:
        begun = time.monotonic()
        try:
            with world.context(cg.Layout(2, tp=2), name="a") as ctx:
                if world.rank == 0:
                    raise ZeroDivisionError
                ctx.tp.all_reduce(torch.ones(1))
        except (ZeroDivisionError, cg.PeerLostError) as error:
            in_time(time.monotonic() - begun, 2)
            return type(error), world.group.all_gather_object(world.rank)

    assert spmd(run, 2) == [(ZeroDivisionError, [0, 1]), (cg.PeerLostError, [0, 1])]


@again_if_late
def test_closing_with_a_broken_group_does_not_wait() -> None:
    def run(world: cg.World) -> Any:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        call = ctx.tp.all_reduce if world.rank == 0 else ctx.tp.all_gather
        with pytest.raises(cg.CollectiveError):
            call(torch.ones(1), timeout=0.3)
        with within(2):
            ctx.close()
        with world.context(cg.Layout(2, tp=2), name="a") as again:  # not even the name is lost
            return int(again.tp.all_reduce(torch.tensor(1)))

    assert spmd(run, 2) == [2, 2]


# What a build costs: store operations.


def operations_per_rank(layout: cg.Layout, *, repeat: int = 1, shm: bool = True) -> list[tuple[int, int]]:
    """(store operations, keys they touched) of each rank while a context of this layout is built, the world apart."""
    shared = ThreadStore()
    stores = [CountingStore(shared) for _ in range(layout.world_size)]
    counts: dict[int, tuple[int, int]] = {}

    def run(rank: int) -> None:
        with cg.World.from_store(stores[rank], rank=rank, world_size=layout.world_size, timeout=timedelta(seconds=60)) as world:
            stores[rank].operations = stores[rank].keys = 0
            for i in range(repeat):
                world.context(layout, name=f"context {i}", options=cg.CommunicatorOptions(shm=shm))
            counts[rank] = stores[rank].operations, stores[rank].keys

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(layout.world_size)]
    with mock.patch.object(meeting, "_WATCH", 60.0):  # how often the store is asked for an error of another rank depends on the time
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return [counts[rank] for rank in range(layout.world_size)]


def own_groups(layout: cg.Layout, rank: int) -> set[tuple[int, ...]]:
    return {layout.ranks(name, rank) for name in layout.names if layout.size(name) > 1}


@pytest.mark.parametrize("layout", [cg.Layout(8, tp=2, pp=2, dp=2), cg.Layout(8, tp=8), cg.Layout(12, tp=2, pp=3), cg.Layout(6)])
def test_a_build_costs_a_rank_what_its_own_groups_are(layout: cg.Layout) -> None:
    for rank, (operations, keys) in enumerate(operations_per_rank(layout, shm=False)):
        sizes = [len(ranks) for ranks in own_groups(layout, rank)]
        # A set, a look, a read and at last a delete; gloo's own set, then a wait and a get per peer. Before and after all groups the ranks
        # agree, in at most nine operations each; rank 0 reads there what everybody said.
        bound = sum(3 * size + 8 for size in sizes) + 18
        assert operations <= bound, (rank, sizes, operations)
        assert keys <= bound + (2 * 2 * layout.world_size if rank == 0 else 0), (rank, sizes, keys)


def test_a_build_costs_no_more_where_others_have_more_groups() -> None:
    """Rank 0 has a pair and the world in each case; the other ranks have ever more and ever larger groups of their own."""

    def layout(rest: Mapping[str, list[list[int]]]) -> cg.Layout:
        return cg.Layout.from_groups(10, {"pair": [[0, 1], *([rank] for rank in range(2, 10))], **rest})

    few = layout({})
    many = layout({f"more{i}": [[0], [1], list(range(2, 10 - i)), *([rank] for rank in range(10 - i, 10))] for i in range(5)})
    pairs = layout({f"pairs{i}": [[0], [1], [2, 3 + i % 3], *([r] for r in range(3, 10) if r != 3 + i % 3)] for i in range(4)})
    counts = [operations_per_rank(case, shm=False) for case in (few, many, pairs)]
    assert counts[0][:2] == counts[1][:2] == counts[2][:2]
    # Which shows something only because the others do pay for theirs.
    assert counts[1][2] > counts[0][2]
    # Groups in shared memory meet over links, and use the store for none of their own.
    assert len({tuple(operations_per_rank(case)) for case in (few, many, pairs)}) == 1


def test_the_tenth_build_costs_what_the_first_did() -> None:
    layout = cg.Layout(4, tp=2, pp=2)
    once, often = operations_per_rank(layout), operations_per_rank(layout, repeat=5)
    assert [(5 * operations, 5 * keys) for operations, keys in once] == often


def test_a_world_of_one_rank_costs_no_operation() -> None:
    assert operations_per_rank(cg.Layout(1)) == [(0, 0)]
