"""A rank of a job that measures what `commgraph plan` predicts: the communication of steps of two models, on every tp x pp of its ranks.

The calls of a step are made back to back, without the computation between them, and each step ends with the broadcast of its tokens to all
ranks, as generation does. The figures of the links are measured in the same run, sample by sample in turn with the steps: the machine
that is predicted is the one that is measured. Rank 0 prints a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import commgraph as cg
from commgraph.bench.figures import percentile
from commgraph.bench.fit import SAMPLE_SECONDS, Case, cases_of, figures_from, layouts_of, placement
from commgraph.bench.library import repeat
from commgraph.bench.probe import Probe
from commgraph.bench.timing import Contender, Stopwatch, interleave
from commgraph.plan import ModelShapes, Placement, StepCall, step_calls
from commgraph.plan.strategies import uses_of

# The target of `commgraph demo`, and a Llama whose activations are those of a model of half a billion parameters.
MODELS = (
    ModelShapes(
        name="demo", hidden_size=192, intermediate_size=448, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=24, vocab_size=256,
        dtype="float64",
    ),
    ModelShapes(
        name="llama", hidden_size=1024, intermediate_size=2816, num_layers=12, num_heads=16, num_kv_heads=8, head_dim=64, vocab_size=32000,
        dtype="float32",
    ),
)  # fmt: skip
PHASES = {"decode": 1, "prefill": 64}


def shape_of(call: StepCall, itemsize: int) -> torch.Tensor:
    return torch.zeros(max(call.nbytes // itemsize, 1), dtype={8: torch.float64, 4: torch.float32}[itemsize])


def replay(ctx: cg.ParallelContext, calls: list[StepCall], itemsize: int) -> Callable[[], None]:
    """Return a function that makes the calls of one rank in a step, in the order in which the model makes them."""
    tp, pp, engine = ctx.tp, ctx.pp, ctx["engine"]
    slicing = tp if any(call.sliced > 1 for call in calls) or (pp.world_size > 1 and tp.world_size > 1) else None
    made: list[Callable[[], object]] = []
    for call in calls:
        x = shape_of(call, itemsize)
        if call.operation == "broadcast_object":
            tokens = list(range(8)) if pp.is_last_rank and tp.is_last_rank else None
            made.append(partial(engine.broadcast_object, tokens, engine.world_size - 1))
        elif call.operation == "send_tensor_dict":
            made.append(partial(pp.send_tensor_dict, {"hidden_states": x}, all_gather_group=slicing))
        elif call.what.startswith("slices"):
            continue  # the receive below gathers them
        else:
            made += [partial(getattr(ctx[call.group], call.operation), x)] * call.count
    if not pp.is_first_rank:
        made.insert(0, partial(pp.recv_tensor_dict, all_gather_group=slicing))

    def step() -> None:
        for one in made:
            one()

    return step


def steps_of(world: cg.World, ctx: cg.ParallelContext) -> list[tuple[dict[str, Any], Case]]:
    """List the steps of each model and phase on one context, with what the planner takes them to be."""
    axes = {"tp": ctx.tp.world_size, "pp": ctx.pp.world_size, "dp": 1}
    where = {name: placement(world, ctx[name].ranks) for name in ("tp", "pp", "engine")}
    found = []
    for shapes in MODELS:
        for phase, tokens in PHASES.items():
            # The demo computes the logits of all tokens, engines those of the last one.
            logits = tokens if shapes.name == "demo" else 1
            stages = step_calls(shapes, axes, tokens, logits=logits, object_bytes=64)
            uses = []
            for stage, calls in enumerate(stages):
                for call in calls:
                    if call.operation != "broadcast_object" or stage == 0:
                        place: Placement = where[call.group]
                        uses += uses_of(call.operation, call.nbytes, place, itemsize=shapes.itemsize, sliced=call.sliced) * call.count
            facts = {"model": shapes.name, "phase": phase, "tp": axes["tp"], "pp": axes["pp"]}
            name = " ".join(map(str, facts.values()))
            mine = replay(ctx, stages[ctx.pp.rank_in_group], shapes.itemsize)
            found.append((facts, Case(name, tuple(uses), Contender("commgraph", name, repeat(mine)))))
    return found


def main() -> None:
    torch.set_num_threads(1)
    with cg.World.from_env(timeout=60) as world, contextlib.ExitStack() as stack:
        contexts = layouts_of(world, stack)
        fitted = [case for ctx in contexts for case in cases_of(world, ctx)]
        steps = [step for ctx in contexts for step in steps_of(world, ctx)]
        cases = [*fitted, *(case for _, case in steps)]
        stopwatch = Stopwatch(
            world.group.all_gather_object, world.group.barrier, Probe(), None, float(os.environ.get("SECONDS_EACH", "0.5"))
        )
        samples = interleave([case.contender for case in cases], stopwatch, at_least=SAMPLE_SECONDS)
        seconds = [percentile([sample.seconds for sample in of_case], 50) for of_case in samples]
        links = figures_from([case.uses for case in fitted], seconds[: len(fitted)], f"{world.size} ranks on {world.node_count} hosts")
        rows = [
            {**facts, "predicted": sum(use.seconds(links) for use in case.uses), "measured": measured, "samples": len(of_case)}
            for (facts, case), measured, of_case in zip(steps, seconds[len(fitted) :], samples[len(fitted) :], strict=True)
        ]
        world.group.barrier()
        if world.rank == 0:
            found = {"hosts": world.node_count, "load": os.getloadavg()[0], "rows": rows}
            text = json.dumps(found)
            if file := os.environ.get("RESULT_FILE"):
                Path(file).write_text(text)
            sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
