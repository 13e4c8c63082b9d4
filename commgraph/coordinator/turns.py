"""Turns: one call at a time in each lane of a group. A further one is refused before it has changed anything.

The lanes are those of `commgraph.coordinator.pending`: the collectives, and the messages of each tag to each rank and from each. A further
call comes from another thread, or from this one: where a signal handler, a `__del__` or the `__reduce__` of an object makes a call while
another is under way.

Native calls take their turns in C (native/module_fast.c, native/module_messages.c): they look into `Turns.claims`, and show by
`counter.busy` that one of them is under way.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from commgraph.coordinator.pending import LaneKey

__all__ = ["Turn", "Turns"]


class _Counter(Protocol):
    """Of the collectives."""

    busy: bool


class Turn:
    """The turn of one call.

    Made before it is claimed and released in a ``finally``: an exception of a signal handler leaves no claim behind.
    """

    __slots__ = ("outer",)

    def __init__(self) -> None:
        # Number of the thread whose call this one is a part of.
        self.outer: int | None = None


class Turns:
    """The lanes of one group in which a call is under way."""

    def __init__(self, claims: dict[Any, object], counter: _Counter) -> None:
        """Over the claims that native calls read.

        Args:
            claims: lane -> the `Turn` of the call under way. Under None, the lane of the collectives, also the number of a thread: that of
                a call of several parts, each of which takes a turn of its own.
            counter: says whether a native collective is under way.
        """
        self.claims = claims
        self.counter = counter

    def claim(self, key: LaneKey, turn: Turn) -> bool:
        """Take the turn of a lane; False, with nothing changed, if another call is under way in it."""
        claims = self.claims
        held = claims.setdefault(key, turn)  # atomic
        if held is not turn:
            if not isinstance(held, int) or held != threading.get_ident():
                return False
            turn.outer = held  # this very object, by which `release_held` knows it
            claims[None] = turn
        if key is None and self.counter.busy:
            self.release(None, turn)
            return False
        return True

    def release(self, key: LaneKey, turn: Turn) -> None:
        """End the turn, if it was taken."""
        claims = self.claims
        if claims.get(key) is turn:
            if turn.outer is None:
                del claims[key]
            else:
                claims[key] = turn.outer

    def claim_whole(self) -> int | None:
        """Take the turn of the collectives for a call of several parts on this thread; return None if another call is under way."""
        ident = threading.get_ident()
        if self.claims.setdefault(None, ident) is not ident:
            return None
        if self.counter.busy:
            del self.claims[None]
            return None
        return ident

    def release_held(self, held: object) -> None:
        """End the turn that `claim_whole` or a native call has left under way."""
        if self.claims.get(None) is held:
            del self.claims[None]

    @property
    def is_idle(self) -> bool:
        """Whether no collective is under way."""
        return None not in self.claims and not self.counter.busy
