"""Checks of what a user gave to an operation. All of them happen before anything is sent.

A check raises `BadArgument` with a text; group and operation are added where it is caught (`commgraph.coordinator.operation`), so
that a correct call pays nothing for them. Sizes may be symbols, as where torch traces: the same checks serve operators and eager calls.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol, SupportsIndex, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph import ambient, compat
from commgraph.carriers import QUANTIZED
from commgraph.communicators.reduction import REDUCE_OPS, refuse_reduction
from commgraph.errors import UnsupportedTensorError
from commgraph.ops.rules import carries_tangent

__all__ = ["TAGS", "BadArgument", "Place"]

T = TypeVar("T")

TAGS: Final = 1 << 20
"""How many tags there are for messages."""


class BadArgument(Exception):  # noqa: N818 - never leaves commgraph.coordinator and commgraph.ops
    """An argument cannot be served. `unsupported`: a tensor of a kind that cannot be, which has an error class of its own."""

    def __init__(self, what: str, *, unsupported: bool = False) -> None:
        super().__init__(what)
        self.unsupported = unsupported


class Place(Protocol):
    """The part of a coordinator that checks use: the size of the group, its own rank, and its device."""

    @property
    def world_size(self) -> int: ...
    @property
    def rank_in_group(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def require(condition: Any, what: str) -> None:
    """Raise where a condition on sizes does not hold; one on symbols becomes a guard of the graph."""
    if isinstance(condition, bool):
        if not condition:
            raise BadArgument(what)
    else:
        compat.check(condition, lambda: what)


def tensor(place: Place, x: Any, name: str = "x", *, gradient: str = "") -> torch.Tensor:
    """`x`, if it is a tensor that can be communicated as it is.

    Args:
        place: of the caller.
        x: what was given.
        name: of the argument.
        gradient: operation that would cut a gradient of x silently, and therefore refuses it; empty where the caller takes care of it.
    """
    if not isinstance(x, torch.Tensor):
        raise BadArgument(f"{name} is a {type(x).__name__}, a torch.Tensor is needed", unsupported=True)
    if x.is_nested:
        raise BadArgument(f"{name} is a nested tensor; send its values and its lengths", unsupported=True)
    if type(x) is not torch.Tensor and type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not compat.is_traced(x):
        raise BadArgument(
            f"{name} is a {type(x).__name__}, whose memory is not its values; send the plain tensors it is made of", unsupported=True
        )
    if x.layout is not torch.strided:
        raise BadArgument(
            f"{name} has layout {x.layout}; send a strided tensor, e.g. {name}.to_dense() or its indices and values", unsupported=True
        )
    if x.is_quantized or x.dtype in QUANTIZED:
        raise BadArgument(f"{name} is quantized ({x.dtype}); send {name}.int_repr() and its scales", unsupported=True)
    if compat.is_without_memory(x):
        raise BadArgument(
            f"{name} is a zero that has no memory, as forward-mode derivatives make them; send {name}.clone()", unsupported=True
        )
    if compat.is_wrapped(x) and place.world_size > 1:
        raise BadArgument(
            f"{name} is a tensor within torch.func.grad, vmap or jvp, for which {gradient or 'the call'} has no rule; call it outside",
            unsupported=True,
        )
    if not x.is_cpu and x.device.type != place.device.type:
        hint = "a meta tensor has no data" if x.is_meta else f"move it to {place.device} or to the host first"
        raise BadArgument(f"{name} is on {x.device}, the group serves cpu and {place.device.type}: {hint}", unsupported=True)
    if gradient and x.requires_grad and torch.is_grad_enabled():
        raise BadArgument(
            f"{name} requires a gradient, which {gradient} would cut silently. In a layer use commgraph.nn.functional (copy_to, "
            f"reduce_from, gather_from, scatter_to, reduce_scatter_to); elsewhere call it under torch.no_grad() or on {name}.detach()",
            unsupported=True,
        )
    if gradient and carries_tangent(x):
        raise BadArgument(
            f"{name} carries a tangent of forward mode, which {gradient} would cut silently; give it {name}.detach(), and the tangent to a "
            "call of its own (torch.autograd.forward_ad.unpack_dual)",
            unsupported=True,
        )
    return x


def fillable(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """`x`, if a result may be written to it."""
    if (
        x.layout is torch.strided
        and x.numel()
        and any(stride == 0 and extent > 1 for stride, extent in zip(x.stride(), x.shape, strict=True))
    ):
        raise BadArgument(
            f"{name} is expanded (strides {x.stride()}): several of its elements share memory and cannot be filled", unsupported=True
        )
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise BadArgument(
            f"{name} is a leaf that requires a gradient, which autograd does not let be filled; call it under torch.no_grad() or on "
            f"{name}.detach()",
            unsupported=True,
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise BadArgument(f"{name} was made in inference mode, where alone torch lets it be filled", unsupported=True)
    return x


def announce_filling(x: torch.Tensor) -> torch.Tensor:
    """Bump the version of `x`, whose memory is filled without torch: autograd, which may have saved it, has to notice. Return `x`."""
    if not x.is_inference():
        compat.increment_version((x,))
    return x


def index(value: Any, name: str) -> Any:
    """`value`, if it is an integer or a symbol for one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise BadArgument(f"{name}={value!r} is not an integer")


def dim(x: torch.Tensor, value: SupportsIndex, name: str = "dim") -> int:
    """A dimension of x, counted from the front."""
    found: int = value if type(value) is int else index(value, name)
    dims = x.dim()
    if dims == 0:
        raise BadArgument(f"x has no dimensions and so no {name}; give it one by x.reshape(1)", unsupported=True)
    if not -dims <= found < dims:
        raise BadArgument(f"{name}={found} is out of range for shape {tuple(x.shape)}: {-dims} to {dims - 1}")
    return found % dims


def reduction(op: Any, dtype: torch.dtype) -> str:
    """`op`, if it is a reduction of such a dtype."""
    if op not in REDUCE_OPS or not isinstance(op, str):
        raise BadArgument(f"op={op!r} is not one of {', '.join(REDUCE_OPS)}")
    if (reason := refuse_reduction(dtype, op)) is not None:
        raise BadArgument(f"op={op!r} over dtype {dtype}: {reason}", unsupported=True)
    return op


def even(place: Place, x: torch.Tensor, dim: int) -> list[Any]:
    """Equal pieces of a dimension of x, one per rank."""
    n, extent = place.world_size, x.shape[dim]
    require(extent % n == 0, f"dim {dim} of x {tuple(x.shape)} has {extent} elements, which {n} ranks cannot share equally")
    return [extent // n] * n


def several(values: Iterable[T], name: str) -> list[T]:
    """`values` as a list."""
    try:
        return list(values)
    except TypeError:
        raise BadArgument(f"{name} is a {type(values).__name__}, a sequence is needed", unsupported=True) from None


def sizes(place: Place, values: Any, name: str = "sizes") -> list[Any]:
    """One size per rank, none negative."""
    checked = [index(size, f"{name}[{i}]") for i, size in enumerate(several(values, name))]
    if len(checked) != place.world_size:
        raise BadArgument(f"{name}={checked} has {len(checked)} entries, one for each of {place.world_size} ranks is needed")
    if any(type(size) is int and size < 0 for size in checked):
        raise BadArgument(f"{name}={checked}: a size cannot be negative")
    return checked


def split(place: Place, x: torch.Tensor, dim: int, values: Any, name: str = "sizes") -> list[Any]:
    """Pieces of a dimension of x, one per rank: by sizes that add up to it, or even ones where none are given."""
    if values is None:
        return even(place, x, dim)
    checked = sizes(place, values, name)
    total = sum(checked)
    require(total == x.shape[dim], f"{name}={checked} do not add up to dim {dim} of x {tuple(x.shape)}: {total}, which has {x.shape[dim]}")
    return checked


def joined(place: Place, x: torch.Tensor, dim: int, values: Any, what: str = "x") -> list[Any]:
    """Pieces along a dimension of which x is this rank's, one per rank: by sizes that have its extent here, or all like it."""
    extent = x.shape[dim]
    if values is None:
        return [extent] * place.world_size
    checked = sizes(place, values)
    own = checked[place.rank_in_group]
    require(own == extent, f"sizes={checked} says {own} here; {what} {tuple(x.shape)} has {extent} in dim {dim}")
    return checked


def peer(place: Place, value: Any, name: str, *, other: bool = False) -> int:
    """A rank in the group; `other`: not the caller itself."""
    found: int = value if type(value) is int else index(value, name)
    n = place.world_size
    if not 0 <= found < n:
        raise BadArgument(f"{name}={found} is not a rank in the group: 0 to {n - 1} (not a global rank)")
    if other and found == place.rank_in_group:
        raise BadArgument(
            f"{name}={found} is this rank itself"
            + ("; a group of one rank has nobody to talk to" if n == 1 else "; isend, irecv and batch serve messages to oneself")
        )
    return found


def message_tag(value: Any) -> int:
    """The tag of a message."""
    found: int = value if type(value) is int else index(value, "tag")
    if not 0 <= found < TAGS:
        raise BadArgument(f"tag={found} is not a tag: 0 to {TAGS - 1}")
    return found


def out(place: Place, given: Any, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The caller's tensor for a result of that shape, of `like`'s dtype and device."""
    fillable(tensor(place, given, "out"), "out")
    if tuple(given.shape) != tuple(shape) or given.dtype != like.dtype or given.device != like.device:
        raise BadArgument(
            f"out is {given.dtype} {tuple(given.shape)} on {given.device}, the result is {like.dtype} {tuple(shape)} on {like.device}",
            unsupported=True,
        )
    return announce_filling(given)


def like(place: Place, dtype: Any, device: torch.device | str) -> torch.Tensor:
    """An empty tensor of the dtype and device of one to receive."""
    if isinstance(dtype, torch.dtype) and dtype in QUANTIZED:
        raise BadArgument(f"dtype={dtype} is one of quantized tensors; receive their int_repr() and scales", unsupported=True)
    try:
        made = ambient.empty(0, dtype, torch.device(device))
    # torch's own errors for what is no dtype, no device, or a device that it was not built for.
    except (TypeError, RuntimeError, AssertionError) as error:
        raise BadArgument(f"no tensor of dtype={dtype!r} on device={str(device)!r} can be made here: {error}", unsupported=True) from None
    return tensor(place, made, "the result")


def shape(size: Any) -> tuple[int, ...]:
    """The shape of a tensor to receive."""
    extents = size if isinstance(size, Sequence) else (size,)
    checked = tuple([index(extent, "size") for extent in extents])
    if any(type(extent) is int and extent < 0 for extent in checked):
        raise BadArgument(f"size={checked}: an extent cannot be negative")
    return checked


def resized(x: torch.Tensor, dim: int, extent: Any) -> tuple[Any, ...]:
    """x's shape with another extent of `dim`."""
    return (*x.shape[:dim], extent, *x.shape[dim + 1 :])


def refuse_gradient(group: Any, x: torch.Tensor, operation: str) -> None:
    """Refuse in a trace what would cut a graph silently, as `tensor` does in eager."""
    recorded = x.requires_grad and torch.is_grad_enabled()
    if recorded or (not is_dynamo_compiling() and carries_tangent(x)):
        what = "requires a gradient" if recorded else "carries a tangent of forward mode"
        raise UnsupportedTensorError(
            f"{operation} on rank {group.rank}, in a group of {group.world_size}: x {what}, which does not pass through {operation}; give "
            "it x.detach(). Nothing was sent."
        )
