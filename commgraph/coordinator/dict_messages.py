"""Messages and broadcasts of dicts: tensors are sent as tensors, everything else as objects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch

from commgraph import ambient
from commgraph.accelerators.side_streams import StreamTask
from commgraph.communicators.base import CallsDiffer
from commgraph.coordinator.asynchronous import joined, submit
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.dict_parts import new_tensor, taken_apart
from commgraph.coordinator.failures import Call
from commgraph.coordinator.gathers import AllGather, BroadcastPart
from commgraph.coordinator.messages import begin_message, exchange
from commgraph.coordinator.objects import Objects, UnreadableDictError, checked_peer
from commgraph.coordinator.operation import Group, explain, perform, run, run_generally, wait_pending, whole
from commgraph.coordinator.pending import DICTS
from commgraph.coordinator.recorded import DICTS as DICT_FAMILY
from commgraph.coordinator.recorded import entry
from commgraph.coordinator.tensor_dict import Entry, Plan, join_dict, result_tensors
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.work import Work

__all__ = ["broadcast_dict", "irecv_dict", "isend_dict", "recv_dict", "send_dict"]


@ambient.sheltered
def broadcast_dict(group: Group, objects: Objects, tree: Any, src: int, timeout: Timeout) -> Any:
    """`GroupCoordinator.broadcast_tensor_dict`."""
    operation = "broadcast_tensor_dict"
    if objects.broadcast_plain(group, tree, src, timeout):
        return tree
    begin_message(group, operation, timeout)
    src = checked_peer(group, operation, src, "src", group._state.sequence)
    if group.rank_in_group != src:
        with whole(group, operation, timeout, src):
            try:
                received = objects.broadcast_dict(group, operation, None, (), src, timeout)
            except UnreadableDictError as failed:
                for x in failed.tensors(group.device):
                    run_generally(BroadcastPart, group, (x, src), timeout)
                raise failed.error from failed.error.__cause__
            if isinstance(received, dict):
                return received
            entries, carried = received
            tensors = result_tensors(entries, group.device, carried, partial(new_tensor, group, "broadcast"))
            for i, x in enumerate(tensors):
                if i not in carried:
                    run_generally(BroadcastPart, group, (x, src), timeout)
        return join_dict(entries, tensors)
    if tree is None:
        raise explain(BadArgument("tensor_dict is None on src, which has to give it"), group, operation, group._state.sequence)
    entries, tensors = taken_apart(group, operation, tree)
    if group.world_size == 1:
        return tree
    with whole(group, operation, timeout, src):
        # Counted only now: of what was refused above the others know nothing, and go on waiting.
        given = objects.broadcast_dict(group, operation, entries, tensors, src, timeout)
        assert not isinstance(given, dict)  # but the parts of what this rank gave
        _, sent = given
        for i, x in enumerate(tensors):
            if i not in sent:
                run_generally(BroadcastPart, group, (x.detach(), src), timeout)
    return tree


def send_dict(
    group: Group,
    objects: Objects,
    tree: Any,
    dst: int | None,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    timeout: Timeout,
) -> None:
    """`GroupCoordinator.send_tensor_dict`."""
    operation = "send_tensor_dict"
    to = group.next_in_group if dst is None else dst
    if slicing is None and override is None and objects.send_plain(group, tree, to, timeout):
        return
    deadline = begin_message(group, operation, timeout)
    peer = checked_peer(group, operation, to, "dst", group._state.sequence, other=True)
    wait_pending(group, (peer, True, 0), operation, deadline)
    _pack(group, objects, operation, tree, peer, slicing, override)(deadline, timeout is not None)


@ambient.sheltered
def _pack(
    group: Group,
    objects: Objects,
    operation: str,
    tree: Any,
    dst: int,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
) -> Callable[[Deadline, bool], None]:
    """Check and describe a dict for `dst`; return a function that sends it, with a deadline for each part."""
    entries, tensors = taken_apart(group, operation, tree)
    plan, sliced = _sliced(group, operation, entries, slicing, override)
    outgoing = [plan.slice(x) if cut else x for x, cut in zip(tensors, sliced, strict=True)]
    carried, send_description = objects.pack_dict(group, operation, entries, outgoing, dst)
    rest = [x for i, x in enumerate(outgoing) if i not in carried]

    def send(deadline: Deadline, limited: bool) -> None:
        group._state.ensure_open(group.name)
        message = (DICT_FAMILY, OUTGOING, 0)
        with entry(group, operation, peer=dst, message=message), _claimed(group, objects, operation, dst, True) as turn:
            send_description(deadline)
            exchange(group, operation, rest, dst, True, Deadline.after(deadline.seconds), limited=limited, turn=turn)

    return send


@contextlib.contextmanager
def _claimed(group: Group, objects: Objects, operation: str, peer: int, outgoing: bool) -> Iterator[Turn | None]:
    """Context manager in which no other dict comes between the parts of this one; gives the turn of its tensors, where they follow it."""
    state, turn = group._state, Turn()
    in_parts = objects.sends_in_parts(peer)
    key = (peer, outgoing, 0 if in_parts else DICTS)
    try:
        state.begin_message(group.name, operation, key, turn)
        yield turn if in_parts else None
    finally:
        state.turns.release(key, turn)


def recv_dict(
    group: Group,
    objects: Objects,
    src: int | None,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    timeout: Timeout,
) -> dict[Any, Any]:
    """`GroupCoordinator.recv_tensor_dict`."""
    operation = "recv_tensor_dict"
    source = group.prev_in_group if src is None else src
    if slicing is None and override is None:
        tree = objects.recv_plain(group, source, timeout)
        if tree is not None:
            return tree
    deadline = begin_message(group, operation, timeout)
    peer = checked_peer(group, operation, source, "src", group._state.sequence, other=True)
    wait_pending(group, (peer, False, 0), operation, deadline)
    received = _receive(group, objects, operation, peer, slicing, override, deadline, timeout is not None)
    return received.gathered(slicing, timeout)


@ambient.sheltered
def _receive(
    group: Group,
    objects: Objects,
    operation: str,
    src: int,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    deadline: Deadline,
    limited: bool,
) -> Received:
    """Receive a dict from `src`, whose slices are not gathered yet."""
    group._state.ensure_open(group.name)
    message = (DICT_FAMILY, INCOMING, 0)
    with entry(group, operation, peer=src, message=message), _claimed(group, objects, operation, src, False) as turn:
        return _receive_parts(group, objects, operation, src, slicing, override, deadline, limited, turn)


def _receive_parts(
    group: Group,
    objects: Objects,
    operation: str,
    src: int,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    deadline: Deadline,
    limited: bool,
    turn: Turn | None,
) -> Received:
    state = group._state
    try:
        entries, carried = objects.recv_dict(group, operation, src, deadline)
    except UnreadableDictError as failed:
        rest = failed.tensors(group.device)
        exchange(group, operation, rest, src, False, Deadline.after(deadline.seconds), limited=limited, turn=turn)
        raise failed.error from failed.error.__cause__
    plan, sliced = _sliced(group, operation, entries, slicing, override)
    if not _fits(entries, carried, sliced, plan):

        def differ() -> None:
            raise CallsDiffer(src)

        perform(group, operation, state.sequence, f"{operation}(...)", deadline, differ)
    unsliced = {i: x for i, x in carried.items() if not sliced[i]}
    whole = result_tensors(entries, group.device, unsliced, partial(new_tensor, group, "recv"))
    pieces = {i: carried[i] if i in carried else plan.slice(whole[i]) for i, cut in enumerate(sliced) if cut}
    missing = [pieces.get(i, x) for i, x in enumerate(whole) if i not in carried]
    exchange(group, operation, missing, src, False, Deadline.after(deadline.seconds), limited=limited, turn=turn)
    return Received(entries, whole, [(whole[i], piece) for i, piece in pieces.items()])


@attrs.frozen
class Received:
    """A received dict: its description, its tensors, and (tensor, slice) for those of which this rank received a slice."""

    entries: list[Entry]
    tensors: list[torch.Tensor]
    slices: list[tuple[torch.Tensor, torch.Tensor]]

    def on_device(self) -> list[torch.Tensor]:
        """Return its tensors that are not on the host."""
        return [x for x in (*self.tensors, *(piece for _, piece in self.slices)) if not x.is_cpu]

    @ambient.sheltered
    def gathered(self, slicing: Group | None, timeout: Timeout) -> dict[Any, Any]:
        """Return the whole dict; collective over `slicing`, where there are slices."""
        for x, piece in self.slices:
            assert slicing is not None
            run(AllGather, slicing, (piece, 0, x.view(-1)), timeout)
        return join_dict(self.entries, self.tensors)


# Waited for later.


def isend_dict(
    group: Group,
    objects: Objects,
    tree: Any,
    dst: int | None,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    timeout: Timeout,
) -> Work[None]:
    """`GroupCoordinator.isend_tensor_dict`."""
    operation = "isend_tensor_dict"
    deadline = begin_message(group, operation, timeout)
    state = group._state
    peer = checked_peer(group, operation, group.next_in_group if dst is None else dst, "dst", state.sequence, other=True)
    call = Call(group.name, operation, state.members, state.sequence)
    send = _pack(group, objects, operation, tree, peer, slicing, override)
    tasks: list[StreamTask] = []
    job = submit(group, (peer, True, 0), lambda: send(Deadline.after(deadline.seconds), timeout is not None), (), tasks)
    return Work(call, [job], lambda _: joined(tasks, None), tasks)


def irecv_dict(
    group: Group,
    objects: Objects,
    src: int | None,
    slicing: Group | None,
    override: Mapping[str, bool] | None,
    timeout: Timeout,
) -> Work[dict[Any, Any]]:
    """`GroupCoordinator.irecv_tensor_dict`."""
    operation = "irecv_tensor_dict"
    deadline = begin_message(group, operation, timeout)
    state = group._state
    peer = checked_peer(group, operation, group.prev_in_group if src is None else src, "src", state.sequence, other=True)
    call = Call(group.name, operation, state.members, state.sequence)
    tasks: list[StreamTask] = []
    receive = partial(_receive, group, objects, operation, peer, slicing, override)
    job = submit(group, (peer, False, 0), lambda: receive(Deadline.after(deadline.seconds), timeout is not None), (), tasks)

    def finish(results: Sequence[Any]) -> dict[Any, Any]:
        received: Received = results[0]
        return joined(tasks, received, received.on_device()).gathered(slicing, timeout)

    return Work(call, [job], finish, tasks)


def _fits(entries: Sequence[Entry], carried: Mapping[int, torch.Tensor], sliced: Sequence[bool], plan: Plan) -> bool:
    """Whether the sender has sliced the tensors that this rank is to gather, and no others."""
    whole = [math.prod(what[2]) for _, what in entries if what[0] == "t"]
    return all(x.numel() == whole[i] // (plan.world_size if sliced[i] else 1) for i, x in carried.items())


def _sliced(
    group: Group, operation: str, entries: Sequence[Entry], slicing: Group | None, override: Mapping[str, bool] | None
) -> tuple[Plan, list[bool]]:
    plan = Plan() if slicing is None else Plan(slicing.world_size, slicing.rank_in_group, dict(override or {}))
    try:
        return plan, plan.sliced(entries)
    except ValueError as error:
        raise ValueError(f"{Call(group.name, operation, group._state.members, group._state.sequence).where}: {error}") from None
