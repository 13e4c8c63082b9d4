"""`rebind`: moves a model to another context of the same layout."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from commgraph.context import ParallelContext
from commgraph.errors import ConfigurationError, ContextClosedError, LayoutMismatchError
from commgraph.layout import Layout

__all__ = ["rebind"]

M = TypeVar("M", bound=nn.Module)


def rebind(model: M, new_ctx: ParallelContext, *, old: ParallelContext | None = None) -> M:
    """Moves a model's layers to another context of the same layout. Nothing is sent, no parameter changes.

    Wherever `model` or a module in it has its context as an attribute, the new one takes its place, and likewise for the context's groups
    (``self.tp = ctx.tp``). Contexts and groups inside of lists and dicts are not found. All or nothing.

    Args:
        model: any module.
        new_ctx: of an equal layout, on the same rank.
        old: the context to replace, where the model has several; otherwise there must be one only.

    Returns:
        `model`.

    Raises:
        LayoutMismatchError: says where the layouts (or ranks, or devices) differ.
        ConfigurationError: the model has no context, or several and `old` is not one of them.
        ContextClosedError: `new_ctx` is closed.
    """
    places = [(path, module, key, value) for path, module in model.named_modules() for key, value in vars(module).items()]
    found: dict[int, tuple[str, ParallelContext]] = {}
    for path, _, key, value in places:
        if isinstance(value, ParallelContext):
            found.setdefault(id(value), (f"{path}.{key}".lstrip("."), value))
    if old is None and len(found) == 1:
        ((_, old),) = found.values()
    if old is None or id(old) not in found:
        have = ", ".join(f"{ctx!r} at {path!r}" for path, ctx in found.values()) or "none"
        what = (
            "there must be one context in the model, or old= must say which one to replace"
            if old is None
            else f"old={old!r} is not in the model"
        )
        raise ConfigurationError(f"rebind: {what}; it has: {have}")
    _check(old, new_ctx)
    new: dict[int, Any] = {id(old): new_ctx} | {id(old[name]): new_ctx[name] for name in old.layout.names}
    for _, module, key, value in places:
        if id(value) in new:
            # Not by setattr, which a module may define: an error half way would leave the model between two contexts.
            vars(module)[key] = new[id(value)]
    return model


def _check(old: ParallelContext, new: ParallelContext) -> None:
    if new.closed:
        raise ContextClosedError(f"rebind: {new!r} is closed")
    differences = _differences(old.layout, new.layout)
    if old.rank != new.rank:
        differences.append(f"this is rank {old.rank} there and rank {new.rank} here")
    if old.device != new.device:
        differences.append(f"the device is {old.device} there and {new.device} here")
    if differences:
        raise LayoutMismatchError(f"rebind: context {new.name!r} cannot take the place of {old.name!r}: {'; '.join(differences)}")


def _differences(old: Layout, new: Layout) -> list[str]:
    if old == new:
        return []
    differences = [f"world_size={old.world_size} there and {new.world_size} here"] if old.world_size != new.world_size else []
    if tuple(old.axes) != tuple(new.axes):
        differences.append(f"the axes are {', '.join(old.axes)} there and {', '.join(new.axes)} here")
    for name in dict.fromkeys((*old.names, *new.names)):
        if name not in old.names or name not in new.names:
            differences.append(f"group {name!r} is only {'there' if name in old.names else 'here'}")
        elif old.size(name) != new.size(name):
            differences.append(f"{name}={old.size(name)} there and {new.size(name)} here")
        elif old.pattern(name) != new.pattern(name):
            differences.append(f"the {name} groups are of other ranks")
    return differences or [f"{old!r} is not {new!r}"]
