"""One order of the calls on a device, over all groups.

The kernels of two communicators on one device wait for their peers, and may have to wait for the other to leave it. If one rank begins the
call of one group first and another rank that of another, each kernel may occupy the device that the other needs: a deadlock in which both
look busy. Therefore two ranks must begin the calls that concern both in the same order. `CommunicatorOptions(check=True)` compares it: a
rank's n-th checked call that concerns a peer has to be that peer's n-th that concerns this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commgraph.communicators.base import PeerClosed, PeerLate
from commgraph.communicators.tags import CHECK, make_tag
from commgraph.communicators.transport import Transport
from commgraph.deadline import Deadline

__all__ = ["DeviceOrder"]


class DeviceOrder:
    """The order of one rank of a world. Has connections of its own to all others, made when a context first asks for it."""

    def __init__(self) -> None:
        self._transport: Transport | None = None
        self._counts: dict[int, int] = {}
        self._broken = False
        self.connections = 0
        """How often it was connected; the same on all ranks."""

    @property
    def is_fine(self) -> bool:
        """Whether it is connected and, as far as this rank knows, the order was kept."""
        return self._transport is not None and not self._broken

    def connect(self, transport: Transport) -> None:
        """Set the connections to every rank of the world, and begin a new order."""
        self.close()
        self._transport, self._broken, self._counts = transport, False, {}
        self.connections += 1

    def swap(self, ranks: Sequence[int], texts: Mapping[int, torch.Tensor], deadline: Deadline) -> dict[int, torch.Tensor]:
        """Exchange texts of the next call with peers, and return theirs, equal or not.

        Args:
            ranks: global ranks of the group.
            texts: by rank in the group, one for each peer, all of one size.
            deadline: of the exchange.

        Raises:
            PeerLate, PeerClosed: with the rank in the group. The order is unknown from then on: later calls end in the same way, until it
                is connected anew.
        """
        assert self._transport is not None
        heard = {peer: torch.empty_like(text) for peer, text in texts.items()}
        tags = {}
        for peer in texts:
            rank = ranks[peer]
            tags[rank] = make_tag(CHECK, self._counts.get(rank, 0))
            self._counts[rank] = self._counts.get(rank, 0) + 1
        try:
            self._transport.exchange(
                [(text, ranks[peer]) for peer, text in texts.items()],
                [(text, ranks[peer]) for peer, text in heard.items()],
                tag=tags,
                deadline=deadline,
            )
        except PeerLate as error:
            raise PeerLate(ranks.index(error.peer)) from None
        except PeerClosed as error:
            raise type(error)(ranks.index(error.peer), error.reason) from None
        return heard

    def abort(self) -> None:
        """End every wait in `swap`, here and on the peers."""
        self._broken = True
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Drop the connections."""
        if self._transport is not None:
            self._transport.close()
