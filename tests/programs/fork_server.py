"""Starts programs in processes forked from this one, which has imported torch: what takes 1.7 s of a processor in a new interpreter.

``fork_server.py DESCRIPTOR``: a socket to tests/processes.py, which sends for each process JSON of its argv, env and cwd,
with four descriptors: its standard streams, and a pipe to which the process id is written, and later the status of its end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch._dynamo  # noqa: F401 - so that the children have it: optimizers and FSDP import it when they first run

import commgraph.world  # noqa: F401


class Child(Exception):  # noqa: N818 - no error
    """Unwinds a child out of the loop, so that its program runs and ends in the outermost frame, as any program."""


def fork(request: dict[str, Any], streams: list[int], requests: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    requests.detach()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # it follows from the environment
    sys.argv = request["argv"]
    raise Child


def serve(requests: socket.socket) -> None:
    polled = select.poll()
    polled.register(requests, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}
    while True:
        for fd, _ in polled.poll():
            if fd == requests.fileno():
                message, given, _, _ = socket.recv_fds(requests, 1 << 20, 4)
                if not message:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                *streams, told = given
                pid = fork(json.loads(message), streams, requests)
                for stream in streams:
                    os.close(stream)
                os.write(told, struct.pack("i", pid))
                end = os.pidfd_open(pid)
                children[end] = pid, told
                polled.register(end, select.POLLIN)
            else:
                pid, told = children.pop(fd)
                polled.unregister(fd)
                os.close(fd)
                # Nobody may listen any more.
                os.write(told, struct.pack("i", os.waitpid(pid, 0)[1]))
                os.close(told)


def become(argv: list[str]) -> None:
    """Run a program as ``python *argv`` does."""
    if argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], str(Path.cwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    if argv[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
        code = compile(argv[1], "<string>", "exec")
    else:
        main.__file__, sys.path[0] = argv[0], str(Path(argv[0]).parent)
        code = compile(Path(argv[0]).read_text(), argv[0], "exec")
    sys.modules["__main__"] = main
    exec(code, vars(main))


if __name__ == "__main__":
    # The children's collections leave alone what is here, and do not copy its pages.
    gc.collect()
    gc.freeze()
    try:
        with socket.socket(fileno=int(sys.argv[1])) as requests:
            serve(requests)
        sys.exit()
    except Child:
        pass
    become(sys.argv)
