"""Asynchronous calls on a device: each is enqueued on a side stream, and whoever waits orders its own stream after it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from commgraph.accelerators.streams import Streams

__all__ = ["SideStreams", "StreamTask"]


class SideStreams:
    """The side streams of one group: one for each of its lanes, so that what the lanes keep apart stays apart on the device."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._by_lane: dict[Hashable, Any] = {}
        # The end of what was last enqueued on each, and whether a graph was recorded then.
        self._ends: dict[Hashable, tuple[Any, bool]] = {}

    def stream(self, lane: Hashable) -> Any:
        """That of a lane, made when it is first asked for."""
        if lane not in self._by_lane:
            self._by_lane[lane] = self.streams.new()
        return self._by_lane[lane]

    def end(self, lane: Hashable) -> tuple[Any, bool]:
        """Record an event at the end of a lane's stream, which is current; return it, and whether it was recorded into a graph."""
        self._ends[lane] = self.streams.record_event(), self.streams.is_capturing()
        return self._ends[lane]

    def joined(self, end: tuple[Any, bool]) -> None:
        """Forget an event that was recorded into a graph and waited for: it means nothing outside of that graph."""
        if end[1]:
            self.forget_recorded(end)

    def forget_recorded(self, end: tuple[Any, bool] | None = None) -> None:
        """Forget the events of a graph whose recording has ended, or one of them."""
        for lane in [lane for lane, found in self._ends.items() if found[1] and end in (None, found)]:
            del self._ends[lane]

    def follow(self, lane: Hashable) -> None:
        """What the current stream does next comes after what was begun on that lane: a blocking call does not overtake an earlier one."""
        found = self._ends.get(lane)
        if found is None:
            return
        event, recorded = found
        capturing = self.streams.is_capturing()
        # A graph cannot wait for what is not in it, nor anything else for what is only recorded.
        if capturing == recorded:
            self.streams.wait_event(event)
        if not capturing and (recorded or self.streams.reached(event)):
            self._ends.pop(lane, None)


class StreamTask:
    """One asynchronous call. It begins after what the caller's stream has to do by now."""

    def __init__(self, sides: SideStreams, lane: Hashable, run: Callable[[], Any], given: Sequence[torch.Tensor]) -> None:
        """Not begun.

        Args:
            sides: of the group.
            lane: which of them.
            run: enqueues it.
            given: tensors that it reads or fills.
        """
        self._sides = sides
        self._lane = lane
        self._run = run
        self._given = tuple(given)
        self._start = sides.streams.record_event()
        self._end: tuple[Any, bool] | None = None
        self._made: tuple[torch.Tensor, ...] = ()

    def __call__(self) -> Any:
        """Enqueues it; from whatever thread."""
        streams = self._sides.streams
        with streams.use(self._sides.stream(self._lane)):
            streams.wait_event(self._start)
            result = self._run()
            # Dropped before its end, the memory of a tensor would be given to somebody else.
            for x in self._given:
                streams.record_stream(x)
            self._end = self._sides.end(self._lane)
        self._given = ()
        return result

    def join(self, made: Iterable[torch.Tensor] = ()) -> None:
        """The current stream comes after it, and may use what it made. Does not hold up the host; again for each stream that waits."""
        if self._end is None:
            return
        self._made = self._made or tuple(made)
        streams = self._sides.streams
        streams.wait_event(self._end[0])
        for x in self._made:
            streams.record_stream(x)
        self._sides.joined(self._end)

    @property
    def has_ended(self) -> bool:
        """Whether the device has come to its end; what was only recorded has."""
        return self._end is None or self._end[1] or self._sides.streams.reached(self._end[0])
