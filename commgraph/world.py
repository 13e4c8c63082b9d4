"""`World`: the processes of one job, and the factory of contexts."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self, overload

import attrs
import torch
import torch.distributed as dist

from commgraph import admission, ambient, compat, launch
from commgraph.accelerators.custom_all_reduce import PeerAccessCache
from commgraph.accelerators.device_order import DeviceOrder
from commgraph.addresses import ticket_at
from commgraph.agreement import agree
from commgraph.assembly import Terms, assemble, check_options, check_rank, open_meeting_point
from commgraph.building import Builder, States
from commgraph.colors import ranks_of_color
from commgraph.communicators.endpoint import Endpoint
from commgraph.context import CLOSE_TIMEOUT, ParallelContext, build_context, build_coordinator, close_together
from commgraph.coordinator import GroupCoordinator
from commgraph.deadline import Deadline, seconds_of
from commgraph.errors import (
    BackendUnavailableError,
    ConfigurationError,
    ContextClosedError,
    LaunchError,
    LayoutError,
)
from commgraph.forks import disown_in_children, explain_fork
from commgraph.layout import Layout
from commgraph.layout.checks import whole
from commgraph.meeting import Meeting, end_builds, listing
from commgraph.membership import Latecomers, Membership, View
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import Platform
from commgraph.platforms.detection import Plugins
from commgraph.recording import Recording
from commgraph.rendezvous import PrivateFile, open_store, serve_store
from commgraph.waiting import wait_for_calls

__all__ = ["World"]

logger = logging.getLogger("commgraph")

_TIMEOUT = timedelta(minutes=10)
# Seconds for which `close` waits for the other ranks at most, where a group was broken.
_PATIENCE = 2.0
# And where it has waited in vain for them just before, no longer ago than this, to close a context.
_AGAIN, _JUST_BEFORE = 0.5, 10.0
# How long `survivors` waits for ranks that seem to be alive and do not come.
_LATE = timedelta(seconds=30)


@attrs.define
class _State:
    """The mutable state of a World."""

    lock: threading.Lock = attrs.field(factory=threading.Lock)
    contexts: dict[str, ParallelContext] = attrs.field(factory=dict)
    splits: list[World] = attrs.field(factory=list)
    # Builds begun, by name; every rank counts alike, since building is collective.
    begun: dict[str, int] = attrs.field(factory=dict)
    closed: bool = False
    # Whether a group of a context that was closed had been broken.
    was_broken: bool = False
    # When this rank last waited in vain for the others to close a context.
    missed_at: float = -math.inf
    # Of the process that made the world, and whether this is the copy of a forked child.
    pid: int = attrs.field(factory=os.getpid)
    is_inherited: bool = False
    # The meeting file that this World uses, where it is commgraph's to remove.
    file: PrivateFile | None = None
    # For ranks of the worlds before that were counted out.
    latecomers: list[Latecomers] = attrs.field(factory=list)

    def count(self, what: str) -> int:
        with self.lock:
            number = self.begun.get(what, 0)
            self.begun[what] = number + 1
            return number


class World:
    """The processes (or threads) of one job, as one of them sees it. Makes contexts; needs and makes no default process group of torch.

    Several may live in one process, also one per thread. Close it, or use it in a ``with`` statement: leaving that by an exception
    drops the connections at once, so that the other ranks end with `PeerLostError` and do not wait.

    Attributes:
        rank: global rank, 0 to ``size - 1``.
        size: number of ranks.
        local_rank: number of this rank on its node, as the launcher or the caller says, else by counting.
        nodes: rank -> node; nodes are numbered by their lowest rank.
        device: where this rank's device tensors live.
        store: a prefix of the job's store that is this world's own; users may keep keys of theirs in it under a prefix of their own.
        platform: chooses the strategies.
        group: coordinator over every rank, for host tensors and objects.
    """

    def __new__(cls, *made: object, **how: object) -> Self:
        """Refuse a call by users, who know no builder."""
        if not made or not isinstance(made[0], Builder):
            raise TypeError(
                "a World is made by World.from_env() under a launcher or alone, World.connect(init_method, rank=..., world_size=...), "
                "World.from_store(store, rank=..., world_size=...) or World.from_torch(), and not by calling the class"
            )
        return super().__new__(cls)

    def __init__(
        self, builder: Builder, meeting: Meeting, *, local_rank: int, device: torch.device, platform: Platform, store: dist.Store
    ) -> None:
        """Not for users: see `from_env`, `connect`, `from_store`, `from_torch`."""
        self._builder = builder
        self._state = _State()
        # The store as given by the caller: a store written in Python ends with its last Python reference, whatever C++ still holds.
        self._caller_store = store
        self.rank = builder.rank
        self.size = len(builder.hosts.nodes)
        self.local_rank = local_rank
        self.nodes: Mapping[int, int] = MappingProxyType(dict(enumerate(builder.hosts.nodes)))
        self.device = device
        self.platform = platform
        self.store = dist.PrefixStore("user", builder.store)
        # Argument that ordered operators declare as changed, which keeps them in program order.
        with ambient.lasting():
            self.token = ambient.zeros((), torch.float32, torch.device("meta" if device.type == "meta" else "cpu"))
        # The finalizer must not refer to the World itself, which would never be collected.
        self._finalizer = weakref.finalize(self, _release, builder.states, builder.order, builder.owned_endpoint, builder.recording)
        if self.size > 1 and builder.holds_something:
            disown_in_children(self)
        try:
            everyone = tuple(range(self.size))
            if self.size > 1 and builder.holds_something:
                builder.start_record([builder.options], local_rank, meeting)
            connection = builder.connect("world", everyone, meeting, builder.options)
            # Host tensors and objects, by strategies of commgraph only: made before plugins are loaded.
            state = builder.state(
                "world",
                everyone,
                connection,
                platform,
                builder.options,
                wants_device=False,
                device=device,
                plugins=Plugins(),
                partition=lambda: (everyone,),
                deadline=meeting.deadline,
            )
            try:
                facts = {
                    "the options of the world": builder.options.describe(),
                    "the strategies of the world": repr(dict(state.strategies.table)),
                }
                agree(meeting.at("end"), facts)
            except BaseException:
                state.close()
                raise
            self.group: GroupCoordinator = build_coordinator(self, "world", state)
            builder.recording.align_clocks(self.group, builder.hosts.nodes)
        except BaseException:
            self._state.closed = True  # nothing to close, and no warning if it is not closed
            raise

    # Construction.

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        init_method: str | None = None,
        local_rank: int | None = None,
        timeout: timedelta | float = _TIMEOUT,
        device: torch.device | str | None = None,
        platform: Platform | None = None,
        authkey: bytes | None = None,
        address: str | None = None,
    ) -> World:
        """Joins the job that a launcher started: torchrun, Open MPI, MVAPICH, PMI (MPICH), jsrun, Flux, Slurm, PMIx, else none.

        The environment is read, never written. Without MASTER_ADDR the ranks of one node meet by a private file.

        Args:
            environ: read in place of `os.environ`.
            dp_rank, dp_size: join engines that were launched as worlds of their own: this process becomes rank
                ``dp_rank * world_size + rank`` of ``dp_size * world_size``. They meet at `init_method`.
            init_method: ``tcp://host:port`` or ``file:///path``, in place of that of the environment.
            local_rank: number on this node, in place of the launcher's.
            timeout: deadline of meeting and of every build, and the default deadline of operations; a timedelta or seconds.
            device: of this rank, in place of the platform's choice for `local_rank` (Ray masks devices).
            platform: in place of the one detected.
            authkey: secret of the job, which lets any picklable object travel between hosts; else COMMGRAPH_AUTHKEY.
            address: address or interface of this host at which it listens for ranks of other hosts; else COMMGRAPH_ADDRESS, else
                GLOO_SOCKET_IFNAME, else that of the way to the store.

        Raises:
            LaunchError: a launcher set only one of rank and size, or there are several nodes and no address.
            BuildError: the ranks did not meet in time.
        """
        environ = os.environ if environ is None else environ
        facts = launch.detect(environ)
        rank, size = launch.join_engines(facts, dp_rank, dp_size)
        if local_rank is None and dp_size == 1:
            # The launcher of one engine does not know the other engines on this node.
            local_rank = facts.local_rank
        terms = Terms.of("World.from_env", local_rank, timeout, device, platform, authkey, address, environ=environ)
        if size == 1:
            return cls._make(None, 0, 1, terms)
        method = init_method or launch.meeting_point(facts, dp_size=dp_size)
        hosted = facts.agent_store and init_method is None
        # The file of a job that names none is commgraph's to remove.
        file = PrivateFile(Path(method.removeprefix("file://"))) if method.startswith("file://") and init_method is None else None
        try:
            world = cls._meet(method, rank, size, terms, hosted_elsewhere=hosted, private=file is not None)
        except BaseException:
            if file is not None:
                file.close()
            raise
        if file is not None:
            world._state.file = file
            weakref.finalize(world, file.close)
        return world

    @classmethod
    def connect(
        cls,
        init_method: str,
        *,
        rank: int,
        world_size: int,
        local_rank: int | None = None,
        timeout: timedelta | float = _TIMEOUT,
        device: torch.device | str | None = None,
        platform: Platform | None = None,
        authkey: bytes | None = None,
        address: str | None = None,
    ) -> World:
        """Meets the other ranks at ``tcp://host:port`` (rank 0 serves there) or ``file:///path``; the rest as for `from_env`.

        Raises:
            LaunchError: a rank out of range, or an init method of another form.
            BuildError: the ranks did not meet in time.
        """
        check_rank(rank, world_size)
        terms = Terms.of("World.connect", local_rank, timeout, device, platform, authkey, address)
        return cls._make(None, rank, 1, terms) if world_size == 1 else cls._meet(init_method, rank, world_size, terms)

    @classmethod
    def from_store(
        cls,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        local_rank: int | None = None,
        timeout: timedelta | float = _TIMEOUT,
        device: torch.device | str | None = None,
        platform: Platform | None = None,
        authkey: bytes | None = None,
        address: str | None = None,
        options: CommunicatorOptions | None = None,
    ) -> World:
        """Meets the other ranks in a store of the caller's; the rest as for `from_env`. The store stays the caller's to keep alive.

        Args:
            store: of the ranks.
            rank, world_size: of this one.
            local_rank, timeout, device, platform, authkey, address: as for `from_env`.
            options: of `group`; contexts have their own.

        Raises:
            LaunchError: a rank out of range.
            BuildError: the ranks did not meet in time.
        """
        check_rank(rank, world_size)
        if not isinstance(store, dist.Store):
            raise TypeError(f"World.from_store: store is a {type(store).__name__}; a torch.distributed.Store is needed")
        terms = Terms.of("World.from_store", local_rank, timeout, device, platform, authkey, address, options)
        return cls._make(store, rank, world_size, terms)

    @classmethod
    def from_torch(
        cls,
        group: dist.ProcessGroup | None = None,
        *,
        local_rank: int | None = None,
        timeout: timedelta | float = _TIMEOUT,
        device: torch.device | str | None = None,
        platform: Platform | None = None,
        authkey: bytes | None = None,
        address: str | None = None,
        options: CommunicatorOptions | None = None,
    ) -> World:
        """Joins a job whose default process group somebody else made (Ray, verl, torchtitan), and leaves that group untouched.

        Args:
            group: a group of torch.distributed's whose ranks form the world; None: all of the default group.
            local_rank, timeout, device, platform, authkey, address: as for `from_env`.
            options: of `World.group`, the coordinator over these ranks; contexts have their own.

        Raises:
            LaunchError: torch.distributed is not initialised, or this process is not in `group`.
            BuildError: the ranks did not meet in time.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise LaunchError("torch.distributed has no default process group to join; use World.from_env(), which needs none")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise LaunchError(f"this process (rank {dist.get_rank()} of the default group) is not in the group that was given")
        ranks = dist.get_process_group_ranks(group) if group is not None else range(size)
        store = dist.PrefixStore(f"commgraph/{_digest(ranks)}", compat.default_store())
        terms = Terms.of("World.from_torch", local_rank, timeout, device, platform, authkey, address, options)
        return cls._make(store, rank, size, terms)

    @classmethod
    def join(
        cls,
        ticket: str,
        *,
        local_rank: int | None = None,
        timeout: timedelta | float = _TIMEOUT,
        device: torch.device | str | None = None,
        platform: Platform | None = None,
        authkey: bytes | None = None,
        address: str | None = None,
        options: CommunicatorOptions | None = None,
    ) -> World:
        """Joins a World that grows, as a new process, which gets its rank from it.

        Args:
            ticket: as its ranks have it: what `grow` announces, or its `at`.
            local_rank, timeout, device, platform, authkey, address, options: as for `from_store`.

        Raises:
            LaunchError: a ticket of another form.
            BuildError: the World did not grow in time, or not for as many processes as came.
        """
        terms = Terms.of("World.join", local_rank, timeout, device, platform, authkey, address, options)
        deadline = Deadline.after(terms.timeout.total_seconds())
        store = open_store(ticket, rank=1, world_size=2, timeout=terms.timeout)
        rank, size = admission.apply(store, deadline)
        return cls._make(store, rank, size, terms, deadline=deadline)

    @classmethod
    def _meet(cls, init_method: str, rank: int, size: int, terms: Terms, *, hosted_elsewhere: bool = False, private: bool = False) -> World:
        """Open the store that `init_method` names, and build the World in it."""
        deadline = Deadline.after(terms.timeout.total_seconds())
        store, reopen = open_meeting_point(init_method, rank, size, deadline, hosted_elsewhere=hosted_elsewhere, private=private)
        return cls._make(store, rank, size, terms, deadline=deadline, reopen=reopen)

    @classmethod
    def _make(
        cls,
        store: dist.Store | None,
        rank: int,
        size: int,
        terms: Terms,
        *,
        deadline: Deadline | None = None,
        reopen: Callable[[], dist.Store] | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> World:
        """Find the other ranks, and build the World; `store`, `reopen`, `guard`: as for `assemble`, `deadline`: in place of the terms'."""
        deadline = Deadline.after(terms.timeout.total_seconds()) if deadline is None else deadline
        with assemble(store, rank, size, terms, deadline, reopen=reopen, guard=guard) as (builder, meeting, opened):
            return cls._of(builder, meeting, terms.local_rank, terms.device, terms.platform, opened)

    @classmethod
    def _of(
        cls,
        builder: Builder,
        meeting: Meeting,
        local_rank: int | None,
        device: torch.device | str | None,
        platform: Platform,
        store: dist.Store,
    ) -> World:
        place = builder.hosts.local_rank if local_rank is None else local_rank
        chosen = platform.device(place) if device is None else torch.device(device)
        world = cls(builder, meeting, local_rank=place, device=chosen, platform=platform, store=store)
        logger.debug("%r: node %d of %d, rank %d of %d there", world, world.node_rank, world.node_count, world.local_rank, world.local_size)
        return world

    def _terms(self, local_rank: int | None) -> Terms:
        """Return the terms of this World, for one that follows it; `local_rank`: there."""
        builder = self._builder
        return Terms(
            timeout=builder.timeout,
            platform=self.platform,
            local_rank=local_rank,
            device=self.device,
            authkey=builder.authkey,
            address=builder.given,
            options=builder.options,
            label=builder.label,
        )

    # Facts.

    @property
    def local_size(self) -> int:
        """Ranks on this rank's node."""
        return self._builder.hosts.local_size

    @property
    def node_rank(self) -> int:
        """This rank's node."""
        return self._builder.hosts.node_rank

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return self._builder.hosts.node_count

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._state.closed

    # The factory.

    def context(
        self,
        layout: Layout,
        *,
        name: str,
        groups: Collection[str] | None = None,
        platform: Platform | None = None,
        options: CommunicatorOptions | Mapping[str, CommunicatorOptions] | None = None,
    ) -> ParallelContext:
        """Builds the groups of `layout`, whole, or raises on every rank.

        Collective; may run on one thread while another uses older contexts.

        Args:
            layout: where each rank sits; for exactly this world's ranks.
            name: unique among the open contexts of this world.
            groups: names of the groups that serve device tensors too; None: all but ``world`` and ``replica``.
            platform: in place of the world's.
            options: for all groups, or group name -> options.

        Raises:
            ConfigurationError: the name is in use.
            LayoutError: the layout is for another number of ranks, or `groups` or `options` name a group that it lacks.
            LayoutMismatchError: the ranks asked for different things.
            BuildError: a rank could not build its part, or did not come in time.
        """
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigurationError(f"name={name!r}: a context needs a name, a non-empty string without '/'")
        self._ensure_open()
        build = self._state.count(f"context {name}")
        context = build_context(
            self,
            self._builder,
            layout,
            name=name,
            build=build,
            groups=groups,
            platform=self.platform if platform is None else platform,
            options=options,
            in_use=name in self._state.contexts,
        )
        with self._state.lock:
            self._state.contexts[name] = context
        return context

    def split(self, ranks: Sequence[int], *, options: CommunicatorOptions | None = None) -> World:
        """A smaller World of some of these ranks, numbered in the order given. Collective over `ranks` only; closed with this one.

        Args:
            ranks: global ranks of this world, this one among them.
            options: of the smaller world's `group`; None: as this one's.

        Raises:
            LayoutError: a rank out of range or repeated, or this one is not among them.
            BuildError: not all of them came in time.
        """
        self._ensure_open()
        chosen = tuple(ranks)
        if any(not 0 <= rank < self.size for rank in chosen) or len(set(chosen)) != len(chosen):
            raise LayoutError(f"split({list(chosen)}) on rank {self.rank}: ranks must be different ones of 0 to {self.size - 1}")
        if self.rank not in chosen:
            raise LayoutError(f"split({list(chosen)}): rank {self.rank} is not among them; only the ranks of the new world call it")
        number = self._state.count(f"split {chosen}")
        store = dist.PrefixStore(f"split/{_digest(chosen)}/{number}", self._builder.store)
        builder = attrs.evolve(
            self._builder,
            store=store,
            rank=chosen.index(self.rank),
            hosts=self._builder.hosts.restrict(chosen),
            states=States(),
            processes=[self._builder.processes[rank] for rank in chosen],
            reach=None if self._builder.reach is None else self._builder.reach.restrict(chosen, f"split {chosen} {number}"),
            proofs=PeerAccessCache(),
            order=DeviceOrder(),
            options=self._builder.options if options is None else check_options(options),
            recording=Recording(),
            name=f"{_digest([*self._builder.name.encode(), *chosen, number])}",
        )
        place = None if self.size > len(chosen) else self.local_rank
        meeting = builder.meeting(store, f"split({list(chosen)})")
        with meeting.reporting():
            meeting.exchange("here", b"")  # the error of the store names who did not come
            world = World._of(builder, meeting, place, self.device, self.platform, self._caller_store)
        meeting.clean()
        with self._state.lock:
            self._state.splits[:] = [*(split for split in self._state.splits if not split.closed), world]
        return world

    @overload
    def split_by(self, color: None, key: int = 0) -> None: ...

    @overload
    def split_by(self, color: int | str | bytes | tuple[Any, ...], key: int = 0) -> World: ...

    def split_by(self, color: int | str | bytes | tuple[Any, ...] | None, key: int = 0) -> World | None:
        """Divides this World: ranks that give equal colors get a smaller World together. MPI's Comm_split.

        Collective over every rank of this world, on `group`: one object from each rank to each, then a `split` for each color.

        Args:
            color: which of the smaller worlds this rank belongs to; None: none of them. A whole number, a string, bytes, or a tuple of
                these; colors are compared with ``==``. Each rank may give another type.
            key: orders the ranks of a color, which are numbered by (key, rank in this world). Unused where `color` is None.

        Returns:
            The World of the ranks of this rank's color, closed with this one; None where `color` is None.

        Raises:
            LayoutError: a color or key of another type, on any rank. Every rank raises it, with the rank and the value, and none is split.
            CollectiveTimeoutError: a rank did not come; `group` is broken afterwards.
            CollectiveMismatchError: a rank called something else on `group`, which is broken afterwards.
            BuildError: a rank of the same color could not build the smaller world.

        Example:
            A trainer on the first four ranks, a generator on the others::

                part = world.split_by("trainer" if world.rank < 4 else "generator")
        """
        self._ensure_open()
        ranks = ranks_of_color(self.group, color, key)
        return None if ranks is None else self.split(ranks)

    def survivors(self, *, timeout: timedelta | float = _LATE) -> World:
        """The World of the ranks that are still alive, numbered in their old order. Collective over them; all get the same, or all raise.

        Leaves this World: its contexts and groups are closed, calls on them that are under way end with an error, and so do the calls of
        ranks that wait for this one, which is how they come here, too. No store is needed: it may have died with rank 0. A rank that
        dies meanwhile is left out, too. Ranks that do not come in time are counted out: whatever they call on this World raises, here
        `BuildError`. The new World is independent, but for a ``with`` statement over this one, which closes both.

        Where the network is cut in two, each half goes on with a World of its own: compare ``size`` with what the program needs.

        Args:
            timeout: how long to wait for ranks that seem to be alive and do not come, a timedelta or seconds. Those that have died are not
                waited for. The longest of all ranks counts.

        Raises:
            BackendUnavailableError: a rank of this World has no native module.
            BuildError: the others go on without this rank; or the new World could not be built, for another reason than a death.
            ContextClosedError: this World was left or closed before.
        """
        self._ensure_open()
        seconds, builder, reach = seconds_of(timeout), self._builder, self._builder.reach
        if self.size == 1:
            self._leave()
            return self._successor(View((0,), 0, None, Deadline.after(builder.timeout.total_seconds()), lambda: None))
        if reach is None:
            raise BackendUnavailableError(f"survivors on {self!r}: a rank has no native module, without which nobody listens")
        builder.check_descriptors("of the survivors", self.size)
        builder.states.announce("it goes on with the ranks that are alive (World.survivors)")
        self._leave()
        membership = Membership[World](reach, self.rank, seconds)
        try:
            members, world = membership.settle(self._successor, World._drop)
        except BaseException:
            self._end_latecomers()
            if builder.owned_endpoint is not None:
                builder.owned_endpoint.close()
            raise
        late, self._state.latecomers = self._state.latecomers, []
        if len(members) < self.size:
            why = f"ranks {listing(members)} go on without this rank (World.survivors): it was lost to them (stopped, cut off, or late)"
            end_builds(builder.store, why)
            late.append(Latecomers(reach.endpoint, membership.group, members, owns=builder.owned_endpoint is not None))
        elif builder.owned_endpoint is not None:
            builder.owned_endpoint.close()
        world._state.latecomers = late
        weakref.finalize(world, _end_all, late)
        self._state.splits.append(world)
        logger.info("%r goes on with ranks %s of %d", world, members, self.size)
        return world

    def grow(
        self,
        extra: int,
        *,
        at: str | None = None,
        announce: Callable[[str], object] | None = None,
        timeout: timedelta | float | None = None,
    ) -> World:
        """A larger World: this one's ranks as they are, and `extra` new processes after them, which call `join`. Collective.

        This World and its contexts are not touched: other threads may use them meanwhile, and they stay open until they are closed.

        Args:
            extra: new processes, at least one.
            at: where they meet, known beforehand, as `connect` has it: ``tcp://host:port`` (rank 0 serves there) or ``file:///path``.
            announce: without `at`: called on rank 0 with the ticket, a text, as soon as `join` can use it: it starts the new processes, or
                hands the ticket to them.
            timeout: how long to wait for them, a timedelta or seconds; None: as long as for any build.

        Raises:
            ConfigurationError: no new process, or neither `at` nor, on rank 0, `announce`.
            BuildError: they did not come, or the World could not be built. This one goes on as it was.
        """
        self._ensure_open()
        number, builder = self._state.count("grow"), self._builder
        store: dist.Store = dist.PrefixStore(f"grow/{number}", builder.store)
        deadline = Deadline.after(builder.timeout.total_seconds() if timeout is None else seconds_of(timeout))
        meeting = attrs.evolve(builder.meeting(store, f"grow({extra})"), deadline=deadline)
        with meeting.reporting():
            if (count := whole(extra)) is None or count < 1:
                raise ConfigurationError(f"grow({extra!r}) on rank {self.rank}: a number of new processes is needed, one or more")
            if at is None and announce is None and self.rank == 0:
                raise ConfigurationError(f"grow({extra}): either at= says where to meet, or announce= on rank 0 takes the ticket")
            agree(meeting.at("begin"), {"the number of new processes": str(count), "at": str(at)})
            size, ticket = self.size + count, at or ""
            served: dist.Store | None = None
            # Of rank 0 alone, which watches the new processes: its error is everybody's.
            watches: list[Callable[[], None]] = []
            if self.rank == 0 and at is None:
                host = ticket_at(builder.given, self._caller_store)
                served = serve_store(host)
                ticket = f"tcp://{f'[{host}]' if ':' in host else host}:{served.port}"  # type: ignore[attr-defined]  # of a TCPStore
            if self.size > 1:
                ticket = meeting.answer("ticket", ticket.encode(), lambda said: said[0]).decode()
            if served is None:
                served = open_store(ticket, rank=self.rank, world_size=size, timeout=timedelta(seconds=deadline.left()))
            if self.rank == 0:
                if announce is not None:
                    announce(ticket)
                watches.append(admission.admit(served, self.size, count, deadline))
            if self.size > 1:
                meeting.answer("admitted", b"", lambda said: b"")

        def guard() -> None:
            for watch in watches:
                watch()

        return World._make(served, self.rank, size, self._terms(self.local_rank), deadline=deadline, guard=guard)

    def _successor(self, view: View) -> World:
        """Build the World of a view of this one's ranks."""
        size = len(view.ranks)
        terms = self._terms(None if size < self.size else self.local_rank)
        return World._make(view.store, view.rank, size, terms, deadline=view.deadline, guard=view.guard)

    # Lifetime.

    def close(self, *, empty_cache: bool = False, timeout: timedelta | float = CLOSE_TIMEOUT) -> None:
        """Closes its contexts, then itself. Collective, bounded even with dead peers, idempotent.

        Args:
            empty_cache: collect garbage and give cached device memory back afterwards.
            timeout: how long to wait for the other ranks, in each context and in the world; a timedelta or seconds. Two seconds at
                most where a group was broken, or the last wait for an object was in vain: a rank that was lost or late may not come; half a
                second where they did not come to close a context just before.
        """
        for split in tuple(self._state.splits):
            split.close(timeout=timeout)
        if not self.closed:
            for context in tuple(self._state.contexts.values()):
                context.close(timeout)
            close_together((self.group,), self.group, self._patience(timeout), f"{self!r} was closed")
            self._drop()
        if empty_cache:
            gc.collect()
            self.platform.empty_cache()

    def _drop(self) -> None:
        """Close on this rank alone; peers that wait for it get `PeerLostError`."""
        self._leave()
        self._end_latecomers()
        if self._builder.owned_endpoint is not None:
            self._builder.owned_endpoint.close()

    def _leave(self) -> None:
        """As `_drop`, but for what the other ranks need to find this one."""
        self._state.closed = True
        for world in tuple(self._state.splits):
            world._drop()
        for context in tuple(self._state.contexts.values()):
            context._drop()
        self.group.close()
        if self._finalizer.detach() is not None:
            _release(self._builder.states, self._builder.order, None, self._builder.recording)
        if self._state.file is not None:
            self._state.file.close()

    def _end_builds(self) -> None:
        """Have the other ranks not wait for this one, which leaves, in what they build."""
        for world in (*self._state.splits, self):
            if world.size > 1 and not world.closed:
                end_builds(world._builder.store, f"rank {world.rank} has left the world by an exception")

    def _end_latecomers(self) -> None:
        _end_all(self._state.latecomers)
        self._state.latecomers = []

    def _disown(self) -> None:
        """Give up everything, in a forked child, which has no part in the job: `commgraph.forks.Owner`."""
        self._finalizer.detach()
        state = self._state
        state.closed = state.is_inherited = True
        state.lock = threading.Lock()
        for context in state.contexts.values():
            context._disown()
        for late in state.latecomers:
            late.disown()
        self._builder.states.disown()
        if self._builder.reach is not None:
            self._builder.reach.endpoint.disown()

    def _abort(self) -> None:
        """End the calls on all groups with an error, here and on the peers, from any thread; `close` is still to be called."""
        for world in tuple(self._state.splits):
            world._abort()
        self._builder.states.abort()
        self._builder.order.abort()

    def _patience(self, timeout: timedelta | float) -> float:
        state, seconds = self._state, seconds_of(timeout)
        groups = [self.group, *(context[name] for context in tuple(state.contexts.values()) for name in context)]
        # A rank was lost or late, and may not come to close the others either.
        if time.monotonic() - state.missed_at < _JUST_BEFORE:
            return min(seconds, _AGAIN)
        return min(seconds, _PATIENCE) if state.was_broken or any(group._may_be_left for group in groups) else seconds

    def _forget(self, context: ParallelContext, *, broken: bool, missed: bool) -> None:
        with self._state.lock:
            self._state.was_broken |= broken
            if missed:
                self._state.missed_at = time.monotonic()
            if self._state.contexts.get(context.name) is context:
                del self._state.contexts[context.name]
        self._builder.states.prune()

    def _ensure_open(self) -> None:
        if self._state.is_inherited:
            raise ContextClosedError(f"{self!r} is not this process's: {explain_fork(self._state.pid, 'a World')}")
        if self.closed or not self._finalizer.alive:  # which has run at the interpreter's exit
            raise ContextClosedError(f"{self!r} cannot build anything any more: it was closed, or left by survivors()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an exception the peers may be in another call: dropped connections end it, a collective close would wait in vain.
        if error is None:
            self.close()
        else:
            self._end_builds()
            self._drop()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:  # at exit the module's names may be gone
        # Closing is collective and garbage collection is not: the finalizer drops this rank's connections, and the warning says so.
        state = getattr(self, "_state", None)
        if state is not None and not state.closed and getattr(self, "size", 1) > 1 and self._builder.holds_something:
            try:
                _warn(f"{self!r} was never closed: use `with`, or close() on every rank", ResourceWarning, stacklevel=2, source=self)
            except (AttributeError, ImportError, TypeError):  # not made in full, or the interpreter is about to end
                return

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} holds connections of this process and cannot be pickled; each process makes its own, e.g. World.from_env()"
        )

    def __repr__(self) -> str:
        return f"<World: rank {self.rank} of {self.size} on {self.device}{', closed' if self.closed else ''}>"


def _release(states: States, order: DeviceOrder, endpoint: Endpoint | None, recording: Recording) -> None:
    """Drop the connections and memory of a world on this rank; nothing is sent."""
    states.release()
    recording.close()
    order.close()
    if endpoint is not None:
        endpoint.close()
    if not threading.main_thread().is_alive():
        wait_for_calls()


def _end_all(latecomers: list[Latecomers]) -> None:
    for one in latecomers:
        one.close()


def _digest(ranks: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(ranks)).encode()).hexdigest()[:16]
