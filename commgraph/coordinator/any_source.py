"""Receives from any rank, and messages of a rank to itself."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from commgraph.carriers import carried, clone, fill
from commgraph.communicators.base import CallsDiffer
from commgraph.communicators.tags import MESSAGE, make_tag, message_text, tagged_text
from commgraph.coordinator.failures import Call
from commgraph.coordinator.operation import Group, perform
from commgraph.coordinator.pending import ANY_RANK
from commgraph.coordinator.recorded import TENSORS
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline
from commgraph.errors import CollectiveTimeoutError
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.work import LaneThread

__all__ = ["from_self", "receive_any", "to_self"]

# Seconds between two looks at whether a rank has died, and at messages to oneself, which another thread may begin: at first, and at most.
# Each look costs a tenth of a millisecond.
_FIRST, _MOST = 0.002, 0.2
# Seconds between two looks while an earlier receive from one rank is under way, which leaves that rank out until it ends.
_BESIDE_OTHERS = 0.001


def receive_any(group: Group, operation: str, x: torch.Tensor, tag: int, deadline: Deadline) -> int:
    """Fill x with the next message of that tag from any rank, this one included.

    Returns:
        From whom it came, as a rank in the group.

    Raises:
        CollectiveTimeoutError: none came; the group is unharmed.
    """
    state, me = group._state, group.rank_in_group
    text = tagged_text(message_text(x.dtype, x.shape), tag)
    if group.world_size == 1:
        from_self(group, operation, x, tag, deadline)
        return me
    strategy = state.strategies.route("recv", x.shape, x.dtype, x.device)

    def act() -> int | None:
        src = wait()
        if src is not None and state.records is not None:
            state.records[group.name].assign(src)
        return src

    def wait() -> int | None:
        # A blocking call has no thread beside it that could send to itself.
        look = _FIRST if isinstance(threading.current_thread(), LaneThread) else _MOST
        while True:
            own = state.own_messages.poll(tag)
            if own is not None:
                _fill(group, x, own)
                return me
            # Round robin, beginning behind the rank that was served last.
            ranks = [(state.served + step) % group.world_size for step in range(1, group.world_size + 1)]
            # A receive begun earlier from one rank alone gets that rank's next messages: it is left out.
            keys = {rank: (rank, False, tag) for rank in ranks if rank != me}
            free = {rank: key for rank, key in keys.items() if key not in state.turns.claims and state.pending.is_idle(key)}
            tags = {rank: make_tag(MESSAGE, state.counted(key), text) for rank, key in free.items()}
            patience = look if len(free) == group.world_size - 1 else _BESIDE_OTHERS
            look = min(2 * look, _MOST)
            src = None
            if tags:
                src = strategy.receive_any(carried(x), tags, label=tag, patience=min(patience, deadline.left()), deadline=deadline)
            else:
                time.sleep(patience)
            if src is not None:
                state.count((src, False, tag))
                state.served = src
            if src is not None or deadline.has_passed:
                return src

    turn, lane, message = Turn(), (ANY_RANK, False, tag), (TENSORS, INCOMING, tag)
    try:
        state.begin_message(group.name, operation, lane, turn)
        src = perform(
            group, operation, state.sequence, f"recv({text}, commgraph.ANY)", deadline, act, [x], message=message, is_made=_has_come
        )
    finally:
        state.turns.release(lane, turn)
    if src is None:
        call = Call(group.name, operation, state.members, state.sequence)
        raise CollectiveTimeoutError(
            f"{call.where}: no {text} came from any rank within {deadline.seconds:g} s. The group is unharmed: call again to go on waiting",
            **call.facts,
        )
    return src


def _has_come(src: int | None) -> bool:
    return src is not None


def to_self(group: Group, operation: str, x: torch.Tensor, tag: int) -> None:
    """Keep a copy of x as the next message of this rank to itself."""
    state = group._state
    if state.records is not None and group.world_size > 1:
        record = state.records[group.name]
        token = record.begin(operation, "copy", 0, (TENSORS, OUTGOING, tag), group.rank_in_group, [x])
        if token is not None:
            record.done(token)
    copy = clone(x.detach())
    streams = state.streams(x.device)
    state.own_messages.put(tag, (copy, None if streams is None else streams.record_event()))


def from_self(group: Group, operation: str, x: torch.Tensor, tag: int, deadline: Deadline) -> None:
    """Fill x with the next message of this rank to itself."""
    state = group._state
    text = tagged_text(message_text(x.dtype, x.shape), tag)
    what = f"recv({text}, {group.rank_in_group})"
    act = lambda: _fill(group, x, state.own_messages.take(tag, deadline))  # noqa: E731 - one line of what `perform` takes
    message = (TENSORS, INCOMING, tag)
    perform(group, operation, state.sequence, what, deadline, act, [x], strategy="copy", peer=group.rank_in_group, message=message)


def _fill(group: Group, x: torch.Tensor, message: tuple[torch.Tensor, Any]) -> None:
    copy, event = message
    if message_text(copy.dtype, copy.shape) != message_text(x.dtype, x.shape):
        raise CallsDiffer(group.rank_in_group)
    streams = group._state.streams(copy.device)
    if event is not None and streams is not None:
        streams.wait_event(event)
    fill(x.detach(), copy.view(x.shape))
