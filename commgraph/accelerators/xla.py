"""The strategy for XLA devices: collectives of torch_xla, which are part of the program that XLA compiles."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch

from commgraph.communicators.base import Communicator, PeerClosed
from commgraph.communicators.memory import copy_back, staging_for
from commgraph.deadline import Deadline

__all__ = ["XlaCommunicator"]

# torch_xla's names of reductions; an average is a scaled sum.
_KINDS = MappingProxyType({"sum": "sum", "avg": "sum", "max": "max", "min": "min", "product": "mul"})


class XlaCommunicator(Communicator):
    """All-reduce, all-gather and reduce-scatter by ``torch_xla.core.xla_model``. No such device has run it; it is checked with a stub.

    XLA compiles one program for all devices, with all groups of a kind in it: every rank of the world has to make the call, each in its own
    group. Uneven pieces go to the strategy behind it. No call blocks the host, and XLA has its own deadlines.
    """

    name = "xla"
    operations = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
    serves_host = False

    def __init__(self, xla_model: Any, partition: Sequence[Sequence[int]], rest: Communicator, device: torch.device) -> None:
        """Of a group of the ranks of `rest`.

        Args:
            xla_model: the module ``torch_xla.core.xla_model``.
            partition: global ranks of all groups of this kind, which are XLA's ordinals; every rank of the world is in one.
            rest: serves what this does not; its owner's to close.
            device: whose tensors it serves.
        """
        super().__init__(rest.rank_in_group, rest.world_size)
        self._xla: Any = xla_model
        self._partition = [list(group) for group in partition]
        self._rest = rest
        self._device = device
        self._bytes = 0

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Tensors of its device with elements, of a real dtype of at least two bytes or int8 or uint8."""
        fine = dtype is not None and not dtype.is_complex and dtype != torch.bool and not (dtype.is_floating_point and dtype.itemsize == 1)
        return device.type == self._device.type and fine and 0 not in shape

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        y: torch.Tensor = self._open().all_reduce(_KINDS[op], x.contiguous(), scale=self._scale(op), groups=self._partition)
        self._bytes += x.nbytes
        return y

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        if len(set(sizes)) > 1:
            self._rest.all_gather(x, dim, sizes, out, tag=tag, deadline=deadline)
            return
        out.copy_(self._open().all_gather(x.contiguous(), dim=dim, groups=self._partition))
        self._bytes += x.nbytes

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        if len(set(sizes)) > 1:
            self._rest.reduce_scatter(x, dim, sizes, op, out, tag=tag, deadline=deadline)
            return
        staging = staging_for(out)
        piece = self._open().reduce_scatter(
            _KINDS[op],
            x.contiguous(),
            scale=self._scale(op),
            scatter_dim=dim,
            shard_count=self.world_size,
            groups=self._partition,
        )
        staging.copy_(piece)
        copy_back([staging], [out])
        self._bytes += x.nbytes

    def _scale(self, op: str) -> float:
        return 1.0 / self.world_size if op == "avg" else 1.0

    def _open(self) -> Any:
        if self._xla is None:
            raise PeerClosed(self.rank_in_group, "this rank closed the group")
        return self._xla

    def abort(self) -> None:
        """Nothing to do: no call waits on the host."""

    def close(self) -> None:
        self._xla = None

    @property
    def bytes_sent(self) -> int:
        return self._bytes

    def describe(self) -> str:
        return f"collectives of torch_xla in {len(self._partition)} groups"
