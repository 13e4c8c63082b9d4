"""The address at which a rank listens for other hosts."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch.distributed as dist

import commgraph as cg
from commgraph.addresses import address_of, address_seen, store_host
from commgraph.errors import BuildError
from tests.helpers import again_if_late, within


def test_the_first_that_is_given_counts() -> None:
    every = {"COMMGRAPH_ADDRESS": "127.0.0.2", "GLOO_SOCKET_IFNAME": "lo"}
    host = ("127.0.0.1", 80)
    assert address_of("127.0.0.3", every, host) == "127.0.0.3"
    assert address_of(None, every, host) == "127.0.0.2"
    assert address_of(None, {"GLOO_SOCKET_IFNAME": "lo"}, ("10.0.0.1", 80)) == "127.0.0.1"
    assert address_of(None, {}, host) == "127.0.0.1"
    assert address_of("lo", {}, None) == "127.0.0.1"
    assert address_of("localhost", {}, None) in ("127.0.0.1", "::1")


def test_without_a_store_on_a_host_it_is_one_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"lo": ["127.0.0.1", "::1"], "link": ["169.254.1.2", "fe80::1"], "eth0": ["192.0.2.7"]}
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(found)))
    monkeypatch.setattr("commgraph.addresses.interface_addresses", found.__getitem__)
    assert address_of(None, {}, None) == "192.0.2.7"
    del found["eth0"]
    with pytest.raises(BuildError, match=r"no address at which other hosts could reach it.*169\.254\.1\.2.*address="):
        address_of(None, {}, None)


@pytest.mark.parametrize(
    ("given", "environ", "words"),
    [
        ("eth77", {}, "address= is 'eth77', which is neither an interface"),
        (None, {"COMMGRAPH_ADDRESS": "192.0.2.1"}, "COMMGRAPH_ADDRESS is '192.0.2.1'.*Cannot assign requested address"),
        (None, {"GLOO_SOCKET_IFNAME": "ib7"}, "GLOO_SOCKET_IFNAME is 'ib7'"),
    ],
)
def test_what_is_no_address_of_this_host_is_named(given: str | None, environ: dict[str, str], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        address_of(given, environ, None)


def test_the_host_of_a_store_is_found_under_its_prefixes(tmp_path: Any) -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    assert store_host(dist.PrefixStore("a", dist.PrefixStore("b", server))) == ("127.0.0.1", server.port)
    assert store_host(dist.PrefixStore("a", dist.HashStore())) is None
    assert address_seen("127.0.0.1", server.port) == "127.0.0.1"
    assert address_seen("no such host.invalid", 1) is None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("nowhere.invalid", "the name 'nowhere.invalid' did not resolve within 0.5 s"),
        ("192.0.2.77", "is no address of this host|did not serve"),
    ],
)
@again_if_late
def test_an_address_of_nobody_is_one_line_within_the_deadline(rank: int, host: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of torch's own store it is a stack of C++ for each attempt, and three deadlines."""
    with within(0.5 + 2), pytest.raises(cg.BuildError, match=says) as caught:
        cg.World.connect(f"tcp://{host}:29577", rank=rank, world_size=2, timeout=0.5)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
