"""The misuse matrix: every public operation, misused in every way, in shared memory and over gloo, on threads and on processes.

    misuse.py                        all cells; exit code 1 if one fails
    misuse.py --sample 80 --seed 3   so many of them, drawn by a seed
    misuse.py --only REGEX           those whose name fits: operation/misuse/transport/ranks, e.g. "^send/.*/gloo/processes"
    misuse.py --list                 their names
    misuse.py --json FILE            writes what each cell gave; --read FILE prints its tables

A cell is one job of three ranks in forked processes of its own, so a crash is the result of one cell. Rank 1 misuses an operation. Every
call of every rank must then end within its deadline and two seconds: with the right result, or with a public error that names rank, group
and operation. A cell that was late, or in which a correct call was refused, is tried again by itself, since a busy machine does that too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import commgraph as cg
from tests.programs.misuse_cells import CELLS, RANKS, Cell, Rank, run_in_threads, run_rank

CELL_SECONDS = 40.0
NOISE = re.compile(r"Traceback|leaked|terminate called|Segmentation|Fatal|Aborted|Exception ignored|Exception in thread")
# In this order, the worst first: the outcome of a cell is that of its worst call.
FAILURES = ("crash", "hang", "wrong", "bare", "nameless", "noise", "silent", "refused", "late")
# How errors are called in the tables; others are those of a build.
ENDS = {
    "UnsupportedTensorError": "argument",
    "ValueError": "argument",
    "TypeError": "argument",
    "LayoutError": "argument",
    "CollectiveMismatchError": "mismatch",
    "CollectiveTimeoutError": "timeout",
    "PeerLostError": "lost",
    "ContextClosedError": "closed",
    "ConcurrentCallError": "concurrent",
}
# These may be the doing of a machine that stood still.
DOUBTFUL = frozenset({"refused", "late"})


class Become(BaseException):
    """Unwinds a forked child out of everything, to become a rank at the end of this file."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.run = run


@attrs.define
class Job:
    """A cell that runs."""

    cell: Cell
    folder: Path
    pids: list[int]
    until: float
    codes: dict[int, int] = attrs.field(factory=dict)
    hung: bool = False

    @classmethod
    def start(cls, cell: Cell) -> Job:
        made = cls(cell, Path(tempfile.mkdtemp(prefix="misuse-")), [], time.monotonic() + CELL_SECONDS)
        programs: Sequence[Callable[[], None]]
        if cell.ranks == "threads":
            programs = [lambda: run_in_threads(cell, made.folder)]
        else:
            programs = [functools.partial(run_rank, Rank(cell, me, made.folder)) for me in range(RANKS)]
        for number, program in enumerate(programs):
            pid = os.fork()
            if pid == 0:
                os.setsid()
                file = os.open(made.folder / f"{number}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                faulthandler.enable()
                faulthandler.register(signal.SIGUSR2, all_threads=True)
                raise Become(program)
            made.pids.append(pid)
        return made

    def ended(self) -> bool:
        """Reap what has ended; kill what hangs, once it has written where it is."""
        for pid in set(self.pids) - set(self.codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # a forked child that it has left
        if len(self.codes) == len(self.pids):
            return True
        if time.monotonic() > self.until:
            number = signal.SIGKILL if self.hung else signal.SIGUSR2
            self.hung, self.until = True, time.monotonic() + 1.0
            for pid in set(self.pids) - set(self.codes):
                os.kill(pid, number)
        return False

    def outcome(self) -> dict[str, Any]:
        """What the cell gave: its worst outcome, those of its calls, and why."""
        said = []
        for path in sorted(self.folder.glob("*.out")):
            said += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        errors = "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.err")))
        if self.hung:
            said.append({"outcome": "hang", "text": errors[-3000:]})
        for code in self.codes.values():
            if code and not self.hung:
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                said.append({"outcome": "crash", "text": f"{name}: {errors[-3000:]}"})
        if NOISE.search(errors) and not self.hung and not any(self.codes.values()):
            said.append({"outcome": "noise", "text": errors[-1500:]})
        if not said:
            said.append({"outcome": "silent", "text": f"no rank has said anything: {errors[-1500:]}"})
        worst = min((one["outcome"] for one in said), key=lambda o: FAILURES.index(o) if o in FAILURES else len(FAILURES))
        shutil.rmtree(self.folder, ignore_errors=True)
        return {"cell": self.cell.name, "outcome": worst if worst in FAILURES else "fine", "said": said}

    def kill(self) -> None:
        for pid in set(self.pids) - set(self.codes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def run(cells: Sequence[Cell], at_once: int) -> Iterator[dict[str, Any]]:
    """What each cell gave, as soon as it has ended."""
    waiting, running = collections.deque(cells), list[Job]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Job.start(waiting.popleft()))
            done = [job for job in running if job.ended()]
            running = [job for job in running if job not in done]
            for job in done:
                yield job.outcome()
            if not done:
                time.sleep(0.005)
    except Become:
        raise
    finally:
        if not isinstance(sys.exc_info()[1], Become):
            for job in running:
                job.kill()


def table(results: Sequence[dict[str, Any]], part: int) -> str:
    """How the calls of the cells ended, by one part of their names, in markdown: a cell counts in each column that a call of it fits."""
    rows: dict[str, collections.Counter[str]] = {}
    for result in results:
        ends = {ENDS.get(one.get("class"), "build") if one["outcome"] == "error" else one["outcome"] for one in result["said"]}
        counted = ["cells", *(["failed"] if result["outcome"] != "fine" else []), *ends]
        for row in (result["cell"].split("/")[part], "all"):
            rows.setdefault(row, collections.Counter()).update(counted)
    rows["all"] = rows.pop("all", collections.Counter())
    columns = ["cells", "failed", "limit", "right", *dict.fromkeys(ENDS.values()), "build"]
    head = [("operation", "misuse", "transport", "ranks")[part], *columns]
    lines = [" | ".join(head), " | ".join("---" if i == 0 else "--:" for i in range(len(head)))]
    lines += [" | ".join([f"`{name}`", *(str(row[column] or "") for column in columns)]) for name, row in rows.items()]
    return "\n".join(f"| {line} |" for line in lines)


def kinds(failed: Sequence[dict[str, Any]]) -> str:
    """The failures, those of one kind together: misuse, transport, ranks, outcome, the operations, and one of the texts."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for result in failed:
        operation, misuse, transport, ranks = result["cell"].split("/")
        for one in result["said"]:
            if one["outcome"] in FAILURES:
                key: tuple[str, ...] = (misuse, transport, ranks, one["outcome"], one.get("phase", ""), one.get("error", ""))
                found.setdefault(key, []).append((operation, one.get("text", "")))
    lines = []
    for key, cells in sorted(found.items()):
        operations = list(dict.fromkeys(operation for operation, _ in cells))
        lines.append(f"FAILED {', '.join(part for part in key if part)}: {len(operations)} operations: {', '.join(operations)}")
        lines.append(f"    {cells[0][0]}: {' '.join(cells[0][1].split())[:500]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="print the tables of a file that --json has written")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.read:
        print("\n\n".join(table(json.loads(given.read.read_text())["cells"], part) for part in (1, 0)))
        return
    cells = [cell for cell in CELLS if re.search(given.only, cell.name)]
    if given.list:
        print("\n".join(cell.name for cell in cells))
        return
    seed = int(time.time()) if given.seed is None else given.seed
    dice = random.Random(seed)
    if given.sample is not None:
        cells = dice.sample(cells, min(given.sample, len(cells)))
    else:
        dice.shuffle(cells)  # cells that wait for a deadline beside those that compute
    started = time.monotonic()
    print(f"{len(cells)} cells, seed {seed}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(KeyboardInterrupt):  # then what there is so far
        for result in run(cells, given.jobs):
            results[result["cell"]] = result
            if len(results) % 500 == 0:
                print(f"{len(results)} cells in {time.monotonic() - started:.0f} s", flush=True)
    again = [cell for cell in cells if cell.name in results and results[cell.name]["outcome"] in DOUBTFUL]
    if again:
        print(f"again, one after another: {len(again)}", flush=True)
        results |= {result["cell"]: result for result in run(again, 1)}
    ordered = [results[cell.name] for cell in CELLS if cell.name in results]
    for part in (1, 0):
        print(f"\n{table(ordered, part)}")
    failed = [result for result in ordered if result["outcome"] != "fine"]
    print(f"\n{kinds(failed)}")
    if given.json:
        given.json.write_text(json.dumps({"seed": seed, "seconds": time.monotonic() - started, "cells": ordered}, indent=1))
    print(f"\n{len(ordered)} cells in {time.monotonic() - started:.0f} s, {len(failed)} failed", flush=True)
    sys.exit(1 if failed else 0)


def imported() -> None:
    """Have done once, before any fork, what takes long the first time."""
    with cg.World.from_env({}, timeout=timedelta(seconds=10)) as world, world.context(cg.Layout(1), name="first") as ctx:
        ctx.tp.all_reduce(torch.ones(1))


torch.set_num_threads(1)
become: Become | None = None
try:
    imported()
    main()
except Become as child:
    become = child
if become is not None:
    try:
        become.run()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
