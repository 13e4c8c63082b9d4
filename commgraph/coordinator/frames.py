"""`Frames`: what every way of carrying an object between hosts knows of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self, TypeVar

import attrs

from commgraph.communicators.tags import COLLECTIVE, OBJECT, make_tag, rest_of
from commgraph.coordinator.operation import Group, perform
from commgraph.coordinator.pending import DICTS, OBJECTS
from commgraph.coordinator.recorded import DICTS as DICT_FAMILY
from commgraph.coordinator.recorded import OBJECTS as OBJECT_FAMILY
from commgraph.coordinator.recorded import Message
from commgraph.deadline import Deadline

__all__ = ["STREAMS", "Frames"]

T = TypeVar("T")

# Streams of messages between two ranks: objects, and the descriptions of dicts.
STREAMS: Mapping[int, str] = MappingProxyType({OBJECTS: "message", DICTS: "dict"})


@attrs.frozen(eq=False, slots=False)  # as `Deadline`: made in half the time
class Frames:
    """What carries the objects of one call: those of a message, or of a collective.

    Attributes:
        group: on which the call is.
        operation: name of its method.
        sequence: collectives that were begun on the group before.
        what: the call with its arguments, as text; of a collective the same on all ranks.
        deadline: of the call.
        tag: of a first frame.
        message: what the record of calls holds of a message; None of a collective.
    """

    group: Group
    operation: str
    sequence: int
    what: str
    deadline: Deadline
    tag: int
    message: Message | None = None

    @property
    def rest(self) -> int:
        """Tag of the frames that follow a first one."""
        return rest_of(self.tag)

    @classmethod
    def of_message(cls, group: Group, operation: str, deadline: Deadline, kind: int, number: int, direction: int) -> Self:
        """Return those of the message with that number of its lane; `direction`: `OUTGOING` or `INCOMING`."""
        family, stream = OBJECT_FAMILY if kind == OBJECTS else DICT_FAMILY, STREAMS[kind]
        return cls(
            group, operation, group._state.sequence, f"{operation}(...)", deadline, make_tag(OBJECT, number, stream), (family, direction, 0)
        )

    @classmethod
    def of_collective(cls, group: Group, operation: str, deadline: Deadline, sequence: int, src: int) -> Self:
        """Return those of a collective whose objects are all of one rank."""
        what = f"{operation}(src={src})"
        return cls(group, operation, sequence, what, deadline, make_tag(COLLECTIVE, sequence, what))

    def perform(
        self,
        act: Callable[[], T],
        moved: int | None = None,
        *,
        peer: int = -1,
        is_made: Callable[[T], bool] | None = None,
        received: Callable[[T], int] | None = None,
    ) -> T:
        """Do what meets the peers, as `perform`; `peer`: the other rank of a message."""
        return perform(
            self.group,
            self.operation,
            self.sequence,
            self.what,
            self.deadline,
            act,
            moved,
            peer=-1 if self.message is None else peer,
            message=self.message,
            is_made=is_made,
            received=received,
        )
