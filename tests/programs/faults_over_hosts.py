"""Random faults over two hosts: ranks are killed and stopped, links cut, at random moments of random work.

    faults_over_hosts.py COUNT [SEED [FIRST]]

After each, every rank that goes on has to raise in time and to close, and nothing may be left of the job. Needs root. Each fault follows
from the seed and its own number alone: that of number 17 is had again by COUNT 1 and FIRST 17.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.hosts import Job, joined, why_impossible

PROGRAM = str(Path(__file__).with_name("cut_off.py"))
# Seconds that a rank may take beyond its deadline, to notice a vanished host, and to close; and what each process that runs beside adds.
BEYOND, VANISHED, CLOSING, BUSY = 2.0, 20.0, 5.0, 0.3


def once(chance: random.Random) -> str:
    """Let one fault happen; return what it was, and how long the slowest rank took."""
    kind = chance.choice(("kill", "stop", "link"))
    work = chance.choice(("all_reduce", "large", "object"))
    each, deadline = chance.choice((1, 2)), chance.choice((3, 60)) if kind != "stop" else 3
    who, moment = chance.randrange(2 * each), chance.uniform(0.0, 0.5)
    what = f"{kind} {who} of {2 * each} in {work} with {deadline} s, after {moment:.3f} s"
    with joined(2) as hosts, Job(hosts, each, [PROGRAM, work, str(deadline)], {"COMMGRAPH_AUTHKEY": "a secret"}) as job:
        job.expect("ready", range(2 * each), 600)  # on a busy machine the start takes long, and nothing is shown by it
        time.sleep(moment)
        if kind == "link":
            job.hosts[who].run("ip", "link", "set", "eth0", "down")
        else:
            job.signal(who, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        begun = time.monotonic()
        left = [rank for rank in range(2 * each) if rank != who or kind == "link"]
        busy = 1 + BUSY * os.getloadavg()[0]
        limit = min(deadline + BEYOND, VANISHED) + busy
        slowest = max(one["at"] - begun for one in job.expect("heard", left, limit + 30))
        closing = max(one["closed"] for one in job.expect("closed", left, 60))
        assert slowest < limit, f"{what}: {slowest:.1f} s\n{job.output(left)}"
        assert closing < CLOSING + busy, f"{what}: closed in {closing:.1f} s\n{job.output(left)}"
        # What a process leaves is in its host's own /dev/shm, which nobody else uses.
        kept = job.hosts[left[0]].read("ls", "/dev/shm").split()
        assert not kept, f"{what}: left {kept}"
    return f"{what}: raised after {slowest:.1f} s, closed in {closing:.1f} s"


def main() -> None:
    count, seed, first = (int(word) for word in (*sys.argv[1:], *("0", str(int(time.time())), "1")[len(sys.argv) - 1 :]))
    if reason := why_impossible():
        sys.exit(f"not run: {reason}")
    sys.stdout.write(f"seed {seed}\n")
    failed = []
    for number in range(first, first + count):
        try:
            said = once(random.Random(f"{seed} {number}"))
        except AssertionError as error:
            failed.append(number)
            said = f"FAILED at load {os.getloadavg()[0]:.0f}: {error}"
        sys.stdout.write(f"{number}. {said}\n")
        sys.stdout.flush()
    if failed:
        sys.exit(f"{len(failed)} of {count} failed: {failed}")


if __name__ == "__main__":
    main()
