"""Asynchronous calls on a device: each is enqueued on a side stream, and a wait orders the current stream after it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from commgraph.accelerators.streams import Streams

__all__ = ["SideStreams", "StreamTask"]


class SideStreams:
    """The side streams of one group: one for each of its lanes, so that lanes are independent on the device, too."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._by_lane: dict[Hashable, Any] = {}
        # Event at the end of each, and whether it was recorded into a graph.
        self._ends: dict[Hashable, tuple[Any, bool]] = {}

    def stream(self, lane: Hashable) -> Any:
        """Return the stream of a lane, made at its first use."""
        if lane not in self._by_lane:
            self._by_lane[lane] = self.streams.new()
        return self._by_lane[lane]

    def end(self, lane: Hashable) -> tuple[Any, bool]:
        """Record an event at the end of a lane's stream, which is current; return it, and whether it was recorded into a graph."""
        self._ends[lane] = self.streams.record_event(), self.streams.is_capturing()
        return self._ends[lane]

    def joined(self, end: tuple[Any, bool]) -> None:
        """Forget an event that was recorded into a graph and waited for: it cannot be waited for outside of that graph."""
        if end[1]:
            self.forget_recorded(end)

    def forget_recorded(self, end: tuple[Any, bool] | None = None) -> None:
        """Forget the events of a graph whose recording has ended, or one of them."""
        for lane in [lane for lane, found in self._ends.items() if found[1] and end in (None, found)]:
            del self._ends[lane]

    def follow(self, lane: Hashable) -> None:
        """Order the current stream after the operations begun on that lane: a blocking call does not overtake an earlier one."""
        found = self._ends.get(lane)
        if found is None:
            return
        event, recorded = found
        capturing = self.streams.is_capturing()
        # A graph cannot wait for an event outside of it, nor anything outside for an event inside.
        if capturing == recorded:
            self.streams.wait_event(event)
        if not capturing and (recorded or self.streams.reached(event)):
            self._ends.pop(lane, None)


class StreamTask:
    """One asynchronous call. It begins after the work enqueued on the caller's stream so far."""

    def __init__(self, side_streams: SideStreams, lane: Hashable, run: Callable[[], Any], given: Sequence[torch.Tensor]) -> None:
        """Not begun.

        Args:
            side_streams: of the group.
            lane: whose stream is used.
            run: enqueues the call.
            given: tensors that it reads or fills.
        """
        self._side_streams = side_streams
        self._lane = lane
        self._run = run
        self._given = tuple(given)
        self._start = side_streams.streams.record_event()
        self._end: tuple[Any, bool] | None = None
        self._made: tuple[torch.Tensor, ...] = ()

    def __call__(self) -> Any:
        """Enqueue the call; from any thread."""
        streams = self._side_streams.streams
        with streams.use(self._side_streams.stream(self._lane)):
            streams.wait_event(self._start)
            result = self._run()
            # Without it, the memory of a tensor that is dropped before the end could be allocated again.
            for x in self._given:
                streams.record_stream(x)
            self._end = self._side_streams.end(self._lane)
        self._given = ()
        return result

    def join(self, made: Iterable[torch.Tensor] = ()) -> None:
        """Order the current stream after the call, so that it may use the result. Does not block the host; once per stream that waits."""
        if self._end is None:
            return
        self._made = self._made or tuple(made)
        streams = self._side_streams.streams
        streams.wait_event(self._end[0])
        for x in self._made:
            streams.record_stream(x)
        self._side_streams.joined(self._end)

    @property
    def has_ended(self) -> bool:
        """Whether the device has come to its end; True for a call recorded into a graph."""
        return self._end is None or self._end[1] or self._side_streams.streams.reached(self._end[0])
