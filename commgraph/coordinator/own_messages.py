"""Messages of a rank to itself: copies, kept until they are received."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from commgraph.communicators.base import PeerClosed, PeerLate
from commgraph.deadline import Deadline
from commgraph.shm.pickling import Pickler

__all__ = ["OwnMessages"]


class OwnMessages:
    """Messages of one rank of a group to itself, by tag, in order. Several threads may wait, each for another tag."""

    def __init__(self, rank_in_group: int) -> None:
        self._rank_in_group = rank_in_group
        self._changed = threading.Condition()  # reentrant, for signal handlers
        self._kept: dict[int, deque[Any]] = {}
        self._closed = False
        self._pickler: Pickler | None = None

    def put_object(self, tag: int, obj: object) -> None:
        """Keep a pickle of an object and copies of the buffers in it; raises whatever pickling raises."""
        # One for all: it holds itself.
        self._pickler = self._pickler or Pickler()
        pickled, *buffers = self._pickler.dumps(obj)
        self.put(tag, [pickled, *map(bytearray, buffers)])

    def put(self, tag: int, message: Any) -> None:
        """Keep a message."""
        with self._changed:
            self._kept.setdefault(tag, deque()).append(message)
            self._changed.notify_all()

    def poll(self, tag: int) -> Any:
        """Return the next message of that tag; None where there is none."""
        with self._changed:
            return self._pop(tag)

    def take(self, tag: int, deadline: Deadline) -> Any:
        """Wait for the next message of that tag.

        Raises:
            PeerLate: there was none by the deadline.
            PeerClosed: the group was closed.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self._closed or tag in self._kept, deadline.left())
            if self._closed:
                raise PeerClosed(self._rank_in_group, "this rank closed the group")
            if not came:
                raise PeerLate(self._rank_in_group)
            return self._pop(tag)

    def close(self) -> None:
        """Drop all messages, and wake the threads that wait."""
        with self._changed:
            self._closed = True
            self._kept.clear()
            self._changed.notify_all()

    def _pop(self, tag: int) -> Any:
        kept = self._kept.get(tag)
        if kept is None:
            return None
        message = kept.popleft()
        if not kept:
            del self._kept[tag]
        return message
