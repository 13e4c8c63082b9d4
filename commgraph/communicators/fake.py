"""The strategy of a world without peers: it computes shapes and communicates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commgraph.communicators.base import OPERATIONS, Communicator
from commgraph.communicators.reduction import REDUCE_OPS
from commgraph.deadline import Deadline

__all__ = ["FakeCommunicator"]


class FakeCommunicator(Communicator):
    """Serves every operation on meta tensors, whose results need no data."""

    name = "fake"
    operations = frozenset(OPERATIONS)
    reductions = frozenset(REDUCE_OPS)
    tagged = True

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Meta tensors, and operations without a tensor."""
        return device.type == "meta" or dtype is None

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        pass

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        pass

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        pass

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        pass

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        pass

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if self.rank_in_group == dst else None

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        pass

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        pass

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        pass

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        return next(iter(tags))

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass

    def describe(self) -> str:
        return "shapes only: a world without peers"
