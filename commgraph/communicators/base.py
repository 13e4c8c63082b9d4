"""What a strategy is: one way to serve the operations of one group."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch

__all__ = ["COLLECTIVES", "OPERATIONS", "CallsDiffer", "Communicator", "Limits", "PeerClosed", "PeerLate", "Refused"]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "gather", "broadcast", "barrier")
OPERATIONS = (*COLLECTIVES, "send", "recv")


class PeerLate(Exception):  # noqa: N818 - GroupLink turns it into the public error
    """The deadline passed. `peer`: a rank in the group that was waited for."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


class PeerClosed(Exception):  # noqa: N818 - GroupLink turns it into the public error
    """`peer` (a rank in the group) is gone; `reason` says what was seen of that."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason


class CallsDiffer(Exception):  # noqa: N818 - GroupLink turns it into the public error
    """`peer` (a rank in the group) called something else."""

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
    """What strategies of the host are built with.

    Attributes:
        timeout: default deadline of an operation of the host, in seconds.
        build_timeout: deadline of the build, in seconds.
        crowd: ranks of the job on this host, which share its cores (another number on another host).
        device_timeout: default deadline of an operation that is enqueued on a device, in seconds.
    """

    timeout: float
    build_timeout: float
    crowd: int
    device_timeout: float = 300.0


class Communicator(abc.ABC):
    """One strategy, live, for one group of at least two ranks.

    A coordinator calls it with arguments that it has already checked: dims are not negative, ranks are ranks in the group, sizes have
    one entry per rank and add up, nothing requires a gradient. Tensors may have any strides and may be empty. Every method gets
    `timeout` in seconds and must return or raise `CollectiveError` by then; `tag` is a number that all ranks of the call share
    and that differs from those of the calls beside it (31 bits).

    Which strategy serves a call must come out alike on all ranks: `accepts` may look at its arguments and at facts agreed when the
    context was built, at nothing else.
    """

    name: ClassVar[str]
    """Short name as `explain()` and `GroupCoordinator.communicators` show it."""

    operations: ClassVar[frozenset[str]]
    """Which of `OPERATIONS` this strategy can serve at all."""

    compares: ClassVar[bool] = False
    """Whether every collective finds out by itself that the ranks called different things, and raises `CallsDiffer`."""

    selective: ClassVar[bool] = False
    """Whether it serves some sizes and leaves others to the strategies behind it, so that results depend on which one did."""

    serves_host: ClassVar[bool] = True
    """Whether it may accept host tensors: a short way of a strategy behind it must then not be taken."""

    enqueues: ClassVar[bool] = False
    """Whether its calls only enqueue on the current stream of their device, and never hold up the host."""

    process_group: Any = None
    """torch's process group of its backend, where it has one for device tensors."""

    mailbox: Any = None
    """A `commgraph.shm.mailbox.Mailbox` where the ranks can hand each other objects without a network."""

    sequence: int
    """Collectives begun; kept by those that have a `door`, which counts as well."""

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

    # One method per operation. A strategy defines those that it lists in `operations`; a coordinator calls no other.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, timeout: float) -> torch.Tensor:
        """A new contiguous tensor of x's shape and dtype: the reduction of every rank's x, with the same bits on every rank."""
        raise self._unserved("all_reduce")

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, timeout: float) -> torch.Tensor:
        """The same into x itself, which is returned."""
        return x.copy_(self.all_reduce(x, op, tag=tag, timeout=timeout))

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, timeout: float) -> None:
        """Fills `out` with every rank's x along `dim`; `sizes[i]` is the extent of rank i's x there."""
        raise self._unserved("all_gather")

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, timeout: float
    ) -> None:
        """Fills `out` with this rank's piece (extent `sizes[rank_in_group]` along `dim`) of the reduction of every rank's x."""
        raise self._unserved("reduce_scatter")

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, timeout: float) -> None:
        """Sends `sends[i]` to rank i and fills `receives[i]` from it (views of the caller's tensors, its own pair included)."""
        raise self._unserved("all_to_all")

    def gather(self, x: torch.Tensor, pieces: Sequence[torch.Tensor] | None, dst: int, *, tag: int, timeout: float) -> None:
        """Fills `pieces[i]` on `dst` with rank i's x; `pieces` is None elsewhere."""
        raise self._unserved("gather")

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, timeout: float) -> None:
        """Fills x on every rank with that of `src`."""
        raise self._unserved("broadcast")

    def barrier(self, *, tag: int, timeout: float) -> None:
        """Returns on no rank before every rank has called it."""
        raise self._unserved("barrier")

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        timeout: float,
    ) -> None:
        """Serves "send" and "recv": sends and fills (tensor, rank) pairs, all at once; between two ranks they pair in order."""
        raise self._unserved("exchange")

    def offer(self, sends: Sequence[tuple[torch.Tensor, int]], *, tag: int) -> bool:
        """Sends as `exchange` does, if no peer has to be waited for; otherwise False, and nothing was sent."""
        return False

    # Memory.

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor for a result."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, tag: int, timeout: float) -> torch.Tensor:
        """A tensor in memory that the ranks share, so that it needs no staging. Collective. Here: nothing is shared."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    # What a strategy that compares calls has beside that.

    def door(self) -> Any:
        """A short way for plain calls, past the coordinator's checks, as native/module_door.c has it; None where there is none."""
        return None

    def hold(self, held: bool) -> None:
        """Shuts the door while calls that were begun before are made by another thread, and opens it again."""
        raise self._unserved("hold")

    def translate(self, stopped: Any) -> Exception:
        """`PeerLate`, `PeerClosed` or `CallsDiffer` for what the door raised."""
        raise self._unserved("translate")

    @property
    def interrupted(self) -> bool:
        """Whether a call of the door was broken off halfway."""
        return False

    def post_note(self, text: str) -> None:  # noqa: B027 - only those that compare calls have notes
        """Says to the others what this rank called."""

    def read_note(self, rank: int) -> str | None:
        """What that rank in the group said it called, None as long as it has said nothing."""
        return None

    # Life.

    def warmup(self) -> None:  # noqa: B027 - a strategy without buffers has nothing to do
        """Allocates everything that first use would. Collective."""

    def prepare(self, model: torch.nn.Module) -> None:  # noqa: B027 - a strategy without buffers has nothing to do
        """Sizes buffers from `model`. Collective."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Ends what runs here and on the peers that wait for this rank, with an error. Callable from any thread; never raises."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases everything this rank holds, without communicating. Idempotent."""

    def memory(self) -> int:
        """Bytes of shared or device memory that this strategy holds."""
        return 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has handed to its peers so far, those of objects included."""
        return 0

    def describe(self) -> str:
        """What `explain()` prints behind the name, one line."""
        return ""

    def _unserved(self, operation: str) -> RuntimeError:
        return RuntimeError(
            f"strategy {self.name!r} does not list {operation!r} among its operations, yet was asked for it: a bug of its coordinator"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank_in_group} of {self.world_size}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} holds connections of this process and cannot be pickled or copied")
