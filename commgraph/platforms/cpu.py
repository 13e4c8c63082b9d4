"""Host tensors: through shared memory on one host, over gloo between hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.hierarchical import HierarchicalCommunicator
from commgraph.communicators.network import strategy_over
from commgraph.communicators.shm import ShmCommunicator
from commgraph.communicators.transport import Transport
from commgraph.errors import BackendUnavailableError
from commgraph.platforms.base import GroupFacts, Platform

__all__ = ["CpuPlatform", "host_chain"]


class CpuPlatform(Platform):
    """A machine whose device is the host."""

    name: ClassVar[str] = "cpu"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
        if facts.options.backend not in (None, "gloo"):
            raise BackendUnavailableError(f"options ask for backend {facts.options.backend!r}; on the cpu platform there is 'gloo'")
        return host_chain(facts, transport)


def host_chain(facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
    """Return the strategies for host tensors, on any platform. Collective."""
    whole = strategy_over(transport)
    if not facts.options.shm:
        return Refused("shm", "turned off by options.shm=False"), whole
    sharing = len(facts.nodes) - len(set(facts.nodes))
    if not sharing:
        return Refused("shm", f"no two of the {len(facts.nodes)} ranks share a host"), whole
    if len(set(facts.nodes)) == 1:
        return ShmCommunicator.build(whole, facts.options, facts.limits), whole
    return HierarchicalCommunicator.build(whole, facts.nodes, facts.options, facts.limits), whole
