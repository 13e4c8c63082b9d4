"""Bytes that a model of transformers sends while it generates, as `commgraph generate` runs it, against the planner's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.plan import ModelShapes, step_calls
from commgraph.plan.links import Links
from commgraph.plan.strategies import Placement, cost_of
from commgraph.testing import spmd

transformers = pytest.importorskip("transformers")

PROMPT, WRITTEN = 7, 5
SHAPES = ModelShapes(
    name="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=128,
    dtype="float32",
)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=SHAPES.hidden_size,
        intermediate_size=SHAPES.intermediate_size,
        num_hidden_layers=SHAPES.num_layers,
        num_attention_heads=SHAPES.num_heads,
        num_key_value_heads=SHAPES.num_kv_heads,
        vocab_size=SHAPES.vocab_size,
        max_position_embeddings=256,
        eos_token_id=None,  # it writes as many tokens as it is asked for
    )
    made: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made


def predicted(axes: Mapping[str, int], stage: int, where: Placement) -> dict[str, int]:
    """Bytes that a rank of a stage is to send: the prompt at once, then each token but the last.

    tp is that of `step_calls`. Between stages the activations are sent whole and by themselves, where the planner takes the slices that
    `send_tensor_dict` sends and tp gathers; and the last stage gives the others the logits, so that all choose the same token.
    """
    sent = {"tp": 0, "pp": 0}
    for tokens in (PROMPT, *[1] * (WRITTEN - 1)):
        for call in step_calls(SHAPES, axes, tokens, logits=1, objects=0)[stage]:
            if call.group == "tp" and not call.what.startswith("slices"):
                sent["tp"] += call.count * cost_of(call.operation, call.nbytes, where, Links.usual(), itemsize=SHAPES.itemsize).sent
        if stage < axes["pp"] - 1:
            sent["pp"] += tokens * SHAPES.hidden_size * SHAPES.itemsize
        elif axes["pp"] > 1:
            sent["pp"] += SHAPES.vocab_size * SHAPES.itemsize
    return sent


@pytest.mark.parametrize(("tp", "pp", "nodes"), [(4, 1, 1), (4, 1, 2), (2, 2, 1), (1, 4, 1)])
def test_generate_sends_every_byte_that_is_predicted_and_no_other(tp: int, pp: int, nodes: int) -> None:
    from commgraph.integrations.transformers import parallelize

    def rank(world: cg.World) -> tuple[dict[str, int], dict[str, int]]:
        with world.context(cg.Layout(4, tp=tp, pp=pp), name="target") as ctx, torch.no_grad():
            mine: Any = parallelize(model(), ctx)
            before = {name: ctx[name].bytes_sent for name in ("tp", "pp")}
            prompt = torch.arange(PROMPT).view(1, -1)
            mine.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, do_sample=False)
            world.group.barrier()
            counted = {name: ctx[name].bytes_sent - before[name] for name in ("tp", "pp")}
            where = Placement.of([world.nodes[one] for one in ctx.tp.ranks])
            return counted, predicted({"tp": tp, "pp": pp, "dp": 1}, ctx.pp.rank_in_group, where)

    for counted, said in spmd(rank, 4, nodes=nodes):
        assert counted == said
