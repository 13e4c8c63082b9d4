"""`Communicator`, the base class of strategies: an implementation of the operations of one group."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import attrs
import torch

from commgraph import ambient
from commgraph.communicators.memory import copy_back, dense, staging_for
from commgraph.communicators.reduction import reduce_pieces
from commgraph.deadline import Deadline

__all__ = [
    "COLLECTIVES",
    "OPERATIONS",
    "AccessRefused",
    "CallsDiffer",
    "Communicator",
    "FastPath",
    "Limits",
    "PeerClosed",
    "PeerLate",
    "PeerLeft",
    "Refused",
]

COLLECTIVES = ("all_reduce", "reduce", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "broadcast", "barrier")
OPERATIONS = (*COLLECTIVES, "send", "recv")


class PeerLate(Exception):  # noqa: N818 - `coordinator.failures` turns it into the public error
    """The deadline passed. `peer`: a rank in the group that was waited for."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


class PeerClosed(Exception):  # noqa: N818 - as above
    """`peer` (a rank in the group) is gone; `reason`: how that was noticed."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason


class PeerLeft(PeerClosed):
    """`peer` has closed the group in order, and lives."""

    def __init__(self, peer: int, reason: str = "it has closed the group") -> None:
        super().__init__(peer, reason)


class AccessRefused(Exception):  # noqa: N818 - as above
    """The kernel does not let this rank access the memory of `peer` (a rank in the group), which it did when the group was built."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


class CallsDiffer(Exception):  # noqa: N818 - as above
    """`peer` (a rank in the group) made another call than this rank."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


@attrs.frozen
class Refused:
    """Stands in a chain for a strategy that a group could have had, and has not, for the same reason on every rank.

    Attributes:
        name: of the strategy.
        reason: why, with the numbers.
    """

    name: str
    reason: str


@attrs.frozen
class Limits:
    """Deadlines and sizes that strategies are built with.

    Attributes:
        timeout: default deadline of an operation on the host, in seconds.
        build_timeout: deadline of the build, in seconds.
        sharing: ranks of the job that may run on a core of this one's, itself included: on this host, and not bound to other cores.
        device_timeout: default deadline of an operation that is enqueued on a device, in seconds.
        handover_key: authenticates the words by which the ranks of one host hand memory to each other.
    """

    timeout: float
    build_timeout: float
    sharing: int
    device_timeout: float = 300.0
    handover_key: bytes = attrs.field(default=b"", repr=False)


class FastPath(Protocol):
    """Native calls of a strategy, beside its operations: they bypass the coordinator's general path.

    Its collectives carry a header by which every rank finds out that the ranks called different things (`CallsDiffer`).
    """

    counter: Any
    """Counts of the collectives, native calls included. `sequence`, how many were begun; `busy`, whether a native call is under way;
    `claims`, a dict with None in it while a call by the general path is under way (`commgraph.coordinator.turns`)."""

    mailbox: Any
    """A `commgraph.shm.mailbox.Mailbox` for messages and objects, None where there is none."""

    has_notes: bool
    """Whether ranks can show each other texts that describe their calls."""

    def open(self, describe: Callable[[str, tuple[Any, ...]], int], timeout: float) -> Any:
        """Return the native calls of one coordinator (native/module_fast.c).

        Args:
            describe: gives the digest of a call's text.
            timeout: default deadline of a call, in seconds.
        """

    def pause(self, paused: bool) -> None:
        """Refuse native calls (True) while another thread runs calls that were begun before, or accept them again (False)."""

    def offer(self, x: torch.Tensor, dst: int, *, tag: int, label: int = 0) -> bool:
        """Send x if that needs no wait for its receiver; else return False with nothing sent."""

    def translate(self, error: BaseException) -> Exception | None:
        """Return `PeerLate`, `PeerClosed` or `CallsDiffer` for what ended a native call; None for any other exception."""

    @property
    def interrupted(self) -> bool:
        """Whether a native call was broken off after it had begun."""

    def disown(self) -> None:
        """Refuse every native call, and leave the shared memory alone from now on: this is the copy of a forked child."""

    def post_note(self, text: str) -> None:
        """Show the other ranks a text that describes this rank's call."""

    def read_note(self, rank: int) -> str | None:
        """Return the text that another rank in the group has posted; None before it has."""


class Communicator(abc.ABC):
    """One strategy, live, for one group of at least two ranks.

    A coordinator calls it with arguments that it has already checked: dims are not negative, ranks are ranks in the group, sizes have
    one entry per rank and add up, nothing requires a gradient. Tensors may have any strides and may be empty. Every method must return or
    raise by its `deadline`: `PeerLate`, `PeerClosed`, `CallsDiffer` or a `CollectiveError`. `tag` is a number that all ranks of the call
    share and that differs from those of the calls beside it (31 bits).

    Which strategy serves a call must come out alike on all ranks: `accepts` may look at its arguments and at facts agreed when the
    context was built, at nothing else.
    """

    name: str
    """Short name as `explain()` and `GroupCoordinator.communicators` show it."""

    operations: frozenset[str]
    """Members of `OPERATIONS` that this strategy serves, if `accepts` agrees."""

    reductions: frozenset[str] = frozenset({"sum", "avg", "max", "min", "product"})
    """Which reductions it serves; calls with others go to the strategies behind it."""

    size_dependent: bool = False
    """Whether it serves some sizes and leaves others to the strategies behind it, so that results depend on which one did."""

    serves_host: bool = True
    """Whether it may accept host tensors. The fast path of a strategy behind it is not used then."""

    stream_ordered: bool = False
    """Whether calls are stream-ordered, that is, enqueued on the current stream of their device without blocking the host."""

    tagged: bool = False
    """Whether messages are matched by tag, and not by order alone. `exchange` then takes a `label`, and there is `receive_any`."""

    process_group: Any = None
    """torch's process group of its backend, where it has one for device tensors."""

    links: Any = None
    """The `commgraph.communicators.tcp_transport.TcpTransport` that carries its messages, where they can be sent natively over one."""

    rings: FastPath | None = None
    """Has the `mailbox` by which its messages go to ranks of this host, and translates errors of its rings."""

    posted: Mapping[Any, Any] = MappingProxyType({})
    """Receives from any rank that have begun to receive from single ones."""

    fast: FastPath | None = None
    """Native calls past the general path, where it has any."""

    def __init__(self, rank_in_group: int, world_size: int) -> None:
        self.rank_in_group = rank_in_group
        self.world_size = world_size

    @abc.abstractmethod
    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Whether this strategy serves such a call: a pure function of its arguments and of facts agreed at build.

        Args:
            operation: one of `OPERATIONS`.
            shape: of this rank's input, in the sense in which all ranks agree on it (uneven pieces: the whole).
            dtype: of the tensors; None for barrier.
            device: where the tensors live.
            capturing: whether the call is being recorded into a device graph.
        """

    # One method per operation. A coordinator calls those that `operations` lists and no other. The bodies here need `exchange` only;
    # strategies override them with better algorithms.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        """Return a new contiguous tensor of x's shape and dtype: the reduction of every rank's x, with the same bits on every rank."""
        pieces = ambient.empty((self.world_size, *x.shape), x.dtype, x.device)
        self.all_gather(x.unsqueeze(0), 0, [1] * self.world_size, pieces, tag=tag, deadline=deadline)
        out = self.new(x.shape, x.dtype, x.device)
        reduce_pieces(list(pieces), op, out)
        return out

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        """`all_reduce` into x itself, which is returned."""
        return x.copy_(self.all_reduce(x, op, tag=tag, deadline=deadline))

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        """Return the result of `all_reduce` on `dst`, None elsewhere."""
        n, mine = self.world_size, self.rank_in_group == dst
        pieces = ambient.empty((n, *x.shape), x.dtype, x.device) if mine else None
        self.gather(x.unsqueeze(0), 0, [1] * n, pieces, dst, tag=tag, deadline=deadline)
        if pieces is None:
            return None
        out = self.new(x.shape, x.dtype, x.device)
        reduce_pieces(list(pieces), op, out)
        return out

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        """Fill `out` with every rank's x along `dim`; `sizes[i]` is the extent of rank i's x there."""
        me, pieces = self.rank_in_group, out.split(list(sizes), dim)
        self.exchange([(x, i) for i in self._others()], [(pieces[i], i) for i in self._others()], tag=tag, deadline=deadline)
        pieces[me].copy_(x)

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        """Fill `out` with this rank's piece (extent `sizes[rank_in_group]` along `dim`) of the reduction of every rank's x."""
        pieces = [torch.empty_like(out) for _ in range(self.world_size)]
        self.all_to_all(x.split(list(sizes), dim), pieces, tag=tag, deadline=deadline)
        reduce_pieces(pieces, op, out)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        """Send `sends[i]` to rank i and fill `receives[i]` from it (views of the caller's tensors, its own pair included)."""
        me, others = self.rank_in_group, self._others()
        self.exchange([(sends[i], i) for i in others], [(receives[i], i) for i in others], tag=tag, deadline=deadline)
        if receives[me] is not sends[me]:
            receives[me].copy_(sends[me])

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        """Fill `out` on `dst` as `all_gather` would; `out` is None elsewhere."""
        if out is None:
            self.exchange([(x, dst)], [], tag=tag, deadline=deadline)
            return
        pieces = out.split(list(sizes), dim)
        self.exchange([], [(pieces[i], i) for i in self._others()], tag=tag, deadline=deadline)
        pieces[dst].copy_(x)

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        """Fill `out` on rank i with the i-th piece of x on `src`, cut along `dim` by `sizes`; x is None elsewhere."""
        if x is None:
            self.exchange([], [(out, src)], tag=tag, deadline=deadline)
            return
        pieces = x.split(list(sizes), dim)
        self.exchange([(pieces[i], i) for i in self._others()], [], tag=tag, deadline=deadline)
        out.copy_(pieces[src])

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        """Fill x on every rank with that of `src`: by a binomial tree."""
        n = self.world_size
        position = (self.rank_in_group - src) % n
        buffer = dense(x) if position == 0 else staging_for(x)
        # The lowest set bit of a position is the distance to its parent, lower bits are those to its children.
        distance = position & -position if position else 1 << (n - 1).bit_length()
        if position:
            self.exchange([], [(buffer, (position - distance + src) % n)], tag=tag, deadline=deadline)
        children = []
        while distance > 1:
            distance >>= 1
            if position + distance < n:
                children.append((buffer, (position + distance + src) % n))
        self.exchange(children, [], tag=tag, deadline=deadline)
        if position:
            copy_back([buffer], [x])

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        """Return on no rank before every rank has called it."""
        every = ambient.zeros(self.world_size, torch.uint8)
        self.all_gather(every[:1].clone(), 0, [1] * self.world_size, every, tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        """Serve "send" and "recv": send and fill (tensor, rank) pairs, all at once; between two ranks they pair in order.

        Args:
            sends, receives: tensors, and to or from whom.
            tag, deadline: as for every operation.
            label: the user's tag of these messages, up to 20 bits. Each label has an order of its own. Given to strategies
                that are `tagged`, where it is not 0.
        """
        raise RuntimeError(
            f"strategy {self.name!r} has no exchange, on which the operations rest that it lists and does not define: a bug of the strategy"
        )

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        """Fill x with the next message of that label from the first of several ranks that has one; of strategies that are `tagged`.

        Args:
            x: to be filled; not empty.
            tags: tag of the next message of each rank; ranks are polled in this order.
            label: the user's tag.
            patience: seconds to wait for one.
            deadline: of the call.

        Returns:
            The rank that sent it; None where no message came, and nothing was lost.
        """
        raise RuntimeError(f"strategy {self.name!r} is tagged and cannot receive from any rank: a bug of the strategy")

    # Memory.

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor for a result."""
        return ambient.empty(tuple(shape), dtype, device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, tag: int, deadline: Deadline) -> torch.Tensor:
        """Return a tensor in memory that the ranks share, so that it needs no staging. Collective. Here: nothing is shared."""
        return self.new(shape, dtype, device)

    # Lifetime.

    def warmup(self, model: torch.nn.Module | None = None) -> None:  # noqa: B027 - a strategy without buffers has nothing to do
        """Allocate everything that first use would; buffers are sized from `model` where one is given. Collective."""

    @abc.abstractmethod
    def abort(self) -> None:
        """End with an error the calls here and those of peers that wait for this rank. Callable from any thread; never raises."""

    @property
    def has_aborted(self) -> bool:
        """Whether `abort` was called, also by a call of this rank that a signal handler has ended halfway."""
        return False

    def disown(self) -> None:  # noqa: B027 - most hold nothing whose copies would do harm
        """Close the descriptors of a forked child, which are copies of its parent's, without a word to the peers. Takes no lock."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything this rank holds, without communicating. Idempotent."""

    def memory(self) -> int:
        """Return the bytes of shared or device memory that this strategy holds."""
        return 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has handed to its peers so far, those of objects included."""
        return 0

    def describe(self) -> str:
        """Return what `explain()` prints behind the name, one line."""
        return ""

    def _others(self) -> list[int]:
        # Each rank begins with its right neighbour, so that not all send to rank 0 first.
        return [(self.rank_in_group + i) % self.world_size for i in range(1, self.world_size)]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank_in_group} of {self.world_size}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} holds connections of this process and cannot be pickled or copied")
