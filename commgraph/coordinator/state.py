"""`GroupState`: shared by the coordinators over the same ranks. Members, live strategies and which of them serves a call, counters."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch
import torch.distributed as dist

from commgraph.accelerators.device_order import DeviceOrder
from commgraph.accelerators.side_streams import SideStreams
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import OPERATIONS, Communicator, FastPath, Refused
from commgraph.communicators.transport import Transport
from commgraph.coordinator.failures import Call, Failures, Members, concurrent
from commgraph.coordinator.order import Comparison
from commgraph.coordinator.own_messages import OwnMessages
from commgraph.coordinator.pending import ANY_RANK, LaneKey, Pending
from commgraph.coordinator.recorded import GroupRecords
from commgraph.coordinator.torch_groups import TorchGroups
from commgraph.coordinator.turns import Turn, Turns
from commgraph.deadline import Deadline
from commgraph.errors import ConcurrentCallError, UnsupportedTensorError
from commgraph.forks import explain_fork, keep_for_ever

__all__ = ["GroupState", "Members", "Network", "Strategies", "Timeouts"]

_HOST = torch.device("cpu")

# Seconds up to which a receive of an object is a poll, whose end in vain says nothing about the rank that it waits for.
_POLL = 0.9


@attrs.frozen
class Network:
    """The connections of a group of more than one rank.

    Attributes:
        transport: carries objects and comparisons.
        store: holds this group's keys only.
        key: authenticates pickled objects; None: plain data only.
        connect_gloo: connects the ranks by gloo as well, for torch's process group. Collective.
        lazy_gloo: returns such a group that connects as torch uses it. Not collective.
    """

    transport: Transport
    store: dist.Store
    key: bytes | None = attrs.field(repr=False)
    connect_gloo: Callable[[], Transport] | None = attrs.field(default=None, eq=False, repr=False)
    lazy_gloo: Callable[[], dist.ProcessGroup] | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen
class Timeouts:
    """Default deadlines in seconds: of host tensors and objects, and of calls that are enqueued on a device."""

    host: float
    device: float


class Strategies:
    """The live strategies of one group, first choice first, and which of them serves a call."""

    def __init__(self, members: Members, communicators: Sequence[Communicator] = (), refused: Sequence[Refused] = ()) -> None:
        """`refused`: strategies that the group does not have, with the reasons. Both are empty for one rank."""
        self.members = members
        self.communicators = tuple(communicators)
        self.refused = tuple(refused)
        # Streams of the group's device, asked whether a graph is being captured.
        self.streams: Streams | None = None
        self.device = _HOST

    @property
    def table(self) -> Mapping[str, tuple[str, ...]]:
        """Operation -> names of the strategies that may serve it, first choice first."""
        served = {name: tuple(c.name for c in self.communicators if name in c.operations) for name in OPERATIONS}
        return MappingProxyType({name: names for name, names in served.items() if names})

    def route(
        self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, op: str | None = None
    ) -> Communicator:
        """Return the strategy for such a call, of a reduction by `op`; the same on every rank."""
        streams = self.streams
        capturing = streams is not None and device.type == self.device.type and streams.is_capturing()
        for communicator in self.communicators:
            if operation not in communicator.operations or (op is not None and op not in communicator.reductions):
                continue
            if communicator.accepts(operation, shape, dtype, device, capturing=capturing):
                return communicator
        if capturing:
            raise UnsupportedTensorError(
                f"{operation} in group {self.members.uid} (rank {self.members.rank}): a graph is being captured, and of its "
                f"strategies {', '.join(c.name for c in self.communicators)} none that can be captured serves {dtype} {tuple(shape)} on "
                f"{device}. Nothing was sent.",
                operation=operation,
                rank=self.members.rank,
            )
        raise RuntimeError(
            f"no strategy of group {self.members.uid} serves {operation} of {dtype} on {device}: the platform's chain is incomplete"
        )

    def fast(self) -> FastPath | None:
        """Return the fast path that bypasses `route`: that of the first strategy that serves the host."""
        first = next((c for c in self.communicators if c.serves_host), None)
        return None if first is None else first.fast

    def for_messages(self) -> Communicator | None:
        """Return the first strategy that serves messages of host tensors."""
        return next((c for c in self.communicators if c.serves_host and "send" in c.operations), None)

    def by_fast_path(self) -> tuple[Communicator | None, FastPath | None]:
        """Return the first strategy that has native calls, and its fast path."""
        found = next((c for c in self.communicators if c.fast is not None), None)
        return found, None if found is None else found.fast

    @property
    def has_aborted(self) -> bool:
        """Whether one of them has ended its calls, here and on the peers."""
        return any(communicator.has_aborted for communicator in self.communicators)

    def abort(self) -> None:
        """End what runs on any of them, here and on the peers."""
        for communicator in self.communicators:
            communicator.abort()

    def close(self) -> None:
        """Release what all of them hold."""
        for communicator in self.communicators:
            communicator.close()


class _Counter:
    """Counts the collectives of a group without native calls."""

    busy = False

    def __init__(self) -> None:
        self.sequence = 0
        self.claims: dict[Any, object] = {}


class GroupState:
    """Shared by the coordinators of one context whose ranks (and options) are equal. One call at a time in each lane."""

    def __init__(
        self,
        members: Members,
        strategies: Strategies,
        network: Network | None,
        timeouts: Timeouts,
        *,
        check: bool = False,
        experts: int | None = None,
        device: torch.device = _HOST,
        streams: Streams | None = None,
        order: DeviceOrder | None = None,
        rebuild: Callable[[GroupState, str], GroupState] | None = None,
    ) -> None:
        """Not for users: made while a context is built.

        Args:
            members: who is in the group.
            strategies: that serve it.
            network: that connects it; None for one rank.
            timeouts: default deadlines.
            check: compare every call with the peers'.
            experts: number of experts, where `dispatch` is routed; else None.
            device: of this rank.
            streams: of that device; None where calls are not stream-ordered.
            order: of the world's device; with `check` stream-ordered calls of all groups are compared in it.
            rebuild: makes a state of the same ranks with communicators of their own, for a sibling of the given name. Collective.
        """
        self.members = members
        self.strategies = strategies
        self.network = network
        self.timeouts = timeouts
        self.experts = experts
        self.rebuild = rebuild
        strategies.streams, strategies.device = streams, device
        self.detecting, self.detects = strategies.by_fast_path()
        # Fast calls bypass the choice of a strategy and the comparison with the peers.
        self.fast = None if check else strategies.fast()
        # A rank that puts a record for all does not wait, and could not raise for a mismatch at once, as `check` promises.
        self.mailbox = self.detects.mailbox if self.detects is not None and not check else None
        self.counter: Any = _Counter() if self.detects is None else self.detects.counter
        self.turns = Turns(self.counter.claims, self.counter)
        self.comparison = Comparison(members, network.transport, order) if check and network is not None else None
        side_streams = None if streams is None else SideStreams(streams)
        self.pending = Pending(members.uid, side_streams, None if self.detects is None else self.detects.pause)
        self.own_messages = OwnMessages(members.rank_in_group)
        # Source of the last message that was received from any rank.
        self.served = members.rank_in_group
        notes = self.detects if self.detects is not None and self.detects.has_notes else None
        self.failures = Failures(members, None if network is None else network.store, self._abort, notes)
        self.torch_groups = TorchGroups(self)
        # Whether the last receive of an object that was no poll has timed out.
        self.waited_in_vain = False
        # Of the calls; None where they are not recorded.
        self.records: GroupRecords | None = None
        # A `commgraph.coordinator.native_messages.NativeMessages`, or None.
        self.native_messages: Any = None
        self._order = order
        self._open: set[str] = set()
        self.counts: dict[Any, int] = {}
        self._alone = members.world_size == 1
        self._released = False
        # Reentrant: a signal handler may close.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        # Whether this is the copy of a forked child.
        self.is_inherited = False

    # Streams and counters.

    @property
    def side_streams(self) -> SideStreams | None:
        """The side streams of pending calls with device tensors."""
        return self.pending.side_streams

    def streams(self, device: torch.device) -> Streams | None:
        """Return the streams on which calls with tensors of such a device are enqueued; None for the host."""
        return None if device.type != self.strategies.device.type else self.strategies.streams

    @property
    def sequence(self) -> int:
        """Collectives begun on the group."""
        return int(self.counter.sequence)

    def begin(self, name: str, operation: str, turn: Turn) -> int:
        """Take the turn of the collectives, and count one, also one that fails, so that ranks that all raise keep equal counts.

        The caller releases the turn, whether this raises or not.

        Raises:
            ConcurrentCallError: another call is under way; nothing was counted.
        """
        if name not in self._open or self.failures.broken is not None:
            self.ensure_open(name)
        if not self._alone and not self.turns.claim(None, turn):
            raise self.refused(name, operation)
        counter = self.counter
        number: int = counter.sequence
        counter.sequence = number + 1
        return number

    def begin_message(self, name: str, operation: str, key: LaneKey, turn: Turn) -> None:
        """Take the turn of a lane of messages. The caller releases it, whether this raises or not.

        Raises:
            ConcurrentCallError: another call is under way in it, or receives from any rank.
        """
        claimed = self.turns.claim(key, turn)
        if not claimed or (key is not None and not key[1] and key[0] != ANY_RANK and (ANY_RANK, False, key[2]) in self.turns.claims):
            raise self.refused(name, operation, key)

    def refused(self, name: str, operation: str, key: LaneKey = None) -> ConcurrentCallError:
        """Return the error of a call that was refused because another one is under way; raise where the group is closed or broken."""
        self.ensure_open(name)
        return concurrent(Call(name, operation, self.members, self.sequence), message=key is not None)

    def uncount_collective(self) -> None:
        """Take back the number of the last collective, which was not begun."""
        self.counter.sequence -= 1

    def count(self, key: Any) -> int:
        """Number the messages of one kind to (or from) one peer."""
        number = self.counts.get(key, 0)
        self.counts[key] = number + 1
        return number

    def counted(self, key: Any) -> int:
        """Return the number of the next message of one kind to (or from) one peer."""
        return self.counts.get(key, 0)

    def uncount(self, key: Any) -> None:
        """Take back the last number: its message was not received yet."""
        self.counts[key] -= 1

    def note_wait_in_vain(self, seconds: float) -> None:
        """Note that an object was waited for in vain for so long."""
        self.waited_in_vain |= seconds >= _POLL

    # Lifetime.

    def ensure_open(self, name: str) -> None:
        """Raise where the coordinator of that name was closed or the group is broken."""
        if self.is_inherited:
            raise self.failures.not_open(name, f"it is not this process's: {explain_fork(self._pid, 'a World')}")
        if name not in self._open:
            raise self.failures.not_open(name, "its context was closed; build another with world.context")
        if (broken := self.failures.broken) is not None:
            raise copy.copy(broken) from broken

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self.failures.closed

    def enter(self, name: str) -> None:
        """Add a coordinator at build."""
        self._open.add(name)

    def leave(self, name: str) -> None:
        """Close one coordinator; the last one takes the connections along."""
        with self._lock:
            self._open.discard(name)
            last = not self._open
        if last:
            self.close()

    def disown(self) -> None:
        """Give up everything without a trace, in a forked child: `commgraph.forks.Owner`."""
        if self.is_inherited:
            return
        self.is_inherited = True
        keep_for_ever(self.strategies, self.network, self.counter, self.own_messages, self.pending, self.comparison)
        for strategy in self.strategies.communicators:
            strategy.disown()
        if self.detects is not None:
            keep_for_ever(self.detects)
            self.detects.disown()
        self._open.clear()
        self.failures.closed = True
        self.failures.forget()
        self._lock = threading.RLock()
        self.pending.disown(
            f"group {self.members.uid} (rank {self.members.rank}) is not this process's: {explain_fork(self._pid, 'a World')}"
        )
        self.torch_groups.disown()
        self.strategies = Strategies(self.members)
        self.counter = _Counter()
        self.turns = Turns(self.counter.claims, self.counter)
        self.fast = self.mailbox = self.native_messages = self.network = self.comparison = self.rebuild = self.records = None

    def _abort(self) -> None:
        self.strategies.abort()
        self.own_messages.close()
        if self._order is not None:
            self._order.abort()

    def abort(self) -> None:
        """End what runs on this group, here and on the peers. From any thread."""
        if self.is_inherited:
            return
        self.failures.closed = True
        self._open.clear()
        self._abort()

    def close(self) -> None:
        """Release everything this rank holds, without communicating. Idempotent, from any thread."""
        if self.is_inherited:
            return
        with self._lock:
            released, self._released = self._released, True
            if not released:
                self._release()

    def _release(self) -> None:
        self.failures.closed = True
        self._open.clear()
        self.rebuild = None
        self.torch_groups.close()
        self.strategies.close()
        self.own_messages.close()
        if self.detects is not None:
            self.counter = self.turns.counter = self.detects.counter  # no longer the native one, which would keep the memory
        self.pending.join(Deadline.after(1.0))  # its jobs have ended, or do now: with an error
        self.mailbox = None
        self.native_messages = None
        self.fast = None
        self.network = None
        self.comparison = None
        self.records = None
        self.failures.forget()
