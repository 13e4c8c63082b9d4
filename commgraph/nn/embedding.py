"""Embedding and LM head, cut by tokens.

A vocabulary that tp does not divide is padded: each rank holds ``ceil(num_embeddings / tp)`` rows, the last ones zero. Padding never
leaves the layer and gets no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_dynamo_compiling

from commgraph import compat
from commgraph.context import ParallelContext
from commgraph.coordinator import is_watched
from commgraph.errors import ConfigurationError
from commgraph.nn.functional import reduce_from
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.linear import ColumnLinear
from commgraph.nn.shards import Piece

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]


class VocabParallelEmbedding(ParallelLayer):
    """``torch.nn.Embedding`` cut by tokens: each rank looks up those it holds, zeros stand for the others, the results are added.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of a vector.
        padding_idx: a token whose vector is zero when drawn and gets no gradient, as of ``torch.nn.Embedding``; counts from the end if
            negative.
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[ceil(num_embeddings / tp), embedding_dim]``.
        vocab_range: first token of this rank, and the end.

    Raises:
        ConfigurationError: `padding_idx` is out of range.
        LayoutError: the context has no such group.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ConfigurationError(f"VocabParallelEmbedding(padding_idx={padding_idx}) of {num_embeddings} tokens: out of range")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        rows = Piece(num_embeddings, self.group.world_size)
        self.vocab_range = rows.span(self.group.rank_in_group, self.group.world_size)
        self._add("weight", 0, {0: rows}, (embedding_dim,), device, dtype)
        self.reset_parameters()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks tokens up.

        Args:
            ids: any shape, int32 or int64, equal on all ranks; each from 0 to ``num_embeddings - 1``.

        Returns:
            ``[*ids.shape, embedding_dim]``, equal on all ranks.

        Raises:
            ValueError: an id out of range, where ids are on the host; nothing was sent. On an accelerator, where looking would stop the
                host, and in compiled code the lookup itself fails, as it does in ``torch.nn.Embedding``.
        """
        if not is_dynamo_compiling() and ids.device.type == "cpu" and not is_watched(ids) and not compat.is_wrapped(ids):
            self._check(ids)
        if self.group.world_size == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        start, stop = self.vocab_range
        padding = None if self.padding_idx is None or not start <= self.padding_idx < stop else self.padding_idx - start
        foreign = (ids < start) | (ids >= stop)
        invalid = (ids < 0) | (ids >= self.num_embeddings)
        # Ids of other ranks look up row 0 and are zeroed; invalid ones stay invalid on every rank, so that an accelerator's lookup fails.
        local = (ids - start).masked_fill(foreign, 0).masked_fill(invalid, -1)
        y = F.embedding(local, self.weight, padding).masked_fill(foreign.unsqueeze(-1), 0)
        return reduce_from(y, self.group)

    def _check(self, ids: torch.Tensor) -> None:
        if ids.numel() == 0:
            return
        low, high = ids.aminmax()
        if low < 0 or high >= self.num_embeddings:
            wrong = ids[(ids < 0) | (ids >= self.num_embeddings)]
            raise ValueError(
                f"VocabParallelEmbedding({self.extra_repr()}): {wrong.numel()} of {ids.numel()} ids are out of range 0 to "
                f"{self.num_embeddings - 1}, the first is {int(wrong[0])}. Nothing was sent."
            )

    def extra_repr(self) -> str:
        """Sizes, and this rank's number in the group."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._where()}"

    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator | None) -> None:
        nn.init.normal_(full, generator=generator)
        if self.padding_idx is not None:
            full[self.padding_idx].zero_()


class ParallelLMHead(ColumnLinear):
    """Hidden states to logits: a linear layer cut by tokens.

    To tie it to an embedding of the same sizes and group: ``head.weight = embedding.weight``.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: features of a hidden state.
        bias: whether there is one. Cut like the output.
        gather_output: True gives every rank the logits of all tokens, False those of its own (`vocab_range`).
        ctx: the context whose group shares the layer.
        group: name of that group.
        device, dtype: of the parameters; None: torch's defaults.

    Attributes:
        weight: ``[ceil(num_embeddings / tp), embedding_dim]``.
        bias: ``[ceil(num_embeddings / tp)]`` or None.
        vocab_range: first token of this rank, and the end.

    Raises:
        LayoutError: the context has no such group.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        gather_output: bool = True,
        *,
        ctx: ParallelContext,
        group: str = "tp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ctx, group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        tokens = Piece(num_embeddings, self.group.world_size)
        self.vocab_range = tokens.span(self.group.rank_in_group, self.group.world_size)
        self._make(embedding_dim, {0: tokens}, bias, gather_output, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes logits.

        Args:
            x: ``[..., embedding_dim]``, equal on all ranks.

        Returns:
            ``[..., num_embeddings]`` on every rank; without `gather_output` ``[..., stop - start]``, the logits of `vocab_range`.

        Raises:
            ValueError: x has another number of features; nothing was sent.
        """
        y = super().forward(x)
        start, stop = self.vocab_range
        return y if self.gather_output or y.shape[-1] == stop - start else y.narrow(-1, 0, stop - start)
