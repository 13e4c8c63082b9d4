"""Declaration of a torch operator: schema, kernel, kernel for fake tensors, and derivative. Imports nothing upward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

from commgraph import compat

__all__ = ["declare"]

# Name, in schemas, of the type of a coordinator, which is registered with torch before the first operator is declared.
_GROUP = "commgraph.coordinator.group.GroupCoordinator"

# Owns the definitions: they end with it.
_LIBRARY = torch.library.Library("commgraph", "FRAGMENT")


def declare(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradient: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Declare an operator, and return ``torch.ops.commgraph.<name>``.

    Args:
        schema: with ``Group`` for a coordinator's type; the first argument is the one that a gradient passes through.
        kernel: takes plain tensors and a live coordinator.
        fake: the same arguments, with tensors that have shapes only; gives empty ones.
        setup_context: (node, inputs, output), saves on `node` values that `gradient` needs.
        gradient: (node, gradient of the output), gives that of the first input; None where no gradient passes.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema.replace("Group ", f"{_GROUP} "))

    @functools.wraps(kernel)
    def without_forward_mode(*args: Any, **kwargs: Any) -> Any:
        # In forward mode torch calls an operator that has no rule for it as if nothing followed.
        if compat.in_forward_mode() and any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in _listed(args)):
            raise NotImplementedError(
                f"torch.ops.commgraph.{name} has no rule for forward AD, called by name or under a dispatch mode: call the method of the "
                "coordinator, without the mode. Nothing was sent."
            )
        return kernel(*args, **kwargs)

    _LIBRARY.impl(name, without_forward_mode, "CompositeExplicitAutograd")

    @functools.wraps(fake)
    def ordered_fake(*args: Any, **kwargs: Any) -> Any:
        compat.keep_order(name)
        return fake(*args, **kwargs)

    torch.library.register_fake(f"commgraph::{name}", ordered_fake, lib=_LIBRARY)
    operator = getattr(torch.ops.commgraph, name)
    setattr(operator.default, compat.IN_GRAPH, without_forward_mode)
    if gradient is not None and setup_context is not None:
        count = schema.count(",") + 1 - schema[schema.index("->") :].count(",")
        if "(a!)" in schema:
            # torch.library.register_autograd refuses operators that change an argument, such as the token.
            _LIBRARY.impl(name, _function(name, operator, setup_context, gradient, count).apply, "Autograd")
        else:

            def backward(node: Any, grad: Any) -> tuple[Any, ...]:
                return gradient(node, grad), *[None] * (count - 1)

            torch.library.register_autograd(f"commgraph::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return operator


def _listed(args: tuple[Any, ...]) -> Sequence[Any]:
    """Return the first argument, which may be a list, as a list."""
    return () if not args else args[0] if isinstance(args[0], list | tuple) else args[:1]


def _function(
    name: str, operator: Any, setup_context: Callable[[Any, tuple[Any, ...], Any], None], gradient: Callable[[Any, Any], Any], count: int
) -> type[Function]:
    """Return the derivative of an operator that changes an argument: a function of the same arguments, which calls it below autograd."""

    class Derivative(Function):
        @staticmethod
        def forward(node: Any, *inputs: Any) -> Any:
            with compat.below_autograd():
                output = operator(*inputs)
            setup_context(node, inputs, output)
            return output

        @staticmethod
        def backward(node: Any, grad: Any) -> Any:
            return gradient(node, grad), *[None] * (count - 1)

    Derivative.__name__ = Derivative.__qualname__ = f"Derivative of {name}"
    return Derivative
