"""`spmd`: N ranks as N threads of this process."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from commgraph import launch
from commgraph.assembly import Terms
from commgraph.building import CONNECTING
from commgraph.deadline import seconds_of
from commgraph.errors import CollectiveTimeoutError, ConfigurationError
from commgraph.meeting import PeerLeftError
from commgraph.testing.faults import Fault, RankKilled, inject_faults
from commgraph.world import World

__all__ = ["ThreadStore", "spmd"]

T = TypeVar("T")

# How long a peer may take to write a key by which gloo connects.
_CONNECT_SECONDS = 5.0
# How long the ranks that were released may take to unwind.
_UNWIND_SECONDS = 10.0


class ThreadStore(dist.Store):
    """A store for the threads of one process whose waits `abort` ends at once, which torch's HashStore cannot."""

    def __init__(self) -> None:
        super().__init__()
        self._data: dict[str, bytes] = {}
        self._changed = threading.Condition()
        # After `abort`: the keys that existed then, which a wait still finds, and no others: all ranks of a group see alike
        # whether it has met.
        self._final: frozenset[str] | None = None

    def abort(self) -> None:
        """End every wait, now and later, with an error, except for keys that exist already."""
        with self._changed:
            if self._final is None:
                self._final = frozenset(self._data)
            self._changed.notify_all()

    def set(self, key: str, value: bytes | str) -> None:
        with self._changed:
            self._data[key] = value.encode() if isinstance(value, str) else bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._data[key]

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            number = int(self._data.get(key, b"0")) + amount
            self._data[key] = str(number).encode()
            self._changed.notify_all()
            return number

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:  # type: ignore[override]  # torch's stub says str, torch gives bytes
        with self._changed:
            if self._data.get(key, b"") == expected:
                self._data[key] = desired
                self._changed.notify_all()
            return self._data.get(key, expected)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there. A build looks again and again, so that after `abort` a look ends with an error, as a wait does."""
        if self._final is not None and not self._final.issuperset(keys):
            raise dist.DistStoreError(f"looking for {list(keys)[:4]}: another rank failed")
        return self._has(keys)

    def _has(self, keys: Sequence[str]) -> bool:
        return all(key in self._data for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = (self.timeout if timeout is None else timeout).total_seconds()  # type: ignore[attr-defined]  # missing in torch's stub
        with self._changed:
            self._changed.wait_for(lambda: self._final is not None or self._has(keys), limit)
            if self._final is None or all(f"/{CONNECTING}/" in key for key in keys):
                # All ranks of a connecting group have met. If one left now, the others would stay in gloo's wait, which nothing ends.
                there = self._changed.wait_for(lambda: self._has(keys), 0 if self._final is None else min(limit, _CONNECT_SECONDS))
            else:
                there = self._final.issuperset(keys)
            if not there:
                why = f"timed out after {limit:g} s" if self._final is None else "another rank failed"
                raise dist.DistStoreError(f"waiting for {list(keys)[:4]}: {why}")

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        return [self._data[key] for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def delete_key(self, key: str) -> bool:
        with self._changed:
            return self._data.pop(key, None) is not None

    deleteKey = delete_key  # noqa: N815 - what torch's stores call one that is written in Python

    def num_keys(self) -> int:
        return len(self._data)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> ThreadStore:
        # torch asks for a connection of its own; threads share this one.
        return self


class _Rank(threading.Thread):
    """One rank: its thread, its world, and the result of its function."""

    def __init__(self, run: _Run, rank: int) -> None:
        super().__init__(name=f"commgraph-rank-{rank}", daemon=True)
        self.run_ = run
        self.rank = rank
        self.world: World | None = None
        # Waited for instead of the thread: a join that Ctrl-C interrupts marks the thread as ended (CPython before 3.13).
        self.ended = threading.Event()

    def run(self) -> None:
        run = self.run_
        try:
            # A label per node of neighbouring ranks; no label for a single node, which is then discovered as in a real job.
            label = f"node {self.rank * run.nodes // run.world_size}" if run.nodes > 1 else ""
            terms = Terms(timeout=timedelta(seconds=run.timeout), authkey=launch.authkey(os.environ), label=label)
            self.world = World._make(run.store, self.rank, run.world_size, terms)
            with self.world as world:
                try:
                    inject_faults(world, *run.faults, threads=True)
                    run.results[self.rank] = run.fn(world)
                except RankKilled:
                    raise
                except BaseException as error:
                    # Noted before the world is left, which makes the peers fail, too.
                    run.fail(self.rank, error)
                    raise
        except RankKilled:
            run.results[self.rank] = None
        except BaseException as error:
            run.fail(self.rank, error)
        finally:
            self.ended.set()


class _Run:
    """State that the ranks of one call share."""

    def __init__(self, fn: Callable[[World], object], world_size: int, timeout: float, nodes: int, faults: Sequence[Fault]) -> None:
        self.fn = fn
        self.world_size = world_size
        self.timeout = timeout
        self.nodes = nodes
        self.faults = faults
        self.store = ThreadStore()
        self.results: dict[int, object] = {}
        self.failure: tuple[int, BaseException] | None = None
        # The first failure that only follows from what another rank has reported.
        self.followed: tuple[int, BaseException] | None = None
        self.expired = False
        self.threads = [_Rank(self, rank) for rank in range(world_size)]
        self._lock = threading.Lock()

    def fail(self, rank: int, error: BaseException) -> None:
        """Note the first failure, which later ones follow from, and release every rank."""
        with self._lock:
            if self.failure is not None or self.expired:
                return
            if isinstance(error.__cause__, PeerLeftError):
                self.followed = self.followed or (rank, error)
                return
            self.failure = (rank, error)
        self.release()

    def expire(self) -> None:
        """Note that the time ran out, so that later failures do not count, and release every rank."""
        with self._lock:
            self.expired = self.failure is None or isinstance(self.failure[1], CollectiveTimeoutError)
        self.release()

    def release(self) -> None:
        self.store.abort()
        for thread in self.threads:
            if thread.world is not None:
                thread.world._abort()

    def join(self, deadline: float) -> list[_Rank]:
        """Wait for the threads; return those that have not ended."""
        for thread in self.threads:
            if thread.ended.wait(max(deadline - time.monotonic(), 0.0)):
                thread.join()
        return [thread for thread in self.threads if not thread.ended.is_set()]


def spmd(
    fn: Callable[[World], T], world_size: int, *, timeout: timedelta | float = 60, nodes: int = 1, faults: Sequence[Fault] = ()
) -> list[T]:
    """Runs ``fn(world)`` on `world_size` threads of this process, each with a World of its own over real communicators.

    Both ends of every connection are in this process: the soft limit of open files is raised where it is too low for that.

    Args:
        fn: the program of every rank.
        world_size: number of ranks.
        timeout: for the whole run, a timedelta or seconds; also the default deadline of every operation in it.
        nodes: simulated hosts that the ranks are spread over, in runs of neighbours.
        faults: happen to ranks at calls of theirs (`Fault`).

    Returns:
        The results of `fn`, in rank order; None for a rank that a fault has killed.

    Raises:
        ConfigurationError: sizes that cannot be, or more ranks than this process may have open files for.
        BaseException: the first failure of any rank, with a note that says which rank; the others are released and have ended by then.
        CollectiveTimeoutError: the time ran out; the message says where each rank was.
    """
    if world_size < 1 or not 1 <= nodes <= world_size:
        raise ConfigurationError(f"spmd(world_size={world_size}, nodes={nodes}): at least one rank, and a rank for each node")
    _make_room(world_size)
    seconds = seconds_of(timeout)
    run = _Run(fn, world_size, seconds, nodes, tuple(faults))
    deadline = time.monotonic() + seconds
    for thread in run.threads:
        thread.start()
    try:
        late = run.join(deadline)
        where = _stacks(late)
    except BaseException:  # Ctrl-C, a test's own deadline: leave no rank behind
        run.release()
        run.join(time.monotonic() + _UNWIND_SECONDS)
        raise
    stuck: list[_Rank] = []
    if late:
        run.expire()
        stuck = run.join(time.monotonic() + _UNWIND_SECONDS)
    if run.expired:
        ranks = ", ".join(str(thread.rank) for thread in late)
        left = f" Ranks {', '.join(str(thread.rank) for thread in stuck)} could not be ended and go on." if stuck else ""
        raise CollectiveTimeoutError(f"spmd: ranks {ranks} of {world_size} were not done after {seconds:g} s.{left} They were at:\n{where}")
    if (failure := run.failure or run.followed) is not None:
        rank, error = failure
        error.add_note(f"(raised on rank {rank} of {world_size})")
        del run.threads  # the traceback holds this frame: do not let it hold every world too
        raise error
    return [run.results[rank] for rank in range(world_size)]  # type: ignore[misc]  # what fn returned


def _make_room(world_size: int) -> None:
    """Raise the limit of open files if it is too low, or raise: gloo ends the process when it runs out of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    used, one_group = len(os.listdir("/dev/fd")), world_size * (world_size + 8)
    wanted = used + 8 * one_group  # the world's and those of several contexts
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft - used < one_group:
        raise ConfigurationError(
            f"spmd(world_size={world_size}): one group of {world_size} threads needs about {one_group} open files; {used} are open and "
            f"{hard} are allowed (ulimit -Hn)"
        )


def _stacks(threads: Sequence[threading.Thread]) -> str:
    frames = sys._current_frames()
    lines = []
    for thread in threads:
        if thread.ident in frames:
            stack = traceback.format_list(traceback.extract_stack(frames[thread.ident])[-4:])
            lines.append(f"{thread.name}:\n{''.join(stack)}")
    return "\n".join(lines)
