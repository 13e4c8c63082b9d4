"""The expert-parallel exchange: rows of tokens to the experts' ranks, and what the experts made of them back.

Two ways. *Gathered*: every rank gets the rows of all, and `combine` adds up and hands out; so it is in vLLM's all-gather manager, for any
routing. *Routed*: with top-k ids, and the number of experts known (`CommunicatorOptions.experts`), a row goes only to the ranks whose
experts it needs, once to each. The shapes then depend on the routing, so that it cannot be traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.communicators.reduction import accumulator
from commgraph.coordinator import traced
from commgraph.coordinator.asynchronous import AsynchronousOperations
from commgraph.coordinator.call import Call, Timeout

__all__ = ["Dispatched", "ExpertOperations"]

Sizes = Sequence[int] | str | None


class Dispatched:
    """What `dispatch` gave: unpacks as ``(hidden_states, *routing, *extra_tensors)``, each with the rows that came, in the order of ranks.

    Attributes:
        tensors: the same as a tuple.
        sizes: rows from each rank; None in a graph where all have as many as this one (``sizes="equal"``).
        route: of the routed way: for each rank the rows of this one that it got, and how many rows this one has; else None.
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


class ExpertOperations(AsynchronousOperations):
    """`dispatch` and `combine`."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        *routing: torch.Tensor,
        sizes: Sizes = None,
        extra_tensors: Sequence[torch.Tensor] = (),
        timeout: Timeout = None,
    ) -> Dispatched:
        """Hands every rank's rows to the ranks of this group, for their experts.

        Rows replicated over tp are dispatched over ``ctx.dp`` (and the result goes through ``ctx.tp.all_reduce``), rows split over tp over
        ``ctx.ep``.

        Args:
            hidden_states: ``[rows, ...]``; the rows may differ in number between ranks, and be none.
            routing: the router logits ``[rows, experts]``; or top-k weights ``[rows, k]`` and ids ``[rows, k]`` (integers; below zero: no
                expert).
            sizes: rows of each rank. ``"equal"``: all have as many as this one. None: they are counted first, by an exchange of its own,
                which cannot be traced.
            extra_tensors: carried along, ``[rows, ...]`` each.
            timeout: deadline of each part.

        Returns:
            A `Dispatched`. With `CommunicatorOptions.experts` and top-k ids it holds the rows that need an expert of this rank; else all.

        Raises:
            TypeError: `routing` is neither of the two.
        """
        call = self._dispatch_call(timeout)
        given = _given(call, hidden_states, routing, extra_tensors)
        counts = _sizes(call, sizes, hidden_states.shape[0])
        if self.world_size == 1:
            return Dispatched(given, counts)
        if is_dynamo_compiling() or traced.wants(self, *given):
            traced.plain(timeout)
            if self._experts is not None and len(routing) == 2:
                if is_dynamo_compiling() or traced.looks_on(*given):
                    raise ValueError(
                        f"dispatch on rank {self.rank}: where rows go depends on the ids, which cannot be traced: leave out options.experts"
                    )
                return self._route(call, given, timeout)
            if sizes is None:
                if is_dynamo_compiling() or traced.looks_on(*given):
                    raise ValueError(
                        f'dispatch on rank {self.rank}: sizes=None counts the rows, which cannot be traced; give sizes, or "equal"'
                    )
                counts = self._count(hidden_states.shape[0], timeout)
            return Dispatched(tuple(traced.dispatch(self, given, counts)), counts)
        if self._experts is not None and len(routing) == 2:
            return self._route(call, given, timeout)
        if sizes is None:
            counts = self._count(hidden_states.shape[0], timeout)
        gathered = self.all_gatherv(list(given), 0, counts, timeout=timeout)
        return Dispatched(tuple(gathered), counts)

    def combine(self, hidden_states: torch.Tensor, dispatched: Dispatched, *, timeout: Timeout = None) -> torch.Tensor:
        """Adds up what the ranks' experts made of the dispatched rows, and gives each rank its own back.

        Args:
            hidden_states: as many rows as ``dispatched[0]``, in its order; what this rank's experts add to each (zeros where none).
            dispatched: of this group's `dispatch`.
            timeout: deadline.

        Returns:
            ``[rows of this rank, ...]``, the sum over all ranks.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return hidden_states if self.world_size == 1 else traced.combine(self, hidden_states, dispatched.sizes)
        call, _ = self._message("combine", timeout)
        if not isinstance(dispatched, Dispatched):
            raise TypeError(
                f"{call.where}: dispatched is a {type(dispatched).__name__}, what `dispatch` returned is needed. Nothing was sent."
            )
        rows = dispatched[0].shape[0]
        if hidden_states.dim() == 0 or hidden_states.shape[0] != rows:
            raise call.wrong(f"hidden_states {tuple(hidden_states.shape)} has not the {rows} rows that were dispatched to this rank")
        if self.world_size == 1:
            return hidden_states
        if dispatched.route is not None:
            return self._bring_back(hidden_states, dispatched, timeout)
        if traced.wants(self, hidden_states):
            traced.plain(timeout)
            return traced.combine(self, hidden_states, dispatched.sizes)
        return self.reduce_scatterv(hidden_states, 0, dispatched.sizes, timeout=timeout)

    @property
    def _experts(self) -> int | None:
        return self._link.experts

    def _dispatch_call(self, timeout: Timeout) -> Call | None:
        """None where torch compiles, which could not read through it; what is wrong is told by the operator then."""
        if is_dynamo_compiling():
            return None
        return self._message("dispatch", timeout)[0]

    def _count(self, rows: int, timeout: Timeout) -> list[int]:
        with torch.no_grad():
            counts: list[int] = self.all_gather(torch.tensor([rows]), 0, timeout=timeout).tolist()
        return counts

    def _route(self, call: Call | None, given: tuple[torch.Tensor, ...], timeout: Timeout) -> Dispatched:
        assert call is not None
        n, ids, experts = self.world_size, given[2], self._experts
        assert experts is not None
        if experts % n:
            raise call.wrong(f"options.experts={experts} do not lie evenly on {n} ranks")
        if ids.numel() and int(ids.max()) >= experts:
            raise call.wrong(f"the ids go up to {int(ids.max())}, options.experts says there are {experts}")
        owner = torch.where(ids < 0, -1, ids // (experts // n))
        rows = [(owner == rank).any(-1).nonzero().squeeze(-1) for rank in range(n)]
        sent = [len(index) for index in rows]
        with torch.no_grad():
            received: list[int] = self.all_to_all(torch.tensor(sent, device=ids.device), timeout=timeout).tolist()
        order = torch.cat(rows)
        arrived = tuple(self.all_to_all(x.index_select(0, order), input_sizes=sent, output_sizes=received, timeout=timeout) for x in given)
        return Dispatched(arrived, received, (rows, given[0].shape[0]))

    def _bring_back(self, x: torch.Tensor, dispatched: Dispatched, timeout: Timeout) -> torch.Tensor:
        assert dispatched.route is not None
        assert dispatched.sizes is not None
        rows, count = dispatched.route
        sent = [len(index) for index in rows]
        back = self.all_to_all(x, input_sizes=dispatched.sizes, output_sizes=sent, timeout=timeout)
        total = x.new_zeros((count, *x.shape[1:]), dtype=accumulator(x.dtype))
        # Rank by rank, so that the order of the sum, and with it its bits, is always the same.
        for index, piece in zip(rows, back.split(sent), strict=True):
            total = total.index_add(0, index, piece.to(total.dtype))
        return total.to(x.dtype)


def _given(call: Call | None, hidden_states: Any, routing: Sequence[Any], extra_tensors: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """All tensors, of equal rows."""
    if not 1 <= len(routing) <= 2 or not all(isinstance(x, torch.Tensor) for x in routing):
        kinds = ", ".join(type(x).__name__ for x in routing) or "nothing"
        where = "dispatch" if call is None else call.where
        raise TypeError(
            f"{where}: the routing is ({kinds}); call dispatch(hidden_states, router_logits) or dispatch(hidden_states, topk_weights, "
            "topk_ids), with tensors. Nothing was sent."
        )
    given = (hidden_states, *routing, *extra_tensors)
    if call is None:
        return given
    names = ("hidden_states", *(("router_logits",) if len(routing) == 1 else ("topk_weights", "topk_ids")))
    for i, x in enumerate(given):
        name = names[i] if i < len(names) else f"extra_tensors[{i - len(names)}]"
        if not isinstance(x, torch.Tensor):
            raise call.unsupported(f"{name} is a {type(x).__name__}, a torch.Tensor is needed")
        if x.dim() == 0 or x.shape[0] != hidden_states.shape[0]:
            raise call.wrong(f"{name} {tuple(x.shape)} and hidden_states {tuple(hidden_states.shape)} have not the same number of rows")
    if len(routing) == 2:
        weights, ids = routing
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise call.unsupported(f"topk_ids are {ids.dtype}, integers are needed: call dispatch(hidden_states, topk_weights, topk_ids)")
        if weights.shape != ids.shape:
            raise call.wrong(f"topk_weights {tuple(weights.shape)} and topk_ids {tuple(ids.shape)} have not the same shape")
    return given


def _sizes(call: Call | None, sizes: Sizes, rows: int) -> list[int] | None:
    if sizes is None or sizes == "equal":
        return [rows] * call.world_size if call is not None and (sizes is not None or call.world_size == 1) else None
    if call is None:
        return list(sizes)  # type: ignore[arg-type]  # numbers, or symbols that stand for them
    if isinstance(sizes, str):
        raise call.wrong(f'sizes={sizes!r}: rows of each rank are needed, or "equal", or None')
    counts = call.sizes(sizes)
    if counts[call.rank_in_group] != rows:
        raise call.wrong(f"sizes={counts} says {counts[call.rank_in_group]} here; hidden_states has {rows} rows")
    return counts
