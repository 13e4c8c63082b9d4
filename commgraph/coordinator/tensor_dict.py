"""Dictionaries with tensors in them, split for sending: a description that is sent as an object, and the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from commgraph import ambient

__all__ = ["Entry", "Plan", "join_dict", "result_tensors", "split_dict"]

# An entry of the description: path of keys, then ("o", value), ("d",) for an empty dict, or ("t", dtype, shape, on the host?).
Entry = tuple[tuple[Any, ...], tuple[Any, ...]]


def split_dict(tree: Mapping[Any, Any]) -> tuple[list[Entry], list[torch.Tensor]]:
    """Describes `tree` and lists its tensors in the order of the description. Dicts inside dicts are entered, other containers are not.

    Raises:
        TypeError: if `tree` is not a dict, or contains itself.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"a dict of tensors and objects is needed, not a {type(tree).__name__}")
    entries: list[Entry] = []
    tensors: list[torch.Tensor] = []
    _enter(tree, (), (), entries, tensors)
    return entries, tensors


# No closure: one that calls itself is a cycle, in which the tensors would live until the garbage is collected.
def _enter(
    node: Mapping[Any, Any], path: tuple[Any, ...], above: tuple[int, ...], entries: list[Entry], tensors: list[torch.Tensor]
) -> None:
    if id(node) in above:
        raise TypeError(f"the dict contains itself at {'.'.join(map(str, path))}")
    for key, value in node.items():
        here = (*path, key)
        if isinstance(value, torch.Tensor):
            entries.append((here, ("t", value.dtype, tuple(value.shape), value.device.type == "cpu")))
            tensors.append(value)
        elif type(value) is dict and value:
            _enter(value, here, (*above, id(node)), entries, tensors)
        else:
            entries.append((here, ("d",) if type(value) is dict else ("o", value)))


def join_dict(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> dict[Any, Any]:
    """The inverse of `split_dict`."""
    tree: dict[Any, Any] = {}
    rest = iter(tensors)
    for path, what in entries:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = next(rest) if what[0] == "t" else {} if what[0] == "d" else what[1]
    return tree


@ambient.sheltered
def result_tensors(
    entries: Sequence[Entry],
    device: torch.device,
    carried: Mapping[int, torch.Tensor],
    new: Callable[[Sequence[int], torch.dtype, torch.device], torch.Tensor],
) -> list[torch.Tensor]:
    """Return a tensor for each one of the description: that of `carried`, else an uninitialised one, on the host or on `device` as it was.

    Args:
        entries: the description.
        device: of tensors that were not on the host.
        carried: tensors that came with the description, 1-D, by index among all.
        new: makes an uninitialised tensor of a shape and a dtype on a device.
    """
    described = [what for _, what in entries if what[0] == "t"]
    return [
        new(what[2], what[1], ambient.HOST if what[3] else device)
        if (x := carried.get(i)) is None
        else (x if x.shape == what[2] else x.view(what[2]))
        for i, what in enumerate(described)
    ]


@attrs.frozen
class Plan:
    """Which tensors of a dict are sent as one slice per rank of an all-gather group.

    Sender and receiver derive equal plans from the description alone: the sender's rank i of the group sends slice i, the receivers gather.

    Attributes:
        world_size: ranks of the all-gather group; 1 sends everything whole.
        rank_in_group: whose slice this rank sends or receives.
        override: key (nested: the keys joined by dots) -> whether to slice; others are sliced where their numel divides.
    """

    world_size: int = 1
    rank_in_group: int = 0
    override: Mapping[str, bool] = attrs.field(factory=dict)

    def sliced(self, entries: Sequence[Entry]) -> list[bool]:
        """For each tensor of the description, whether it is sliced.

        Raises:
            ValueError: for a key that is not there, or one that was to be sliced and does not divide.
        """
        if self.world_size == 1 and not self.override:
            return [False for _, what in entries if what[0] == "t"]
        tensors = [(".".join(map(str, path)), math.prod(what[2])) for path, what in entries if what[0] == "t"]
        if unknown := sorted(set(self.override) - {key for key, _ in tensors}):
            raise ValueError(f"all_gather_tensors names {unknown}, the dict has the tensors {[key for key, _ in tensors]}")
        result = []
        for key, numel in tensors:
            divides = numel % self.world_size == 0
            wanted = self.override.get(key, divides)
            if wanted and not divides:
                raise ValueError(f"all_gather_tensors[{key!r}] is True, but its {numel} elements do not divide by {self.world_size} ranks")
            result.append(wanted and self.world_size > 1 and numel > 0)
        return result

    @ambient.sheltered
    def slice(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's slice of x, 1-D."""
        return x.reshape(self.world_size, -1)[self.rank_in_group]
