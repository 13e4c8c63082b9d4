"""What happens to a job over several hosts: links are cut, processes stopped and killed, the one with the store among them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.helpers import again_if_late, in_time
from tests.hosts import Host, Job, joined, why_impossible

PROGRAMS = Path(__file__).parent.parent / "programs"

reason = why_impossible()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240)]
# The suite has one of each kind.
more = pytest.mark.hosts

# Seconds: beyond a deadline until a rank raises; after which a vanished host is noticed; in which a World is closed.
BEYOND, VANISHED, CLOSING = 2.0, 20.0, 5.0


def happen(job: Job, hosts: list[Host], fault: str) -> tuple[float, list[int]]:
    """Let a fault happen to a rank or its host, "kill 0"; return when, and which ranks go on."""
    kind, number = fault.split()
    who = int(number)
    if kind == "link":
        job.hosts[who].run("ip", "link", "set", "eth0", "down")
        return time.monotonic(), list(range(len(job.processes)))
    job.signal(who, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    return time.monotonic(), [rank for rank in range(len(job.processes)) if rank != who]


@pytest.mark.parametrize(
    ("fault", "work", "deadline", "each"),
    [
        pytest.param("stop 0", "all_reduce", 2, 1),
        *(
            pytest.param(fault, work, 4, each, marks=more)
            for fault in ("link 0", "link 1", "stop 0", "stop 1", "kill 0", "kill 1")
            for work, each in (("all_reduce", 1), ("large", 2), ("object", 1))
        ),
        *(
            pytest.param(fault, work, 60, 1, marks=more)
            for fault in ("link 0", "link 1", "kill 0")
            for work in ("large", "object", "queue")
        ),
    ],
)
@again_if_late
def test_every_rank_raises_within_its_deadline_and_closes(fault: str, work: str, deadline: int, each: int) -> None:
    """Deadlines of a minute are those of a host that vanishes: its end is noticed by the silence of its links."""
    with (
        joined(2) as hosts,
        Job(hosts, each, [str(PROGRAMS / "cut_off.py"), work, str(deadline)], {"COMMGRAPH_AUTHKEY": "a secret"}) as job,
    ):
        job.expect("ready", range(2 * each), 90)
        time.sleep(0.3)
        begun, left = happen(job, hosts, fault)
        limit = min(deadline + BEYOND, VANISHED)
        # The source of a broadcast goes on while there is room in the buffers of the sockets: what counts is how long its last call took.
        buffered = fault.startswith("stop") and work == "object"
        for heard in job.expect("heard", left, limit + (90 if buffered else 20)):
            in_time(heard["took"] if buffered else heard["at"] - begun, limit, job.output(left))
            assert heard["heard"] in ("PeerLostError", "CollectiveTimeoutError"), heard
        for closed in job.expect("closed", left, 40):
            in_time(closed["closed"], CLOSING, job.output(left))


@pytest.mark.parametrize("victim", [pytest.param(0, id="the one with the store"), pytest.param(3, id="another", marks=more)])
@again_if_late
def test_the_survivors_of_two_hosts_go_on(victim: int) -> None:
    """One of four ranks is killed; the three others, on both hosts, communicate again."""
    program = [str(PROGRAMS / "elastic.py"), "env", "0", "0", "20", f"{victim}=work"]
    with joined(2) as hosts, Job(hosts, 2, program) as job:
        left = [rank for rank in range(4) if rank != victim]
        job.expect("ready", left, 90)
        found = job.expect("new", left, 40)
        assert [(one["new"], one["size"], one["sum"]) for one in found] == [(i, 3, sum(left)) for i in range(3)]
        in_time(max(one["seconds"] for one in found), 3, found)


@more
def test_the_survivors_of_a_host_that_vanishes_go_on() -> None:
    """The host of rank 0, which served the store, loses its network; three ranks on two others go on, and it goes on alone."""
    program = [str(PROGRAMS / "elastic.py"), "env", "0", "0", "3", "0=cut"]
    with joined(4) as hosts, Job(hosts, 1, program) as job:
        job.expect("ready", range(4), 90)
        hosts[0].run("ip", "link", "set", "eth0", "down")
        found = job.expect("new", [1, 2, 3], 90)
        assert [(one["new"], one["size"], one["sum"]) for one in found] == [(i, 3, 6) for i in range(3)]
