"""Full tensors that lie in files, or are made of several that do: an index reads that part alone.

They are what `commgraph.nn.load_full_state_dict` takes as slices. A converter of transformers that only stacks, joins, splits or transposes
becomes one of these; any other is run on whole tensors when its result is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from commgraph.nn.shards import Slice

__all__ = ["Converted", "Joined", "Part", "Stacked", "Transposed"]


def _spans(index: Any, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and end along each dim of an index of slices."""
    given = index if isinstance(index, tuple) else (index,)
    given = () if given == (Ellipsis,) else given
    return [one.indices(size)[:2] for one, size in zip((*given, *(slice(None),) * (len(shape) - len(given))), shape, strict=True)]


def _index(spans: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in spans)


@attrs.frozen
class Stacked:
    """Tensors of one shape along a new dim.

    Attributes:
        parts: the tensors, in order.
        dim: the new dim.
    """

    parts: tuple[Slice, ...]
    dim: int

    def get_shape(self) -> list[int]:
        """Return the shape of all."""
        shape = list(self.parts[0].get_shape())
        return [*shape[: self.dim], len(self.parts), *shape[self.dim :]]

    def __getitem__(self, index: Any) -> torch.Tensor:
        spans = _spans(index, self.get_shape())
        first, end = spans.pop(self.dim)
        return torch.stack([part[_index(spans)] for part in self.parts[first:end]], self.dim)


@attrs.frozen
class Joined:
    """Tensors one behind the other along a dim.

    Attributes:
        parts: the tensors, in order.
        dim: the dim.
    """

    parts: tuple[Slice, ...]
    dim: int

    def get_shape(self) -> list[int]:
        """Return the shape of all."""
        shape = list(self.parts[0].get_shape())
        shape[self.dim] = sum(part.get_shape()[self.dim] for part in self.parts)
        return shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        spans = _spans(index, self.get_shape())
        first, end = spans[self.dim]
        found, begin = [], 0
        for part in self.parts:
            size = part.get_shape()[self.dim]
            low, high = max(first - begin, 0), min(end - begin, size)
            if low < high:
                spans[self.dim] = low, high
                found.append(part[_index(spans)])
            begin += size
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


@attrs.frozen
class Part:
    """A part of a tensor along a dim.

    Attributes:
        whole: the tensor.
        dim: the dim.
        first, end: of the part.
    """

    whole: Slice
    dim: int
    first: int
    end: int

    def get_shape(self) -> list[int]:
        """Return the shape of the part."""
        shape = list(self.whole.get_shape())
        shape[self.dim] = self.end - self.first
        return shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        spans = _spans(index, self.get_shape())
        start, stop = spans[self.dim]
        spans[self.dim] = start + self.first, stop + self.first
        return self.whole[_index(spans)]


@attrs.frozen
class Transposed:
    """A tensor with two dims exchanged.

    Attributes:
        whole: the tensor.
        dims: the two.
    """

    whole: Slice
    dims: tuple[int, int]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return self._swapped(self.whole.get_shape())

    def _swapped(self, values: Sequence[Any]) -> list[Any]:
        swapped, (one, other) = list(values), self.dims
        swapped[one], swapped[other] = swapped[other], swapped[one]
        return swapped

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.whole[_index(self._swapped(_spans(index, self.get_shape())))].transpose(*self.dims)


@attrs.define
class Converted:
    """A tensor that is computed when it is first asked for.

    Attributes:
        compute: gives it.
    """

    compute: Callable[[], torch.Tensor]
    _tensor: torch.Tensor | None = None

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._whole().shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self._whole()
        part = whole[index]
        return part if part.shape == whole.shape else part.clone()  # which may be kept, and must not keep the whole

    def _whole(self) -> torch.Tensor:
        if self._tensor is None:
            self._tensor = self.compute()
        return self._tensor
