"""The expert-parallel exchange: `dispatch` sends rows of tokens to the experts' ranks, `combine` returns and sums the results.

Two algorithms. *Gathered*, as vLLM's all-gather manager, for any routing: every rank gets the rows of all, and `combine` is a
reduce-scatter. *Routed*, with top-k ids and the number of experts known (`CommunicatorOptions.experts`): a row goes only to the ranks
whose experts it needs, once to each. Shapes depend on the routing then, so that it cannot be traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from commgraph import ambient
from commgraph.communicators.reduction import accumulator
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument, Place
from commgraph.coordinator.exchanges import AllToAll
from commgraph.coordinator.failures import Call
from commgraph.coordinator.gathers import AllGather, AllGatherList, AllGatherV
from commgraph.coordinator.messages import begin_message
from commgraph.coordinator.operation import (
    Group,
    Operation,
    explain,
    is_watched,
    passes_by,
    records,
    refuse_timeout,
    run,
    run_directly,
    whole,
)
from commgraph.coordinator.recorded import entry
from commgraph.coordinator.reductions import ReduceScatter, ReduceScatterV
from commgraph.deadline import Timeout

__all__ = ["Combine", "Dispatch", "Dispatched", "combine", "dispatch"]

Sizes = Sequence[int] | str | None


class Dispatched:
    """Result of `dispatch`: unpacks as ``(hidden_states, *routing, *extra_tensors)``, each with the rows received, in the order of ranks.

    Attributes:
        tensors: all of them, as a tuple.
        sizes: rows from each rank; None in a graph where all have as many as this one (``sizes="equal"``).
        route: of the routed algorithm: for each rank the rows that this one sent to it, and the number of this one's rows; else None.
    """

    __slots__ = ("route", "sizes", "tensors")

    def __init__(
        self, tensors: tuple[torch.Tensor, ...], sizes: Sequence[int] | None, route: tuple[list[torch.Tensor], int] | None = None
    ) -> None:
        self.tensors = tensors
        self.sizes = sizes
        self.route = route

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensors[index]

    def __repr__(self) -> str:
        return f"Dispatched({', '.join(str(tuple(x.shape)) for x in self.tensors)}, sizes={self.sizes})"


def _rows(place: Place, sizes: Sequence[Any] | None, own: Any) -> list[Any]:
    """Return the number of rows of each rank; `sizes` None: all have as many as this one."""
    return [own] * place.world_size if sizes is None else checks.sizes(place, sizes)


class Dispatch(Operation):
    """The torch operator of `dispatch`: several tensors, gathered along their rows.

    Results have the same size on every rank, so that a compiler drops the call on all ranks or on none, and `combine` depends on them
    through the experts: the operator need not change the token, but takes it for its derivative.
    """

    name = "dispatch"
    schema = "dispatch(Tensor[] tensors, Group group, SymInt[]? sizes, Tensor token) -> Tensor[]"
    ordered = True

    @classmethod
    def kernel(cls, tensors: Sequence[torch.Tensor], group: Group, sizes: Sequence[int] | None, token: torch.Tensor) -> list[torch.Tensor]:
        given = [x.detach() for x in tensors]
        with entry(group, cls.name, sequence=group._state.sequence):
            gathered = run_directly(AllGatherList, group, (given, 0, _rows(group, sizes, given[0].shape[0])))
        return [x.clone(memory_format=torch.contiguous_format) if y is x else y for x, y in zip(given, gathered, strict=True)]

    @classmethod
    def fake(cls, place: Place, tensors: Sequence[torch.Tensor], sizes: Sequence[int] | None) -> list[torch.Tensor]:
        rows = _rows(place, sizes, tensors[0].shape[0])
        return [x.new_empty(checks.resized(x, 0, sum(rows))) for x in tensors]

    @classmethod
    def save_for_backward(cls, node: Any, x: Any, group: Any, args: Sequence[Any], output: Any) -> None:
        node.floating = [one.is_floating_point() or one.is_complex() for one in x]

    @classmethod
    def gradient(cls, node: Any, grad: Any) -> Any:
        (sizes,) = node.args
        return [
            Combine.operator(one, node.group, sizes, node.token) if floating and one is not None else None
            for one, floating in zip(grad, node.floating, strict=True)
        ]


class Combine(Operation):
    """The torch operator of `combine`: sums rows on the ranks that they came from."""

    name = "combine"
    schema = "combine(Tensor x, Group group, SymInt[]? sizes, Tensor(a!) token) -> Tensor"
    ordered = True

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, sizes: Sequence[int] | None, token: torch.Tensor) -> torch.Tensor:
        with entry(group, cls.name, sequence=group._state.sequence):
            y: torch.Tensor = ReduceScatterV.kernel(x, group, 0, None if sizes is None else list(sizes), "sum", token)
        return y

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
        return ReduceScatter.fake(place, x, 0, "sum") if sizes is None else ReduceScatterV.fake(place, x, 0, sizes, "sum")

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        (sizes,) = node.args
        (back,) = Dispatch.operator([grad], node.group, sizes, node.token)
        gathered: torch.Tensor = back
        return gathered


def dispatch(
    group: Group,
    hidden_states: torch.Tensor,
    routing: Sequence[torch.Tensor],
    sizes: Sizes,
    extra_tensors: Sequence[torch.Tensor],
    timeout: Timeout,
) -> Dispatched:
    """`GroupCoordinator.dispatch`."""
    traced = is_dynamo_compiling()
    if not traced:
        begin_message(group, "dispatch", timeout)
    try:
        given = _given(group, hidden_states, routing, extra_tensors, traced)
        counts = _sizes(group, sizes, given[0].shape[0], traced)
    except BadArgument as error:
        raise explain(error, group, "dispatch", group._state.sequence) from None
    if group.world_size == 1:
        return Dispatched(given, counts)
    routed = group._experts is not None and len(routing) == 2
    special = routed or sizes is None or timeout is not None
    if traced or (is_watched(*given) and not passes_by(special, *given)):
        refuse_timeout(timeout)
        if routed:
            raise ValueError(
                f"dispatch on rank {group.rank}: where rows go depends on the ids, which cannot be traced: leave out options.experts"
            )
        if sizes is None:
            raise ValueError(f'dispatch on rank {group.rank}: sizes=None counts the rows, which cannot be traced; give sizes, or "equal"')
        return Dispatched(tuple(Dispatch.operator(list(given), group, counts, Dispatch.token(group))), counts)
    with whole(group, "dispatch", timeout):
        if routed:
            return _route(group, given, timeout)
        if counts is None:
            counts = _count(group, hidden_states.shape[0], timeout)
        if records(group, *given):
            return Dispatched(tuple([run(AllGatherV, group, (x, 0, counts), timeout) for x in given]), counts)
        return Dispatched(tuple(run(AllGatherList, group, (given, 0, counts), timeout)), counts)


def combine(group: Group, hidden_states: torch.Tensor, dispatched: Any, timeout: Timeout) -> torch.Tensor:
    """`GroupCoordinator.combine`."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        if group.world_size == 1:
            return hidden_states
        total: torch.Tensor = Combine.operator(hidden_states, group, dispatched.sizes, Combine.token(group))
        return total
    begin_message(group, "combine", timeout)
    sequence = group._state.sequence
    if not isinstance(dispatched, Dispatched):
        where = Call(group.name, "combine", group._state.members, sequence).where
        raise TypeError(f"{where}: dispatched is a {type(dispatched).__name__}, what `dispatch` returned is needed. Nothing was sent.")
    rows = dispatched[0].shape[0]
    if hidden_states.dim() == 0 or hidden_states.shape[0] != rows:
        what = f"hidden_states {tuple(hidden_states.shape)} has not the {rows} rows that were dispatched to this rank"
        raise explain(BadArgument(what), group, "combine", sequence)
    if group.world_size == 1:
        return hidden_states
    if dispatched.route is None and is_watched(hidden_states):
        refuse_timeout(timeout)
        return Combine.operator(hidden_states, group, dispatched.sizes, Combine.token(group))  # type: ignore[no-any-return]  # a tensor
    with entry(group, "combine", sequence=sequence):
        if dispatched.route is not None:
            return _bring_back(group, hidden_states, dispatched, timeout)
        summed: torch.Tensor = run(ReduceScatterV, group, (hidden_states, 0, dispatched.sizes, "sum"), timeout)
    return summed


def _count(group: Group, rows: int, timeout: Timeout) -> list[int]:
    with ambient.shelter():
        counts: list[int] = run(AllGather, group, (ambient.integers([rows]), 0, None), timeout).tolist()
    return counts


def _route(group: Group, given: tuple[torch.Tensor, ...], timeout: Timeout) -> Dispatched:
    n, ids, experts = group.world_size, given[2], group._experts
    assert experts is not None
    sequence = group._state.sequence
    if experts % n:
        raise explain(BadArgument(f"options.experts={experts} do not lie evenly on {n} ranks"), group, "dispatch", sequence)
    if ids.numel() and int(ids.max()) >= experts:
        what = f"the ids go up to {int(ids.max())}, options.experts says there are {experts}"
        raise explain(BadArgument(what), group, "dispatch", sequence)
    owner = torch.where(ids < 0, -1, ids // (experts // n))
    rows = [(owner == rank).any(-1).nonzero().squeeze(-1) for rank in range(n)]
    sent = [len(index) for index in rows]
    with ambient.shelter():
        counted = run(AllToAll, group, (ambient.integers(sent, ids.device), 0, 0, None, None, None), timeout)
        received: list[int] = counted.tolist()
    order = torch.cat(rows)
    arrived = tuple([run(AllToAll, group, (x.index_select(0, order), 0, 0, sent, received, None), timeout) for x in given])
    return Dispatched(arrived, received, (rows, given[0].shape[0]))


def _bring_back(group: Group, x: torch.Tensor, dispatched: Dispatched, timeout: Timeout) -> torch.Tensor:
    assert dispatched.route is not None
    assert dispatched.sizes is not None
    rows, count = dispatched.route
    sent = [len(index) for index in rows]
    back = run(AllToAll, group, (x, 0, 0, list(dispatched.sizes), sent, None), timeout)
    total = x.new_zeros((count, *x.shape[1:]), dtype=accumulator(x.dtype))
    # Rank by rank, so that the order of the sum, and with it its bits, is always the same.
    for index, piece in zip(rows, back.split(sent), strict=True):
        total = total.index_add(0, index, piece.to(total.dtype))
    return total.to(x.dtype)


def _given(
    group: Group, hidden_states: Any, routing: Sequence[Any], extra_tensors: Sequence[Any], traced: bool
) -> tuple[torch.Tensor, ...]:
    """Return all tensors, after a check that they have equal numbers of rows."""
    if not 1 <= len(routing) <= 2 or not all(isinstance(x, torch.Tensor) for x in routing):
        kinds = ", ".join(type(x).__name__ for x in routing) or "nothing"
        where = "dispatch" if traced else Call(group.name, "dispatch", group._state.members, group._state.sequence).where
        raise TypeError(
            f"{where}: the routing is ({kinds}); call dispatch(hidden_states, router_logits) or dispatch(hidden_states, topk_weights, "
            "topk_ids), with tensors. Nothing was sent."
        )
    if not isinstance(hidden_states, torch.Tensor):
        raise BadArgument(f"hidden_states is a {type(hidden_states).__name__}, a torch.Tensor is needed", unsupported=True)
    given = (hidden_states, *routing, *checks.several(extra_tensors, "extra_tensors"))
    if traced:
        return given
    names = ("hidden_states", *(("router_logits",) if len(routing) == 1 else ("topk_weights", "topk_ids")))
    for i, x in enumerate(given):
        name = names[i] if i < len(names) else f"extra_tensors[{i - len(names)}]"
        if not isinstance(x, torch.Tensor):
            raise BadArgument(f"{name} is a {type(x).__name__}, a torch.Tensor is needed", unsupported=True)
        if x.dim() == 0 or x.shape[0] != hidden_states.shape[0]:
            raise BadArgument(f"{name} {tuple(x.shape)} and hidden_states {tuple(hidden_states.shape)} have not the same number of rows")
    if len(routing) == 2:
        weights, ids = routing
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise BadArgument(
                f"topk_ids are {ids.dtype}, integers are needed: call dispatch(hidden_states, topk_weights, topk_ids)", unsupported=True
            )
        if weights.shape != ids.shape:
            raise BadArgument(f"topk_weights {tuple(weights.shape)} and topk_ids {tuple(ids.shape)} have not the same shape")
    return given


def _sizes(group: Group, sizes: Sizes, rows: int, traced: bool) -> list[int] | None:
    if sizes is None or sizes == "equal":
        return [rows] * group.world_size if not traced and (sizes is not None or group.world_size == 1) else None
    if traced:
        return list(sizes)  # type: ignore[arg-type]  # numbers, or symbols that stand for them
    if isinstance(sizes, str):
        raise BadArgument(f'sizes={sizes!r}: rows of each rank are needed, or "equal", or None')
    counts = checks.sizes(group, sizes)
    if counts[group.rank_in_group] != rows:
        raise BadArgument(f"sizes={counts} says {counts[group.rank_in_group]} here; hidden_states has {rows} rows")
    return counts
