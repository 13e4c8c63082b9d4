"""Collective construction by a library that knows no deadline: a rank that fails does not keep the others waiting for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from commgraph.communicators.base import PeerClosed, PeerLate
from commgraph.platforms.base import GroupFacts
from commgraph.waiting import Background

__all__ = ["together"]

T = TypeVar("T")

_POLL_SECONDS = 0.05


def together(facts: GroupFacts, what: str, make: Callable[[GroupFacts], T], drop: Callable[[T], object]) -> T:
    """Return the result of `make`, called on every rank of the group. Collective.

    `make` runs on a thread, which a rank leaves behind when another reports a failure, or when the deadline of a build has passed.

    Args:
        facts: of the group.
        what: name of the result; equal on every rank.
        make: called with facts whose store has a connection of its own, as a wait in the store occupies its connection.
        drop: called with a result that is made after this rank has left.

    Raises:
        PeerClosed: another rank failed.
        PeerLate: the deadline has passed.
    """
    key, me = f"failed/{what}", facts.rank_in_group
    store: Any = facts.store  # whose stub lacks it
    apart = attrs.evolve(facts, store=store.clone())
    made: list[T] = []
    left: list[bool] = []

    def run() -> None:
        try:
            one = make(apart)
        except Exception as error:
            apart.store.set(key, f"{me} {type(error).__name__}: {error}")
            raise
        made.append(one)
        if left:
            drop(one)

    under_way = Background(run)
    deadline = time.monotonic() + facts.limits.build_timeout
    while not under_way.wait(_POLL_SECONDS):
        if facts.store.check([key]):
            left.append(True)
            who, _, why = facts.store.get(key).decode().partition(" ")
            raise PeerClosed(int(who), f"making {what}, {why}")
        if time.monotonic() > deadline:
            left.append(True)
            raise PeerLate((me + 1) % len(facts.ranks))
    return made[0]
