"""Parameters that a model has under several names, and that stay one when each is made anew."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["Tie", "tie", "ties_of"]

Tie = tuple[tuple[str, str], ...]
"""The places of one parameter, path of the module, and name in it."""


def ties_of(model: nn.Module) -> list[Tie]:
    """Return the parameters with more than one name."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, key = name.rpartition(".")
        places.setdefault(id(parameter), []).append((path, key))
    return [tuple(found) for found in places.values() if len(found) > 1]


def tie(model: nn.Module, ties: Sequence[Tie]) -> None:
    """Makes parameters one again that were one before; places that the model lacks are left out."""
    modules = dict(model.named_modules())
    for places in ties:
        present = [(modules[path], key) for path, key in places if path in modules and modules[path]._parameters.get(key) is not None]
        for module, key in present[1:]:
            first, name = present[0]
            module.register_parameter(key, first._parameters[name])
