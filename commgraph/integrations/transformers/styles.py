"""The styles of transformers' plans, as parallel layers that modules become in place.

A module keeps its class and its forward; what a style adds is which parameters are cut (`cut_of`) and what is communicated around
the forward (`LAYERS`). Shapes: ``[...]`` is any number of leading dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from commgraph.nn.functional import Reducer, copy_to, gather_from, reduce_from, scatter_to
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.linear import Holders

__all__ = ["CUTS", "LAYERS", "Along", "Styled", "cut_of", "is_known", "share"]

SUMMED = frozenset({"replicated_with_grad_allreduce", "sequence_parallel"})
"""Styles of modules that are whole, and of which each rank computes with a part. The gradients of their parameters are summed."""

EXPERTS = frozenset({"grouped_gemm", "ep_dispatch_experts"})
"""Styles of expert parallelism, in `commgraph.integrations.transformers.experts`."""


@attrs.frozen
class Along:
    """Along which dim a parameter is cut.

    Attributes:
        dim: the dim.
        parts: how many full tensors lie side by side along it, each of which is cut: 2 for [gate; up].
    """

    dim: int
    parts: int = 1


CUTS: Mapping[str, Along] = MappingProxyType(
    {
        "colwise": Along(-2),
        "colwise_gather_output": Along(-2),
        "colwise_rep": Along(-2),
        "rowwise": Along(-1),
        "rowwise_split_input": Along(-1),
        "rowwise_rep": Along(-1),
        "packed_colwise": Along(-2, 2),
        "packed_rowwise": Along(-1, 2),
        "embedding_rowwise": Along(0),
        "embedding_colwise": Along(1),
        "grouped_gemm": Along(0),
    }
)
"""Styles that cut parameters; -2 is the output of a weight, -1 its input."""

PADDED = frozenset({"colwise_gather_output", "colwise_rep", "embedding_rowwise"})
"""Styles whose layers drop what a cut with a rest pads. The others need sizes that divide."""


def cut_of(style: str, name: str, parameter: torch.Tensor) -> Along | None:
    """Return how a style cuts a parameter; None: it stays whole."""
    along = CUTS.get(style)
    if along is None or not parameter.dim():
        return None
    if along.dim == -1 and (name == "bias" or (parameter.dim() == 1 and along.parts > 1)):
        return None  # added after the sum
    if along.dim >= parameter.dim():
        return None
    return Along(max(along.dim + parameter.dim(), 0) if along.dim < 0 else along.dim, along.parts)


class Styled(ParallelLayer):
    """A module of a model whose parameters may be cut, and whose forward needs no communication."""

    style: str

    def prepare(self, config: Any) -> None:
        """Adapts the module after its parameters were cut.

        Args:
            config: the configuration of the model that it is in.
        """

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"[{self.style} over {self._where()}](", 1)


def share(layer: ParallelLayer, name: str) -> None:
    """Sums the gradient of a parameter over the ranks that hold the same: each sees its own use of it alone.

    The layer reads the parameter through a property of its class, which each layer has for itself.
    """

    def read(self: Any) -> torch.Tensor | None:
        parameter = self._parameters[name]
        return parameter if parameter is None else copy_to(parameter, _holders(self, name))

    setattr(type(layer), name, property(read))


def _holders(layer: ParallelLayer, name: str) -> Reducer:
    cut = layer.cuts.get(name)
    blocks = 1 if cut is None else min(piece.blocks for piece in cut.pieces.values())
    return layer.group if blocks == 1 else Holders(layer.group, layer.group.world_size // blocks)


class Column(Styled):
    """Cut along the output: each rank computes its share of the features."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to ``x [..., in]``, equal on all ranks: ``[..., out / tp]``."""
        return super().forward(copy_to(x, self.group), *args, **kwargs)


class GatheredColumn(Column):
    """Cut along the output, which every rank gets whole."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to ``x [..., in]``, equal on all ranks: ``[..., out]``."""
        y = super().forward(x, *args, **kwargs)
        pieces = self.cuts["weight"].join(gather_from(y, self.group), -1)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


class Row(Styled):
    """Cut along the input: the ranks' results are added, and then the bias."""

    weight: nn.Parameter
    bias: Any
    is_plain: bool

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to this rank's features, ``x [..., in / tp]``: ``[..., out]``, equal on all ranks."""
        y = reduce_from(F.linear(x, self.weight) if self.is_plain else super().forward(x, *args, **kwargs), self.group)
        bias = self._parameters.get("bias")
        return y if bias is None else y + bias

    def prepare(self, config: Any) -> None:
        """Hides the bias from a forward of the module's own: added on each rank it would be added several times."""
        self.is_plain = getattr(super().forward, "__func__", None) is nn.Linear.forward
        if not self.is_plain and self._parameters.get("bias") is not None:
            type(self).bias = None  # of the class that this module has for itself


class SplitRow(Row):
    """Cut along the input, which comes whole and of which each rank takes its features."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to ``x [..., in]``, equal on all ranks: ``[..., out]``, equal on all ranks."""
        return super().forward(scatter_to(x, self.group), *args, **kwargs)


class EmbeddingRows(Styled):
    """An embedding cut by tokens: a rank looks up those it holds, and zeros stand for the others."""

    padding_idx: int | None

    def prepare(self, config: Any) -> None:
        """Translates the token without a gradient to this rank's rows."""
        start, stop = self.span
        padding = self.padding_idx
        self.padding_idx = None if padding is None or not start <= padding < stop else padding - start

    @property
    def span(self) -> tuple[int, int]:
        """First token of this rank, and the end."""
        cut = self.cuts["weight"]
        return next(iter(cut.pieces.values())).span(cut.rank, cut.world)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Looks up ids of any shape, equal on all ranks: ``[*ids.shape, features]``, equal on all ranks."""
        start, stop = self.span
        tokens = next(iter(self.cuts["weight"].pieces.values())).full
        foreign, invalid = (ids < start) | (ids >= stop), (ids < 0) | (ids >= tokens)
        # Ids of other ranks look up row 0; those of no rank stay invalid on each, so that the lookup fails as that of the whole does.
        y = super().forward((ids - start).masked_fill(foreign, 0).masked_fill(invalid, -1), *args, **kwargs)
        return reduce_from(y.masked_fill(foreign.unsqueeze(-1), 0), self.group)


class EmbeddingColumns(Styled):
    """An embedding cut by features."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Looks up ids of any shape, equal on all ranks: ``[*ids.shape, features]``, equal on all ranks."""
        return gather_from(super().forward(ids, *args, **kwargs), self.group)


class CutExperts(Styled):
    """Experts of which each rank holds a part of every one."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the experts to rows and routing, equal on all ranks; the result is equal on all ranks."""
        routing = [self._seen(value) for value in args]
        named = {name: self._seen(value) for name, value in kwargs.items()}
        y = super().forward(copy_to(hidden_states, self.group), *routing, **named)
        return y if y is None else reduce_from(y, self.group)

    def _seen(self, value: Any) -> Any:
        is_weights = isinstance(value, torch.Tensor) and value.is_floating_point()
        return copy_to(value, self.group) if is_weights else value


class IdentityExpert(Styled):
    """An expert without parameters among cut ones, whose result is added up with theirs."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to a share of x, so that the ranks' results add up to that for x."""
        return super().forward(x / self.group.world_size, *args, **kwargs)


class LatentKey(Styled):
    """The projection of multi-head latent attention whose last features are the rotary part of the key, shared by all heads."""

    rotary: int

    def prepare(self, config: Any) -> None:
        """Looks up how many features the rotary part has."""
        self.rotary = config.qk_rope_head_dim

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the module, whole; the gradient of the rotary part is summed, as each rank has its own heads."""
        y = super().forward(x, *args, **kwargs)
        latent, rotary = y.split([y.shape[-1] - self.rotary, self.rotary], dim=-1)
        return torch.cat([latent, copy_to(rotary, self.group)], dim=-1)


class Summed(Styled):
    """A module whose result is a part of a sum over the ranks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the module and adds up."""
        y = super().forward(*args, **kwargs)
        return y if y is None else reduce_from(y, self.group)


LAYERS: Mapping[str, type[Styled]] = MappingProxyType(
    {
        "colwise": Column,
        "packed_colwise": Column,
        "colwise_gather_output": GatheredColumn,
        "colwise_rep": GatheredColumn,
        "rowwise": Row,
        "packed_rowwise": Row,
        "rowwise_split_input": SplitRow,
        "rowwise_rep": SplitRow,
        "embedding_rowwise": EmbeddingRows,
        "embedding_colwise": EmbeddingColumns,
        "moe_tp_experts": CutExperts,
        "moe_identity_expert": IdentityExpert,
        "mla_kv_a_proj": LatentKey,
        "all_reduce": Summed,
        "local_params": Styled,
        "replicate": Styled,
        "replicated_with_grad_allreduce": Styled,
        "sequence_parallel": Styled,
    }
)
"""What a module becomes by its style."""


def is_known(style: str) -> bool:
    """Whether there is such a style."""
    return style in LAYERS or style in EXPERTS
