"""A scaled matmul whose result is reduced and scattered, as at the end of a sequence-parallel layer of 8-bit floats.

By the fused kernel of torch where there is one, which overlaps the two; elsewhere one after the other, with the same checks, so that shapes
and numbers can be tested without an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch

from commgraph import compat
from commgraph.ops.library import declare

__all__ = ["declare_fused"]


@attrs.frozen
class _Given:
    """The arguments, in the order of the schema."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    reduce_op: str
    orig_scatter_dim: int
    scatter_dim_after_maybe_reshape: int
    group: Any
    output_shape: Sequence[int]
    bias: torch.Tensor | None = None
    result_scale: torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    use_fast_accum: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return self.a.dtype if self.out_dtype is None else self.out_dtype

    def shape(self) -> list[Any]:
        """Shape of the whole product, after a check of all arguments."""
        a, b, n = self.a, self.b, compat.real_object(self.group).world_size
        if a.dim() < 2:
            raise ValueError(f"A has shape {tuple(a.shape)}: a matrix, or a stack of rows with more leading dims, is needed")
        if b.dim() != 2 or b.shape[0] != a.shape[-1]:
            raise ValueError(f"B has shape {tuple(b.shape)}: A {tuple(a.shape)} needs a matrix of {a.shape[-1]} rows")
        self._check_scales()
        if self.bias is not None and tuple(self.bias.shape) != (b.shape[1],):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}, ({b.shape[1]},) is needed")
        if self.reduce_op not in ("sum", "avg"):
            raise ValueError(f"reduce_op={self.reduce_op!r} is not one of sum, avg")
        dim, reshaped, whole = self.orig_scatter_dim, self.scatter_dim_after_maybe_reshape, list(self.output_shape)
        if not 0 <= dim < len(whole):
            raise ValueError(f"orig_scatter_dim={dim} is out of range for output_shape={whole}")
        if not 0 <= reshaped < a.dim():
            raise ValueError(f"scatter_dim_after_maybe_reshape={reshaped} is out of range for A {tuple(a.shape)}")
        fits = math.prod(a.shape[:-1]) == math.prod(whole[:-1])
        compat.check(fits, lambda: f"output_shape={whole} has other rows than A {tuple(a.shape)}")
        shape = [*whole[:-1], b.shape[1]]
        compat.check(shape[dim] % n == 0, lambda: f"dim {dim} of the product {shape} does not divide by {n} ranks")
        return shape

    def _check_scales(self) -> None:
        a, b, a_scale, b_scale = self.a, self.b, self.a_scale, self.b_scale
        if a_scale.numel() != 1 and a_scale.shape[:-1] != a.shape[:-1]:
            raise ValueError(
                f"A_scale has shape {tuple(a_scale.shape)}: one number is needed, or one for each row of A {tuple(a.shape)}, with the same "
                "leading dims"
            )
        if a_scale.numel() != 1 and a_scale.shape[-1] != 1:
            raise ValueError(f"A_scale has shape {tuple(a_scale.shape)}: one number for each row of A has 1 for its last dim")
        if b_scale.numel() != 1 and tuple(b_scale.shape) != (1, b.shape[1]):
            raise ValueError(
                f"B_scale has shape {tuple(b_scale.shape)}: one number is needed, or (1, {b.shape[1]}), one for each column of B"
            )


def _fused(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Run torch's kernel on CUDA, which finds the group by its name in torch.distributed."""
    given = _Given(*args, **kwargs)
    shape, group = given.shape(), given.group
    y: torch.Tensor
    if given.a.is_cuda and group.world_size > 1:  # not yet run on a GPU
        named = attrs.evolve(given, group=group.torch_group("device").group_name, output_shape=list(given.output_shape))
        y = torch.ops.symm_mem.fused_scaled_matmul_reduce_scatter(*attrs.astuple(named, recurse=False))
        return y
    scale = given.a_scale if given.a_scale.numel() == 1 else given.a_scale.flatten(0, -2)
    product = (given.a.flatten(0, -2).float() @ given.b.float()) * scale * given.b_scale
    if given.bias is not None:
        product = product + given.bias
    if given.result_scale is not None:
        product = product * given.result_scale
    y = group.reduce_scatter(product.to(given.dtype).view(shape), given.orig_scatter_dim, op=given.reduce_op)
    return y


def _fused_fake(*args: Any, **kwargs: Any) -> torch.Tensor:
    given = _Given(*args, **kwargs)
    shape = given.shape()
    # Along the dim of the whole output: that of the matrix it was flattened to is another one where there are three or more.
    shape[given.orig_scatter_dim] //= compat.real_object(given.group).world_size
    return given.a.new_empty(shape, dtype=given.dtype)


def declare_fused() -> Any:
    """Declare ``torch.ops.commgraph.fused_scaled_matmul_reduce_scatter``, and return it."""
    return declare(
        "fused_scaled_matmul_reduce_scatter(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, str reduce_op, int orig_scatter_dim, "
        "int scatter_dim_after_maybe_reshape, Group group, SymInt[] output_shape, Tensor? bias=None, Tensor? result_scale=None, "
        "ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor",
        _fused,
        _fused_fake,
    )
