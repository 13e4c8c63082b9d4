"""Hypothesis strategies for code that is built on commgraph.

They need ``hypothesis``, which commgraph itself does not depend on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from commgraph.layout import GroupSpec, Layout, Positions, Split
from commgraph.testing._program import LATER, OPERATIONS, STRIDES, Program, Step, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["layouts", "programs", "tensors"]

_AXES = ("dp", "pp", "pcp", "tp")

# Every dtype that can be reduced, by the kind of its reductions.
_FLOATS = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_COMPLEX = ("complex64", "complex128")
_WHOLE = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")
_DTYPES = (*_FLOATS, *_COMPLEX, *_WHOLE)


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
def _rank_lists(draw: st.DrawFn, world_size: int) -> list[list[int]]:
    """Lists of different ranks; a rank in none of them is alone."""
    ranks = draw(st.lists(st.integers(0, world_size - 1), unique=True, max_size=16))
    lists: list[list[int]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for rank in ranks:
        lists[draw(st.integers(0, len(lists) - 1))].append(rank)
    return [members for members in lists if members]


@st.composite
def _parts(draw: st.DrawFn, most: int, *, exact: bool, groups: bool) -> Layout:
    """Layouts over a part of a world of at most `most` ranks, or exactly as many."""
    axes = dict(draw(layouts(world_size=draw(st.integers(1, most)), groups=False)).axes)
    covered = math.prod(axes.values())
    first = draw(st.integers(0, most - covered))
    world = most if exact else draw(st.integers(first + covered, most))
    own = {f"own{index}": _specs(draw, axes) for index in range(draw(st.integers(0, 2)) if groups else 0)}
    if groups and draw(st.booleans()):
        own["listed"] = draw(_rank_lists(world))
    return Layout.from_axes(world, axes, own, first_rank=first)


@st.composite
def layouts(
    draw: st.DrawFn, *, max_world_size: int = 64, world_size: int | None = None, groups: bool = True, parts: bool = False
) -> Layout:
    """Valid layouts over the standard axes; they shrink towards one rank along each axis.

    Args:
        draw: given by hypothesis.
        max_world_size: the most ranks a layout may have.
        world_size: exactly this many ranks, instead of up to `max_world_size`.
        groups: whether to add up to two groups of the user's own: a union of axes, a split, chosen positions.
        parts: whether to draw, too, layouts over a part of the world (`Layout.from_axes` with ``first_rank``, without ``dcp`` and ``ep``),
            in which a rank outside `Layout.grid_ranks` has no coordinate, and own groups of rank lists that leave ranks out.

    Returns:
        A strategy that draws a `Layout`.
    """
    if parts and draw(st.booleans()):
        return draw(_parts(max_world_size if world_size is None else world_size, exact=world_size is not None, groups=groups))
    room = max_world_size if world_size is None else world_size
    sizes: dict[str, int] = {}
    for axis in draw(st.permutations(("replica", *_AXES))):
        if world_size is None:
            # The square root leaves ranks for the later axes: a world whose ranks are all along one axis tests little.
            sizes[axis] = draw(st.integers(1, min(room, math.isqrt(room) + 1)))
        else:
            sizes[axis] = draw(st.sampled_from(_divisors(room)))
        room //= sizes[axis]
    # `replica` gets the rest of an exact world, as in Layout itself.
    world = math.prod(sizes.values()) if world_size is None else world_size
    sizes["replica"] = world // math.prod(sizes[axis] for axis in _AXES)
    tp, pcp = sizes["tp"], sizes["pcp"]
    dcp = draw(st.sampled_from(_divisors(tp) if pcp == 1 else sorted({1, pcp, tp * pcp})))
    own = {f"own{index}": _specs(draw, sizes) for index in range(draw(st.integers(0, 2)) if groups else 0)}
    if parts and groups and draw(st.booleans()):
        own["listed"] = draw(_rank_lists(world))
    return Layout(world, **{axis: sizes[axis] for axis in _AXES}, dcp=dcp, groups=own)


def _tensor_specs(
    dtypes: Sequence[str], *, min_dims: int = 0, max_dims: int = 4, max_side: int = 3, strides: Sequence[str] = STRIDES, bits: bool = False
) -> st.SearchStrategy[TensorSpec]:
    shapes = st.lists(st.integers(0, max_side), min_size=min_dims, max_size=max_dims).map(tuple)
    return st.builds(TensorSpec, st.sampled_from(dtypes), shapes, st.sampled_from(strides), st.just(bits))


def tensors(
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    min_dims: int = 0,
    max_dims: int = 4,
    max_side: int = 3,
    strides: Sequence[str] = STRIDES,
    bits: bool = False,
) -> st.SearchStrategy[torch.Tensor]:
    """Host tensors of every dtype, of any shape (0-d and empty ones too) with any strides.

    Args:
        dtypes: of which; None: every one that can be reduced.
        min_dims, max_dims: number of dimensions.
        max_side: the largest extent.
        strides: how they may lie: ``"plain"``, ``"transposed"``, ``"sliced"``, ``"expanded"``.
        bits: fill them with random bits, in place of numbers whose sums and products over a few ranks do not overflow.
    """
    names = _DTYPES if dtypes is None else [str(dtype).removeprefix("torch.") for dtype in dtypes]
    specs = _tensor_specs(names, min_dims=min_dims, max_dims=max_dims, max_side=max_side, strides=strides, bits=bits)
    return st.builds(TensorSpec.make, specs, st.integers(0, 2**31 - 1))


_REDUCTIONS = frozenset({"all_reduce", "all_reduce_", "reduce", "reduce_scatter", "reduce_scatterv", "combine"})
_OPS = ("sum", "avg", "max", "min", "product", "band", "bor", "bxor")
_BITWISE = _OPS[-3:]
_IN_PLACE = frozenset({"all_reduce_", "broadcast"})
# Operations without a dim, which take 0-dimensional tensors, too.
_WITHOUT_DIM = frozenset({"all_reduce", "all_reduce_", "reduce", "broadcast", "ring", "pair"})
_AROUND = ("replica", *_AXES)


def _plain() -> st.SearchStrategy[Any]:
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.text(max_size=5)
        | st.binary(max_size=5)
        | st.complex_numbers(allow_nan=False)
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple), max_leaves=5)


def _trees() -> st.SearchStrategy[dict[Any, Any]]:
    leaves = _tensor_specs(_DTYPES, bits=True) | _plain()
    keys = st.sampled_from(("hidden", "residual", "a.b", "", 7, ("x", 1)))
    return st.dictionaries(keys, st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=6), max_size=4)


@st.composite
def _steps(draw: st.DrawFn, layout: Layout, operations: Sequence[str]) -> Step:
    operation = draw(st.sampled_from(operations))
    later = draw(st.none() | st.integers(0, 3)) if operation in LATER else None
    # Small layouts have many groups of one rank: a larger group is preferred.
    names = sorted(layout.names, key=layout.size, reverse=True)
    group = names[draw(st.integers(0, len(names) - 1)) if draw(st.booleans()) else draw(st.integers(0, min(3, len(names) - 1)))]
    if "object" in operation or operation == "broadcast_tensor_dict":
        return Step(operation, group, tree=draw(_trees()), root=draw(st.integers(0, 5)))
    if operation == "tensor_dict_ring":
        axes = [axis for axis in _AROUND if axis in layout.names]
        group = draw(st.sampled_from(sorted(axes, key=layout.size, reverse=True)[:2]))
        gather = draw(st.sampled_from([None, *(axis for axis in axes if axis != group)]))
        return Step(operation, group, tree=draw(_trees()), gather=gather, later=later)
    if operation == "barrier":
        return Step(operation, group, later=later)
    reduces = operation in _REDUCTIONS
    op = draw(st.sampled_from(_OPS)) if reduces and operation != "combine" else "sum"
    unfit = {"avg": _WHOLE, "max": _COMPLEX, "min": _COMPLEX, **dict.fromkeys(_BITWISE, (*_FLOATS, *_COMPLEX))}.get(op, ())
    dtypes = [name for name in _DTYPES if name not in unfit]
    strides = [kind for kind in STRIDES if not (kind == "expanded" and operation in _IN_PLACE)]
    tensor = draw(_tensor_specs(dtypes, min_dims=0 if operation in _WITHOUT_DIM else 1, strides=strides, bits=not reduces))
    sides = len(tensor.shape)
    dims = st.integers(-sides, sides - 1) if sides else st.just(0)
    return Step(
        operation,
        group,
        tensor,
        dim=draw(dims),
        other_dim=draw(dims),
        op=op,
        root=draw(st.integers(0, 5)),
        hop=draw(st.integers(0, 4)),
        sizes=draw(st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple)),
        out=draw(st.booleans()),
        later=later,
        batch=draw(st.booleans()),
    )


@st.composite
def programs(
    draw: st.DrawFn, *, world_size: int | None = None, max_world_size: int = 6, max_steps: int = 8, operations: Sequence[str] = OPERATIONS
) -> Program:
    """Programs that every rank runs alike: a layout, and operations over its groups with random tensors, dims, sizes and roots.

    Some are only begun, and waited for a few operations later. Run one with ``spmd(program, program.world_size)``; it prints as what it is
    and shrinks to few ranks and few steps.

    Args:
        draw: given by hypothesis.
        world_size: exactly this many ranks, instead of up to `max_world_size`.
        max_world_size: the most ranks.
        max_steps: the most operations.
        operations: which ones.

    Returns:
        A strategy that draws a `Program`.
    """
    size = draw(st.integers(1, max_world_size)) if world_size is None else world_size
    layout = draw(layouts(world_size=size))
    return Program(layout, tuple(draw(st.lists(_steps(layout, operations), min_size=1, max_size=max_steps))))
