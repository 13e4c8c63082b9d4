"""Every private name of transformers that this package uses. `NAMES` lists them, and a test looks for each in the newest release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "NAMES",
    "class_for",
    "expand",
    "generic",
    "kept_in_float32",
    "mark_initialized",
    "plans_of",
    "set_plans",
    "set_tp_size",
]

NAMES = (
    ("transformers.modeling_utils", "PreTrainedModel", "_tp_plan"),
    ("transformers.modeling_utils", "PreTrainedModel", "_tp_size"),
    ("transformers.modeling_utils", "PreTrainedModel", "_get_dtype_plan"),
    ("transformers.modeling_utils", "PreTrainedModel", "initialize_weights"),
    ("transformers.modeling_utils", "PreTrainedModel", "_keys_to_ignore_on_load_missing"),
    ("transformers.models.auto.modeling_auto", "AutoModelForCausalLM", "_model_mapping"),
    ("transformers.generation.utils", "GenerationMixin", "_has_unfinished_sequences"),
    ("transformers.generation.utils", "GenerationMixin", "_get_stopping_criteria"),
    ("transformers.core_model_loading", "rename_source_key"),
    ("transformers.core_model_loading", "WeightConverter"),
    ("transformers.core_model_loading", "WeightRenaming"),
    ("transformers.core_model_loading", "dot_natural_key"),
    ("transformers.conversion_mapping", "get_model_conversion_mapping"),
    ("transformers.distributed.parallel_utils", "ALL_PARALLEL_STYLES"),
    ("transformers.initialization", "normal_"),
)
"""Module, name, and where there is one, attribute."""


def plans_of(model: Any) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Return a model's own tensor-parallel, expert-parallel and pipeline plans; empty for a module that is no PreTrainedModel."""
    return tuple(dict(getattr(model, name, None) or {}) for name in ("tp_plan", "ep_plan", "pp_plan"))  # type: ignore[return-value]  # three


def expand(model: Any, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a plan with the names of modules and parameters in place of its wildcards, parameters before their module.

    As transformers' own, for any module: a rule of a module holds for its own parameters, which may have one of their own.
    """
    found = {}
    for path, module in model.named_modules():
        rule = plan.get(generic(path))
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if (style := plan.get(generic(full), rule)) is not None:
                found[full] = style
        if rule is not None:
            found[path] = rule
    return found


def generic(name: str) -> str:
    """Return a name with a wildcard for each number between dots."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def set_plans(model: Any, tp: Mapping[str, str]) -> None:
    """Put down which plan is in force: static caches look how the key projections are cut."""
    model._tp_plan = dict(tp)


def set_tp_size(model: Any, size: int) -> None:
    """Say into how many parts attention is cut: static caches that are allocated before the first forward ask."""
    model._tp_size = size


def mark_initialized(tensor: Any) -> None:
    """Say that a tensor has its values, so that `initialize_weights` leaves it as it is."""
    tensor._is_hf_initialized = True


def kept_in_float32(model: Any, dtype: Any) -> list[str]:
    """Return patterns of names of parameters that stay in float32 where the others have `dtype`."""
    return list(model._get_dtype_plan(dtype))


def class_for(auto: Any, config: Any) -> Any:
    """Return the class that an ``AutoModel`` class takes for a configuration."""
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found
