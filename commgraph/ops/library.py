"""How an operator is declared: its schema, what it does, what it gives for fake tensors, and its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commgraph import compat
from commgraph.communicators.reduction import REDUCE_OPS, refuse_reduction
from commgraph.coordinator.group import GroupCoordinator

__all__ = [
    "GROUP",
    "apart",
    "check_dim",
    "check_op",
    "check_peer",
    "check_sizes",
    "contiguous",
    "define",
    "derivative_of",
    "real",
    "resized",
]

# What the schemas call the type of a coordinator.
GROUP = f"{GroupCoordinator.__module__}.{GroupCoordinator.__qualname__}"

# Owns the definitions: they end with it.
_LIBRARY = torch.library.Library("commgraph", "FRAGMENT")

Gradient = Callable[..., tuple[Any, ...]]


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    keep: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradient: Gradient | None = None,
) -> Any:
    """Declares an operator, and returns ``torch.ops.commgraph.<name>``.

    Args:
        schema: with ``Group`` in the place of a coordinator's type.
        kernel: takes plain tensors and a live coordinator.
        fake: the same arguments, with tensors that have shapes only; gives empty ones.
        keep: (ctx, inputs, output), notes what the gradient needs.
        gradient: (ctx, gradients of the outputs), one result for each input.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema.replace("Group ", f"{GROUP} "))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"commgraph::{name}", _telling(name, fake), lib=_LIBRARY)
    if gradient is not None:
        torch.library.register_autograd(f"commgraph::{name}", gradient, setup_context=keep, lib=_LIBRARY)
    return getattr(torch.ops.commgraph, name)


def _telling(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, whose errors say which rank of which group called what; it is the last of us to be called before code is made."""

    @functools.wraps(fake)
    def call(*args: Any, **kwargs: Any) -> Any:
        compat.keep_order(name)
        try:
            return fake(*args, **kwargs)
        except ValueError as error:
            group = next(g for g in map(real, (*args, *kwargs.values())) if isinstance(g, GroupCoordinator))
            raise ValueError(
                f"{name} on group {group.name!r} (rank {group.rank}, {group.rank_in_group} of {group.world_size} in the group): {error}. "
                "Nothing was sent."
            ) from None

    return call


def derivative_of(name: str) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Makes a function the derivative of an operator that changes an argument: it has its arguments, and calls it below autograd."""

    def declare(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        _LIBRARY.impl(name, function.apply, "Autograd")
        return function

    return declare


def real(group: Any) -> GroupCoordinator:
    """The coordinator, where torch hands over its stand-in."""
    found: GroupCoordinator = compat.real_object(group)
    return found


def contiguous(x: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """An empty tensor of x's dtype and device."""
    return x.new_empty(tuple(shape))


def resized(x: torch.Tensor, dim: int, extent: Any) -> list[Any]:
    """x's shape with another extent of `dim`."""
    shape = list(x.shape)
    shape[dim] = extent
    return shape


def apart(result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The result, never x itself: one rank gets its input back from a coordinator, which an operator must not do."""
    return x.clone(memory_format=torch.contiguous_format) if result is x else result


# What fakes check, as the coordinator does with real tensors.


def check_dim(x: torch.Tensor, dim: int) -> int:
    """`dim` counted from the front."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is out of range for shape {tuple(x.shape)}")
    return dim % x.dim()


def check_op(x: torch.Tensor, op: str) -> None:
    """Whether there is such a reduction of such a dtype."""
    if op not in REDUCE_OPS:
        raise ValueError(f"op={op!r} is not one of {', '.join(REDUCE_OPS)}")
    if (reason := refuse_reduction(x.dtype, op)) is not None:
        raise ValueError(f"op={op!r} over dtype {x.dtype}: {reason}")


def check_sizes(group: Any, sizes: Sequence[Any]) -> None:
    """Whether there is one for each rank."""
    if len(sizes) != real(group).world_size:
        raise ValueError(f"sizes={list(sizes)} has {len(sizes)} entries, one for each of {real(group).world_size} ranks is needed")


def check_peer(group: Any, peer: int, name: str) -> None:
    """Whether it is a rank of the group."""
    if not 0 <= peer < real(group).world_size:
        raise ValueError(f"{name}={peer} is no rank of a group of {real(group).world_size}")
