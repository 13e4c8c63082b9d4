"""Marks on shards: a parameter says by its mark which layer shards it, and torch.distributed.checkpoint is refused.

torch.distributed.checkpoint takes a plain tensor for replicated, and keeps that of one rank. Before, it looks for methods of the tensor
itself, and finds an attribute of the one tensor as well as a method.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import nn

from commgraph.errors import ConfigurationError

__all__ = ["layer_of", "mark"]


def mark(tensor: torch.Tensor, layer: nn.Module, name: str) -> None:
    """Marks a parameter of `layer`, or a tensor of its state, as the shard of one rank.

    Nothing keeps the layer alive. Copies, operations' results and pickles carry no mark.
    """
    tensor._commgraph_layer = (weakref.ref(layer), name)  # type: ignore[attr-defined]  # an attribute of this one tensor
    tensor.__getstate__ = _no_state  # type: ignore[method-assign]  # pickles of state dicts load with weights_only=True
    tensor.__create_write_items__ = _refuse  # type: ignore[attr-defined]
    tensor.__create_chunk_list__ = _refuse  # type: ignore[attr-defined]
    tensor.__get_tensor_shard__ = _refuse  # type: ignore[attr-defined]


def layer_of(tensor: torch.Tensor) -> tuple[nn.Module, str] | None:
    """Return the layer that shards a parameter, and its name there; None of a parameter that every rank holds whole.

    Raises:
        ConfigurationError: the layer is gone.
    """
    if (found := getattr(tensor, "_commgraph_layer", None)) is None:
        return None
    layer: nn.Module | None = found[0]()
    if layer is None:
        raise ConfigurationError(f"the layer that sharded this parameter of shape {tuple(tensor.shape)} as {found[1]!r} exists no more")
    return layer, found[1]


def _no_state() -> None:
    return None


def _refuse(name: str = "a tensor", *_: Any) -> NoReturn:
    raise ConfigurationError(
        f"{name}: one rank's shard of a commgraph.nn layer, which torch.distributed.checkpoint would take for the same on all ranks. "
        "Hand it commgraph.nn.sharded_state_dict(model) in place of model.state_dict()"
    )
