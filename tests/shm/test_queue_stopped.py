"""One side of a message queue is stopped (SIGSTOP): calls of the others end at their deadlines, and nothing is lost once it goes on."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch

import commgraph as cg
from commgraph.shm.message_queue import QueueHandle
from tests.helpers import again_if_late, within

FORK = multiprocessing.get_context("fork")
MiB = 1 << 20
LARGE = torch.arange(32 * MiB, dtype=torch.uint8)
# Seconds that a call waits for what comes.
PATIENCE = 20.0

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
both = pytest.mark.parametrize("n_local", [2, 0], ids=["memory", "sockets"])


@contextlib.contextmanager
def other_side(side: Callable[[Connection], None]) -> Iterator[tuple[Connection, int]]:
    """Run a side in a process of its own."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=side, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield ours, process.pid
    finally:
        process.kill()
        process.join()
        ours.close()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])


def late(call: Callable[..., object], *args: object) -> bool:
    """Make a call with a short deadline; whether it was late."""
    with within(0.25 + 2):
        try:
            call(*args, timeout=0.25)
            return False
        except cg.CollectiveTimeoutError:
            return True


def closes(*sides: cg.MessageQueue) -> None:
    for side in sides:
        with within(0.5 + 2):
            side.close(timeout=0.5)


def lost(call: Callable[..., object], *args: object) -> tuple[int | None, str]:
    """Call until a side is lost; return its number, and the error."""
    try:
        while True:
            call(*args, timeout=PATIENCE)
    except cg.PeerLostError as error:
        return error.rank, str(error)


def writes(is_busy: bool, n_local: int, pipe: Connection) -> None:
    queue = cg.MessageQueue.create(2, n_local_readers=n_local, chunk_bytes=MiB, chunks=1, address="127.0.0.1")
    pipe.send(queue.handle)
    queue.enqueue("ready", timeout=PATIENCE)
    pipe.send("calls")
    if is_busy:
        queue.enqueue(LARGE, timeout=60)
    pipe.recv()
    pipe.send(lost(queue.enqueue, LARGE))


def reads(is_busy: bool, handle: QueueHandle, pipe: Connection) -> None:
    reader = cg.MessageQueue.attach(handle, 0)
    assert reader.dequeue(timeout=PATIENCE) == "ready"
    pipe.send("calls")
    if is_busy:
        assert torch.equal(reader.dequeue(timeout=60), LARGE)
    pipe.recv()
    pipe.send(lost(reader.dequeue))


@both
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in a call"])
@again_if_late
def test_the_writer(n_local: int, is_busy: bool) -> None:
    """Readers are late, whether nothing came or half an object. What the writer goes on to send arrives whole."""
    with other_side(functools.partial(writes, is_busy, n_local)) as (pipe, pid):
        handle = pipe.recv()
        readers = [cg.MessageQueue.attach(handle, number) for number in range(2)]
        assert [reader.dequeue(timeout=PATIENCE) for reader in readers] == ["ready"] * 2
        assert pipe.recv() == "calls"
        stop(pid)
        # The ring holds 1 MiB of the 32; through sockets the whole may have left before.
        came = [not late(reader.dequeue) for reader in readers]
        assert not any(came) or (is_busy and not n_local)
        assert all(late(reader.dequeue) for reader in readers)
        os.kill(pid, signal.SIGCONT)
        if is_busy:
            with ThreadPoolExecutor() as pool:
                rest = [pool.submit(reader.dequeue, 60) for reader, has in zip(readers, came, strict=True) if not has]
            assert all(torch.equal(one.result(), LARGE) for one in rest)
        closes(*readers)
        pipe.send("closed")
        rank, text = pipe.recv()
        assert rank in (0, 1)
        assert "is lost" in text


@both
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in a call"])
@again_if_late
def test_a_reader(n_local: int, is_busy: bool) -> None:
    """The writer is late once the reader's share of the queue is full; so is the other reader; closing keeps its own deadline."""
    queue = cg.MessageQueue.create(2, n_local_readers=n_local, chunk_bytes=MiB, chunks=1, address="127.0.0.1")
    with other_side(functools.partial(reads, is_busy, queue.handle)) as (pipe, pid):
        other = cg.MessageQueue.attach(queue.handle, 1)
        queue.enqueue("ready", timeout=PATIENCE)
        assert other.dequeue(timeout=PATIENCE) == "ready"
        assert pipe.recv() == "calls"
        stop(pid)
        # Through a socket the system's buffers take a part, and one object may wait beside them.
        assert sum(late(queue.enqueue, LARGE) for _ in range(4)) >= (4 if n_local else 2)
        if n_local:
            assert late(other.dequeue)
        closes(queue, other)
        os.kill(pid, signal.SIGCONT)
        if not is_busy:
            pipe.send("closed")
            assert pipe.recv()[0] is None  # the writer
