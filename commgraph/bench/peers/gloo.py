"""torch's own gloo backend, as `torch.distributed` uses it, less 2-4 us of Python that `dist.all_reduce` and the like put in front."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.bench.library import Buffers, Channel, Library, there_and_back

__all__ = ["Peer"]

_TIMEOUT = timedelta(minutes=2)


class Peer(Library):
    """ProcessGroupGloo: its collectives, and objects as `broadcast_object_list` sends them."""

    name = "torch gloo"

    def available(self) -> str | None:
        """Needs a torch with gloo."""
        return None if compat.gloo_available() else "this torch was built without gloo"

    def prepare(self) -> None:
        """Connects all ranks."""
        self._rank, self._size = self.job.world.rank, self.job.world.size
        self._group = self._connect("all", self._size)

    def _connect(self, name: str, size: int) -> Any:
        world = self.job.world
        store = dist.PrefixStore(f"bench/gloo/{name}", world.store)
        return compat.make_gloo(store, world.rank, size, _TIMEOUT, compat.gloo_device(world._builder.address))

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """Every operation."""
        x, out, group = buffers.x, buffers.out, self._group

        def all_reduce() -> None:
            group.allreduce(out.copy_(x)).wait()

        def send_recv() -> None:
            if self._rank == 0:
                group.send([x], 1, 1).wait()
                group.recv([out], 1, 2).wait()
            else:
                group.recv([out], 0, 1).wait()
                group.send([x], 0, 2).wait()

        calls: dict[str, Callable[[], object]] = {
            "all_reduce_": lambda: group.allreduce(x).wait(),
            "all_reduce": all_reduce,
            "all_gather": lambda: group._allgather_base(out, x).wait(),
            "reduce_scatter": lambda: group._reduce_scatter_base(out, x).wait(),
            "all_to_all": lambda: group.alltoall_base(out, x, [], []).wait(),
            "broadcast": lambda: group.broadcast(x, 0).wait(),
            "barrier": lambda: group.barrier().wait(),
            "send_recv": send_recv,
            "tensor_dict": self._tensor_dict(x),
        }
        return calls.get(operation)

    def _tensor_dict(self, x: torch.Tensor) -> Callable[[], object]:
        """As vLLM's send_tensor_dict does it: the pickled description by its size and its bytes, then every tensor into a new one."""
        group = self._group
        first, second = x.tensor_split(2)

        def send(peer: int) -> None:
            described = [(key, value.dtype, value.shape) for key, value in (("a", first), ("b", second))]
            _send(group, described, peer)
            for value in (first, second):
                group.send([value], peer, 0).wait()

        def recv(peer: int) -> dict[str, torch.Tensor]:
            received = {}
            for key, dtype, shape in _recv(group, peer):
                received[key] = torch.empty(shape, dtype=dtype, device="cpu")
                group.recv([received[key]], peer, 0).wait()
            return received

        return there_and_back(self._rank, send, recv)

    def channel(self, readers: int) -> Channel | None:
        """A group of these ranks alone."""
        return _Objects(self._connect(f"objects {readers}", readers + 1), self._rank, readers)

    def close(self) -> None:
        """Drops the group, which closes its connections."""
        self._group = None


class _Objects(Channel):
    """`broadcast_object_list` without its default group: the size, then the bytes of the pickle."""

    def __init__(self, group: Any, rank: int, readers: int) -> None:
        self._group = group
        self._rank = rank
        self._single = readers == 1

    def send(self, obj: object) -> None:
        if self._rank == 0 or self._single:
            data = _bytes_of(obj)
            self._group.broadcast(torch.tensor([data.numel()], device="cpu"), self._rank).wait()
            self._group.broadcast(data, self._rank).wait()
        else:  # a broadcast would need the other readers, too
            _send(self._group, obj, 0)

    def recv(self, source: int = 0) -> Any:
        if source and not self._single:
            return _recv(self._group, source)
        size = torch.empty(1, dtype=torch.int64, device="cpu")
        self._group.broadcast(size, source).wait()
        data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self._group.broadcast(data, source).wait()
        return pickle.loads(data.numpy().data)

    def close(self) -> None:
        self._group = None


def _bytes_of(obj: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj, protocol=5)), dtype=torch.uint8)


def _send(group: Any, obj: object, peer: int) -> None:
    data = _bytes_of(obj)
    group.send([torch.tensor([data.numel()], device="cpu")], peer, 0).wait()
    group.send([data], peer, 0).wait()


def _recv(group: Any, peer: int) -> Any:
    size = torch.empty(1, dtype=torch.int64, device="cpu")
    group.recv([size], peer, 0).wait()
    data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    group.recv([data], peer, 0).wait()
    return pickle.loads(data.numpy().data)
