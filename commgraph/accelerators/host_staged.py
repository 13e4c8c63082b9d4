"""The strategy for device tensors that nothing else serves: by way of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commgraph.communicators.base import OPERATIONS, Communicator
from commgraph.communicators.memory import copy_back
from commgraph.communicators.reduction import REDUCE_OPS
from commgraph.deadline import Deadline

__all__ = ["HostStagedCommunicator"]

_HOST = torch.device("cpu")


class HostStagedCommunicator(Communicator):
    """Copies to the host, has the host's strategies do it, and copies back: every dtype and operation, at the price of two copies.

    It makes the host wait for the device, and so cannot be captured into a graph.
    """

    name = "staged"
    operations = frozenset(OPERATIONS)
    reductions = frozenset(REDUCE_OPS)

    def __init__(self, device: torch.device, host: Sequence[Communicator]) -> None:
        """Over the host's strategies, first choice first; they stay their owner's to close."""
        super().__init__(host[0].rank_in_group, host[0].world_size)
        self._device = device
        self._host = tuple(host)
        self.tagged = all(one.tagged for one in host if "send" in one.operations)

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on its device that is not being captured."""
        return device.type == self._device.type and not capturing

    def _route(self, operation: str, x: torch.Tensor) -> Communicator:
        return next(
            one for one in self._host if operation in one.operations and one.accepts(operation, x.shape, x.dtype, _HOST, capturing=False)
        )

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        mine = x.cpu()
        return self._route("all_reduce", mine).all_reduce_(_own(mine, x), op, tag=tag, deadline=deadline).to(x.device)

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        landing = torch.empty(out.shape, dtype=out.dtype)
        self._route("all_gather", landing).all_gather(x.cpu(), dim, sizes, landing, tag=tag, deadline=deadline)
        out.copy_(landing)

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        mine, landing = x.cpu(), torch.empty(out.shape, dtype=out.dtype)
        self._route("reduce_scatter", mine).reduce_scatter(mine, dim, sizes, op, landing, tag=tag, deadline=deadline)
        out.copy_(landing)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        landing = [torch.empty(view.shape, dtype=view.dtype) for view in receives]
        # By no shape: pieces differ between ranks, and the choice must not.
        route = self._route("all_to_all", torch.empty(0, dtype=sends[0].dtype))
        route.all_to_all([piece.cpu() for piece in sends], landing, tag=tag, deadline=deadline)
        copy_back(landing, receives)

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        mine = x.cpu()
        staging = None if out is None else torch.empty(out.shape, dtype=out.dtype)
        # By no shape: pieces differ between ranks, and the choice must not.
        self._route("gather", torch.empty(0, dtype=x.dtype)).gather(mine, dim, sizes, staging, dst, tag=tag, deadline=deadline)
        if out is not None and staging is not None:
            out.copy_(staging)

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        staging = torch.empty(out.shape, dtype=out.dtype)
        mine = None if x is None else x.cpu()
        self._route("scatter", torch.empty(0, dtype=out.dtype)).scatter(mine, dim, sizes, staging, src, tag=tag, deadline=deadline)
        out.copy_(staging)

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        mine = x.cpu()
        total = self._route("reduce", mine).reduce(mine, op, dst, tag=tag, deadline=deadline)
        return None if total is None else total.to(x.device)

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        mine = _own(x.cpu(), x)
        self._route("broadcast", mine).broadcast(mine, src, tag=tag, deadline=deadline)
        if self.rank_in_group != src:
            x.copy_(mine)

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        self._route("barrier", torch.empty(0)).barrier(tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        landing = [torch.empty(x.shape, dtype=x.dtype) for x, _ in receives]
        route = self._route("send", torch.empty(0))
        how = {"label": label} if label else {}
        route.exchange(
            [(x.cpu(), peer) for x, peer in sends],
            [(piece, peer) for piece, (_, peer) in zip(landing, receives, strict=True)],
            tag=tag,
            deadline=deadline,
            **how,
        )
        copy_back(landing, [x for x, _ in receives])

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        landing = torch.empty(x.shape, dtype=x.dtype)
        route = self._route("send", torch.empty(0))
        src = route.receive_any(landing, tags, label=label, patience=patience, deadline=deadline)
        if src is not None:
            x.copy_(landing)
        return src

    def abort(self) -> None:
        """Nothing runs here that the host's strategies do not run."""

    def close(self) -> None:
        """Nothing is its own."""

    def describe(self) -> str:
        return f"tensors of {self._device} by way of the host"


def _own(copied: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Contiguous host memory that may be written to: that of a host tensor is the caller's."""
    return copied.clone(memory_format=torch.contiguous_format) if copied is x else copied.contiguous()
