"""Where the plans of transformers give wrong gradients or another layout than a loaded model has.

transformers' own tensor parallelism has the same errors; `check_replicated` finds more of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["MISSING", "corrected", "style_around", "style_in_memory"]

_NORMS = MappingProxyType(
    {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }
)

_ACTIVATION = MappingProxyType({"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"})

MISSING: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        # Parameters of the activation between two cut projections.
        "apertus": _ACTIVATION,
        "apertus1p5_text": _ACTIVATION,
        # Norms of single heads, of which each rank has its own.
        "qwen3_vl_moe_text": _NORMS,
        "qwen3_omni_moe_text": _NORMS,
        "qwen3_omni_moe_talker_text": _NORMS,
        "sarvam_moe": _NORMS,
    }
)
"""Model type -> rules that its plan lacks, relative to the module with the layers."""


def corrected(model: Any, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a model's own plan with the rules that it lacks; those that it has win.

    Args:
        model: the model, whose parts may be models with plans of their own.
        plan: its tensor-parallel plan; an empty one stays empty.
    """
    missing: dict[str, str] = {}
    for path, module in model.named_modules() if plan else ():
        kind = str(getattr(getattr(module, "config", None), "model_type", ""))
        if kind in MISSING and hasattr(module, "layers"):
            missing |= {f"{path}.{name}".lstrip("."): style for name, style in MISSING[kind].items()}
    return missing | dict(plan)


def style_around(style: str, cuts: object) -> str:
    """Return the style of a module's forward, given which of its own parameters are cut.

    ``all_reduce`` adds up results; where the module itself has cut parameters (inkling's shared experts), what it is called with is used in
    parts as well, and the gradients are summed as those of experts.
    """
    return "moe_tp_experts" if style == "all_reduce" and cuts else style


def style_in_memory(module: Any, name: str, style: str) -> str:
    """Return the style by which a loaded parameter is cut.

    A plan describes what a checkpoint holds. Where the checkpoint interleaves gates and up projections and the model has them side by side
    (the experts module says so by ``is_concatenated``), a plain cut of the one is a cut of both halves of the other.
    """
    if style == "colwise" and name.startswith("gate_up_proj") and getattr(module, "is_concatenated", False):
        return "packed_colwise"
    return style
