"""Platforms with devices. None of them has run on a device yet; their choices are tested with stand-ins for one."""

from __future__ import annotations

import abc
import importlib
import importlib.util
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import msgspec
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.accelerators.custom_all_reduce import CustomAllReduce, Kernels, TorchKernels, probe_peer_access
from commgraph.accelerators.custom_all_reduce.peers import command_of
from commgraph.accelerators.host_staged import HostStagedCommunicator
from commgraph.accelerators.kernel_table import KernelTable
from commgraph.accelerators.streams import Streams, TorchStreams
from commgraph.accelerators.together import together
from commgraph.accelerators.torch_backend import TorchCommunicator
from commgraph.accelerators.xla import XlaCommunicator
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.network import strategy_over
from commgraph.communicators.shm import exchange_bytes
from commgraph.communicators.transport import Transport
from commgraph.deadline import Deadline
from commgraph.errors import BackendUnavailableError, ConfigurationError
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import host_chain

__all__ = ["CudaPlatform", "DevicePlatform", "RocmPlatform", "TpuPlatform", "XpuPlatform"]


class _Word(msgspec.Struct):
    """A rank's message to the others before a backend for devices is made."""

    problem: str
    node: int
    device: str


class _PeerWord(msgspec.Struct):
    """A rank's message to the others before kernels over each other's memory are made."""

    problem: str
    process: str
    capability: str
    token: str


class DevicePlatform(Platform):
    """Base of the platforms with devices: a backend of torch's for device tensors, the host's strategies for the rest.

    The chain of a group that serves device tensors is kernels over the peers' memory (where the platform has some), the backend, the host's
    strategies for host tensors, and the host-staged strategy for calls that the backend does not serve; a group without device tensors has
    the host's alone.
    """

    device_type: ClassVar[str]

    trial_seconds: ClassVar[float] = 60.0
    """Deadline of a child process that probes the peers' memory, its start included."""

    linked: ClassVar[float] = 80.0
    """10^9 bytes a second from the slowest peer, below which more than two devices are taken to be without direct links. PCIe of the fifth
    generation gives about 55, the links of the slowest device with a row in the table 250."""

    kernel_ranks: ClassVar[frozenset[int]] = frozenset({2, 4, 8})
    """Group sizes that the kernels can serve, whatever a table says."""

    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
        if facts.options.backend not in (None, "gloo", self.backend()):
            raise BackendUnavailableError(
                f"options ask for backend {facts.options.backend!r}; on the {self.name} platform there are {self.backend()!r} and 'gloo'"
            )
        host = list(host_chain(facts, transport))
        if not facts.wants_device:
            return host
        live = [one for one in host if isinstance(one, Communicator)]
        staged = HostStagedCommunicator(facts.device, live)
        backend = self._over_backend(facts, transport, staged)
        custom = self._custom(facts, transport, staged if isinstance(backend, Refused) else backend)
        return [*custom, backend, *host, staged]

    @abc.abstractmethod
    def problem(self, facts: GroupFacts) -> str:
        """Return why this rank has no backend for devices; empty where it has one."""

    @abc.abstractmethod
    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        """Make a live backend of torch's for this group, where no rank has a problem. Collective; on a thread of its own."""

    def make_strategy(self, facts: GroupFacts, rest: Communicator) -> Communicator:
        """Make the strategy of the backend, where no rank has a problem; `rest` serves the calls that it does not. Collective."""
        timeout = timedelta(seconds=facts.limits.device_timeout)
        backend = together(facts, self.backend(), lambda mine: self.make_backend(mine, timeout), lambda late: late.abort())
        return TorchCommunicator(self.backend(), backend, facts.device, facts.rank_in_group, len(facts.ranks), facts.store)

    def identity(self, device: torch.device) -> str:
        """Return a name of the device on its host: ranks with equal names share it."""
        return str(device)

    def streams(self, device: torch.device) -> Streams | None:
        return TorchStreams(device) if device.type == self.device_type else None

    def _over_backend(self, facts: GroupFacts, transport: Transport, rest: Communicator) -> Communicator | Refused:
        """Return the backend's strategy on every rank, or on every rank the same `Refused`."""
        name = self.backend()
        if facts.options.backend == "gloo":
            return Refused(name, "options.backend='gloo'")
        exchange = exchange_bytes(strategy_over(transport), name, Deadline.after(facts.limits.build_timeout))
        mine = _Word(self.problem(facts)[:500], facts.nodes[facts.rank_in_group], self.identity(facts.device))
        said = [msgspec.msgpack.decode(word, type=_Word) for word in exchange(msgspec.msgpack.encode(mine))]
        problems = [f"rank {rank}: {word.problem}" for rank, word in zip(facts.ranks, said, strict=True) if word.problem]
        reason = problems[0] if problems else _shared(facts.ranks, said)
        if reason:
            warnings.warn(
                f"{name} cannot serve {self.device_type} tensors ({reason}); they are staged through the host",
                RuntimeWarning,
                stacklevel=2,
            )
            return Refused(name, reason)
        return self.make_strategy(facts, rest)

    # Kernels over the peers' memory.

    def peer_problem(self) -> str:
        """Return why this rank cannot run kernels over the peers' memory; empty where it can."""
        return f"there are no kernels for the {self.name} platform"

    def peer_process(self) -> str:
        """Return a name of this rank's process: device memory is shared between processes, and not within one."""
        return f"{socket.gethostname()} {os.getpid()}"

    def peer_trial(self, facts: GroupFacts) -> Callable[[int], Sequence[str]]:
        """Return a function from the port where the children meet to the command line of one that probes the peers' memory."""
        return command_of(facts.rank_in_group, len(facts.ranks), facts.device.index or 0)

    def make_kernels(self, facts: GroupFacts, name: str, room: int) -> Kernels:
        """Make the buffers of a group, and the kernels on them. Called where the probe succeeded; collective; on a thread of its own."""
        return TorchKernels(name, dist.PrefixStore("symmetric", facts.store), facts.rank_in_group, len(facts.ranks), facts.device, room)

    def _custom(self, facts: GroupFacts, transport: Transport, rest: Communicator) -> list[Communicator | Refused]:
        """Return the strategy on every rank, or on every rank the same `Refused`; an empty list on a platform without kernels."""
        if not self.capability(facts.device):
            return []
        name, options, n = CustomAllReduce.name, facts.options, len(facts.ranks)
        if options.custom_all_reduce is False:
            return [Refused(name, "options.custom_all_reduce=False")]
        if len(set(facts.nodes)) > 1:
            return [Refused(name, f"its {n} ranks are on {len(set(facts.nodes))} hosts")]
        table = options.custom_all_reduce if isinstance(options.custom_all_reduce, KernelTable) else KernelTable.shipped()
        exchange = exchange_bytes(strategy_over(transport), name, Deadline.after(facts.limits.build_timeout))
        mine = _PeerWord(self.peer_problem()[:500], self.peer_process(), self.capability(facts.device), os.urandom(8).hex())
        said = [msgspec.msgpack.decode(word, type=_PeerWord) for word in exchange(msgspec.msgpack.encode(mine))]
        reason = _no_kernels(facts.ranks, said, table, self.kernel_ranks)
        if reason:
            return [Refused(name, reason)]
        access = facts.proofs.find(facts.ranks)
        if access is None:
            access = probe_peer_access(exchange, self.peer_trial(facts), facts.ranks, facts.rank_in_group, seconds=self.trial_seconds)
            facts.proofs.add(facts.ranks, access)
        if access.problem:
            return [Refused(name, access.problem)]
        if n > 2 and access.gigabytes < self.linked:
            slow = f"{access.gigabytes:.0f} GB/s to the slowest, needs {self.linked:g}"
            return [Refused(name, f"{n} devices without links of their own: {slow}")]
        plan = table.plan(said[0].capability, n, multicast=access.multicast)
        room = min(options.custom_all_reduce_bytes, plan.max_bytes)
        if not room:
            return [Refused(name, f"its table names no kernel that these devices have{'' if access.multicast else ', without multicast'}")]
        kernels = together(facts, name, lambda mine: self.make_kernels(mine, f"commgraph {said[0].token}", room), lambda late: late.close())
        return [CustomAllReduce(kernels, plan, rest, facts.device, self.streams(facts.device))]


def _no_kernels(ranks: Sequence[int], said: Sequence[_PeerWord], table: KernelTable, possible: frozenset[int]) -> str:
    """Return why these ranks cannot use kernels over each other's memory, alike on all of them; empty where they can."""
    problems = [f"rank {rank}: {word.problem}" for rank, word in zip(ranks, said, strict=True) if word.problem]
    if problems:
        return problems[0]
    kinds = sorted({word.capability for word in said})
    if len(kinds) > 1:
        return f"devices of different kinds: {', '.join(kinds)}"
    if len({word.process for word in said}) < len(said):
        return "two of its ranks are threads of one process"
    sizes = [size for size in table.sizes(kinds[0]) if size in possible]
    if not sizes:
        return f"its table has no row for devices of kind {kinds[0]}"
    if len(ranks) not in sizes:
        *some, last = map(str, sizes)
        return f"{len(ranks)} ranks, needs {', '.join(some)} or {last}" if some else f"{len(ranks)} ranks, needs {last}"
    return ""


def _shared(ranks: Sequence[int], said: Sequence[_Word]) -> str:
    """Return a text that names the ranks with the same device, which a backend refuses; empty where there are none."""
    by_device: dict[tuple[int, str], list[int]] = {}
    for rank, word in zip(ranks, said, strict=True):
        by_device.setdefault((word.node, word.device), []).append(rank)
    return "; ".join(f"ranks {sharing} share {device}" for (_, device), sharing in by_device.items() if len(sharing) > 1)


class CudaPlatform(DevicePlatform):
    """NVIDIA GPUs. Not yet run on a GPU.

    NCCL on a stand-alone process group that is connected when the context is built; before it, between GPUs of one host that access each
    other's memory, kernels over torch's symmetric memory.
    """

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
        settings = dict(facts.options.backend_settings)
        try:
            return compat.make_nccl(facts.store, facts.rank_in_group, len(facts.ranks), timeout, facts.device, settings)
        except AttributeError as error:
            raise ConfigurationError(f"options.backend_settings={settings}: {error}") from None

    def identity(self, device: torch.device) -> str:
        return f"GPU {torch.cuda.get_device_properties(device).uuid}" if torch.cuda.is_available() else str(device)

    def capability(self, device: torch.device) -> str:
        return ".".join(map(str, torch.cuda.get_device_capability(device)))

    def peer_problem(self) -> str:
        return "" if compat.symmetric_kernels_available() else "this torch has no kernels over symmetric memory"

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


class RocmPlatform(CudaPlatform):
    """AMD GPUs, which torch calls CUDA, with RCCL under NCCL's name. No such device has run it."""

    name: ClassVar[str] = "rocm"

    @classmethod
    def available(cls) -> bool:
        return torch.version.hip is not None and torch.cuda.is_available()

    def capability(self, device: torch.device) -> str:
        """``"gfx942"``, ...: the table that is shipped has no row for any."""
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]


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
    """TPUs by torch_xla, whose collectives are part of the program that it compiles; calls that they do not serve are host-staged.

    No such device has run it.
    """

    name: ClassVar[str] = "tpu"
    device_type: ClassVar[str] = "xla"

    @classmethod
    def available(cls) -> bool:
        return importlib.util.find_spec("torch_xla") is not None

    def backend(self) -> str:
        return "xla"

    def streams(self, device: torch.device) -> Streams | None:
        return None  # XLA orders what it runs by itself

    def problem(self, facts: GroupFacts) -> str:
        if not self.available():
            return "torch_xla is not installed"
        ordinal, rank = int(self._torch_xla("runtime").global_ordinal()), facts.ranks[facts.rank_in_group]
        return "" if ordinal == rank else f"XLA calls it {ordinal}, and its groups are made of XLA's numbers"

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        raise BackendUnavailableError("XLA's collectives are no backend of torch.distributed that could be made for one group")

    def make_strategy(self, facts: GroupFacts, rest: Communicator) -> Communicator:
        return XlaCommunicator(self._torch_xla("core.xla_model"), facts.partition(), rest, facts.device)

    def identity(self, device: torch.device) -> str:
        return f"{device} of process {os.getpid()}"  # each process sees its own device as the first

    def synchronize(self, device: torch.device) -> None:
        self._torch_xla("core.xla_model").wait_device_ops()

    def _torch_xla(self, module: str) -> Any:
        return importlib.import_module(f"torch_xla.{module}")
