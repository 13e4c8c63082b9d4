"""Pending calls of a group: the lanes that run them one by one, and the side streams of those on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from commgraph.accelerators.side_streams import SideStreams
from commgraph.deadline import Deadline
from commgraph.work import Job, Lane

__all__ = ["ANY_RANK", "DICTS", "OBJECTS", "LaneKey", "MessageKey", "Pending"]

# Key of messages: a rank in the group or `ANY_RANK`, whether they are sent to it, and their tag: the user's, or `OBJECTS`, or `DICTS`
# (only claimed: dicts wait in the lane of tensors without a tag).
MessageKey = tuple[int, bool, int]
# Key of a lane: None for the collectives, else that of its messages.
LaneKey = MessageKey | None
ANY_RANK: Final = -1
OBJECTS: Final = -1
DICTS: Final = -2


class Pending:
    """Pending calls of one group: a lane for the collectives, and one for the messages of each tag to each peer and from each."""

    def __init__(self, uid: str, side_streams: SideStreams | None, pause: Callable[[bool], None] | None) -> None:
        """Without a lane as yet.

        Args:
            uid: of the group, for the names of threads.
            side_streams: for calls with device tensors; None where calls are not enqueued.
            pause: refuses native calls while collectives are pending.
        """
        self.side_streams = side_streams
        self.lanes: dict[LaneKey, Lane] = {}
        self._uid = uid
        self._pause = pause

    def submit(self, key: LaneKey, job: Job) -> None:
        """Append a job to a lane: it runs after those submitted before it."""
        lane = self.lanes.get(key)
        if lane is None:
            for other in [other for other, lane in self.lanes.items() if other is not None and other[2] > 0 and lane.has_gone]:
                del self.lanes[other]  # there may be a million tags
            lane = self.lanes[key] = Lane(f"commgraph {self._uid} {'' if key is None else key}", self._pause if key is None else None)
        lane.submit(job)

    def is_idle(self, key: LaneKey) -> bool:
        """Whether that lane has no pending job but the caller itself."""
        lane = self.lanes.get(key)
        return lane is None or lane.is_idle or lane.is_here

    def is_free(self, peer: int, outgoing: bool) -> bool:
        """Whether no message to (or from) that rank is pending."""
        return all(
            lane.is_idle for key, lane in self.lanes.items() if key is not None and key[1] == outgoing and key[0] in (peer, ANY_RANK)
        )

    def lane_of(self, key: MessageKey) -> MessageKey:
        """Return the lane of a message: that of receives from any rank, where one of its tag was begun before it and has not ended."""
        anyone = (ANY_RANK, False, key[2])
        return key if key[1] or self.is_idle(anyone) else anyone

    def wait(self, key: LaneKey, deadline: Deadline) -> bool:
        """Wait until that lane is idle; False if the deadline passed."""
        return self.is_idle(key) or self.lanes[key].wait_idle(deadline.left())

    def follow(self, key: LaneKey) -> None:
        """Order the current stream after the lane's side stream: a blocking call does not overtake pending ones."""
        if self.side_streams is not None:
            self.side_streams.follow(key)

    def flush(self, deadline: Deadline) -> bool:
        """Wait for the pending collectives and sends; False if the deadline passed."""
        lanes = [lane for key, lane in self.lanes.items() if key is None or key[1]]
        return all(lane.wait_idle(deadline.left()) for lane in lanes)

    def disown(self, why: str) -> None:
        """Make every wait for what is pending raise, in a forked child: the threads of the lanes are not there."""
        for lane in self.lanes.values():
            lane.inherited = why

    def join(self, deadline: Deadline) -> None:
        """Wait for the threads of the lanes, after the group was closed."""
        for lane in self.lanes.values():
            lane.join(deadline.left())
