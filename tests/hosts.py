"""Simulated hosts: network, mount, pid and uts namespaces with a /dev/shm, a /tmp, an /etc/hosts and a host name of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

__all__ = ["Host", "Job", "joined", "relayed", "why_impossible"]

_TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")


@attrs.frozen
class Host:
    """One of them.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        pid: of the process that holds its namespaces.
        switch: pid of the one that holds the namespace of the network's bridge.
    """

    name: str
    address: str
    pid: int
    switch: int

    def command(self, *words: str) -> list[str]:
        """Return a command that runs another one here."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", f"--wd={Path.cwd()}", *words]

    def start(self, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program here; its output, errors included, can be read from `stdout`."""
        environ = os.environ | dict(environ or {})
        return subprocess.Popen(self.command(*words), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str) -> None:
        """Run a program here that must succeed."""
        self.read(*words)

    def read(self, *words: str) -> str:
        """Return what a program writes that must succeed here."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True).stdout


class Job:
    """Ranks of one program on hosts, whose output is read as it comes; ended on leaving the ``with`` statement.

    Attributes:
        said: what each rank has written as lines of JSON, by rank.
    """

    def __init__(self, hosts: Sequence[Host], each: int, program: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        """Start `each` ranks on every host; they meet at the first host's address."""
        size = each * len(hosts)
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29530", "OMP_NUM_THREADS": "1"}
        self.hosts = [hosts[rank // each] for rank in range(size)]
        self.processes = [
            host.start(sys.executable, *program, environ={**common, "RANK": str(rank), **(environ or {})})
            for rank, host in enumerate(self.hosts)
        ]
        self.said: list[list[dict[str, Any]]] = [[] for _ in self.processes]
        self._raw: list[list[str]] = [[] for _ in self.processes]
        self._changed = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in range(size)]
        for reader in self._readers:
            reader.start()

    def _read(self, rank: int) -> None:
        output = self.processes[rank].stdout
        assert output is not None
        for line in output:
            with self._changed:
                if line.startswith("{"):
                    self.said[rank].append(json.loads(line))
                elif "frame #" not in line:  # stacks of torch's store
                    self._raw[rank].append(line)
                self._changed.notify_all()

    def find(self, rank: int, key: str) -> dict[str, Any] | None:
        """Return the first message of a rank that has such a key."""
        return next((one for one in self.said[rank] if key in one), None)

    def expect(self, key: str, ranks: Iterable[int], seconds: float) -> list[dict[str, Any]]:
        """Return the first message with such a key of each of some ranks, once they are there."""
        with self._changed:
            self._changed.wait_for(lambda: all(self.find(rank, key) for rank in ranks), seconds)
        found = [self.find(rank, key) for rank in ranks]
        silent = [rank for rank, one in zip(ranks, found, strict=True) if one is None]
        assert not silent, f"ranks {silent} did not say {key!r} within {seconds} s:\n{self.output(silent)}"
        return [one for one in found if one is not None]

    def output(self, ranks: Iterable[int]) -> str:
        """Return what some ranks have written, for messages."""
        return "\n".join(f"rank {rank}: {self.said[rank]}\n{''.join(self._raw[rank])[-3000:]}" for rank in ranks)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank itself, which is a child of the process that entered its host."""
        os.kill(self._pid(rank), number)

    def _pid(self, rank: int) -> int:
        starter = self.processes[rank].pid
        children = Path(f"/proc/{starter}/task/{starter}/children").read_text().split()
        return int(children[0]) if children else starter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank, process in enumerate(self.processes):
            with contextlib.suppress(OSError):
                self.signal(rank, signal.SIGKILL)
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(10)
        for process in self.processes:
            if process.stdout is not None:
                process.stdout.close()


def why_impossible() -> str | None:
    """Return why this machine cannot simulate hosts; None where it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "--fork", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def _own_tmp() -> str:
    """Return the shell's commands for an empty /tmp, but for this repository and the interpreter where they lie there."""
    kept = [one for one in (str(Path(__file__).parent.parent), sys.prefix) if one.startswith("/tmp/")]
    back = [f"mkdir -p {shlex.quote(one)} && mount --bind {shlex.quote(one.replace('/tmp', '/mnt', 1))} {shlex.quote(one)}" for one in kept]
    return " && ".join([*(["mount --bind /tmp /mnt"] if kept else []), "mount -t tmpfs tmpfs /tmp", *back])


@contextlib.contextmanager
def joined(
    count: int, *, names: str = "host{}", hosts_file: str = "127.0.0.1 localhost\n", also: Sequence[str] = ()
) -> Iterator[list[Host]]:
    """Make hosts that are joined by a network 10.77.0.0/24.

    Args:
        count: how many.
        names: of the hosts, by number.
        hosts_file: what each finds in /etc/hosts; ``{name}`` stands for its own name.
        also: for each host that is in the list, the address of a second interface, which reaches nobody.
    """
    folder = Path(tempfile.mkdtemp(prefix="commgraph-hosts-"))
    holders: list[subprocess.Popen[bytes]] = []
    try:
        switch = _hold(holders, "ip link add switch type bridge && ip link set switch up", "-n")
        hosts = []
        for number in range(count):
            name = names.format(number)
            (folder / name).write_text(hosts_file.format(name=name))
            prepare = (
                f"mount -t tmpfs tmpfs /dev/shm && mount --bind {folder / name} /etc/hosts && {_own_tmp()} && hostname {name} "
                "&& ip link set lo up"
            )
            pid = _hold(holders, prepare, "-n", "-m", "-p", "-u", "--fork", "--mount-proc", "--kill-child")
            host = Host(name, f"10.77.0.{number + 1}", pid, switch)
            _ip("link", "add", "eth0", "netns", str(pid), "type", "veth", "peer", "name", f"port{number}", "netns", str(switch))
            subprocess.run(["nsenter", "-t", str(switch), "-n", "ip", "link", "set", f"port{number}", "master", "switch", "up"], check=True)
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            if number < len(also):
                host.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "nowhere")
                host.run("ip", "address", "add", f"{also[number]}/24", "dev", "eth1")
                host.run("ip", "link", "set", "nowhere", "up")
                host.run("ip", "link", "set", "eth1", "up")
            hosts.append(host)
        _await_carrier(hosts)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def relayed(hosts: Sequence[Host], *, delay: float = 0.0, loss: float = 0.0, seed: int = 0) -> Iterator[None]:
    """Join the first two hosts, and them alone, by a program that delays and drops frames in place of the bridge.

    Args:
        hosts: as `joined` gives them.
        delay: seconds, one way.
        loss: share of the frames.
        seed: of the choice of those that are lost.
    """
    enter, ports = ["nsenter", "-t", str(hosts[0].switch), "-n"], [f"port{number}" for number in range(2)]
    for port in ports:
        subprocess.run([*enter, "ip", "link", "set", port, "nomaster"], check=True)
    words = [sys.executable, str(Path(__file__).parent / "programs" / "relay.py"), str(delay), str(loss), str(seed), *ports]
    relay = subprocess.Popen([*enter, *words], stdout=subprocess.PIPE)
    try:
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"ready\n"
        _await_carrier(hosts[:2])
        yield
    finally:
        relay.kill()
        relay.communicate()
        for port in ports:
            subprocess.run([*enter, "ip", "link", "set", port, "master", "switch"], check=False)


def _hold(holders: list[subprocess.Popen[bytes]], prepare: str, *namespaces: str) -> int:
    """Start a process in new namespaces, and return its pid once it has prepared them."""
    holder = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", f"{prepare} && echo ready && exec sleep infinity"], stdout=subprocess.PIPE
    )
    holders.append(holder)
    assert holder.stdout is not None
    said = holder.stdout.readline()
    assert said == b"ready\n", f"{prepare}: {said!r}"
    if "--fork" not in namespaces:
        return holder.pid
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    return int(children[0])


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _await_carrier(hosts: Sequence[Host]) -> None:
    """A new veth carries nothing for some tenths of a second."""
    until = time.monotonic() + 10
    for host in hosts[1:]:
        # Nobody listens there: a refusal has come all the way.
        knock = f"import socket; s = socket.socket(); s.settimeout(1); assert s.connect_ex(({host.address!r}, 9)) == 111"
        while subprocess.run(hosts[0].command(sys.executable, "-c", knock), capture_output=True, check=False).returncode:
            assert time.monotonic() < until, f"{host.name} is not reached"
            time.sleep(0.05)
