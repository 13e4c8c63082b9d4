"""Ranks that nobody pinned beside ranks that are: steps of computing and all-reduces, in turn, for one or more source trees.

Every variant (a tree, and how its ranks are placed) has its processes from the beginning; the program lets one variant at a time run a
block, round after round, so that what the machine does meanwhile meets all of them. A rank looks at which core it runs on after it has
computed and after it has exchanged: two ranks are together on a core where both looks of one step say so.

    python tests/programs/unpinned.py --trees old=/path/to/a/built/tree new=. --ranks 2 --calls 50 --compute 5
    python tests/programs/unpinned.py --trees old=/path/to/a/built/tree new=. --objects

``--spread`` computes a part before each all-reduce, as the layers of a model do, in place of all of it before the first. ``--beside 2``
runs two busy loops meanwhile. ``--objects`` measures an object there and back between two processes that may run anywhere, that were
confined to one core, or that are confined to one once they have built their group: by send_object, by two message queues, and by
multiprocessing.Pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SECONDS = 60.0
LIBC = ctypes.CDLL(None)

# A rank's process. Commands come by standard input, one line each; what a command answers goes to standard output as one line of JSON.


class Rank:
    """One rank of a variant, in its own process."""

    def __init__(self, init: str, rank: int, n: int) -> None:
        import torch

        import commgraph as cg

        torch.set_num_threads(1)
        self.rank, self.n = rank, n
        self.world = cg.World.connect(f"file://{init}", rank=rank, world_size=n)
        self.group = self.world.context(cg.Layout(n, tp=n), name="unpinned").tp
        self.data = bytes(1 << 12)
        self.source = random.Random(rank)
        self.x = torch.ones(3072 // 4)

    def compute(self, rounds: int, uneven: float) -> None:
        for _ in range(round(rounds * self.source.uniform(1 - uneven, 1 + uneven))):
            zlib.crc32(self.data)

    def steps(self, steps: int, calls: int, rounds: int, spread: bool, uneven: float) -> list[tuple[float, int, int]]:
        """Seconds of each step; the core after computing, and after the exchange."""
        group, x, taken = self.group, self.x, []
        first = LIBC.sched_getcpu()
        for _ in range(steps):
            began = time.perf_counter()
            if spread:
                for _ in range(calls):
                    self.compute(rounds // calls, uneven)
                    first = LIBC.sched_getcpu()
                    group.all_reduce_(x, op="max")
            else:
                self.compute(rounds, uneven)
                first = LIBC.sched_getcpu()
                for _ in range(calls):
                    group.all_reduce_(x, op="max")
            taken.append((time.perf_counter() - began, first, LIBC.sched_getcpu()))
        return taken

    def together(self) -> None:
        """All ranks on one core, and free to leave it."""
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        os.sched_setaffinity(0, allowed)

    def objects(self, calls: int, pipes: Sequence[int]) -> dict[str, float]:
        """Microseconds one way of each kind, from `calls` of each there and back."""
        import pickle
        from multiprocessing.connection import Connection

        import commgraph as cg

        pipe = Connection(os.dup(pipes[self.rank]))  # it closes what it is given
        mine = cg.MessageQueue.create(1)
        handles: list[Any] = self.group.all_gather_object(mine.handle)
        theirs = cg.MessageQueue.attach(handles[1 - self.rank], 0)
        mine.wait_until_ready(SECONDS)
        peer = 1 - self.rank
        ways: dict[str, tuple[Callable[[Any], object], Callable[[], object]]] = {
            "send_object": (lambda obj: self.group.send_object(obj, peer), lambda: self.group.recv_object(peer)),
            "MessageQueue": (mine.enqueue, theirs.dequeue),
            "Pipe": (lambda obj: pipe.send_bytes(pickle.dumps(obj, protocol=5)), lambda: pickle.loads(pipe.recv_bytes())),
        }
        small = {"call": "execute_model", "step": 123456, "sent": time.perf_counter(), "last": True}
        answer: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(calls // 200):
            for name, (send, receive) in ways.items():
                self.group.barrier()
                began = time.perf_counter()
                for _ in range(200):
                    if self.rank:
                        receive()
                    send(small)
                    if not self.rank:
                        receive()
                answer[name].append((time.perf_counter() - began) / 400 * 1e6)
        self.group.barrier()
        return {name: statistics.median(times) for name, times in answer.items()}

    def serve(self) -> None:
        for line in sys.stdin:
            what, *arguments = json.loads(line)
            print(json.dumps(getattr(self, what)(*arguments)), flush=True)
        self.world.close()


# The parent.


def busy_seconds() -> float:
    """Seconds of all cores so far in which they were not idle."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def own_seconds(pids: Iterable[int]) -> float:
    """Seconds that these processes have used of them."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


class Variant:
    """The processes of one tree with one placement."""

    def __init__(self, name: str, tree: Path, cores: Sequence[Sequence[int] | None], init: Path, pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.steps: list[float] = []
        self.looks = self.together = self.disturbed = 0
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "rank", str(init), str(rank), str(len(cores))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=tree,
                pass_fds=pass_fds,
            )
            for rank in range(len(cores))
        ]
        for process, allowed in zip(self.processes, cores, strict=True):
            if allowed is not None:
                os.sched_setaffinity(process.pid, allowed)

    def __call__(self, *command: object) -> list[Any]:
        """What each rank answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name}: a rank ended")
            answers.append(json.loads(line))
        return answers

    def run(self, known: Sequence[int], *command: object) -> None:
        """One block of steps, which does not count if processes other than `known` took more than a tenth of a core meanwhile."""
        before = busy_seconds() - own_seconds(known), time.monotonic()
        ranks = self("steps", *command)
        others = (busy_seconds() - own_seconds(known) - before[0]) / (time.monotonic() - before[1])
        if others > 0.1:
            self.disturbed += 1
            return
        for each in zip(*ranks, strict=True):
            self.steps.append(max(seconds for seconds, _, _ in each))
            for look in (1, 2):
                self.looks += 1
                self.together += len({rank[look] for rank in each}) < len(each)

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(SECONDS)


def rounds_for(milliseconds: float) -> int:
    """How often `Rank.compute` has to go through its data to take so long here."""
    data, times = bytes(1 << 12), []
    for _ in range(200):
        began = time.perf_counter()
        zlib.crc32(data)
        times.append(time.perf_counter() - began)
    return round(milliseconds / 1000 / statistics.median(times))


SELDOM = """
import random, time
while True:
    time.sleep(random.uniform(0, 0.1))
    end = time.monotonic() + random.uniform(0, 0.02)
    while time.monotonic() < end:
        pass
"""


@contextlib.contextmanager
def other_programs(loops: int, now_and_then: int) -> Iterator[list[int]]:
    """The processes of programs that only compute, and of others that do for a sixth of the time."""
    programs = [subprocess.Popen([sys.executable, "-c", code]) for code in ["while True: pass"] * loops + [SELDOM] * now_and_then]
    try:
        yield [program.pid for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()


def report_steps(variants: Sequence[Variant]) -> None:
    for variant in variants:
        times = sorted(variant.steps)
        if not times:
            print(f"{variant.name:14} every one of {variant.disturbed} blocks was disturbed by other programs")
            continue
        median, late = statistics.median(times), times[len(times) * 9 // 10]
        share = 100 * variant.together / variant.looks
        print(
            f"{variant.name:14} {median * 1e3:7.2f} ms a step, {late * 1e3:7.2f} of ten the slowest, {share:5.1f} % together "
            f"({len(times)} steps; {variant.disturbed} blocks were disturbed)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", default=[f"here={Path.cwd()}"], help="name=folder of each source tree")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calls", type=int, default=50, help="all-reduces a step")
    parser.add_argument("--compute", type=float, default=5.0, help="milliseconds of computing a step")
    parser.add_argument("--spread", action="store_true", help="compute before each all-reduce")
    parser.add_argument("--uneven", type=float, default=0.0, help="how much longer or shorter a rank may compute than another, as a share")
    parser.add_argument("--beside", type=int, default=0, help="busy loops of another program")
    parser.add_argument("--now-and-then", type=int, default=0, help="other programs that compute for a sixth of the time")
    parser.add_argument("--unpinned", action="store_true", help="leave the pinned variants out")
    parser.add_argument("--together", action="store_true", help="begin each block with all ranks on one core")
    parser.add_argument("--block", type=int, default=100, help="steps of one variant in a row")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--objects", action="store_true", help="measure objects in place of steps")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rounds = rounds_for(options.compute)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        variants = []
        pipes: dict[str, list[int]] = {}
        for tree in options.trees:
            name, _, path = tree.partition("=")
            one_each: list[list[int] | None] = [[cores[rank % len(cores)]] for rank in range(options.ranks)]
            placements: dict[str, list[list[int] | None]] = {"unpinned": [None] * options.ranks}
            if options.objects:
                placements |= {"one core": [cores[:1]] * 2, "to one core": [None] * 2}  # from the beginning, or once all is built
            elif not options.unpinned:
                placements |= {"pinned": one_each}
            for placement, allowed in placements.items():
                ends = socket.socketpair()
                variant = Variant(
                    f"{name} {placement}",
                    Path(path).resolve(),
                    allowed,
                    Path(folder, f"{name}-{placement}"),
                    [end.fileno() for end in ends],
                )
                pipes[variant.name] = [end.detach() for end in ends]
                stack.callback(variant.end)
                variants.append(variant)
        for variant in variants:  # everybody is there, and warm
            variant("steps", 20, options.calls, rounds, options.spread, options.uneven)
            for process in variant.processes if "to one core" in variant.name else ():
                os.sched_setaffinity(process.pid, cores[:1])
        with other_programs(options.beside, options.now_and_then) as others:
            known = [os.getpid(), *others, *(process.pid for variant in variants for process in variant.processes)]
            until = time.monotonic() + options.seconds
            results: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
            while time.monotonic() < until:
                for variant in variants:
                    if options.objects:
                        results[variant.name].append(variant("objects", 2000, pipes[variant.name])[0])
                    else:
                        if options.together:
                            variant("together")
                        variant.run(known, options.block, options.calls, rounds, options.spread, options.uneven)
            if not options.objects:
                report_steps(variants)
            for name, rows in results.items() if options.objects else ():
                medians = {way: statistics.median(row[way] for row in rows) for way in rows[0]}
                print(f"{name:14} " + ", ".join(f"{way} {time:5.2f} us" for way, time in medians.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        Rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).serve()
    else:
        main()
