"""Under which address of this host the ranks of other hosts reach it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commgraph.errors import BuildError

__all__ = ["address_of", "address_seen", "interface_addresses", "store_host", "ticket_at", "why_unreached"]

# linux/sockios.h: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915
# Of /proc/net/if_inet6: an address that is valid everywhere.
_GLOBAL_SCOPE = "00"
# Errors of a host that cannot connect to itself.
_NO_WAY = frozenset({errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH})
# Seconds that a connection of a host to itself may take, which the kernel makes in microseconds.
_LOOPED_BACK = 2.0


def address_of(given: str | None, environ: Mapping[str, str], host: tuple[str, int] | None) -> str:
    """Return the address at which this process listens for ranks of other hosts.

    The first of these that there is: `given`; COMMGRAPH_ADDRESS; GLOO_SOCKET_IFNAME; the local address of a connection to the store; an
    address of an interface that is up.

    Args:
        given: an address or the name of an interface, as the caller gave it.
        environ: of the process.
        host: name and port of the server of the store; None where it has none.

    Raises:
        BuildError: a name that is neither an interface nor an address of this host, or there is no address at all.
    """
    interfaces = environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    for what, name in (
        ("address=", given),
        ("COMMGRAPH_ADDRESS", environ.get("COMMGRAPH_ADDRESS")),
        *(("GLOO_SOCKET_IFNAME", interface) for interface in interfaces),
    ):
        if name:
            return _resolve(what, name.strip())
    if host is not None and (towards := _ends(*host)[0]) is not None:
        return towards
    known = [(name, address) for _, name in socket.if_nameindex() for address in interface_addresses(name)]
    for _, address in known:
        one = ipaddress.ip_address(address)
        if not (one.is_loopback or one.is_link_local):
            return address
    raise BuildError(
        f"this host has no address at which other hosts could reach it: its interfaces are {known or 'without addresses'}. Name one by "
        "address= or COMMGRAPH_ADDRESS"
    )


def ticket_at(given: str | None, store: Any) -> str:
    """Return the address at which new processes reach this one: as `address_of`, else loopback.

    Args:
        given: as for `address_of`.
        store: in which the ranks of the world have met.
    """
    try:
        return address_of(given, os.environ, store_host(store))
    except BuildError:
        if given:
            raise
        return "127.0.0.1"


def store_host(store: Any) -> tuple[str, int] | None:
    """Return host and port of the server of one of torch's stores, under its prefixes; None where it has none."""
    for _ in range(16):
        host, port = getattr(store, "host", None), getattr(store, "port", None)
        if isinstance(host, str) and isinstance(port, int):
            return host, port
        store = getattr(store, "underlying_store", None) or getattr(store, "_store", None)
    return None


def address_seen(host: str, port: int) -> str | None:
    """Return the address to which a connection to `host` would go; None where there is no way there."""
    return _ends(host, port)[1]


def why_unreached(address: str, port: int) -> str | None:
    """Return why this host does not reach itself where it listens; None where it does, or that cannot be tried."""
    try:
        socket.create_connection((address, port), _LOOPED_BACK).close()
    except TimeoutError:
        return f"nothing arrives within {_LOOPED_BACK:g} s"
    except OSError as error:
        return error.strerror if error.errno in _NO_WAY else None
    return None


def _ends(host: str, port: int) -> tuple[str | None, str | None]:
    """Return both addresses of a connection to `host`, which is not made: nothing is sent."""
    with contextlib.suppress(OSError):
        for family, _, _, _, there in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(there)
                return str(probe.getsockname()[0]), str(probe.getpeername()[0])
    return None, None


def _resolve(what: str, name: str) -> str:
    if name in {interface for _, interface in socket.if_nameindex()}:
        if addresses := interface_addresses(name):
            return addresses[0]
        raise BuildError(f"{what} names the interface {name!r}, which has no address")
    tried = []
    with contextlib.suppress(OSError):
        for family, kind, _, _, there in socket.getaddrinfo(name.strip("[]"), 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind) as probe:
                    probe.bind(there)
                    return str(there[0])
            except OSError as error:
                tried.append(f"{there[0]}: {error.strerror}")
    interfaces = ", ".join(interface for _, interface in socket.if_nameindex())
    raise BuildError(
        f"{what} is {name!r}, which is neither an interface ({interfaces}) nor an address of this host"
        + (f" ({'; '.join(tried)})" if tried else "")
    )


def interface_addresses(interface: str) -> list[str]:
    """Return the addresses of an interface, IPv4 first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        answer = fcntl.ioctl(asks.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        found.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope == _GLOBAL_SCOPE:
                found.append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found
