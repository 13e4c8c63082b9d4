"""The strategy for device tensors that nothing else serves: by way of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from commgraph.communicators.base import OPERATIONS, Communicator
from commgraph.communicators.memory import land

__all__ = ["StagedCommunicator"]

_HOST = torch.device("cpu")


class StagedCommunicator(Communicator):
    """Copies to the host, has the host's strategies do it, and copies back: every dtype and operation, at the price of two copies.

    It makes the host wait for the device, and so cannot be captured into a graph.
    """

    name: ClassVar[str] = "staged"
    operations: ClassVar[frozenset[str]] = frozenset(OPERATIONS)

    def __init__(self, device: torch.device, host: Sequence[Communicator]) -> None:
        """Over the host's strategies, first choice first; they stay their owner's to close."""
        super().__init__(host[0].rank_in_group, host[0].world_size)
        self._device = device
        self._host = tuple(host)

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on its device that is not being captured."""
        return device.type == self._device.type and not capturing

    def _route(self, operation: str, x: torch.Tensor) -> Communicator:
        return next(
            one for one in self._host if operation in one.operations and one.accepts(operation, x.shape, x.dtype, _HOST, capturing=False)
        )

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, timeout: float) -> torch.Tensor:
        mine = x.cpu()
        return self._route("all_reduce", mine).all_reduce_(_own(mine, x), op, tag=tag, timeout=timeout).to(x.device)

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, timeout: float) -> None:
        landing = torch.empty(out.shape, dtype=out.dtype)
        self._route("all_gather", landing).all_gather(x.cpu(), dim, sizes, landing, tag=tag, timeout=timeout)
        out.copy_(landing)

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, timeout: float
    ) -> None:
        mine, landing = x.cpu(), torch.empty(out.shape, dtype=out.dtype)
        self._route("reduce_scatter", mine).reduce_scatter(mine, dim, sizes, op, landing, tag=tag, timeout=timeout)
        out.copy_(landing)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, timeout: float) -> None:
        landing = [torch.empty(view.shape, dtype=view.dtype) for view in receives]
        # By no shape: pieces differ between ranks, and the choice must not.
        route = self._route("all_to_all", torch.empty(0, dtype=sends[0].dtype))
        route.all_to_all([piece.cpu() for piece in sends], landing, tag=tag, timeout=timeout)
        land(landing, receives)

    def gather(self, x: torch.Tensor, pieces: Sequence[torch.Tensor] | None, dst: int, *, tag: int, timeout: float) -> None:
        mine = x.cpu()
        landing = None if pieces is None else [torch.empty(view.shape, dtype=view.dtype) for view in pieces]
        self._route("gather", mine).gather(mine, landing, dst, tag=tag, timeout=timeout)
        if landing is not None and pieces is not None:
            land(landing, pieces)

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, timeout: float) -> None:
        mine = _own(x.cpu(), x)
        self._route("broadcast", mine).broadcast(mine, src, tag=tag, timeout=timeout)
        if self.rank_in_group != src:
            x.copy_(mine)

    def barrier(self, *, tag: int, timeout: float) -> None:
        self._route("barrier", torch.empty(0)).barrier(tag=tag, timeout=timeout)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        timeout: float,
    ) -> None:
        landing = [torch.empty(x.shape, dtype=x.dtype) for x, _ in receives]
        route = self._route("send", torch.empty(0))
        route.exchange(
            [(x.cpu(), peer) for x, peer in sends],
            [(piece, peer) for piece, (_, peer) in zip(landing, receives, strict=True)],
            tag=tag,
            timeout=timeout,
        )
        land(landing, [x for x, _ in receives])

    def abort(self) -> None:
        """Nothing runs here that the host's strategies do not run."""

    def close(self) -> None:
        """Nothing is its own."""

    def describe(self) -> str:
        return f"tensors of {self._device} by way of the host"


def _own(copied: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Contiguous host memory that may be written to: that of a host tensor is the caller's."""
    return copied.clone(memory_format=torch.contiguous_format) if copied is x else copied.contiguous()
