"""Stand-ins for a device on a machine without one: host tensors pose as its tensors, and ranks are threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch

from commgraph import compat
from commgraph.accelerators.custom_all_reduce import Kernels
from commgraph.accelerators.platforms import DevicePlatform
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.transport import Transport
from commgraph.platforms import GroupFacts


class Memory:
    """What the ranks of a test share: their buffers by (name, rank), and a barrier for each name."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, int], torch.Tensor] = {}
        self.barriers: dict[str, threading.Barrier] = {}
        self._lock = threading.Lock()

    def barrier(self, name: str, n: int) -> threading.Barrier:
        with self._lock:
            return self.barriers.setdefault(name, threading.Barrier(n))


class HostKernels(Kernels):
    """As torch's over symmetric memory, on threads: what those insist on is insisted on here, and their order of adding is kept.

    `wide` adds small floats in float32, which the oracle of the random programs expects and torch's kernels do not do.
    """

    def __init__(self, memory: Memory, name: str, rank: int, n: int, room: int, *, multicast: bool = True, wide: bool = False) -> None:
        self.room, self.multicast, self._wide = room, multicast, wide
        self._memory, self._name, self._rank, self._n = memory, name, rank, n
        # One more, in which nothing may ever be written.
        self._buffer = torch.full((room + 64,), 0xA5, dtype=torch.uint8)
        memory.buffers[name, rank] = self._buffer
        self.calls: list[str] = []
        self._sync()

    def _sync(self) -> None:
        self._memory.barrier(self._name, self._n).wait(30)

    def _view(self, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        assert numel * dtype.itemsize <= self.room, f"{numel} of {dtype} do not fit into {self.room} bytes"
        return self._memory.buffers[self._name, rank][: numel * dtype.itemsize].view(dtype)

    def _sum(self, numel: int, dtype: torch.dtype, begin: int = 0, end: int | None = None) -> torch.Tensor:
        pieces = [self._view(rank, numel, dtype)[begin:end] for rank in range(self._n)]
        total = pieces[0].clone().float() if self._wide else pieces[0].clone()
        for piece in pieces[1:]:
            total += piece
        return total.to(dtype)

    def _check(self, kernel: str, *tensors: torch.Tensor, reducible: bool = True) -> None:
        for x in tensors:
            assert x.dim() == 1, "1-D"
            assert x.is_contiguous(), "contiguous"
            assert x.numel() > 0, "not empty"
            assert x.nbytes % 16 == 0, f"{x.nbytes} is no multiple of 16 bytes"
            assert not reducible or x.dtype in (torch.float32, torch.bfloat16), f"no kernel adds {x.dtype}"
        assert kernel != "multimem" or self.multicast
        self.calls.append(kernel)

    def all_reduce(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        assert kernel in ("one_shot", "two_shot", "multimem")
        assert x.shape == out.shape
        self._check(kernel, x, out)
        numel, me, n = x.numel(), self._rank, self._n
        self._view(me, numel, x.dtype).copy_(x)
        self._sync()
        if kernel == "one_shot":
            out.copy_(self._sum(numel, x.dtype))
            self._sync()
            return
        begin, end = (numel * rank // n for rank in (me, me + 1))
        part = self._sum(numel, x.dtype, begin, end)
        self._sync()
        for rank in range(n):
            self._view(rank, numel, x.dtype)[begin:end].copy_(part)
        self._sync()
        out.copy_(self._view(me, numel, x.dtype))
        self._sync()

    def all_gather(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        assert kernel == "multimem"
        assert out.numel() == x.numel() * self._n
        self._check(kernel, x, out, reducible=False)
        self._sync()
        for rank in range(self._n):
            self._view(rank, out.numel(), out.dtype).view(self._n, -1)[self._rank].copy_(x)
        self._sync()
        out.copy_(self._view(self._rank, out.numel(), out.dtype))
        self._sync()

    def reduce_scatter(self, kernel: str, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        assert kernel == "one_shot"
        assert [piece.shape for piece in pieces] == [out.shape] * self._n
        self._check(kernel, out, *pieces)
        numel = out.numel() * self._n
        self._view(self._rank, numel, out.dtype).copy_(torch.cat(list(pieces)))
        self._sync()
        out.copy_(self._sum(numel, out.dtype, self._rank * out.numel(), (self._rank + 1) * out.numel()))
        self._sync()

    def drain(self) -> None:
        pass

    def close(self) -> None:
        assert (self._buffer[self.room :] == 0xA5).all(), "something was written past the end of the buffer"
        self._memory.buffers.pop((self._name, self._rank), None)


class FakeStreams(Streams):
    """Streams by name, and a list of what was asked of them: (what, stream, ...)."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.capturing = False
        self._here = threading.local()
        self._made = 0
        self.pending: set[Any] = set()

    def new(self) -> Any:
        self._made += 1
        return f"side {self._made}"

    def current(self) -> Any:
        return getattr(self._here, "stream", "main")

    @contextlib.contextmanager
    def use(self, stream: Any) -> Iterator[Any]:
        before, self._here.stream = self.current(), stream
        try:
            yield stream
        finally:
            self._here.stream = before

    def record_event(self) -> Any:
        event = (self.current(), len(self.said))
        self.said.append(("record_event", *event))
        return event

    def wait_event(self, event: Any) -> None:
        self.said.append(("wait_event", self.current(), event))

    def reached(self, event: Any) -> bool:
        return event not in self.pending

    def record_stream(self, x: torch.Tensor) -> None:
        self.said.append(("record_stream", self.current(), x.data_ptr()))

    def is_capturing(self) -> bool:
        return self.capturing

    def note(self, what: str) -> None:
        self.said.append((what, self.current()))


# What a trial in a child prints where all is well.
GOOD = 'commgraph peers: {"problem":"","multicast":true,"gigabytes":400.0}'


class FakeDevice(DevicePlatform):
    """A platform whose device tensors are host tensors: its backend is torch's gloo, its kernels are `HostKernels`.

    One for each rank, made by a function of the rank; what they share is `memory`.
    """

    name: ClassVar[str] = "fake"
    device_type: ClassVar[str] = "cpu"
    kernel_ranks: ClassVar[frozenset[int]] = frozenset(range(2, 9))

    def __init__(
        self,
        memory: Memory | None = None,
        *,
        capability: str = "9.0",
        peer_problem: str = "",
        problem: str = "",
        identity: str = "",
        trial: str = f"print('{GOOD}')",
        multicast: bool = True,
        wide: bool = False,
    ) -> None:
        self.memory = memory or Memory()
        self.streams_made = FakeStreams()
        self.kernels: list[HostKernels] = []
        self.backends = 0
        self.trials = 0
        self._capability, self._peer_problem, self._problem, self._identity = capability, peer_problem, problem, identity
        self._trial, self._multicast, self._wide = trial, multicast, wide

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def backend(self) -> str:
        return "fakeccl"

    def problem(self, facts: GroupFacts) -> str:
        return self._problem

    def identity(self, device: torch.device) -> str:
        return self._identity or f"device of {os.getpid()} {threading.get_ident()}"

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        self.backends += 1
        return compat.make_gloo(facts.store, facts.rank_in_group, len(facts.ranks), timeout, compat.gloo_device("127.0.0.1"))

    def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
        made = super().communicators(facts, transport)
        for one in made:
            if isinstance(one, Communicator) and one.name == self.backend():
                # That of a device would only enqueue.
                one.stream_ordered = True
        return made

    def capability(self, device: torch.device) -> str:
        return self._capability

    def peer_problem(self) -> str:
        return self._peer_problem

    def peer_process(self) -> str:
        return f"{os.getpid()} {threading.get_ident()}"

    def peer_trial(self, facts: GroupFacts) -> Callable[[int], Sequence[str]]:
        self.trials += 1
        return lambda port: [sys.executable, "-c", self._trial]

    def make_kernels(self, facts: GroupFacts, name: str, room: int) -> Kernels:
        made = HostKernels(self.memory, name, facts.rank_in_group, len(facts.ranks), room, multicast=self._multicast, wide=self._wide)
        self.kernels.append(made)
        return made

    def streams(self, device: torch.device) -> Streams:
        return self.streams_made


def by_name(group: Any) -> Mapping[str, Communicator]:
    return {one.name: one for one in group._state.strategies.communicators}
