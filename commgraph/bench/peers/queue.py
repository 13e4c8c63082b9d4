"""`multiprocessing.Queue`, one for each reader and each direction."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.queues import Queue
from typing import Any

from commgraph.bench.library import Channel, Library

__all__ = ["Peer"]

_MOST_READERS = 3


class Peer(Library):
    """Pickled by pickle itself: torch teaches the queue to move tensors to shared files."""

    name = "multiprocessing.Queue"

    @staticmethod
    def inherit(ranks: int) -> Any:
        """A queue can only be inherited: (to, from) for each reader, once for one reader and once for three."""
        context = multiprocessing.get_context("spawn")
        return {
            readers: {reader: (context.Queue(), context.Queue()) for reader in range(1, readers + 1)}
            for readers in (1, _MOST_READERS)
            if readers < ranks
        }

    def available(self) -> str | None:
        """Needs ranks that `commgraph bench` started."""
        if self.job.inherited is None:
            return f"its queues are inherited from the process that starts the ranks, and {self.job.started} started these"
        return None

    def channel(self, readers: int) -> Channel | None:
        """Return the channel over the queues that were inherited for so many readers, None where there are none."""
        queues = self.job.inherited.get(readers)
        return queues and _Objects(queues, self.job.world.rank)


class _Objects(Channel):
    def __init__(self, queues: dict[int, tuple[Queue[bytes], Queue[bytes]]], rank: int) -> None:
        self._queues = queues
        self._rank = rank

    def send(self, obj: object) -> None:
        data = pickle.dumps(obj, protocol=5)
        if self._rank:
            self._queues[self._rank][1].put(data)
        else:
            for there, _ in self._queues.values():
                there.put(data)

    def recv(self, source: int = 0) -> Any:
        return pickle.loads(self._queues[source][1].get() if source else self._queues[self._rank][0].get())
