"""Construction of a group: its connections, its strategies, and the `GroupState` of the coordinators over its ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist

from commgraph import ambient, compat
from commgraph.accelerators.custom_all_reduce import PeerAccessCache
from commgraph.accelerators.device_order import DeviceOrder
from commgraph.agreement import agree
from commgraph.communicators.base import Communicator, Limits, PeerClosed, PeerLate, Refused
from commgraph.communicators.endpoint import Endpoint
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.communicators.tags import SETUP, make_tag
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.communicators.transport import Transport
from commgraph.coordinator.recorded import GroupRecords
from commgraph.coordinator.state import GroupState, Members, Network, Strategies, Timeouts
from commgraph.deadline import Deadline
from commgraph.errors import BackendUnavailableError, BuildError, ConfigurationError
from commgraph.forks import keep_for_ever
from commgraph.hosts import Hosts
from commgraph.meeting import STORE_ERRORS, Meeting, PeerLeftError, attend
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.detection import Plugins
from commgraph.processes import Process, count_sharing
from commgraph.reach import Reach
from commgraph.recording import Recording

__all__ = ["CONNECTING", "Builder", "Connection", "States"]

# Prefix of the keys with which gloo connects a group. It has two parts, where names of the user's have one.
CONNECTING = "gloo/connect"

_LOOPBACK = "127.0.0.1"

# Seconds that the store may take, at most, to take why this rank leaves its groups.
_ANNOUNCE_SECONDS = 0.5

# Descriptors of a gloo device and its listener, beside one for each peer.
_SPARE_DESCRIPTORS = 8


class States:
    """The live groups of a world, to be dropped when the interpreter exits if they were not closed."""

    def __init__(self) -> None:
        self._states: list[GroupState] = []
        self._lock = threading.Lock()

    def add(self, state: GroupState) -> None:
        """Add a group that was just connected."""
        with self._lock:
            self._states.append(state)

    def prune(self) -> None:
        """Remove groups that were closed."""
        with self._lock:
            self._states = [state for state in self._states if not state.is_closed]

    def announce(self, why: str) -> None:
        """Write for the peers why this rank is about to leave all groups. Never raises, waits little."""

        def job(is_left: Callable[[], bool]) -> None:
            for state in tuple(self._states):
                if not is_left():
                    state.failures.announce(state.sequence, why)

        with contextlib.suppress(TimeoutError, *STORE_ERRORS):
            attend(job, Deadline.after(_ANNOUNCE_SECONDS), grace=0)

    def abort(self) -> None:
        """End the calls on all groups with an error, here and on the peers. From any thread."""
        for state in tuple(self._states):
            state.abort()

    def disown(self) -> None:
        """Give up all groups, in a forked child."""
        keep_for_ever(self)
        self._lock = threading.Lock()
        for state in tuple(self._states):
            state.disown()

    def release(self) -> None:
        """Drop all groups on this rank; nothing is sent."""
        for state in tuple(self._states):
            state.close()
        self.prune()


@attrs.frozen
class Connection:
    """The ranks of one group, connected.

    Attributes:
        store: holds this group's keys only.
        transport: to every other rank.
    """

    store: dist.Store
    transport: Transport


@attrs.frozen
class Builder:
    """Makes the groups of one world.

    Attributes:
        store: the world's own prefix of the store.
        rank: this rank.
        hosts: the node map.
        label: simulated node of this rank, in a test: all ranks share this machine's loopback network; else empty.
        timeout: deadline of a build and default deadline of operations.
        authkey: secret of the job, or None.
        states: of live groups.
        me: this process.
        processes: of all ranks.
        reach: where the ranks listen, if all have the native module; else None.
        address: of this host, at which gloo listens for other hosts.
        given: the address or interface that the caller named, if any.
        proofs: results of probes of device memory between ranks.
        order: in which checked calls on the device are compared.
        options: of the world's own group.
        recording: of the calls of this rank.
        name: of the world, which no other has.
    """

    store: dist.Store
    rank: int
    hosts: Hosts
    label: str
    timeout: timedelta
    authkey: bytes | None = attrs.field(repr=False)
    states: States
    me: Process
    processes: Sequence[Process]
    reach: Reach | None = None
    address: str = _LOOPBACK
    given: str | None = None
    proofs: PeerAccessCache = attrs.field(factory=PeerAccessCache)
    order: DeviceOrder = attrs.field(factory=DeviceOrder)
    options: CommunicatorOptions = attrs.field(factory=CommunicatorOptions)
    recording: Recording = attrs.field(factory=Recording)
    name: str = ""

    # Whether what it makes has to be closed.
    holds_something: ClassVar[bool] = True

    @property
    def owned_endpoint(self) -> Endpoint | None:
        """Where this rank listens, if this is not a part of a world, which shares it."""
        return None if self.reach is None or self.reach.name else self.reach.endpoint

    def start_record(self, asked: Iterable[CommunicatorOptions], local_rank: int, meeting: Meeting) -> None:
        """Make the record of this rank's calls, if a group asks for it. Collective over the world, whose ranks ask alike.

        Args:
            asked: options of the groups.
            local_rank: of this rank.
            meeting: of the build.

        Raises:
            ConfigurationError: they ask for several places.
            BackendUnavailableError, BuildError: the record cannot be made.
        """
        settings = {setting: options for options in asked if (setting := options.recorded(os.environ))}
        if len(settings) > 1:
            raise ConfigurationError(f"groups ask for records in several places, {sorted(map(str, settings))}: a world has one record")
        for setting, options in settings.items():
            self.recording.start(
                setting, options.record_calls, world=self.name, rank=self.rank, hosts=self.hosts, local_rank=local_rank, meeting=meeting
            )

    def meeting(self, store: dist.Store, what: str) -> Meeting:
        """Return the meeting of all ranks of the world in which something is built now.

        Args:
            store: of this build.
            what: is built, for messages.
        """
        everyone, deadline = range(len(self.hosts.nodes)), Deadline.after(self.timeout.total_seconds())
        return Meeting(store, store, everyone, self.rank, what, deadline, self.me, self.processes, world=self.store)

    @ambient.lasting()
    def connect(self, uid: str, ranks: tuple[int, ...], meeting: Meeting, options: CommunicatorOptions) -> Connection | None:
        """Connect the ranks of one group. Collective over them; return None for one rank, which needs no connection.

        Args:
            uid: unique among the groups that this world has built; equal on the ranks of the group.
            ranks: global ranks in group order, this one among them.
            meeting: of the build.
            options: of the group.

        Raises:
            BackendUnavailableError: torch has no gloo.
            BuildError: the connections could not be made.
        """
        if len(ranks) == 1:
            return None
        store = dist.PrefixStore(f"group/{hashlib.sha256(uid.encode()).hexdigest()[:32]}", self.store)
        part = meeting.among(ranks, store, f"group {uid}")
        is_whole_in_memory = options.shm and options.message_queue
        # A link is made while both ranks wait for it, which nobody does who waits in shared memory: on one host links are for groups whose
        # calls all go through that, and carry the messages of the build.
        if self.reach is not None and (is_whole_in_memory or len({self.hosts.nodes[rank] for rank in ranks}) > 1):
            return Connection(store, self._link(uid, part, self.reach))
        self.check_descriptors(uid, len(ranks))
        # gloo would wait for the ranks as well, but its error names no missing one.
        part.exchange("here", b"")
        return Connection(store, self.connect_gloo(uid, part))

    @ambient.lasting()
    def keep_order(self, meeting: Meeting) -> None:
        """Connect the `DeviceOrder`, at its first use and after it was broken. Collective over the world.

        Args:
            meeting: of the build.
        """
        if all(said == b"1" for said in meeting.exchange("order", b"1" if self.order.is_fine else b"0")):
            return
        connection = self.connect(f"device order {self.order.connections}", tuple(meeting.ranks), meeting, CommunicatorOptions())
        if connection is not None:
            self.order.connect(connection.transport)

    @ambient.lasting()
    def state(
        self,
        uid: str,
        ranks: tuple[int, ...],
        connection: Connection | None,
        platform: Platform,
        options: CommunicatorOptions,
        *,
        wants_device: bool,
        device: torch.device,
        plugins: Plugins,
        partition: Callable[[], Sequence[Sequence[int]]],
        deadline: Deadline,
    ) -> GroupState:
        """Make the strategies of a group, on its connection, which is closed if that fails.

        Args:
            uid, ranks: as for `connect`.
            connection: the result of `connect` for them.
            platform: chooses the strategies.
            options: of this group.
            wants_device: whether the group serves device tensors too.
            device: of this rank.
            plugins: strategies of other packages that may serve it.
            partition: gives the global ranks of all groups of this kind.
            deadline: of the build.

        Raises:
            BackendUnavailableError: the platform has no strategy that serves the options.
        """
        host_timeout = options.host_timeout or options.timeout or self.timeout
        device_timeout = (options.timeout or self.timeout).total_seconds()
        rebuild = functools.partial(
            self._sibling,
            platform=platform,
            options=options,
            wants_device=wants_device,
            device=device,
            plugins=plugins,
            partition=partition,
        )
        on_device: dict[str, Any] = {
            "device": device,
            "streams": platform.streams(device),
            "order": self.order if self.order.connections else None,
        }
        timeouts = Timeouts(host_timeout.total_seconds(), device_timeout)
        rank_in_group = ranks.index(self.rank)
        members = Members(uid, ranks, rank_in_group)
        if connection is None:
            return GroupState(members, Strategies(members), None, timeouts, rebuild=rebuild, **on_device)
        try:
            nodes = tuple(self.hosts.nodes[rank] for rank in ranks)
            # The ranks of this node have the key because they have read each other's memory.
            key = hmac.digest(self.hosts.node_key, self.authkey or b"", hashlib.sha256)
            sharing = count_sharing(self.processes[rank].pid for rank in self.hosts.local_ranks)
            limits = Limits(timeouts.host, deadline.left(), sharing, device_timeout, key)
            store = dist.PrefixStore("strategies", connection.store)
            facts = GroupFacts(ranks, rank_in_group, nodes, options, wants_device, limits, store, device, self.proofs, partition)
            chain = self._chain(uid, platform, facts, connection, plugins)
            live = [one for one in chain if isinstance(one, Communicator)]
            strategies = Strategies(members, live, [one for one in chain if isinstance(one, Refused)])
            gloo = functools.partial(self._own_gloo, connection.store, uid, ranks)
            lazy = functools.partial(self._lazy_gloo, connection.store, ranks, timeouts.host)
            network = Network(connection.transport, connection.store, self._key(ranks), gloo, lazy)
            check, experts = options.check, options.experts
            state = GroupState(members, strategies, network, timeouts, check=check, experts=experts, rebuild=rebuild, **on_device)
        except BaseException:
            connection.transport.close()
            raise
        if (recorder := self.recording.recorder) is not None and options.recorded(os.environ):
            state.records = GroupRecords(recorder, uid, ranks, rank_in_group)
        self.states.add(state)
        return state

    def _own_gloo(self, store: dist.Store, uid: str, ranks: tuple[int, ...]) -> GlooTransport:
        """Connect gloo beside a transport of another kind, for torch's process group. Collective over the ranks."""
        apart, what = dist.PrefixStore("torch", store), f"torch's group of {uid}"
        self.check_descriptors(uid, len(ranks))
        return self.connect_gloo(uid, self.meeting(apart, what).among(ranks, apart, what))

    def _lazy_gloo(self, store: dist.Store, ranks: tuple[int, ...], timeout: float) -> dist.ProcessGroup:
        """Return torch's process group over gloo whose connections are made as torch uses them. Not collective."""
        device = compat.gloo_device(_LOOPBACK if self._share_loopback(ranks) else self.address, is_lazy=True)
        apart = dist.PrefixStore("torch/lazy", store)
        n, me = len(ranks), ranks.index(self.rank)
        backend = compat.make_gloo(apart, me, n, timedelta(seconds=timeout), device)
        return compat.wrap(apart, me, n, backend, torch.device("cpu"))

    def _sibling(self, of: GroupState, name: str, *, platform: Platform, options: CommunicatorOptions, **kind: Any) -> GroupState:
        """Make a state of the same ranks with communicators of their own. Collective: whole, or an error on every rank."""
        members = of.members
        number = of.count("siblings")
        uid, what = f"{members.uid}/sibling {number}", f"sibling {name!r} of group {members.uid}"
        store = dist.PrefixStore(f"sibling/{number}", self.store if of.network is None else of.network.store)
        meeting = attrs.evolve(self.meeting(store, what), ranks=members.ranks, rank=members.rank_in_group)
        with meeting.reporting():
            if not isinstance(name, str) or not name:
                raise ValueError(f"{what} (rank {members.rank}): name={name!r}: a non-empty string is needed")
            agree(meeting.at("begin"), {"its name": name})
            connection = self.connect(uid, members.ranks, meeting, options)
            state = self.state(uid, members.ranks, connection, platform, options, deadline=meeting.deadline, **kind)
            try:
                agree(meeting.at("end"), {"its strategies": repr(dict(state.strategies.table))})
            except BaseException:
                state.close()
                raise
        meeting.clean()
        return state

    def _chain(
        self, uid: str, platform: Platform, facts: GroupFacts, connection: Connection, plugins: Plugins
    ) -> Sequence[Communicator | Refused]:
        try:
            chain = [*plugins.strategies(facts, connection.transport), *platform.communicators(facts, connection.transport)]
            return [_only_by_kind(one) for one in chain] if facts.options.deterministic else chain
        except (PeerClosed, PeerLate) as error:
            why = f"({error.reason})" if isinstance(error, PeerClosed) else f"within {facts.limits.build_timeout:.3g} s"
            told = f"rank {facts.ranks[error.peer]} did not take part in making its strategies {why}"
            # Whoever notices a death leaves as well, and must not be blamed by the others.
            dead = [rank for rank in facts.ranks if self.me.can_watch(self.processes[rank]) and self.processes[rank].has_ended()]
            if dead:
                told = f"rank {dead[0]} (process {self.processes[dead[0]].pid}) died while its strategies were made"
            raise PeerLeftError(f"rank {self.rank}: group {uid}: {told}") from error

    def _link(self, uid: str, part: Meeting, reach: Reach) -> TcpTransport:
        """Return a transport whose links are made at their first use, but for one to the nearest rank of another host on either side.

        These are made now, so that a host that cannot be reached is named now.
        """
        n, me = len(part.ranks), part.rank
        transport = reach.transport(uid, part.ranks, me)
        part.ends.append(transport.abort)
        nodes = [self.hosts.nodes[rank] for rank in part.ranks]
        # The nearest rank may have other nearest ones: whoever has this rank as one links to it, too, and both sides wait for the link.
        near = [i for i in range(n) if i in _nearest(nodes, me) or me in _nearest(nodes, i)]
        if not near:
            return transport
        try:
            part.attend(lambda is_left: transport.net_for(make_tag(SETUP, 0), near, part.deadline))
        except (PeerLate, PeerClosed, TimeoutError) as error:
            transport.close()
            peer = error.peer if isinstance(error, PeerLate | PeerClosed) else near[0]
            host, port = reach.addresses[part.ranks[peer]]
            why = error.reason if isinstance(error, PeerClosed) else f"it did not answer within {part.waited()}"
            raise BuildError(
                f"rank {self.rank}: group {uid}: no connection to rank {part.ranks[peer]}, which listens at {host} port {port}: {why}. "
                "Where that is the wrong address of its host, name another there by address=, COMMGRAPH_ADDRESS or GLOO_SOCKET_IFNAME"
            ) from None
        except BaseException:
            transport.close()
            raise
        return transport

    def connect_gloo(self, uid: str, part: Meeting) -> GlooTransport:
        """Connect a gloo group. Collective over the ranks of `part`."""
        if not compat.gloo_available():
            raise BackendUnavailableError("this torch was built without gloo, which carries host tensors and objects between ranks")
        n = len(part.ranks)
        device = compat.gloo_device(_LOOPBACK if self._share_loopback(part.ranks) else self.address)
        store = dist.PrefixStore(CONNECTING, part.store)
        part.leavings.append((store, f"0/{part.rank}"))  # gloo's key, of its only device

        def connect(is_left: Callable[[], bool]) -> GlooTransport:
            left = timedelta(seconds=part.deadline.left())
            made = GlooTransport(store, part.rank, n, timeout=self.timeout, device=device, connect_timeout=left)
            if is_left():
                made.close()
            return made

        try:
            return part.attend(connect)
        except PeerLeftError:
            raise
        except (RuntimeError, TimeoutError) as error:
            members = f"{n} ranks {tuple(part.ranks[:8])}{'...' if n > 8 else ''}"
            raise BuildError(
                f"rank {self.rank}: group {uid} of {members} could not connect, {part.waited()} after this rank had begun: {error}"
            ) from error

    def check_descriptors(self, uid: str, size: int) -> None:
        """Raise if too few descriptors are left for so many ranks: gloo ends the process when its listener runs out of them."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = _open_files(limit)
        needed = size + _SPARE_DESCRIPTORS
        if limit != resource.RLIM_INFINITY and limit - used < needed:
            raise BuildError(
                f"rank {self.rank}: group {uid} of {size} ranks needs about {needed} more open files; {used} are open and {limit} are "
                "allowed: raise the limit (ulimit -n), or close contexts that are not used"
            )

    def _share_loopback(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks share 127.0.0.1; alike on all of them."""
        if len({self.hosts.networks[rank] for rank in ranks}) > 1:
            return False
        return bool(self.label) or len({self.hosts.nodes[rank] for rank in ranks}) == 1

    def _key(self, ranks: Sequence[int]) -> bytes | None:
        """Return the key that authenticates pickled objects in this group: the job's, else that of the node if all ranks are on it."""
        if self.authkey is not None:
            return self.authkey
        return self.hosts.node_key if all(self.hosts.nodes[rank] == self.hosts.node_rank for rank in ranks) else None


def _nearest(nodes: Sequence[int], rank: int) -> set[int]:
    """Return the nearest ranks on other hosts, ahead of a rank and behind it; none on one host."""
    n = len(nodes)
    if len(set(nodes)) == 1:
        return set()
    return {next((rank + i * step) % n for i in range(1, n) if nodes[(rank + i * step) % n] != nodes[rank]) for step in (1, -1)}


def _only_by_kind(one: Communicator | Refused) -> Communicator | Refused:
    """Replace a size-dependent strategy by a `Refused`."""
    if isinstance(one, Refused) or not one.size_dependent:
        return one
    one.close()
    return Refused(one.name, "options.deterministic=True, and it serves some sizes only")


def _open_files(limit: int) -> int:
    """Return how many descriptors are open; without ``/dev/fd``, as without ``/proc``, the lowest free one: no more are open below it."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        pass
    try:
        free = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # there is none
        return limit
    os.close(free)
    return free
