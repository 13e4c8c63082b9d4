"""What a coordinator knows, and how its calls begin and fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Self

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.communicators.base import Communicator
from commgraph.coordinator.call import Call, Timeout
from commgraph.coordinator.host_objects import HostObjects
from commgraph.coordinator.link import GroupLink
from commgraph.coordinator.objects import ObjectPath
from commgraph.errors import BackendUnavailableError, CollectiveTimeoutError
from commgraph.shm.stopped import Stopped

if TYPE_CHECKING:
    from commgraph.coordinator.group import GroupCoordinator

__all__ = ["GroupFacts"]


@attrs.frozen(eq=False, repr=False, slots=False)
class GroupFacts(compat.OpaqueBase):  # type: ignore[misc]  # torch gives the base no type
    """The facts of one group, as a rank of it sees it."""

    name: str
    rank: int
    ranks: tuple[int, ...]
    local_rank: int
    device: torch.device
    _link: GroupLink = attrs.field(alias="link")
    _objects: ObjectPath | HostObjects = attrs.field(alias="objects")
    # The short way for plain calls (native/module_door.c), None where there is none; it answers None to whatever is not plain.
    _door: Any = attrs.field(alias="door")
    # Operators that must keep their order say that they change it; of one world's groups all have the same.
    _token: torch.Tensor = attrs.field(alias="token")

    # Facts.

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        """Place of this rank in `ranks`."""
        return self._link.rank_in_group

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first rank."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the group's last rank."""
        return self.ranks[-1]

    @property
    def next_in_group(self) -> int:
        """Rank in the group that follows this one, around its end."""
        return (self.rank_in_group + 1) % self.world_size

    @property
    def prev_in_group(self) -> int:
        """Rank in the group before this one, around its start."""
        return (self.rank_in_group - 1) % self.world_size

    @property
    def next_rank(self) -> int:
        """Global rank of `next_in_group`."""
        return self.ranks[self.next_in_group]

    @property
    def prev_rank(self) -> int:
        """Global rank of `prev_in_group`."""
        return self.ranks[self.prev_in_group]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the group's first."""
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank is the group's last."""
        return self.rank == self.last_rank

    @property
    def communicators(self) -> Mapping[str, tuple[str, ...]]:
        """Operation -> names of the strategies that may serve it, first choice first. Empty for one rank."""
        return self._link.table

    def communicator(self, name: str) -> Communicator:
        """The live strategy called `name`.

        Raises:
            BackendUnavailableError: if the group has none of that name.
        """
        for communicator in self._link.communicators:
            if communicator.name == name:
                return communicator
        have = ", ".join(c.name for c in self._link.communicators) or "none (a group of one rank needs none)"
        raise BackendUnavailableError(f"group {self.name!r} (rank {self.rank}) has no strategy {name!r}; it has: {have}")

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent on the group's communicators, by whichever of the coordinators that share them."""
        return sum(communicator.bytes_sent for communicator in self._link.communicators)

    @property
    def cpu_group(self) -> dist.ProcessGroup | None:
        """The torch process group for host tensors, unknown to torch.distributed's tables; None for one rank and after close."""
        return self._link.cpu_group

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The torch process group of the backend for device tensors; `cpu_group` where there is none."""
        return self._link.device_group

    @property
    def shares_with(self) -> tuple[GroupCoordinator, ...]:
        """Coordinators of this context on the same communicators: calls on one of them wait for those on the others."""
        return tuple(other for other in self._link.coordinators if other is not self and self.world_size > 1)

    def _broken_off(self, operation: str, text: Callable[[], str], error: BaseException) -> NoReturn:
        """A call that took the short way has failed: as the long way would have it."""
        strategy = self._link.comparing
        if strategy is None or not strategy.interrupted:
            raise error  # nothing was sent
        if not isinstance(error, Stopped):
            strategy.abort()  # a signal's handler has raised: the others must not wait for this rank
            raise error
        call, seconds = self._describe(operation, max(self._link.sequence - 1, 0), None)
        with self._link.guard(call, f"{operation}({text()})", seconds):
            raise strategy.translate(error)
        raise AssertionError("guard always raises")

    def _begin(self, operation: str, timeout: Timeout) -> tuple[Call, float]:
        """Counts a collective, whether its arguments are good or not: ranks that all raised stay level."""
        link = self._link
        if link.is_idle(None):
            link.follow(None)
            return self._describe(operation, link.begin(self.name), timeout)
        link.ensure_open(self.name)
        call, seconds = self._describe(operation, link.sequence, timeout)
        left = link.settle(None, call, seconds)
        link.follow(None)
        return attrs.evolve(call, sequence=link.begin(self.name)), left

    def _drain(self, deadline: float) -> None:
        """Waits until `deadline` for what the peers cannot do without, here and on siblings: collectives that were begun, and sends."""
        link = self._link
        if not link.drain(max(deadline - time.monotonic(), 0.0)):
            call, _ = self._describe("close", link.sequence, None)
            raise CollectiveTimeoutError(f"{call.where}: operations that were begun and not waited for did not end in time", **call.facts)
        for sibling in link.siblings:
            sibling._drain(deadline)

    def _message(self, operation: str, timeout: Timeout) -> tuple[Call, float]:
        self._link.ensure_open(self.name)
        return self._describe(operation, self._link.sequence, timeout)

    def _describe(self, operation: str, sequence: int, timeout: Timeout) -> tuple[Call, float]:
        call = Call(self.name, operation, self.rank, self.rank_in_group, self.world_size, sequence, self.device, timeout is not None)
        return call, call.seconds(timeout, self._link.host_timeout)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} holds connections of this process and cannot be pickled: send its layout and name, and look the group up in the "
            "receiver's own context (context[name])"
        )

    def __repr__(self) -> str:
        return f"<GroupCoordinator {self.name!r}: rank {self.rank}, {self.rank_in_group} of {self.world_size} in {_short(self.ranks)}>"


def _short(ranks: tuple[int, ...]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"({', '.join(map(str, ranks[:6]))}, ..., {ranks[-1]})"
