"""Checks of arguments, and texts of errors about them, for the modules of this package."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

__all__ = ["equation", "size_of", "some", "unknown", "whole"]


def whole(value: object) -> int | None:
    """`value` as an int, or None where it is no whole number. True is no count of anything, though Python thinks so."""
    if type(value) is int:  # by far the most frequent: rank lists hold nothing else
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # tensors and arrays have __index__ whatever they hold
        return None


def size_of(name: str, value: object, problems: list[str]) -> int | None:
    """`value` as a size, or None after adding to `problems` what is wrong with it."""
    size = whole(value)
    if size is None:
        problems.append(f"{name}={value!r} is not a whole number")
    elif size < 1:
        problems.append(f"{name}={size} is less than 1")
        return None
    return size


def equation(sizes: Iterable[tuple[str, int]]) -> str:
    """``"dp*tp = 2*4 = 8"``; ``"tp = 4"`` for a single size."""
    names, numbers, product = [], [], 1
    for name, size in sizes:
        names.append(str(name))
        numbers.append(str(size))
        product *= size
    return " = ".join(dict.fromkeys(("*".join(names), "*".join(numbers), str(product))))


def unknown(kind: str, name: object, options: Iterable[object]) -> str:
    """Says that `name` is not among `options`, lists them and guesses which one was meant."""
    choices = list(map(str, options))
    close = difflib.get_close_matches(str(name), choices, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"no {kind} is called {name!r}; {guess}there {'is' if len(choices) == 1 else 'are'} {', '.join(choices)}"


def some(values: Sequence[object], count: int | None = None, limit: int = 8) -> str:
    """The first `limit` of `values`, and how many there are (`count`, where `values` holds only the first ones) if that is more."""
    count = len(values) if count is None else count
    text = ", ".join(map(repr, values[:limit]))
    return text if count <= limit else f"{text}, … ({count} in all)"
