"""What a platform answers."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch

from commgraph.communicators.base import Communicator, Limits, Refused
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.options import CommunicatorOptions

__all__ = ["GroupFacts", "Platform"]


@attrs.frozen
class GroupFacts:
    """What a platform may base its choice of strategies on: the same on every rank of the group but for `rank_in_group`.

    Attributes:
        ranks: global ranks in group order.
        rank_in_group: place of this rank among them.
        nodes: node of each of them.
        options: those of the group.
        wants_device: whether the group serves device tensors too, or host tensors and objects only.
        limits: of what is built.
    """

    ranks: tuple[int, ...]
    rank_in_group: int
    nodes: tuple[int, ...]
    options: CommunicatorOptions
    wants_device: bool
    limits: Limits


class Platform(abc.ABC):
    """A kind of machine. Stateless: it may serve several worlds at once."""

    name: ClassVar[str]

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

    def empty_cache(self) -> None:  # noqa: B027 - a platform without a cache has nothing to do
        """Gives cached device memory back."""

    @staticmethod
    def detect() -> Platform:
        """The platform of this machine: the host, as long as there is no other."""
        from commgraph.platforms.cpu import CpuPlatform

        return CpuPlatform()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
