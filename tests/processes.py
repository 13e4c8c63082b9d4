"""Programs in processes of their own that start at once, because they are forked from one that has imported torch.

Not for tests of what happens before or within ``import``: such a program has torch and commgraph imported before its first line, and one
thread of torch's own, whatever its environment says.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from tests.helpers import ROOT

PROGRAMS = ROOT / "tests" / "programs"
# What any launcher may have left in the environment of this very process, which the children must not see.
LAUNCHERS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMPI_.*|PMIX?_.*|MPI_.*|SLURM_.*|FLUX_.*|JSM_.*|MV2_.*|COMMGRAPH_.*)"
)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of this process without what a launcher may have said."""
    clean = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    # One thread of torch's own per rank: there are more ranks than cores.
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}


class Process:
    """A running program, as `subprocess.Popen` shows one; its three streams are pipes of text."""

    def __init__(self, words: Sequence[str], asked: socket.socket, env: Mapping[str, str], cwd: Path) -> None:
        self.args = list(words)
        self.returncode: int | None = None
        pipes = [os.pipe() for _ in range(4)]
        theirs = [pipes[0][0], *(writing for _, writing in pipes[1:])]
        request = json.dumps({"argv": self.args, "env": dict(env), "cwd": str(cwd)}).encode()
        socket.send_fds(asked, [request], theirs)
        for fd in theirs:
            os.close(fd)
        self.stdin = os.fdopen(pipes[0][1], "w")
        self.stdout, self.stderr = os.fdopen(pipes[1][0]), os.fdopen(pipes[2][0])
        self._told = pipes[3][0]
        (self.pid,) = struct.unpack("i", os.read(self._told, 4))

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, the negative signal where one ended it; raise `subprocess.TimeoutExpired` where it goes on."""
        if self.returncode is None:
            ready, _, _ = select.select([self._told], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            (status,) = struct.unpack("i", os.read(self._told, 4))
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None where it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, str]:
        """Write to its input and close that; return all that it writes until its end."""
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(text)
        with concurrent.futures.ThreadPoolExecutor(2) as readers:
            reads = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                out, err = (read.result(timeout) for read in reads)
            except TimeoutError as error:
                self.kill()  # which ends both reads
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
        self.wait(timeout)
        return out, err

    def close(self) -> None:
        """End it, and close its streams."""
        self.kill()
        self.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.stderr.close()
        os.close(self._told)


def outputs(ranks: Sequence[Process], timeout: float = 100) -> list[str]:
    """Return what each of the ranks of a job has printed, once all have ended well."""
    said = [rank.communicate(timeout=timeout) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), said
    return [out for out, _ in said]


class Processes:
    """Starts programs; knows those that it has started."""

    def __init__(self, asked: socket.socket) -> None:
        self._asked = asked
        self._started: list[Process] = []

    def start(self, *words: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
        """Start what ``python *words`` would run: a file and its arguments, ``-c`` and a text, ``-m`` and a module.

        Args:
            words: the program and its arguments.
            env: its whole environment; None: `environment()`.
            cwd: its working directory.
        """
        process = Process([str(word) for word in words], self._asked, environment() if env is None else env, cwd)
        self._started.append(process)
        return process

    def run(
        self, *words: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 100
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        process = self.start(*words, env=env, cwd=cwd)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)

    def launch(self, ranks: int, *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 100) -> list[str]:
        """Run a program on ranks that are told what torchrun tells its own; return what each printed, once all have ended well."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as an agent of torchrun serves it
        said = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        said |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0}
        each = [{**said, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
        texts = [{name: str(value) for name, value in one.items()} for one in each]
        return outputs([self.start(*words, env=environment({**one, **(env or {})})) for one in texts], timeout)

    def close(self) -> None:
        """End what still runs."""
        for process in self._started:
            process.close()
        self._started.clear()


@contextlib.contextmanager
def fork_server() -> Iterator[socket.socket]:
    """Start the process that forks; yield what it listens to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [sys.executable, str(PROGRAMS / "fork_server.py"), str(theirs.fileno())]
            # Its streams are pipes, as those of its children will be: Python asks what they are only once.
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment(), text=True, **streams)
        yield ours
    said = server.communicate(timeout=20)
    assert server.returncode == 0, said
