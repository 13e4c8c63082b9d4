"""The calls of one step of a sharded decoder: what each rank of each pipeline stage communicates, as the layers of commgraph.nn do it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from commgraph.errors import LayoutError
from commgraph.plan.shapes import ModelShapes

__all__ = ["StepCall", "check_cut", "layers_of_stages", "step_calls"]


@attrs.frozen
class StepCall:
    """Equal calls of one rank in one step.

    Attributes:
        group: name of the group: tp, pp, dp, ep, or engine, which is pp x tp.
        operation: name of the operation.
        nbytes: of the tensor that one rank contributes; for reduce_scatter all that it puts in.
        count: how many.
        sliced: for send_tensor_dict, ranks over which the tensor is sliced and gathered.
        what: for people.
    """

    group: str
    operation: str
    nbytes: int
    count: int
    what: str
    sliced: int = 1


def check_cut(shapes: ModelShapes, axes: Mapping[str, int]) -> str:
    """Say why a model cannot be cut so; "" where it can.

    Args:
        shapes: of the model.
        axes: sizes of tp, pp and dp.
    """
    tp, pp, dp = axes["tp"], axes["pp"], axes["dp"]
    wrong = []
    if shapes.num_heads % tp:
        wrong.append(f"{shapes.num_heads} heads cannot be cut by tp={tp}")
    if shapes.num_kv_heads % tp and tp % shapes.num_kv_heads:
        wrong.append(f"{shapes.num_kv_heads} key-value heads cannot be cut or repeated by tp={tp}")
    if shapes.num_layers % pp:
        wrong.append(f"{shapes.num_layers} layers cannot be cut by pp={pp}")
    if shapes.num_experts and shapes.num_experts % (dp * tp):
        wrong.append(f"{shapes.num_experts} experts cannot be cut by ep = dp * tp = {dp * tp}")
    if not shapes.num_experts and dp > 1:
        wrong.append(f"dp={dp} exchanges experts, of which there are none: copies of a dense model are replicas")
    return "; ".join(wrong)


def layers_of_stages(shapes: ModelShapes, pp: int) -> list[tuple[int, int]]:
    """Dense layers and layers with experts of each pipeline stage."""
    per_stage = shapes.num_layers // pp
    first_moe = shapes.num_layers - shapes.expert_layers
    stages = []
    for stage in range(pp):
        dense = min(max(first_moe - stage * per_stage, 0), per_stage)
        stages.append((dense, per_stage - dense))
    return stages


def step_calls(
    shapes: ModelShapes, axes: Mapping[str, int], tokens: int, *, logits: int | None = None, objects: int = 1, object_bytes: int = 0
) -> list[list[StepCall]]:
    """List the calls of one step, for a rank of each pipeline stage.

    Args:
        shapes: of the model.
        axes: sizes of tp, pp and dp.
        tokens: new ones of the engine in this step, over all its sequences; with dp those of one of its dp ranks.
        logits: of them those whose logits are computed; None: all.
        objects: broadcasts of an object to the engine's ranks, such as the chosen tokens.
        object_bytes: of one of those, pickled.

    Returns:
        A list for each stage.

    Raises:
        LayoutError: the model cannot be cut so.
    """
    if wrong := check_cut(shapes, axes):
        raise LayoutError(f"{shapes.name}: {wrong}")
    tp, pp, dp = axes["tp"], axes["pp"], axes["dp"]
    hidden = tokens * shapes.hidden_size * shapes.itemsize
    stages = []
    for stage, (dense, moe) in enumerate(layers_of_stages(shapes, pp)):
        calls = []
        if tp > 1 and stage == 0:
            calls.append(StepCall("tp", "all_reduce", hidden, 1, "embedding"))
        if stage > 0 and tp > 1 and (tokens * shapes.hidden_size) % tp == 0:
            calls.append(StepCall("tp", "all_gather", hidden // tp, 1, "slices of the activations of the stage before"))
        if tp > 1:
            # Attention always; the MLP too, dense or experts, whose partial sums are those of the ranks of tp.
            calls.append(StepCall("tp", "all_reduce", hidden, 2 * dense + 2 * moe, "attention and MLP of each layer"))
        if moe and dp > 1:
            routing = tokens * shapes.top_k * (shapes.itemsize + 8)
            calls.append(StepCall("dp", "all_gather", hidden + routing, moe, "dispatch: rows, weights and ids of experts"))
            calls.append(StepCall("dp", "reduce_scatter", dp * hidden, moe, "combine: what the experts made of the rows"))
        if stage < pp - 1:
            sliced = tp if (tokens * shapes.hidden_size) % tp == 0 else 1
            calls.append(StepCall("pp", "send_tensor_dict", hidden, 1, "activations for the next stage", sliced))
        elif tp > 1:
            rows = tokens if logits is None else logits
            calls.append(StepCall("tp", "all_gather", rows * math.ceil(shapes.vocab_size / tp) * shapes.itemsize, 1, "logits"))
        if tp * pp > 1 and objects:
            calls.append(StepCall("engine", "broadcast_object", object_bytes, objects, "tokens"))
        stages.append([call for call in calls if call.count])
    return stages
