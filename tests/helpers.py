"""Helpers that several test files share: groups to run on, comparisons by bits, and patience with machines that stand still."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore

P = ParamSpec("P")
T = TypeVar("T")
Groups = tuple[tuple[int, ...], ...]

ROOT = Path(__file__).parent.parent
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


# Ranks as threads.


def on_ctx(n: int, body: Callable[[cg.ParallelContext], T], *, nodes: int = 1, timeout: float = 60, **options: Any) -> list[T]:
    """Run `body` on each rank of a context whose tensor parallel group has all n ranks; return its results in rank order."""

    def run(world: cg.World) -> T:
        with world.context(cg.Layout(n, tp=n), name="a", options=cg.CommunicatorOptions(**options)) as context:
            return body(context)

    return spmd(run, n, nodes=nodes, timeout=timeout)


def on(n: int, body: Callable[[GroupCoordinator], T], *, nodes: int = 1, timeout: float = 60, **options: Any) -> list[T]:
    """Run `body` on each rank of one group of n ranks; return its results in rank order."""
    return on_ctx(n, lambda context: body(context.tp), nodes=nodes, timeout=timeout, **options)


class CountingStore(dist.Store):
    """Counts the operations of one rank, and the keys they name, in a store that all share."""

    def __init__(self, shared: ThreadStore) -> None:
        super().__init__()
        self.shared = shared
        self.operations = 0
        self.keys = 0
        self._looked_for: set[tuple[str, ...]] = set()

    def _count(self, keys: int) -> None:
        self.operations += 1
        self.keys += keys

    def _count_look(self, *keys: str) -> None:
        """Count a look once: a wait looks for its keys again and again, and if it lasts, whether a rank has failed or left the world."""
        if keys not in self._looked_for and not keys[0].endswith(("/failed", "/ended")):
            self._looked_for.add(keys)
            self._count(len(keys))

    def set(self, key: str, value: Any) -> None:
        self._count(1)
        self.shared.set(key, value)

    def get(self, key: str) -> bytes:
        self._count(1)
        return self.shared.get(key)

    def add(self, key: str, amount: int) -> int:
        if amount:
            self._count(1)
        else:
            self._count_look(f"{key} as a number")
        return self.shared.add(key, amount)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        self._count(1)
        return self.shared.compare_set(key, expected, desired)

    def check(self, keys: list[str]) -> bool:
        self._count_look(*keys)
        return self.shared.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._count(len(keys))
        self.shared.wait(keys, timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._count(len(keys))
        return self.shared.multi_get(keys)

    def multi_set(self, keys: list[str], values: Any) -> None:
        self._count(len(keys))
        self.shared.multi_set(keys, values)

    def delete_key(self, key: str) -> bool:
        self._count(1)
        return self.shared.delete_key(key)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> CountingStore:
        return self


# Values.


def bits(x: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return the dtype, the shape and the bytes of a tensor's elements: equal of two tensors that no program can tell apart."""
    x = x.detach().resolve_conj().resolve_neg()
    # Viewed as a plain dtype, because torch copies no tensor of the rarer ones. Of one element or none any stride counts as contiguous,
    # and only a stride of one can be viewed as bytes.
    dense = x.view(CARRIERS[x.dtype.itemsize]).clone(memory_format=torch.contiguous_format).as_strided((x.numel(),), (1,))
    return x.dtype, tuple(x.shape), dense.view(torch.uint8).numpy().tobytes()


def same(left: Any, right: Any) -> bool:
    """Return whether two trees are equal and of equal types all the way down, dicts in one order, tensors by their bits."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return bits(left) == bits(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (set, frozenset)):
        return len(left) == len(right) and all(any(same(one, other) for other in right) for one in left)
    return bool(left == right) and repr(left) == repr(right)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return random numbers of a normal distribution, equal for an equal seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_groups(rows: Iterable[Iterable[Any]]) -> Groups:
    """Return rows of ranks as `Layout.groups` gives them: tuples, ordered by first rank."""
    return tuple(sorted(tuple(map(int, row)) for row in rows))


# The machine.


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def may_unshare() -> bool:
    """Return whether programs may be started in network, mount and process namespaces of their own."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "true"], capture_output=True, check=False).returncode == 0


# From linux/sched.h.
NEW_MOUNTS, NEW_PIDS, NEW_NET = 0x00020000, 0x20000000, 0x40000000


def unshare(flags: int, *mounts: str) -> None:
    """Go on in namespaces of its own, and there mount; as unshare(1), without another program that has to import torch."""
    assert ctypes.CDLL(None, use_errno=True).unshare(flags) == 0, os.strerror(ctypes.get_errno())
    if flags & NEW_PIDS and (pid := os.fork()):
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    for command in ["mount --make-rprivate /", *mounts] if flags & NEW_MOUNTS else []:
        subprocess.run(command.split(), check=True)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return once a condition holds; raise TimeoutError where it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {condition}")
        time.sleep(0.001)


def until_it_waits(thread: threading.Thread) -> None:
    """Return once a thread has ended, or waits for something else than its turn in the interpreter, as it does in a call.

    The kernel says that it sleeps, several times while this thread sleeps, which leaves the interpreter to it.
    """
    asleep = 0

    def waits() -> bool:
        nonlocal asleep
        try:
            state = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        asleep = asleep + 1 if state == "S" else 0
        return asleep > 5

    until(waits)


class TooLateError(AssertionError):
    """Something took longer than it may."""


# Interpreters that the machine could have started in the time that it may be slower than it should.
STARTS = 100


def start_seconds() -> float:
    """Return how long this machine takes now to start an interpreter and see its end: some 0.01 s where nothing else runs."""
    started = time.monotonic()
    for _ in range(3):
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
    return (time.monotonic() - started) / 3


def in_time(took: float, seconds: float, what: object = "it") -> None:
    """Raise TooLateError where something took longer than users are promised, and that is not this machine's slowness.

    A machine is measured where the promise was missed only. One that starts interpreters in 0.01 s is granted a second more, one that is
    ten times slower ten.

    Args:
        took: what it took, in seconds.
        seconds: what the documentation promises, or at a deadline: the deadline and two seconds.
        what: it, for the error.
    """
    if took >= seconds and took >= seconds + (more := STARTS * start_seconds()):
        raise TooLateError(f"{what} took {took:.2f} s, and may take {seconds:g} s and {more:.2f} s on a machine as slow as this is now")


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooLateError where what is done inside takes longer than so many seconds, as `in_time` does."""
    started = time.monotonic()
    yield
    in_time(time.monotonic() - started, seconds)


def again_if_late(test: Callable[P, None]) -> Callable[P, None]:
    """Repeat a test that is late, up to three times: the machine delays one of them, what is slow by itself delays all."""

    @functools.wraps(test)
    def patient(*args: P.args, **kwargs: P.kwargs) -> None:
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except TooLateError:
                continue
        return test(*args, **kwargs)

    return patient


def count_calls(run: Callable[[], Any]) -> int:
    """Return how many functions of the package one call enters, on this thread; comprehensions are none from Python 3.12 on."""
    found, package = 0, str(Path(cg.__file__).parent)

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        code = frame.f_code
        found += event == "call" and code.co_filename.startswith(package) and code.co_name != "<listcomp>"

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found
