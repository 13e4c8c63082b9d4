"""Reductions of a group that is spread over several hosts: inside each host in shared memory, between hosts on the network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from commgraph.communicators.base import AccessRefused, CallsDiffer, Communicator, Limits, PeerClosed, PeerLate, Refused
from commgraph.communicators.gloo import GlooCommunicator, Transport
from commgraph.communicators.reduction import REDUCE_OPS, accumulator
from commgraph.communicators.shm import ShmCommunicator, exchange_bytes
from commgraph.deadline import Deadline
from commgraph.options import CommunicatorOptions
from commgraph.waiting import Background

__all__ = ["HierarchicalCommunicator"]


class HierarchicalCommunicator(Communicator):
    """All-reduce in three steps: the ranks of each host, then one rank of each host, then back.

    One tensor per host, and not per rank, crosses the network. Everything is accumulated in float32 or wider, the ranks of a host in
    their order and then the hosts in theirs, and rounded once on the way back: every rank gets the same bits (not those of a group on one
    host, whose order is another one).
    """

    name = "hierarchical"
    operations = frozenset({"all_reduce"})
    reductions = frozenset(REDUCE_OPS)

    def __init__(
        self, group: GlooCommunicator, neighbours: Sequence[int], local: ShmCommunicator | None, leaders: GlooCommunicator | None
    ) -> None:
        super().__init__(group.rank_in_group, group.world_size)
        self._neighbours = tuple(neighbours)
        self._local = local
        self._leaders = leaders

    @classmethod
    def build(
        cls, gloo: GlooCommunicator, nodes: Sequence[int], options: CommunicatorOptions, limits: Limits
    ) -> HierarchicalCommunicator | Refused:
        """Makes the memory of each host. Collective over the group; the strategy on every rank, or a refusal on every rank.

        Args:
            gloo: serves the whole group.
            nodes: the host of each rank in the group.
            options, limits: as for `ShmCommunicator.build`.
        """
        me = gloo.rank_in_group
        hosts = list(dict.fromkeys(nodes))
        neighbours = [rank for rank, node in enumerate(nodes) if node == nodes[me]]
        first_ranks = [list(nodes).index(host) for host in hosts]
        local: ShmCommunicator | Refused | None = None
        if len(neighbours) > 1:
            local = ShmCommunicator.build(_Part(gloo.transport, neighbours).communicator(), options, limits)
        reason = local.reason if isinstance(local, Refused) else ""
        reasons = exchange_bytes(gloo, cls.name, Deadline.after(limits.build_timeout))(reason.encode()[:900])
        for rank, said in enumerate(reasons):
            if said:
                if isinstance(local, ShmCommunicator):
                    local.close()
                return Refused(cls.name, f"on the host of rank {rank} in the group: {said.decode(errors='replace')}")
        assert not isinstance(local, Refused)
        leaders = _Part(gloo.transport, first_ranks).communicator() if me in first_ranks else None
        return cls(gloo, neighbours, local, leaders)

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every reduction on the host."""
        return device.type == "cpu"

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(x, torch.empty_like(x, memory_format=torch.contiguous_format), op, tag, deadline)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(x, x, op, tag, deadline)

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, deadline: Deadline) -> torch.Tensor:
        wide = accumulator(x.dtype)
        # torch converts most unsigned integers, but has no arithmetic of them; the strategies of the two steps have.
        total = x.to(wide).clone() if wide is not None and x.dtype.is_floating_point else x.clone()
        total = total.resolve_conj().resolve_neg().contiguous()
        inner = "sum" if op == "avg" else op
        with self._among_neighbours() as local:
            if local is not None:
                local.all_reduce_(total, inner, tag=tag, deadline=deadline)
        if self._leaders is not None:
            self._leaders.all_reduce_(total, inner, tag=tag, deadline=deadline)
        with self._among_neighbours() as local:
            if local is not None:
                local.broadcast(total, 0, tag=tag, deadline=deadline)
        if op == "avg":
            total /= self.world_size
        return out.copy_(total.to(x.dtype))

    @contextlib.contextmanager
    def _among_neighbours(self) -> Iterator[ShmCommunicator | None]:
        """Call the strategy of this host; an error that names one of its ranks is raised with the rank in the whole group."""
        if self._local is not None:
            self._local.fast.counter.sequence += 1  # one number for each of its calls, as if it were a group of its own
        try:
            yield self._local
        except PeerLate as error:
            raise PeerLate(self._neighbours[error.peer]) from None
        except PeerClosed as error:
            raise PeerClosed(self._neighbours[error.peer], error.reason) from None
        except CallsDiffer as error:
            raise CallsDiffer(self._neighbours[error.peer]) from None
        except AccessRefused as error:
            raise AccessRefused(self._neighbours[error.peer]) from None

    def warmup(self, model: torch.nn.Module | None = None) -> None:
        if self._local is not None:
            self._local.warmup()

    def memory(self) -> int:
        return 0 if self._local is None else self._local.memory()

    def abort(self) -> None:
        if self._local is not None:
            self._local.abort()

    def close(self) -> None:
        if self._local is not None:
            self._local.close()

    @property
    def bytes_sent(self) -> int:
        return 0 if self._local is None else self._local.bytes_sent

    def describe(self) -> str:
        here = "this rank is alone on its host" if self._local is None else f"{self._local.world_size} ranks here, {self._local.describe()}"
        return f"reduces inside each host, then between hosts over gloo; {here}"


class _Part:
    """A transport among some ranks of a group, on the connections of the group."""

    def __init__(self, whole: Transport, members: Sequence[int]) -> None:
        self._whole = whole
        self._members = tuple(members)
        self.rank_in_group = self._members.index(whole.rank_in_group)
        self.world_size = len(self._members)

    def communicator(self) -> GlooCommunicator:
        return GlooCommunicator(self)

    @property
    def bytes_sent(self) -> int:
        return 0  # counted by the whole

    @property
    def has_aborted(self) -> bool:
        return self._whole.has_aborted

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
    ) -> None:
        self._whole.exchange(
            [(x, self._members[peer]) for x, peer in sends],
            [(x, self._members[peer]) for x, peer in receives],
            tag=tag,
            deadline=deadline,
        )

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Background:
        return self._whole.receive_later(tensor, self._members[peer], tag=tag, then=then)

    def abort(self) -> None:
        self._whole.abort()

    def close(self) -> None:
        """Nothing to do: the group owns the connections."""
