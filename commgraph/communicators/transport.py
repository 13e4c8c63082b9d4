"""`Transport`: messages between the ranks of one group, from which strategies over a network are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from commgraph.deadline import Deadline

__all__ = ["Pending", "Transport"]


class Pending(Protocol):
    """A receive that may be waited for several times."""

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, with an error or without."""

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; whether it has ended. Raises its error."""

    def join(self, timeout: float) -> None:
        """Wait for its thread, if it has one, after the group was closed."""


class Transport(Protocol):
    """Connections of one rank to the others of its group.

    Raises `PeerLate`, `PeerClosed` or `CallsDiffer`, with the rank in the group.
    """

    rank_in_group: int
    world_size: int

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far."""

    @property
    def has_aborted(self) -> bool:
        """Whether its connections were closed by `abort`."""

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int | Mapping[int, int],
        deadline: Deadline,
    ) -> None:
        """Send and receive (contiguous host tensor, peer) pairs, all at once; empty ones are left out on both sides.

        `tag` is one number of 31 bits for all messages, or one for each peer.
        """

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Pending:
        """Begin a receive that may be waited for several times; `then` is called once it has ended, where a thread receives."""

    def abort(self) -> None:
        """Close every connection at once: all waits end with an error, here and on the peers. Never raises."""

    def close(self) -> None:
        """Drop the connections. Nothing is sent."""
