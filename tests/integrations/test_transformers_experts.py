"""Whole experts on the ranks of ep, which get rows of data-parallel ranks: uneven, and none at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.integrations.transformers import parallelize
from commgraph.nn import full_state_dict
from commgraph.testing import spmd

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.examine import TOLERANCE, objective, output_of, relative
from tests.integrations.models.shrink import VOCABULARY, configuration_classes, small_model


def small(name: str) -> Any:
    return small_model(configuration_classes(only=name)[name], overrides={"num_hidden_layers": 2})


def gradients_of_experts(model: Any) -> dict[str, torch.Tensor]:
    """Whole, on every rank; the model's parameters are lost."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {name: tensor for name, tensor in full_state_dict(model).items() if ".experts." in name}


@pytest.mark.parametrize(("name", "sizes"), [("MixtralConfig", {"dp": 2, "tp": 2}), ("GptOssConfig", {"dp": 4})])
def test_replicas_with_prompts_of_their_own_share_the_experts(name: str, sizes: dict[str, int]) -> None:
    model = small(name)
    generator = torch.Generator("cpu").manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (1 + place % 2, 4 + 3 * place), generator=generator) for place in range(sizes["dp"])]
    expected = [output_of(model, ids) for ids in prompts]
    torch.stack([objective(output) for output in expected]).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if ".experts." in key}
    model.zero_grad(set_to_none=True)

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, **sizes), name="model") as ctx:
            assert ctx.ep.world_size == 4
            own = parallelize(copy.deepcopy(model), ctx, experts="ep")
            assert all(parameter.shape[0] == 1 for key, parameter in own.named_parameters() if ".experts." in key)
            place = ctx.dp.rank_in_group
            output = output_of(own, prompts[place])
            assert relative(output.detach(), expected[place].detach()) < TOLERANCE
            objective(output).backward()
            found = gradients_of_experts(own)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert float((found[key] - gradient).abs().max()) < 1e-3 * float(gradient.abs().max()), key

    spmd(run, 4, timeout=100)


@pytest.mark.parametrize("rows", [(0, 5, 0, 2), (0, 0, 0, 0), (3, 0, 0, 0)])
def test_ranks_without_rows(rows: tuple[int, ...]) -> None:
    """All experts of a row may lie elsewhere, and rows of others may come to a rank that has none."""
    model = small("MixtralConfig")
    whole = model.model.layers[0].mlp.experts
    generator = torch.Generator("cpu").manual_seed(5)
    given = []
    for count in rows:
        hidden = torch.randn(count, model.config.hidden_size, generator=generator)
        chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(count)]) if count else torch.empty(0, 2).long()
        given.append((hidden, chosen, torch.rand(count, 2, generator=generator)))
    expected = [whole(*one) if one[0].shape[0] else one[0] for one in given]
    if any(rows):
        torch.cat(expected).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in whole.named_parameters()}
    model.zero_grad(set_to_none=True)

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(4, dp=4), name="model") as ctx:
            own = parallelize(copy.deepcopy(model), ctx, experts="ep").model.layers[0].mlp.experts
            hidden, chosen, weights = given[world.rank]
            rows = hidden.clone().requires_grad_()
            output = own(rows, chosen, weights)
            torch.testing.assert_close(output, expected[world.rank])
            output.square().sum().backward()
            assert rows.grad is not None
            assert rows.grad.shape == hidden.shape
            for key, parameter in own.named_parameters():
                whole_gradient = gradients[key]
                part = torch.zeros_like(parameter) if whole_gradient is None else whole_gradient[world.rank : world.rank + 1]
                torch.testing.assert_close(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, part)

    spmd(run, 4, timeout=100)
