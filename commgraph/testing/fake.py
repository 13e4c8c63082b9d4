"""A World of any size in one process: its operations compute shapes only, so that a model can be traced for ranks that do not exist."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, NoReturn

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.assembly import check_rank
from commgraph.building import Builder, Connection, States
from commgraph.communicators.base import Communicator
from commgraph.communicators.fake import FakeCommunicator
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.coordinator.state import GroupState, Members, Network, Strategies, Timeouts
from commgraph.deadline import Deadline
from commgraph.errors import BackendUnavailableError, UnsupportedTensorError
from commgraph.hosts import Hosts
from commgraph.meeting import Meeting
from commgraph.options import CommunicatorOptions
from commgraph.platforms import CpuPlatform, Platform
from commgraph.platforms.detection import Plugins
from commgraph.processes import Process
from commgraph.waiting import Background
from commgraph.world import World

__all__ = ["fake_world"]

_NEVER_WAITED = timedelta(seconds=1)


def fake_world(world_size: int, rank: int = 0, *, device: torch.device | str = "meta") -> World:
    """A World of `world_size` ranks, of which this process is one and the others do not exist.

    Its contexts have every group of their layout, at no cost, and their operations compute shapes only: on meta tensors, and under torch's
    fake-tensor mode on fake tensors of any device, also while a model is compiled or exported. No peer could send data:
    real tensors are refused, and so are operations that would receive an object. A layout of thousands of ranks is no more than one of two.

    Args:
        world_size: number of ranks.
        rank: that of this process.
        device: of its coordinators: ``"meta"``, or that of the fake tensors, e.g. ``"cuda"`` (no such device is needed).

    Raises:
        LaunchError: a rank out of range.
    """
    check_rank(rank, world_size)
    alike = (0,) * world_size
    store = dist.HashStore()
    me = Process.own()
    builder = _FakeBuilder(store, rank, Hosts(rank, alike, b"", alike), "", _NEVER_WAITED, None, States(), me, (me,) * world_size)
    meeting = builder.meeting(store, "the world")
    return World(builder, meeting, local_rank=rank, device=torch.device(device), platform=CpuPlatform(), store=store)


@attrs.frozen
class _FakeBuilder(Builder):
    """Makes groups without connections, and exchanges nothing."""

    holds_something: ClassVar[bool] = False

    def meeting(self, store: dist.Store, what: str) -> Meeting:
        # Of this rank alone: there is nobody to agree with.
        return Meeting(store, store, (self.rank,), 0, what, Deadline.after(_NEVER_WAITED.total_seconds()), self.me, self.processes)

    def connect(self, uid: str, ranks: tuple[int, ...], meeting: Meeting, options: CommunicatorOptions) -> Connection | None:
        return None if len(ranks) == 1 else Connection(self.store, _NoTransport(ranks.index(self.rank), len(ranks)))

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
        members = Members(uid, ranks, ranks.index(self.rank))
        live = [] if connection is None else [FakeCommunicator(members.rank_in_group, len(ranks))]
        network = None if connection is None else Network(connection.transport, connection.store, None)
        seconds = _NEVER_WAITED.total_seconds()
        rebuild = functools.partial(
            self._sibling,
            platform=platform,
            options=options,
            wants_device=wants_device,
            device=device,
            plugins=plugins,
            partition=partition,
        )
        strategies = _FakeStrategies(members, live)
        return GroupState(members, strategies, network, Timeouts(seconds, seconds), experts=options.experts, rebuild=rebuild)

    def _sibling(self, of: GroupState, name: str, *, platform: Platform, options: CommunicatorOptions, **kind: Any) -> GroupState:
        uid, ranks = f"{of.members.uid}/sibling {of.count('siblings')}", of.members.ranks
        meeting = self.meeting(self.store, uid)
        return self.state(uid, ranks, self.connect(uid, ranks, meeting, options), platform, options, deadline=meeting.deadline, **kind)


class _FakeStrategies(Strategies):
    """Raises for tensors that have data."""

    def route(
        self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, op: str | None = None
    ) -> Communicator:
        # Under a mode no tensor has data, whatever its device.
        place = torch.device("meta") if compat.count_modes() else device
        (fake,) = self.communicators
        if fake.accepts(operation, shape, dtype, place, capturing=False):
            return fake
        raise UnsupportedTensorError(
            f"{operation} in group {self.members.uid} of a fake world (rank {self.members.rank}): a {dtype} tensor {tuple(shape)} "
            f"on {device} has data, and there are no peers to exchange it with: give meta or fake tensors, or run it in "
            "commgraph.testing.spmd",
            operation=operation,
            rank=self.members.rank,
        )


class _NoTransport(GlooTransport):
    """A transport without connections."""

    def __init__(self, rank_in_group: int, world_size: int) -> None:
        self.rank_in_group = rank_in_group
        self.world_size = world_size
        self.process_group = None

    @property
    def bytes_sent(self) -> int:
        """Nothing is sent."""
        return 0

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int | Mapping[int, int],
        deadline: Deadline,
    ) -> None:
        if receives:
            self._nobody(receives[0][1])

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Background:
        self._nobody(peer)

    def _nobody(self, peer: int) -> NoReturn:
        raise BackendUnavailableError(
            f"an object from rank {peer} of a group of {self.world_size} in a fake world: there is no such peer, so nothing can come "
            "from it. Run this in commgraph.testing.spmd"
        )

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass
