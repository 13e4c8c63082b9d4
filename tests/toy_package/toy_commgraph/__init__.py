"""Somebody else's strategy: small sums over the host's gather, in the order of the ranks; and a platform of theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import torch

import commgraph as cg
from commgraph.communicators.base import Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.deadline import Deadline
from commgraph.platforms import GroupFacts

MOST_BYTES = 4096


class ToyCommunicator(cg.Communicator):
    """All-reduce of up to 4 KiB of float32 or int64, for up to 4 ranks."""

    name = "toy"
    operations = frozenset({"all_reduce"})
    size_dependent = True

    def __init__(self, host: GlooCommunicator) -> None:
        super().__init__(host.rank_in_group, host.world_size)
        self.host = host
        self.calls = 0

    @classmethod
    def build(cls, facts: GroupFacts, host: GlooCommunicator) -> ToyCommunicator | Refused:
        n = len(facts.ranks)
        return cls(host) if n <= 4 else Refused(cls.name, f"{n} ranks, serves up to 4")

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        small = dtype is not None and torch.Size(shape).numel() * dtype.itemsize <= MOST_BYTES
        return device.type == "cpu" and small and dtype in (torch.float32, torch.int64)

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        self.calls += 1
        everyone = torch.empty((self.world_size, *x.shape), dtype=x.dtype)
        self.host.all_gather(x.unsqueeze(0), 0, [1] * self.world_size, everyone, tag=tag, deadline=deadline)
        if op in ("sum", "avg"):
            return everyone.sum(0) / (self.world_size if op == "avg" else 1) if x.is_floating_point() else everyone.sum(0)
        if op == "product":
            return everyone.prod(0)
        return everyone.amax(0) if op == "max" else everyone.amin(0)

    def abort(self) -> None:
        self.host.abort()

    def close(self) -> None:
        """Nothing is its own."""

    def describe(self) -> str:
        return f"up to {MOST_BYTES} bytes"


class ToyPlatform(cg.CpuPlatform):
    """The host under another name, where TOY_PLATFORM is set."""

    name: ClassVar[str] = "toy"

    @classmethod
    def available(cls) -> bool:
        return "TOY_PLATFORM" in os.environ
