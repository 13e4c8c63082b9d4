"""Cases of two hosts as users meet them: names and addresses, objects and keys, queues, builds that fail, a bad network."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import again_if_late, in_time
from tests.hosts import Host, joined, relayed, why_impossible
from tests.launch.test_over_hosts import finish, ranks_of

PROGRAM = str(Path(__file__).parent.parent / "programs" / "cases_over_hosts.py")

reason = why_impossible()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240), pytest.mark.hosts]

# Seconds that a failure may take beyond its deadline.
BEYOND = 2.0
KEY = {"COMMGRAPH_AUTHKEY": "a secret"}


def start(hosts: Sequence[Host], case: str, *each: Mapping[str, str], place: str = "", ranks: Sequence[int] = (0, 1)) -> Any:
    """Start a case, a rank on each host; `each` has variables of all ranks, or of each."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": place or hosts[0].address, "MASTER_PORT": "29540", "OMP_NUM_THREADS": "1"}
    own = each * 2 if len(each) == 1 else each or ({}, {})
    return [hosts[rank].start(sys.executable, PROGRAM, case, environ={**common, "RANK": str(rank), **own[rank]}) for rank in ranks]


def results(hosts: Sequence[Host], case: str, *each: Mapping[str, str], **how: Any) -> list[dict[str, Any]]:
    """Run a case; return what its ranks said."""
    outputs = finish(start(hosts, case, *each, **how))
    said = ranks_of(outputs)
    assert said, "\n".join(outputs)
    return said


def all_well(said: Sequence[Mapping[str, Any]]) -> None:
    assert [one.get("ended") for one in said] == [[0, 1]] * 2, said


def resolve(host: Host, text: str) -> None:
    """Write a host's /etc/hosts, which is its own."""
    host.run("sh", "-c", f"printf '{text}' > /etc/hosts")


# Names and addresses.


@pytest.mark.parametrize("case", ["environment", "connect", "torch_group"])
def test_every_way_to_a_world(case: str) -> None:
    with joined(2) as hosts:
        # torch's own gloo asks what the host's name resolves to, or this variable.
        all_well(results(hosts, case, {"GLOO_SOCKET_IFNAME": "eth0"}))


@pytest.mark.parametrize("also", [(), ("10.99.0.1", "10.99.0.1")], ids=["no name", "two networks"])
def test_the_interface_of_gloo_counts(also: Sequence[str]) -> None:
    wrong = "127.0.0.1 localhost\n10.99.0.1 {name}\n" if also else "127.0.0.1 localhost\n"
    with joined(2, also=also, hosts_file=wrong) as hosts:
        all_well(results(hosts, "environment", {"GLOO_SOCKET_IFNAME": "eth0"}))


def test_the_master_is_a_name_that_is_loopback_on_its_own_host() -> None:
    """As Debian installs it: 127.0.1.1 there, an address elsewhere."""
    with joined(2) as hosts:
        resolve(hosts[0], "127.0.0.1 localhost\\n127.0.1.1 host0\\n")
        resolve(hosts[1], f"127.0.0.1 localhost\\n127.0.1.1 host1\\n{hosts[0].address} host0\\n")
        all_well(results(hosts, "environment", place="host0"))


@pytest.mark.parametrize("place", ["fd78::1", "[fd78::1]", "host0"])
def test_a_network_of_ipv6_alone(place: str) -> None:
    with joined(2) as hosts:
        for number, host in enumerate(hosts, 1):
            host.run("ip", "-6", "address", "add", f"fd78::{number}/64", "dev", "eth0", "nodad")
            host.run("ip", "-4", "address", "flush", "dev", "eth0")
            resolve(host, "127.0.0.1 localhost\\nfd78::1 host0\\nfd78::2 host1\\n")
        all_well(results(hosts, "environment", place=place))


@pytest.mark.parametrize("place", ["nowhere.invalid", "10.77.0.99"])
@again_if_late
def test_a_master_that_is_nobody(place: str) -> None:
    with joined(2) as hosts:
        said = results(hosts, "environment", {"SECONDS_TO_BUILD": "3"}, place=place)
    for one in said:
        assert (one["raised"], place in one["text"], one["text"].count("\n")) == ("BuildError", True, 0), said
        in_time(one["seconds"], 3 + BEYOND, said)


@again_if_late
def test_nobody_comes_from_the_other_host() -> None:
    with joined(2) as hosts:
        (one,) = results(hosts, "environment", {"SECONDS_TO_BUILD": "3"}, ranks=[0])
    assert one["raised"] == "BuildError"
    assert "rank 1 of 2 did not come within 3 s" in one["text"]
    in_time(one["seconds"], 3 + BEYOND)


# Builds that fail.


@pytest.mark.parametrize(
    ("case", "left", "words"),
    [
        ("strategies", 0, "rank 1 could not build it: LayoutError"),
        ("death", 0, "rank 1 of 2 did not come"),  # at the deadline: nobody on its host has seen it die
        ("store_death", 1, "the store that the ranks meet in failed.*Rank 0"),
    ],
)
@again_if_late
def test_a_build_that_fails_on_one_host_names_its_rank_on_the_other(case: str, left: int, words: str) -> None:
    with joined(2) as hosts:
        said = results(hosts, case, {"SECONDS_TO_BUILD": "6"})
    (one,) = (one for one in said if one["rank"] == left)
    assert one["raised"] == "BuildError", said
    assert re.search(words, one["text"]), said
    # From the start of the process on: the world, and then the context until its deadline.
    in_time(one["seconds"], 2 * 6 + BEYOND, said)


def test_torchrun_ends_on_both_hosts_where_the_ranks_of_one_fail() -> None:
    with joined(2) as hosts:
        agents = [
            host.start(
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", f"--node-rank={number}"),
                *(f"--master-addr={hosts[0].address}", "--master-port=29541", PROGRAM, "failure"),
            )
            for number, host in enumerate(hosts)
        ]
        begun = time.monotonic()
        outputs = finish(agents)
        took = time.monotonic() - begun
    assert all(agent.returncode for agent in agents), "\n".join(outputs)
    assert "a mistake" in "\n".join(outputs)
    said = {one["rank"]: one for one in ranks_of(outputs)}
    assert said.get(1, {}).get("raised") == "KeyError", outputs
    # torchrun may end a rank before it has said anything; those that spoke say that they lost a peer.
    assert all(one["raised"] == "PeerLostError" for rank, one in said.items() if rank != 1), said
    assert took < 60


# Objects and keys.


def test_objects_without_a_key_are_plain_data() -> None:
    with joined(2) as hosts:
        said = results(hosts, "own_object")
    assert "authkey" in said[0]["ended"]
    assert "Own" in said[0]["ended"]
    assert said[1]["ended"] == "sent"


def test_any_object_with_a_key() -> None:
    with joined(2) as hosts:
        said = results(hosts, "own_object_signed", KEY)
    assert [one["ended"] for one in said] == [True, True]


@pytest.mark.parametrize("other", [{"COMMGRAPH_AUTHKEY": "another secret"}, {}], ids=["other keys", "one key"])
@again_if_late
def test_keys_that_differ_are_told_at_build(other: Mapping[str, str]) -> None:
    with joined(2) as hosts:
        said = results(hosts, "environment", {**KEY, "SECONDS_TO_BUILD": "5"}, {**other, "SECONDS_TO_BUILD": "5"})
    assert all(one["raised"] in ("LayoutMismatchError", "BuildError") for one in said), said
    assert any("authkey" in one["text"] for one in said), said
    in_time(max(one["seconds"] for one in said), 5 + BEYOND, said)


# Queues.

WRITER = """
import pickle, sys
import commgraph as cg
queue = cg.MessageQueue.create(1, n_local_readers=0, address={address!r})
print(pickle.dumps(queue.handle).hex(), flush=True)
try:
    queue.wait_until_ready({seconds})
    queue.enqueue(["a", 1, b"x" * 1_000_000], timeout={seconds})
    queue.close()
    print("written", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""
READER = """
import pickle, sys
import commgraph as cg
try:
    queue = cg.MessageQueue.attach(pickle.loads(bytes.fromhex(sys.argv[1])), 0)
    queue.wait_until_ready({seconds})
    print("read", queue.dequeue({seconds}) == ["a", 1, b"x" * 1_000_000], flush=True)
    queue.close()
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def queue(hosts: Sequence[Host], address: str | None, *keys: Mapping[str, str], seconds: float = 20) -> tuple[str, str]:
    """Return what the writer on the first host and the reader on the second said."""
    writer_key, reader_key = keys or ({}, {})
    writer = hosts[0].start(sys.executable, "-c", WRITER.format(address=address, seconds=seconds), environ=writer_key)
    assert writer.stdout is not None
    handle = writer.stdout.readline().strip()
    if not handle or any(letter not in "0123456789abcdef" for letter in handle):
        return handle + writer.communicate()[0], ""
    reader = hosts[1].start(sys.executable, "-c", READER.format(seconds=seconds), handle, environ=reader_key)
    wrote, read = finish([writer, reader], 60)
    return wrote, read


@pytest.mark.parametrize("keys", [(), (KEY, KEY)], ids=["plain", "signed"])
def test_a_queue_to_another_host(keys: Sequence[Mapping[str, str]]) -> None:
    with joined(2) as hosts:
        assert queue(hosts, hosts[0].address, *keys) == ("written\n", "read True\n")


def test_a_queue_without_an_address_says_what_is_missing() -> None:
    with joined(2) as hosts:
        wrote, read = queue(hosts, None, seconds=5)
    assert "PeerLostError" in read
    assert "127.0.0.1" in read
    assert "address=" in read
    assert "CollectiveTimeoutError" in wrote


def test_a_queue_at_an_unknown_name_says_so() -> None:
    with joined(2) as hosts:
        wrote, _ = queue(hosts, "nowhere.invalid", seconds=5)
    assert "nowhere.invalid" in wrote
    assert "address" in wrote


@pytest.mark.parametrize("reader", [{"COMMGRAPH_AUTHKEY": "another secret"}, {}], ids=["other keys", "one key"])
def test_a_queue_whose_keys_differ(reader: Mapping[str, str]) -> None:
    with joined(2) as hosts:
        wrote, read = queue(hosts, hosts[0].address, KEY, reader, seconds=5)
    assert "key" in read, (wrote, read)
    assert "CollectiveTimeoutError" in wrote


# A bad network.


@pytest.mark.parametrize(("delay", "loss"), [(0.0005, 0.0), (0.0001, 0.001)], ids=["half a millisecond", "one frame of 1000"])
def test_results_are_right_on_a_bad_network(delay: float, loss: float) -> None:
    with joined(2) as hosts, relayed(hosts, delay=delay, loss=loss):
        works(hosts, lambda: time.sleep(3))


def works(hosts: Sequence[Host], meanwhile: Any) -> None:
    """Have two ranks work, each of whose results is checked, while something happens."""
    processes = start(hosts, "loop")
    for process in processes:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line, "a rank has ended"
    meanwhile()
    for host in hosts:
        host.run("touch", "/tmp/stop")
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all(one["ended"] > 3 for one in ranks_of(outputs)), outputs


def test_garbage_and_silence_at_the_port_of_a_rank_disturb_nothing() -> None:
    """From a third host of the network: bytes of every kind, and connections that say nothing."""
    attack = (
        "import os, socket, sys, time\n"
        "held = []\n"
        "for port in map(int, sys.argv[2:]):\n"
        "    for words in (b'', b'\\0' * 100, b'GET / HTTP/1.1\\r\\n\\r\\n', b'\\xff' * 65536, os.urandom(3000)) * 20:\n"
        "        held.append(socket.create_connection((sys.argv[1], port), 5))\n"
        "        held[-1].settimeout(0.5)\n"
        "        try:\n"
        "            held[-1].sendall(words)\n"
        "        except OSError:\n"
        "            pass\n"
        "time.sleep(1)\n"
    )
    with joined(3) as hosts:

        def meanwhile() -> None:
            for host in hosts[:2]:
                listening = host.read("ss", "-Htln").splitlines()
                ports = [line.split()[3].rpartition(":")[2] for line in listening]
                assert ports, "else nobody is attacked"
                hosts[2].run(sys.executable, "-c", attack, host.address, *[port for port in ports if port != "29540"])

        works(hosts[:2], meanwhile)


def test_torchs_front_ends_over_the_backend() -> None:
    """DDP, FSDP2, DTensor, checkpoints, pipelining, compiled and functional collectives, as on one host."""
    # Each host has a /tmp of its own; a checkpoint wants a folder that all see.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared, joined(2) as hosts:
        # The program makes a group of torch's own gloo, too.
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29540", "GLOO_SOCKET_IFNAME": "eth0"}
        words = [sys.executable, str(Path(PROGRAM).with_name("torch_front_ends.py")), shared]
        started = [host.start(*words, environ={**common, "OMP_NUM_THREADS": "1", "RANK": str(rank)}) for rank, host in enumerate(hosts)]
        outputs = finish(started)
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "fsdp\n" in outputs[0]
    assert "nobody_comes\n" in outputs[0]
