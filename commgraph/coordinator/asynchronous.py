"""Collectives that are begun here and waited for later.

Each is the blocking operation, run by another thread in the order of its lane (`commgraph.work`): the collectives of a group are one lane,
the messages to a peer another, those from a peer a third. A blocking call waits for earlier calls of its own lane only: messages may
overtake collectives, and messages of one peer those of another. A small all_reduce in shared memory
needs no thread: `begin_natively` sends the data that the peers need, and `Work.wait` computes the sum.

On a device such a call is enqueued on a side stream of its lane (`commgraph.accelerators.side_streams`): at once where its strategy
is stream-ordered, by the lane's thread where it blocks the host. NCCL runs all calls of a group on one communicator: there messages
do not overtake collectives, and all ranks have to begin them in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.accelerators.side_streams import StreamTask
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.failures import Call, call_site
from commgraph.coordinator.operation import (
    Group,
    Operation,
    count_in_turn,
    deadline_of,
    explain,
    is_watched,
    raise_native,
    run,
    run_directly,
    run_generally,
)
from commgraph.coordinator.pending import LaneKey
from commgraph.coordinator.spans import span
from commgraph.deadline import Timeout
from commgraph.work import Finished, Job, Work

__all__ = ["begin_collective", "begin_natively", "joined", "submit"]

T = TypeVar("T")


def begin_collective(operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout = None) -> Work[Any]:
    """Begin a collective: its arguments are checked now, its deadline counts from when its turn comes.

    Where torch traces it is the blocking operator and has ended at once. One that is refused counts when its turn would have come, as
    blocking ones do at once.
    """
    watched = operation.watched(*args)
    if is_dynamo_compiling() or is_watched(*watched):
        return Finished(run(operation, group, args, timeout))
    state = group._state
    state.ensure_open(group.name)
    name = f"{operation.name}_async"
    try:
        deadline_of(group, name, timeout)
        try:
            for x in watched:
                checks.tensor(group, x, gradient=name)
            checked = operation.check(group, *args)
        except BadArgument as error:
            raise explain(error, group, name, state.sequence) from None
    except Exception:
        count_in_turn(group, name)
        raise
    with span(group, name):
        return _begun(operation, group, name, args, checked, timeout)


def _begun(
    operation: type[Operation], group: Group, name: str, args: tuple[Any, ...], checked: tuple[Any, ...], timeout: Timeout
) -> Work[Any]:
    """Begin a collective whose arguments were checked."""
    state = group._state
    call = Call(group.name, name, state.members, state.sequence)

    def work() -> Any:
        return run_directly(operation, group, args) if timeout is None else run_generally(operation, group, args, timeout)

    tensors = tensors_in(args)
    if group.world_size == 1:
        job = Job(work, call_site())
        job.run()
        return Work(call, [job], only)
    side_streams = state.side_streams
    on_device = [x for x in tensors if state.streams(x.device) is not None]
    if side_streams is None or not on_device:
        return Work(call, [submit(group, None, work)], only)
    task = StreamTask(side_streams, None, work, on_device)
    job = Job(task, call_site())
    at_once = state.strategies.route(operation.routed_as, *operation.routed_by(*checked)).stream_ordered
    # With `check` the call is compared now, in the order of all groups of a device; that waits until the peers begin it.
    if side_streams.streams.is_capturing() or (at_once and (state.pending.is_idle(None) or state.comparison is not None)):
        job.run()
    else:
        state.pending.submit(None, job)
    return Work(call, [job], lambda results: joined([task], results[0], tensors_in(results)), [task])


def begin_natively(operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout) -> Work[Any] | None:
    """Begin an all_reduce of a small tensor in shared memory: what the peers need is sent now, by the caller, and no thread is needed.

    Returns:
        None where the native calls do not handle it. Nothing was sent.
    """
    fast = group._fast
    try:
        if fast.begin_all_reduce(*args, timeout) is None:
            return None
    except BaseException as error:
        raise_native(error, operation, group, args, timeout)

    def end() -> Any:
        try:
            return fast.end_all_reduce()
        except BaseException as error:
            raise_native(error, operation, group, args, timeout)

    state = group._state
    job = Job(end, call_site(), fast.has_arrived)
    state.pending.submit(None, job)
    return Work(Call(group.name, f"{operation.name}_async", state.members, state.sequence - 1), [job], only)


def only(results: Sequence[Any]) -> Any:
    """Return the one result."""
    return results[0]


def tensors_in(values: Sequence[Any]) -> list[torch.Tensor]:
    """Return the values that are tensors: the result of a gather is one on `dst` only."""
    return [x for x in values if isinstance(x, torch.Tensor)]


def submit(
    group: Group, key: LaneKey, run: Callable[[], Any], given: Sequence[torch.Tensor] = (), tasks: list[StreamTask] | None = None
) -> Job:
    """Submit a job to a lane; with device tensors also as a stream task, which is added to `tasks`."""
    state = group._state
    if tasks is not None and state.side_streams is not None:
        tasks.append(StreamTask(state.side_streams, key, run, [x for x in given if state.streams(x.device) is not None]))
        run = tasks[-1]
    job = Job(run, call_site())
    state.pending.submit(key, job)
    return job


def joined(tasks: Sequence[StreamTask], result: T, made: Sequence[torch.Tensor] = ()) -> T:
    """Order the current stream after `tasks`, and return `result`."""
    for task in tasks:
        task.join(made)
    return result
