"""Collectives of a group that is spread over several hosts: inside each host in shared memory, between hosts on the network."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from commgraph import ambient
from commgraph.communicators.base import COLLECTIVES, Communicator, Limits, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.link_fast import LinkFastPath
from commgraph.communicators.memory import as_bytes, copy_back, dense, staging_for
from commgraph.communicators.part import renumbered
from commgraph.communicators.reduction import REDUCE_OPS, accumulator
from commgraph.communicators.shm import ShmCommunicator, exchange_bytes, kernel_of
from commgraph.communicators.tcp import TcpCommunicator
from commgraph.deadline import Deadline
from commgraph.options import CommunicatorOptions
from commgraph.shm import native_module

__all__ = ["HierarchicalCommunicator"]

# Seconds between two looks at the links and at the rings of a receive from any rank: at first, and at most.
_FIRST, _MOST = 0.0001, 0.01


class HierarchicalCommunicator(Communicator):
    """Collectives in a step inside each host and one between hosts, in which each rank talks to its counterparts: those of its position.

    An all-reduce is a reduce-scatter inside each host, an all-reduce of each share among counterparts, and a gather inside each host: one
    tensor per host crosses the network, and every rank carries its share of it. Everything is accumulated in float32 or wider, the
    ranks of a host in their order and then the hosts in theirs, and rounded once: every rank gets the same bits (not those of a group on
    one host, whose order is another one).

    Messages and all-to-alls go from rank to rank: in shared memory on one host, else over the network.

    Where hosts have different numbers of ranks, there are no counterparts: the first rank of each host carries its all-reduces, and the
    strategies behind this one serve the other collectives but all-to-alls.
    """

    name = "hierarchical"
    tagged = True
    fast: LinkFastPath | None = None
    reductions = frozenset(REDUCE_OPS)

    def __init__(
        self,
        group: GlooCommunicator,
        nodes: Sequence[int],
        local: ShmCommunicator | None,
        across: GlooCommunicator | None,
        *,
        even: bool,
        queues: bool,
    ) -> None:
        """From its two parts.

        Args:
            group: serves the whole group.
            nodes: the host of each rank in the group.
            local: the ranks of this host; None if this is the only one.
            across: the counterparts; where hosts are not even the first rank of each, and None on the others.
            even: whether all hosts have as many ranks.
            queues: whether the memory of each host has rings for messages.
        """
        super().__init__(group.rank_in_group, group.world_size)
        messages = {"send", "recv"} if queues else set()
        self.operations = frozenset({*(COLLECTIVES if even else ("all_reduce", "all_to_all")), *messages})
        numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        # The ranks in the group, by host and position.
        self.hosts: list[list[int]] = [[] for _ in numbers]
        self._places: list[tuple[int, int]] = []
        for rank, node in enumerate(nodes):
            host = numbers[node]
            self._places.append((host, len(self.hosts[host])))
            self.hosts[host].append(rank)
        self._host, self._position = self._places[group.rank_in_group]
        self._native = native_module.load()
        self._local = local
        self._across = across
        self._even = even
        self._group = group
        self.posted = group.posted
        self.links = group.links
        if local is not None and queues:
            self.rings = local.fast
        if even and local is not None and isinstance(across, TcpCommunicator) and isinstance(group, TcpCommunicator):
            self.fast = LinkFastPath(
                across.transport,
                across.pool,
                local=local.fast,
                hosts=self.hosts,
                me=group.rank_in_group,
                whole=group.transport,
            )

    @classmethod
    def build(
        cls, group: GlooCommunicator, nodes: Sequence[int], options: CommunicatorOptions, limits: Limits
    ) -> HierarchicalCommunicator | Refused:
        """Makes the memory of each host. Collective over the group; the strategy on every rank, or a refusal on every rank.

        Args:
            group: serves the whole group.
            nodes: the host of each rank in the group.
            options, limits: as for `ShmCommunicator.build`.
        """
        me = group.rank_in_group
        hosts = [[rank for rank, node in enumerate(nodes) if node == host] for host in dict.fromkeys(nodes)]
        neighbours = next(ranks for ranks in hosts if me in ranks)
        local: ShmCommunicator | Refused | None = None
        if len(neighbours) > 1:
            local = ShmCommunicator.build(group.among(neighbours), options, limits, neighbours)
        reason = local.reason if isinstance(local, Refused) else ""
        reasons = exchange_bytes(group, cls.name, Deadline.after(limits.build_timeout))(reason.encode()[:900])
        for rank, said in enumerate(reasons):
            if said:
                if isinstance(local, ShmCommunicator):
                    local.close()
                return Refused(cls.name, f"on the host of rank {rank} in the group: {said.decode(errors='replace')}")
        assert not isinstance(local, Refused)
        even = len({len(ranks) for ranks in hosts}) == 1
        position = neighbours.index(me)
        across = group.among([ranks[position] for ranks in hosts]) if even or position == 0 else None
        return cls(group, nodes, local, across, even=even, queues=options.message_queue)

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on the host."""
        return device.type == "cpu"

    # Reductions.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._all_reduce(x, self.new(x.shape, x.dtype, x.device), op, tag, deadline)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._all_reduce(x, x, op, tag, deadline)

    def _all_reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, deadline: Deadline) -> torch.Tensor:
        total, inner = _widened(x), _inner(op)
        flat = total.view(-1)
        if self._local is None:
            with self._among_counterparts() as across:
                across.all_reduce_(flat, inner, tag=tag, deadline=deadline)
        elif self._even:
            sizes = [piece.numel() for piece in flat.tensor_split(len(self.hosts[self._host]))]
            mine = flat.new_empty(sizes[self._position])
            with self._among_neighbours() as local:
                local.reduce_scatter(flat, 0, sizes, inner, mine, tag=tag, deadline=deadline)
            with self._among_counterparts() as across:
                across.all_reduce_(mine, inner, tag=tag, deadline=deadline)
            with self._among_neighbours() as local:
                local.all_gather(mine, 0, sizes, flat, tag=tag, deadline=deadline)
        else:
            with self._among_neighbours() as local:
                local.all_reduce_(flat, inner, tag=tag, deadline=deadline)
            if self._across is not None:
                with self._among_counterparts() as across:
                    across.all_reduce_(flat, inner, tag=tag, deadline=deadline)
            with self._among_neighbours() as local:
                local.broadcast(flat, 0, tag=tag, deadline=deadline)
        return self._narrow(total, op, out)

    def _narrow(self, total: torch.Tensor, op: str, out: torch.Tensor) -> torch.Tensor:
        if op == "avg":
            total /= self.world_size
        if out.dtype in (torch.bfloat16, torch.float16) and self._native is not None:
            # Rounded as native calls do it: torch gives NaN other bits, and not the same ones everywhere.
            rounded = staging_for(out)
            self._native.narrow(kernel_of(out.dtype, "sum")[0], rounded.data_ptr(), total.data_ptr(), total.numel())
            copy_back([rounded], [out])
            return out
        return out.copy_(total.view(out.shape).to(out.dtype))

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        given, inner, (host, position) = _widened(x), _inner(op), self._places[dst]
        total: torch.Tensor | None = given
        if self._local is not None:
            with self._among_neighbours() as local:
                total = local.reduce(given, inner, position, tag=tag, deadline=deadline)
        if total is None:
            return None
        with self._among_counterparts() as across:
            total = across.reduce(total, inner, host, tag=tag, deadline=deadline)
        return None if total is None else self._narrow(total, op, self.new(x.shape, x.dtype, x.device))

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        pieces, inner = [_widened(piece).view(-1) for piece in x.split(list(sizes), dim)], _inner(op)
        # For each position, the pieces of all hosts' ranks there.
        columns = [_joined([pieces[ranks[position]] for ranks in self.hosts]) for position in range(len(self.hosts[0]))]
        mine = columns[self._position]
        if self._local is not None:
            whole, lengths = _joined(columns), [len(column) for column in columns]
            mine = torch.empty_like(mine)
            with self._among_neighbours() as local:
                local.reduce_scatter(whole, 0, lengths, inner, mine, tag=tag, deadline=deadline)
        total = mine.new_empty(out.numel())
        with self._among_counterparts() as across:
            across.reduce_scatter(
                mine, 0, [pieces[rank].numel() for rank in self._counterparts()], inner, total, tag=tag, deadline=deadline
            )
        self._narrow(total, op, out)

    # Gathers.

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        views = out.split(list(sizes), dim)
        mine = dense(x).reshape(-1)
        lengths = [views[rank].numel() for rank in self._counterparts()]
        column = mine.new_empty(sum(lengths))
        with self._among_counterparts() as across:
            across.all_gather(mine, 0, lengths, column, tag=tag, deadline=deadline)
        whole = column
        order = self._by_position()
        if self._local is not None:
            lengths = [sum([views[ranks[position]].numel() for ranks in self.hosts]) for position in range(len(self.hosts[0]))]
            whole = mine.new_empty(sum(lengths))
            with self._among_neighbours() as local:
                local.all_gather(column, 0, lengths, whole, tag=tag, deadline=deadline)
        _distribute(whole, views, order)

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        host, position = self._places[dst]
        counts = _counts(x, dim, sizes)
        mine: torch.Tensor | None = dense(x).reshape(-1)
        assert mine is not None
        if self._local is not None:
            lengths = [counts[rank] for rank in self.hosts[self._host]]
            row = mine.new_empty(sum(lengths)) if self._position == position else None
            with self._among_neighbours() as local:
                local.gather(mine, 0, lengths, row, position, tag=tag, deadline=deadline)
            mine = row
        if mine is None:
            return
        lengths = [sum([counts[rank] for rank in ranks]) for ranks in self.hosts]
        whole = None if out is None else mine.new_empty(sum(lengths))
        with self._among_counterparts() as across:
            across.gather(mine, 0, lengths, whole, host, tag=tag, deadline=deadline)
        if out is not None and whole is not None:
            _distribute(whole, out.split(list(sizes), dim), self._by_host())

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        host, position = self._places[src]
        counts = _counts(out, dim, sizes)
        row: torch.Tensor | None = None
        if self._position == position:
            lengths = [sum([counts[rank] for rank in ranks]) for ranks in self.hosts]
            whole = None
            if x is not None:
                pieces = x.split(list(sizes), dim)
                whole = _joined([dense(pieces[rank]) for rank in self._by_host()])
            row = ambient.empty(lengths[self._host], out.dtype)
            with self._among_counterparts() as across:
                across.scatter(whole, 0, lengths, row, host, tag=tag, deadline=deadline)
        if self._local is None:
            assert row is not None
            out.copy_(row.view(out.shape))
            return
        mine = ambient.empty(out.numel(), out.dtype)
        with self._among_neighbours() as local:
            local.scatter(row, 0, [counts[rank] for rank in self.hosts[self._host]], mine, position, tag=tag, deadline=deadline)
        out.copy_(mine.view(out.shape))

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        host, position = self._places[src]
        if self._position == position:
            with self._among_counterparts() as across:
                across.broadcast(x, host, tag=tag, deadline=deadline)
        if self._local is not None:
            with self._among_neighbours() as local:
                local.broadcast(x, position, tag=tag, deadline=deadline)

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        if self._local is not None:
            with self._among_neighbours() as local:
                local.barrier(tag=tag, deadline=deadline)
        # All ranks of a host have come when one of them is here.
        with self._among_counterparts() as across:
            across.barrier(tag=tag, deadline=deadline)

    # From rank to rank.

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        here = self.hosts[self._host]
        if self._local is None:
            if receives[self.rank_in_group] is not sends[self.rank_in_group]:
                receives[self.rank_in_group].copy_(sends[self.rank_in_group])
        else:
            with self._among_neighbours() as local:
                local.all_to_all([sends[rank] for rank in here], [receives[rank] for rank in here], tag=tag, deadline=deadline)
        others = [rank for rank in self._others() if rank not in here]
        self._group.exchange([(sends[i], i) for i in others], [(receives[i], i) for i in others], tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        here = self.hosts[self._host]
        near = [[(x, peer) for x, peer in pairs if peer in here] for pairs in (sends, receives)]
        far = [[(x, peer) for x, peer in pairs if peer not in here] for pairs in (sends, receives)]
        if self._local is not None and (near[0] or near[1]):
            self._local.exchange(*near, tag=tag, deadline=deadline, label=label)
        if far[0] or far[1]:
            self._group.exchange(*far, tag=tag, deadline=deadline, label=label)

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        here = self.hosts[self._host]
        parts: list[tuple[GlooCommunicator | ShmCommunicator, dict[int, int]]] = []
        for strategy, near in ((self._local, True), (self._group, False)):
            some = {peer: one for peer, one in tags.items() if (peer in here) == near}
            if strategy is not None and some:
                parts.append((strategy, some))
        if len(parts) == 1:
            strategy, some = parts[0]
            return strategy.receive_any(x, some, label=label, patience=patience, deadline=deadline)
        if next(iter(tags)) not in here:
            parts.reverse()
        # No wait ends by a message of either kind: waits for each take turns.
        until, wait = time.monotonic() + patience, _FIRST
        while True:
            left = until - time.monotonic()
            for strategy, some in parts:
                some_patience = max(min(wait, left), 0.0)
                src = strategy.receive_any(x, some, label=label, patience=some_patience, deadline=deadline)
                if src is not None or left <= 0:
                    return src
            wait = min(2 * wait, _MOST)

    # Its parts.

    def _counterparts(self) -> list[int]:
        return [ranks[self._position] for ranks in self.hosts]

    def _by_host(self) -> list[int]:
        return list(itertools.chain.from_iterable(self.hosts))

    def _by_position(self) -> list[int]:
        return list(itertools.chain.from_iterable(zip(*self.hosts, strict=True)))

    @contextlib.contextmanager
    def _among_neighbours(self) -> Iterator[ShmCommunicator]:
        """Call the strategy of this host, whose errors name ranks of the whole group."""
        assert self._local is not None
        self._local.fast.counter.sequence += 1  # one number for each of its calls, as if it were a group of its own
        yield self._local

    @contextlib.contextmanager
    def _among_counterparts(self) -> Iterator[GlooCommunicator]:
        """Call the strategy between hosts; an error that names one of its ranks is raised with the rank in the whole group."""
        assert self._across is not None
        ranks = self._counterparts() if self._even else [ranks[0] for ranks in self.hosts]
        with renumbered(ranks.__getitem__):
            yield self._across

    def warmup(self, model: torch.nn.Module | None = None) -> None:
        if self._local is not None:
            self._local.warmup()

    def memory(self) -> int:
        return 0 if self._local is None else self._local.memory()

    def abort(self) -> None:
        if self.fast is not None:
            self.fast.break_off()
        if self._local is not None:
            self._local.abort()
        if self._across is not None:
            self._across.abort()

    def disown(self) -> None:
        if self._across is not None:
            self._across.disown()

    def close(self) -> None:
        if self.fast is not None:
            self.fast.close()
        if self._local is not None:
            self._local.close()
        if self._across is not None:
            self._across.close()

    @property
    def bytes_sent(self) -> int:
        return sum([part.bytes_sent for part in (self._local, self._across) if part is not None])

    def describe(self) -> str:
        here = "this rank is alone on its host" if self._local is None else f"{self._local.world_size} ranks here, {self._local.describe()}"
        how = "each rank with its counterparts" if self._even else "the first rank of each"
        return f"inside each host, then between hosts, {how}; {here}"


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of x in the dtype that it is accumulated in."""
    wide = accumulator(x.dtype)
    # torch converts most unsigned integers, but has no arithmetic of them; the strategies of the two steps have.
    total = x.to(wide) if wide is not None and x.dtype.is_floating_point else x
    copy = total.clone(memory_format=torch.contiguous_format) if total is x else total.contiguous()
    return copy.resolve_conj().resolve_neg()


def _inner(op: str) -> str:
    """Return the reduction of the steps: an average is a sum that is divided at the end."""
    return "sum" if op == "avg" else op


def _counts(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[int]:
    """Return the elements of each rank's piece; x is one of them."""
    row = x.shape[:dim].numel() * x.shape[dim + 1 :].numel()
    return [row * size for size in sizes]


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return dense tensors as one 1-D tensor; as bytes, since torch does not join all dtypes."""
    return torch.cat([as_bytes(piece) for piece in pieces]).view(pieces[0].dtype)


def _distribute(whole: torch.Tensor, views: Sequence[torch.Tensor], order: Sequence[int]) -> None:
    """Fill the pieces of ranks from a 1-D tensor that has them in that order."""
    for rank, piece in zip(order, whole.split([views[rank].numel() for rank in order]), strict=True):
        views[rank].copy_(piece.view(views[rank].shape))
