"""`GroupCoordinator`: one group of ranks, every operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.coordinator.call import Timeout
from commgraph.coordinator.capture import GraphCapture, capture
from commgraph.coordinator.experts import ExpertOperations
from commgraph.coordinator.host_objects import objects_of
from commgraph.errors import BackendUnavailableError

__all__ = ["GroupCoordinator"]


# What compiled code may ask a coordinator for. Facts become constants of the graph, which is made anew where those that all others
# follow from are different; the operations are read through. Its name, say, is none of them: a graph serves groups of any name.
@compat.opaque(
    guard=lambda group: [group.world_size, group.rank_in_group, group.rank, group.local_rank, str(group.device), group._experts],
    facts=(
        "world_size",
        "rank_in_group",
        "rank",
        "local_rank",
        "device",
        "next_in_group",
        "prev_in_group",
        "is_first_rank",
        "is_last_rank",
        "_token",
        "_experts",
    ),
    operations=(
        "all_reduce",
        "all_reduce_",
        "reduce_scatter",
        "reduce_scatterv",
        "all_gather",
        "all_gatherv",
        "gather",
        "all_to_all",
        "broadcast",
        "send",
        "recv",
        "barrier",
        "all_reduce_async",
        "all_gather_async",
        "reduce_scatter_async",
        "dispatch",
        "combine",
        "_dispatch_call",
    ),
)
class GroupCoordinator(ExpertOperations):
    """One group of ranks, as a rank of it sees it. Made by `World.context`, never by hand.

    `rank`, `ranks`, `first_rank`, `next_rank`, ... are global ranks; `src` and `dst` arguments are ranks *in the group*. `dim` counts as
    torch's does. Host tensors are served by the host's strategies, device tensors by the device's. Every tensor operation takes any
    strides and gives contiguous results. Operations are collective: every rank of the group calls them in the same order (send and
    receive: the two ranks concerned). In a group of one rank they return their input object, or the filled `out`, after the same checks.

    Errors of every operation, beside those that it names:
        UnsupportedTensorError, ValueError: bad input, raised before anything is sent. If every rank raised, the group goes on.
        CollectiveTimeoutError: the deadline passed (`timeout`: a timedelta or seconds; default: that of the options).
        CollectiveMismatchError: the ranks called different things.
        PeerLostError: a rank of the group is gone.
        ContextClosedError: the context was closed.

    After a timeout, a mismatch or a lost peer the group is broken: every call raises that error again, and the context can only be closed.

    Attributes:
        name: what the layout calls the group.
        rank: global rank of this process (or thread).
        ranks: global ranks of the group, in group order.
        local_rank: place of this rank on its node.
        device: where its device tensors live.
    """

    # Life.

    def sibling(self, name: str) -> GroupCoordinator:
        """A coordinator of the same ranks with communicators of its own, so that its operations overlap with this one's. Collective.

        It has the options of this one, belongs to the same context, and is closed with it (or earlier, by its own `close`).

        Args:
            name: what errors call it; the same on every rank.

        Returns:
            A coordinator; `shares_with` is empty.

        Raises:
            ValueError: a name that is no non-empty string; nothing was sent.
            LayoutMismatchError: the ranks gave different names.
            BuildError: a rank could not build its part, or did not come in time.
        """
        self._link.ensure_open(self.name)
        if not isinstance(name, str) or not name:
            raise ValueError(f"sibling of group {self.name!r} (rank {self.rank}): name={name!r}: a non-empty string is needed")
        link = self._link.sibling(name)
        coordinator = attrs.evolve(self, name=name, link=link, objects=objects_of(link), door=link.door())
        link.join(coordinator)
        self._link.siblings.append(coordinator)
        return coordinator

    def torch_group(self, kind: Literal["device", "cpu"]) -> dist.ProcessGroup:
        """`device_group` or `cpu_group` in the tables of torch.distributed until close: for DeviceMesh, FSDP, and whatever else asks there.

        Collective the first time of each kind. Where no backend serves device tensors the two are one group. A group of one rank has one,
        too, made now.

        Args:
            kind: "device" or "cpu".

        Returns:
            torch's group. Its ranks are those of this process's default group, in group order.

        Raises:
            BackendUnavailableError: this process has no default process group, without which torch.distributed knows no other.
        """
        self._link.ensure_open(self.name)
        if kind not in ("device", "cpu"):
            raise ValueError(f"torch_group of group {self.name!r} (rank {self.rank}): kind={kind!r} is neither 'device' nor 'cpu'")
        if not dist.is_initialized():
            raise BackendUnavailableError(
                f"torch_group of group {self.name!r} (rank {self.rank}): this process has no default process group, and without one "
                "torch.distributed finds no other: call torch.distributed.init_process_group first, or take cpu_group, which needs none"
            )
        return self._link.torch_group(kind, self.all_gather_object)

    @contextlib.contextmanager
    def graph_capture(self, device: torch.device | None = None, *, stream: Any = None) -> Iterator[GraphCapture]:
        """`ParallelContext.graph_capture` for this group alone: an error inside of the block ends this group and no other.

        Args:
            device: whose graphs; None: the group's.
            stream: to capture on, in place of a new one.
        """
        self._link.ensure_open(self.name)
        with capture([self], device or self.device, stream, f"group {self.name!r}") as made:
            yield made

    def prepare_communication_buffer_for_model(self, model: torch.nn.Module) -> None:
        """Lets the strategies size their buffers from `model`. Collective."""
        self._link.ensure_open(self.name)
        for communicator in self._link.communicators:
            communicator.prepare(model)

    def empty(self, size: Sequence[int] | int, dtype: torch.dtype, *, timeout: Timeout = None) -> torch.Tensor:
        """A tensor in memory that the ranks share until the group is closed: large ones need no staging copy in collectives. Collective.

        Where the ranks do not share memory it is a tensor like any other. It may be used after the group was closed, as any tensor.

        Args:
            size: its shape, equal on all ranks.
            dtype: its dtype.
            timeout: deadline.

        Returns:
            An uninitialised tensor of this rank's own on the group's device.
        """
        call, seconds = self._begin("empty", timeout)
        shape, like = call.size(size), call.like(dtype, self.device)
        if self.world_size == 1:
            return torch.empty(shape, dtype=dtype, device=self.device)
        strategy = self._link.route("all_reduce", shape, dtype, self.device)
        return self._link.run(
            call,
            f"{dtype} {shape}",
            seconds,
            lambda tag, left: strategy.empty(shape, like.dtype, like.device, tag=tag, timeout=left),
        )

    def close(self) -> None:
        """Closes this coordinator on this rank; the last one on its communicators takes them along. Sends nothing; idempotent."""
        if self._door is not None:
            self._door.close()
        self._link.leave(self.name)
        if self._link.is_closed:
            self._objects.join(1.0)
