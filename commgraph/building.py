"""One group made live: connections, strategies, and what the coordinators over the same ranks share."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from datetime import timedelta

import attrs
import torch.distributed as dist

from commgraph import compat
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.coordinator.link import GroupLink
from commgraph.errors import BackendUnavailableError, BuildError
from commgraph.hosts import Hosts
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import GroupFacts, Platform

__all__ = ["Builder", "Links"]


class Links:
    """The live groups of a world, so that they can be dropped where nobody closes them: when the interpreter exits."""

    def __init__(self) -> None:
        self._links: list[GroupLink] = []
        self._lock = threading.Lock()

    def add(self, link: GroupLink) -> None:
        """Lists a group that was just connected."""
        with self._lock:
            self._links.append(link)

    def prune(self) -> None:
        """Forgets those that were closed."""
        with self._lock:
            self._links = [link for link in self._links if not link.is_closed]

    def abort(self) -> None:
        """Ends what runs on any of them, here and on the peers. From any thread."""
        for link in tuple(self._links):
            link.abort()

    def release(self) -> None:
        """Drops them all on this rank; nothing is sent."""
        for link in tuple(self._links):
            link.close()
        self.prune()


@attrs.frozen
class Builder:
    """Makes the groups of one world.

    Attributes:
        store: the world's own prefix of the store.
        rank: this rank.
        hosts: the node map.
        labelled: the nodes are simulated ones of a test: all ranks share this machine's loopback network.
        timeout: deadline of a build and default deadline of operations.
        authkey: secret of the job, or None.
        links: where live groups are listed.
    """

    store: dist.Store
    rank: int
    hosts: Hosts
    labelled: bool
    timeout: timedelta
    authkey: bytes | None = attrs.field(repr=False)
    links: Links

    def link(
        self, ident: str, ranks: tuple[int, ...], platform: Platform, options: CommunicatorOptions, *, wants_device: bool
    ) -> GroupLink:
        """Connects the ranks of one group. Collective over them; a group of one rank does nothing.

        Args:
            ident: names this group among all of the world, and how often this very group was built; the same on its ranks.
            ranks: global ranks in group order, this one among them.
            platform: chooses the strategies.
            options: of this group.
            wants_device: whether the group serves device tensors too.

        Raises:
            BackendUnavailableError: torch has no gloo, or the platform has nothing that serves the options.
            BuildError: the connections could not be made.
        """
        rank_in_group = ranks.index(self.rank)
        timeout = options.timeout or self.timeout
        host_timeout = options.host_timeout or timeout
        if len(ranks) == 1:
            return GroupLink(ident=ident, ranks=ranks, rank_in_group=0, host_timeout=host_timeout.total_seconds())
        if not compat.gloo_available():
            raise BackendUnavailableError("this torch was built without gloo, which carries host tensors and objects between ranks")
        store = dist.PrefixStore(f"group/{hashlib.sha256(ident.encode()).hexdigest()[:32]}", self.store)
        transport = self._connect(ident, store, ranks, rank_in_group)
        try:
            facts = GroupFacts(ranks, rank_in_group, tuple(self.hosts.nodes[rank] for rank in ranks), options, wants_device)
            link = GroupLink(
                ident=ident,
                ranks=ranks,
                rank_in_group=rank_in_group,
                communicators=platform.communicators(facts, transport),
                transport=transport,
                store=store,
                key=self._key(ranks),
                timeout=timeout.total_seconds(),
                host_timeout=host_timeout.total_seconds(),
                check=options.check,
            )
        except BaseException:
            transport.close()
            raise
        self.links.add(link)
        return link

    def _connect(self, ident: str, store: dist.Store, ranks: Sequence[int], rank_in_group: int) -> GlooTransport:
        try:
            device = compat.gloo_device(loopback=self._share_loopback(ranks))
            return GlooTransport(store, rank_in_group, len(ranks), timeout=self.timeout, device=device)
        except RuntimeError as error:
            reason = str(error)
            if os.strerror(errno.EMFILE) in reason:
                reason = f"too many open files: a group needs a descriptor for each of its ranks (raise the limit: ulimit -n). {reason}"
            members = f"{len(ranks)} ranks {tuple(ranks[:8])}{'...' if len(ranks) > 8 else ''}"
            raise BuildError(
                f"rank {self.rank}: group {ident} of {members} could not connect within {self.timeout.total_seconds():g} s: {reason}"
            ) from error

    def _share_loopback(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks can reach each other at 127.0.0.1; alike on all of them."""
        if len({self.hosts.networks[rank] for rank in ranks}) > 1:
            return False
        return self.labelled or len({self.hosts.nodes[rank] for rank in ranks}) == 1

    def _key(self, ranks: Sequence[int]) -> bytes | None:
        """What authenticates pickled objects in this group: the job's secret, else that of the node if all ranks are on it."""
        if self.authkey is not None:
            return self.authkey
        return self.hosts.node_key if all(self.hosts.nodes[rank] == self.hosts.node_rank for rank in ranks) else None
