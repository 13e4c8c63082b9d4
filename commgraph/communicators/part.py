"""`Part`: a transport among some ranks of a group, on the connections of the group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from commgraph.communicators.base import AccessRefused, CallsDiffer, PeerClosed, PeerLate
from commgraph.communicators.transport import Pending, Transport
from commgraph.deadline import Deadline

__all__ = ["Part", "renumbered"]


@contextlib.contextmanager
def renumbered(numbers: Callable[[int], int]) -> Iterator[None]:
    """Raise an error that names a rank with ``numbers(rank)`` in its place."""
    try:
        yield
    except PeerLate as error:
        raise PeerLate(numbers(error.peer)) from None
    except PeerClosed as error:
        raise type(error)(numbers(error.peer), error.reason) from None
    except CallsDiffer as error:
        raise CallsDiffer(numbers(error.peer)) from None
    except AccessRefused as error:
        raise AccessRefused(numbers(error.peer)) from None


class Part:
    """A transport whose ranks are the positions in `members`."""

    def __init__(self, whole: Transport, members: Sequence[int]) -> None:
        self._whole = whole
        self._members = tuple(members)
        self.rank_in_group = self._members.index(whole.rank_in_group)
        self.world_size = len(self._members)

    @property
    def bytes_sent(self) -> int:
        """Nothing, since the whole counts it."""
        return 0

    @property
    def has_aborted(self) -> bool:
        """Whether the connections of the whole group were closed by `abort`."""
        return self._whole.has_aborted

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int | Mapping[int, int],
        deadline: Deadline,
    ) -> None:
        """Send and receive (tensor, peer) pairs, all at once."""
        with renumbered(self._members.index):
            self._whole.exchange(
                [(x, self._members[peer]) for x, peer in sends],
                [(x, self._members[peer]) for x, peer in receives],
                tag={self._members[peer]: one for peer, one in tag.items()} if isinstance(tag, Mapping) else tag,
                deadline=deadline,
            )

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Pending:
        """Begin a receive that may be waited for several times; its errors name ranks of the whole."""
        return self._whole.receive_later(tensor, self._members[peer], tag=tag, then=then)

    def abort(self) -> None:
        """Close every connection of the whole group."""
        self._whole.abort()

    def close(self) -> None:
        """Nothing to do: the group owns the connections."""
