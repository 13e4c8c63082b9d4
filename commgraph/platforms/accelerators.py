"""Machines with devices. None of these has run on a device yet; their choices are tested with stand-ins for one."""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import msgspec
import torch

from commgraph import compat
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.communicators.shm import teller
from commgraph.communicators.staged import StagedCommunicator
from commgraph.communicators.torch_backend import TorchCommunicator
from commgraph.errors import BackendUnavailableError
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import host_chain

__all__ = ["CudaPlatform", "DevicePlatform", "RocmPlatform", "TpuPlatform", "XpuPlatform"]


class _Word(msgspec.Struct):
    """What a rank tells the others before a backend for devices is made."""

    problem: str
    node: int
    device: str


class DevicePlatform(Platform):
    """What platforms with devices have in common: a backend of torch's for device tensors, the host's strategies for the rest.

    The chain of a group that serves device tensors is the backend, the host's strategies for host tensors, and the way by the host for what
    the backend does not serve; a group that does not has the host's alone.
    """

    device_type: ClassVar[str]

    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def communicators(self, facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator | Refused]:
        if facts.options.backend not in (None, "gloo", self.backend()):
            raise BackendUnavailableError(
                f"options ask for backend {facts.options.backend!r}; on the {self.name} platform there are {self.backend()!r} and 'gloo'"
            )
        host = list(host_chain(facts, transport))
        if not facts.wants_device:
            return host
        live = [one for one in host if isinstance(one, Communicator)]
        return [self._over_backend(facts, transport), *host, StagedCommunicator(facts.device, live)]

    @abc.abstractmethod
    def problem(self, facts: GroupFacts) -> str:
        """Why this rank has no backend for devices; empty where it has one."""

    @abc.abstractmethod
    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        """A live backend of torch's for this group, where no rank has a problem. Collective."""

    def identity(self, device: torch.device) -> str:
        """Names a device on its host: two ranks with the same one share it."""
        return str(device)

    def _over_backend(self, facts: GroupFacts, transport: GlooTransport) -> Communicator | Refused:
        """The backend's strategy on every rank, or on every rank the same reason why there is none."""
        name = self.backend()
        if facts.options.backend == "gloo":
            return Refused(name, "options.backend='gloo'")
        tell = teller(GlooCommunicator(transport), name, facts.limits.build_timeout)
        mine = _Word(self.problem(facts)[:500], facts.nodes[facts.rank_in_group], self.identity(facts.device))
        said = [msgspec.msgpack.decode(word, type=_Word) for word in tell(msgspec.msgpack.encode(mine))]
        problems = [f"rank {rank}: {word.problem}" for rank, word in zip(facts.ranks, said, strict=True) if word.problem]
        reason = problems[0] if problems else _shared(facts.ranks, said)
        if reason:
            warnings.warn(
                f"{name} cannot serve {self.device_type} tensors ({reason}); they go by way of the host",
                RuntimeWarning,
                stacklevel=2,
            )
            return Refused(name, reason)
        backend = self.make_backend(facts, timedelta(seconds=facts.limits.timeout))
        return TorchCommunicator(name, backend, facts.device, facts.rank_in_group, len(facts.ranks))


def _shared(ranks: Sequence[int], said: Sequence[_Word]) -> str:
    """Which ranks have the same device, in words: a backend refuses that. Empty where none have."""
    by_device: dict[tuple[int, str], list[int]] = {}
    for rank, word in zip(ranks, said, strict=True):
        by_device.setdefault((word.node, word.device), []).append(rank)
    return "; ".join(f"ranks {sharing} share {device}" for (_, device), sharing in by_device.items() if len(sharing) > 1)


class CudaPlatform(DevicePlatform):
    """NVIDIA GPUs: NCCL on a stand-alone process group, connected when the context is built. Not yet run on a GPU."""

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"

    @classmethod
    def available(cls) -> bool:
        return torch.version.hip is None and torch.cuda.is_available()

    def backend(self) -> str:
        return "nccl"

    def problem(self, facts: GroupFacts) -> str:
        if not compat.nccl_available():
            return "this torch has no NCCL, or sees no GPU"
        count = torch.cuda.device_count()
        if (facts.device.index or 0) < count:
            return ""
        return f"{facts.device} does not exist, there are {count} (is CUDA_VISIBLE_DEVICES set per rank? then give device=)"

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        return compat.make_nccl(facts.store, facts.rank_in_group, len(facts.ranks), timeout, facts.device)

    def identity(self, device: torch.device) -> str:
        return f"GPU {torch.cuda.get_device_properties(device).uuid}" if torch.cuda.is_available() else str(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def side_stream(self, device: torch.device, stream: Any) -> Iterator[Any]:
        current = torch.cuda.current_stream(device)
        side = torch.cuda.Stream(device) if stream is None else stream
        if side != current:
            side.wait_stream(current)
        with torch.cuda.stream(side):
            yield side

    def is_capturing(self, device: torch.device) -> bool:
        return torch.cuda.is_current_stream_capturing()


class RocmPlatform(CudaPlatform):
    """AMD GPUs, which torch calls CUDA, with RCCL under NCCL's name. No such device has run it."""

    name: ClassVar[str] = "rocm"

    @classmethod
    def available(cls) -> bool:
        return torch.version.hip is not None and torch.cuda.is_available()


class XpuPlatform(DevicePlatform):
    """Intel GPUs, by torch's XCCL, which reduces in place: an out-of-place reduction clones its input first. No such device has run it."""

    name: ClassVar[str] = "xpu"
    device_type: ClassVar[str] = "xpu"

    @classmethod
    def available(cls) -> bool:
        return torch.xpu.is_available()

    def backend(self) -> str:
        return "xccl"

    def problem(self, facts: GroupFacts) -> str:
        return "" if torch.distributed.is_xccl_available() else "this torch was built without XCCL"

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        return compat.make_xccl(facts.store, facts.rank_in_group, len(facts.ranks), timeout)

    def synchronize(self, device: torch.device) -> None:
        torch.xpu.synchronize(device)

    def empty_cache(self) -> None:
        torch.xpu.empty_cache()


class TpuPlatform(DevicePlatform):
    """TPUs by torch_xla. Its collectives live in a graph of its own, which this does not build: tensors go by way of the host.

    No such device has run it.
    """

    name: ClassVar[str] = "tpu"
    device_type: ClassVar[str] = "xla"

    @classmethod
    def available(cls) -> bool:
        return importlib.util.find_spec("torch_xla") is not None

    def backend(self) -> str:
        return "xla"

    def problem(self, facts: GroupFacts) -> str:
        return "XLA has no process group that commgraph could use"

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        raise BackendUnavailableError(self.problem(facts))
