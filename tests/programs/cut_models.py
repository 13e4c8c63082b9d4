"""Models of transformers in processes without a default group, under torchrun: seven compared with themselves whole, or three compiled.

Arguments: ``plain``, or ``compiled`` and the compiler's backend, inductor unless it is given.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.integrations.transformers import parallelize
from tests.integrations.models.examine import TOLERANCE, compared_on, expected_of, objective, output_of, prompt, relative
from tests.integrations.models.shrink import configuration_classes, small_model

PLAIN = {
    "LlamaConfig": 2,
    "Qwen3Config": 2,
    "MixtralConfig": 4,
    "DeepseekV3Config": 4,
    "GPTNeoXConfig": 4,
    "Phi3Config": 4,
    "Gemma2Config": 4,
}


def model_of(name: str) -> Any:
    return small_model(configuration_classes(only=name)[name], overrides={"num_hidden_layers": 2})


def plain(world: cg.World) -> None:
    for name, tp in PLAIN.items():
        model = model_of(name)
        expected = expected_of(model)
        with world.context(cg.Layout(4, tp=tp), name="model") as ctx:
            result = compared_on(ctx, model, expected, gradients=True)
        assert result.output < TOLERANCE, (name, result)
        assert result.tokens, (name, result)
        assert result.gradient is not None and result.gradient < 1e-3, (name, result)  # noqa: PT018 - a program


def compiled(world: cg.World, backend: str = "inductor") -> None:
    """Each layer without a graph break, with backward; and one model as a whole."""
    ids = prompt()
    with world.context(cg.Layout(world.size, tp=2), name="model") as ctx:
        for name in ("LlamaConfig", "MixtralConfig", "DeepseekV3Config"):
            model = model_of(name)
            expected = output_of(model, ids)
            own = parallelize(copy.deepcopy(model), ctx)
            for layer in own.model.layers:
                layer.compile(fullgraph=True, backend=backend)
            found = output_of(own, ids)
            assert relative(found.detach(), expected.detach()) < TOLERANCE, name
            objective(expected).backward()
            objective(found).backward()
            norm, whole = own.model.norm.weight.grad, model.model.norm.weight.grad
            assert float((norm - whole).abs().max() / whole.abs().max()) < 1e-3, name
            torch.compiler.reset()
        model = model_of("LlamaConfig")
        with torch.no_grad():
            expected = output_of(model, ids)
            own = parallelize(copy.deepcopy(model), ctx)
            own.compile(fullgraph=True, backend=backend)
            assert relative(output_of(own, ids), expected) < TOLERANCE


def main() -> None:
    torch.set_num_threads(1)
    with cg.World.from_env() as world:
        {"plain": plain, "compiled": compiled}[sys.argv[1]](world, *sys.argv[2:])
        assert not dist.is_initialized()


if __name__ == "__main__":
    main()
