"""What all ranks of a call must have in common: as text, and as the tag that their messages carry."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "CHECK",
    "COLLECTIVE",
    "MESSAGE",
    "OBJECT",
    "OBJECT_REST",
    "SETUP",
    "all_to_all",
    "describe",
    "digest",
    "gathered",
    "make_tag",
    "message",
    "messages",
    "plain",
    "reduced",
    "scattered",
    "tagged",
]

# Kinds of messages: those of different kinds never pair, however they are interleaved. SETUP: of strategies that are being built. The
# highest of 3 bits stays free.
COLLECTIVE, MESSAGE, OBJECT, OBJECT_REST, CHECK, SETUP = range(6)

_MASK = (1 << 28) - 1


def digest(text: str) -> int:
    """28 bits of a text."""
    return zlib.crc32(text.encode()) & _MASK


def make_tag(kind: int, sequence: int, signature: str = "") -> int:
    """31 bits that two messages share only if they belong together: kind, and a hash of the count and of what all sides know.

    The native module makes the same for collectives (native/module_door.c): the multiplier is odd, so the tags of 2**28 equal calls differ.
    """
    return tagged(kind, sequence, digest(signature))


def tagged(kind: int, sequence: int, signature: int) -> int:
    """The same of a signature whose digest is known."""
    return kind << 28 | ((signature ^ sequence * 0x9E3779B1) & _MASK)


def describe(x: torch.Tensor) -> str:
    """Dtype and shape."""
    return f"{x.dtype} {tuple(x.shape)}"


def messages(*tensors: torch.Tensor) -> str:
    """Of tensors from one rank to another, which may give them another shape."""
    return " ".join(message(x.dtype, x.numel()) for x in tensors)


def message(dtype: torch.dtype, numel: int) -> str:
    """Of one of them."""
    return f"{dtype} {numel}"


def reduced(op: str, x: torch.Tensor) -> str:
    """Of `all_reduce`."""
    return f"{op} {describe(x)}"


def scattered(op: str, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> str:
    """Of `reduce_scatter`."""
    return f"{op} {describe(x)} dim={dim} {sizes}"


def gathered(dtype: torch.dtype, shape: Sequence[int], dim: int, sizes: Sequence[int]) -> str:
    """Of `all_gather`; `shape` is that of the result."""
    return f"{dtype} {tuple(shape)} dim={dim} {sizes}"


def all_to_all(x: torch.Tensor, shared: Sequence[int], scatter_dim: int, gather_dim: int, cut: Sequence[int] | None) -> str:
    """Of `all_to_all`; `shared` is what the ranks have in common of the shape, `cut` the sizes where they must be the same."""
    return f"{x.dtype} {tuple(shared)} {x.dim()} {scatter_dim} {gather_dim} {'' if cut is None else cut}"


def plain(world_size: int, operation: str, x: Any, argument: Any) -> int:
    """The digest of a call that took the short way (native/module_door.c): the same as of one that took the long way.

    Args:
        world_size: ranks in the group.
        operation: name of the coordinator's method.
        x: its tensor.
        argument: op of a reduction, dim of a gather or exchange, both of a reduce_scatter, src of a broadcast.
    """
    text = ""
    if operation in ("all_reduce", "all_reduce_"):
        text = reduced(argument, x)
    elif operation == "all_gather":
        shape = list(x.shape)
        shape[argument] *= world_size
        text = gathered(x.dtype, shape, argument, [x.shape[argument]] * world_size)
    elif operation == "reduce_scatter":
        dim, op = argument
        text = scattered(op, x, dim, [x.shape[dim] // world_size] * world_size)
    elif operation == "all_to_all":
        text = all_to_all(x, x.shape, argument, argument, None)
    elif operation == "broadcast":
        text = f"src={argument} {describe(x)}"
    return digest(f"{operation}({text})")
