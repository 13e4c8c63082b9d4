"""Whole experts on each rank: rows go to the ranks that hold their experts, or every rank has all rows and computes its experts' share.

The experts modules are transformers' own. They take local numbers of experts, and leave out one that is as large as their count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError
from commgraph.integrations.transformers.styles import Styled
from commgraph.nn.functional import copy_to, reduce_from

__all__ = ["SpreadExperts", "check_experts", "exchanges_rows"]


def exchanges_rows(ctx: ParallelContext) -> bool:
    """Whether the ranks of ep have different rows, those of their data-parallel ranks."""
    return ctx.dp.world_size > 1


def check_experts(ctx: ParallelContext, where: str) -> None:
    """Raises where experts cannot be spread over the ranks of a context."""
    if ctx.pcp.world_size > 1:
        raise ConfigurationError(f"{where}: experts='ep' with pcp={ctx.pcp.world_size}: rows that differ over pcp cannot be exchanged")


class SpreadExperts(Styled):
    """An experts module of which each rank of ``ctx.ep`` holds some experts.

    Where the ranks of ep are those of tp, all have the same rows, and each adds its experts' share. Otherwise rows go over ``ctx.dp``, and
    the shares are added over ``ctx.tp``.
    """

    num_experts: int
    _is_expert_parallel: bool

    def prepare(self, config: Any) -> None:
        """Makes the count of experts that of this rank."""
        sizes = {cut.sizes[0] for cut in self.cuts.values()}
        (self.num_experts,) = sizes
        self._is_expert_parallel = True  # transformers' forwards then leave out the number that is as large as the count

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Applies the experts.

        Args:
            hidden_states: ``[rows, hidden]``, this rank's rows, which may be none; equal on the ranks of tp.
            top_k_index: ``[rows, k]``, numbers of experts among all.
            top_k_weights: ``[rows, k]``.

        Returns:
            ``[rows, hidden]``, equal on the ranks of tp.
        """
        ctx = self.ctx
        rows, weights = copy_to(hidden_states, ctx.tp), copy_to(top_k_weights, ctx.tp)
        if not exchanges_rows(ctx):
            return reduce_from(self._own(rows, top_k_index, weights), ctx.tp)
        sizes = "equal" if is_dynamo_compiling() else None
        sent = ctx.dp.dispatch(rows, weights, top_k_index, sizes=sizes)
        rows, weights, numbers = sent.tensors
        return reduce_from(ctx.dp.combine(self._own(rows, numbers, weights), sent), ctx.tp)

    def _own(self, rows: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the contribution of this rank's experts to each row."""
        if not rows.shape[0]:
            return rows  # transformers' own take no empty batch
        count, first = self.num_experts, self.num_experts * self.group.rank_in_group
        foreign = (numbers < first) | (numbers >= first + count)
        local = (numbers - first).masked_fill(foreign, count)
        y: torch.Tensor = super().forward(rows, local, weights.masked_fill(foreign, 0))
        return y.to(rows.dtype)
