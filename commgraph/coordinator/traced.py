"""The operations as calls of operators (`commgraph.ops`): where torch traces, or a gradient is wanted.

torch.compile reads these functions in place of the coordinator's own, so they say no more than has to be in a graph: a group of one rank
leaves nothing there, and what changes a tensor is an operator without side effects and a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from commgraph import compat
from commgraph.errors import UnsupportedTensorError

if TYPE_CHECKING:
    from commgraph.coordinator.facts import GroupFacts

__all__: list[str] = []


def looks_on(*tensors: Any) -> bool:
    """Whether torch wants to see the operator of an eager call: its stand-ins for tensors, or a mode that looks at all of them."""
    return compat.count_modes()() > 0 or any(isinstance(x, torch.Tensor) and compat.is_traced(x) for x in tensors)


def wants(group: GroupFacts, *tensors: Any) -> bool:
    """Whether an eager call has to go through its operator: so, or for a gradient. One rank gets its very input back, with its gradient."""
    grad = group.world_size > 1 and torch.is_grad_enabled()
    return looks_on(*tensors) or any(grad and isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def plain(timeout: Any) -> None:
    """Refuses what an operator has no place for."""
    if timeout is not None:
        raise ValueError(
            "timeout= cannot go with a call that is traced or that wants a gradient: such calls have the deadline of the options "
            "(CommunicatorOptions.host_timeout)"
        )


def fillable(group: GroupFacts, operation: str, x: Any, name: str) -> None:
    """Refuses, before anything is sent, what may not be filled."""
    if isinstance(x, torch.Tensor):
        call, _ = group._message(operation, None)
        call.written(x, name)


def without_gradient(group: GroupFacts, operation: str, x: torch.Tensor) -> None:
    """Refuses in a trace what would cut a graph silently, as `Call.tensor` does in eager."""
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedTensorError(
            f"{operation} on rank {group.rank}, in a group of {group.world_size}: x requires a gradient, which does not pass through "
            f"{operation}; give it x.detach(). Nothing was sent."
        )


def all_reduce(group: GroupFacts, x: torch.Tensor, op: str) -> torch.Tensor:
    return x if group.world_size == 1 else torch.ops.commgraph.all_reduce(x, group, op)


def all_reduce_(group: GroupFacts, x: torch.Tensor, op: str) -> torch.Tensor:
    return x if group.world_size == 1 else x.copy_(torch.ops.commgraph.all_reduce(x, group, op))


def reduce_scatter(group: GroupFacts, x: torch.Tensor, dim: int, op: str, out: torch.Tensor | None) -> torch.Tensor:
    return _into(out, x if group.world_size == 1 else torch.ops.commgraph.reduce_scatter(x, group, dim, op))


def reduce_scatterv(group: GroupFacts, x: torch.Tensor, dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
    if group.world_size == 1:
        return x
    if sizes is None:
        return reduce_scatter(group, x, dim, "sum", None)
    y: torch.Tensor = torch.ops.commgraph.reduce_scatterv(x, group, dim, sizes, _token(group))
    return y


def all_gather(group: GroupFacts, x: torch.Tensor, dim: int, out: torch.Tensor | None) -> torch.Tensor:
    return _into(out, x if group.world_size == 1 else torch.ops.commgraph.all_gather(x, group, dim))


def all_gatherv(
    group: GroupFacts, x: torch.Tensor | Sequence[torch.Tensor], dim: int, sizes: Sequence[int] | None
) -> torch.Tensor | list[torch.Tensor]:
    if not isinstance(x, torch.Tensor):
        return [_all_gatherv(group, piece, dim, sizes) for piece in x]
    return _all_gatherv(group, x, dim, sizes)


def _all_gatherv(group: GroupFacts, x: torch.Tensor, dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
    if group.world_size == 1:
        return x
    if sizes is None:
        return all_gather(group, x, dim, None)
    y: torch.Tensor = torch.ops.commgraph.all_gatherv(x, group, dim, sizes, _token(group))
    return y


def gather(group: GroupFacts, x: torch.Tensor, dst: int, dim: int) -> torch.Tensor | None:
    if group.world_size == 1:
        return x
    without_gradient(group, "gather", x)
    gathered = torch.ops.commgraph.gather(x, group, dst, dim, _token(group))
    return gathered if group.rank_in_group == dst else None


def all_to_all(
    group: GroupFacts,
    x: torch.Tensor,
    scatter_dim: int,
    gather_dim: int,
    input_sizes: Sequence[int] | None,
    output_sizes: Sequence[int] | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    n = group.world_size
    if n == 1:
        return _into(out, x)
    if input_sizes is None and output_sizes is None:
        return _into(out, torch.ops.commgraph.all_to_all(x, group, scatter_dim, gather_dim))
    same = x.dim() > 0 and scatter_dim % x.dim() == gather_dim % x.dim()
    if same and output_sizes is None:
        raise ValueError(
            f"all_to_all on rank {group.rank}, in a group of {n}: input_sizes without output_sizes: what a rank sends is its own affair, "
            "so say what comes from each. Nothing was sent."
        )
    cut = [x.shape[scatter_dim] // n] * n if input_sizes is None else input_sizes
    joined = (cut if same else [x.shape[gather_dim]] * n) if output_sizes is None else output_sizes
    return _into(out, torch.ops.commgraph.all_to_allv(x, group, scatter_dim, gather_dim, cut, joined, _token(group)))


def broadcast(group: GroupFacts, x: torch.Tensor, src: int) -> torch.Tensor:
    return x if group.world_size == 1 else x.copy_(torch.ops.commgraph.broadcast(x, group, src))


def send(group: GroupFacts, x: torch.Tensor, dst: int | None) -> None:
    without_gradient(group, "send", x)
    torch.ops.commgraph.send(x, group, group.next_in_group if dst is None else dst, _token(group))


def recv(
    group: GroupFacts, size: Any, dtype: torch.dtype, src: int | None, device: torch.device | str | None, out: torch.Tensor | None
) -> torch.Tensor:
    place = torch.device(device) if device is not None else group.device if out is None else out.device
    extents = [size] if isinstance(size, int | torch.SymInt) else list(size)
    source = group.prev_in_group if src is None else src
    return _into(out, torch.ops.commgraph.recv(group, extents, dtype, source, place, _token(group)))


def barrier(group: GroupFacts) -> None:
    if group.world_size > 1:
        torch.ops.commgraph.barrier(group, _token(group))


def dispatch(group: GroupFacts, tensors: Sequence[torch.Tensor], sizes: Sequence[int] | None) -> list[torch.Tensor]:
    gathered: list[torch.Tensor] = torch.ops.commgraph.dispatch(list(tensors), group, sizes, _token(group))
    return gathered


def combine(group: GroupFacts, x: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.commgraph.combine(x, group, sizes, _token(group))
    return y


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)


def _token(group: GroupFacts) -> torch.Tensor:
    return group._token if torch.compiler.is_dynamo_compiling() else compat.known_to_modes(group._token)
