"""A mixture of experts, which are distributed over the ranks: data-parallel attention beside expert-parallel MLPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_dynamo_compiling

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator, is_watched
from commgraph.errors import ConfigurationError
from commgraph.nn.functional import copy_to, reduce_from
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.shards import Piece, Shard

__all__ = ["ExpertParallelMLP"]


class ExpertParallelMLP(ParallelLayer):
    """A router and ``num_experts`` gated MLPs, ``down(silu(gate(x)) * up(x))``, of which each rank of ``ctx.ep`` holds its share.

    Attention before it is data parallel: each rank of dp has rows of its own. They are dispatched to the ranks that hold the experts, and
    the experts' results are added up on the rank that the rows came from. Without `sequence_parallel` the rows are equal on the ranks of tp
    and go over ``ctx.dp``, and the result is added up over ``ctx.tp``; with it they are split over tp (and pcp), too, and go over
    ``ctx.ep``. Contexts built with ``CommunicatorOptions(experts=num_experts)`` send a row only where one of its experts is.

    Gradients: of the experts with respect to the sum of the losses of all data-parallel ranks; of the router, as of any replicated
    parameter, to this rank's loss, to be added up over dp as usual.

    Args:
        hidden_size: features of a row.
        intermediate_size: features inside an expert.
        num_experts: in all; a multiple of the size of ``ctx.ep``.
        top_k: experts of each row.
        renormalize: whether the weights of the chosen experts add up to 1; else they are those of the softmax over all experts.
        sequence_parallel: whether the rows are split over tp.
        ctx: the context.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        router: ``[num_experts, hidden_size]``, on every rank.
        gate_up_proj: ``[num_experts / ep, 2 * intermediate_size, hidden_size]``: both projections of this rank's experts.
        down_proj: ``[num_experts / ep, hidden_size, intermediate_size]``.
        experts: the first of this rank's experts, and the end.

    Raises:
        ConfigurationError: sizes that do not fit, or rows that differ over pcp and not over tp.
    """

    router: nn.Parameter
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        ctx: ParallelContext,
        renormalize: bool = True,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, "ep")
        self.hidden_size, self.intermediate_size, self.num_experts, self.top_k = hidden_size, intermediate_size, num_experts, top_k
        self.renormalize, self.sequence_parallel = renormalize, sequence_parallel
        self._divisible(num_experts=num_experts)
        if not 1 <= top_k <= num_experts:
            raise ConfigurationError(f"ExpertParallelMLP(top_k={top_k}): a row has 1 to num_experts={num_experts} experts")
        if ctx.pcp.world_size > 1 and ctx.tp.world_size > 1 and not sequence_parallel:
            raise ConfigurationError(
                f"ExpertParallelMLP over {ctx.layout!r}: rows that differ over pcp and are equal over tp have no group to be exchanged in; "
                "split them over tp, too, and say sequence_parallel=True"
            )
        routed = self._exchange._experts
        if routed not in (None, num_experts):
            raise ConfigurationError(
                f"ExpertParallelMLP(num_experts={num_experts}): context {ctx.name!r} was built with CommunicatorOptions(experts={routed})"
            )
        own = num_experts // self.group.world_size
        self.experts = (own * self.group.rank_in_group, own * (self.group.rank_in_group + 1))
        spread: dict[Shard, Piece] = {0: Piece(num_experts, self.group.world_size)}
        everywhere: dict[Shard, Piece] = {0: Piece(num_experts, 1)}
        self._add("router", 0, everywhere, (hidden_size,), device, dtype)
        self._add("gate_up_proj", 0, spread, (2 * intermediate_size, hidden_size), device, dtype)
        self._add("down_proj", 0, spread, (hidden_size, intermediate_size), device, dtype)
        self.reset_parameters()

    @property
    def _exchange(self) -> GroupCoordinator:
        """Return the group of the ranks whose rows differ."""
        return self.ctx.ep if self.sequence_parallel or self.ctx.tp.world_size == 1 else self.ctx.dp

    def forward(self, x: torch.Tensor, *, sizes: Sequence[int] | str | None = None) -> torch.Tensor:
        """Sends each row to its experts, and adds up their results.

        Args:
            x: ``[..., hidden_size]``: this rank's rows, which may be none; equal on the ranks of tp without `sequence_parallel`.
            sizes: rows of each rank of ``ctx.dp`` (with `sequence_parallel` of ``ctx.ep``), as for `dispatch`: numbers; ``"equal"``;
                None counts them first, which cannot be traced.

        Returns:
            Of x's shape.

        Raises:
            ValueError: x has another number of features; nothing was sent.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"ExpertParallelMLP({self.extra_repr()}): x {tuple(x.shape)} must end in {self.hidden_size} features. Nothing was sent."
            )
        rows, tp = x.reshape(-1, self.hidden_size), self.ctx.tp
        # Each rank of tp sees another part of what becomes of rows and weights; or of the rows, and then of the router.
        router = copy_to(self.router, tp) if self.sequence_parallel else self.router
        weights, ids = self._choose(rows, router)
        if not self.sequence_parallel:
            rows, weights = copy_to(rows, tp), copy_to(weights, tp)
        dispatched = self._exchange.dispatch(rows, weights, ids, sizes=sizes)
        y = self._exchange.combine(self._own(*dispatched.tensors), dispatched)
        if not self.sequence_parallel:
            y = reduce_from(y, tp)
        return y.reshape(x.shape)

    def _choose(self, rows: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids of each row's experts, ``[rows, top_k]`` both."""
        scores = F.linear(rows, router).float().softmax(-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(rows.dtype), ids

    def _own(self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the contribution of this rank's experts to each row."""
        # The rows of an expert depend on data, which traced code does not have: there each expert computes all rows.
        dense = is_dynamo_compiling() or is_watched(rows)
        total = torch.zeros_like(rows)
        for local, expert in enumerate(range(*self.experts)):
            share = (weights * (ids == expert)).sum(-1, keepdim=True)
            if dense:
                total = total + self._expert(local, rows) * share
            else:
                index = (ids == expert).any(-1).nonzero().squeeze(-1)
                total = total.index_add(0, index, self._expert(local, rows.index_select(0, index)) * share.index_select(0, index))
        return total

    def _expert(self, local: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.gate_up_proj[local]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[local])

    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator | None) -> None:
        bound = 1 / math.sqrt(full.shape[-1]) if full.shape[-1] else 0.0
        nn.init.uniform_(full, -bound, bound, generator=generator)

    def extra_repr(self) -> str:
        """Sizes, and this rank's number in the group."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, experts {self.experts[0]} to "
            f"{self.experts[1] - 1} of {self.num_experts}, top_k={self.top_k}, sequence_parallel={self.sequence_parallel}, {self._where()}"
        )
