"""Construction of a group: its connections, its strategies, and the `GroupState` of the coordinators over its ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.accelerators.custom_all_reduce import PeerAccessCache
from commgraph.accelerators.device_order import DeviceOrder
from commgraph.agreement import PeerLeftError, agree
from commgraph.communicators.base import Communicator, Limits, PeerClosed, PeerLate, Refused
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.coordinator.state import GroupState, Members, Network, Strategies, Timeouts
from commgraph.errors import BackendUnavailableError, BuildError
from commgraph.hosts import Hosts
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.detection import Plugins
from commgraph.waiting import await_keys, interruptible

__all__ = ["CONNECTING", "Builder", "Connection", "States"]

# Prefix of the keys with which gloo connects a group. It has two parts, where names of the user's have one.
CONNECTING = "gloo/connect"

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

    def abort(self) -> None:
        """End the calls on all groups with an error, here and on the peers. From any thread."""
        for state in tuple(self._states):
            state.abort()

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
    transport: GlooTransport


@attrs.frozen
class Builder:
    """Makes the groups of one world.

    Attributes:
        store: the world's own prefix of the store.
        rank: this rank.
        hosts: the node map.
        labelled: the nodes are simulated ones of a test: all ranks share this machine's loopback network.
        timeout: deadline of a build and default deadline of operations.
        authkey: secret of the job, or None.
        states: of live groups.
        proofs: results of probes of device memory between ranks.
        order: in which checked calls on the device are compared.
    """

    store: dist.Store
    rank: int
    hosts: Hosts
    labelled: bool
    timeout: timedelta
    authkey: bytes | None = attrs.field(repr=False)
    states: States
    proofs: PeerAccessCache = attrs.field(factory=PeerAccessCache)
    order: DeviceOrder = attrs.field(factory=DeviceOrder)

    # Whether what it makes has to be closed.
    holds_something: ClassVar[bool] = True

    def agree(self, store: dist.Store, facts: Mapping[str, str], *, what: str, error: str = "", follows: bool = False) -> None:
        """`commgraph.agreement.agree` among all ranks of the world, until the deadline of a build."""
        agree(store, self.rank, len(self.hosts.nodes), facts, what=what, timeout=self.timeout, error=error, follows=follows)

    def connect(self, uid: str, ranks: tuple[int, ...]) -> Connection | None:
        """Connect the ranks of one group. Collective over them; return None for one rank, which needs no connection.

        Args:
            uid: unique among the groups that this world has built; equal on the ranks of the group.
            ranks: global ranks in group order, this one among them.

        Raises:
            BackendUnavailableError: torch has no gloo.
            BuildError: the connections could not be made.
        """
        if len(ranks) == 1:
            return None
        if not compat.gloo_available():
            raise BackendUnavailableError("this torch was built without gloo, which carries host tensors and objects between ranks")
        store = dist.PrefixStore(f"group/{hashlib.sha256(uid.encode()).hexdigest()[:32]}", self.store)
        self._check_descriptors(uid, len(ranks))
        self._meet(uid, store, ranks)
        return Connection(store, self._connect(uid, dist.PrefixStore(CONNECTING, store), ranks, ranks.index(self.rank)))

    def keep_order(self, store: dist.Store) -> None:
        """Connect the `DeviceOrder`, at its first use and after it was broken. Collective over the world.

        Args:
            store: of this build.
        """
        everyone = range(len(self.hosts.nodes))
        keys = [f"order/{rank}" for rank in everyone]
        store.set(keys[self.rank], str(int(self.order.is_fine)))
        await_keys(store, keys, self.timeout)
        if all(store.get(key) == b"1" for key in keys):
            return
        connection = self.connect(f"device order {self.order.connections}", tuple(everyone))
        if connection is not None:
            self.order.connect(connection.transport)

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
            limits = Limits(timeouts.host, self.timeout.total_seconds(), self.hosts.local_size, device_timeout)
            store = dist.PrefixStore("strategies", connection.store)
            facts = GroupFacts(ranks, rank_in_group, nodes, options, wants_device, limits, store, device, self.proofs, partition)
            chain = self._chain(uid, platform, facts, connection, plugins)
            live = [one for one in chain if isinstance(one, Communicator)]
            strategies = Strategies(members, live, [one for one in chain if isinstance(one, Refused)])
            network = Network(connection.transport, connection.store, self._key(ranks))
            check, experts = options.check, options.experts
            state = GroupState(members, strategies, network, timeouts, check=check, experts=experts, rebuild=rebuild, **on_device)
        except BaseException:
            connection.transport.close()
            raise
        self.states.add(state)
        return state

    def _sibling(self, of: GroupState, name: str, *, platform: Platform, options: CommunicatorOptions, **kind: Any) -> GroupState:
        """Make a state of the same ranks with communicators of their own. Collective: whole, or an error on every rank."""
        members = of.members
        number = of.count("siblings")
        uid, what = f"{members.uid}/sibling {number}", f"sibling {name!r} of group {members.uid}"

        def make() -> GroupState:
            return self.state(uid, members.ranks, self.connect(uid, members.ranks), platform, options, **kind)

        if of.network is None:
            return make()
        store = dist.PrefixStore(f"sibling/{number}", of.network.store)

        def report(step: str, facts: Mapping[str, str], **failed: Any) -> None:
            prefix = dist.PrefixStore(step, store)
            agree(prefix, members.rank_in_group, members.world_size, facts, what=what, timeout=self.timeout, **failed)

        report("begin", {"its name": name})
        try:
            state = make()
        except BaseException as error:
            follows = isinstance(error, PeerLeftError)
            with contextlib.nullcontext() if follows else contextlib.suppress(BuildError):
                report("end", {}, error=f"{type(error).__name__}: {error}", follows=follows)
            raise
        try:
            report("end", {"its strategies": repr(dict(state.strategies.table))})
        except BaseException:
            state.close()
            raise
        return state

    def _chain(
        self, uid: str, platform: Platform, facts: GroupFacts, connection: Connection, plugins: Plugins
    ) -> Sequence[Communicator | Refused]:
        try:
            chain = [*plugins.strategies(facts, connection.transport), *platform.communicators(facts, connection.transport)]
            return [_only_by_kind(one) for one in chain] if facts.options.deterministic else chain
        except (PeerClosed, PeerLate) as error:
            why = f"({error.reason})" if isinstance(error, PeerClosed) else f"within {self.timeout.total_seconds():g} s"
            raise PeerLeftError(
                f"rank {self.rank}: group {uid}: rank {facts.ranks[error.peer]} did not take part in making its strategies {why}"
            ) from error

    def _meet(self, uid: str, store: dist.Store, ranks: Sequence[int]) -> None:
        """Wait until all ranks have come. gloo would wait as well, but its error names no missing rank."""
        keys = [f"here/{rank}" for rank in ranks]
        try:
            store.set(f"here/{self.rank}", "")
            await_keys(store, keys, self.timeout)
        except RuntimeError as error:
            missing = [str(rank) for rank, key in zip(ranks, keys, strict=True) if not _is_there(store, key)]
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:16])}{'...' if len(missing) > 16 else ''}"
            raise BuildError(
                f"rank {self.rank}: group {uid}: {names} of the group's {len(ranks)} did not come within "
                f"{self.timeout.total_seconds():g} s. Building is collective: every rank makes the same calls in the same order ({error})"
            ) from error

    def _connect(self, uid: str, store: dist.Store, ranks: Sequence[int], rank_in_group: int) -> GlooTransport:
        try:
            device = compat.gloo_device(loopback=self._share_loopback(ranks))
            # Left behind at the deadline, which gloo takes for that of each of its steps.
            return interruptible(
                lambda _: GlooTransport(store, rank_in_group, len(ranks), timeout=self.timeout, device=device), self.timeout.total_seconds()
            )
        except (RuntimeError, TimeoutError) as error:
            members = f"{len(ranks)} ranks {tuple(ranks[:8])}{'...' if len(ranks) > 8 else ''}"
            raise BuildError(
                f"rank {self.rank}: group {uid} of {members} could not connect within {self.timeout.total_seconds():g} s: {error}"
            ) from error

    def _check_descriptors(self, uid: str, size: int) -> None:
        """Raise if too few descriptors are left: gloo ends the process when its listener runs out of them."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/dev/fd"))
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
        return self.labelled or len({self.hosts.nodes[rank] for rank in ranks}) == 1

    def _key(self, ranks: Sequence[int]) -> bytes | None:
        """Return the key that authenticates pickled objects in this group: the job's, else that of the node if all ranks are on it."""
        if self.authkey is not None:
            return self.authkey
        return self.hosts.node_key if all(self.hosts.nodes[rank] == self.hosts.node_rank for rank in ranks) else None


def _only_by_kind(one: Communicator | Refused) -> Communicator | Refused:
    """Replace a size-dependent strategy by a `Refused`."""
    if isinstance(one, Refused) or not one.size_dependent:
        return one
    one.close()
    return Refused(one.name, "options.deterministic=True, and it serves some sizes only")


def _is_there(store: dist.Store, key: str) -> bool:
    try:
        return store.check([key])
    except RuntimeError:  # the store itself is gone
        return False
