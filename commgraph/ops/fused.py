"""A scaled matmul whose result is reduced and scattered: what a sequence-parallel layer of 8-bit floats ends with.

By the fused kernel of torch where there is one, which overlaps the two; elsewhere one after the other, with the same checks, so that shapes
and numbers can be tested without an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from commgraph import compat
from commgraph.coordinator.group import GroupCoordinator
from commgraph.ops.library import define, real

__all__ = ["fused_scaled_matmul_reduce_scatter"]


def _fused(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    reduce_op: str,
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,
    group: GroupCoordinator,
    output_shape: Sequence[int],
    bias: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """The kernel: on CUDA torch's own, found by the name under which torch.distributed lists the group."""
    shape = _check(a, b, a_scale, b_scale, reduce_op, orig_scatter_dim, scatter_dim_after_maybe_reshape, group, output_shape, bias)
    if a.is_cuda and group.world_size > 1:  # not yet run on a GPU
        y: torch.Tensor = torch.ops.symm_mem.fused_scaled_matmul_reduce_scatter(
            a,
            b,
            a_scale,
            b_scale,
            reduce_op,
            orig_scatter_dim,
            scatter_dim_after_maybe_reshape,
            group.torch_group("device").group_name,
            list(output_shape),
            bias,
            result_scale,
            out_dtype,
            use_fast_accum,
        )
        return y
    product = (a.flatten(0, -2).float() @ b.float()) * _by_rows(a_scale) * b_scale
    if bias is not None:
        product = product + bias
    if result_scale is not None:
        product = product * result_scale
    whole = product.to(a.dtype if out_dtype is None else out_dtype).view(shape)
    return group.reduce_scatter(whole, orig_scatter_dim, op=reduce_op)


def _fused_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    reduce_op: str,
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,
    group: Any,
    output_shape: Sequence[int],
    bias: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    shape = _check(a, b, a_scale, b_scale, reduce_op, orig_scatter_dim, scatter_dim_after_maybe_reshape, group, output_shape, bias)
    # Along the dim of the whole output: that of the matrix it was flattened to is another one where there are three or more.
    shape[orig_scatter_dim] //= real(group).world_size
    return a.new_empty(shape, dtype=a.dtype if out_dtype is None else out_dtype)


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    reduce_op: str,
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,
    group: Any,
    output_shape: Sequence[int],
    bias: torch.Tensor | None,
) -> list[Any]:
    """The shape of the whole product, if everything fits."""
    n = real(group).world_size
    if a.dim() < 2:
        raise ValueError(f"A has shape {tuple(a.shape)}: a matrix, or a stack of rows with more leading dims, is needed")
    if b.dim() != 2 or b.shape[0] != a.shape[-1]:
        raise ValueError(f"B has shape {tuple(b.shape)}: A {tuple(a.shape)} needs a matrix of {a.shape[-1]} rows")
    if a_scale.numel() != 1 and a_scale.shape[:-1] != a.shape[:-1]:
        raise ValueError(
            f"A_scale has shape {tuple(a_scale.shape)}: one number is needed, or one for each row of A {tuple(a.shape)}, with the same "
            "leading dims"
        )
    if a_scale.numel() != 1 and a_scale.shape[-1] != 1:
        raise ValueError(f"A_scale has shape {tuple(a_scale.shape)}: one number for each row of A has 1 for its last dim")
    if b_scale.numel() != 1 and tuple(b_scale.shape) != (1, b.shape[1]):
        raise ValueError(f"B_scale has shape {tuple(b_scale.shape)}: one number is needed, or (1, {b.shape[1]}), one for each column of B")
    if bias is not None and tuple(bias.shape) != (b.shape[1],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, ({b.shape[1]},) is needed")
    if reduce_op not in ("sum", "avg"):
        raise ValueError(f"reduce_op={reduce_op!r} is not one of sum, avg")
    if not 0 <= orig_scatter_dim < len(output_shape):
        raise ValueError(f"orig_scatter_dim={orig_scatter_dim} is out of range for output_shape={list(output_shape)}")
    if not 0 <= scatter_dim_after_maybe_reshape < a.dim():
        raise ValueError(f"scatter_dim_after_maybe_reshape={scatter_dim_after_maybe_reshape} is out of range for A {tuple(a.shape)}")
    shape = [*output_shape[:-1], b.shape[1]]
    rows, wanted = 1, 1
    for extent in a.shape[:-1]:
        rows *= extent
    for extent in shape[:-1]:
        wanted *= extent
    compat.check(rows == wanted, lambda: f"output_shape={list(output_shape)} has other rows than A {tuple(a.shape)}")
    extent = shape[orig_scatter_dim]
    compat.check(extent % n == 0, lambda: f"dim {orig_scatter_dim} of the product {shape} does not divide by {n} ranks")
    return shape


def _by_rows(scale: torch.Tensor) -> torch.Tensor:
    return scale if scale.numel() == 1 else scale.flatten(0, -2)


fused_scaled_matmul_reduce_scatter = define(
    "fused_scaled_matmul_reduce_scatter(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, str reduce_op, int orig_scatter_dim, "
    "int scatter_dim_after_maybe_reshape, Group group, SymInt[] output_shape, Tensor? bias=None, Tensor? result_scale=None, "
    "ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor",
    _fused,
    _fused_fake,
)
