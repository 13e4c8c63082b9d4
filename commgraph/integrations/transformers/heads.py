"""Attention heads over the ranks: key-value heads fewer than ranks are held by several, next to their query heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from commgraph.errors import ConfigurationError

__all__ = ["attentions", "blocks_of", "regroup"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def attentions(modules: Mapping[str, nn.Module], actions: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Yield each attention whose key projection is cut by features: its path, module, query heads and key-value heads."""
    for path, module in modules.items():
        head, groups = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
        key = getattr(module, "k_proj", None)
        action = actions.get(f"{path}.k_proj")
        if isinstance(head, int) and isinstance(groups, int) and isinstance(key, nn.Linear) and action is not None:
            cut = action.cuts.get("weight")
            if action.style == "colwise" and cut is not None and key.out_features % head == 0:
                heads = key.out_features // head
                yield path, module, heads * groups, heads


def blocks_of(modules: Mapping[str, nn.Module], actions: Mapping[str, Any], world: int, where: str) -> list[tuple[str, str, int]]:
    """Return which parameters of key and value projections are held by several ranks: path, name, and how many heads there are.

    Raises:
        ConfigurationError: heads that cannot be shared so.
    """
    found = []
    for path, _, queries, heads in attentions(modules, actions):
        if queries % world or (heads % world and world % heads):
            raise ConfigurationError(
                f"{where}: {path}, style 'colwise': {queries} query heads and {heads} key-value heads cannot be shared by {world} ranks: "
                "the former must be a multiple of the ranks, and the latter a multiple or a divisor"
            )
        if heads < world:
            for name in PROJECTIONS[1:]:
                if (action := actions.get(f"{path}.{name}")) is not None and action.style == "colwise":
                    found += [(f"{path}.{name}", key, heads) for key in action.cuts]
    return found


def regroup(modules: Mapping[str, nn.Module], actions: Mapping[str, Any], world: int) -> dict[str, int]:
    """Return, for each attention, how many query heads a key-value head of a rank serves."""
    return {path: (queries // world) // max(heads // world, 1) for path, _, queries, heads in attentions(modules, actions)}
