"""Host tensors over gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from commgraph.communicators.base import Communicator
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.errors import BackendUnavailableError
from commgraph.platforms.base import GroupFacts, Platform

__all__ = ["CpuPlatform"]


class CpuPlatform(Platform):
    """A machine whose device is the host."""

    name: ClassVar[str] = "cpu"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def communicators(self, facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator]:
        if facts.options.backend not in (None, "gloo"):
            raise BackendUnavailableError(f"options ask for backend {facts.options.backend!r}; on the cpu platform there is 'gloo'")
        return (GlooCommunicator(transport),)
