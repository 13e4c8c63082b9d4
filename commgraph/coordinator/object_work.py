"""Objects to and from one rank that are waited for later, those of a rank to itself among them."""

from __future__ import annotations

from typing import Any

from commgraph.communicators.base import PeerLate
from commgraph.coordinator.asynchronous import submit
from commgraph.coordinator.failures import Call
from commgraph.coordinator.objects import Objects, checked_peer, nothing_yet, refuse_object, unreadable
from commgraph.coordinator.operation import Group, deadline_of, perform
from commgraph.coordinator.pending import OBJECTS
from commgraph.coordinator.recorded import OBJECTS as OBJECT_FAMILY
from commgraph.coordinator.recorded import entry
from commgraph.deadline import Deadline, Timeout
from commgraph.shm.pickling import loads
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.work import Work

__all__ = ["irecv_object", "isend_object"]


def isend_object(group: Group, objects: Objects, obj: object, dst: Any, timeout: Timeout) -> Work[None]:
    """`GroupCoordinator.isend_object`."""
    operation, state = "isend_object", group._state
    state.ensure_open(group.name)
    seconds = deadline_of(group, operation, timeout).seconds
    peer = checked_peer(group, operation, dst, "dst", state.sequence)
    call = Call(group.name, operation, state.members, state.sequence)
    jobs = []
    if peer == group.rank_in_group:
        try:
            with entry(group, operation, peer=peer, message=(OBJECT_FAMILY, OUTGOING, 0)):
                state.own_messages.put_object(OBJECTS, obj)
        except Exception as error:
            raise refuse_object(group, operation, obj, error) from error
    elif (send := objects.pack(group, operation, obj, peer)) is not None:
        jobs.append(submit(group, (peer, True, OBJECTS), lambda: send(Deadline.after(seconds))))
    return Work(call, jobs, lambda _: None)


def irecv_object(group: Group, objects: Objects, src: Any, timeout: Timeout) -> Work[Any]:
    """`GroupCoordinator.irecv_object`."""
    operation, state = "irecv_object", group._state
    state.ensure_open(group.name)
    seconds = deadline_of(group, operation, timeout).seconds
    peer = checked_peer(group, operation, src, "src", state.sequence)
    call = Call(group.name, operation, state.members, state.sequence)

    def run() -> Any:
        if peer == group.rank_in_group:
            return _from_self(group, operation, Deadline.after(seconds))
        return objects.recv(group, operation, peer, timeout)

    return Work(call, [submit(group, (peer, False, OBJECTS), run)], lambda results: results[0])


def _from_self(group: Group, operation: str, deadline: Deadline) -> Any:
    state = group._state

    def act() -> list[Any] | None:
        try:
            return list(state.own_messages.take(OBJECTS, deadline))
        except PeerLate:
            return None

    me, message = group.rank_in_group, (OBJECT_FAMILY, INCOMING, 0)
    found = perform(group, operation, state.sequence, f"{operation}(...)", deadline, act, 0, peer=me, message=message, is_made=bool)
    if found is None:
        raise nothing_yet(group, operation, state.sequence, group.rank_in_group, deadline.seconds)
    try:
        return loads(found[0], found[1:])
    except Exception as error:
        raise unreadable(group, operation, group.rank_in_group, error) from error
