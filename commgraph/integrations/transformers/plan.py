"""From the plan of a model to what happens to each module of it, checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError
from commgraph.integrations.transformers import private
from commgraph.integrations.transformers.corrections import corrected, style_around, style_in_memory
from commgraph.integrations.transformers.heads import blocks_of
from commgraph.integrations.transformers.styles import EXPERTS, LAYERS, PADDED, SUMMED, Along, cut_of, is_known
from commgraph.integrations.transformers.ties import ties_of

__all__ = ["Action", "ParameterCut", "actions_of"]


@attrs.frozen
class ParameterCut:
    """How a parameter of a module is cut.

    Attributes:
        along: the dim, and how many full tensors lie along it.
        blocks: parts that stay whole, as key-value heads; None: any.
        pad: whether a rest is padded.
    """

    along: Along
    blocks: int | None = None
    pad: bool = False


@attrs.define
class Action:
    """What happens to one module.

    Attributes:
        style: what is communicated around its forward.
        group: name of the group that shares it.
        cuts: its parameters that are cut.
        summed: its parameters whose gradients are summed over the ranks that hold the same.
        groups: query heads for each key-value head of a rank, for the attention around a projection; None: as it is.
    """

    style: str
    group: str = "tp"
    cuts: dict[str, ParameterCut] = attrs.field(factory=dict)
    summed: list[str] = attrs.field(factory=list)


def actions_of(model: nn.Module, ctx: ParallelContext, plan: Mapping[str, str] | None, experts: str) -> dict[str, Action]:
    """Return what happens to which module, by its path.

    Args:
        model: whole.
        ctx: the context.
        plan: the user's own, with wildcards for numbers; None: the model's.
        experts: ``"tp"`` or ``"ep"``.

    Raises:
        ConfigurationError: no plan, an unknown style, a rule for nothing, or a size that cannot be cut; names module, style and numbers.
    """
    where = f"parallelize({type(model).__name__}) over context {ctx.name!r}"
    tp, ep = _rules(model, ctx, plan, experts, where)
    if unknown := {name: style for name, style in (tp | ep).items() if not is_known(style)}:
        listed = ", ".join(f"{name}: {style!r}" for name, style in unknown.items())
        raise ConfigurationError(f"{where}: unknown styles {listed}; known are {', '.join(sorted({*LAYERS, *EXPERTS}))}")
    if plan is not None and (unused := [name for name in plan if not private.expand(model, {name: plan[name]})]):
        raise ConfigurationError(f"{where}: rules of the plan name no module and no parameter: {', '.join(unused)}")
    modules = dict(model.named_modules())
    actions: dict[str, Action] = {}
    for rules, group in ((tp, "tp"), (ep, "ep")):
        world = ctx[group].world_size
        for name, style in private.expand(model, rules).items() if world > 1 else ():
            if name in modules:
                action = actions.setdefault(name, Action(style, group))
                action.style = style_around(style, action.cuts)
                if style in SUMMED:
                    action.summed += [key for key, _ in modules[name].named_parameters(recurse=False)]
                continue
            path, _, key = name.rpartition(".")
            parameter = modules[path]._parameters[key]
            style = style_in_memory(modules[path], key, style)
            assert parameter is not None  # it has a name
            action = actions.setdefault(path, Action("local_params", group))
            if (along := cut_of(style, key, parameter)) is not None:
                action.cuts[key] = ParameterCut(along, pad=style in PADDED)
    _keep_embeddings(modules, actions)
    _keep_ties(model, actions)
    for path, key, blocks in blocks_of(modules, actions, ctx.tp.world_size, where):
        action = actions[path]
        action.cuts[key] = attrs.evolve(action.cuts[key], blocks=blocks)
        action.summed.append(key)
    _check(modules, actions, ctx, where)
    return {
        path: action
        for path, action in actions.items()
        if action.cuts or action.summed or action.style not in ("local_params", "replicate")
    }


def _rules(
    model: nn.Module, ctx: ParallelContext, plan: Mapping[str, str] | None, experts: str, where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the rules over tp and those over ep, with wildcards."""
    own_tp, own_ep, _ = private.plans_of(model)
    tp = corrected(model, own_tp) if plan is None else {name: style for name, style in plan.items() if style not in EXPERTS}
    ep: dict[str, str] = {}
    if experts == "ep":
        ep = own_ep if plan is None else {name: style for name, style in plan.items() if style in EXPERTS}
        if ctx.ep.world_size > 1 and not ep:
            raise ConfigurationError(f"{where}: experts='ep' over {ctx.ep.world_size} ranks, and the model has no expert-parallel plan")
        inside = re.compile(rf"(?:{'|'.join(map(re.escape, ep))})(?:\..+)?") if ep else None
        tp = {name: style for name, style in tp.items() if inside is None or not inside.fullmatch(name)}
    if ctx.tp.world_size > 1 and not (tp or ep):
        raise ConfigurationError(
            f"{where}: {type(model).__name__} has no tensor-parallel plan, and tp={ctx.tp.world_size}; give one as plan={{'name': 'style'}}"
        )
    return tp, ep


def _keep_embeddings(modules: Mapping[str, nn.Module], actions: Mapping[str, Action]) -> None:
    """Leaves an embedding whole that has more than its table: what it does with ids or vectors itself needs those of all tokens."""
    for path, action in actions.items():
        if action.style.startswith("embedding") and len(list(modules[path].parameters())) > 1:
            action.cuts.clear()
            action.style = "replicate"


def _keep_ties(model: nn.Module, actions: dict[str, Action]) -> None:
    """Leaves a parameter whole where one that it is tied to is: one tensor cannot be both."""
    for tied in ties_of(model):
        cuts = [actions[path].cuts.get(key) if path in actions else None for path, key in tied]
        if any(cut != cuts[0] for cut in cuts):
            for path, key in tied:
                if path in actions and key in actions[path].cuts:
                    actions[path].cuts.clear()
                    actions[path].style = "replicate"


def _check(modules: Mapping[str, nn.Module], actions: Mapping[str, Action], ctx: ParallelContext, where: str) -> None:
    """Raises where a size cannot be cut."""
    for path, action in actions.items():
        world = ctx[action.group].world_size
        for key, cut in action.cuts.items():
            parameter: torch.Tensor = getattr(modules[path], key)
            size, parts = parameter.shape[cut.along.dim], cut.along.parts
            if size % parts or (not cut.pad and cut.blocks is None and (size // parts) % world):
                raise ConfigurationError(
                    f"{where}: {path}.{key} {tuple(parameter.shape)}, style {action.style!r}: {size} along dim {cut.along.dim}"
                    f"{f', in {parts} parts,' if parts > 1 else ''} cannot be cut into {world}, the size of group {action.group!r}"
                )
        if action.style in ("colwise_gather_output", "colwise_rep") and "weight" not in action.cuts:
            raise ConfigurationError(
                f"{where}: {path}, style {action.style!r}: there is no weight to cut in a {type(modules[path]).__name__}"
            )
        if action.style == "mla_kv_a_proj" and not hasattr(_config(modules, path), "qk_rope_head_dim"):
            raise ConfigurationError(f"{where}: {path}, style {action.style!r}: the configuration has no qk_rope_head_dim")
        if action.style == "rowwise_split_input" and modules[path]._parameters.get("weight") is None:
            raise ConfigurationError(f"{where}: {path}, style {action.style!r}: there is no weight to cut")


def _config(modules: Mapping[str, nn.Module], path: str) -> Any:
    """Return the configuration of the nearest module around `path` that has one."""
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        if (config := getattr(modules[".".join(parts[:count])], "config", None)) is not None:
            return config.get_text_config() if hasattr(config, "get_text_config") else config
    return None
