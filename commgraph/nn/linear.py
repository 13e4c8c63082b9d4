"""Linear layers whose weight lies cut on the ranks of a group.

Shapes: ``[...]`` is any number of leading dims, none included; ``tp`` the size of the layer's group; weights are ``[out, in]`` as in
``torch.nn.Linear``. Outputs and gradients are the unsharded layer's, where every rank computes the same loss (`commgraph.nn.functional`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.functional import copy_to, gather_from, reduce_from, scatter_to
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.shards import Piece, Shard

__all__ = ["ColumnParallelLinear", "Holders", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear"]


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

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(
                f"{type(self).__name__}({self.extra_repr()}): x {tuple(x.shape)} must end in {self.weight.shape[1]} features on this rank. "
                "Nothing was sent."
            )
        return x


@attrs.frozen
class Holders:
    """The ranks of `group` that hold the same block: `world_size` neighbours. Sums over them go through the whole group."""

    group: GroupCoordinator
    world_size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over these ranks. Collective over the whole group."""
        first = self.group.rank_in_group // self.world_size * self.world_size
        return self.group.all_gather(x, 0).view(-1, *x.shape)[first : first + self.world_size].sum(0)


class ColumnLinear(_Linear):
    """Base of the layers cut along the output: one weight, made of one full weight or several."""

    gather_output: bool
    _holders: list[tuple[int, int]]

    def _make(
        self,
        in_features: int,
        pieces: Mapping[Shard, Piece],
        bias: bool,
        gather_output: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.in_features = in_features
        self.out_features = sum(piece.full for piece in pieces.values())
        self.gather_output = gather_output
        # Pieces side by side that equally many ranks hold: how many, and how many features of this rank they have.
        world = self.group.world_size
        runs = itertools.groupby(pieces.values(), lambda piece: world // piece.blocks)
        self._holders = [(holders, sum(piece.size for piece in run)) for holders, run in runs]
        self._has_copies = any(holders > 1 for holders, _ in self._holders)
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

        Raises:
            ValueError: x has another number of features; nothing was sent.
        """
        y = self._own(x)
        if not self.gather_output or self.group.world_size == 1:
            return y
        pieces = self.cuts["weight"].join(gather_from(y, self.group), -1)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's features, padding included."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if self._has_copies and torch.is_grad_enabled():
            weight, bias = self._shared(weight), None if bias is None else self._shared(bias)
        return F.linear(copy_to(self._checked(x), self.group), weight, bias)

    def _shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter; of a block that several ranks hold, each sees its own use only: its gradient is summed over the holders."""
        parts = parameter.split([size for _, size in self._holders])
        shared = [
            part if holders == 1 else copy_to(part, Holders(self.group, holders))
            for part, (holders, _) in zip(parts, self._holders, strict=True)
        ]
        return shared[0] if len(shared) == 1 else torch.cat(shared)

    def extra_repr(self) -> str:
        """Sizes, and this rank's number in the group."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"gather_output={self.gather_output}, {self._where()}"
        )


class ColumnParallelLinear(ColumnLinear):
    """``y = x W^T + b`` with W cut along the output: each rank computes its share of the features.

    Forward communicates nothing (but with `gather_output`); backward all-reduces the gradient of x. Usually a `RowParallelLinear` follows.

    Args:
        in_features: of the whole layer.
        out_features: of the whole layer; a multiple of tp.
        bias: whether there is one. Cut like the output.
        gather_output: whether every rank gets all features.
        blocks: how many equal parts the output has that stay whole, such as the key-value heads of a ``k_proj`` by itself: a multiple or a
            divisor of tp. Where ranks outnumber them, neighbouring ranks hold the same one, next to the query heads that a
            column-parallel ``q_proj`` gives them; the gradient of such a copy is summed over its holders. None: every feature is one.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[out_features / tp, in_features]``; with fewer `blocks` than tp ``[out_features / blocks, in_features]``.
        bias: ``[out_features / tp]`` likewise, or None.

    Raises:
        ConfigurationError: `out_features` is not a multiple of tp, or of `blocks`; or tp and `blocks` are no multiples of each other.
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
        blocks: int | None = None,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        tp = self.group.world_size
        if blocks is None:
            self._divisible(out_features=out_features)
        elif blocks < 1 or out_features % blocks or (blocks % tp and tp % blocks):
            raise ConfigurationError(
                f"ColumnParallelLinear(out_features={out_features}, blocks={blocks}): out_features must be a multiple of blocks, and "
                f"blocks a multiple or a divisor of {tp}, the size of group {self.group_name!r} of context {self.ctx.name!r}"
            )
        self._make(in_features, {0: Piece(out_features, tp if blocks is None else min(tp, blocks))}, bias, gather_output, device, dtype)


class MergedColumnParallelLinear(ColumnLinear):
    """Several column-parallel layers on the same input as one, e.g. the gate and up projections of a gated MLP.

    Each rank holds its share of every piece: ``gate, up = layer(x).split(layer.local_sizes, dim=-1)``. Checkpoints that have the pieces
    apart load with ``layer.load_full(gate, 0)``, ``layer.load_full(up, 1)``.

    Args:
        in_features: of the whole layer.
        output_sizes: features of each piece; multiples of tp.
        bias: whether there is one. Cut like the output.
        gather_output: whether every rank gets all features of all pieces, one piece after the other.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[sum(output_sizes) / tp, in_features]``.
        bias: ``[sum(output_sizes) / tp]`` or None.

    Raises:
        ConfigurationError: a size is not a multiple of tp.
        LayoutError: the context has no such group.
    """

    def __init__(
        self,
        in_features: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = False,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        if not output_sizes:
            raise ConfigurationError("MergedColumnParallelLinear(output_sizes=[]): at least one size is needed")
        self._divisible(**{f"output_sizes[{i}]": size for i, size in enumerate(output_sizes)})
        pieces: dict[Shard, Piece] = {i: Piece(size, self.group.world_size) for i, size in enumerate(output_sizes)}
        self._make(in_features, pieces, bias, gather_output, device, dtype)


class QKVParallelLinear(ColumnLinear):
    """The query, key and value projections of an attention as one layer, cut by heads.

    ``q, k, v = layer(x).split(layer.local_sizes, dim=-1)``. Where ranks outnumber key-value heads, neighbouring ranks hold the same one,
    next to the query heads that use it; the gradient of such a copy is summed over its holders, so that copies stay equal. Checkpoints
    that have the three apart load with ``layer.load_full(wq, "q")``, ``"k"``, ``"v"``.

    Args:
        hidden_size: features of the input.
        head_dim: features of a head.
        num_heads: query heads of the whole layer; a multiple of tp.
        num_kv_heads: key-value heads of the whole layer, a divisor of `num_heads`; None: as many. A multiple of tp, or a divisor of it.
        bias: whether there is one. Cut like the output.
        gather_output: whether every rank gets all heads, queries first.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[(local_num_heads + 2 * local_num_kv_heads) * head_dim, hidden_size]``.
        bias: ``[(local_num_heads + 2 * local_num_kv_heads) * head_dim]`` or None.
        local_num_heads, local_num_kv_heads: heads of this rank.

    Raises:
        ConfigurationError: the heads cannot be shared so.
        LayoutError: the context has no such group.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        gather_output: bool = False,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        tp = self.group.world_size
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._divisible(num_heads=num_heads)
        if kv_heads < 1 or num_heads % kv_heads:
            raise ConfigurationError(
                f"QKVParallelLinear(num_heads={num_heads}, num_kv_heads={kv_heads}): each must serve as many query heads"
            )
        if tp % kv_heads:
            self._divisible(num_kv_heads=kv_heads)
        self.head_dim, self.num_heads, self.num_kv_heads = head_dim, num_heads, kv_heads
        self.local_num_heads, self.local_num_kv_heads = num_heads // tp, max(kv_heads // tp, 1)
        kv = Piece(kv_heads * head_dim, min(tp, kv_heads))
        self._make(hidden_size, {"q": Piece(num_heads * head_dim, tp), "k": kv, "v": kv}, bias, gather_output, device, dtype)


class RowParallelLinear(_Linear):
    """``y = x W^T + b`` with W cut along the input: each rank multiplies its share of the features, the products are added.

    Forward all-reduces; backward communicates nothing (but gathers where `input_is_parallel` is False).

    Args:
        in_features: of the whole layer; a multiple of tp.
        out_features: of the whole layer.
        bias: whether there is one. Whole on every rank, added once, after the sum.
        input_is_parallel: whether x is this rank's share already, as a `ColumnParallelLinear` gives it. False: x is whole and is cut here.
        reduce_results: False gives this rank's partial product, for the caller to add up (`reduce_from`, `reduce_scatter_to`); needs
            ``bias=False``.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[out_features, in_features / tp]``.
        bias: ``[out_features]`` or None.

    Raises:
        ConfigurationError: `in_features` is not a multiple of tp, or a bias on partial products.
        LayoutError: the context has no such group.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        self._divisible(in_features=in_features)
        if bias and not reduce_results:
            raise ConfigurationError(
                "RowParallelLinear(reduce_results=False) gives partial products, and a bias in each would be added tp times: pass "
                "bias=False and add it after the sum"
            )
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results
        self._add("weight", 1, {0: Piece(in_features, self.group.world_size)}, (out_features,), device, dtype)
        if bias:
            self._add("bias", 0, {0: Piece(out_features, 1)}, (), device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: ``[..., in_features / tp]``, this rank's features; without `input_is_parallel` ``[..., in_features]``, equal on all ranks.

        Returns:
            ``[..., out_features]``, equal on all ranks; without `reduce_results` terms of a sum over them.

        Raises:
            ValueError: x has another number of features; nothing was sent.
        """
        x = self._checked(x if self.input_is_parallel else scatter_to(x, self.group))
        if self.group.world_size == 1 or not self.reduce_results:
            return F.linear(x, self.weight, self.bias)
        y = reduce_from(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, and this rank's number in the group."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"input_is_parallel={self.input_is_parallel}, reduce_results={self.reduce_results}, {self._where()}"
        )
