"""Hypothesis strategies for code that is built on commgraph.

They need ``hypothesis``, which commgraph itself does not depend on.
"""

from __future__ import annotations

import math

from hypothesis import strategies as st

from commgraph.layout import GroupSpec, Layout, Positions, Split

__all__ = ["layouts"]

_AXES = ("dp", "pp", "pcp", "tp")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _specs(draw: st.DrawFn, sizes: dict[str, int]) -> GroupSpec:
    axes = tuple(draw(st.permutations(tuple(sizes)))[: draw(st.integers(1, 3))])
    count = math.prod(sizes[axis] for axis in axes)
    kind = draw(st.sampled_from(("union", "positions", "split")))
    if kind == "positions":
        return Positions(axes, draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=4)))
    if kind == "split":
        axis = axes[0]
        size = draw(st.sampled_from(_divisors(sizes[axis])))
        return Split(axis, size, stride=draw(st.sampled_from(_divisors(sizes[axis] // size))))
    return axes


@st.composite
def layouts(draw: st.DrawFn, *, max_world_size: int = 64, world_size: int | None = None, groups: bool = True) -> Layout:
    """Valid layouts over the standard axes; they shrink towards one rank along each axis.

    Args:
        draw: given by hypothesis.
        max_world_size: the most ranks a layout may have.
        world_size: exactly this many ranks, instead of up to `max_world_size`.
        groups: whether to add up to two groups of the user's own: a union of axes, a split, chosen positions.

    Returns:
        A strategy that draws a `Layout`.
    """
    room = max_world_size if world_size is None else world_size
    sizes: dict[str, int] = {}
    for axis in draw(st.permutations(("replica", *_AXES))):
        if world_size is None:
            # The square root leaves room for the axes that come later: a world whose ranks all lie along one axis tests little.
            sizes[axis] = draw(st.integers(1, min(room, math.isqrt(room) + 1)))
        else:
            sizes[axis] = draw(st.sampled_from(_divisors(room)))
        room //= sizes[axis]
    # What the drawn axes leave of an exact world falls to replica, as it does in Layout itself.
    world = math.prod(sizes.values()) if world_size is None else world_size
    sizes["replica"] = world // math.prod(sizes[axis] for axis in _AXES)
    tp, pcp = sizes["tp"], sizes["pcp"]
    dcp = draw(st.sampled_from(_divisors(tp) if pcp == 1 else sorted({1, pcp, tp * pcp})))
    own = {f"own{index}": _specs(draw, sizes) for index in range(draw(st.integers(0, 2)) if groups else 0)}
    return Layout(world, **{axis: sizes[axis] for axis in _AXES}, dcp=dcp, groups=own)
