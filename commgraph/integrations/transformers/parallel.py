"""`parallelize`: a model of transformers on the groups of a context, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError
from commgraph.integrations.transformers import private
from commgraph.integrations.transformers.experts import SpreadExperts, check_experts, exchanges_rows
from commgraph.integrations.transformers.heads import regroup
from commgraph.integrations.transformers.model import ParallelModel, become_parallel
from commgraph.integrations.transformers.pipeline import connect, cut_into_stages, stages_of
from commgraph.integrations.transformers.plan import Action, actions_of
from commgraph.integrations.transformers.styles import LAYERS, Styled, share
from commgraph.integrations.transformers.ties import tie, ties_of
from commgraph.nn.shards import Shard

__all__ = ["parallelize"]

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: M,
    ctx: ParallelContext,
    *,
    plan: Mapping[str, str] | None = None,
    experts: str = "tp",
    stages: Sequence[int] | None = None,
) -> M:
    """Cuts a model over the groups of a context, in place, by the plan that transformers has for it. Not collective; nothing is sent.

    Each rank starts from the whole model, with the same values, in memory or on the meta device, and keeps its part: of tp the shards of
    what the plan cuts, of pp its layers. Modules stay of their classes, so that forward, ``generate``, optimizers and ``deepcopy`` work as
    they are; `commgraph.nn.rebind`, `full_state_dict` and `load_full_state_dict` take the model. Parameters are new ones: make an optimizer
    after this.

    Every rank of tp and pp is called with the same input and gets the same output. Gradients are those of one loss, which all these ranks
    compute; average them over ``ctx.dp`` as usual.

    Args:
        model: a model of transformers, or with a plan of one's own any module.
        ctx: the context; tp, pp and with ``experts="ep"`` dp are used.
        plan: module or parameter -> style, with ``*`` for numbers; None: the model's own, with known mistakes corrected.
        experts: where experts lie: ``"tp"``: a part of each on every rank of tp; ``"ep"``: whole ones on the ranks of ``ctx.ep``. Ranks of
            dp then exchange rows in every forward, so all of them have to call it; ``generate`` sees to that.
        stages: layers of each stage of pp; None: as equal as can be.

    Returns:
        `model`.

    Raises:
        ConfigurationError: no plan, an unknown style, a size that cannot be cut, a model that cannot be cut into stages, or one that was
            cut already; says which module, style and numbers, before anything is changed.
    """
    where = f"parallelize({type(model).__name__})"
    if not isinstance(ctx, ParallelContext):
        raise TypeError(f"{where} takes a ParallelContext, not a {type(ctx).__name__}")
    if experts not in ("tp", "ep"):
        raise ConfigurationError(f"{where}: experts={experts!r} must be 'tp' or 'ep'")
    if isinstance(model, ParallelModel) or any(isinstance(module, Styled) for module in model.modules()):
        raise ConfigurationError(f"{where}: the model was cut already; start from a whole one")
    if experts == "ep":
        check_experts(ctx, where)
    actions = actions_of(model, ctx, plan, experts)
    cut = stages_of(model, ctx, stages)
    modules = dict(model.named_modules())
    groups = regroup(modules, actions, ctx.tp.world_size)
    ties = ties_of(model)
    become_parallel(model, ctx, exchanges_rows(ctx) and any(action.group == "ep" for action in actions.values()))
    ends = [] if cut is None else cut_into_stages(model, ctx, cut)
    present = dict(model.named_modules())
    for path, action in actions.items():
        if path in present and present[path] is modules[path]:
            _apply(present[path], path, action, ctx, _config_around(present, path))
    for path, count in groups.items():
        if path in present:
            object.__setattr__(present[path], "num_key_value_groups", count)
    connect(ends, ctx)
    tie(model, ties)
    if ctx.tp.world_size > 1 and isinstance(model, ParallelModel):
        private.set_tp_size(model, ctx.tp.world_size)
        private.set_plans(model, {path: action.style for path, action in actions.items()})
    return model


def _apply(module: nn.Module, path: str, action: Action, ctx: ParallelContext, config: Any) -> None:
    """Makes a module a layer of its style."""
    del path
    kind = SpreadExperts if action.style == "ep_dispatch_experts" else LAYERS.get(action.style, Styled)
    layer = kind.adopt(module, ctx=ctx, group=action.group)
    layer.style = action.style
    for name, cut in action.cuts.items():
        size = layer._parameters[name].shape[cut.along.dim]  # type: ignore[union-attr]  # it is there
        pieces: dict[Shard, int] | None = None if cut.along.parts == 1 else dict.fromkeys(range(cut.along.parts), size // cut.along.parts)
        layer.cut(name, cut.along.dim, pieces, blocks=cut.blocks, pad=cut.pad)
    layer.prepare(config)
    for name in action.summed:
        share(layer, name)


def _config_around(modules: Mapping[str, nn.Module], path: str) -> Any:
    parts = path.split(".")
    found = (getattr(modules[".".join(parts[:count])], "config", None) for count in range(len(parts), -1, -1))
    config: Any = next((one for one in found if one is not None), None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
