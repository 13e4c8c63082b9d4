"""`commgraph bench` over two simulated hosts that are joined by a veth, with reno as TCP's congestion control.

Arguments: those of `commgraph bench`, in the place of `_USUAL`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import hosts  # type: ignore[import-not-found]  # tests/hosts.py

_USUAL = tuple("--op all_reduce send_recv --sizes 4,4Ki,64Ki,1Mi,16Mi --seconds 0.2 --compare gloo raw".split())  # noqa: SIM905 - as it is typed


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    if (why := hosts.why_impossible()) is not None:
        sys.stdout.write(f"skipped: {why}\n")
        return 0
    asked = arguments or _USUAL
    # Real-time scheduling stands for an idle machine, where it is allowed; the ranks do not run for long.
    alone = ["chrt", "-r", "5"] if shutil.which("chrt") and subprocess.run(["chrt", "-r", "5", "true"], check=False).returncode == 0 else []
    with hosts.joined(2) as pair:
        for host in pair:
            # The default of some machines, BBR, makes all libraries two to four times as slow on such a network, and hides differences.
            host.run("sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        # A queue's handle is an object of a class, which travels between hosts where there is a key.
        key = {"COMMGRAPH_AUTHKEY": secrets.token_hex(16)}
        address = key | {"WORLD_SIZE": "2", "MASTER_ADDR": pair[0].address, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        running = []
        for rank, host in enumerate(pair):
            own = address | {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
            running.append(host.start(*alone, sys.executable, "-m", "commgraph", "bench", *asked, environ=own))
        said = [process.communicate()[0] for process in running]
        failed: int = max(process.returncode for process in running)
        sys.stdout.write("\n".join(said) if failed else said[0])
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
