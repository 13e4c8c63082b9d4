"""commgraph as a library to be measured, by its public calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch

import commgraph as cg
from commgraph.bench.library import Buffers, Channel, Job, Library, repeat, there_and_back
from commgraph.errors import ConfigurationError

__all__ = ["OBJECT_METHODS", "DeviceTensors", "Objects", "SharedTensors", "Tensors", "build_context"]

# Operation of the benchmark -> its name in `GroupCoordinator.communicators`, where that differs.
_IN_THE_TABLE = MappingProxyType({"all_reduce_": "all_reduce", "send_recv": "send", "tensor_dict": "send"})

OBJECT_METHODS = ("broadcast_object", "send_object")

_READY_SECONDS = 60.0


def build_context(world: cg.World, strategy: str, **more: Any) -> cg.ParallelContext:
    """A context whose ``tp`` is all ranks, ``objects1`` ranks 0 and 1, and ``objects3`` ranks 0 to 3 where there are so many.

    Args:
        world: the ranks.
        strategy: which strategy must serve all-reduce; "" leaves it to the platform.
        more: options.

    Raises:
        ConfigurationError: another strategy serves it here.
    """
    chosen: dict[str, Any] = {}
    if strategy == "gloo" and "shm" in attrs.fields_dict(cg.CommunicatorOptions):
        chosen["shm"] = False
    groups = {f"objects{readers}": cg.Positions("tp", tuple(range(readers + 1))) for readers in (1, 3) if readers < world.size}
    layout = cg.Layout(world.size, tp=world.size, groups=groups)
    name = " ".join(["bench", strategy or "default", *map(str, more.values())])
    ctx = world.context(layout, name=name, options=cg.CommunicatorOptions(**chosen, **more))
    serving = ctx.tp.communicators["all_reduce"]
    if strategy and serving[0] != strategy:
        ctx.close()
        raise ConfigurationError(f"--strategy {strategy}: these ranks are served by {', then '.join(serving)}")
    return ctx


class Tensors(Library):
    """Operations of `ctx.tp` on ordinary tensors."""

    name = "commgraph"

    def __init__(self, job: Job, ctx: cg.ParallelContext) -> None:
        super().__init__(job)
        self.group = ctx.tp

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """Every operation."""
        x, out, group = buffers.x, buffers.out, self.group
        me = group.rank_in_group
        halves = dict(zip("ab", x.tensor_split(2), strict=True))
        calls: dict[str, Callable[[], object]] = {
            "all_reduce_": lambda: group.all_reduce_(x),
            "all_reduce": lambda: group.all_reduce(x),
            "all_gather": lambda: group.all_gather(x, 0, out=out),
            "reduce_scatter": lambda: group.reduce_scatter(x, 0, out=out),
            "all_to_all": lambda: group.all_to_all(x, out=out),
            "broadcast": lambda: group.broadcast(x, 0),
            "barrier": group.barrier,
            "send_recv": there_and_back(me, lambda peer: group.send(x, peer), lambda peer: group.recv(out.shape, out.dtype, peer, out=out)),
            "tensor_dict": there_and_back(me, lambda peer: group.send_tensor_dict(halves, peer), group.recv_tensor_dict),
        }
        return calls.get(operation)

    def strategy(self, operation: str, buffers: Buffers) -> str:
        """Return the first strategy in the group's table that accepts the call."""
        operation = _IN_THE_TABLE.get(operation, operation)
        x = max(buffers.x, buffers.out, key=torch.Tensor.numel)
        names = self.group.communicators[operation]
        for name in names:
            if self.group.communicator(name).accepts(operation, tuple(x.shape), x.dtype, x.device, capturing=False):
                return name
        return names[-1]


class SharedTensors(Tensors):
    """commgraph on tensors in memory that the group shares, from `GroupCoordinator.empty`."""

    def __init__(self, job: Job, ctx: cg.ParallelContext, nbytes: int) -> None:
        super().__init__(job, ctx)
        self._nbytes = nbytes
        self._pools: list[torch.Tensor] = []
        self._turn = itertools.cycle((0, 1))

    def available(self) -> str | None:
        """Needs `GroupCoordinator.empty`, and a strategy that uses its memory."""
        if not hasattr(self.group, "empty"):
            return "tensors in shared memory: this commgraph has no GroupCoordinator.empty"
        serving = self.group.communicators["all_reduce"][0]
        return "tensors in shared memory: these ranks communicate by gloo, which has none" if serving == "gloo" else None

    def prepare(self) -> None:
        """Allocates two buffers of the largest size, which the group keeps until it is closed."""
        empty: Any = getattr(self.group, "empty")  # noqa: B009 - not there in every version
        self._pools = [empty(self._nbytes, torch.uint8) for _ in range(2)]

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the front of one of the buffers, in turn, so that x and out of a case differ."""
        assert numel * dtype.itemsize <= self._nbytes, "the pools are made for the largest size of the plan"
        return self._pools[next(self._turn)][: numel * dtype.itemsize].view(dtype)

    def strategy(self, operation: str, buffers: Buffers) -> str:
        """Returns the strategy, with a note that the tensors are shared."""
        return f"{super().strategy(operation, buffers)}, shared tensors"


class DeviceTensors(Tensors):
    """commgraph on tensors of this rank's device, which is synchronized at the end of each batch."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """On the device."""
        return torch.empty(numel, dtype=dtype, device=self.group.device)

    def batch(self, call: Callable[[], object]) -> Callable[[int], object]:
        """Returns a batch that ends by synchronizing the device."""
        several, world = repeat(call), self.job.world

        def batch(calls: int) -> None:
            several(calls)
            world.platform.synchronize(world.device)

        return batch

    def strategy(self, operation: str, buffers: Buffers) -> str:
        """Returns the strategy, with the device."""
        return f"{super().strategy(operation, buffers)}, {self.job.world.platform.name}"


class Objects(Library):
    """One of commgraph's calls to send objects.

    Attributes:
        method: as the table shows it, with the strategy where one was asked for.
    """

    name = "commgraph"

    def __init__(self, job: Job, ctx: cg.ParallelContext, method: str, strategy: str = "") -> None:
        super().__init__(job)
        self.method = f"{method}, {strategy}" if strategy else method
        self._method = method
        self._ctx = ctx

    def available(self) -> str | None:
        """Needs `MessageQueue`, where that is the method."""
        if self._method == "MessageQueue" and not hasattr(cg, "MessageQueue"):
            return "objects: this commgraph has no MessageQueue"
        return None

    def channel(self, readers: int) -> Channel | None:
        """On the group of the writer and its readers."""
        group = self._ctx[f"objects{readers}"]
        if self._method == "MessageQueue":
            return _Queues(group, self.job.world)
        return _Broadcasts(group) if self._method == "broadcast_object" else _Messages(group)


class _Messages(Channel):
    def __init__(self, group: cg.GroupCoordinator) -> None:
        self.group = group
        self._targets = range(1, group.world_size) if group.rank_in_group == 0 else (0,)

    def send(self, obj: object) -> None:
        for target in self._targets:
            self.group.send_object(obj, target)

    def recv(self, source: int = 0) -> Any:
        return self.group.recv_object(source)


class _Broadcasts(_Messages):
    """Both directions by broadcast between two; among more a reader answers by send_object, which concerns the writer alone."""

    def send(self, obj: object) -> None:
        me = self.group.rank_in_group
        if me == 0 or self.group.world_size == 2:
            self.group.broadcast_object(obj, me)
        else:
            super().send(obj)

    def recv(self, source: int = 0) -> Any:
        if source == 0 or self.group.world_size == 2:
            return self.group.broadcast_object(None, source)
        return super().recv(source)


class _Queues(Channel):
    """One queue to all readers, and one back from each."""

    def __init__(self, group: cg.GroupCoordinator, world: cg.World) -> None:
        queue: Any = getattr(cg, "MessageQueue")  # noqa: B009 - not there in every version
        me, readers = group.rank_in_group, group.world_size - 1
        nodes = [world.nodes[rank] for rank in group.ranks]
        peers = range(1, readers + 1) if me == 0 else (0,)
        # Readers of this host have the lowest numbers, as ranks of one host follow each other. Others come by the address of the World.
        near = len(list(itertools.takewhile(lambda peer: nodes[peer] == nodes[me], peers)))
        address = None if near == len(peers) else world._builder.address
        mine = queue.create(len(peers), n_local_readers=near, address=address)
        handles: Sequence[Any] = group.all_gather_object(mine.handle)
        self._out = mine
        self._in = {r: queue.attach(handles[r], 0) for r in range(1, readers + 1)} if me == 0 else {0: queue.attach(handles[0], me - 1)}
        for end in (self._out, *self._in.values()):
            end.wait_until_ready(_READY_SECONDS)

    def send(self, obj: object) -> None:
        self._out.enqueue(obj)

    def recv(self, source: int = 0) -> Any:
        return self._in[source].dequeue()

    def close(self) -> None:
        for end in (*self._in.values(), self._out):
            end.close()
