"""Tests of what must be quick, on machines that stand still for a second now and then."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec

__all__ = ["again_if_late", "within"]

P = ParamSpec("P")


class TooLateError(AssertionError):
    """Something took longer than it may."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done inside takes less than so many seconds."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    if took >= seconds:
        raise TooLateError(f"took {took:.2f} s, and may take {seconds:g} s")


def again_if_late(test: Callable[P, None]) -> Callable[P, None]:
    """A test that is late three times fails: the machine delays one of them, what is slow by itself delays all."""

    @functools.wraps(test)
    def patient(*args: P.args, **kwargs: P.kwargs) -> None:
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except TooLateError:
                continue
        return test(*args, **kwargs)

    return patient
