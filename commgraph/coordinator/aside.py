"""Calls that nobody waits for, on a device: enqueued on a stream of their own, after which whoever waits orders his."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from commgraph.coordinator.link import LaneKey
    from commgraph.streams import Streams

__all__ = ["Aside", "Sides"]


class Sides:
    """The side streams of one group: one for each of its lanes, so that what the lanes keep apart stays apart on the device."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._by_lane: dict[LaneKey, Any] = {}
        # The end of what was last enqueued on each, and whether a graph was recorded then.
        self._ends: dict[LaneKey, tuple[Any, bool]] = {}

    def stream(self, lane: LaneKey) -> Any:
        """That of a lane, made when it is first asked for."""
        if lane not in self._by_lane:
            self._by_lane[lane] = self.streams.new()
        return self._by_lane[lane]

    def end(self, lane: LaneKey) -> tuple[Any, bool]:
        """Marks the end of what was enqueued on a lane's stream, which is current; and whether it was recorded into a graph."""
        self._ends[lane] = self.streams.mark(), self.streams.is_capturing()
        return self._ends[lane]

    def joined(self, end: tuple[Any, bool]) -> None:
        """What was recorded has been waited for: the mark means nothing outside of that graph."""
        if end[1]:
            self.forget_recorded(end)

    def forget_recorded(self, end: tuple[Any, bool] | None = None) -> None:
        """Marks of a graph whose recording has ended, or one of them."""
        for lane in [lane for lane, found in self._ends.items() if found[1] and end in (None, found)]:
            del self._ends[lane]

    def follow(self, lane: LaneKey) -> None:
        """What the current stream does next comes after what was begun on that lane: a blocking call does not overtake an earlier one."""
        found = self._ends.get(lane)
        if found is None:
            return
        mark, recorded = found
        capturing = self.streams.is_capturing()
        # A graph cannot wait for what is not in it, nor anything else for what is only recorded.
        if capturing == recorded:
            self.streams.after(mark)
        if not capturing and (recorded or self.streams.reached(mark)):
            self._ends.pop(lane, None)


class Aside:
    """One such call. It begins after what the caller's stream has to do by now."""

    def __init__(self, sides: Sides, lane: LaneKey, run: Callable[[], Any], given: Sequence[torch.Tensor]) -> None:
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
        self._start = sides.streams.mark()
        self._end: tuple[Any, bool] | None = None
        self._made: tuple[torch.Tensor, ...] = ()

    def __call__(self) -> Any:
        """Enqueues it; from whatever thread."""
        streams = self._sides.streams
        with streams.use(self._sides.stream(self._lane)):
            streams.after(self._start)
            result = self._run()
            # Dropped before its end, the memory of a tensor would be given to somebody else.
            for x in self._given:
                streams.keep(x)
            self._end = self._sides.end(self._lane)
        self._given = ()
        return result

    def join(self, made: Iterable[torch.Tensor] = ()) -> None:
        """The current stream comes after it, and may use what it made. Does not hold up the host; again for each stream that waits."""
        if self._end is None:
            return
        self._made = self._made or tuple(made)
        streams = self._sides.streams
        streams.after(self._end[0])
        for x in self._made:
            streams.keep(x)
        self._sides.joined(self._end)

    @property
    def has_ended(self) -> bool:
        """Whether the device has come to its end; what was only recorded has."""
        return self._end is None or self._end[1] or self._sides.streams.reached(self._end[0])
