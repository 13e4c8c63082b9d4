"""Models of transformers, cut by their own plans, compute what they do whole."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.integrations.transformers import parallelize
from commgraph.integrations.transformers.private import NAMES
from commgraph.nn import full_state_dict, load_full_state_dict, rebind
from commgraph.testing import spmd

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.examine import NEW_TOKENS, compared, expected_of, output_of, prompt, tokens_of
from tests.integrations.models.shrink import configuration_classes, small_model


def kind_of(name: str) -> type:
    return configuration_classes(only=name)[name]


def llama(**overrides: Any) -> Any:
    return small_model(kind_of("LlamaConfig"), overrides={"num_hidden_layers": 2, **overrides})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LlamaConfig", {"tp": 4, "gradients": True}),  # key-value heads that two ranks hold
        ("Qwen3Config", {"tp": 2, "gradients": True}),  # norms of single heads
        ("Gemma2Config", {"tp": 2}),  # an embedding that scales
        ("Phi3Config", {"tp": 4}),  # fused projections, whose output is gathered
        ("GPTNeoXConfig", {"tp": 2, "gradients": True}),  # biases
        ("MixtralConfig", {"tp": 2, "gradients": True}),  # a part of each expert
        ("DeepseekV3Config", {"tp": 4, "gradients": True}),  # latent attention
        ("ApertusConfig", {"tp": 2, "gradients": True}),  # a plan with wrong gradients, corrected
        ("Llama4TextConfig", {"tp": 2}),  # experts with the halves along another dim
        ("GptOssConfig", {"tp": 2, "experts": "ep"}),  # whole experts, with biases
        ("GraniteConfig", {"pp": 2}),  # a factor behind the embedding
        ("Qwen3MoeConfig", {"tp": 2, "pp": 2}),
    ],
)
def test_a_cut_model_is_the_whole_one(name: str, arguments: dict[str, Any]) -> None:
    model = small_model(kind_of(name), overrides={} if "pp" in arguments else {"num_hidden_layers": 2})
    result = compared(model, expected_of(model), **arguments)
    assert result.output < 1e-4
    assert result.tokens
    assert result.gradient is None or result.gradient < 1e-3, result.worst


def test_every_private_name_is_there() -> None:
    for module, name, *attributes in NAMES:
        found = getattr(importlib.import_module(module), name)
        for attribute in attributes:
            assert hasattr(found, attribute), (module, name, attribute)


def test_a_cut_model_is_copied_moved_filled_and_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, other = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    expected = output_of(other, prompt()).detach()

    def run(world: cg.World) -> None:
        layout = cg.Layout(4, tp=2, pp=2)
        ctx = world.context(layout, name="a")
        own = parallelize(copy.deepcopy(model), ctx)
        assert isinstance(own, type(model))
        state = other.state_dict()
        load_full_state_dict(own, {name: tensor for name, tensor in state.items() if name in own.state_dict()})
        moved = rebind(copy.deepcopy(own), world.context(layout, name="b"))
        ctx.close()
        with torch.no_grad():
            torch.testing.assert_close(output_of(moved, prompt()), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in full_state_dict(moved).items())
        moved.save_pretrained(tmp_path)
        with pytest.raises(cg.ConfigurationError, match="resize the whole model"):
            moved.resize_token_embeddings(7)
        with pytest.raises(cg.ConfigurationError, match="start from a whole one"):
            parallelize(moved, moved.ctx)

    spmd(run, 4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(output_of(again, prompt()).detach(), expected)
    assert again.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (3, {}, r"self_attn, style 'colwise': 4 query heads and 2 key-value heads cannot be shared by 3 ranks"),
        (2, {"plan": {"model.layers.*.mlp.up_proj": "columnwise"}}, r"unknown styles model.layers.\*.mlp.up_proj: 'columnwise'; known are"),
        (2, {"plan": {"model.layers.*.mlp.upper": "colwise"}}, r"name no module and no parameter: model.layers.\*.mlp.upper"),
        (
            5,
            {"plan": {"model.layers.*.mlp.up_proj": "colwise"}},
            r"mlp.up_proj.weight \(96, 64\), style 'colwise': 96 along dim 0 cannot be cut into 5",
        ),
        (2, {"experts": "pp"}, "must be 'tp' or 'ep'"),
        (2, {"experts": "ep"}, "has no expert-parallel plan"),
        (2, {"stages": [1, 1]}, "for a pipeline of one stage"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_left_as_it_was(world: int, arguments: dict[str, Any], message: str) -> None:
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(world.size, tp=world.size), name="a") as ctx, pytest.raises(cg.ConfigurationError, match=message):
            parallelize(model, ctx, **arguments)

    spmd(run, world)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert output_of(model, prompt()).shape == (2, 9, 99)


def test_generation_where_ranks_could_part() -> None:
    model = llama(num_hidden_layers=4)
    ids = prompt()
    ways: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3},
        "static": {"cache_implementation": "static", "prefill_chunk_size": 4},
        "clock": {"max_time": 1e6},
    }
    common: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = {name: model.generate(ids, **common, **way) for name, way in ways.items()}

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            own = parallelize(copy.deepcopy(model), ctx)
            for name, way in ways.items():
                assert torch.equal(own.generate(ids, **common, **way), expected[name]), name
            with pytest.raises(cg.ConfigurationError, match="threads of one process"):
                own.generate(ids, **(common | {"do_sample": True}))

    spmd(run, 2)


@pytest.mark.parametrize(("target", "draft"), [({"tp": 2}, {"tp": 1}), ({"pp": 2}, {"tp": 2})])
def test_a_draft_assists_from_another_context(target: dict[str, int], draft: dict[str, int]) -> None:
    model = llama(num_hidden_layers=4)
    small = llama()
    for name, tensor in small.state_dict().items():
        tensor.copy_(model.state_dict()[name])
    ids = prompt(1)
    expected = tokens_of(model, ids)

    def run(world: cg.World) -> None:
        own = parallelize(copy.deepcopy(model), world.context(cg.Layout(2, **target), name="target"))
        assistant = parallelize(copy.deepcopy(small), world.context(cg.Layout(2, **draft), name="draft"))
        how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "assistant_model": assistant}
        tokens = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **how)
        assert expected is not None
        assert torch.equal(tokens, expected)

    spmd(run, 2)
