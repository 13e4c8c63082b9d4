"""One small model, whole and cut: do they compute the same?"""

from __future__ import annotations

import copy
from typing import Any

import attrs
import torch

import commgraph as cg
from commgraph.integrations.transformers import parallelize
from commgraph.nn import full_state_dict
from commgraph.testing import spmd
from tests.integrations.models.shrink import VOCABULARY

NEW_TOKENS = 4
TOLERANCE = 1e-4


@attrs.frozen
class Expected:
    """What the whole model computes.

    Attributes:
        output: logits, or the last hidden state of a model without a head.
        tokens: prompt and greedy continuation; None where the model does not generate.
        gradients: of the mean of the output's squares.
    """

    output: torch.Tensor
    tokens: torch.Tensor | None
    gradients: dict[str, torch.Tensor]


def prompt(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator("cpu").manual_seed(7))


def output_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=ids, use_cache=False) if hasattr(model, "generation_config") else model(input_ids=ids)
    logits = getattr(out, "logits", None)
    found = out.last_hidden_state if logits is None else logits
    assert isinstance(found, torch.Tensor)
    return found


def tokens_of(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    if not model.can_generate():
        return None
    mask = torch.ones_like(ids)
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return tokens


def objective(output: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(0.5, 1.5, output.shape[-1], dtype=output.dtype, device=output.device)
    return (output.float().square() * weights).mean()


def expected_of(model: Any) -> Expected:
    ids = prompt()
    with torch.no_grad():
        tokens = tokens_of(model, ids)
    output = output_of(model, ids)
    objective(output).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return Expected(output.detach(), tokens, gradients)


@attrs.frozen
class Result:
    """How a cut model differs from the whole one.

    Attributes:
        output: greatest difference of the outputs, relative to the greatest value.
        tokens: whether the tokens are the same.
        gradient: greatest difference of a gradient, relative to the greatest value of it; None where it was not looked at.
        worst: the parameter where it is.
        share: parameters on a rank, relative to the whole model's.
    """

    output: float
    tokens: bool
    gradient: float | None
    worst: str
    share: float


def compared(model: Any, expected: Expected, *, gradients: bool = False, **arguments: Any) -> Result:
    """Cut copies of a model over threads, one a rank, and compare; `arguments` are of `Layout` and `parallelize`."""
    given = {name: arguments.pop(name) for name in ("plan", "experts", "stages") if name in arguments}
    layout = cg.Layout(torch.Size(arguments.values()).numel(), **arguments)

    def run(world: cg.World) -> Result:
        with world.context(layout, name="model") as ctx:
            return compared_on(ctx, model, expected, gradients=gradients, **given)

    results = spmd(run, layout.world_size, timeout=90)
    return max(results, key=lambda result: (not result.tokens, result.output, result.gradient or 0.0))


def compared_on(ctx: cg.ParallelContext, model: Any, expected: Expected, *, gradients: bool = False, **given: Any) -> Result:
    """Cut a copy of a model over a context, and compare."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    own = parallelize(copy.deepcopy(model), ctx, **given)
    share = sum(parameter.numel() for parameter in own.parameters()) / whole
    ids = prompt()
    with torch.no_grad():
        output = output_of(own, ids)
        tokens = tokens_of(own, ids)
    difference = relative(output, expected.output)
    same = tokens is None or (expected.tokens is not None and torch.equal(tokens, expected.tokens))
    if not gradients:
        return Result(difference, same, None, "", share)
    objective(output_of(own, ids)).backward()
    for parameter in own.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = full_state_dict(own)
    top = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    worst, name = 0.0, ""
    for key, gradient in expected.gradients.items():
        if key in found:
            error = float((found[key] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-4 * top)
            if error > worst:
                worst, name = error, key
    return Result(difference, same, worst, name, share)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())
