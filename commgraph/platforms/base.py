"""What a platform answers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs
import torch
import torch.distributed as dist

from commgraph.accelerators.custom_all_reduce import Proofs
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import Communicator, Limits, Refused
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.options import CommunicatorOptions

__all__ = ["GroupFacts", "Platform"]


@attrs.frozen
class GroupFacts:
    """What a platform may base its choice of strategies on: the same on every rank of the group but for `rank_in_group` and `device`.

    Attributes:
        ranks: global ranks in group order.
        rank_in_group: place of this rank among them.
        nodes: node of each of them.
        options: those of the group.
        wants_device: whether the group serves device tensors too, or host tensors and objects only.
        limits: of what is built.
        store: holds keys of this group only, for a strategy whose ranks meet there.
        device: of this rank.
        proofs: which ranks of the world were shown to reach each other's device memory.
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
    proofs: Proofs = attrs.field(factory=Proofs, eq=False, repr=False)
    partition: Callable[[], Sequence[Sequence[int]]] = attrs.field(default=tuple, eq=False, repr=False)


class Platform(abc.ABC):
    """A kind of machine. Stateless: it may serve several worlds at once.

    One from another package names its class as an entry point of the group ``commgraph.platforms``; see `detect`.
    """

    name: ClassVar[str]

    @classmethod
    def available(cls) -> bool:
        """Whether this process sees devices of the kind. Asked by `detect`; looks at nothing that a later call could change."""
        return True

    @abc.abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of the rank at this place of its node."""

    @abc.abstractmethod
    def communicators(self, facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator | Refused]:
        """Live strategies for a group, first choice first; the last one that serves an operation must accept every call of it.

        Collective over the group. A strategy that was considered and is not there stands in its place as `Refused`.

        Args:
            facts: about the group, of at least two ranks.
            transport: the group's connections between hosts, already open; closed by whoever made them.

        Raises:
            BackendUnavailableError: if `facts.options` ask for something that is not to be had here.
        """

    def backend(self) -> str:
        """The torch backend of device groups, e.g. ``"nccl"``."""
        return "gloo"

    def capability(self, device: torch.device) -> str:
        """What a `commgraph.KernelTable` calls devices of this kind; empty where there are no kernels for them."""
        return ""

    def synchronize(self, device: torch.device) -> None:  # noqa: B027 - the host has nothing to wait for
        """Waits until everything that was enqueued on the device has ended."""

    def seed(self, seed: int) -> None:
        """Seeds the random numbers of the host and of its devices."""
        torch.manual_seed(seed)

    def empty_cache(self) -> None:  # noqa: B027 - a platform without a cache has nothing to do
        """Gives cached device memory back."""

    def streams(self, device: torch.device) -> Streams | None:
        """The streams of a device; None where calls are not enqueued but made, as on the host."""
        return None

    @staticmethod
    def detect() -> Platform:
        """The platform of this machine: the first that is available of those of other packages, CUDA, ROCm, XPU, TPU, and the host.

        Those of other packages are the entry points of the group ``commgraph.platforms``, in the order of their names. They are loaded now,
        when a world is made, and not when commgraph is imported.

        Raises:
            ConfigurationError: an entry point that cannot be loaded, or is no `Platform`.
        """
        from commgraph.platforms.detection import detect

        return detect()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
