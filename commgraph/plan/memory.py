"""Bytes that a rank holds: its share of the weights, keys and values, activations of one step, communication buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from commgraph.plan.shapes import ModelShapes
from commgraph.plan.step import layers_of_stages

__all__ = ["memory_of", "parameters_of"]

_MIB: Final = 1024 * 1024


def parameters_of(shapes: ModelShapes, axes: Mapping[str, int], stage: int) -> float:
    """Elements of the weights that a rank of a stage holds."""
    tp, pp, dp = axes["tp"], axes["pp"], axes["dp"]
    dense, moe = layers_of_stages(shapes, pp)[stage]
    heads = shapes.hidden_size * shapes.head_dim * 2 * shapes.num_heads / tp
    heads += shapes.hidden_size * shapes.head_dim * 2 * max(1.0, shapes.num_kv_heads / tp)
    total = (dense + moe) * (heads + 2 * shapes.hidden_size)
    total += dense * 3 * shapes.hidden_size * shapes.intermediate_size / tp
    # The router is on every rank.
    total += moe * shapes.hidden_size * (shapes.num_experts + 3 * shapes.shared_intermediate_size / tp)
    total += moe * shapes.num_experts * shapes.expert_parameters / (dp * tp)
    embedding = -(-shapes.vocab_size // tp) * shapes.hidden_size
    first, last = stage == 0, stage == pp - 1
    total += embedding * (1 if shapes.tied and first and last else first + last)
    return total + (shapes.hidden_size if last else 0)


def memory_of(shapes: ModelShapes, axes: Mapping[str, int], *, sequences: int, context: int, tokens: int, rows: int) -> dict[str, float]:
    """Return bytes by what they are, of the rank that holds most.

    Args:
        shapes: of the model.
        axes: sizes of tp, pp and dp.
        sequences: of one engine, whose keys and values are kept.
        context: tokens of each.
        tokens: of one part of the batch, whose activations live at once.
        rows: of them those whose logits are computed.
    """
    tp, pp = axes["tp"], axes["pp"]
    size, per_stage = shapes.itemsize, shapes.num_layers // pp
    weights = max(parameters_of(shapes, axes, stage) for stage in dict.fromkeys((0, pp - 1)))
    cache = sequences * context * 2 * max(1, shapes.num_kv_heads // tp) * shapes.head_dim * per_stage
    width = max(shapes.intermediate_size, shapes.top_k * shapes.expert_intermediate_size)
    inner = (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim
    activations = tokens * (4 * shapes.hidden_size + (2 * width + inner) / tp)
    return {
        "weights": weights * size,
        "keys and values": cache * size,
        "activations": activations * size + rows * shapes.vocab_size * 4,
        # Slots, reduce buffers and rings of shared memory, or the buffer of the kernels: as the options have them by default.
        "communication": (16 if tp > 1 else 0) * _MIB + (4 if pp > 1 else 0) * _MIB,
    }
