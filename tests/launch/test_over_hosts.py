"""Jobs over several hosts, which are namespaces of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import again_if_late, in_time
from tests.hosts import Host, joined, why_impossible

PROGRAM = str(Path(__file__).parent.parent / "programs" / "over_hosts.py")

reason = why_impossible()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240)]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    """Return what they wrote."""
    until = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(1.0, until - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def ranks_of(outputs: Sequence[str]) -> list[dict[str, Any]]:
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("{")]
    return sorted((json.loads(line) for line in lines), key=lambda facts: facts["rank"])


def torchrun(hosts: Sequence[Host], each: int, environ: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    processes = [
        host.start(
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={len(hosts)}",
            f"--nproc-per-node={each}",
            f"--node-rank={number}",
            f"--master-addr={hosts[0].address}",
            "--master-port=29511",
            PROGRAM,
            environ=environ,
        )
        for number, host in enumerate(hosts)
    ]
    outputs = finish(processes)
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return ranks_of(outputs)


def alone(hosts: Sequence[Host], environ: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One rank on each host, without a launcher's agents."""
    processes = [
        host.start(
            sys.executable,
            PROGRAM,
            environ={
                "RANK": str(rank),
                "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": "29512",
                **(environ or {}),
            },
        )
        for rank, host in enumerate(hosts)
    ]
    outputs = finish(processes)
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return ranks_of(outputs)


# Of the cases of one kind the suite has one.
more = pytest.mark.hosts


@pytest.mark.parametrize(
    "hosts_file",
    [
        pytest.param("127.0.0.1 localhost\n", id="name resolves to nothing", marks=more),
        pytest.param("127.0.0.1 localhost\n127.0.1.1 {name}\n", id="name is 127.0.1.1"),
        pytest.param("127.0.0.1 localhost\n10.99.0.1 {name}\n", id="name is an address that reaches nobody", marks=more),
    ],
)
def test_hosts_find_each_other_whatever_their_names_resolve_to(hosts_file: str) -> None:
    with joined(2, hosts_file=hosts_file, also=("10.99.0.1", "10.99.0.1")) as hosts:
        facts = alone(hosts)
    assert [one["nodes"] for one in facts] == [[0, 1]] * 2


def test_two_ranks_on_each_of_two_hosts_by_torchrun() -> None:
    with joined(2) as hosts:
        facts = torchrun(hosts, 2)
    assert [one["nodes"] for one in facts] == [[0, 0, 1, 1]] * 4
    assert all(one["serves"][0] == "hierarchical" for one in facts)


@more
def test_three_hosts() -> None:
    with joined(3) as hosts:
        facts = alone(hosts)
    assert [one["nodes"] for one in facts] == [[0, 1, 2]] * 3


@more
def test_equal_host_names_are_different_hosts() -> None:
    with joined(2, names="same") as hosts:
        facts = alone(hosts, {"COMMGRAPH_AUTHKEY": os.urandom(8).hex()})
    assert [one["nodes"] for one in facts] == [[0, 1]] * 2


@more
def test_an_address_is_given_by_its_interface() -> None:
    with joined(2, also=("10.99.0.1", "10.99.0.1")) as hosts:
        facts = alone(hosts, {"COMMGRAPH_ADDRESS": "eth0"})
    assert [one["nodes"] for one in facts] == [[0, 1]] * 2


@more
def test_an_address_that_reaches_nobody_is_named() -> None:
    with joined(2, also=("10.99.0.1", "10.99.0.2")) as hosts:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29513", "SECONDS_TO_BUILD": "5"}
        processes = [
            host.start(sys.executable, PROGRAM, environ=common | {"RANK": str(rank), "COMMGRAPH_ADDRESS": "eth1"})
            for rank, host in enumerate(hosts)
        ]
        begun = time.monotonic()
        outputs = finish(processes)
    assert time.monotonic() - begun < 60
    assert all(process.returncode for process in processes)
    assert all("no connection to rank" in output and "listens at 10.99.0." in output for output in outputs), "\n".join(outputs)


@again_if_late
def test_a_rank_that_dies_on_another_host_is_heard() -> None:
    with joined(2) as hosts:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29514"}
        processes = [
            host.start(sys.executable, PROGRAM, environ=common | {"RANK": str(rank), "DIES": "1"}) for rank, host in enumerate(hosts)
        ]
        first, second = finish(processes)
    assert processes[1].returncode == -9, second
    said = json.loads(next(line for line in first.splitlines() if line.startswith("{")))
    assert said["lost"] == 1, first
    in_time(said["seconds"], 5, first)


@more
@again_if_late
def test_a_host_that_vanishes_is_noticed() -> None:
    with joined(2) as hosts:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29515"}
        processes = [
            host.start(sys.executable, PROGRAM, environ=common | {"RANK": str(rank), "DIES": "link"}) for rank, host in enumerate(hosts)
        ]
        for process in processes:
            assert process.stdout is not None
            while process.stdout.readline() not in ("ready\n", ""):
                pass
        hosts[1].run("ip", "link", "set", "eth0", "down")
        outputs = finish(processes)
    for rank, output in enumerate(outputs):
        said = json.loads(next((line for line in output.splitlines() if line.startswith("{")), "{}"))
        assert said.get("lost") == 1 - rank, output
        in_time(said["seconds"], 20, output)


@more
def test_the_demo_runs_on_two_hosts_without_an_authkey() -> None:
    with joined(2) as hosts:
        processes = [
            host.start(
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", f"--node-rank={number}"),
                *(f"--master-addr={hosts[0].address}", "--master-port=29511", "-m", "commgraph.demo", "--tokens=8"),
            )
            for number, host in enumerate(hosts)
        ]
        outputs = finish(processes, 200)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "bytes sent" in outputs[0]
