"""`check_replicated`: do parameters that every rank holds whole get the same gradient everywhere?"""

from __future__ import annotations

import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError
from commgraph.nn.places import places_of

__all__ = ["check_replicated"]


@torch.no_grad()
def check_replicated(model: nn.Module, ctx: ParallelContext | None = None, *, tolerance: float = 1e-3) -> None:
    """Compares the gradients of parameters that are not cut over the ranks of tp. Collective over them; call it after a backward.

    Each rank of tp computes the same loss, so these gradients are equal but for rounding. Where they are not, the plan lacks a rule: the
    parameter lies between cut ones, and each rank sees its own part of its use (style ``replicated_with_grad_allreduce``).

    Args:
        model: with gradients.
        ctx: the context; None: the model's.
        tolerance: greatest difference, relative to the greatest value of a parameter's gradients.

    Raises:
        ConfigurationError: gradients differ; names the parameters and by how much. On every rank alike.
    """
    ctx = getattr(model, "ctx", None) if ctx is None else ctx
    if not isinstance(ctx, ParallelContext):
        raise ConfigurationError(f"check_replicated: {type(model).__name__} has no context of its own: say ctx=")
    wrong = []
    for name, place in places_of(model).items():
        gradient = place.tensor.grad if place.tensor.is_leaf else None
        if place.is_sharded or ctx.tp.world_size == 1:
            continue
        # A rank without a gradient takes part with zeros: the ranks' calls match whoever has one.
        own = torch.zeros_like(place.tensor) if gradient is None else gradient
        if not own.is_floating_point() or not own.numel():
            continue
        own = own.float()
        low, high = ctx.tp.all_reduce(own, op="min"), ctx.tp.all_reduce(own, op="max")
        size = float(torch.maximum(low.abs(), high.abs()).max())
        difference = float((high - low).max())
        if difference > tolerance * size:
            wrong.append(f"{name} by {difference / size:.1e}")
    if wrong:
        raise ConfigurationError(
            f"check_replicated on rank {ctx.rank}: gradients differ over tp={ctx.tp.world_size}, relative to their greatest value: "
            f"{', '.join(wrong)}. The plan lacks a rule for these, such as 'replicated_with_grad_allreduce'"
        )
