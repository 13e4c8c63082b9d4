"""`commgraph bench` over two simulated hosts that are joined by a veth, with reno as TCP's congestion control.

    bench_over_hosts.py [--each RANKS] [--delay SECONDS] [--busy LOOPS] [arguments of `commgraph bench`, in the place of `_USUAL`]

With `mpi` among the peers MPICH's launcher starts the ranks, so that MPI is measured in the same processes, in turn: that of the `mpich`
wheel, beside this interpreter. Each host has one rank, or as many as are asked for. A delay, one way, is that of a relay between the hosts,
without MPI. Busy loops compete with the ranks for the cores: these then have ordinary priority.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import hosts  # type: ignore[import-not-found]  # tests/hosts.py

_USUAL = tuple("--op all_reduce send_recv --sizes 4,4Ki,64Ki,1Mi,16Mi --seconds 0.2 --compare gloo raw".split())  # noqa: SIM905 - as it is typed

# In the place of ssh: the words that hydra gives it, for a host of this machine.
_ENTER = """#!/bin/sh
while case $1 in -*) true;; *) false;; esac; do shift; done
host=$1; shift
case $host in
{cases}
esac
exec nsenter -t $pid -n -m -p -u --wd={folder} sh -c "$*"
"""


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--busy", type=int, default=0)
    given, arguments = parser.parse_known_args(arguments)
    if (why := hosts.why_impossible()) is not None:
        sys.stdout.write(f"skipped: {why}\n")
        return 0
    asked = arguments or _USUAL
    # Real-time scheduling stands for an idle machine, where it is allowed; the ranks do not run for long.
    real_time = ["chrt", "-r", "5"]
    may = not given.busy and shutil.which("chrt") and subprocess.run([*real_time, "true"], check=False).returncode == 0
    alone = real_time if may else []
    words = [*alone, sys.executable, "-m", "commgraph", "bench", *asked]
    with hosts.joined(2) as pair, contextlib.ExitStack() as beside:
        if given.delay:
            beside.enter_context(hosts.relayed(pair, delay=given.delay))
        for _ in range(given.busy):
            loop = beside.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            beside.callback(loop.kill)
        for host in pair:
            # The default of some machines, BBR, makes all libraries two to four times as slow on such a network, and hides differences.
            host.run("sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        # A queue's handle is an object of a class, which travels between hosts where there is a key.
        key = {"COMMGRAPH_AUTHKEY": secrets.token_hex(16)}
        address = key | {"MASTER_ADDR": pair[0].address, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        address["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        if "mpi" in asked:
            return by_mpiexec(pair, given.each, words, address)
        running = []
        size, each = 2 * given.each, given.each
        for rank in range(size):
            own = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank % each), "LOCAL_WORLD_SIZE": str(each)}
            running.append(pair[rank // each].start(*words, environ=address | own))
        said = [process.communicate()[0] for process in running]
        failed: int = max(process.returncode for process in running)
        sys.stdout.write("\n".join(said) if failed else said[0])
    return failed


def by_mpiexec(pair: Sequence[hosts.Host], each: int, words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start so many ranks on each host by MPICH's launcher, and return its exit code."""
    mpiexec = Path(sys.executable).with_name("mpiexec.hydra")
    if not mpiexec.exists():
        sys.stdout.write(f"needs MPICH beside {sys.executable}: pip install mpich mpi4py\n")
        return 1
    inside = ["nsenter", "-t", str(pair[0].switch), "-n"]
    subprocess.run([*inside, "ip", "address", "add", "10.77.0.254/24", "dev", "switch"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        enter = Path(folder) / "enter"
        cases = "\n".join(f"{host.address}) pid={host.pid};;" for host in pair)
        enter.write_text(_ENTER.format(cases=cases, folder=Path.cwd()))
        enter.chmod(0o700)
        placed = ["-iface", "switch", "-hosts", ",".join(host.address for host in pair), "-ppn", str(each), "-n", str(2 * each)]
        given = [word for name, value in environ.items() for word in ("-genv", name, value)]
        tcp = ["-genv", "MPIR_CVAR_CH4_NETMOD", "ofi", "-genv", "FI_PROVIDER", "tcp", "-genv", "FI_TCP_IFACE", "eth0"]
        command = [*inside, str(mpiexec), *placed, "-launcher", "ssh", "-launcher-exec", str(enter), *given, *tcp, *words]
        return subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
