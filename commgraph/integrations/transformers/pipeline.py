"""Stages of a pipeline, at the level of modules: no forward of the model is replaced.

Each stage runs the whole forward of the model with its own layers in the list of layers. Its first one receives what the stage before
sends in place of what it is called with; its last one sends. Modules before the layers (embeddings) give zeros without memory on later
stages, those behind (norm, head) do nothing on earlier ones, and the last of them gives every stage the last stage's result. Backward goes
the other way: whoever received sends the gradient back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.integrations.transformers import private

__all__ = ["Stages", "connect", "cut_into_stages", "stages_of"]


@attrs.frozen
class Stages:
    """How a model is cut into stages.

    Attributes:
        before: modules that only the first stage has, in order.
        layers: the list of layers.
        behind: modules that only the last stage has, in order.
        spans: for each stage its first layer and the end.
    """

    before: tuple[str, ...]
    layers: str
    behind: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


def stages_of(model: Any, ctx: ParallelContext, counts: Sequence[int] | None) -> Stages | None:
    """Return how a model is cut over ``ctx.pp``; None for one stage.

    Args:
        model: whole.
        ctx: the context.
        counts: layers of each stage; None: as equal as can be, the first stages have the rest.

    Raises:
        ConfigurationError: the model has no pipeline plan, or one that cannot be followed; or counts that do not fit.
    """
    world = ctx.pp.world_size
    where = f"parallelize({type(model).__name__}) over context {ctx.name!r}"
    if world == 1:
        if counts is not None and len(counts) != 1:
            raise ConfigurationError(f"{where}: stages={list(counts)} for a pipeline of one stage")
        return None
    _, _, plan = private.plans_of(model)
    modules = dict(model.named_modules())
    names = [name for name in plan if name in modules]
    lists = [name for name in names if isinstance(modules[name], nn.ModuleList)]
    if len(lists) != 1:
        raise ConfigurationError(
            f"{where}: pp={world}, and the pipeline plan of the model names {len(lists)} lists of layers, not one: {list(plan)}"
        )
    (layers,) = lists
    order = [name for name, _ in model.named_children()]
    # A head is behind, wherever the plan has it: the model's own entries come before those of its parts.
    outer = [name for name in names if "." not in name and layers.startswith(tuple(f"{other}." for other in order)) and name != layers]
    inner = [name for name in names if name not in outer]
    at = inner.index(layers)
    before, behind = tuple(inner[:at]), (*inner[at + 1 :], *outer)
    total = len(list(modules[layers].children()))
    if counts is None:
        counts = [total // world + (stage < total % world) for stage in range(world)]
    if len(counts) != world or sum(counts) != total or any(count < 1 for count in counts):
        raise ConfigurationError(f"{where}: stages={list(counts)} must be {world} counts of at least one that add up to the {total} layers")
    ends = [sum(counts[: stage + 1]) for stage in range(world)]
    stages = Stages(before, layers, behind, tuple((end - count, end) for end, count in zip(ends, counts, strict=True)))
    if not behind:
        raise ConfigurationError(f"{where}: the pipeline plan of the model has nothing behind its layers: {list(plan)}")
    _check(model, modules, stages, where)
    return stages


CROSSING = ("hidden_size_per_layer_input", "num_kv_shared_layers", "laurel_rank", "altup_num_inputs")
"""Entries of configurations of models whose layers take more than hidden states from what is before them."""


def _check(model: Any, modules: Mapping[str, nn.Module], stages: Stages, where: str) -> None:
    """Raises where a stage would not have what its layers need."""
    owner = modules[stages.layers.rpartition(".")[0]]
    config = getattr(owner, "config", model.config)
    for name in CROSSING:
        if getattr(config, name, None):
            raise ConfigurationError(
                f"{where}: a {type(model).__name__} with {name}={getattr(config, name)} cannot be cut into stages: its layers take more "
                "than hidden states from those before them"
            )
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list | tuple) and len(kinds) == stages.spans[-1][1]:
        for stage, (first, end) in enumerate(stages.spans):
            own = set(kinds[first:end])
            if not any(_has_keys(kind) for kind in own) and any(map(_has_keys, kinds)):
                raise ConfigurationError(
                    f"{where}: stage {stage} would have layers {first} to {end - 1} alone, all {', '.join(sorted(own))}: none of them has "
                    "the keys by which transformers counts the tokens of a cache; give each an attention layer by stages=[...]"
                )


def _has_keys(kind: Any) -> bool:
    return "attention" in str(kind) and "linear" not in str(kind)


def cut_into_stages(model: Any, ctx: ParallelContext, stages: Stages) -> list[tuple[nn.Module, type]]:
    """Takes from a model what other stages have. Nothing is sent yet.

    Returns:
        The modules that are to communicate with other stages, each with what it becomes. Give them to `connect` when styles are in place,
        as their communication is within these.
    """
    stage, last = ctx.pp.rank_in_group, ctx.pp.world_size - 1
    modules = dict(model.named_modules())
    first, end = stages.spans[stage]
    owner = modules[stages.layers.rpartition(".")[0]]
    layers = modules[stages.layers]
    own = {name: layer for name, layer in layers._modules.items() if first <= int(name) < end}
    _own_config(model, owner, first, end, stages.spans[-1][1])
    size = _hidden_size(model, owner)
    sample = next(iter(layers.parameters()))
    if stage:
        for name in stages.before:
            _replace(model, name, _Zeros(size, sample) if name == stages.before[0] else _Passed())
    ends: list[tuple[nn.Module, type]] = []
    *passed, head = stages.behind
    for name in passed if stage < last else ():
        _replace(model, name, _Passed())
    if stage == last:
        ends.append((modules[head], _Head))
    else:
        here = {id(parameter) for name in stages.before for parameter in modules[name].parameters()}
        is_tied = stage == 0 and any(id(parameter) in here and parameter.requires_grad for parameter in modules[head].parameters())
        _replace(model, head, _AbsentHead(getattr(modules[head], "out_features", None), ctx, is_tied))
    layers._modules.clear()
    layers._modules.update(own)
    _renumber(own, first)
    names = list(own)
    if stage:
        ends.append((own[names[0]], _Receiving))
    if stage < last:
        ends.append((own[names[-1]], _Sending))
    return ends


def connect(ends: Sequence[tuple[nn.Module, type]], ctx: ParallelContext) -> None:
    """Has modules communicate with other stages."""
    for module, kind in ends:
        module.__class__ = type(f"{kind.__name__.lstrip('_')}{type(module).__name__}", (kind, type(module)), {})
        module.ctx = ctx  # type: ignore[assignment]  # an attribute of its own


def _hidden_size(model: Any, owner: Any) -> int:
    config = getattr(owner, "config", model.config)
    return int(getattr(config, "hidden_size", None) or config.n_embd)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, module)


def _own_config(model: Any, owner: Any, first: int, end: int, total: int) -> None:
    """Gives each module of this stage a configuration with the entries of its own layers."""
    memo: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, memo)
    old = getattr(owner, "config", None)
    if old is None or old is model.config:
        config = model.config
    else:
        config = memo.setdefault(id(old), None) or copy.deepcopy(old, memo)
        memo[id(old)] = config
    for module in model.modules():
        held = vars(module).get("config")
        if held is not None and id(held) in memo:
            module.config = memo[id(held)]
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and "layer" in name:
            _set(config, name, value[first:end])
    _set(config, "num_hidden_layers", end - first)


def _set(config: Any, name: str, value: Any) -> None:
    """Puts an entry in place past checks that look at one entry at a time."""
    vars(config)[(getattr(config, "attribute_map", None) or {}).get(name, name)] = value


def _renumber(own: Mapping[str, nn.Module], first: int) -> None:
    """Counts the layers from 0 on each stage: by these numbers a cache knows them."""
    for name, layer in own.items():
        for module in layer.modules():
            if vars(module).get("layer_idx") == int(name):
                vars(module)["layer_idx"] = int(name) - first


class _Zeros(nn.Module):
    """Stands for an embedding on a later stage: the shape of its result without the memory."""

    def __init__(self, size: int, sample: torch.Tensor) -> None:
        super().__init__()
        self.size, self.dtype = size, sample.dtype
        self.embedding_dim = size

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return torch.zeros((1,), dtype=self.dtype, device=ids.device).expand(*ids.shape, self.size)


class _Passed(nn.Module):
    """Stands for a module of another stage whose result has the shape of its input."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return x


class _AbsentHead(nn.Module):
    """Stands for the head on an earlier stage: gives the last stage's result."""

    def __init__(self, features: int | None, ctx: ParallelContext, is_tied: bool) -> None:
        super().__init__()
        self.features, self.ctx, self.is_tied = features, ctx, is_tied
        self.out_features = features

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        shape = x.shape if self.features is None else (*x.shape[:-1], self.features)
        pp = self.ctx.pp
        if torch.is_grad_enabled() and x.requires_grad:
            return _FromLast.apply(x, shape, pp, self.is_tied)  # type: ignore[no-any-return, no-untyped-call]  # a tensor
        return _broadcast(x, shape, pp)


def _broadcast(x: torch.Tensor, shape: Sequence[int], pp: GroupCoordinator) -> torch.Tensor:
    return pp.broadcast(x.new_empty(tuple(shape)), pp.world_size - 1)


class _FromLast(torch.autograd.Function):
    """The last stage's result; its gradient is that stage's affair, which sends it back layer by layer."""

    @staticmethod
    def forward(node: Any, x: torch.Tensor, shape: Sequence[int], pp: GroupCoordinator, is_tied: bool) -> torch.Tensor:
        node.shape, node.is_tied = x.shape, is_tied
        return _broadcast(x, shape, pp)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if node.is_tied:
            raise ConfigurationError(
                "backward of a model in stages whose embedding is tied to its head, on another stage: neither would have the whole "
                "gradient. Freeze the embedding, untie it, or train with pp=1"
            )
        return grad.new_zeros((1,)).expand(node.shape), None, None, None


class _Head(nn.Module):
    """The last module of the last stage: every stage gets its result."""

    ctx: ParallelContext

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = super().forward(*args, **kwargs)
        pp = self.ctx.pp
        with torch.no_grad():
            pp.broadcast(y.detach().contiguous(), pp.world_size - 1)
        return y


class _Receiving(nn.Module):
    """The first layer of a stage behind the first."""

    ctx: ParallelContext

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pp = self.ctx.pp
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            anchor = hidden_states.new_empty(0).requires_grad_()
            received = _Receive.apply(anchor, hidden_states.shape, pp)  # type: ignore[no-untyped-call]  # torch gives it no types
        else:
            received = pp.recv(hidden_states.shape, hidden_states.dtype, device=hidden_states.device)
        return super().forward(received, *args, **kwargs)


class _Receive(torch.autograd.Function):
    """Receive from the stage before, and send it the gradient."""

    @staticmethod
    def forward(node: Any, anchor: torch.Tensor, shape: torch.Size, pp: GroupCoordinator) -> torch.Tensor:
        node.pp = pp
        return pp.recv(shape, anchor.dtype, device=anchor.device)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        node.pp.send(grad.contiguous(), node.pp.rank_in_group - 1)
        return grad.new_empty(0), None, None


class _Sending(nn.Module):
    """The last layer of a stage before the last."""

    ctx: ParallelContext

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        pp = self.ctx.pp
        if not isinstance(y, torch.Tensor):
            raise ConfigurationError(
                f"stage {pp.rank_in_group} of {pp.world_size} of context {self.ctx.name!r}: a {type(self).__name__} returns a "
                f"{type(y).__name__} and not hidden states alone: such layers cannot be cut into stages"
            )
        if torch.is_grad_enabled() and y.requires_grad:
            return _Send.apply(y, pp)  # type: ignore[no-untyped-call]  # torch gives it no types
        pp.send(y.contiguous())
        return y


class _Send(torch.autograd.Function):
    """Send to the next stage, and receive the gradient from it."""

    @staticmethod
    def forward(node: Any, y: torch.Tensor, pp: GroupCoordinator) -> torch.Tensor:
        node.pp, node.like = pp, (y.shape, y.dtype, y.device)
        pp.send(y.contiguous())
        return y.view_as(y)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        shape, dtype, device = node.like
        return node.pp.recv(shape, dtype, node.pp.rank_in_group + 1, device=device), None
