"""How a user names groups of a layout: by axes, by a part of them, on another grid, or rank by rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.checks import equation, size_of, some, unknown, whole
from commgraph.layout.patterns import Digit, Pattern, chosen, cut, listed, part, strided

__all__ = ["Grid", "GroupSpec", "Positions", "Split", "UnknownSizeError", "digits_of", "resolve"]


def _names(axes: str | Iterable[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _places(positions: Iterable[int]) -> tuple[int, ...]:
    return tuple(positions)


def _pairs(axes: Mapping[str, int] | Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in (axes.items() if isinstance(axes, Mapping) else axes))


@attrs.frozen
class Split:
    """The ranks of some axes, cut into groups of `size`.

    The ranks that differ in `axes` only, in group order, are viewed as ``(n / (size * stride), size, stride)``; a group runs along the
    middle. Of eight ranks, ``Split("tp", 4)`` makes ``(0 1 2 3) (4 5 6 7)`` and ``Split("tp", 4, stride=2)`` makes
    ``(0 2 4 6) (1 3 5 7)``.

    Attributes:
        axes: an axis, or several in group order, slowest first.
        size: ranks in a group; ``size * stride`` divides the product of the axes.
        stride: how far neighbours in a group lie apart, counted in ranks of the joined axes. 1 makes consecutive runs.
    """

    axes: tuple[str, ...] = attrs.field(converter=_names)
    size: int
    stride: int = attrs.field(default=1, kw_only=True)


@attrs.frozen
class Positions:
    """Chosen positions along some axes; a rank that stands elsewhere is alone in its group.

    ``Positions("pp", (0, -1))`` joins the first and the last pipeline stage, Megatron-Core's ``embd``. Positions that coincide, as those
    two do with one stage, count once.

    Attributes:
        axes: an axis, or several in group order, slowest first.
        positions: where the members stand, in group order; negative ones count from the end.
    """

    axes: tuple[str, ...] = attrs.field(converter=_names)
    positions: tuple[int, ...] = attrs.field(converter=_places)


def _along(along: str | Iterable[str] | Split | Positions) -> tuple[str, ...] | Split | Positions:
    return along if isinstance(along, Split | Positions) else _names(along)


@attrs.frozen
class Grid:
    """A group on another grid over the same ranks, e.g. Megatron-Core's expert grid beside the dense one.

    ``Grid({"pp": 2, "edp": 1, "ep": 4}, "ep")`` sees eight ranks as two stages of four experts, whatever the layout's own axes are.

    Attributes:
        axes: names and sizes of the grid's axes, outermost first; they multiply to the number of ranks that the layout's own axes cover,
            the world size unless it is a layout over a part. The names belong to the grid alone.
        along: what joins a group there: an axis, several in group order, a `Split` or `Positions`.
    """

    axes: tuple[tuple[str, int], ...] = attrs.field(converter=_pairs)
    along: tuple[str, ...] | Split | Positions = attrs.field(converter=_along)


GroupSpec: TypeAlias = str | Split | Positions | Grid | Iterable[str] | Iterable[Iterable[int]]


class UnknownSizeError(Exception):
    """A group needs an axis whose size is itself wrong: there is nothing to say about the group until that is mended."""


def digits_of(axes: Mapping[str, int | None]) -> dict[str, Digit | None]:
    """The digit of each axis, innermost axis fastest; None for an axis of unknown size, which then counts as 1."""
    digits: dict[str, Digit | None] = {}
    stride = 1
    for name in reversed(tuple(axes)):
        size = axes[name]
        digits[name] = None if size is None else (size, stride)
        stride *= size or 1
    return {name: digits[name] for name in axes}


def resolve(spec: object, world_size: int, axes: Mapping[str, int | None], first_rank: int, covered: int) -> Pattern:
    """The pattern of one group spec.

    Args:
        spec: axes of the layout, a `Split`, `Positions` or a `Grid` of theirs, or lists of global ranks.
        world_size: number of ranks.
        axes: names and sizes, None for a size that is wrong.
        first_rank, covered: `axes` cover so many ranks from there on. Every other rank is alone, unless `spec` lists it.

    Raises:
        LayoutError: the spec names axes that are not there, or its numbers do not fit them.
        UnknownSizeError: it needs an axis whose size is None.
    """
    if isinstance(spec, Iterable) and not isinstance(spec, str | Mapping):
        items: tuple[Any, ...] = tuple(spec)
        if not (items and all(isinstance(item, str) for item in items)):
            if all(isinstance(item, Iterable) and not isinstance(item, str | Mapping) for item in items):
                return listed(world_size, [tuple(item) for item in items])
            raise LayoutError(f"either every item is an axis name or every item is a list of ranks, not {some(items)}")
        spec = items
    count = f"world_size={world_size}" if covered == world_size else f"{covered}, the number of ranks from first_rank={first_rank}"
    return part(world_size, first_rank, _on_axes(spec, covered, axes, count))


def _on_axes(spec: object, size: int, axes: Mapping[str, int | None], count: str) -> Pattern:
    """The pattern of a spec over the `size` ranks of a grid, numbered from 0. `count`: says `size` in messages."""
    match spec:
        case str():
            return strided(size, _join((spec,), axes))
        case tuple() if all(isinstance(name, str) for name in spec):
            return strided(size, _join(spec, axes))
        case Split():
            return strided(size, _split(spec, axes))
        case Positions():
            digits = _join(spec.axes, axes)
            return chosen(size, digits, _positions(spec, math.prod(number for number, _ in digits)))
        case Grid():
            return _on_grid(spec, size, count)
        case Mapping():
            raise LayoutError(f"a mapping names no group; another factorization is Grid({{...}}, along), not {spec!r}")
    raise LayoutError(f"{spec!r} is no axis, no tuple of axes, no Split, Positions or Grid and no list of rank lists")


def _join(names: Sequence[str], axes: Mapping[str, int | None]) -> tuple[Digit, ...]:
    """The digits of several axes, in the given order, slowest first."""
    problems = [unknown("axis", name, tuple(axes)) for name in dict.fromkeys(names) if name not in axes]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        problems.append(f"axis {some(repeated)} is named more than once")
    if not names:
        problems.append(f"no axis is named; there are {', '.join(map(str, axes))}")
    if problems:
        raise LayoutError("; ".join(problems))
    digits = digits_of(axes)
    known = tuple(digit for name in names if (digit := digits[name]) is not None)
    if len(known) < len(names):
        raise UnknownSizeError
    return known


def _split(spec: Split, axes: Mapping[str, int | None]) -> tuple[Digit, ...]:
    problems: list[str] = []
    size, stride = size_of("size", spec.size, problems), size_of("stride", spec.stride, problems)
    if size is None or stride is None:
        raise LayoutError("; ".join(problems))
    digits = _join(spec.axes, axes)
    parts = [("size", size)] if stride == 1 else [("size", size), ("stride", stride)]
    total = equation((name, digit[0]) for name, digit in zip(spec.axes, digits, strict=True))
    if math.prod(digit[0] for digit in digits) % (size * stride):
        raise LayoutError(f"{equation(parts)} does not divide {total}")
    # Only merged digits show where a boundary really falls: runs of 4 over 2 x 6 consecutive ranks are fine.
    merged = strided(1, digits).digits
    try:
        return cut(cut(merged, stride)[0], size)[1]
    except LayoutError as error:
        raise LayoutError(f"{equation(parts)} does not cut {total} into equal steps: {error}") from None


def _positions(spec: Positions, count: int) -> list[int]:
    positions, wrong = list[int](), list[object]()
    for value in spec.positions:
        position = whole(value)
        if position is None or not -count <= position < count:
            wrong.append(value)
        else:
            positions.append(position % count)
    if wrong:
        raise LayoutError(
            f"{some(wrong)} is no position of {'*'.join(spec.axes)}, which has {count} (0..{count - 1}, or negative from the end)"
        )
    if not positions:
        raise LayoutError(f"no position of {'*'.join(spec.axes)} is chosen")
    return positions


def _on_grid(spec: Grid, size: int, count: str) -> Pattern:
    problems: list[str] = []
    sizes = {name: size_of(name, given, problems) for name, given in spec.axes}
    if len(sizes) < len(spec.axes):
        problems.append(f"the grid names an axis twice: {', '.join(name for name, _ in spec.axes)}")
    known = [(name, size) for name, size in sizes.items() if size is not None]
    if not problems and math.prod(number for _, number in known) != size:
        problems.append(f"the grid's {equation(known)} is not {count}")
    pattern = None
    try:
        pattern = _on_axes(spec.along, size, sizes, count)
    except UnknownSizeError:
        pass  # the size is wrong, which `problems` says already
    except LayoutError as error:
        problems.append(str(error))
    if problems or pattern is None:
        raise LayoutError("; ".join(problems))
    return pattern
