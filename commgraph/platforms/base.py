"""`Platform`: which device a rank has, and which strategies serve a group there."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs
import torch
import torch.distributed as dist

from commgraph.accelerators.custom_all_reduce import PeerAccessCache
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import Communicator, Limits, Refused
from commgraph.communicators.transport import Transport
from commgraph.options import CommunicatorOptions

__all__ = ["GroupFacts", "Platform", "check_platform"]


@attrs.frozen
class GroupFacts:
    """Facts for the choice of strategies: alike on every rank of the group but for `rank_in_group` and `device`.

    Attributes:
        ranks: global ranks in group order.
        rank_in_group: index of this rank in `ranks`.
        nodes: node of each of them.
        options: those of the group.
        wants_device: whether the group serves device tensors too, or host tensors and objects only.
        limits: of what is built.
        store: holds keys of this group only, for a strategy whose ranks meet there.
        device: of this rank.
        proofs: results of probes of device memory between ranks of the world.
        partition: gives the global ranks of all groups of this kind, for programs that hold them all; costs what the world has ranks.
    """

    ranks: tuple[int, ...]
    rank_in_group: int
    nodes: tuple[int, ...]
    options: CommunicatorOptions
    wants_device: bool
    limits: Limits
    store: dist.Store = attrs.field(eq=False, repr=False)
    device: torch.device = attrs.field(default=torch.device("cpu"))
    proofs: PeerAccessCache = attrs.field(factory=PeerAccessCache, eq=False, repr=False)
    partition: Callable[[], Sequence[Sequence[int]]] = attrs.field(default=tuple, eq=False, repr=False)


class Platform(abc.ABC):
    """A kind of machine. Stateless: it may serve several worlds at once.

    One from another package names its class as an entry point of the group ``commgraph.platforms``; see `detect`.
    """

    name: ClassVar[str]

    @classmethod
    def available(cls) -> bool:
        """Whether this process sees devices of the kind. Called by `detect`; no later call may change the answer."""
        return True

    @abc.abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """Return the device of the rank with that local rank."""

    @abc.abstractmethod
    def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
        """Return live strategies for a group, first choice first; the last one that serves an operation must accept every call of it.

        Collective over the group. A strategy that was considered and cannot serve the group is in the list as `Refused`.

        Args:
            facts: about the group, of at least two ranks.
            transport: the group's connections between hosts, already open; closed by the caller.

        Raises:
            BackendUnavailableError: if `facts.options` ask for something that is not to be had here.
        """

    def backend(self) -> str:
        """Return the name of the torch backend of device groups, e.g. ``"nccl"``."""
        return "gloo"

    def capability(self, device: torch.device) -> str:
        """Return the name of this kind of device in a `commgraph.KernelTable`; empty where there are no kernels for it."""
        return ""

    def synchronize(self, device: torch.device) -> None:  # noqa: B027 - the host has nothing to wait for
        """Wait until everything that was enqueued on the device has ended."""

    def seed(self, seed: int) -> None:
        """Seeds the random numbers of the host and of its devices."""
        torch.manual_seed(seed)

    def empty_cache(self) -> None:  # noqa: B027 - a platform without a cache has nothing to do
        """Release cached device memory."""

    def streams(self, device: torch.device) -> Streams | None:
        """Return the streams of a device; None where calls are not stream-ordered, as on the host."""
        return None

    @staticmethod
    def detect() -> Platform:
        """Return the platform of this machine: the first that is available of those of other packages, CUDA, ROCm, XPU, TPU, and the host.

        Platforms of other packages are the entry points of the group ``commgraph.platforms``, in the order of their names. They are loaded
        now, when a world is made, and not when commgraph is imported.

        Raises:
            ConfigurationError: an entry point that cannot be loaded, or is no `Platform`.
        """
        from commgraph.platforms.detection import detect

        return detect()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_platform(platform: object) -> Platform:
    """Return `platform` as a caller gave it.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(platform, Platform):
        raise TypeError(f"platform is a {type(platform).__name__}; a commgraph.Platform is needed, e.g. commgraph.CpuPlatform()")
    return platform
