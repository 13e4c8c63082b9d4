"""Layouts as they are written on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from commgraph.errors import LayoutError
from commgraph.layout.specs import Grid, GroupSpec, Positions, Split

__all__ = ["HELP", "read_axes", "read_groups"]

HELP: Final = (
    "NAME=SPEC, where SPEC is axes joined by + (engine=pp+tp), a split (half=tp/2, or tp/2:STRIDE), positions of an axis (embd=pp[0,-1]), "
    "rank lists (enc=0,1;4,5), or any of the first three on another grid (ep={pp=2,edp=1,ep=4}ep)"
)

_NAME: Final = r"[A-Za-z_][\w.-]*"
_JOINED: Final = re.compile(rf"{_NAME}(?:\+{_NAME})*")
_SPLIT: Final = re.compile(rf"({_NAME}(?:\+{_NAME})*)/(\d+)(?::(\d+))?")
_POSITIONS: Final = re.compile(rf"({_NAME}(?:\+{_NAME})*)\[(-?\d+(?:,-?\d+)*)\]")
_LISTS: Final = re.compile(r"\d+(?:,\d+)*(?:;\d+(?:,\d+)*)*")
_GRID: Final = re.compile(r"\{([^{}]*)\}(.+)")


def read_axes(text: str) -> dict[str, int]:
    """``"pp=2,attn_dp=2,attn_tp=2"`` as names and sizes, outermost first.

    Raises:
        LayoutError: anything else.
    """
    axes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, size = item.strip().partition("=")
        if not equals or not size.isdecimal():
            raise LayoutError(f"{item.strip()!r} is no axis with its size: axes are written as pp=2,tp=4, outermost first")
        if name in axes:
            raise LayoutError(f"axis {name!r} is named twice in {text!r}")
        axes[name] = int(size)
    return axes


def read_groups(items: Sequence[str]) -> dict[str, GroupSpec]:
    """``["engine=pp+tp", "embd=pp[0,-1]"]`` as groups by name.

    Raises:
        LayoutError: a text that is none of those in `HELP`, or a name that comes twice.
    """
    groups: dict[str, GroupSpec] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not text:
            raise LayoutError(f"{item!r} is no group: {HELP}")
        if name in groups:
            raise LayoutError(f"group {name!r} is given twice")
        groups[name] = _spec(text.strip(), item)
    return groups


def _spec(text: str, item: str) -> GroupSpec:
    if found := _GRID.fullmatch(text):
        along = _along(found[2])
        if along is not None:
            return Grid(read_axes(found[1]), along)
    elif _LISTS.fullmatch(text):
        return tuple(tuple(map(int, ranks.split(","))) for ranks in text.split(";"))
    elif (along := _along(text)) is not None:
        return along
    raise LayoutError(f"{item!r} is no group: {HELP}")


def _along(text: str) -> tuple[str, ...] | Split | Positions | None:
    if _JOINED.fullmatch(text):
        return tuple(text.split("+"))
    if found := _SPLIT.fullmatch(text):
        return Split(found[1].split("+"), int(found[2]), stride=int(found[3] or 1))
    if found := _POSITIONS.fullmatch(text):
        return Positions(found[1].split("+"), map(int, found[2].split(",")))
    return None
