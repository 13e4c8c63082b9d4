"""What a group adds to the parts of a dict: checks of the tensors that are sent, and memory for those that come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from commgraph.carriers import carrier
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.failures import Call
from commgraph.coordinator.operation import Group, explain
from commgraph.coordinator.tensor_dict import Entry, split_dict

__all__ = ["new_tensor", "taken_apart"]


def taken_apart(group: Group, operation: str, tree: Any) -> tuple[list[Entry], list[torch.Tensor]]:
    """Describe a dict that can be sent, and list its tensors."""
    sequence = group._state.sequence
    try:
        entries, tensors = split_dict(tree)
    except TypeError as error:
        raise TypeError(f"{Call(group.name, operation, group._state.members, sequence).where}: {error}. Nothing was sent.") from None
    try:
        return entries, [checks.tensor(group, x, gradient=operation) for x in tensors]
    except BadArgument:
        # Checked again, with the tensors' names for the error.
        paths = [".".join(map(str, path)) for path, what in entries if what[0] == "t"]
        try:
            return entries, [
                checks.tensor(group, x, f"the tensor {path!r}", gradient=operation) for path, x in zip(paths, tensors, strict=True)
            ]
        except BadArgument as error:
            raise explain(error, group, operation, sequence) from None


def new_tensor(group: Group, operation: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor from the strategy that will fill it, whose memory may be that of an earlier result."""
    strategy = group._state.strategies.route(operation, shape, dtype, device)
    return strategy.new(shape, carrier(dtype), device).view(dtype)
