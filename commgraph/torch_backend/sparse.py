"""The sum of sparse tensors."""

from __future__ import annotations

import torch

from commgraph.coordinator import GroupCoordinator
from commgraph.deadline import Timeout
from commgraph.errors import UnsupportedTensorError

__all__ = ["all_reduce_"]


def all_reduce_(group: GroupCoordinator, x: torch.Tensor, op: str, timeout: Timeout) -> None:
    """Fill a sparse tensor with the sum over the group: the entries of all ranks are gathered, and each rank adds them up in rank order.

    Args:
        group: over the ranks.
        x: COO, of equal shape on all ranks; the numbers of entries may differ.
        op: "sum".
        timeout: deadline of each of the three exchanges.
    """
    if op != "sum" or x.layout != torch.sparse_coo:
        raise UnsupportedTensorError(f"allreduce of a sparse tensor ({x.layout}) by {op!r}: a COO tensor can be summed, and nothing else")
    mine = x.coalesce()
    indices, values = mine.indices(), mine.values()
    count = torch.tensor([values.shape[0]], dtype=torch.int64, device=x.device)
    counts = group.all_gather(count, 0, timeout=timeout).tolist()
    entries = group.all_gatherv(values, 0, counts, timeout=timeout)
    places = group.all_gatherv(indices.t().contiguous(), 0, counts, timeout=timeout)
    assert isinstance(entries, torch.Tensor)
    assert isinstance(places, torch.Tensor)
    total = torch.sparse_coo_tensor(places.t(), entries, x.shape, dtype=x.dtype, device=x.device, check_invariants=False).coalesce()
    x.copy_(total)
