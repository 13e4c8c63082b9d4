"""Shelter from the ambient state of torch, and the constructors of internal tensors.

A caller of torch can change the result of `torch.empty(3)`: by a default device or dtype, function modes and dispatch modes, the levels of
`torch.func`, inference mode. Buffers of commgraph are made by the constructors here, which name device and dtype, and code that handles
them runs in `shelter`, where no mode sees it and no level wraps its results. Code of users that is called on the way (`__reduce__`, for
example) is not to be sheltered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import torch

from commgraph import compat
from commgraph.carriers import carrier

__all__ = ["HOST", "empty", "integers", "lasting", "over", "shelter", "sheltered", "zeros"]

P = ParamSpec("P")
T = TypeVar("T")

HOST: Final = torch.device("cpu")


def shelter() -> contextlib.AbstractContextManager[Any]:
    """Return a context without modes and levels of torch; one that does nothing where there are none."""
    return compat.without_modes() if compat.has_modes() else contextlib.nullcontext()


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Shelter code that builds what outlives the caller's state: also from inference mode, whose tensors cannot be filled outside of it."""
    with shelter(), torch.inference_mode(False):
        yield


def sheltered(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function in `shelter`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not compat.has_modes():
            return function(*args, **kwargs)
        with compat.without_modes():
            return function(*args, **kwargs)

    return run


def empty(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device = HOST) -> torch.Tensor:
    """Return an uninitialised tensor."""
    return torch.empty(shape, dtype=carrier(dtype), device=device).view(dtype)


def zeros(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device = HOST) -> torch.Tensor:
    """Return a tensor of zeros."""
    return torch.zeros(shape, dtype=dtype, device=device)


def integers(values: Iterable[int], device: torch.device = HOST) -> torch.Tensor:
    """Return numbers as int64, 1-D."""
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def over(memory: Any, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Return a 1-D host tensor over a writable buffer, which it keeps alive."""
    return torch.frombuffer(memory, dtype=carrier(dtype)).view(dtype) if len(memory) else empty(0, dtype)
