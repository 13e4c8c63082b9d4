"""Messages with tags, from any source, to oneself and both ways at once; objects scattered, gathered and in flight."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from tests.helpers import TooLateError, again_if_late, in_time, on, same
from tests.processes import PROGRAMS, Processes, outputs

HERE: list[dict[str, Any]] = [{}, {"shm": False}, {"check": True}, {"message_queue": False}]
ON_ONE_HOST = pytest.mark.parametrize("options", HERE, ids=str)
WAYS = pytest.mark.parametrize("options", [*HERE, {"nodes": 2}], ids=str)
BY = st.sampled_from([{}, {"shm": False}, {"check": True}, {"nodes": 2}])


# Random programs against what pairing by (sender, tag) in order gives.


@attrs.frozen
class Sent:
    """One message. Its tensor is full of its number in the program."""

    number: int
    src: int
    dst: int
    tag: int
    waits: bool


@attrs.frozen
class Program:
    """Messages in the order in which their senders send them, and for each rank the order in which it asks for its own.

    Attributes:
        sizes: entries of the messages of each tag.
        messages: all of them.
        asks: of each rank, (source or None for any, tag, whether it waits at once).
    """

    n: int
    sizes: tuple[int, ...]
    messages: tuple[Sent, ...]
    asks: tuple[tuple[tuple[int | None, int, bool], ...], ...]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    n = draw(st.integers(2, 3))
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=4, max_size=4)))
    ranks, tags = st.integers(0, n - 1), st.integers(0, 3)
    drawn = draw(st.lists(st.tuples(ranks, ranks, tags, st.booleans()), max_size=24))
    messages = tuple(Sent(i, *one) for i, one in enumerate(drawn))
    from_any = {(dst, tag) for dst in range(n) for tag in range(4) if draw(st.booleans())}
    asks = []
    for rank in range(n):
        mine = draw(st.permutations([m for m in messages if m.dst == rank]))
        asks.append(tuple((None if (rank, m.tag) in from_any else m.src, m.tag, draw(st.booleans())) for m in mine))
    return Program(n, sizes, messages, tuple(asks))


def play(g: GroupCoordinator, program: Program) -> list[tuple[int, int, int]]:
    """Return (source, tag, number) of each message that this rank asked for, in the order of its asking."""
    me = g.rank_in_group
    going: list[cg.Work[None]] = []
    for message in program.messages:
        if message.src != me:
            continue
        x = torch.full((program.sizes[message.tag],), message.number)
        # One without a tag may wait for its receiver, who may ask for another one first.
        if message.waits and message.tag and message.dst != me:
            g.send(x, message.dst, tag=message.tag)
            x.fill_(-1)
        else:
            going.append(g.isend(x, message.dst, tag=message.tag))
    coming: list[tuple[int | None, int, Any]] = []
    for src, tag, waits in program.asks[me]:
        how: tuple[Any, ...] = (program.sizes[tag], torch.int64, cg.ANY if src is None else src)
        waits_here = waits and src != me
        coming.append((src, tag, g.recv(*how, tag=tag) if waits_here else g.irecv(*how, tag=tag)))
    got = []
    for src, tag, found in coming:
        result = found.wait() if isinstance(found, cg.Work) else found
        x, source = result if src is None else (result, src)
        assert bool((x == x[0]).all())
        got.append((int(source), tag, int(x[0])))
    for work in going:
        work.wait()
    return got


@settings(max_examples=40)
@given(programs(), BY)
def test_messages_pair_by_sender_and_tag_in_order(program: Program, options: dict[str, Any]) -> None:
    played = on(program.n, lambda g: play(g, program), **options)
    for rank, got in enumerate(played):
        expected: dict[tuple[int, int], list[int]] = defaultdict(list)
        for message in program.messages:
            if message.dst == rank:
                expected[message.src, message.tag].append(message.number)
        seen: dict[tuple[int, int], list[int]] = defaultdict(list)
        for src, tag, number in got:
            seen[src, tag].append(number)
        assert seen == expected
        assert [src for src, _, _ in program.asks[rank] if src is not None] == [
            src for (src, _, _), (asked, _, _) in zip(got, program.asks[rank], strict=True) if asked is not None
        ]


# Tags


@WAYS
def test_tags_in_another_order_than_they_were_sent(options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        tags = [5, 0, (1 << 20) - 1, 1, 77]
        if g.is_first_rank:
            works = [g.isend(torch.full((tag % 7 + 1,), float(tag)), 1, tag=tag) for tag in tags]
            g.send_object("an object", 1)
            for work in works:
                work.wait()
            for tag in (9, 8, 9):
                g.send(torch.tensor([tag]), tag=tag)
        else:
            for tag in reversed(tags):
                assert (g.recv(tag % 7 + 1, torch.float32, 0, tag=tag) == tag).all()
            assert g.recv_object(0) == "an object"
            out = torch.empty(1, dtype=torch.int64)
            assert g.recv(1, torch.int64, 0, tag=8, out=out) is out
            assert out.item() == 8
            assert [int(g.recv(1, torch.int64, tag=9)) for _ in range(2)] == [9, 9]

    on(2, body, **options)


@WAYS
def test_a_receive_that_is_under_way_holds_up_none_of_another_tag(options: dict[str, Any]) -> None:
    """Nor does one from any source one that was begun before it from one rank, or the other way round."""

    def body(g: GroupCoordinator) -> None:
        one = torch.ones(1)
        if g.is_first_rank:
            first, every, last = g.irecv(1, one.dtype, 1, tag=1), g.irecv(1, one.dtype, cg.ANY, tag=1), g.irecv(1, one.dtype, 1, tag=2)
            assert g.recv(1, one.dtype, 2, tag=3) == 3
            assert last.wait() == 2
            x, src = every.wait()  # the first message of rank 1 is the other receive's
            assert (x.item(), src) == (5, 2)
            assert not first.is_completed()
            g.send(one, 1)
            assert first.wait() == 4
        elif g.rank_in_group == 1:
            g.send(one * 2, 0, tag=2)
            g.recv(1, one.dtype, 0)
            g.send(one * 4, 0, tag=1)
        else:
            g.send(one * 3, 0, tag=3)
            g.send(one * 5, 0, tag=1)

    on(3, body, **options)


@WAYS
def test_a_wrong_size_or_dtype_is_told(options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        if g.is_first_rank:
            g.send(torch.ones(3), 1, tag=4)
            with pytest.raises(cg.CollectiveError):
                g.recv(1, torch.float32, 1, timeout=10)
        else:
            with pytest.raises((cg.CollectiveMismatchError, cg.CollectiveTimeoutError), match="tag=4"):
                g.recv(4, torch.float32, 0, tag=4, timeout=0.5)

    on(2, body, **options)


def test_strategies_that_know_no_tags_refuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from commgraph.communicators.shm import ShmCommunicator

    monkeypatch.setattr(ShmCommunicator, "tagged", False)

    def body(g: GroupCoordinator) -> None:
        x = torch.ones(2)
        calls: list[Callable[[], Any]] = [
            lambda: g.send(x, tag=1),
            lambda: g.isend(x, tag=1),
            lambda: g.recv(2, x.dtype, tag=1),
            lambda: g.recv(2, x.dtype, cg.ANY),
            lambda: g.irecv(2, x.dtype, cg.ANY),
            lambda: g.batch([cg.Recv(x, tag=1)]),
        ]
        for call in calls:
            with pytest.raises(cg.UnsupportedTensorError, match=r"'shm' ignores tags.*Nothing was sent"):
                call()
        assert g.sendrecv(x, g.next_in_group, 2, x.dtype, g.prev_in_group).tolist() == [1, 1]

    on(2, body)


def test_tags_are_refused_where_torch_traces() -> None:
    def body(g: GroupCoordinator) -> None:
        calls: list[Callable[[torch.Tensor], Any]] = [
            lambda x: g.send(x, tag=1),
            lambda x: g.recv(2, x.dtype, tag=1),
            lambda x: g.recv(2, x.dtype, cg.ANY)[0],
        ]
        for call in calls:
            torch._dynamo.reset()
            with pytest.raises(Exception, match=r"cannot go with a call that is traced"):  # torch wraps it in an error of its own
                torch.compile(call, backend="eager", fullgraph=True)(torch.ones(2))

    on(1, body)


# Both at once


@WAYS
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_ring_of_sendrecv(n: int, options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        me = g.rank_in_group
        for size in (0, 3, 3 << 20):
            x = torch.full((size,), float(me))
            got = g.sendrecv(x, g.next_in_group, (size,), x.dtype, g.prev_in_group)
            assert got.shape == (size,)
            assert (got == g.prev_in_group).all()
            out = torch.empty(size)
            assert g.sendrecv(x, g.prev_in_group, size, x.dtype, g.next_in_group, out=out) is out
            assert (out == g.next_in_group).all()
            assert torch.equal(g.sendrecv(x, me, size, x.dtype, me), x)
        # The other side may be single calls.
        if me == 0:
            assert g.sendrecv(torch.ones(2), 1, 3, torch.int64, 1, timeout=30).tolist() == [7, 7, 7]
        elif me == 1:
            assert g.recv(2, torch.float32, 0).tolist() == [1, 1]
            g.send(torch.full((3,), 7), 0)

    on(n, body, **options)


# Any source


@WAYS
@again_if_late
def test_from_any_source_until_none_is_left(options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        n, me = g.world_size, g.rank_in_group
        if me:
            for i in range(10):
                g.send(torch.tensor([me, i]), 0)
        else:
            seen: list[list[int]] = [[] for _ in range(n)]
            for _ in range(10 * (n - 1)):
                x, src = g.recv((2,), torch.int64, cg.ANY)
                assert int(x[0]) == src
                seen[src].append(int(x[1]))
            assert seen[1:] == [list(range(10))] * (n - 1)
            begun = time.monotonic()
            with pytest.raises(cg.CollectiveTimeoutError, match=r"came from any rank within 0\.2 s\. The group is unharmed"):
                g.recv(2, torch.int64, cg.ANY, timeout=0.2)
            took = time.monotonic() - begun
            assert took > 0.1
            in_time(took, 0.2 + 2)
        g.barrier()
        # What was asked for in vain is there for the next one, from any rank or from one.
        if me == n - 1:
            g.send(torch.tensor([1, 2]), 0)
            g.send(torch.tensor([3, 4]), 0)
        elif me == 0:
            assert g.recv(2, torch.int64, n - 1).tolist() == [1, 2]
            out = torch.empty(2, dtype=torch.int64)
            x, src = g.recv(2, torch.int64, cg.ANY, out=out)
            assert x is out
            assert (out.tolist(), src) == ([3, 4], n - 1)

    on(3, body, **options)


def test_a_source_that_has_left_is_passed_over_unless_none_is_left() -> None:
    left = threading.Event()

    def body(g: GroupCoordinator) -> None:
        if g.rank_in_group == 2:
            g.send(torch.ones(1), 0)
            g.close()
            left.set()
        elif g.rank_in_group == 1:
            left.wait(30)
            time.sleep(0.3)
            g.send(torch.ones(1), 0)
            g.close()
        else:
            left.wait(30)
            assert g.recv(1, torch.float32, cg.ANY)[1] == 2
            assert g.recv(1, torch.float32, cg.ANY)[1] == 1
            with pytest.raises(cg.PeerLostError):
                g.recv(1, torch.float32, cg.ANY, timeout=20)

    on(3, body, isolate=("tp",))


# To oneself


@WAYS
@pytest.mark.parametrize("n", [1, 2])
def test_messages_to_oneself(n: int, options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        me = g.rank_in_group
        early = g.irecv(3, torch.float32, me, tag=1)
        assert not early.is_completed()
        x = torch.arange(6.0).view(2, 3).T
        assert g.isend(x, me).is_completed()
        assert g.isend(torch.ones(3), me, tag=1).wait() is None
        x.zero_()
        assert torch.equal(g.irecv((3, 2), torch.float32, me).wait(), torch.arange(6.0).view(2, 3).T)
        assert early.wait().tolist() == [1, 1, 1]
        out = torch.empty(2)
        g.batch([cg.Recv(out, me, tag=3), cg.Send(torch.ones(2), me, tag=3)]).wait()
        assert out.tolist() == [1, 1]
        tree = {"a": [torch.ones(5000), "b"]}
        g.isend_object(tree, me)
        tree["a"][0].zero_()  # type: ignore[attr-defined]
        assert same(g.irecv_object(me).wait(), {"a": [torch.ones(5000), "b"]})
        with pytest.raises(cg.CollectiveTimeoutError, match="The group is unharmed"):
            g.irecv_object(me, timeout=0.05).wait()
        for call in (lambda: g.send(x, me), lambda: g.recv(3, x.dtype, me), lambda: g.send_object(1, me), lambda: g.recv_object(me)):
            with pytest.raises(ValueError, match="itself"):
                call()
        g.isend(torch.ones(3), me, tag=4)
        with pytest.raises(cg.CollectiveMismatchError):
            g.irecv(3, torch.int64, me, tag=4).wait()

    on(n, body, **options | {"nodes": min(n, options.get("nodes", 1))})


def test_a_receive_from_oneself_ends_with_the_group() -> None:
    def body(g: GroupCoordinator) -> cg.Work[Any]:
        return g.irecv(1, torch.float32, g.rank_in_group)

    for n in (1, 2):
        for work in on(n, body):
            with pytest.raises((cg.ContextClosedError, cg.CollectiveError)):
                work.wait(5)


# Objects


@ON_ONE_HOST
@pytest.mark.parametrize("nodes", [1, 2])
def test_objects_scattered_and_gathered(nodes: int, options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        n, me = g.world_size, g.rank_in_group
        for size in (1, 1000, 40_000, 2_000_000):
            for root in range(n):
                mine = [{"rank": rank, "x": torch.full((size,), float(rank)), "b": b"b" * size} for rank in range(n)]
                got = g.scatter_object(mine if me == root else None, root)
                assert same(got, mine[me])
                assert (got is mine[me]) == (me == root)
                got["x"].zero_()
                got["x"].fill_(me)
                gathered = g.gather_object(got, root)
                assert (gathered is None) == (me != root)
                assert gathered is None or same(gathered, mine)
        assert g.scatter_object(tuple(range(n)) if me == 0 else None) == me

    on(3, body, nodes=nodes, **options)


@WAYS
def test_a_receiver_of_a_scatter_that_is_late_keeps_its_place(options: dict[str, Any]) -> None:
    late = threading.Barrier(2)

    def body(g: GroupCoordinator) -> None:
        if g.is_first_rank:
            for bad in (None, [1], [1, 2, 3]):
                with pytest.raises(ValueError, match=r"objs .*Nothing was sent"):
                    g.scatter_object(bad)
            late.wait(30)
            assert g.scatter_object("ab") == "a"
        else:
            for _ in range(2):
                with pytest.raises(cg.CollectiveTimeoutError, match="call again"):
                    g.scatter_object(timeout=0.1)
            late.wait(30)
            assert g.scatter_object() == "b"
        assert g.gather_object(g.rank_in_group, 1) == (None if g.is_first_rank else [0, 1])
        assert g.all_gather_object(1) == [1, 1]

    on(2, body, **options)


@pytest.mark.parametrize("options", [{}, {"shm": False}, {"check": True}], ids=str)
@pytest.mark.parametrize("other", ["gather_object", "broadcast_object", "all_reduce"])
def test_another_call_than_a_scatter_raises_on_every_rank(other: str, options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        calls: dict[str, Callable[[], Any]] = {
            "gather_object": lambda: g.gather_object(1, timeout=1),
            "broadcast_object": lambda: g.broadcast_object(1, timeout=1),
            "all_reduce": lambda: g.all_reduce(torch.ones(2), timeout=1),
        }

        def call() -> None:
            (calls[other] if g.is_first_rank else lambda: g.scatter_object(timeout=1))()
            g.all_reduce(torch.ones(3), timeout=2)

        with pytest.raises(cg.CollectiveError):
            call()

    on(2, body, **options)


@WAYS
def test_objects_in_flight_pair_with_single_ones(options: dict[str, Any]) -> None:
    def body(g: GroupCoordinator) -> None:
        if g.is_first_rank:
            changing = [b"x" * 100_000]
            works = [g.isend_object(changing, 1)]
            changing.append(b"y")
            works += [g.isend_object(i, 1) for i in range(3)]
            g.send_object(3, 1)
            for work in works:
                assert work.wait() is None
            # While an object is awaited tensors come and go.
            g.send(torch.ones(3), 1)
            g.send_object("at last", 1)
        else:
            first = g.irecv_object(0)
            assert first.wait() == [b"x" * 100_000]
            assert g.recv_object(0) == 0
            second, third = g.irecv_object(0), g.irecv_object(0)
            assert (third.wait(), second.wait()) == (2, 1)
            assert g.recv_object(0) == 3
            last = g.irecv_object(0)
            assert g.recv(3, torch.float32, 0).tolist() == [1, 1, 1]
            assert last.wait() == "at last"
            with pytest.raises(cg.CollectiveTimeoutError, match="call again"):
                g.irecv_object(0, timeout=0.05).wait()
        g.barrier()
        if g.is_first_rank:
            g.isend_object("late", 1)
        else:
            assert g.recv_object(0) == "late"

    on(2, body, **options)


# Processes


def said_in(processes: Processes, *scenarios: str, n: int = 3) -> dict[str, dict[int, str]]:
    """What each rank says of scenarios of programs/message_forms.py, all of which run at once."""
    started = [processes.start(PROGRAMS / "message_forms.py", scenario, str(n)) for scenario in scenarios]
    found = zip(scenarios, outputs(started), strict=True)
    return {scenario: {int(rank): said for rank, said in re.findall(r"rank (\d+): (.*)", text)} for scenario, text in found}


@pytest.mark.parametrize("scenario", ["ring", "ring/gloo", "laid_aside", "laid_aside/gloo"])
def test_large_messages_between_processes(scenario: str, processes: Processes) -> None:
    assert set(said_in(processes, scenario)[scenario].values()) <= {"done", "sent"}


def test_every_source_is_served_in_its_turn(processes: Processes) -> None:
    assert said_in(processes, "fair", n=4)["fair"][0] in ("spread 0", "spread 1")


@again_if_late
def test_an_idle_receive_costs_next_to_nothing(processes: Processes) -> None:
    found = said_in(processes, "idle", "idle/gloo", "idle_later", "idle_later/gloo")
    costs = {scenario: list(map(float, said[0].split()[1::2])) for scenario, said in found.items()}
    if any(share >= 0.01 for share, _ in costs.values()):
        raise TooLateError(f"of a core, and in seconds: {costs}")
    in_time(max(late for _, late in costs.values()), 0.5)


@again_if_late
def test_a_source_that_dies_is_told(processes: Processes) -> None:
    for said in said_in(processes, "killed", "killed/gloo").values():
        _, lost, _, seconds = said[0].split()
        assert lost == "2"
        in_time(float(seconds), 2)
