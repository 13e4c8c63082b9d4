"""`ParallelLayer`: the base class of the parallel layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.marks import mark
from commgraph.nn.shards import Cut, Full, Piece, Shard

__all__ = ["ParallelLayer"]


class ParallelLayer(nn.Module):
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
        self._check_context(ctx, group)
        self._bind(ctx, group)

    @classmethod
    def _check_context(cls, ctx: ParallelContext, group: str) -> None:
        if not isinstance(ctx, ParallelContext):
            raise TypeError(
                f"{cls.__name__}(ctx=...) takes a ParallelContext, not a {type(ctx).__name__}; a group other than tp is "
                "chosen by its name, e.g. ctx=ctx, group='ep'"
            )
        ctx[group]  # a group that the context lacks is an error here, not at the first forward

    def _bind(self, ctx: ParallelContext, group: str) -> None:
        self.ctx = ctx
        self.group_name = group
        self.cuts = {}

    @classmethod
    def adopt(cls, module: nn.Module, *, ctx: ParallelContext, group: str = "tp") -> Self:
        """Makes an existing module a layer of this class, in place, e.g. one of a model that was written without commgraph.

        The module stays one of its class, with its parameters, hooks and name: its new class derives from `cls` and then from the old one,
        so that a ``forward`` of `cls` reaches the old one by ``super()``. Then say by `cut` which parameters are sharded.

        Example:
            ::

                class Column(ParallelLayer):
                    def forward(self, x):
                        return super().forward(functional.copy_to(x, self.group))

                layer = Column.adopt(model.q_proj, ctx=ctx)
                layer.cut("weight", 0)

        Args:
            module: any but a parallel layer.
            ctx: the context whose group shares the layer.
            group: name of that group.

        Returns:
            `module`.

        Raises:
            ConfigurationError: it is a parallel layer already.
            LayoutError: the context has no such group.
        """
        if isinstance(module, ParallelLayer):
            raise ConfigurationError(f"{cls.__name__}.adopt: {type(module).__name__} is a parallel layer already")
        cls._check_context(ctx, group)
        module.__class__ = type(f"{cls.__name__}{type(module).__name__}", (cls, type(module)), {})
        assert isinstance(module, cls)  # now it is
        module._bind(ctx, group)
        return module

    def cut(self, name: str, dim: int, pieces: Mapping[Shard, int] | None = None, *, blocks: int | None = None, pad: bool = False) -> None:
        """Puts this rank's part of a parameter in its place. Not collective.

        Args:
            name: of a parameter that is whole.
            dim: the dim to cut.
            pieces: where it is several full tensors side by side along `dim`, as a fused gate and up projection: name -> extent. None: one.
            blocks: how many equal parts each piece has that stay whole, as key-value heads; where ranks outnumber them neighbours hold the
                same one, and summing the gradient over them is the layer's affair. None: as many as ranks.
            pad: whether a piece that ranks do not divide gets zeros behind its last block. The layer then sees to it that padding has no
                effect and gets no gradient.

        Raises:
            ConfigurationError: no such parameter, one that is cut already, or pieces or blocks that do not fit.
        """
        full, world = self._parameters.get(name), self.group.world_size
        if full is None or name in self.cuts:
            state = "is cut already" if name in self.cuts else "is no parameter"
            raise ConfigurationError(f"{type(self).__name__}.cut: {name!r} {state}; there are {', '.join(self._parameters)}")
        sizes = {0: full.shape[dim]} if pieces is None else dict(pieces)
        if sum(sizes.values()) != full.shape[dim]:
            raise ConfigurationError(f"{type(self).__name__}.cut: {name} has {full.shape[dim]} along dim {dim}, not the sum of {sizes}")
        if blocks is None and not pad:
            self._divisible(**{f"{name}[{shard!r}]": size for shard, size in sizes.items()})
        count = world if blocks is None else min(blocks, world)
        if blocks is not None and (blocks < 1 or any(size % blocks for size in sizes.values()) or (blocks % world and world % blocks)):
            raise ConfigurationError(
                f"{type(self).__name__}.cut: pieces of {name} {sizes} must be multiples of blocks={blocks}, and blocks a multiple or a "
                f"divisor of {world}, the size of group {self.group_name!r} of context {self.ctx.name!r}"
            )
        cut = Cut(dim % full.dim(), {shard: Piece(size, count) for shard, size in sizes.items()}, self.group.rank_in_group, world)
        local = full.new_empty((*full.shape[: cut.dim], sum(cut.sizes), *full.shape[cut.dim + 1 :]))
        if not full.is_meta:
            cut.fill(local, full, what=f"{type(self).__name__}.{name}")
        self.cuts[name] = cut
        self.register_parameter(name, nn.Parameter(local, requires_grad=full.requires_grad))

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

    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator | None) -> None:
        """Draws the full tensor of the parameter called `name`, in place; an adopted layer cannot."""
        raise NotImplementedError(f"{type(self).__name__} has no way to draw {name}: load it")

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
