"""One rank of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from commgraph.bench import machine, objects, peers, probe, tensors
from commgraph.bench.figures import Row
from commgraph.bench.fit import fit
from commgraph.bench.library import Job, Library
from commgraph.bench.ours import OBJECT_METHODS, DeviceTensors, Objects, SharedTensors, Tensors, build_context
from commgraph.bench.plan import Plan
from commgraph.bench.report import Run, heading, introduction, line
from commgraph.bench.session import Session
from commgraph.bench.timing import Stopwatch
from commgraph.bench.tune import tune
from commgraph.progress import progress

__all__ = ["run"]

_ROOM = 64  # bytes by which a size may be rounded up so that every rank gets an element


def run(job: Job, plan: Plan, gifts: Mapping[str, Any]) -> Run:
    """Measures what the plan asks for. Collective; rank 0 prints as it goes.

    Args:
        job: the ranks.
        plan: equal on all of them.
        gifts: by peer, what it wanted every rank to inherit.

    With `Plan.tune` the kernels of accelerators are measured and nothing else, and a table is written; likewise the links with `Plan.fit`.

    Returns:
        On rank 0 everything that was measured, elsewhere nothing of it.

    Raises:
        ConfigurationError: a strategy does not serve these ranks.
    """
    world = job.world
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    found = Run(machine.describe(), {"ranks": world.size, "started": job.started, "sampling": _sampling(plan)})

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    def report(rows: Sequence[Row]) -> None:
        found.rows.extend(rows)
        for row in rows:
            say(line(row))

    def note(text: str) -> None:
        if found.note(text):
            say(f"# {text}")

    with contextlib.ExitStack() as stack:
        if plan.tune is not None:
            tune(job, plan, found, say, report)
            return found
        if plan.fit is not None:
            fit(job, plan, found, say)
            return found
        contexts = {name: stack.enter_context(build_context(world, name)) for name in plan.strategies}
        for text in introduction(found):
            say(text)
        default = contexts.get("") or stack.enter_context(build_context(world, ""))
        near = probe.connect(default["objects1"])
        stopwatch = Stopwatch(world.group.all_gather_object, default.tp.barrier, near, plan.samples, plan.seconds)
        session = Session(job, stopwatch, plan.idle, report, note)
        largest = tensors.largest(plan.operations, plan.sizes)
        own: list[Library] = []
        for name, ctx in contexts.items():
            own.append(Tensors(job, ctx))
            if world.platform.streams(world.device) is not None:
                own.append(DeviceTensors(job, ctx))
            if largest:
                own.append(SharedTensors(job, ctx, largest + _ROOM * world.size))
            own += [Objects(job, ctx, method, name) for method in OBJECT_METHODS]
        own.append(Objects(job, default, "MessageQueue"))
        rivals = [peers.load(spec)(Job(world, job.started, job.directory, gifts.get(spec))) for spec in plan.compare]
        for library in (*own, *rivals):
            if _ready(session, library):
                session.add(library)
        say(heading())
        cases = sum(len(_cases(plan, operation)) + (operation in objects.OPERATIONS) for operation in plan.operations)
        with progress("commgraph bench", cases, "cases", shown=world.rank == 0) as advance:
            for operation in plan.operations:
                for dtype, size in _cases(plan, operation):
                    tensors.measure(session, operation, size, dtype)
                    advance()
                if operation in objects.OPERATIONS:
                    objects.measure(session, operation)
                    advance()
        world.group.barrier()  # nobody hangs up while another still measures
        session.close()
    return found


def _cases(plan: Plan, operation: str) -> list[tuple[torch.dtype, int]]:
    if operation not in tensors.OPERATIONS:
        return []
    dtypes = [getattr(torch, name) for name in plan.dtypes]
    once = operation in tensors.SIZELESS
    return [(dtype, size) for dtype in (dtypes[:1] if once else dtypes) for size in (plan.sizes[:1] if once else plan.sizes)]


def _ready(session: Session, library: Library) -> bool:
    """Whether a library can be measured, on all ranks alike; a line says why not."""
    reasons = [reason for reason in session.stopwatch.gather(library.available()) if reason is not None]
    if reasons:
        session.note(f"{library.name}: {reasons[0]}")
        return False

    def prepare() -> bool:
        library.prepare()
        return True

    return session.agreed(library.name, prepare) is True


def _sampling(plan: Plan) -> str:
    return f"{plan.seconds:g} s for each library in each row" if plan.samples is None else f"{plan.samples} samples of each"
