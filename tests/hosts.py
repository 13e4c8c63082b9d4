"""Simulated hosts: network, mount, pid and uts namespaces with a /dev/shm, a /tmp, an /etc/hosts and a host name of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

__all__ = ["Host", "joined", "why_impossible"]

_TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")


@attrs.frozen
class Host:
    """One of them.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        pid: of the process that holds its namespaces.
    """

    name: str
    address: str
    pid: int

    def command(self, *words: str) -> list[str]:
        """Return a command that runs another one here."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", f"--wd={Path.cwd()}", *words]

    def start(self, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program here; its output, errors included, can be read from `stdout`."""
        environ = os.environ | dict(environ or {})
        return subprocess.Popen(self.command(*words), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str) -> None:
        """Run a program here that must succeed."""
        subprocess.run(self.command(*words), check=True, capture_output=True, text=True)


def why_impossible() -> str | None:
    """Return why this machine cannot simulate hosts; None where it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "--fork", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


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
                f"mount -t tmpfs tmpfs /dev/shm && mount --bind {folder / name} /etc/hosts && mount -t tmpfs tmpfs /tmp && hostname {name} "
                "&& ip link set lo up"
            )
            pid = _hold(holders, prepare, "-n", "-m", "-p", "-u", "--fork", "--mount-proc", "--kill-child")
            host = Host(name, f"10.77.0.{number + 1}", pid)
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
