"""`World.survivors` and `World.grow`: worlds that lose and win ranks, as threads and as processes."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph import admission
from commgraph.communicators.endpoint import Endpoint
from commgraph.deadline import Deadline
from commgraph.membership import Latecomers, Membership, View
from commgraph.reach import Reach
from commgraph.rendezvous import open_store
from commgraph.shm import native_module
from commgraph.testing import spmd
from tests.helpers import again_if_late, free_port, in_time, within
from tests.processes import PROGRAMS, Processes

pytestmark = pytest.mark.skipif(native_module.load() is None, reason="there is no native module")


def gather(world: cg.World, value: float) -> list[float]:
    """One call on a context over all ranks, and one on the world's own group."""
    with world.context(cg.Layout(world.size, tp=world.size), name="after") as context:
        found: list[float] = context.tp.all_gather(torch.tensor([value])).tolist()
        assert context.world.all_gather_object(value) == found
    return found


# Threads.


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("dead", [(2,), (0, 3)])
def test_the_survivors_are_numbered_in_their_old_order(nodes: int, dead: tuple[int, ...]) -> None:
    def program(world: cg.World) -> tuple[int, list[float]] | None:
        context = world.context(cg.Layout(4, tp=2, dp=2), name="before")
        context.world.barrier()
        if world.rank in dead:
            raise_in_place(world)
            return None
        with pytest.raises(cg.PeerLostError):
            context.world.all_gather_object(world.rank)
        with world.survivors() as after:
            assert world.closed
            assert context.closed
            with pytest.raises(cg.ContextClosedError, match="survivors"):
                world.context(cg.Layout(4), name="late")
            assert (after.node_count == 1) == (nodes == 1 or len({rank // 2 for rank in alive}) == 1)
            return after.rank, gather(after, float(world.rank))

    alive = [rank for rank in range(4) if rank not in dead]
    found = spmd(program, 4, nodes=nodes)
    assert found == [None if rank in dead else (alive.index(rank), list(map(float, alive))) for rank in range(4)]


def raise_in_place(world: cg.World) -> None:
    """End as a rank does whose program has failed: its connections are dropped."""
    with pytest.raises(KeyError), world:
        raise KeyError


def test_a_world_may_lose_ranks_again_and_again() -> None:
    """Down to one rank; each World is closed with the one before it, and nobody is left waiting."""

    def program(world: cg.World) -> list[int]:
        sizes = []
        while True:
            sizes.append(world.size)
            if world.rank == world.size - 1 and world.size > 1:
                raise_in_place(world)
                return sizes
            if world.size == 1:
                return sizes
            world = world.survivors()

    assert spmd(program, 4) == [[4, 3, 2, 1], [4, 3, 2], [4, 3], [4]]


def test_a_rank_that_waits_for_a_living_one_comes_too() -> None:
    """Rank 2 waits for rank 1 and never communicates with rank 0, which dies: the call ends because rank 1 leaves."""

    def program(world: cg.World) -> int:
        context = world.context(cg.Layout.from_groups(3, {"pair": [[1, 2]]}), name="a")
        if world.rank == 0:
            raise_in_place(world)
            return 0
        with pytest.raises(cg.PeerLostError, match="rank 0" if world.rank == 1 else "World.survivors"):
            world.group.barrier() if world.rank == 1 else context["pair"].recv_object(0)
        with world.survivors() as after:
            return len(gather(after, 0.0))

    assert spmd(program, 3) == [0, 2, 2]


def test_a_rank_that_comes_too_late_is_told() -> None:
    gone_on = threading.Event()

    def program(world: cg.World) -> int | str:
        world.group.barrier()
        if world.rank == 1:
            gone_on.wait(30)
            with pytest.raises(cg.BuildError, match=r"ranks 0, 2 go on without this rank \(World.survivors\)"):
                world.context(cg.Layout(3), name="late")
            with pytest.raises(cg.PeerLostError, match="it goes on with the ranks that are alive"):
                world.group.barrier()
            with pytest.raises(cg.BuildError, match=r"ranks 0, 2 go on without this rank, as rank \d says"):
                world.survivors()
            done.set()
            return "told"
        with world.survivors(timeout=0.5) as after:
            found = gather(after, 1.0)
            gone_on.set()
            done.wait(30)
            after.group.barrier()
            return len(found)

    done = threading.Event()
    assert spmd(program, 3) == [2, "told", 2]


def test_a_failure_without_a_death_is_everybodys() -> None:
    """Where one rank cannot build, all raise, with its words: nobody is left with a World of his own."""

    def program(world: cg.World) -> str:
        if world.rank == 1:
            world._successor = fail  # type: ignore[method-assign]  # of this rank
        with pytest.raises(cg.BuildError) as caught:
            world.survivors(timeout=10)
        with pytest.raises(cg.ContextClosedError):
            world.survivors()
        return str(caught.value)

    def fail(view: View) -> cg.World:
        raise cg.BuildError("no room")

    said = spmd(program, 3)
    assert all("rank 1 could not build it: BuildError: no room" in one for one in said), said


def test_nothing_is_left_of_a_world_that_was_left() -> None:
    def program(world: cg.World) -> None:
        if world.rank == 3:
            raise_in_place(world)
            return
        with world.survivors() as after:
            gather(after, 0.0)

    spmd(program, 4)
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        spmd(program, 4)
    gc.collect()
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


# The agreement itself, with ranks that leave it anywhere.


def four() -> list[Reach]:
    """Return what each of four ranks knows of the others."""
    endpoints = [Endpoint("127.0.0.1") for _ in range(4)]
    for endpoint in endpoints:
        endpoint.trust(b"secret")
    addresses = tuple(endpoint.address for endpoint in endpoints)
    return [Reach(None, endpoint, addresses, False) for endpoint in endpoints]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_die_anywhere_in_the_agreement_leave_the_others_with_one_result(seed: int) -> None:
    """Each of two ranks dies at a random message of its; whoever returns has the same members, and whoever lives returns."""
    random = torch.Generator().manual_seed(seed)
    reaches = four()
    dying = {int(rank): int(torch.randint(1, 14, (), generator=random)) for rank in torch.randperm(4, generator=random)[:2]}
    results: dict[int, Any] = {}

    class Dead(BaseException):
        pass

    def run(rank: int) -> None:
        membership = Membership[tuple[int, ...]](reaches[rank], rank, 20.0)
        send, left = membership._send, [dying.get(rank, -1)]

        def send_some(ranks: Any, message: Any) -> None:
            for one in ranks:
                if one != rank:
                    left[0] -= 1
                    if left[0] == 0:
                        raise Dead
                    send([one], message)

        def build(view: View) -> tuple[int, ...]:
            for _ in range(5):
                time.sleep(0.002)
                view.guard()
            return view.ranks

        membership._send = send_some  # type: ignore[method-assign]  # of this rank
        try:
            members, made = membership.settle(build, lambda _: None)
            assert members == made
            results[rank] = members
        except Dead:
            pass
        except BaseException as error:
            results[rank] = error
        finally:
            reaches[rank].endpoint.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), (dying, results)
    alive = {rank for rank in range(4) if rank not in dying}
    assert alive <= results.keys(), (dying, results)
    assert len({repr(results[rank]) for rank in results}) == 1, (dying, results)
    assert alive <= {*results[min(alive)]}, (dying, results)


def test_whoever_does_not_know_the_secret_is_not_heard() -> None:
    """A stranger that connects to where the ranks agree, before and after, gets no answer and changes nothing."""
    reaches = four()
    stranger = Endpoint("127.0.0.1")
    stranger.trust(b"another secret")
    addresses = (*reaches[0].addresses[:3], stranger.address)
    try:
        false = Membership[int](Reach(None, stranger, addresses, False), 3, 3.0)
        heard: list[tuple[int, ...]] = []

        def build(view: View) -> int:
            heard.append(view.ranks)
            return 1

        thread = threading.Thread(target=lambda: heard.append(false.settle(lambda view: 0, lambda _: None)[0]))
        thread.start()
        reaches[3].endpoint.close()
        honest = [
            threading.Thread(target=Membership[int](reaches[rank], rank, 2.0).settle, args=(build, lambda _: None)) for rank in range(3)
        ]
        for one in honest:
            one.start()
        for one in (*honest, thread):
            one.join(30)
        assert sorted(heard) == [(0, 1, 2)] * 3 + [(3,)]
        late = Latecomers(reaches[0].endpoint, false.group, (0, 1, 2), owns=True)
        late.close()
        late.close()
    finally:
        for reach in reaches:
            reach.endpoint.close()
        stranger.close()


# Processes.


def run(fates: Mapping[int, str], size: int, method: str, processes: Processes, *, seconds: float = 20) -> list[dict[str, Any]]:
    """Run a job; let stopped ranks go on once the others have done so; return what all of them said."""
    places = [f"{rank}={place}" for rank, place in fates.items()]
    ranks = [processes.start(PROGRAMS / "elastic.py", method, str(rank), str(size), str(seconds), *places) for rank in range(size)]
    said: list[dict[str, Any]] = []
    if "stop" in fates.values():
        living = [rank for rank in range(size) if rank not in fates]
        for rank in living:
            said += [json.loads(ranks[rank].stdout.readline()) for _ in range(2)]
        for rank in fates:
            ranks[rank].send_signal(signal.SIGCONT)
            said += map(json.loads, ranks[rank].communicate(timeout=100)[0].splitlines())
        for rank in living:
            ranks[rank].stdin.write("\n")
            ranks[rank].stdin.flush()
    errors = []
    for one in ranks:
        if one.returncode is None:
            out, err = one.communicate(timeout=100)
            said += map(json.loads, out.splitlines())
            errors.append(err)
    for rank, one in enumerate(ranks):
        assert one.returncode == (-signal.SIGKILL if fates.get(rank, "stop") != "stop" else 0), "\n".join(errors)
    return said


def check(said: Sequence[Mapping[str, Any]], fates: Mapping[int, str], size: int) -> list[float]:
    """All survivors have the World of the survivors; return how long it took each."""
    alive = [rank for rank in range(size) if rank not in fates]
    found = {one["rank"]: one for one in said if "new" in one}
    assert sorted(found) == alive
    for rank, one in found.items():
        assert (one["new"], one["size"], one["sum"]) == (alive.index(rank), len(alive), sum(alive))
    return [one["seconds"] for one in found.values()]


@again_if_late
def test_three_of_four_processes_go_on_when_the_one_with_the_store_was_killed(processes: Processes) -> None:
    fates = {0: "work"}
    took = check(run(fates, 4, f"tcp://127.0.0.1:{free_port()}", processes), fates, 4)
    in_time(max(took), 3)


@again_if_late
def test_a_process_that_was_stopped_and_goes_on_is_refused_everywhere(tmp_path: Path, processes: Processes) -> None:
    fates = {1: "stop"}
    said = run(fates, 3, f"file://{mkdtemp(dir=tmp_path)}/store", processes, seconds=1.5)
    check(said, fates, 3)
    refused = {one["call"]: one for one in said if "call" in one}
    assert {name: one["error"] for name, one in refused.items()} == {
        "all_reduce": "CollectiveMismatchError",  # the others gave up in one of another shape
        "context": "BuildError",
        "survivors": "BuildError",
    }
    assert "ranks 0, 2 go on without this rank" in refused["context"]["text"]
    assert "ranks 0, 2 go on without this rank" in refused["survivors"]["text"]
    in_time(max(one["seconds"] for one in refused.values()), 3, refused)


@pytest.mark.slow
@pytest.mark.hosts
@pytest.mark.parametrize("place", ["_gather", "_compare", "_view", "_vote", "end"])
@pytest.mark.parametrize("second", [0, 1])
def test_a_process_that_dies_in_the_agreement(place: str, second: int, processes: Processes) -> None:
    fates = {3: "work", second: place}
    check(run(fates, 5, f"tcp://127.0.0.1:{free_port()}", processes), fates, 5)


# Growth.


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_world_grows_while_its_context_goes_on(nodes: int) -> None:
    """From 2 to 4; the step at which all ranks hand over is found on the old context."""
    newcomers, found = list[threading.Thread](), list[tuple[int, list[float]]]()

    def newcomer(ticket: str) -> None:
        with cg.World.join(ticket, timeout=30) as world:
            found.append((world.rank, gather(world, float(world.rank))))

    def announce(ticket: str) -> None:
        newcomers.extend(threading.Thread(target=newcomer, args=(ticket,)) for _ in range(2))
        for thread in newcomers:
            thread.start()

    def program(world: cg.World) -> tuple[int, list[float]]:
        with world.context(cg.Layout(2, tp=2), name="old") as old:
            grown: list[cg.World] = []
            thread = threading.Thread(target=lambda: grown.append(world.grow(2, announce=announce)))
            thread.start()
            steps = 0
            while not old.tp.all_reduce(torch.tensor([len(grown)]), op="min").item():
                steps += 1
            thread.join()
            assert steps > 0
            with grown[0] as new:
                result = new.rank, gather(new, float(new.rank))
            assert old.tp.all_reduce(torch.ones(1)).item() == 2
            return result

    ranks = list(map(float, range(4)))
    assert spmd(program, 2, nodes=nodes) == [(0, ranks), (1, ranks)]
    for thread in newcomers:
        thread.join()
    assert sorted(found) == [(2, ranks), (3, ranks)]


def test_a_world_of_one_grows_at_a_known_place(tmp_path: Path) -> None:
    """The place is a file that both sides know; one more process comes than was asked for, and is told so."""
    place, said = f"file://{tmp_path}/place", list[object]()

    def newcomer() -> None:
        try:
            with cg.World.join(place, timeout=20) as world:
                said.append(gather(world, float(world.rank)))
        except cg.BuildError as error:
            said.append(str(error))

    threads = [threading.Thread(target=newcomer) for _ in range(2)]
    for thread in threads:
        thread.start()
    with cg.World.from_env({}) as world:
        time.sleep(0.3)
        with world.grow(1, at=place, timeout=20) as grown:
            assert gather(grown, 0.0) == [0.0, 1.0]
    for thread in threads:
        thread.join()
    assert [0.0, 1.0] in said
    assert any("as many processes as the world asked for had come" in str(one) for one in said), said


def test_an_exception_leaves_the_world_of_the_survivors_as_well() -> None:
    found: list[cg.World] = []

    def leaves(world: cg.World) -> None:
        with world:
            found.append(world.survivors(timeout=20))
            found[-1].group.barrier()
            raise ZeroDivisionError

    def program(world: cg.World) -> None:
        with pytest.raises(ZeroDivisionError):
            leaves(world)

    spmd(program, 2)
    assert [world.closed for world in found] == [True, True]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@again_if_late
def test_a_new_process_that_dies_with_its_rank_ends_the_growth() -> None:
    """It has a rank, and was not seen as one. Another one died between its two words, and is not waited for."""

    def newcomer(ticket: str) -> None:
        store, deadline = open_store(ticket, rank=1, world_size=2, timeout=timedelta(seconds=20)), Deadline.after(20)
        dist.PrefixStore("commgraph/grow", store).add("arrived", 1)
        admission.apply(store, deadline)

    def announce(ticket: str) -> None:
        child = multiprocessing.get_context("fork").Process(target=newcomer, args=(ticket,), daemon=True)
        child.start()
        children.append(child)

    children: list[Any] = []

    def program(world: cg.World) -> float:
        with within(3), pytest.raises(cg.BuildError, match=r"rank 2 \(.*a new one, died before all ranks had come"):
            world.grow(1, announce=announce, timeout=60)
        return float(world.group.all_reduce(torch.ones(1)))

    assert spmd(program, 2) == [2.0, 2.0]
    for child in children:
        child.join()


def test_growth_that_cannot_be_is_refused_and_leaves_the_world_as_it_was() -> None:
    def program(world: cg.World) -> float:
        with pytest.raises(cg.BuildError, match="0 of 1 new processes came within"):
            world.grow(1, announce=lambda ticket: None, timeout=0.3)
        with pytest.raises((cg.ConfigurationError, cg.BuildError), match="one or more"):
            world.grow(0, announce=lambda ticket: None)
        with pytest.raises((cg.ConfigurationError, cg.BuildError), match="announce"):
            world.grow(1)
        with pytest.raises(cg.LayoutMismatchError, match="number of new processes"):
            world.grow(1 + world.rank, at="tcp://127.0.0.1:1")
        return float(world.group.all_reduce(torch.ones(1)))

    assert spmd(program, 2) == [2.0, 2.0]
    with pytest.raises(cg.LaunchError, match="neither tcp"):
        cg.World.join("somewhere")
