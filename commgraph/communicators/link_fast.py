"""The fast path of ranks of several hosts: native calls over links (native/module_links.c) that bypass the coordinator's general path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from commgraph.communicators.base import PeerClosed, PeerLeft
from commgraph.communicators.shm_fast import Closed, ShmFastPath, native_calls, translated
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.forks import keep_for_ever
from commgraph.shm.stopped import GONE, LOST, Stopped

__all__ = ["LinkFastPath"]


class LinkFastPath:
    """`commgraph.communicators.base.FastPath` of a group over links."""

    mailbox = None
    has_notes = False

    def __init__(
        self,
        transport: TcpTransport,
        pool: Any,
        *,
        local: ShmFastPath | None = None,
        hosts: Sequence[Sequence[int]] = (),
        me: int = -1,
        whole: TcpTransport | None = None,
    ) -> None:
        """Over links to all ranks, or to the counterparts on other hosts.

        Args:
            transport: holds the links.
            pool: native memory for results and scratch.
            local: the fast path of the ranks of this host, where it has several.
            hosts: with `local` the ranks of each host.
            me: with `local` this rank in the group.
            whole: with `local` it holds links to all ranks.
        """
        self._transport = transport
        self._whole = whole
        self._local = local
        # Ranks in the group of this host's ranks, where it has several.
        self._neighbours: list[int] = []
        if local is None or whole is None:
            self._rank_in_group, self._linked = transport.rank_in_group, list(range(transport.world_size))
            self.counter: Any = transport.native.LinkGroup(transport.collectives, pool)
        else:
            here = next(ranks for ranks in hosts if me in ranks)
            # Rank in the group of each rank that the links reach.
            self._rank_in_group, self._linked = me, [ranks[here.index(me)] for ranks in hosts]
            ranks_by_host = [list(ranks) for ranks in hosts]
            self.counter = transport.native.LinkGroup(transport.collectives, pool, local.counter, ranks_by_host, me, whole.collectives)
            self._neighbours = list(here)

    def open(self, describe: Callable[[str, tuple[Any, ...]], int], timeout: float) -> Any:
        """Return the native calls of one coordinator."""
        return native_calls(self._transport.native, self.counter, describe, int(timeout * 1e9))

    def pause(self, paused: bool) -> None:
        """Refuse native calls, or accept them again."""
        self.counter.paused = int(paused)

    def translate(self, error: BaseException) -> Exception | None:
        """Return the error of the coordinator for what ended a native call; None for any other exception."""
        if self._local is not None and isinstance(error, Stopped) and error.code in (GONE, LOST) and error.member in self._neighbours:
            return self._local.translate(Stopped(error.code, self._neighbours.index(error.member)))
        return translated(error, self._rank_in_group, self._lost)

    def _lost(self, rank: int, _: int) -> PeerClosed:
        transport, whole = self._transport, self._whole
        if whole is not None:
            found = whole.lost(whole.collectives, rank, rank)
            if isinstance(found, PeerLeft) or rank not in self._linked:
                return found
        return transport.lost(transport.collectives, self._linked.index(rank), rank)

    def offer(self, x: torch.Tensor, dst: int, *, tag: int, label: int = 0) -> bool:
        """Send nothing, and return False."""
        return False

    def post_note(self, text: str) -> None:
        """Do nothing: what ranks called they tell each other in the store."""

    def read_note(self, rank: int) -> str | None:
        """Return None."""
        return None

    @property
    def interrupted(self) -> bool:
        """Whether a native call was broken off, or the group was."""
        return not self.counter.enabled

    def break_off(self) -> None:
        """Refuse every later native call."""
        self.counter.enabled = 0

    def disown(self) -> None:
        """Refuse every native call from now on."""
        keep_for_ever(self.counter)
        self.counter.enabled = 0
        self.counter = Closed(0, {})

    def close(self) -> None:
        """Refuse every native call. The count stays readable."""
        self.counter.enabled = 0
        self.counter = Closed(int(self.counter.sequence), self.counter.claims)
