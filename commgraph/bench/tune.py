"""``--tune``: which kernel over the peers' memory is the fastest for which size, as a table that options can load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

import commgraph as cg
from commgraph.accelerators.custom_all_reduce import CustomAllReduce
from commgraph.accelerators.kernel_table import KERNELS, OTHERS, KernelTable, Step, merged
from commgraph.accelerators.kernel_table import Row as TableRow
from commgraph.bench.figures import Row, percentile, rows_of
from commgraph.bench.library import Job, repeat
from commgraph.bench.ours import build_context
from commgraph.bench.plan import Plan
from commgraph.bench.probe import Probe
from commgraph.bench.report import Run, heading, introduction
from commgraph.bench.timing import Contender, Stopwatch, interleave
from commgraph.errors import BackendUnavailableError, ConfigurationError
from commgraph.progress import progress

__all__ = ["tune"]

# Factor by which a kernel has to be faster in the median than the strategies behind it, to be worth its buffer.
_GAIN = 0.97
_EVERY_SIZE = 1 << 40
_DTYPES = ("float32", "bfloat16")


def tune(job: Job, plan: Plan, found: Run, say: Callable[[str], None], report: Callable[[Sequence[Row]], None]) -> None:
    """Measures every kernel beside what would serve the call without it, size by size, and writes the table. Collective.

    Each kernel has a context of its own, whose table names it for every size. Times are those of the host, over batches at whose end the
    device is waited for; the table has for each size the kernel with the lowest median, where it beats the strategies behind it.

    Args:
        job: the ranks: one for each device.
        plan: sizes, dtypes, how long to sample, and `Plan.tune`.
        found: the run.
        say: prints a line.
        report: takes finished rows.

    Raises:
        ConfigurationError: these ranks have no kernels, with the reason.
    """
    assert plan.tune is not None
    world = job.world
    capability = world.platform.capability(world.device)
    names = sorted({name for kernels in KERNELS.values() for name in kernels})
    dtypes = [name for name in plan.dtypes if name in _DTYPES]
    if not dtypes:
        raise ConfigurationError(f"--tune: kernels add up {' and '.join(_DTYPES)}, not {', '.join(plan.dtypes)}")
    table: list[TableRow] = []
    with contextlib.ExitStack() as stack:
        others = stack.enter_context(build_context(world, "", custom_all_reduce=False))
        forced = {
            name: stack.enter_context(build_context(world, "", custom_all_reduce=_only(name, capability, world.size))) for name in names
        }
        strategies = {name: _strategy(ctx) for name, ctx in forced.items()}
        for text in introduction(found):
            say(text)
        say(heading())
        stopwatch = Stopwatch(world.group.all_gather_object, others.tp.barrier, Probe(), plan.samples, plan.seconds)
        wanted = {operation: dtypes if operation != "all_gather" else dtypes[:1] for operation in KERNELS}
        total = sum(map(len, wanted.values())) * len(plan.sizes)
        advance = stack.enter_context(progress("commgraph bench --tune", total, "sizes", shown=world.rank == 0))
        for operation, kinds in wanted.items():
            for dtype in kinds:
                best = []
                for size in plan.sizes:
                    kind: torch.dtype = getattr(torch, dtype)
                    running = {name: forced[name].tp for name in names if strategies[name].kernel_for(operation, size, kind) == name} | {
                        OTHERS: others.tp
                    }
                    contenders = [
                        Contender("commgraph", name or others.tp.communicators[operation][0], _batch(world, group, operation, size, kind))
                        for name, group in running.items()
                    ]
                    medians = {}
                    for name, contender, samples in zip(running, contenders, interleave(contenders, stopwatch), strict=True):
                        medians[name] = percentile([sample.seconds for sample in samples], 50)
                        report(
                            rows_of(
                                samples,
                                operation=operation,
                                size=size,
                                dtype=dtype,
                                who=contender.who,
                                strategy=contender.strategy,
                                ranks=world.size,
                            )
                        )
                    best.append((size, _fastest(medians)))
                    advance()
                if steps := merged(best):
                    table.append(TableRow(capability, world.size, operation, "any" if operation == "all_gather" else dtype, steps))
        world.group.barrier()
    if world.rank == 0:
        KernelTable(table).write(plan.tune)
        say(f"# {plan.tune}: {len(table)} rows; use it by CommunicatorOptions(custom_all_reduce={str(plan.tune)!r})")


def _only(kernel: str, capability: str, ranks: int) -> KernelTable:
    """Return a table that names this kernel for every size that it can serve."""
    return KernelTable(
        [
            TableRow(capability, ranks, operation, "any", (Step(_EVERY_SIZE, kernel),))
            for operation, kernels in KERNELS.items()
            if kernel in kernels
        ]
    )


def _strategy(ctx: cg.ParallelContext) -> CustomAllReduce:
    try:
        found = ctx.tp.communicator(CustomAllReduce.name)
    except BackendUnavailableError:
        lines = [line.strip() for line in ctx.explain().splitlines() if line.strip().startswith(f"{CustomAllReduce.name}: ")]
        why = lines[0] if lines else f"the {ctx.tp.device.type} platform has no kernels over the peers' memory"
        raise ConfigurationError(f"--tune: nothing to tune here: {why}") from None
    assert isinstance(found, CustomAllReduce)
    return found


def _batch(world: cg.World, group: cg.GroupCoordinator, operation: str, size: int, dtype: torch.dtype) -> Callable[[int], None]:
    """Return a callable that makes so many calls and synchronizes the device. `size`: bytes of the whole tensor."""
    whole = max(size // dtype.itemsize // world.size, 1) * world.size
    x = torch.zeros(whole // world.size if operation == "all_gather" else whole, dtype=dtype, device=world.device)
    out = torch.zeros(whole // world.size if operation == "reduce_scatter" else whole, dtype=dtype, device=world.device)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce_(x),
        "all_gather": lambda: group.all_gather(x, 0, out=out),
        "reduce_scatter": lambda: group.reduce_scatter(x, 0, out=out),
    }
    several = repeat(calls[operation])

    def batch(count: int) -> None:
        several(count)
        world.platform.synchronize(world.device)

    return batch


def _fastest(medians: dict[str, float]) -> str:
    """Return the kernel with the lowest median, if it beats the strategies behind it by enough."""
    name = min(medians, key=lambda one: medians[one])
    return name if medians[name] < _GAIN * medians[OTHERS] else OTHERS
