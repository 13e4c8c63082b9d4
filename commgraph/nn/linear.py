"""Linear layers whose weight lies cut on the ranks of a group.

Shapes: ``[...]`` is any number of leading dims, none included; ``tp`` the size of the layer's group; weights are ``[out, in]`` as in
``torch.nn.Linear``. Outputs and gradients are the unsharded layer's, where every rank computes the same loss (`commgraph.nn.functional`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.functional import copy_to, gather_from, reduce_from, scatter_to
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.shards import Piece, Shard

__all__ = ["ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear"]


class _Linear(ParallelLayer):
    """Weight and bias, drawn as torch.nn.Linear draws them."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int

    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator | None) -> None:
        if name == "weight":
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        else:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(full, -bound, bound, generator=generator)

    def _checked(self, x: torch.Tensor, hint: str) -> torch.Tensor:
        if x.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(
                f"{type(self).__name__} on rank {self.ctx.rank}: x {tuple(x.shape)} must end in {self.weight.shape[1]} features{hint}"
            )
        return x


class ColumnLinear(_Linear):
    """What the layers cut along the output have in common: one weight, made of several full ones."""

    def __init__(
        self,
        in_features: int,
        pieces: Mapping[Shard, Piece],
        *,
        ctx: ParallelContext,
        group: str,
        bias: bool,
        gather_output: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.in_features = in_features
        self.out_features = sum(piece.full for piece in pieces.values())
        self.gather_output = gather_output
        self._add("weight", 0, pieces, (in_features,), device, dtype)
        if bias:
            self._add("bias", 0, pieces, (), device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def local_sizes(self) -> list[int]:
        """Features of each piece in this rank's output, e.g. for ``q, k, v = layer(x).split(layer.local_sizes, dim=-1)``."""
        return self.cuts["weight"].sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: ``[..., in_features]``, equal on all ranks.

        Returns:
            ``[..., sum(local_sizes)]``, this rank's features of each piece; with `gather_output` ``[..., out_features]`` on every rank.
        """
        y = F.linear(copy_to(self._checked(x, ""), self.group), *self._parameters_for_forward())
        if not self.gather_output or self.group.world_size == 1:
            return y
        pieces = self.cuts["weight"].join(gather_from(y, self.group), -1)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _parameters_for_forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def extra_repr(self) -> str:
        """The sizes, and this rank's place."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"gather_output={self.gather_output}, {self._where()}"
        )


class ColumnParallelLinear(ColumnLinear):
    """``y = x W^T + b`` with W cut along the output: each rank computes its share of the features.

    Forward communicates nothing (but with `gather_output`); backward all-reduces the gradient of x. Usually followed by a `RowParallelLinear`.

    Args:
        in_features: of the whole layer.
        out_features: of the whole layer; a multiple of tp.
        bias: whether there is one. Cut like the output.
        gather_output: whether every rank gets all features.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[out_features / tp, in_features]``.
        bias: ``[out_features / tp]`` or None.

    Raises:
        ConfigurationError: `out_features` is not a multiple of tp.
        LayoutError: the context has no such group.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = False,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        ParallelLayer.__init__(self, ctx, group)
        self._divisible(out_features=out_features)
        pieces: dict[Shard, Piece] = {0: Piece(out_features, self.group.world_size)}
        super().__init__(in_features, pieces, ctx=ctx, group=group, bias=bias, gather_output=gather_output, device=device, dtype=dtype)
