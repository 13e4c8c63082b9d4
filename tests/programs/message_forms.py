"""Ranks in processes of their own, forked from this one: message_forms.py SCENARIO RANKS. Each prints a line, or raises."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import torch

import commgraph as cg
from commgraph.coordinator import GroupCoordinator

LARGE = 6 << 20  # floats: 24 MiB, far beyond any ring


def ring(g: GroupCoordinator) -> str:
    """Every rank sends a large tensor on, by `sendrecv` and by a batch with tags."""
    x = torch.full((LARGE,), float(g.rank_in_group))
    for _ in range(3):
        assert bool((g.sendrecv(x, g.next_in_group, LARGE, x.dtype, g.prev_in_group) == g.prev_in_group).all())
    assert bool((g.sendrecv(x, g.prev_in_group, LARGE, x.dtype, g.next_in_group) == g.next_in_group).all())
    outs = [torch.empty(LARGE), torch.empty(LARGE)]
    g.batch([cg.Send(x, tag=1), cg.Recv(outs[1], tag=2), cg.Recv(outs[0], tag=1), cg.Send(-x, tag=2)]).wait()
    assert bool((outs[0] == g.prev_in_group).all())
    assert bool((outs[1] == -g.prev_in_group).all())
    return "done"


def laid_aside(g: GroupCoordinator) -> str:
    """A large message lies before the one that is asked for."""
    if g.is_first_rank:
        for peer in range(1, g.world_size):
            going = [g.isend(torch.full((LARGE,), float(tag)), peer, tag=tag) for tag in (3, 2, 1)]
            g.send_object("between", peer)
            for work in going:
                work.wait()
        return "sent"
    assert g.recv_object(0) == "between"
    for tag in (1, 2, 3):
        assert bool((g.recv(LARGE, torch.float32, 0, tag=tag) == tag).all())
    return "done"


def fair(g: GroupCoordinator) -> str:
    """All others have much to send: each is served in its turn."""
    times, n = 50, g.world_size  # which a ring holds
    if not g.is_first_rank:
        for i in range(times):
            g.send(torch.tensor([i]), 0, tag=5)
        g.barrier()
        return "sent"
    g.barrier()
    seen = [0] * n
    spread = 0
    for i in range(times * (n - 1)):
        x, src = g.recv(1, torch.int64, cg.ANY, tag=5)
        assert int(x) == seen[src]
        seen[src] += 1
        if i < times:  # all of them have more
            spread = max(spread, max(seen[1:]) - min(seen[1:]))
    assert seen[1:] == [times] * (n - 1)
    return f"spread {spread}"


def idle(g: GroupCoordinator) -> str:
    """Waiting for nothing costs nothing, and ends at once."""
    if not g.is_first_rank:
        time.sleep(3)
        g.send(torch.tensor([time.monotonic_ns()]), 0)
        return "sent"
    used, begun = time.process_time(), time.monotonic()
    first = g.recv(1, torch.int64, cg.ANY)
    now = time.monotonic_ns()
    share = (time.process_time() - used) / (time.monotonic() - begun)
    rest = [g.recv(1, torch.int64, cg.ANY)[1] for _ in range(g.world_size - 2)]
    assert sorted([first[1], *rest]) == list(range(1, g.world_size))
    return f"share {share:.5f} late {(now - int(first[0])) * 1e-9:.5f}"


def idle_later(g: GroupCoordinator) -> str:
    """The same of a receive that nobody waits for."""
    if not g.is_first_rank:
        time.sleep(3)
        g.send(torch.tensor([time.monotonic_ns()]), 0)
        return "sent"
    used, begun = time.process_time(), time.monotonic()
    x, first = g.irecv(1, torch.int64, cg.ANY).wait()
    now = time.monotonic_ns()
    share = (time.process_time() - used) / (time.monotonic() - begun)
    rest = [g.recv(1, torch.int64, cg.ANY)[1] for _ in range(g.world_size - 2)]
    assert sorted([first, *rest]) == list(range(1, g.world_size))
    return f"share {share:.5f} late {(now - int(x)) * 1e-9:.5f}"


def ended(pid: int) -> None:
    """Return once a process has ended."""
    assert select.select([os.pidfd_open(pid)], [], [], 60)[0]


def killed(g: GroupCoordinator) -> str:
    """A source dies; what it sent before still arrives."""
    shm = "shm" in g.communicators["send"]
    pids = g.all_gather_object(os.getpid())
    if g.is_last_rank:
        if shm:  # over a network the message of a dead rank is lost with it
            g.send(torch.ones(2), 0, tag=1)
        g.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    g.barrier()
    if not g.is_first_rank:
        ended(pids[0])
        return "sent"
    ended(pids[-1])
    if shm:
        x, src = g.recv(2, torch.float32, cg.ANY, tag=1)
        assert (x.tolist(), src) == ([1, 1], g.world_size - 1)
    begun = time.monotonic()
    try:
        g.recv(2, torch.float32, cg.ANY, tag=1)
    except cg.PeerLostError as error:
        return f"lost {error.rank} in {time.monotonic() - begun:.2f}"
    return "nothing"


SCENARIOS: dict[str, Callable[[GroupCoordinator], str]] = {
    scenario.__name__: scenario for scenario in (ring, laid_aside, fair, idle, idle_later, killed)
}


def run(rank: int, n: int, scenario: str, folder: str) -> None:
    options = cg.CommunicatorOptions(shm=not scenario.endswith("/gloo"))
    with cg.World.connect(f"file://{folder}/meet", rank=rank, world_size=n) as world:
        ctx = world.context(cg.Layout(n, tp=n), name="a", options=options)
        said = SCENARIOS[scenario.removesuffix("/gloo")](ctx.tp)
        os.write(1, f"rank {rank}: {said}\n".encode())
        if scenario.startswith("killed"):
            os._exit(0)
        ctx.tp.barrier()


def main() -> None:
    scenario, n = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(n):
            pid = os.fork()
            if pid == 0:
                try:
                    run(rank, n, scenario, folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ranks.append(pid)
        ends = [os.waitpid(pid, 0)[1] for pid in ranks]
    sys.exit(int(any(ends[:-1]) or (ends[-1] != 0 and not scenario.startswith("killed"))))


if __name__ == "__main__":
    main()
