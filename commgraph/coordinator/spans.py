"""Spans of calls for torch.profiler, named ``context/group/operation``. Without a profiler there are none."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch.profiler import record_function

from commgraph import compat

__all__ = ["Named", "context_of", "span", "spanned"]

P = ParamSpec("P")
T = TypeVar("T")

# Names of groups that `commgraph.context.build_context` makes: context, number of the build, first group, ranks; and siblings of such.
_OF_CONTEXT = re.compile(r"(.*)/[0-9]+/[^/]*/\([^/]*\)(?:/sibling [0-9]+)*")


class Named(Protocol):
    """A coordinator, as spans know it."""

    @property
    def name(self) -> str:
        """As the layout calls the group."""

    @property
    def _state(self) -> Any: ...


def context_of(uid: str) -> str:
    """Return the name of the context of a group with that uid; empty for groups of a world."""
    found = _OF_CONTEXT.fullmatch(uid)
    return "" if found is None else found[1]


def span(group: Named, operation: str) -> contextlib.AbstractContextManager[Any]:
    """Return the span of a call on a group."""
    if not compat.is_profiling():
        return contextlib.nullcontext()
    context = context_of(group._state.members.uid)
    return record_function("/".join(([context] if context else []) + [group.name, operation]))


def spanned(method: Callable[P, T]) -> Callable[P, T]:
    """Make a span of each call of a method, whose first arguments are a group and the name of the operation."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not compat.is_profiling():
            return method(*args, **kwargs)
        _, group, operation, *_ = args
        with span(cast(Named, group), str(operation)):
            return method(*args, **kwargs)

    return run
