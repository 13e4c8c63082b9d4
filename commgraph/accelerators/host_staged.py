"""The strategy for device tensors that no other strategy serves: staged through the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commgraph import ambient
from commgraph.communicators.base import OPERATIONS, Communicator
from commgraph.communicators.memory import copy_back
from commgraph.communicators.reduction import REDUCE_OPS
from commgraph.deadline import Deadline

__all__ = ["HostStagedCommunicator"]

_HOST = torch.device("cpu")


class HostStagedCommunicator(Communicator):
    """Copies inputs to the host, calls the host's strategies and copies results back: every dtype and operation, for two copies.

    It makes the host wait for the device, and so cannot be captured into a graph.
    """

    name = "staged"
    operations = frozenset(OPERATIONS)
    reductions = frozenset(REDUCE_OPS)

    def __init__(self, device: torch.device, host: Sequence[Communicator]) -> None:
        """`host`: the host's strategies, first choice first; their owner closes them."""
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
        staging = ambient.empty(out.shape, out.dtype)
        self._route("all_gather", staging).all_gather(x.cpu(), dim, sizes, staging, tag=tag, deadline=deadline)
        out.copy_(staging)

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        mine, staging = x.cpu(), ambient.empty(out.shape, out.dtype)
        self._route("reduce_scatter", mine).reduce_scatter(mine, dim, sizes, op, staging, tag=tag, deadline=deadline)
        out.copy_(staging)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        staging = [ambient.empty(view.shape, view.dtype) for view in receives]
        # Chosen without a shape: those of pieces differ between ranks, and the choice must not.
        route = self._route("all_to_all", ambient.empty(0, sends[0].dtype))
        route.all_to_all([piece.cpu() for piece in sends], staging, tag=tag, deadline=deadline)
        copy_back(staging, receives)

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        mine = x.cpu()
        staging = None if out is None else ambient.empty(out.shape, out.dtype)
        # Chosen without a shape: those of pieces differ between ranks, and the choice must not.
        self._route("gather", ambient.empty(0, x.dtype)).gather(mine, dim, sizes, staging, dst, tag=tag, deadline=deadline)
        if out is not None and staging is not None:
            out.copy_(staging)

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        staging = ambient.empty(out.shape, out.dtype)
        mine = None if x is None else x.cpu()
        self._route("scatter", ambient.empty(0, out.dtype)).scatter(mine, dim, sizes, staging, src, tag=tag, deadline=deadline)
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
        self._route("barrier", ambient.empty(0, torch.uint8)).barrier(tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        staging = [ambient.empty(x.shape, x.dtype) for x, _ in receives]
        route = self._route("send", ambient.empty(0, torch.uint8))
        how = {"label": label} if label else {}
        route.exchange(
            [(x.cpu(), peer) for x, peer in sends],
            [(piece, peer) for piece, (_, peer) in zip(staging, receives, strict=True)],
            tag=tag,
            deadline=deadline,
            **how,
        )
        copy_back(staging, [x for x, _ in receives])

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        staging = ambient.empty(x.shape, x.dtype)
        route = self._route("send", ambient.empty(0, torch.uint8))
        src = route.receive_any(staging, tags, label=label, patience=patience, deadline=deadline)
        if src is not None:
            x.copy_(staging)
        return src

    def abort(self) -> None:
        """Nothing to do: the host's strategies, which run the calls, are aborted themselves."""

    def close(self) -> None:
        """Nothing to do: it owns no resources."""

    def describe(self) -> str:
        return f"tensors of {self._device} staged through the host"


def _own(copied: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of x on the host, which may be written to, unlike a host tensor of the caller."""
    return copied.clone(memory_format=torch.contiguous_format) if copied is x else copied.contiguous()
