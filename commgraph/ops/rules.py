"""Derivatives of eager calls: reverse mode, forward mode, and the transforms of `torch.func`.

A `Rule` is an autograd function of a tensor and of arguments that are no tensors. In forward mode every call of a rule with a floating
tensor exchanges tangents, also on a rank whose tensor has none: it counts as zero there, so that all ranks make the same calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling

from commgraph import compat

__all__ = ["Rule", "again", "carries_tangent", "follows", "in_rule", "record", "with_tangent"]


class Rule(Function):
    """An autograd function whose forward is `compute` and `keep`. Subclasses define both, `batched`, `backward` and `push`.

    `push` is what torch calls jvp. The class itself has none, as dynamo traces no function with one (torch 2.13).
    """

    @staticmethod
    def push(node: Any, *tangents: Any) -> Any:
        """Return the tangent of the result."""
        raise NotImplementedError

    @staticmethod
    def compute(x: torch.Tensor, *args: Any) -> Any:
        """Return the result for a tensor without derivatives."""
        raise NotImplementedError

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save on `node` what derivatives need."""
        raise NotImplementedError

    @staticmethod
    def batched(x: torch.Tensor, *args: Any) -> tuple[Any, ...]:
        """Return the arguments for a tensor like x with one more dimension at its end."""
        return args


def in_rule(rule: type[Rule], node: Any, inputs: tuple[Any, ...]) -> Any:
    """Return the result of `forward`."""
    output = rule.compute(*inputs)
    rule.keep(node, inputs, output)
    return output


def carries_tangent(x: torch.Tensor) -> bool:
    """Whether x is a dual tensor of forward mode. Not of tensors within `torch.func`."""
    return compat.in_forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def follows(x: torch.Tensor) -> bool:
    """Whether something follows what is done with x: autograd, forward mode or a level of `torch.func`."""
    return (x.requires_grad and torch.is_grad_enabled()) or compat.is_wrapped(x) or carries_tangent(x)


def with_tangent(x: torch.Tensor) -> torch.Tensor:
    """Return x; in forward mode as a dual tensor, whose tangent is zero where x has none."""
    if not compat.in_forward_mode() or compat.is_wrapped(x) or not (x.is_floating_point() or x.is_complex()) or carries_tangent(x):
        return x
    dual: torch.Tensor = forward_ad.make_dual(x, torch.zeros_like(x))
    return dual


def record(rule: type[Rule], x: torch.Tensor, *args: Any) -> Any:
    """Apply a rule, so that whatever follows x follows the result."""
    applied: Any = rule
    if not is_dynamo_compiling():
        if compat.in_transform():
            applied = _for_transforms(rule)
        elif compat.in_forward_mode():
            applied = type(rule.__name__, (rule,), {"jvp": staticmethod(rule.push)})
    return applied.apply(x, *args)


def again(rule: type[Rule], x: torch.Tensor, *args: Any) -> Any:
    """Apply a rule as part of a derivative: recorded where something follows x."""
    if is_dynamo_compiling():
        return record(rule, x, *args)
    if compat.is_without_memory(x):
        x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if follows(x):
        return record(rule, x, *args)
    with compat.without_forward_mode():
        return rule.compute(x, *args)


def _for_transforms(rule: type[Rule]) -> type[Function]:
    """Return a rule in the form that `torch.func` needs, which takes autograd several times as long where it is not needed."""

    def vmap(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, *args: Any) -> tuple[Any, int]:
        # Behind the others, so that the dimensions that arguments name keep their numbers.
        moved = x.movedim(in_dims[0], -1)
        one = torch.empty(moved.shape[:-1], dtype=x.dtype, device="meta")
        result = again(rule, moved, *rule.batched(one, *args))
        return result, result.dim() - 1

    members = {
        "forward": staticmethod(rule.compute),
        "setup_context": staticmethod(rule.keep),
        "vmap": staticmethod(vmap),
        "jvp": staticmethod(rule.push),
    }
    return type(rule.__name__, (rule,), members)
