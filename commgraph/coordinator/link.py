"""What the coordinators over the same ranks share: live strategies, the count of calls, the first error.

Every call goes through `GroupLink.run`, which gives it a tag, compares it with the peers' where that was asked for, and turns what
happened below into an error that names rank, group, operation and place.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.agreement import PeerLeftError, agree
from commgraph.communicators.base import OPERATIONS, CallsDiffer, Communicator, PeerClosed, PeerLate, Refused
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.communicators.shm import make_door
from commgraph.communicators.signature import CHECK, COLLECTIVE, make_tag
from commgraph.coordinator.aside import Sides
from commgraph.coordinator.call import Call, place
from commgraph.coordinator.comparison import check_text, what_differs
from commgraph.coordinator.short import ShortMessages
from commgraph.errors import (
    BuildError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    ContextClosedError,
    PeerLostError,
    UnsupportedTensorError,
)
from commgraph.shm import native_module
from commgraph.work import Job, Lane

if TYPE_CHECKING:
    from commgraph.coordinator.device_order import DeviceOrder
    from commgraph.coordinator.group import GroupCoordinator
    from commgraph.streams import Streams

__all__ = ["GroupLink", "LaneKey", "MessageKey"]

T = TypeVar("T")

_HOST = torch.device("cpu")

# Which lane: that of the collectives, or that of the messages to (True) or from (False) a rank in the group.
MessageKey = tuple[int, bool]
LaneKey = MessageKey | None


@attrs.frozen
class _Fault:
    """What a rank leaves in the store when its group breaks, for its peers to read."""

    kind: str
    at: str
    lost: int | None
    sequence: int
    text: str


class GroupLink:
    """Shared by the coordinators of one context whose ranks (and options) are equal. One thread at a time calls it."""

    def __init__(
        self,
        *,
        ident: str,
        ranks: tuple[int, ...],
        rank_in_group: int,
        communicators: Sequence[Communicator] = (),
        refused: Sequence[Refused] = (),
        transport: GlooTransport | None = None,
        store: dist.Store | None = None,
        key: bytes | None = None,
        host_timeout: float = 0.0,
        device_timeout: float = 0.0,
        check: bool = False,
        experts: int | None = None,
        again: Callable[[str], GroupLink] | None = None,
        build_timeout: timedelta = timedelta(0),
        device: torch.device = _HOST,
        streams: Streams | None = None,
        order: DeviceOrder | None = None,
    ) -> None:
        """Not for users: made while a context is built.

        Args:
            ident: names the group among all groups of all contexts of the job; the same on its ranks.
            ranks: global ranks in group order.
            rank_in_group: this rank's place among them.
            communicators: live strategies, first choice first; empty for one rank.
            refused: strategies that are not among them, and why.
            transport: carries objects and checks; None for one rank.
            store: holds this group's keys only.
            key: authenticates pickled objects; None: plain data only.
            host_timeout: default deadline in seconds, of host tensors and objects.
            device_timeout: the same of what is enqueued on a device.
            check: compare every call with the peers'.
            experts: how many there are, where rows go only to the ranks whose experts they need.
            again: makes such a link once more, under another ident. Collective.
            build_timeout: deadline of that.
            device: of this rank.
            streams: of that; None where its calls are made and not enqueued.
            order: in which calls that are only enqueued are compared with the peers', whatever group they are of.
        """
        self.ident = ident
        self.ranks = ranks
        self.rank_in_group = rank_in_group
        self.communicators = tuple(communicators)
        self.refused = tuple(refused)
        # The one that compares calls by itself, has a short way for them, and therefore counts them.
        self.comparing = next((c for c in self.communicators if c.compares), None)
        # Who puts a record for all does not wait for anybody, and so could not learn of a mismatch at once, as `check` promises.
        self.mailbox = None if check else next((c.mailbox for c in self.communicators if c.mailbox is not None), None)
        self.transport = transport
        self.key = key
        self.host_timeout = host_timeout
        self._device_timeout = device_timeout
        self.check = check
        self.experts = experts
        self._again = again
        self._build_timeout = build_timeout
        self._device = device
        # Where calls with device tensors are begun that nobody waits for.
        self.sides = None if streams is None else Sides(streams)
        self._order = order
        # Coordinators of the same ranks with communicators of their own, which end with this one.
        self.siblings: list[GroupCoordinator] = []
        self._begotten = 0
        self._torch_groups: list[dist.ProcessGroup] = []
        self._sequence = 0
        self.coordinators: tuple[GroupCoordinator, ...] = ()
        self._store = store
        self._broken: CollectiveError | None = None
        self._closed = False
        self._open: set[str] = set()
        self._counts: dict[tuple[int, int, bool], int] = {}
        self._lock = threading.Lock()
        # One thread at a time finds out what broke the group.
        self._failing = threading.Lock()
        strategy = self._first_on_host()
        self.messages = None
        if strategy is not None and self.mailbox is not None and compat.dlpack_exchange() is not None:
            self.messages = ShortMessages(self, strategy, self.mailbox)
        # Of what was begun and not waited for: one for the collectives, and one for the messages to each peer and from each.
        self._lanes: dict[LaneKey, Lane] = {}

    @property
    def sequence(self) -> int:
        """Collectives begun on the group."""
        return self._sequence if self.comparing is None else self.comparing.sequence

    @sequence.setter
    def sequence(self, number: int) -> None:
        if self.comparing is None:
            self._sequence = number
        else:
            self.comparing.sequence = number

    def door(self) -> Any:
        """A short way for one coordinator, None where there is none."""
        if self.world_size > 1:
            strategy = self._first_on_host()
            return None if strategy is None else strategy.door()
        native = native_module.load()
        return None if native is None else make_door(native, None)

    def _first_on_host(self) -> Communicator | None:
        """Whose short ways may be taken: they lead past the choice of a strategy, and past `check`, and so only where there is none."""
        first = next((c for c in self.communicators if c.serves_host), None)
        return first if first is self.comparing and not self.check else None

    @property
    def table(self) -> Mapping[str, tuple[str, ...]]:
        """Operation -> names of the strategies that may serve it, first choice first."""
        served = {name: tuple(c.name for c in self.communicators if name in c.operations) for name in OPERATIONS}
        return MappingProxyType({name: names for name, names in served.items() if names})

    def streams(self, device: torch.device) -> Streams | None:
        """Those on which calls with tensors of such a device are enqueued; None where they are made."""
        return None if self.sides is None or device.type != self._device.type else self.sides.streams

    def route(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> Communicator:
        """The strategy for such a call; the same on every rank."""
        streams = self.streams(device)
        capturing = streams is not None and streams.is_capturing()
        for communicator in self.communicators:
            if operation in communicator.operations and communicator.accepts(operation, shape, dtype, device, capturing=capturing):
                return communicator
        if capturing:
            raise UnsupportedTensorError(
                f"{operation} in group {self.ident} (rank {self.ranks[self.rank_in_group]}): a graph is being captured, and of its "
                f"strategies {', '.join(c.name for c in self.communicators)} none that can be captured serves {dtype} {tuple(shape)} on "
                f"{device}. Nothing was sent.",
                operation=operation,
                rank=self.ranks[self.rank_in_group],
            )
        raise RuntimeError(
            f"no strategy of group {self.ident} serves {operation} of {dtype} on {device}: the platform's chain is incomplete"
        )

    def begin(self, name: str) -> int:
        """Counts one collective, the failed ones too, so that ranks that raised stay level with each other and with nobody else."""
        self.ensure_open(name)
        number = self.sequence
        self.sequence = number + 1
        return number

    def ensure_open(self, name: str) -> None:
        if self._closed or name not in self._open:
            raise ContextClosedError(
                f"group {name!r} (rank {self.ranks[self.rank_in_group]}): its context was closed; build another with world.context"
            )
        if self._broken is not None:
            raise copy.copy(self._broken) from self._broken

    def count(self, kind: int, peer: int, *, outgoing: bool) -> int:
        """Numbers the messages of one kind to (or from) one peer."""
        number = self._counts.get((kind, peer, outgoing), 0)
        self._counts[kind, peer, outgoing] = number + 1
        return number

    def uncount(self, kind: int, peer: int, *, outgoing: bool) -> None:
        """Takes the last number back: its message is still awaited."""
        self._counts[kind, peer, outgoing] -= 1

    def uncount_collective(self) -> None:
        """Takes the last collective's number back: it is still to come."""
        self.sequence -= 1

    # What was begun and not waited for.

    def submit(self, key: LaneKey, job: Job) -> None:
        """Does it after everything that was begun before it in that lane."""
        lane = self._lanes.get(key)
        if lane is None:
            comparing = self.comparing
            hold = comparing.hold if key is None and comparing is not None else None
            lane = self._lanes[key] = Lane(f"commgraph {self.ident} {'' if key is None else key}", hold)
        lane.submit(job)

    def is_idle(self, key: LaneKey) -> bool:
        """Whether nothing is under way in that lane that the caller would have to wait for."""
        lane = self._lanes.get(key)
        return lane is None or lane.is_idle or lane.is_here

    def follow(self, key: LaneKey) -> None:
        """On a device, too, a blocking call comes after what was begun before it in its lane."""
        if self.sides is not None:
            self.sides.follow(key)

    def settle(self, key: LaneKey, call: Call, seconds: float) -> float:
        """Waits until what was begun before has ended, so that this call does not overtake it; what is left of the seconds."""
        if self.is_idle(key):
            return seconds
        started = time.monotonic()
        if not self._lanes[key].settle(seconds):
            raise CollectiveTimeoutError(
                f"{call.where}: operations that were begun before it and not waited for did not end within {seconds:g} s, so it was not "
                "begun. The group is unharmed",
                **call.facts,
            )
        return max(seconds - (time.monotonic() - started), 0.001)

    def drain(self, seconds: float) -> bool:
        """Whether the collectives that were begun, and the messages to peers, have ended within so many seconds."""
        deadline = time.monotonic() + seconds
        lanes = [lane for key, lane in self._lanes.items() if key is None or key[1]]
        return all(lane.settle(max(deadline - time.monotonic(), 0.0)) for lane in lanes)

    def deadline(self, call: Call, strategy: Communicator | None, seconds: float) -> float:
        """`seconds`, or what a call has where it is enqueued on a device and the user said nothing of its own."""
        return self._device_timeout if strategy is not None and strategy.enqueues and not call.limited else seconds

    def run(
        self,
        call: Call,
        signature: str,
        timeout: float,
        serve: Callable[[int, float], T],
        crossing: Sequence[tuple[int, int]] | None = None,
        strategy: Communicator | None = None,
    ) -> T:
        """Runs one collective: `serve(tag, seconds left)`.

        Args:
            call: who called what.
            signature: what all ranks must have in common, as text.
            timeout: seconds.
            serve: talks to the peers under the tag.
            crossing: entries that go to and come from each rank, where they are not in the signature.
            strategy: what serves it, where it has tensors.
        """
        started = time.monotonic()
        timeout = self.deadline(call, strategy, timeout)
        what = f"{call.operation}({signature})"
        with self.guard(call, what, timeout):
            if self.check:
                ordered = self._order if strategy is not None and strategy.enqueues else None
                self.compare(call, what, timeout, crossing, order=ordered)
            return serve(make_tag(COLLECTIVE, call.sequence, what), max(timeout - (time.monotonic() - started), 0.001))

    @contextlib.contextmanager
    def guard(self, call: Call, what: str, timeout: float) -> Iterator[None]:
        """Turns a failure below into the public error, breaks the group and releases the peers."""
        try:
            yield
        except (PeerLate, PeerClosed, CallsDiffer, CollectiveError) as error:
            if isinstance(error, PeerClosed) and error.peer == self.rank_in_group:
                # A call of another lane ended this one and is about to say why.
                deadline = time.monotonic() + 1.0
                while self._broken is None and not self._closed and time.monotonic() < deadline:
                    time.sleep(0.001)
            with self._failing:
                if self._broken is not None:
                    raise copy.copy(self._broken) from None
                if isinstance(error, PeerLate):
                    self._timed_out(call, what, timeout, error)
                if isinstance(error, PeerClosed):
                    self._lost(call, what, error)
                if isinstance(error, CallsDiffer):
                    self._differ(call, what, error)
                self._break(call, error, what)
        except Exception:
            if not self._closed:
                raise
            # What a strategy has let go of while another thread was on its way into it.
            raise ContextClosedError(f"{call.where}: its context was closed during the call") from None

    def compare(
        self,
        call: Call,
        what: str,
        timeout: float,
        crossing: Sequence[tuple[int, int]] | None = None,
        at: str | None = None,
        order: DeviceOrder | None = None,
    ) -> None:
        """Every rank learns what the others called; all raise alike where they differ. Inside `guard`.

        Args:
            call, what, timeout, crossing: as in `run`.
            at: place of the call in the user's code; None finds it.
            order: one for all groups, in which the call is to be compared, and not among those of this group alone.
        """
        assert self.transport is not None
        if order is not None:
            what = f"{what} in group {self.ident}"
        mine = [check_text(call.sequence, going, what, place() if at is None else at) for going in crossing or [(0, 0)] * self.world_size]
        others = [(self.rank_in_group + i) % self.world_size for i in range(1, self.world_size)]
        heard = {peer: torch.empty_like(mine[peer]) for peer in others}
        if order is None:
            sends, receives = [(mine[peer], peer) for peer in others], [(text, peer) for peer, text in heard.items()]
            self.transport.exchange(sends, receives, tag=make_tag(CHECK, call.sequence), timeout=timeout)
        else:
            heard = order.swap(self.ranks, {peer: mine[peer] for peer in others}, timeout)
        said = [heard.get(peer, mine[self.rank_in_group]) for peer in range(self.world_size)]
        if wrong := what_differs(said, self.ranks, self.rank_in_group, crossing, ordered=order is not None):
            raise CollectiveMismatchError(f"{call.where}: {wrong}", **call.facts)

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    # Failures.

    def _timed_out(self, call: Call, what: str, timeout: float, error: PeerLate) -> NoReturn:
        at = place()
        head = f"{call.where}: call #{call.sequence}, {what}, at {at}, did not end within {timeout:g} s; "
        head += f"it waited for rank {self.ranks[error.peer]}"
        self._publish(_Fault("timeout", f"{call.sequence} {what}", None, call.sequence, f"{what} at {at}"))
        self._abort()
        faults = self._read_faults(range(self.world_size), wait=1.0)
        lines = [f"  rank {self.ranks[peer]} gave up in call #{fault.sequence}, {fault.text}" for peer, fault in sorted(faults.items())]
        silent = [self.ranks[i] for i in range(self.world_size) if i != self.rank_in_group and i not in faults]
        if silent:
            named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
            lines.append(f"  no word from {named}: late, dead, or elsewhere in the program")
        message = head + ":\n" + "\n".join(lines)
        differs = any(fault.kind == "timeout" and fault.at != f"{call.sequence} {what}" for fault in faults.values())
        kind: type[CollectiveError] = CollectiveMismatchError if differs else CollectiveTimeoutError
        raise self._remember(kind(message, **call.facts)) from None

    def _lost(self, call: Call, what: str, error: PeerClosed) -> NoReturn:
        if self._closed:
            raise ContextClosedError(f"{call.where}: its context was closed during the call") from None
        # Its deadline may have passed: then the connection closes a moment before it has told why.
        faults = self._read_faults([error.peer], wait=0.25)
        fault = faults.get(error.peer) or next(iter(faults.values()), None)
        at = place()
        lost: int | None = self.ranks[error.peer]
        kind: type[CollectiveError] = PeerLostError
        during = f"call #{call.sequence}, {what}, at {at}"
        if fault is None:
            message = f"{call.where}: rank {lost} is gone (died, or closed its side) during {during}: {error.reason}"
        else:
            kind = {"timeout": CollectiveTimeoutError, "mismatch": CollectiveMismatchError}.get(fault.kind, PeerLostError)
            lost = fault.lost
            gone = f"rank {lost} is gone (a peer reported it in its call #{fault.sequence})"
            gave_up = f"rank {self.ranks[error.peer]} gave up in call #{fault.sequence}, {fault.text}"
            message = f"{call.where}: ended in {during}, because {gave_up if lost is None else gone}"
        self._publish(_Fault(fault.kind if fault else "lost", f"{call.sequence} {what}", lost, call.sequence, f"{what} at {at}"))
        self._abort()
        raise self._remember(kind(message, **call.facts | ({} if lost is None else {"rank": lost}))) from None

    def _differ(self, call: Call, what: str, error: CallsDiffer) -> NoReturn:
        """Each rank says what it called, and reads what the others did."""
        strategy, n, me = self.comparing, self.world_size, self.rank_in_group
        said: dict[int, str] = {me: f"call #{call.sequence}, {what}, at {place()}"}
        if strategy is not None:
            strategy.post_note(said[me])
            deadline = time.monotonic() + 1.0
            while len(said) < n and time.monotonic() < deadline:
                said |= {peer: note for peer in range(n) if peer not in said and (note := strategy.read_note(peer)) is not None}
                time.sleep(0.001)
        lines = [f"  rank {self.ranks[peer]}: {said.get(peer, 'has not said what it called')}" for peer in range(n)]
        self._break(
            call,
            CollectiveMismatchError(f"{call.where}: the ranks of the group called different things:\n" + "\n".join(lines), **call.facts),
            what,
        )

    def _break(self, call: Call, error: CollectiveError, what: str) -> NoReturn:
        kind = (
            "mismatch" if isinstance(error, CollectiveMismatchError) else "timeout" if isinstance(error, CollectiveTimeoutError) else "lost"
        )
        lost = error.rank if isinstance(error, PeerLostError) else None
        self._publish(_Fault(kind, f"{call.sequence} {what}", lost, call.sequence, f"{what}: {error}"))
        self._abort()
        raise self._remember(error)

    def _remember(self, error: CollectiveError) -> CollectiveError:
        if self._broken is None:
            self._broken = error
        return error

    def _publish(self, fault: _Fault) -> None:
        # The job may be falling apart, its store with it: what cannot be said is left unsaid.
        if self._store is not None and self._broken is None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"fault/{self.rank_in_group}", json.dumps(attrs.asdict(fault)))

    def _read_faults(self, awaited: Sequence[int], *, wait: float) -> dict[int, _Fault]:
        """What the peers left, waiting up to `wait` seconds for those of `awaited`."""
        missing = set(awaited) - {self.rank_in_group}
        found: dict[int, _Fault] = {}
        deadline = time.monotonic() + wait
        with contextlib.suppress(RuntimeError):
            while self._store is not None:
                for peer in range(self.world_size):
                    if peer != self.rank_in_group and peer not in found and self._store.check([f"fault/{peer}"]):
                        found[peer] = _Fault(**json.loads(self._store.get(f"fault/{peer}")))
                if missing <= found.keys() or time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        return found

    # Life.

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def join(self, coordinator: GroupCoordinator) -> None:
        """Adds a coordinator at build."""
        self.coordinators = (*self.coordinators, coordinator)
        self._open.add(coordinator.name)

    def leave(self, name: str) -> None:
        """One coordinator is closed; the last one takes the connections along."""
        with self._lock:
            self._open.discard(name)
            last = not self._open
        if last:
            self.close()

    def _abort(self) -> None:
        for communicator in self.communicators:
            communicator.abort()
        if self._order is not None:
            self._order.abort()

    def sibling(self, name: str) -> GroupLink:
        """A link of the same ranks, made like this one. Collective: whole, or an error on every rank."""
        assert self._again is not None
        self.siblings = [one for one in self.siblings if not one._link.is_closed]
        number, self._begotten = self._begotten, self._begotten + 1
        ident, what = f"{self.ident}/sibling {number}", f"sibling {name!r} of group {self.ident}"
        if self._store is None:
            return self._again(ident)
        store = dist.PrefixStore(f"sibling/{number}", self._store)

        def tell(step: str, facts: Mapping[str, str], **failed: Any) -> None:
            place = dist.PrefixStore(step, store)
            agree(place, self.rank_in_group, self.world_size, facts, what=what, timeout=self._build_timeout, **failed)

        tell("begin", {"its name": name})
        try:
            link = self._again(ident)
        except BaseException as error:
            follows = isinstance(error, PeerLeftError)
            with contextlib.nullcontext() if follows else contextlib.suppress(BuildError):
                tell("end", {}, error=f"{type(error).__name__}: {error}", follows=follows)
            raise
        try:
            tell("end", {"its strategies": repr(dict(link.table))})
        except BaseException:
            link.close()
            raise
        return link

    @property
    def cpu_group(self) -> dist.ProcessGroup | None:
        """torch's process group of host tensors; None for one rank."""
        return None if self.transport is None else self.transport.process_group

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """torch's process group of device tensors, where a backend serves them; else that of host tensors."""
        return next((c.process_group for c in self.communicators if c.process_group is not None), self.cpu_group)

    def torch_group(self, kind: str, tell: Callable[[int], Sequence[int]]) -> dist.ProcessGroup:
        """`device_group` or `cpu_group`, in the tables of torch.distributed until this is closed. Collective the first time.

        Args:
            kind: "device" or "cpu".
            tell: gives a rank's number to all ranks and returns those of all.
        """
        group = self.cpu_group if kind == "cpu" else self.device_group
        if group is None:
            group = next(iter(self._torch_groups), None)
        if group is None or group not in self._torch_groups:
            ranks = tell(dist.get_rank())
            store = dist.HashStore() if self._store is None else self._store
            if group is None:
                backend = compat.make_gloo(store, 0, 1, timedelta(seconds=self.host_timeout), compat.gloo_device(loopback=True))
                group = compat.wrap(store, 0, 1, backend, _HOST)
            device = "" if group is self.cpu_group or self.cpu_group is None else " device"
            compat.enter_tables(group, f"commgraph {self.ident}{device}", ranks, store)
            self._torch_groups.append(group)
        return group

    def break_off(self, call: Call, why: str) -> None:
        """Ends the group because of an error outside of any call, so that the peers, who go on, raise as well. Sends nothing to them."""
        with self._failing:
            if self._broken is None and self.world_size > 1:
                self._publish(_Fault("lost", f"{call.sequence} {why}", self.ranks[self.rank_in_group], call.sequence, why))
                self._abort()
                self._remember(PeerLostError(f"{call.where}: {why}", **call.facts))

    def abort(self) -> None:
        """Ends what runs on this group, here and on the peers. From any thread."""
        self._closed = True
        self._abort()

    def close(self) -> None:
        """Releases everything this rank holds, without communicating. Idempotent."""
        self._closed = True
        for sibling in self.siblings:
            sibling.close()
        self.siblings = []
        self._again = None
        for group in self._torch_groups:
            compat.leave_tables(group)
        self._torch_groups = []
        for communicator in self.communicators:
            communicator.close()
        # Their jobs have ended, or do now: with an error.
        deadline = time.monotonic() + 1.0
        for lane in self._lanes.values():
            lane.join(max(deadline - time.monotonic(), 0.0))
        self.mailbox = None
        self.messages = None
        self.transport = None
        self._store = None
        # Coordinators know their link: without this the two would keep each other, and the memory, until garbage is collected.
        self.coordinators = ()
        # Its traceback would hold what was released.
        self._broken = None
