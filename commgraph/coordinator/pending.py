"""Calls that were begun and are not waited for: the lanes in which they are made one by one, and the streams of those on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from commgraph.accelerators.side_streams import SideStreams
from commgraph.deadline import Deadline
from commgraph.work import Job, Lane

__all__ = ["ANY_RANK", "OBJECTS", "LaneKey", "MessageKey", "Pending"]

# Which messages: a rank in the group or `ANY_RANK`, whether they go to it, and their tag: the user's, or `OBJECTS`.
MessageKey = tuple[int, bool, int]
# Which lane: that of the collectives, or that of some messages.
LaneKey = MessageKey | None
ANY_RANK: Final = -1
OBJECTS: Final = -1


class Pending:
    """Of one group: a lane for the collectives, and one for the messages of each tag to each peer and from each."""

    def __init__(self, ident: str, side_streams: SideStreams | None, pause: Callable[[bool], None] | None) -> None:
        """Without a lane as yet.

        Args:
            ident: of the group.
            side_streams: for calls with device tensors; None where calls are made and not enqueued.
            pause: refuses native calls while collectives are pending.
        """
        self.side_streams = side_streams
        self.lanes: dict[LaneKey, Lane] = {}
        self._ident = ident
        self._pause = pause

    def submit(self, key: LaneKey, job: Job) -> None:
        """Make a job after everything that was begun before it in that lane."""
        lane = self.lanes.get(key)
        if lane is None:
            for other in [other for other, lane in self.lanes.items() if other is not None and other[2] > 0 and lane.has_gone]:
                del self.lanes[other]  # there may be a million tags
            lane = self.lanes[key] = Lane(f"commgraph {self._ident} {'' if key is None else key}", self._pause if key is None else None)
        lane.submit(job)

    def is_idle(self, key: LaneKey) -> bool:
        """Whether nothing is under way in that lane that the caller would have to wait for."""
        lane = self.lanes.get(key)
        return lane is None or lane.is_idle or lane.is_here

    def is_free(self, peer: int, outgoing: bool) -> bool:
        """Whether nothing at all is under way to (or from) that rank."""
        return all(
            lane.is_idle for key, lane in self.lanes.items() if key is not None and key[1] == outgoing and key[0] in (peer, ANY_RANK)
        )

    def lane_of(self, key: MessageKey) -> MessageKey:
        """Return the lane of a message: that of receives from any rank, where one of its tag was begun before it and has not ended."""
        anyone = (ANY_RANK, False, key[2])
        return key if key[1] or self.is_idle(anyone) else anyone

    def wait(self, key: LaneKey, deadline: Deadline) -> bool:
        """Wait until everything that was begun in that lane has ended; False where that takes longer."""
        return self.is_idle(key) or self.lanes[key].settle(deadline.left())

    def follow(self, key: LaneKey) -> None:
        """Order the current stream after what was begun in that lane on a device: a blocking call does not overtake it."""
        if self.side_streams is not None:
            self.side_streams.follow(key)

    def flush(self, deadline: Deadline) -> bool:
        """Whether the collectives that were begun, and the messages to peers, have ended before the deadline."""
        lanes = [lane for key, lane in self.lanes.items() if key is None or key[1]]
        return all(lane.settle(deadline.left()) for lane in lanes)

    def join(self, deadline: Deadline) -> None:
        """Wait for the threads of the lanes, after the group was closed."""
        for lane in self.lanes.values():
            lane.join(deadline.left())
