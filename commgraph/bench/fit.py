"""``--fit``: the figures of this machine's links, for ``commgraph plan``.

Collectives, messages and objects of groups of every size are timed, and the figures that explain the times best are those of the planner's
own formulas: each measured call is the sum of what `plan.strategies.uses_of` says that it uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

import attrs
import torch

import commgraph as cg
from commgraph.bench.figures import percentile, size_text
from commgraph.bench.library import Job, repeat
from commgraph.bench.machine import describe
from commgraph.bench.plan import Plan
from commgraph.bench.probe import Probe
from commgraph.bench.report import Run, introduction
from commgraph.bench.timing import Contender, Stopwatch, interleave
from commgraph.errors import ConfigurationError
from commgraph.plan.links import Figures, Links
from commgraph.plan.strategies import Placement, Use, uses_of
from commgraph.progress import progress

__all__ = ["SAMPLE_SECONDS", "Case", "cases_of", "figures_from", "fit", "layouts_of"]

_KIB: Final = 1024
_REDUCED: Final = (1 * _KIB, 4 * _KIB, 16 * _KIB, 48 * _KIB, 192 * _KIB, 768 * _KIB)
_GATHERED: Final = (256, 4 * _KIB, 24 * _KIB, 128 * _KIB)
_SENT: Final = (1 * _KIB, 16 * _KIB, 128 * _KIB, 768 * _KIB)
# Seconds of a sample, as long as a step of a model: it contains its share of what else the cores do.
SAMPLE_SECONDS: Final = 5e-3
_SWEEPS: Final = 4000


@attrs.frozen(eq=False)
class Case:
    """A call to be timed.

    Attributes:
        what: for people.
        uses: its parts, by the planner's formulas.
        contender: performs it.
    """

    what: str
    uses: tuple[Use, ...]
    contender: Contender


def fit(job: Job, plan: Plan, found: Run, say: Callable[[str], None]) -> None:
    """Times calls, computes the figures, and writes them. Collective.

    Raises:
        ConfigurationError: too few ranks, or hosts with different numbers of them.
    """
    assert plan.fit is not None
    world = job.world
    for text in introduction(found):
        say(text)
    with contextlib.ExitStack() as stack:
        contexts = layouts_of(world, stack)
        cases = [case for ctx in contexts for case in cases_of(world, ctx)]
        stopwatch = Stopwatch(world.group.all_gather_object, world.group.barrier, Probe(), plan.samples, plan.seconds)

        def watch(rounds: int) -> AbstractContextManager[Callable[[], None]]:
            return progress("commgraph bench --fit", rounds, "rounds", shown=world.rank == 0)

        samples = interleave([case.contender for case in cases], stopwatch, at_least=SAMPLE_SECONDS, watch=watch)
        seconds = [percentile([sample.seconds for sample in of_case], 50) for of_case in samples]
        world.group.barrier()
    where = f"{world.size} ranks on {world.node_count} hosts, {describe()['processor']}, {describe()['cores']}"
    links = figures_from([case.uses for case in cases], seconds, where)
    if world.rank != 0:
        return
    say(f"{'call':52} {'measured us':>12} {'fitted us':>12}")
    errors = []
    for case, measured in zip(cases, seconds, strict=True):
        fitted = sum(use.seconds(links) for use in case.uses)
        errors.append(abs(fitted / measured - 1))
        say(f"{case.what:52} {measured * 1e6:12.1f} {fitted * 1e6:12.1f}")
    say(f"# the fit is {percentile(errors, 50):.0%} off in the median, {percentile(errors, 90):.0%} at the 90th percentile")
    links.write(plan.fit, sorted({use.kind for case in cases for use in case.uses}))
    say(f"# {plan.fit}: use it by commgraph plan --links {plan.fit}")


def layouts_of(world: cg.World, stack: contextlib.ExitStack) -> list[cg.ParallelContext]:
    """Build a context for each way to cut the ranks into stages of equal groups. Collective.

    Raises:
        ConfigurationError: one rank alone, or hosts with different numbers of ranks.
    """
    if world.size < 2:
        raise ConfigurationError("--fit: it takes two ranks to communicate")
    per_host = [list(world.nodes.values()).count(node) for node in range(world.node_count)]
    if len(set(per_host)) > 1:
        raise ConfigurationError(f"--fit: the hosts have {', '.join(map(str, per_host))} ranks; give all of them as many")
    sizes = [size for size in range(1, world.size + 1) if world.size % size == 0]
    return [
        stack.enter_context(
            world.context(cg.Layout(world.size, tp=tp, pp=world.size // tp, groups={"engine": ("pp", "tp")}), name=f"fit tp {tp}")
        )
        for tp in sizes
    ]


def cases_of(world: cg.World, ctx: cg.ParallelContext) -> Iterator[Case]:
    """List what is timed on one context: collectives of its tp, messages from stage to stage, objects of all ranks."""
    tp, pp, engine = ctx.tp, ctx.pp, ctx["engine"]
    name = f"{ctx.name}, pp {pp.world_size}"
    if tp.world_size > 1:
        # Of all tp groups that lie alike: they communicate at once, as they do in a model.
        place = placement(world, tp.ranks)
        for nbytes in _REDUCED:
            x = _tensor(nbytes)
            yield _case(
                f"{name}: all_reduce {size_text(nbytes)}", uses_of("all_reduce", nbytes, place, itemsize=4), _calling(tp.all_reduce, x)
            )
        for nbytes in _GATHERED:
            x = _tensor(nbytes)
            yield _case(
                f"{name}: all_gather {size_text(nbytes)}", uses_of("all_gather", nbytes, place, itemsize=4), _calling(tp.all_gather, x)
            )
    if pp.world_size > 1:
        place, inner = placement(world, pp.ranks), placement(world, tp.ranks)
        for nbytes in _SENT:
            uses = uses_of("send_tensor_dict", nbytes, place, sliced=tp.world_size)
            if tp.world_size > 1:
                uses += uses_of("all_gather", nbytes // tp.world_size, inner, itemsize=4)
            yield _case(f"{name}: send_tensor_dict {size_text(nbytes)}", uses, _around(pp, tp, nbytes), 1 / pp.world_size)
    if tp.world_size == world.size:
        uses = uses_of("broadcast_object", 64, placement(world, engine.ranks))
        yield _case(f"{name}: broadcast_object", uses, _objects(engine), 0.5)


def placement(world: cg.World, ranks: Sequence[int]) -> Placement:
    """How ranks of a world lie on its hosts."""
    return Placement.of([world.nodes[rank] for rank in ranks])


def _case(what: str, uses: Sequence[Use], call: Callable[[], object], share: float = 1.0) -> Case:
    return Case(what, tuple(uses), Contender("commgraph", what, repeat(call), share))


def _tensor(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes // 4, dtype=torch.float32, device="cpu")


def _calling(operation: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    return lambda: operation(x)


def _around(pp: cg.GroupCoordinator, tp: cg.GroupCoordinator, nbytes: int) -> Callable[[], None]:
    """Pass a dict from stage to stage and back to the first: each rank sleeps until it is its turn, as in a model."""
    tree = {"hidden_states": _tensor(nbytes)}
    slicing = tp if tp.world_size > 1 else None

    def around() -> None:
        if not pp.is_first_rank:
            pp.recv_tensor_dict(all_gather_group=slicing)
        pp.send_tensor_dict(tree, all_gather_group=slicing)
        if pp.is_first_rank:
            pp.recv_tensor_dict(all_gather_group=slicing)

    return around


def _objects(engine: cg.GroupCoordinator) -> Callable[[], None]:
    tokens = list(range(8))

    def both_ways() -> None:
        engine.broadcast_object(tokens, engine.world_size - 1)
        engine.broadcast_object(tokens, 0)

    return both_ways


def figures_from(uses: Sequence[Sequence[Use]], seconds: Sequence[float], where: str) -> Links:
    """Return the figures, none of them negative, whose sums are nearest to the measured times, by relative error.

    Args:
        uses: of each measured call.
        seconds: that it took.
        where: a line that says what was measured.
    """
    columns: dict[tuple[str, int, str], int] = {}
    entries: list[tuple[int, int, float]] = []
    for row, (parts, measured) in enumerate(zip(uses, seconds, strict=True)):
        for use in parts:
            weights = {"step": use.steps, "byte": use.moved} | ({} if use.operation is None else {f"call {use.operation}": 1.0})
            for what, weight in weights.items():
                column = columns.setdefault((use.kind, use.ranks, what), len(columns))
                entries.append((row, column, weight / measured))
    matrix = torch.zeros(len(seconds), len(columns), dtype=torch.float64, device="cpu")
    for row, column, value in entries:
        matrix[row, column] += value
    solution = _non_negative(matrix)
    table: dict[str, dict[int, Figures]] = {}
    for kind, ranks in dict.fromkeys((kind, ranks) for kind, ranks, _ in columns):
        mine = {what: solution[column] for (k, n, what), column in columns.items() if (k, n) == (kind, ranks)}
        calls = {what.removeprefix("call "): value for what, value in mine.items() if what.startswith("call ")}
        if calls:
            calls[""] = sorted(calls.values())[len(calls) // 2]  # of an operation that was not measured
        table.setdefault(kind, {})[ranks] = Figures(mine["step"], mine["byte"], calls)
    return Links(dict(Links.usual().table) | table, where)


def _non_negative(matrix: torch.Tensor) -> list[float]:
    """Least squares of ``matrix @ x = 1`` with x >= 0, by coordinate descent."""
    scale = matrix.norm(dim=0).clamp_min(1e-300)
    scaled = matrix / scale
    gram, target = scaled.T @ scaled, scaled.sum(0)
    x = torch.zeros_like(target)
    for _ in range(_SWEEPS):
        before = x.clone()
        for column in range(len(x)):
            x[column] = torch.clamp(x[column] + target[column] - gram[column] @ x, min=0.0)
        if torch.allclose(x, before, rtol=1e-9, atol=0.0):
            break
    return [float(value) for value in x / scale]
