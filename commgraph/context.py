"""`ParallelContext`: every group of one layout, complete and immutable, to be passed to model layers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

import torch
import torch.distributed as dist

import commgraph
from commgraph.agreement import agree
from commgraph.building import Builder, Connection
from commgraph.communicators.base import Communicator
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.capture import GraphCapture, capture
from commgraph.coordinator.state import GroupState
from commgraph.deadline import Deadline, seconds_of
from commgraph.errors import (
    CollectiveTimeoutError,
    CommGraphError,
    ConcurrentCallError,
    ConfigurationError,
    ContextClosedError,
    LayoutError,
    LayoutMismatchError,
)
from commgraph.forks import explain_fork
from commgraph.layout import Layout
from commgraph.meeting import Meeting
from commgraph.mesh import mesh_of
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import Platform, check_platform
from commgraph.platforms.detection import Plugins

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ParallelContext", "build_context", "build_coordinator", "close_together"]

logger = logging.getLogger("commgraph")

CLOSE_TIMEOUT = timedelta(seconds=30)

# Groups that are attributes of a context; the user's own groups are found as context[name].
_GROUPS = ("world", "replica", "dp", "pp", "pcp", "tp", "dcp", "ep")


class _MissingGroupError(LayoutError, AttributeError):
    """A group that the layout lacks, asked for as an attribute: to `hasattr` and `getattr` with a default an `AttributeError`."""


class _World(Protocol):
    """The part of a `World` that a context uses."""

    rank: int
    local_rank: int
    device: torch.device
    token: torch.Tensor

    def _forget(self, context: ParallelContext, *, broken: bool, missed: bool) -> None:
        """Remove a context that was closed from the list; `broken`: one of its groups was broken."""

    def _patience(self, timeout: timedelta | float) -> float:
        """Return how many seconds to wait for the other ranks when something is closed, `timeout` at most."""


class ParallelContext:
    """The groups of one layout as this rank sees them. Made by `World.context`; frozen.

    ``context.tp`` and ``context["tp"]`` are the same `GroupCoordinator`; a size-1 axis has a coordinator of one rank, so that layers need
    no special case. Several contexts live in one process, each with groups of its own. Copying (deepcopy included) gives the
    same object, so that a model that holds a context can be copied; pickling is refused.

    Attributes:
        world: every rank of the layout; for host tensors and objects unless asked for otherwise.
        replica: the same position in each replica: engines that otherwise never communicate.
        dp: data parallelism.
        pp: pipeline parallelism: the stages, in order.
        pcp: prefill context parallelism.
        tp: tensor parallelism.
        dcp: decode context parallelism.
        ep: expert parallelism: dp x pcp x tp of one pipeline stage.
    """

    # Groups are in slots because every call looks one up: a slot costs a fifth of a property.
    __slots__ = ("__weakref__", "_closing", "_groups", "_layout", "_name", "_options", "_state", "_world", *_GROUPS)

    _groups: Mapping[str, GroupCoordinator]
    _layout: Layout
    _name: str
    _options: Mapping[str, CommunicatorOptions]
    _state: dict[str, Any]
    _closing: threading.RLock
    _world: _World

    world: GroupCoordinator
    replica: GroupCoordinator
    dp: GroupCoordinator
    pp: GroupCoordinator
    pcp: GroupCoordinator
    tp: GroupCoordinator
    dcp: GroupCoordinator
    ep: GroupCoordinator

    def __init__(
        self,
        *,
        name: str,
        layout: Layout,
        world: _World,
        groups: Mapping[str, GroupCoordinator],
        options: Mapping[str, CommunicatorOptions],
    ) -> None:
        for attribute, value in (
            ("_name", name),
            ("_layout", layout),
            ("_world", world),
            ("_groups", MappingProxyType(dict(groups))),
            ("_options", MappingProxyType(dict(options))),
            ("_state", {"closed": False, "inherited": False, "pid": os.getpid()}),
            ("_closing", threading.RLock()),
            *((group, groups[group]) for group in _GROUPS if group in groups),
        ):
            object.__setattr__(self, attribute, value)

    # Facts.

    @property
    def name(self) -> str:
        """Its name, unique among the open contexts of its world."""
        return self._name

    @property
    def layout(self) -> Layout:
        """Where each rank sits."""
        return self._layout

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self._world.rank

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self._layout.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank's device tensors live."""
        return self._world.device

    @property
    def options(self) -> Mapping[str, CommunicatorOptions]:
        """Group name -> options."""
        return self._options

    @property
    def is_first_rank(self) -> bool:
        """Whether this is global rank 0."""
        return self.rank == 0

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return bool(self._state["closed"])

    # Groups.

    def __getitem__(self, name: str) -> GroupCoordinator:
        """Return the group of that name.

        Raises:
            LayoutError: the layout has no such group.
        """
        try:
            return self._groups[name]
        except KeyError:
            raise LayoutError(self._missing(name)) from None

    def __contains__(self, name: object) -> bool:
        """Whether the layout has a group of that name."""
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the groups."""
        return iter(self._groups)

    if not TYPE_CHECKING:  # a type checker would take any misspelt attribute for one that this gives

        def __getattr__(self, name: str) -> NoReturn:
            # Called only for names that are no slot, and for the slots of groups that the layout lacks.
            if name in _GROUPS:
                raise _MissingGroupError(self._missing(name))
            hint = f"; groups of your own are found as context[{name!r}]" if name in self._groups else ""
            if hasattr(GroupCoordinator, name):
                hint = f"; operations are those of a group, e.g. context.tp.{name}"
            raise AttributeError(f"a ParallelContext has no {name!r}{hint}")

    def _missing(self, name: str) -> str:
        return f"context {self._name!r} has no group {name!r}; its layout has: {', '.join(self._groups)}"

    # Methods on all groups at once.

    def check_layout(self, **sizes: int) -> None:
        """Compares the layout with what the caller expects, e.g. ``check_layout(tp=4, pp=2)``.

        Raises:
            LayoutMismatchError: naming every size that differs.
            LayoutError: a group that the layout lacks.
        """
        wrong = [f"{name}={self._layout.size(name)}, expected {size}" for name, size in sizes.items() if self._layout.size(name) != size]
        if wrong:
            raise LayoutMismatchError(f"context {self._name!r} ({self._layout!r}) has {'; '.join(wrong)}")

    def prepare_communication_buffers(self, model: torch.nn.Module) -> None:
        """Lets strategies of every group allocate buffers by the sizes in `model`. Collective."""
        for coordinator in self._distinct():
            coordinator.prepare_communication_buffer_for_model(model)

    def mesh(self, *names: str) -> DeviceMesh:
        """Groups of this context as a ``DeviceMesh`` of torch, for FSDP2, DTensor and libraries built on them. Collective over the groups.

        A mesh dim is called after its group, and after its torch group, as torch takes meshes over the same ranks for the same unless names
        differ: ``mesh.mesh_dim_names`` has the names, in order. The mesh is of use until the context is closed.

        Args:
            names: groups, outermost first: ``"dp", "tp"``; together a grid of ranks.

        Returns:
            The mesh, of this rank's device type. Its ranks are those of the process's default group.

        Raises:
            LayoutError: no name, one that the layout lacks, or groups that are no grid.
            BackendUnavailableError: this process has no default process group, without which torch finds no other.
            ContextClosedError: the context was closed.
        """
        self._ensure_open("mesh")
        where = f"mesh({', '.join(map(repr, names))}) of context {self._name!r}"
        if not names or len(set(names)) < len(names):
            raise LayoutError(f"{where}: give each group once, at least one; the layout has: {', '.join(self._groups)}")
        return mesh_of([self[name] for name in names], self.device, where)

    def warmup(self) -> None:
        """Allocates everything that first use would, and proves that every group works. Collective."""
        for coordinator in self._distinct():
            coordinator.warmup()

    @contextlib.contextmanager
    def graph_capture(self, device: torch.device | None = None, *, stream: Any = None) -> Iterator[GraphCapture]:
        """Context manager in which graphs of the device are captured: on a side stream, ordered after the current one and current inside.

        Several contexts in one graph: give the inner ones the stream of the outermost. While a graph is captured, a strategy that cannot be
        captured is skipped, on every rank alike; where none is left the call raises. On the host nothing is captured, and `stream` is
        None. An error inside of the block ends every group of the context, here and on the other ranks.

        Args:
            device: whose graphs; None: this rank's.
            stream: to capture on, in place of a new one.

        Raises:
            ContextClosedError: the context was closed.
        """
        self._ensure_open("graph_capture")
        groups = self._distinct() or [self._groups["world"]]
        with capture(groups, device or self.device, stream, f"context {self._name!r}") as made:
            yield made

    def _ensure_open(self, what: str) -> None:
        if self._state["inherited"]:
            why = explain_fork(self._state["pid"], "a World")
            raise ContextClosedError(f"{what}: context {self._name!r} (rank {self.rank}) is not this process's: {why}")
        if self.closed:
            raise ContextClosedError(f"{what}: context {self._name!r} (rank {self.rank}) was closed; build another with world.context")

    def explain(self) -> str:
        """Return a text that says, for each group, its ranks, strategies by operation and sharing, and the cost of all of them."""
        lines = [f"{self!r}"]
        for name, coordinator in self._groups.items():
            head = f"  {name}: ranks {coordinator.ranks}"
            if coordinator.world_size == 1:
                lines.append(f"{head}: one rank, no communicator")
                continue
            shared = ", ".join(other.name for other in coordinator.shares_with)
            lines.append(head + (f", shares communicators with {shared}" if shared else ""))
            chains: dict[tuple[str, ...], list[str]] = {}
            for operation, names in coordinator.communicators.items():
                chains.setdefault(names, []).append(operation)
            lines += [f"    {', '.join(operations)}: {', then '.join(names)}" for names, operations in chains.items()]
            lines += [f"    {c.name}: {c.describe()}" for c in _live(coordinator) if c.describe()]
            lines += [f"    {refused.name}: not used, {refused.reason}" for refused in coordinator.refused]
        communicators = [c for coordinator in self._distinct() for c in _live(coordinator)]
        memory = sum(c.memory() for c in communicators)
        lines.append(f"  {len(communicators)} communicators in {len(self._distinct())} groups, {memory} bytes of shared memory")
        return "\n".join(lines)

    def _distinct(self) -> list[GroupCoordinator]:
        """Return one coordinator for each set of communicators, those of siblings included."""
        distinct: list[GroupCoordinator] = []
        waiting = list(self._groups.values())
        while waiting:
            coordinator = waiting.pop(0)
            if coordinator.world_size > 1 and not any(other in distinct for other in (coordinator, *coordinator.shares_with)):
                distinct.append(coordinator)
                waiting += coordinator.siblings
        return distinct

    # Lifetime.

    def close(self, timeout: timedelta | float = CLOSE_TIMEOUT) -> None:
        """Closes every group. Collective: waits until every rank has called it, so that no pending call is cut off; idempotent.

        Pending collectives and sends to other ranks are completed; pending receives are not. A call that another thread has under way ends
        in `ContextClosedError`; if it is a collective, this rank does not wait for the others.

        Args:
            timeout: how long to wait for the other ranks, a timedelta or seconds; two seconds at most where a group of the World was
                broken, or the last wait for an object of a second or more was in vain. When it passes, or where a group of this context
                is broken or a peer dead, this rank drops its connections all the same.
        """
        if self.closed:
            return
        with self._closing:
            if not self.closed:
                what = f"context {self._name!r} was closed on rank {self.rank}"
                missed = close_together(tuple(self._groups.values()), self._groups["world"], self._world._patience(timeout), what)
                self._drop(missed=missed)

    def _disown(self) -> None:
        """Give up all groups, in a forked child."""
        self._state["closed"] = self._state["inherited"] = True
        for coordinator in self._groups.values():
            coordinator._disown()

    def _drop(self, *, missed: bool = False) -> None:
        """Close on this rank alone; peers that wait for it get `PeerLostError`. `missed`: this rank has waited for them in vain."""
        self._state["closed"] = True
        broken = any(coordinator.is_broken for coordinator in self._groups.values())
        for coordinator in self._groups.values():
            coordinator.close()
        self._world._forget(self, broken=broken, missed=missed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an exception the peers may be in another call: dropped connections end it, a collective close would wait in vain.
        if error is None:
            self.close()
        elif not self.closed:
            self._drop()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"a ParallelContext is frozen: cannot set {name!r}. Another layout is another context: world.context(layout, name=...)"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a ParallelContext is frozen: cannot delete {name!r}")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"context {self._name!r} holds connections of this process and cannot be pickled. Send its layout (a plain value) and build a "
            "context in the receiver's world; save a model by its state_dict, which holds no context"
        )

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<ParallelContext {self._name!r}: rank {self.rank} of {self._layout!r} on {self.device}{state}>"


def build_context(
    world: _World,
    builder: Builder,
    layout: Layout,
    *,
    name: str,
    build: int,
    groups: Collection[str] | None,
    platform: Platform,
    options: CommunicatorOptions | Mapping[str, CommunicatorOptions] | None,
    in_use: bool,
) -> ParallelContext:
    """Build a whole context or raise on every rank. Collective over the world.

    Args:
        world, builder: where.
        layout: the groups.
        name: of the context.
        build: how many contexts of that name this world had begun to build before.
        groups: those that get device communicators; None: all but `world` and `replica`.
        platform: chooses the strategies.
        options: one for all groups, or group name -> options.
        in_use: a context of that name is open here.
    """
    what = f"context {name!r}"
    store = dist.PrefixStore(f"context/{name}/{build}", builder.store)
    meeting = builder.meeting(store, what)
    rank, size = builder.rank, len(builder.hosts.nodes)
    with meeting.reporting():
        if in_use:
            raise ConfigurationError(f"{what} is open already: close it first, or give the new one another name")
        check_platform(platform)
        plan = _plan(layout, size, groups, options)
        plugins = Plugins.find()
        facts = {
            "the layout": f"{layout!r} {layout.digest}",
            "the options": "; ".join(
                f"{group}: {given.describe()}{' +device' if device else ''}" for group, (given, device) in plan.items()
            ),
            "where calls are recorded": "; ".join(f"{group}: {given.recorded(os.environ)}" for group, (given, _) in plan.items()),
            "the platform": platform.name,
            "the strategies of other packages": plugins.describe(),
            "the versions": f"commgraph {commgraph.__version__}, torch {torch.__version__}",
        }
        agree(meeting.at("begin"), facts)
        coordinators = _build_groups(world, builder, meeting, layout, f"{name}/{build}", plan, platform, plugins)
        builder.recording.align_clocks(coordinators["world"], builder.hosts.nodes)
    meeting.clean()
    context = ParallelContext(
        name=name,
        layout=layout,
        world=world,
        groups={group: coordinators[group] for group in plan},
        options={group: given for group, (given, _) in plan.items()},
    )
    logger.info(
        "%r sits at %s: %s",
        context,
        layout.coordinate(rank) if rank in layout.grid_ranks else "no position of the grid",
        ", ".join(f"{group} {context[group].rank_in_group}/{context[group].world_size}" for group in plan),
    )
    return context


def _build_groups(
    world: _World,
    builder: Builder,
    meeting: Meeting,
    layout: Layout,
    uid: str,
    plan: Mapping[str, tuple[CommunicatorOptions, bool]],
    platform: Platform,
    plugins: Plugins,
) -> dict[str, GroupCoordinator]:
    """Build the groups that `plan` names, whole, or none; return them by name. Collective over the world."""
    rank = builder.rank
    # Groups share communicators if they have the same ranks in the same order, the same options, and are served alike. Where
    # device tensors have no backend of their own, as on the host, groups that serve them do not differ from those that do not.
    shared: dict[tuple[Any, ...], list[str]] = {}
    for group, (given, device) in plan.items():
        key = (layout.ranks(group, rank), given, device or platform.backend() == "gloo", group if given.isolates(group) else None)
        shared.setdefault(key, []).append(group)
    uids = {names[0]: f"{uid}/{names[0]}/{layout.ranks(names[0], rank)}" for names in shared.values()}
    connections: dict[str, Connection | None] = {}
    coordinators: dict[str, GroupCoordinator] = {}
    try:
        if platform.streams(world.device) is not None and any(given.check for given, _ in plan.values()):
            builder.keep_order(meeting)
        if builder.holds_something and len(builder.hosts.nodes) > 1:
            builder.start_record([given for given, _ in plan.values()], world.local_rank, meeting)
        # All connections first, then the strategies: a rank whose strategies fail leaves no peer waiting for a connection.
        for first, name in uids.items():
            connections[first] = builder.connect(name, layout.ranks(first, rank), meeting, plan[first][0])
        for first, *others in shared.values():
            given, device = plan[first]
            state = builder.state(
                uids[first],
                layout.ranks(first, rank),
                connections[first],
                platform,
                given,
                wants_device=device,
                device=world.device,
                plugins=plugins,
                partition=functools.partial(layout.groups, first),
                deadline=meeting.deadline,
            )
            coordinators[first] = build_coordinator(world, first, state)
            coordinators |= {other: coordinators[first]._joined(other) for other in others}
        firsts = [coordinators[first] for first in uids if coordinators[first].world_size > 1]
        agree(meeting.at("end"), {f"the strategies of group {c.name!r} {c.ranks}": repr(dict(c.communicators)) for c in firsts})
    except BaseException:
        _undo(builder, coordinators, connections)
        raise
    return coordinators


def close_together(groups: Collection[GroupCoordinator], world: GroupCoordinator, timeout: timedelta | float, what: str) -> bool:
    """Wait, before groups are closed, until every rank is about to close them, or log why this rank does not.

    Returns whether it waited in vain.

    Args:
        groups: to be closed.
        world: of all ranks that close them.
        timeout: how long to wait, a timedelta or seconds.
        what: was closed, for the log.
    """
    deadline = Deadline.after(seconds_of(timeout))
    if world.world_size == 1 or any(group.is_broken for group in groups):
        return False
    try:
        if not all(group._flush(deadline) for group in groups):
            raise CollectiveTimeoutError("operations that were begun and not waited for did not end in time")
        if under_way := [group.name for group in groups if not group._leave()]:
            raise ConcurrentCallError(f"a call of group {under_way[0]!r} is under way, on another thread or around this one, and is ended")
        world._meet(deadline)
    except CommGraphError as error:
        # As text: a log record that is kept would keep the connections through the error's traceback.
        logger.warning("%s without its peers: %s", what, str(error))
        return isinstance(error, CollectiveTimeoutError)
    return False


def build_coordinator(world: _World, name: str, state: GroupState) -> GroupCoordinator:
    """Return the first coordinator on a state."""
    return GroupCoordinator._of(name, state, local_rank=world.local_rank, device=world.device, token=world.token, world=world)


def _live(coordinator: GroupCoordinator) -> list[Communicator]:
    """Return the strategies of a coordinator, first choice first."""
    names = dict.fromkeys(name for names in coordinator.communicators.values() for name in names)
    return [coordinator.communicator(name) for name in names]


def _undo(builder: Builder, coordinators: Mapping[str, GroupCoordinator], connections: Mapping[str, Connection | None]) -> None:
    """Drop the groups that a failed build has made, on this rank."""
    for coordinator in coordinators.values():
        coordinator.close()
    for connection in connections.values():
        if connection is not None:
            connection.transport.close()
    builder.states.prune()


def _plan(
    layout: Layout,
    world_size: int,
    groups: Collection[str] | None,
    options: CommunicatorOptions | Mapping[str, CommunicatorOptions] | None,
) -> dict[str, tuple[CommunicatorOptions, bool]]:
    """Return group name -> (options, whether it serves device tensors), in the order in which groups are built."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is a {type(layout).__name__}, a commgraph.Layout is needed, e.g. Layout(world.size, tp=2)")
    if isinstance(groups, str):
        raise ConfigurationError(f"groups={groups!r} is one string; the names of groups are needed, e.g. groups=({groups!r},)")
    if layout.world_size != world_size:
        raise LayoutError(f"{layout!r} is for {layout.world_size} ranks, this world has {world_size}: Layout(world.size, ...)")
    default = CommunicatorOptions()
    given = options if isinstance(options, Mapping) else dict.fromkeys(layout.names, default if options is None else options)
    for name, value in given.items():
        if not isinstance(value, CommunicatorOptions):
            raise ConfigurationError(
                f"options for group {name!r} are a {type(value).__name__}; give CommunicatorOptions, or a mapping from group name to them"
            )
        if not isinstance(value.isolate, bool) and (unknown := sorted(value.isolate - set(layout.names))):
            raise LayoutError(f"options.isolate names {unknown}; the layout has the groups {', '.join(layout.names)}")
    wanted = set(layout.names) - layout.host_groups if groups is None else set(groups)
    if unknown := sorted((wanted | set(given)) - set(layout.names)):
        raise LayoutError(f"groups or options name {unknown}; the layout has the groups {', '.join(layout.names)}")
    return {name: (given.get(name, default), name in wanted) for name in layout.names}
