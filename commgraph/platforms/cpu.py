"""Host tensors: through shared memory on one host, over gloo between hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.communicators.hierarchical import HierarchicalCommunicator
from commgraph.communicators.shm import ShmCommunicator
from commgraph.errors import BackendUnavailableError
from commgraph.platforms.base import GroupFacts, Platform

__all__ = ["CpuPlatform", "host_chain"]


class CpuPlatform(Platform):
    """A machine whose device is the host."""

    name: ClassVar[str] = "cpu"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def communicators(self, facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator | Refused]:
        if facts.options.backend not in (None, "gloo"):
            raise BackendUnavailableError(f"options ask for backend {facts.options.backend!r}; on the cpu platform there is 'gloo'")
        return host_chain(facts, transport)


def host_chain(facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator | Refused]:
    """Return the strategies for host tensors, on any platform. Collective."""
    gloo = GlooCommunicator(transport)
    if not facts.options.shm:
        return Refused("shm", "turned off by options.shm=False"), gloo
    sharing = len(facts.nodes) - len(set(facts.nodes))
    if not sharing:
        return Refused("shm", f"no two of the {len(facts.nodes)} ranks share a host"), gloo
    if len(set(facts.nodes)) == 1:
        return ShmCommunicator.build(gloo, facts.options, facts.limits), gloo
    return HierarchicalCommunicator.build(gloo, facts.nodes, facts.options, facts.limits), gloo
