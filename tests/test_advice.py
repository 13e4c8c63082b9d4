"""Advice in texts that users read: every call, option, variable and command that it names exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest

import commgraph as cg
from tests.test_structure import FILES, PACKAGE, tree_of

# An instance is called as in the documentation.
NAMES = MappingProxyType(
    {
        **{name: getattr(cg, name) for name in cg.__all__},
        "cg": cg,
        "commgraph": cg,
        "world": cg.World,
        "context": cg.ParallelContext,
        "ctx": cg.ParallelContext,
        "group": cg.GroupCoordinator,
        "coordinator": cg.GroupCoordinator,
        "layout": cg.Layout,
        "queue": cg.MessageQueue,
    }
)
# Instances that are made by other calls, so that no advice may be to call the class.
MADE_BY_OTHERS = frozenset({cg.World, cg.ParallelContext, cg.GroupCoordinator, cg.MessageQueue, cg.Work})
DOTTED = re.compile(r"(?<![\w./-])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\([^()]*(?:\([^()]*\)[^()]*)*\))?")


def texts_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each string that is no docstring; a value within an f-string stands as 0."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if id(node) in documents:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.values)  # type: ignore[misc]  # str
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def wrong_names(text: str) -> Iterator[str]:
    """What a text names of commgraph that does not exist."""
    for match in DOTTED.finditer(text):
        if match[2] is not None:
            yield from wrong_names(match[2][1:-1])
        head, *rest = match[1].split(".")
        if head not in NAMES or (not rest and match[2] is None) or rest == ["py"]:  # group.py is a file
            continue
        if text[match.start() - 1 : match.start()] in ("'", '"') and not rest:
            continue  # a name in quotes is a group's or a file's
        found: Any = NAMES[head]
        for name in rest:
            if found is Any:  # a fact, whose type is somebody else's
                break
            try:
                found = member_of(found, name)
            except (AttributeError, ImportError):
                yield f"{match[1]}: {head} has no {name}"
                break
        else:
            if match[2] is not None:
                yield from wrong_call(match[1], found, match[2])


def member_of(owner: Any, name: str) -> Any:
    """The member of a module or a class; of a fact the class that it is of, `Any` where that is none of commgraph's."""
    if inspect.ismodule(owner):
        return getattr(owner, name) if hasattr(owner, name) else importlib.import_module(f"{owner.__name__}.{name}")
    found = getattr(owner, name, None)
    if found is None or inspect.isdatadescriptor(found):
        annotations = {key: value for base in reversed(owner.__mro__) for key, value in inspect.get_annotations(base).items()}
        if found is None and name not in annotations and not re.search(rf"^ +{name}: ", owner.__doc__ or "", re.MULTILINE):
            raise AttributeError(name)
        return NAMES.get(annotations.get(name), Any)
    return found


def wrong_call(name: str, found: Any, arguments: str) -> Iterator[str]:
    if not callable(found) or (isinstance(found, type) and found in MADE_BY_OTHERS):
        yield f"{name}{arguments}: nobody can call {name}"
        return
    parameters = inspect.signature(found).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for keyword in re.findall(r"(?<![\w.=])([A-Za-z_]\w*)=(?!=)", re.sub(r"\([^()]*\)", "", arguments[1:-1])):
        if keyword not in parameters:
            yield f"{name}{arguments}: {name} has no argument {keyword}"


def test_advice_names_what_exists() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)} line {line}: {what}"
        for path in FILES
        for line, text in texts_of(tree_of(path))
        for what in wrong_names(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "give every rank the same, World(..., authkey=...)",
        "World.from_enviroment()",
        "World.from_env(auth=...)",
        "world.contexts(layout, name=...)",
        "world.context(Layout(4, ttp=2), name=...)",
        "see CommunicatorOptions.host_timout",
        "commgraph.nn.ColumnParalelLinear",
        "ctx.tp.all_redcue(x)",
        "ctx.ttp",
    ],
)
def test_advice_that_nobody_can_follow_is_found(text: str) -> None:
    assert list(wrong_names(text))


@pytest.mark.parametrize(
    "text",
    [
        "World.from_env(authkey=...) or world.context(Layout(world.size, tp=2), name=...)",
        "commgraph.nn.functional.copy_to(x, group), CommunicatorOptions(shm_bytes=..., queue_bytes=...)",
        "ctx.tp.all_reduce(x, op='max'), world.group.barrier(timeout=5), ctx.tp.world_size, world.size",
    ],
)
def test_advice_that_can_be_followed_is_not(text: str) -> None:
    assert not list(wrong_names(text))
