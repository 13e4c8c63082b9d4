"""`Reach`: where the ranks of a world listen, and the transports of its groups."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
from collections.abc import Sequence
from typing import Any

import attrs
import msgspec
import torch.distributed as dist

from commgraph.addresses import address_of, address_seen, store_host, why_unreached
from commgraph.communicators.endpoint import Endpoint
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.errors import BuildError
from commgraph.hosts import Hosts, decode
from commgraph.meeting import Meeting
from commgraph.shm import native_module

__all__ = ["Reach", "join"]

_LOOPBACK = "127.0.0.1"
_NONCE_BYTES = 16
_BRING_UP = "Bring the loopback interface up: ip link set lo up"


class _Said(msgspec.Struct, frozen=True):
    """What a rank tells the others: its address (empty: the one under which they see the store) and port, and random bytes."""

    address: str
    port: int
    nonce: bytes


@attrs.frozen
class Reach:
    """Where the ranks of a world listen.

    Attributes:
        native: the native module.
        endpoint: of this rank.
        addresses: host and port of every rank of the world, in order.
        spins: whether waits may spin: the ranks of this host are not more than its cores.
        name: of the world among those that share the endpoint.
    """

    native: Any = attrs.field(repr=False)
    endpoint: Endpoint = attrs.field(repr=False)
    addresses: tuple[tuple[str, int], ...]
    spins: bool
    name: str = ""

    def transport(self, uid: str, ranks: Sequence[int], rank_in_group: int) -> TcpTransport:
        """Return a transport without any link as yet, of the group `uid`; not collective."""
        group = hashlib.sha256(f"{self.name}\0{uid}".encode()).digest()[:16]
        return TcpTransport(self.native, self.endpoint, group, [self.addresses[rank] for rank in ranks], rank_in_group, spins=self.spins)

    def restrict(self, ranks: Sequence[int], name: str) -> Reach:
        """Return that of a smaller world of some of the ranks, numbered in the order given."""
        return attrs.evolve(self, addresses=tuple(self.addresses[rank] for rank in ranks), name=f"{self.name}/{name}")


def join(
    meeting: Meeting, hosts: Hosts, store: dist.Store, *, simulated: bool, authkey: bytes | None, address: str | None
) -> tuple[Reach | None, str]:
    """Listen, and learn where the others do. Collective over the world.

    Args:
        meeting: of the build.
        hosts: the node map.
        store: in which the ranks meet.
        simulated: whether all ranks are on this machine, whatever the node map says.
        authkey: secret of the job, or None.
        address: an address or the name of an interface, in place of the one found; not used on one host, where all reach loopback.

    Returns:
        Where the ranks listen, None where one of them has no native module; and this host's address.

    Raises:
        BuildError: there is no address, or nothing can listen there.
    """
    one_network = simulated or len(set(hosts.networks)) == 1
    here, host = _LOOPBACK, store_host(store)
    if not one_network or (address and hosts.node_count > 1):
        try:
            here = address_of(address, os.environ, host)
        except BuildError as error:
            raise BuildError(f"rank {hosts.rank}: the world: {error}") from None
    # Of the store's own host the address towards the store may be loopback; the others see it under another one.
    hidden = not one_network and ipaddress.ip_address(here.partition("%")[0]).is_loopback
    native = native_module.load()
    endpoint = None
    if native is not None:
        try:
            endpoint = Endpoint("" if hidden else here)
        except OSError as error:
            what = _BRING_UP if here == _LOOPBACK else "Name another address of this host by address= or COMMGRAPH_ADDRESS"
            raise BuildError(f"rank {hosts.rank}: the world: cannot listen at {here}: {error.strerror or error}. {what}") from error
        # Whatever the address, what a host sends to itself takes the loopback interface.
        if hosts.local_size > 1 and not hidden and (problem := why_unreached(*endpoint.address)) is not None:
            endpoint.close()
            raise BuildError(
                f"rank {hosts.rank}: the world: {hosts.local_size} ranks are on this host, and what it sends to itself at {here} does not "
                f"arrive: {problem}. {_BRING_UP}"
            )
    try:
        mine = _Said("" if hidden else here, endpoint.address[1] if endpoint is not None else 0, secrets.token_bytes(_NONCE_BYTES))
        said = [decode(value, _Said, rank) for rank, value in enumerate(meeting.exchange("reach", msgspec.msgpack.encode(mine)))]
        if endpoint is None or not all(one.port for one in said):
            if endpoint is not None:
                endpoint.close()
            return None, here
        seen = (address_seen(*host) if host is not None else None) or _LOOPBACK
        # Of one host the ranks reach each other there as well, and at loopback if they know no other address.
        addresses = tuple((one.address or (_LOOPBACK if hidden else seen), one.port) for one in said)
        endpoint.trust(hmac.digest(authkey or b"", b"".join(one.nonce for one in said), hashlib.sha256))
    except BaseException:
        if endpoint is not None:
            endpoint.close()
        raise
    return Reach(native, endpoint, addresses, hosts.local_size <= (os.cpu_count() or 1)), here
