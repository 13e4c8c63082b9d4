"""`from_checkpoint`: a cut model of which each rank reads its own part of the files alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError
from commgraph.integrations.transformers import private
from commgraph.integrations.transformers.conversion import converted
from commgraph.integrations.transformers.files import slices_of
from commgraph.integrations.transformers.parallel import parallelize
from commgraph.integrations.transformers.ties import tie, ties_of
from commgraph.nn.state import load_full_state_dict

__all__ = ["from_checkpoint"]

logger = logging.getLogger("commgraph")


def from_checkpoint(
    kind: Any,
    folder: str | PathLike[str],
    ctx: ParallelContext,
    *,
    plan: Mapping[str, str] | None = None,
    experts: str = "tp",
    stages: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Builds a cut model and fills it from the safetensors files of a checkpoint. Not collective; nothing is sent.

    The model is built without memory and cut by `parallelize`; then each rank reads the spans of the files that it holds, through
    transformers' mapping of names and tensors. Where that mapping computes more than positions (a few architectures' experts), the tensors
    in question are read whole.

    Example:
        ::

            model = from_checkpoint(AutoModelForCausalLM, folder, ctx)

    Args:
        kind: a model class of transformers, an ``AutoModel`` class, or a configuration, whose ``architectures`` name the class.
        folder: of the checkpoint, on this machine: ``config.json`` and safetensors files.
        ctx: the context; parameters lie on its device.
        plan, experts, stages: as of `parallelize`.
        dtype: of the parameters, but for those that the architecture keeps in float32; None: the configuration's.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigurationError: as of `parallelize`; no such files; tensors that the checkpoint lacks.
    """
    path = Path(folder)
    model_class, config = _resolved(kind, path)
    with torch.device("meta"):
        model = model_class(config)
    _set_dtype(model, dtype or getattr(config, "dtype", None) or torch.float32)
    with slices_of(path) as checkpoint:
        tensors = converted(model, checkpoint)
        known = set(model.state_dict())
        if unexpected := sorted(set(tensors) - known):
            listed = ", ".join([*unexpected[:3], "..."] if len(unexpected) > 3 else unexpected)
            logger.warning("from_checkpoint: %s has %d tensors that %s has not: %s", path, len(unexpected), model_class.__name__, listed)
        for places in ties_of(model):  # a checkpoint has one name of several, and a stage may have another
            names = [f"{path}.{key}".lstrip(".") for path, key in places]
            if (source := next((tensors[name] for name in names if name in tensors), None)) is not None:
                tensors |= {name: source for name in names if name not in tensors}
        parallelize(model, ctx, plan=plan, experts=experts, stages=stages)
        ties = ties_of(model)
        # Not by to_empty, which goes through a decomposition in Python for each tensor that leaves the meta device.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=ctx.device))
        tie(model, ties)
        held = {name: tensor.numel() for name, tensor in model.state_dict().items() if name in tensors}
        # The largest first: what is read in passing is then on top of little.
        sized = sorted(held, key=lambda name: -held[name])
        report = load_full_state_dict(model, {name: tensors[name] for name in sized}, strict=False, adopt=True)
    _check_missing(model, report.missing, path)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            private.mark_initialized(tensor)
        model.initialize_weights()  # what no checkpoint holds: buffers such as rotary frequencies
    _set_generation(model, path)
    return model.eval()


def _resolved(kind: Any, folder: Path) -> tuple[Any, Any]:
    """Return the class of a model and its configuration."""
    import transformers

    if isinstance(kind, transformers.PreTrainedConfig):
        names = kind.architectures or []
        if not names or not hasattr(transformers, names[0]):
            raise ConfigurationError(f"from_checkpoint: a {type(kind).__name__} with architectures {names}: give the class of the model")
        return getattr(transformers, names[0]), kind
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        model_class: Any = kind
        return kind, model_class.config_class.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    return private.class_for(kind, config), config


def _set_dtype(model: Any, dtype: torch.dtype | str) -> None:
    """Gives parameters and persistent buffers their dtype. Not by the process's default, which other threads would see."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
        assert isinstance(dtype, torch.dtype)
    kept = [re.escape(pattern).replace(r"\*", ".*") for pattern in private.kept_in_float32(model, dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            keeps = any(re.search(rf"(?:^|\.){pattern}(?:\.|$)", name) for pattern in kept)
            tensor.data = tensor.data.to(torch.float32 if keeps else dtype)


def _check_missing(model: Any, missing: Sequence[str], folder: Path) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    lacking = [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
    if lacking:
        raise ConfigurationError(f"from_checkpoint: {folder} lacks tensors of {type(model).__name__}: {', '.join(lacking)}")


def _set_generation(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        import transformers

        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
