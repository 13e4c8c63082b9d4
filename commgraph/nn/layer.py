"""`ParallelLayer`: the base class of the parallel layers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.marks import mark
from commgraph.nn.shards import Cut, Full, Piece, Shard

__all__ = ["ParallelLayer"]


class ParallelLayer(nn.Module, abc.ABC):
    """A module whose parameters lie cut on the ranks of one group of a `ParallelContext`.

    The context is a plain attribute: `deepcopy` shares it, `state_dict` does not see it (and so holds this rank's shares alone), and
    `torch.save` of the whole module raises, as contexts cannot be pickled.

    Attributes:
        ctx: the context. `commgraph.nn.rebind` moves a model to another one.
        group_name: which of its groups shares this layer.
        cuts: for each parameter, how it lies on the ranks.
    """

    ctx: ParallelContext
    group_name: str
    cuts: dict[str, Cut]

    def __init__(self, ctx: ParallelContext, group: str) -> None:
        super().__init__()
        if not isinstance(ctx, ParallelContext):
            raise TypeError(
                f"{type(self).__name__}(ctx=...) takes a ParallelContext, not a {type(ctx).__name__}; a group other than tp is "
                "chosen by its name, e.g. ctx=ctx, group='ep'"
            )
        ctx[group]  # a group that the context lacks is an error here, not at the first forward
        self.ctx = ctx
        self.group_name = group
        self.cuts = {}

    @property
    def group(self) -> GroupCoordinator:
        """The ranks that share this layer."""
        return self.ctx[self.group_name]

    # A parameter says by a mark that it is a shard. Whatever puts another tensor in its place marks that, too.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds or replaces a parameter, as of any module."""
        super().register_parameter(name, param)
        self._mark(name, param)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParallelLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._mark_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._mark_all()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.cuts:
            self._mark(name, destination.get(prefix + name))

    def _mark_all(self) -> None:
        for name in self.cuts:
            self._mark(name, self._parameters.get(name))

    def _mark(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None and name in self.cuts and not self.cuts[name].is_replicated:
            mark(tensor, self, name)

    def load_full(self, full: Full, shard: Shard | None = None, *, parameter: str = "weight") -> None:
        """Loads this rank's part of a tensor of the unsharded layer. Not collective.

        Args:
            full: the whole tensor, as a checkpoint of the unsharded layer has it; any dtype and device, converted to the parameter's. Of a
                slice (``safe_open(...).get_slice(name)``) only this rank's part is read.
            shard: for a layer made of several: which one `full` is. None: all of them, joined along dim 0 in order.
            parameter: ``"weight"`` or ``"bias"``.

        Raises:
            ConfigurationError: no such parameter or shard, or another shape than expected; nothing was changed.
        """
        name = f"{type(self).__name__}.{parameter}"
        if parameter not in self.cuts:
            raise ConfigurationError(f"{name}: there is no such parameter here, there is {', '.join(self.cuts)}")
        self.cuts[parameter].fill(getattr(self, parameter), full, shard, what=name)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the parameters anew, as the unsharded layer of torch would.

        The whole tensor is drawn on the host and cut, so that one seed gives the same full weights whatever the size of the group, and the
        same as ``torch.nn``'s layer. It costs the memory and the time of the full tensors, one at a time: where a checkpoint is loaded
        anyway, build the model with ``device="meta"`` and give it memory with ``model.to_empty(device=...)``. Ranks that are threads of
        one process share torch's default generator: give each its own.

        Args:
            generator: of the host; None: torch's default one.
        """
        for name, cut in self.cuts.items():
            local: torch.Tensor = getattr(self, name)
            if not local.is_meta:
                full = torch.empty(cut.full_shape(local), dtype=local.dtype, device="cpu")
                self._draw(name, full, generator)
                cut.fill(local, full, what=name)

    @abc.abstractmethod
    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator | None) -> None:
        """Draws the full tensor of the parameter called `name`, in place."""

    def _add(
        self,
        name: str,
        dim: int,
        pieces: Mapping[Shard, Piece],
        others: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Registers a parameter that is cut along `dim`; `others` are its other extents."""
        cut = self.cuts[name] = Cut(dim, dict(pieces), self.group.rank_in_group, self.group.world_size)
        shape = (*others[:dim], sum(cut.sizes), *others[dim:])
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _divisible(self, **sizes: int) -> None:
        """Raises where a size cannot be shared equally by the group."""
        for name, size in sizes.items():
            if size % self.group.world_size:
                raise ConfigurationError(
                    f"{type(self).__name__}({name}={size}): {size} is not a multiple of {self.group.world_size}, the size of group "
                    f"{self.group_name!r} of context {self.ctx.name!r}"
                )

    def _where(self) -> str:
        return f"group={self.group_name!r} {self.group.rank_in_group}/{self.group.world_size}"
