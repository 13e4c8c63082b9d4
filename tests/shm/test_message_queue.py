"""`MessageQueue` alone: order, lost peers, waiting, memory, and strangers at its sockets."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import secrets
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

import commgraph as cg
from commgraph.shm import native_module, segments
from commgraph.shm.message_queue import QueueHandle
from commgraph.shm.remote import OBJECT, READY, Entrance, Secret
from commgraph.wire import WireError
from tests.helpers import (
    NEW_MOUNTS,
    NEW_PIDS,
    ROOT,
    TooLateError,
    again_if_late,
    bits,
    in_time,
    may_unshare,
    unshare,
    until_it_waits,
    within,
)
from tests.programs.queue_stress import checksum, stress

FORK = multiprocessing.get_context("fork")
MiB = 1 << 20

# From Python 3.12 on a fork beside threads is warned of. What the children here run needs no thread of the parent's.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

needs_memory = pytest.mark.skipif(native_module.why_missing() is not None, reason="no native module: everything goes through sockets")


needs_unshare = pytest.mark.skipif(not may_unshare(), reason="needs root and unshare")

# ------------------------------------------------------------------------------------------------------------------ other processes


class Child:
    """A forked process that runs ``fn(pipe, *args)`` and answers with what came of it."""

    def __init__(self, fn: Callable[..., Any], *args: Any, daemon: bool = True) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_run, args=(fn, theirs, args), daemon=daemon)
        self.process.start()
        theirs.close()

    def receive(self, timeout: float = 20) -> Any:
        assert self.pipe.poll(timeout), "the child said nothing"
        return self.pipe.recv()

    def result(self, timeout: float = 20) -> Any:
        kind, value = self.receive(timeout)
        assert kind == "done", value
        return value

    def kill(self) -> float:
        """SIGKILL, and nobody reaps it; when that was."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        return time.monotonic()


def _run(fn: Callable[..., Any], pipe: Connection, args: tuple[Any, ...]) -> None:
    try:
        pipe.send(("done", fn(pipe, *args)))
    except BaseException as error:
        pipe.send(("raised", error))


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(fn: Callable[..., Any], *args: Any, daemon: bool = True) -> Child:
        started.append(Child(fn, *args, daemon=daemon))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.join()
        one.pipe.close()


@contextlib.contextmanager
def pair(n: int = 1, **options: Any) -> Iterator[tuple[cg.MessageQueue, list[cg.MessageQueue]]]:
    """A writer and its readers, all in this process and ready."""
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(cg.MessageQueue.create(n, **options))
        readers = [stack.enter_context(cg.MessageQueue.attach(queue.handle, i)) for i in range(n)]
        queue.wait_until_ready(20)
        yield queue, readers


def read_all(pipe: Connection, handle: QueueHandle, reader: int, n: int) -> list[Any]:
    with cg.MessageQueue.attach(handle, reader) as queue:
        got = [queue.dequeue(20) for _ in range(n)]
        pipe.send("read")
        pipe.recv()
        return got


def send_all(queue: cg.MessageQueue, objects: list[Any]) -> None:
    for obj in objects:
        queue.enqueue(obj, 20)


def send_on(queue: cg.MessageQueue, obj: Any, timeout: float | None = None) -> None:
    """Until that raises."""
    while True:
        queue.enqueue(obj, timeout)


def later(call: Callable[[], Any], *, seconds: float = 0, raises: type[Exception] | None = None) -> threading.Thread:
    """A thread that calls, and in which that raises nothing but `raises`."""

    def run() -> None:
        time.sleep(seconds)
        with contextlib.nullcontext() if raises is None else pytest.raises(raises):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


LOCAL: dict[str, Any] = {}
REMOTE: dict[str, Any] = {"n_local_readers": 0}
both = pytest.mark.parametrize("options", [LOCAL, REMOTE], ids=["memory", "sockets"])


# --------------------------------------------------------------------------------------------------------------------- what arrives


@both
def test_every_reader_gets_everything_in_order(options: dict[str, Any], child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(3, **options) as queue:
        readers = [child(read_all, queue.handle, i, 500) for i in range(3)]
        queue.wait_until_ready(20)
        for number in range(500):
            queue.enqueue({"number": number, "text": "x" * (number % 50)})
        for reader in readers:
            assert reader.receive() == "read"
            reader.pipe.send("go")
            assert [got["number"] for got in reader.result()] == list(range(500))


def test_readers_may_be_threads_of_the_writer(child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(4, n_local_readers=3) as queue:
        got: dict[int, list[int]] = {}

        def read(reader: int) -> None:
            with cg.MessageQueue.attach(queue.handle, reader) as mine:
                mine.wait_until_ready(timedelta(seconds=20))
                got[reader] = [mine.dequeue(timedelta(seconds=20)) for _ in range(300)]
                done.wait(20)

        done = threading.Barrier(5)
        threads = [threading.Thread(target=read, args=(reader,)) for reader in range(4)]
        for thread in threads:
            thread.start()
        for number in range(300):
            queue.enqueue(number)
        done.wait(20)
        for thread in threads:
            thread.join()
    assert got == {reader: list(range(300)) for reader in range(4)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("commgraph")]


def spawned(handle: QueueHandle, reader: int, pipe: Connection) -> None:
    with cg.MessageQueue.attach(handle, reader) as queue:
        got = queue.dequeue(60)
        pipe.send((repr(queue), got))
        pipe.recv()


def test_a_spawned_process_attaches_and_its_handle_brings_the_authkey_along() -> None:
    """`SimpleNamespace` is no plain data: without the key it would not travel through the socket."""
    context = multiprocessing.get_context("spawn")
    with cg.MessageQueue.create(2, n_local_readers=1, authkey=b"a key that nobody guesses") as queue:
        pipes = [context.Pipe() for _ in range(2)]
        processes = [context.Process(target=spawned, args=(queue.handle, i, pipes[i][1]), daemon=True) for i in range(2)]
        for process in processes:
            process.start()
        queue.enqueue(SimpleNamespace(x=torch.arange(3)), 60)
        for i, (ours, _) in enumerate(pipes):
            assert ours.poll(60)
            text, got = ours.recv()
            assert ("socket" in text) == (i == 1)
            assert got.x.tolist() == [0, 1, 2]
            ours.send("end")
        for process in processes:
            process.join(20)
        assert [process.exitcode for process in processes] == [0, 0]


@both
def test_records_larger_than_the_queue(options: dict[str, Any]) -> None:
    with pair(2, chunk_bytes=1024, chunks=16, **options) as (queue, readers):
        sent = [torch.arange(size, dtype=torch.int16) for size in (0, 1, 1000, 8192, 8193, 500_000)] + [b"x" * 300_000, "y" * 20_000]
        got: list[list[Any]] = [[], []]

        def read(i: int) -> None:
            got[i] = [readers[i].dequeue(20) for _ in sent]

        threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for obj in sent:
            queue.enqueue(obj, 20)
        for thread in threads:
            thread.join()
        for seen in got:
            for a, b in zip(sent, seen, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tensors() -> list[torch.Tensor]:
    base = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    made = [
        base,
        base.t(),
        base[:, ::2],
        base[3:3],
        base[1:40:3, 5:9],
        torch.tensor(7),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.ones(1).expand(5000),
        torch.tensor([True, False] * 3000),
        torch.randn(50, 60, dtype=torch.complex64),
        torch.randn(50, 60, dtype=torch.complex64).conj(),
        torch.randn(9, 9, dtype=torch.complex64)[:, 1].imag,
    ]
    made += [base.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.int8)]
    made += [base[5, :7].to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint32, torch.float64)]
    return made


@both
def test_tensors_of_every_kind_with_their_bits(options: dict[str, Any]) -> None:
    with pair(1, **options) as (queue, (reader,)):
        sent = tensors()
        queue.enqueue({"all": sent, "again": (1, sent[0])})
        got = reader.dequeue(20)
        for a, b in zip([*sent, sent[0]], [*got["all"], got["again"][1]], strict=True):
            assert bits(a) == bits(b)
        for x in sent:
            queue.enqueue(x)
            assert bits(reader.dequeue(20)) == bits(x)


@both
def test_results_are_writable_and_stay_as_they_are(options: dict[str, Any]) -> None:
    numpy = pytest.importorskip("numpy")
    with pair(1, chunk_bytes=1024, chunks=64, **options) as (queue, (reader,)):
        queue.enqueue([torch.arange(2000), torch.arange(3)])
        kept = reader.dequeue(20)
        for x in kept:
            x.mul_(2)
        for number in range(1000):
            queue.enqueue([torch.full((2000,), number), number])
            got = reader.dequeue(20)
            got[0].add_(1)
        assert kept[0].tolist() == list(range(0, 4000, 2))
        assert kept[1].tolist() == [0, 2, 4]
        if options is LOCAL:
            array = numpy.arange(2000)
            queue.enqueue(array)
            got = reader.dequeue(20)
            got += 1
            assert got.tolist() == list(range(1, 2001))


def test_the_queue_keeps_nothing_of_an_object_that_was_sent() -> None:
    with pair() as (queue, (reader,)):
        memory = bytearray(10_000)
        queue.enqueue(pickle.PickleBuffer(memory))
        assert bytes(reader.dequeue(20)) == bytes(10_000)
        memory.extend(b"x")  # a BufferError, if anything still looked at it


# -------------------------------------------------------------------------------------------------------------- deadlines, pressure


@both
def test_a_full_queue_makes_the_writer_wait_and_a_deadline_sends_nothing(options: dict[str, Any]) -> None:
    with pair(2, chunk_bytes=1024, chunks=32, **options) as (queue, readers):
        sent, said = 0, ""
        while not said:
            try:
                queue.enqueue((sent, "x" * 5000), 0.05)
                sent += 1
            except TimeoutError as error:
                said = f"{type(error).__name__}: {error}"
        assert re.fullmatch(r"CollectiveTimeoutError: enqueue on.*reader \d has not made room within 0.05 s.*Nothing was sent.*", said)
        assert sent > 5
        # The refused number is sent again: each reader sees it once.
        with pytest.raises(cg.CollectiveTimeoutError):
            queue.enqueue((sent, "x" * 5000), 0)
        assert [readers[0].dequeue(20)[0] for _ in range(sent)] == list(range(sent))
        with pytest.raises(cg.CollectiveTimeoutError, match="reader 1"):
            queue.enqueue((sent, "x" * 5000), 0.05)
        thread = later(lambda: queue.enqueue((sent, "last"), 20))
        assert [readers[1].dequeue(20)[0] for _ in range(sent)] == list(range(sent))
        thread.join()
        for reader in readers:
            assert reader.dequeue(20) == (sent, "last")
            with pytest.raises(cg.CollectiveTimeoutError):
                reader.dequeue(0)


@both
@again_if_late
def test_a_dequeue_that_was_late_loses_nothing(options: dict[str, Any]) -> None:
    with pair(1, **options) as (queue, (reader,)):
        with within(2):
            for _ in range(3):
                with pytest.raises(cg.CollectiveTimeoutError, match=r"nothing came from the writer within 0.05 s. Nothing is lost"):
                    reader.dequeue(0.05)
        queue.enqueue("here")
        assert reader.dequeue(20) == "here"
        with pytest.raises(cg.CollectiveTimeoutError):
            reader.dequeue(0)


@needs_memory
def test_a_record_larger_than_the_ring_that_its_writer_gave_up_is_forgotten() -> None:
    with pair(2, chunk_bytes=1024, chunks=32) as (queue, readers):
        large = torch.arange(20_000)
        queue.enqueue("before")
        assert readers[0].dequeue(20) == "before"
        # Reader 1 has not read: the ring is full before the record ends, and reader 0 has half of it.
        late = later(lambda: queue.enqueue(large, 0.5), raises=cg.CollectiveTimeoutError)
        with pytest.raises(cg.CollectiveTimeoutError):
            readers[0].dequeue(0.1)
        with pytest.raises(cg.CollectiveTimeoutError):
            readers[0].dequeue(0.1)
        late.join()
        with pytest.raises(cg.CollectiveTimeoutError):
            readers[0].dequeue(0.05)
        # And a reader that comes to it later sees nothing of it either.
        assert readers[1].dequeue(20) == "before"
        with pytest.raises(cg.CollectiveTimeoutError):
            readers[1].dequeue(0.05)
        writer = later(functools.partial(send_all, queue, ["after", large + 1]))
        second: list[Any] = []
        other = later(lambda: second.extend(readers[1].dequeue(20) for _ in range(2)))
        first = [readers[0].dequeue(20) for _ in range(2)]
        writer.join()
        other.join()
        for got in (first, second):
            assert got[0] == "after"
            assert torch.equal(got[1], large + 1)


@needs_memory
def test_a_reader_that_was_late_in_the_middle_of_a_record_reads_on() -> None:
    with pair(2, chunk_bytes=1024, chunks=32) as (queue, readers):
        large = torch.arange(20_000)
        writer = later(lambda: queue.enqueue(large, 20))
        for _ in range(3):
            with pytest.raises(cg.CollectiveTimeoutError):
                readers[0].dequeue(0.05)  # as long as reader 1 reads nothing
        second: list[Any] = []
        other = later(lambda: second.append(readers[1].dequeue(20)))
        first = readers[0].dequeue(20)
        other.join()
        writer.join()
        assert torch.equal(first, large)
        assert torch.equal(second[0], large)


def slow_reader(pipe: Connection, handle: QueueHandle, reader: int) -> list[int]:
    """Begins when it is told to, pauses now and then, and ends at None."""
    with cg.MessageQueue.attach(handle, reader) as queue:
        got: list[int] = []
        pipe.recv()
        while (found := queue.dequeue(20)) is not None:
            if found[0] % 20 == 0:
                time.sleep(0.02)
            assert len(found[1]) == SLOW_BYTES
            got.append(found[0])
        pipe.recv()
        return got


SLOW_BYTES = 60_000


def test_a_slow_reader_behind_a_socket_loses_nothing_and_holds_the_writer_up(child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(2, n_local_readers=1, chunk_bytes=1024, chunks=64) as queue:
        slow = child(slow_reader, queue.handle, 1)
        with cg.MessageQueue.attach(queue.handle, 0) as quick:
            queue.wait_until_ready(20)
            got: list[int] = []
            thread = later(lambda: got.extend(found[0] for found in iter(functools.partial(quick.dequeue, 20), None)))
            number, last = 0, -1
            while number != last:
                try:
                    queue.enqueue((number, bytes(SLOW_BYTES)), 0.2)
                    number += 1
                except cg.CollectiveTimeoutError as error:
                    # The kernel's buffers are full, and so is the backlog: now it may begin. Nobody got this number, so it is sent again.
                    if last < 0:
                        assert "reader 1" in str(error)  # noqa: PT017 - this is how the test knows
                        last = number + 100
                        slow.pipe.send("begin")
            queue.enqueue(None)
            thread.join()
            slow.pipe.send("end")
            assert slow.result() == got == list(range(last))


def impatient(pipe: Connection, handle: QueueHandle, reader: int, seed: int, n: int) -> int:
    source, late = random.Random(seed + reader), 0
    with cg.MessageQueue.attach(handle, reader) as queue:
        for number in range(n):
            found = None
            while found is None:
                try:
                    found = queue.dequeue(source.choice(PATIENCE))
                except cg.CollectiveTimeoutError:
                    late += 1
            assert found[0] == number
            assert checksum(found[1]) == found[2]
            if source.random() < 0.05:
                time.sleep(source.random() * 0.004)
        pipe.send("read")
        pipe.recv()
        return late


PATIENCE = (0, 0.0001, 0.001, 0.01, None)


@pytest.mark.parametrize(("seed", "n_local"), [(0, 3), (1, 1), (2, 2)])
def test_deadlines_of_every_length_on_both_sides_keep_the_place(seed: int, n_local: int, child: Callable[..., Child]) -> None:
    """Objects from nothing to many times the queue, each tried until it has gone through; no reader misses one or sees one twice."""
    source, late, n = random.Random(seed), 0, 200
    with cg.MessageQueue.create(3, n_local_readers=n_local, chunk_bytes=1024, chunks=16) as queue:
        readers = [child(impatient, queue.handle, i, seed, n) for i in range(3)]
        queue.wait_until_ready(20)
        for number in range(n):
            data = source.randbytes(source.choice((0, 10, 100, 3000, 5000, 50_000, 200_000)))
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) > 3000 and source.random() < 0.7 else data
            sent = False
            while not sent:
                try:
                    queue.enqueue((number, payload, zlib.crc32(data)), source.choice(PATIENCE))
                    sent = True
                except cg.CollectiveTimeoutError:
                    late += 1
        assert [reader.receive() for reader in readers] == ["read"] * 3
        for reader in readers:
            reader.pipe.send("end")
        assert late
        assert sum(reader.result() for reader in readers)


def test_what_was_sent_before_the_writer_closed_arrives(child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(2, n_local_readers=1) as queue:
        slow = child(slow_reader, queue.handle, 1)
        quick = cg.MessageQueue.attach(queue.handle, 0)
        for number in range(20):
            queue.enqueue((number, bytes(SLOW_BYTES)))
        queue.enqueue(None)
        slow.pipe.send("begin")
        queue.close()
        slow.pipe.send("end")
        assert slow.result() == list(range(20))
        assert [quick.dequeue(20)[0] for _ in range(20)] == list(range(20))
        assert quick.dequeue(20) is None
        with pytest.raises(cg.PeerLostError, match="the writer is lost: it closed the queue") as caught:
            quick.dequeue()
        assert caught.value.rank is None
        quick.close()


# -------------------------------------------------------------------------------------------------------------------------- closing


@both
@again_if_late
def test_closing_wakes_readers_and_writer_at_once(options: dict[str, Any]) -> None:
    with pair(1, **options) as (_, (reader,)):
        thread = later(reader.close, seconds=0.2)
        with within(0.7), pytest.raises(cg.ContextClosedError, match="dequeue on message queue"):
            reader.dequeue()
        thread.join()
    with pair(1, chunk_bytes=1024, chunks=4, **options) as (queue, (reader,)):
        with pytest.raises(cg.CollectiveTimeoutError):
            send_on(queue, bytes(100_000), 0.1)
        thread = later(lambda: queue.close(0), seconds=0.2)
        with within(0.7), pytest.raises(cg.ContextClosedError, match="enqueue on message queue"):
            send_on(queue, bytes(100_000))  # the kernel may take some more
        thread.join()
        assert queue.closed
        with pytest.raises(cg.ContextClosedError):
            queue.enqueue(1)
        with pytest.raises(cg.ContextClosedError):
            queue.wait_until_ready(1)
        reader.close()
        for call in (reader.dequeue, reader.wait_until_ready):
            with pytest.raises(cg.ContextClosedError):
                call(1)
        queue.close()
        reader.close()


@both
@again_if_late
def test_closing_a_side_ends_the_waits_of_the_others(options: dict[str, Any]) -> None:
    with pair(2, **options) as (queue, readers):
        thread = later(readers[1].close, seconds=0.2)
        with within(1.2):
            with pytest.raises(cg.PeerLostError, match="reader 1 is lost") as caught:
                readers[0].dequeue()
            assert caught.value.rank == 1
            with pytest.raises(cg.PeerLostError, match="reader 1 is lost") as caught:
                send_on(queue, 1)
            assert caught.value.rank == 1
        thread.join()
    with pair(2, **options) as (queue, readers):
        thread = later(queue.close, seconds=0.2)
        with within(1.2):
            for reader in readers:
                with pytest.raises(cg.PeerLostError, match="the writer is lost: it closed") as caught:
                    reader.dequeue()
                assert caught.value.rank is None
                assert caught.value.operation == "dequeue"
        thread.join()


@again_if_late
def test_closing_ends_the_wait_for_readers() -> None:
    queue = cg.MessageQueue.create(2, n_local_readers=1)
    reader = cg.MessageQueue.attach(queue.handle, 0)
    thread = later(queue.close, seconds=0.2)
    with within(0.7):
        with pytest.raises(cg.ContextClosedError):
            queue.enqueue(1)
        with pytest.raises(cg.PeerLostError):
            reader.dequeue()
    thread.join()
    reader.close()


def test_a_signal_handler_may_close() -> None:
    with pair(1, chunk_bytes=1024, chunks=4) as (_, (reader,)):
        before = signal.signal(signal.SIGALRM, lambda *_: reader.close())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(cg.ContextClosedError):
                reader.dequeue()
            signal.signal(signal.SIGALRM, lambda *_: pytest.fail("interrupted"))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(pytest.fail.Exception, match="interrupted"), contextlib.suppress(cg.PeerLostError):
                time.sleep(5)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_a_queue_that_is_dropped_warns_and_the_others_learn_of_it() -> None:
    queue = cg.MessageQueue.create(2, n_local_readers=1)
    readers = [cg.MessageQueue.attach(queue.handle, i) for i in range(2)]
    queue.wait_until_ready(20)
    queue.enqueue(1)
    dropped = [queue]
    del queue
    with pytest.warns(ResourceWarning, match="never closed: use `with`, or close"):
        dropped.clear()
    for reader in readers:
        assert reader.dequeue(20) == 1
        with pytest.raises(cg.PeerLostError):
            reader.dequeue(20)
        reader.close()


def forked(pipe: Connection, queue: cg.MessageQueue, readers: list[cg.MessageQueue]) -> str:
    queue.close()
    for reader in readers:
        reader.close()
    return "closed"


def test_a_fork_takes_nothing_with_it(child: Callable[..., Child]) -> None:
    with pair(2, n_local_readers=1) as (queue, readers):
        queue.enqueue(1)
        copies = [child(forked, queue, readers), child(lambda pipe: "ended")]
        assert [copy.result() for copy in copies] == ["closed", "ended"]
        for one in copies:
            one.process.join(20)
        time.sleep(0.3)
        queue.enqueue(2)
        assert [[reader.dequeue(20) for _ in range(2)] for reader in readers] == [[1, 2]] * 2


def test_cycles_leave_nothing_behind() -> None:
    def cycle() -> None:
        with pair(3, n_local_readers=2) as (queue, readers):
            queue.enqueue(torch.zeros(3000))
            for reader in readers:
                reader.dequeue(20)

    cycle()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    maps = Path("/proc/self/maps").read_text().count("commgraph")
    for _ in range(20):
        cycle()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert Path("/proc/self/maps").read_text().count("commgraph") <= maps


# --------------------------------------------------------------------------------------------------------------------- who is lost


def write_on(pipe: Connection, n_readers: int, n_local: int) -> Any:
    with cg.MessageQueue.create(n_readers, n_local_readers=n_local) as queue:
        pipe.send(queue.handle)
        try:
            number = 0
            while True:
                queue.enqueue(number)
                number += 1
                time.sleep(0.01)
        except cg.PeerLostError as error:
            return error.rank, time.monotonic(), str(error)


def read_on(pipe: Connection, handle: QueueHandle, reader: int) -> Any:
    with cg.MessageQueue.attach(handle, reader) as queue:
        queue.wait_until_ready(20)
        pipe.send("ready")
        try:
            while True:
                queue.dequeue()
        except cg.PeerLostError as error:
            return error.rank, time.monotonic(), str(error)


@needs_memory
@pytest.mark.parametrize("victim", ["writer", 0, 2])
@again_if_late
def test_a_killed_participant_is_lost_to_all_others(victim: str | int, child: Callable[..., Child]) -> None:
    """A dead peer does not block the queue: all others raise within 2 s, also while nobody has reaped it."""
    shm = in_dev_shm()
    writer = child(write_on, 3, 2)
    handle = writer.receive()
    readers = [child(read_on, handle, i) for i in range(3)]
    for reader in readers:
        assert reader.receive() == "ready"
    time.sleep(0.2)
    dead = writer if victim == "writer" else readers[int(victim)]
    killed = dead.kill()
    for one in [writer, *readers]:
        if one is not dead:
            rank, at, message = one.result(10)
            assert rank == (None if victim == "writer" else victim), message
            in_time(at - killed, 2, message)
    # Nothing has a name that could be left behind.
    assert in_dev_shm() == shm


def in_dev_shm() -> list[str]:
    """What has a name there, but semaphores: in tests beside this one multiprocessing makes locks, which have a name for a moment."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem."))


def stay(pipe: Connection, handle: QueueHandle) -> None:
    with cg.MessageQueue.attach(handle, 0):
        pipe.send("there")
        time.sleep(60)


@needs_memory
@again_if_late
def test_a_killed_reader_ends_the_wait_of_a_blocked_writer(child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(1, chunk_bytes=1024, chunks=4) as queue:
        reader = child(stay, queue.handle)
        queue.wait_until_ready(20)
        assert reader.receive() == "there"
        thread = later(reader.kill, seconds=0.3)
        with within(0.3 + 2), pytest.raises(cg.PeerLostError, match="reader 0 is lost: its process died") as caught:
            send_on(queue, bytes(2000))
        assert caught.value.rank == 0
        thread.join()
        with pytest.raises(cg.PeerLostError):
            queue.enqueue(1)


@needs_memory
@again_if_late
def test_a_reader_that_dies_before_the_others_came(child: Callable[..., Child]) -> None:
    with cg.MessageQueue.create(2) as queue:
        reader = child(stay, queue.handle)
        assert reader.receive() == "there"
        reader.kill()
        with within(2), pytest.raises(cg.PeerLostError, match="reader 0 is lost"):
            queue.wait_until_ready(10)


@needs_memory
def test_killed_in_the_middle_of_it_nothing_is_left(child: Callable[..., Child]) -> None:
    """No segment leaks into /dev/shm: there is no name, and the last process that maps it takes it along."""
    shm = in_dev_shm()
    for _ in range(10):
        writer = child(write_on, 1, 1)
        reader = child(read_on, writer.receive(), 0)
        reader.receive()
        for one in (writer, reader):
            one.kill()
    assert in_dev_shm() == shm


# ---------------------------------------------------------------------------------------------------------------------- stress, cost


@needs_memory
def test_checksummed_messages_to_four_readers() -> None:
    """No flag is visible before its data. `nox -s stress` does this with ten million messages."""
    assert stress(20_000) > 0


def test_checksummed_messages_through_sockets_too() -> None:
    assert stress(2_000, readers=3, n_local_readers=1, seed=1) > 0


def idle(pipe: Connection, handle: QueueHandle, reader: int) -> tuple[float, float]:
    with cg.MessageQueue.attach(handle, reader) as queue:
        queue.wait_until_ready(20)
        pipe.send("ready")
        costs = []
        for n in (1, 100):
            cpu, wall = time.process_time(), time.monotonic()
            for _ in range(n):
                queue.dequeue(20)
            costs.append((time.process_time() - cpu) / (time.monotonic() - wall))
        pipe.recv()
        return costs[0], costs[1]


@both
@again_if_late
def test_waiting_costs_next_to_nothing(options: dict[str, Any], child: Callable[..., Child]) -> None:
    """Idle and decoding workers spin on no core: under 1 % of one, and under 10 % at 100 messages a second."""
    with cg.MessageQueue.create(2, **options) as queue:
        readers = [child(idle, queue.handle, i) for i in range(2)]
        queue.wait_until_ready(20)
        for reader in readers:
            assert reader.receive() == "ready"
        time.sleep(1.2)
        for number in range(101):
            queue.enqueue({"step": number})
            time.sleep(0.01)
        for reader in readers:
            reader.pipe.send("end")
            waiting, decoding = reader.result()
            if waiting >= 0.01 or decoding >= 0.1:
                raise TooLateError(f"of a core: {waiting} idle, {decoding} at 100 messages a second")


# --------------------------------------------------------------------------------------------------------------- other namespaces


def read_elsewhere(pipe: Connection, namespaces: tuple[Any, ...], handle: QueueHandle, reader: int) -> Any:
    unshare(*namespaces)
    with cg.MessageQueue.attach(handle, reader) as queue:
        total = sum(int(queue.dequeue(20).sum()) for _ in range(20))
        pipe.send((repr(queue), total))
        try:
            queue.dequeue(20)
        except cg.PeerLostError as error:
            return error.rank


@needs_memory
@needs_unshare
def test_a_reader_in_another_pid_namespace_goes_through_a_socket(child: Callable[..., Child]) -> None:
    both_kinds = NEW_PIDS | NEW_MOUNTS, "mount -t proc none /proc"
    places = {both_kinds: "another pid namespace", (NEW_PIDS,): "another pid namespace", (NEW_MOUNTS,): "through memory"}
    with cg.MessageQueue.create(4) as queue:
        readers = [child(read_elsewhere, place, queue.handle, i) for i, place in enumerate(places)]
        with cg.MessageQueue.attach(queue.handle, 3) as mine:
            queue.wait_until_ready(60)
            for number in range(20):
                queue.enqueue(torch.full((5000,), number))
            assert sum(int(mine.dequeue(20).sum()) for _ in range(20)) == 190 * 5000
            for reader, way in zip(readers, places.values(), strict=True):
                text, total = reader.receive()
                assert way in text
                assert total == 190 * 5000
            readers[2].kill()
            assert [reader.result() for reader in readers[:2]] == [2, 2]
            with pytest.raises(cg.PeerLostError, match="reader 2 is lost"):
                mine.dequeue(20)


def stress_elsewhere(pipe: Connection) -> float:
    unshare(NEW_MOUNTS, "mount -t tmpfs -o size=1m none /dev/shm")
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == MiB
    return stress(1000, readers=2, chunks=8192)


@needs_memory
@needs_unshare
def test_a_small_dev_shm_does_not_matter(child: Callable[..., Child]) -> None:
    """No SIGBUS under load: memory is not bound by the size of /dev/shm, and reserved when it is made."""
    # Only a process that is no daemon may start others.
    assert child(stress_elsewhere, daemon=False).result(60) > 0


def too_large(pipe: Connection) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB))
    with pytest.raises(cg.BuildError) as caught:
        cg.MessageQueue.create(1, chunk_bytes=MiB, chunks=8)
    return str(caught.value)


@needs_memory
def test_memory_that_is_not_there_is_an_error_with_the_size(child: Callable[..., Child]) -> None:
    assert re.search(r"\d{7} bytes of shared memory are needed.*smaller or fewer chunks", child(too_large).result())


@needs_memory
def test_a_writer_that_can_make_no_memory_at_all_goes_through_sockets(monkeypatch: pytest.MonkeyPatch, child: Callable[..., Child]) -> None:
    """As where a seccomp filter refuses memfds. A reader that cannot open the writer's memory, without /proc say, does so, too."""

    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, "refused")

    with monkeypatch.context() as without:
        without.setattr(os, "memfd_create", refused)
        with pytest.warns(RuntimeWarning, match=r"no shared memory \(.*refused\).*go through sockets"):
            queue = cg.MessageQueue.create(1)
    with queue:
        elsewhere = child(read_all, queue.handle, 0, 2)
        send_all(queue, ["one", {"two": 2}])
        assert elsewhere.receive() == "read"
        elsewhere.pipe.send("go on")
        assert elsewhere.result() == ["one", {"two": 2}]
    with cg.MessageQueue.create(1) as queue:
        monkeypatch.setattr(segments, "open_peer", refused)
        with cg.MessageQueue.attach(queue.handle, 0) as reader:
            queue.enqueue("three", 20)
            assert reader.dequeue(20) == "three"
            assert "through a socket (its memory cannot be opened" in repr(reader)


def test_without_the_native_module_everything_goes_through_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "why_missing", lambda: "ImportError: no compiler")
    with pytest.warns(RuntimeWarning, match="message queues go through sockets"):
        queue = cg.MessageQueue.create(1)
    with queue, cg.MessageQueue.attach(queue.handle, 0) as reader:
        queue.enqueue(torch.arange(3))
        assert reader.dequeue(20).tolist() == [0, 1, 2]
        assert "through a socket (the writer shares no memory)" in repr(reader)
    queue = cg.MessageQueue.create(2, n_local_readers=0)  # nobody asked for memory: no warning
    queue.close()


# --------------------------------------------------------------------------------------------------------------- sockets and strangers


def test_without_an_authkey_only_plain_data_goes_through_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMGRAPH_AUTHKEY", raising=False)
    with pair(2, n_local_readers=1) as (queue, readers):
        for obj in (SimpleNamespace(), [1, {"a": Path("x")}], lambda: None):
            with pytest.raises(TypeError, match=r"enqueue on message queue.*(only plain data|local object).*Nothing was sent"):
                queue.enqueue(obj)
        plain = {"a": [1, (2.5, None), {"x"}, b"y"], "t": torch.ones(2, dtype=torch.bfloat16)}
        queue.enqueue(plain)
        for reader in readers:
            got = reader.dequeue(20)
            assert got["a"] == plain["a"]
            assert got["t"].dtype is torch.bfloat16


def test_with_an_authkey_any_object_goes_through_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMGRAPH_AUTHKEY", "from the environment")
    with pair(2, n_local_readers=1) as (queue, readers):
        assert queue.handle.signed
        queue.enqueue([SimpleNamespace(a=1), torch.ones(3000)])
        for reader in readers:
            assert reader.dequeue(20)[0].a == 1


def test_the_authkey_is_not_in_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMGRAPH_AUTHKEY", raising=False)
    key = b"a key that must not leak"
    with cg.MessageQueue.create(2, n_local_readers=0, authkey=key) as queue:
        pickled = pickle.dumps(queue.handle)
        assert key not in pickled
        assert b"must not leak" not in repr(queue.handle).encode()
        assert queue.handle.secret.hex() not in repr(queue.handle)
        handle = pickle.loads(pickled)
        with pytest.raises(cg.ConfigurationError, match="the writer has an authkey"):
            cg.MessageQueue.attach(handle, 0)
        # A wrong one is found out, and holds nobody up.
        with cg.MessageQueue.attach(handle, 0, authkey=b"another") as stranger:
            with pytest.raises(cg.CollectiveTimeoutError, match=r"readers 0, 1 of 2 did not attach within 0.1 s; 1 connection was refused"):
                queue.wait_until_ready(0.1)
            with pytest.raises(cg.PeerLostError, match="its authkey differs"):
                stranger.dequeue(5)
        with cg.MessageQueue.attach(handle, 0, authkey=key) as a, cg.MessageQueue.attach(handle, 1, authkey=key) as b:
            queue.enqueue(SimpleNamespace(x=1))
            assert (a.dequeue(20).x, b.dequeue(20).x) == (1, 1)


@again_if_late
def test_strangers_neither_disturb_nor_block() -> None:
    with cg.MessageQueue.create(2, n_local_readers=0) as queue:
        handle = queue.handle
        hello = struct.pack(">8s16sI16s32s", b"cgqueue1", handle.queue, 0, bytes(16), bytes(32))
        noise = (b"", b"GET / HTTP/1.1\r\n\r\n" * 10, secrets.token_bytes(200), bytes(76), b"cgqueue1" + bytes(60))
        strangers = []
        for words in (*noise, hello, hello[:40]):
            strangers.append(socket.create_connection(handle.address))
            strangers[-1].sendall(words)
        strangers[-1].close()
        gone = socket.create_connection(handle.address)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        with within(3):
            with pytest.raises(cg.CollectiveTimeoutError):
                queue.wait_until_ready(0.2)
            readers = [cg.MessageQueue.attach(handle, i) for i in range(2)]
            queue.wait_until_ready(20)
        queue.enqueue("fine")
        assert [reader.dequeue(20) for reader in readers] == ["fine"] * 2
        # The port was bound when it was announced, and nobody listens there any longer than needed.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(handle.address).close()
        for stranger in strangers:
            stranger.close()
        for reader in readers:
            reader.close()


def test_a_reader_attaches_once() -> None:
    with cg.MessageQueue.create(3, n_local_readers=1) as queue:
        readers = [cg.MessageQueue.attach(queue.handle, i) for i in (1, 2)]
        again = cg.MessageQueue.attach(queue.handle, 1)
        with pytest.raises(cg.CollectiveTimeoutError, match=r"reader 0 of 3 did not attach"):
            queue.wait_until_ready(0.2)
        with pytest.raises(cg.PeerLostError, match="has attached already"):
            again.dequeue(5)
        readers.append(cg.MessageQueue.attach(queue.handle, 0))
        if native_module.why_missing() is None:
            with pytest.raises(ValueError, match=r"reader 0 of 3.*has attached already"):
                cg.MessageQueue.attach(queue.handle, 0)
        queue.enqueue(1)
        assert [reader.dequeue(20) for reader in readers] == [1, 1, 1]
        with pytest.raises(cg.PeerLostError, match="cannot be reached"):
            cg.MessageQueue.attach(queue.handle, 2)
        for reader in [*readers, again]:
            reader.close()


def test_a_reader_behind_a_socket_that_goes_before_it_is_ready() -> None:
    with cg.MessageQueue.create(2, n_local_readers=0) as queue:
        cg.MessageQueue.attach(queue.handle, 1).close()
        with pytest.raises((cg.PeerLostError, cg.CollectiveTimeoutError)):
            queue.wait_until_ready(2)


class FalseWriter:
    """Lets a reader in and then says what a test wants."""

    def __init__(self, queue: cg.MessageQueue, authkey: bytes | None) -> None:
        self.secret = Secret(queue.handle.queue, queue.handle.secret, authkey)
        self.entrance = Entrance(self.secret, ("127.0.0.1", 0), backlog=1, admit=lambda reader: True)
        self.reader = cg.MessageQueue.attach(attrs.evolve(queue.handle, address=self.entrance.address, authkey=authkey), 0)
        came: list[tuple[int, socket.socket]] = []
        while not came:
            came = self.entrance.step(5)
        self.connection = came[0][1]
        self.say(READY, 0, None)
        self.reader.wait_until_ready(5)

    def say(self, kind: int, number: int, obj: Any, *, secret: Secret | None = None) -> None:
        (body,) = (secret or self.secret).encode(kind, number, obj)
        self.connection.sendall(struct.pack(">BQ", kind, len(body)) + body)

    def close(self) -> None:
        self.connection.close()
        self.entrance.close()
        self.reader.close()


@pytest.mark.parametrize("attack", ["replayed", "another key", "plain", "another kind", "too large", "noise", "cut"])
def test_a_frame_that_is_not_the_writers_is_not_unpickled(attack: str) -> None:
    """Pickle over TCP would be remote code execution: nothing is unpickled before its HMAC is right, in its place in the stream."""
    with cg.MessageQueue.create(1, n_local_readers=0, authkey=b"right") as queue:
        writer = FalseWriter(queue, b"right")
        writer.say(OBJECT, 1, "first")
        assert writer.reader.dequeue(5) == "first"
        if attack == "replayed":
            writer.say(OBJECT, 1, "first")
        elif attack == "another key":
            writer.say(OBJECT, 2, Path("x"), secret=Secret(queue.handle.queue, queue.handle.secret, b"wrong"))
        elif attack == "plain":
            writer.say(OBJECT, 2, "x", secret=Secret(queue.handle.queue, queue.handle.secret, None))
        elif attack == "another kind":
            (body,) = writer.secret.encode(READY, 2, "x")
            writer.connection.sendall(struct.pack(">BQ", OBJECT, len(body)) + body)
        elif attack == "too large":
            writer.connection.sendall(struct.pack(">BQ", OBJECT, 1 << 60))
        elif attack == "noise":
            writer.connection.sendall(secrets.token_bytes(1000))
        else:
            writer.connection.sendall(struct.pack(">BQ", OBJECT, 1000) + bytes(10))
            writer.connection.close()
        for _ in range(2):  # and again, in the same words
            with pytest.raises((WireError, cg.PeerLostError), match="dequeue on message queue"):
                writer.reader.dequeue(5)
        writer.close()


def test_with_an_authkey_large_contents_follow_a_signed_frame() -> None:
    """What the writer changes after `enqueue` has returned reaches no reader."""
    with pair(2, n_local_readers=0, authkey=b"key") as (queue, readers):
        x, raw = torch.arange(300_000.0), bytearray(b"a" * 100_000)
        queue.enqueue({"x": x, "columns": x.view(3, -1).t(), "raw": raw, "text": "é" * 70_000, "bytes": bytes(200_000), "own": Path("x")})
        wanted = x.clone()
        x.zero_()
        raw[:] = b"b" * 100_000
        queue.enqueue("after")
        for reader in readers:
            got = reader.dequeue(20)
            assert torch.equal(got["x"], wanted)
            assert torch.equal(got["columns"], wanted.view(3, -1).t())
            assert got["raw"] == b"a" * 100_000
            assert (got["text"], got["bytes"], got["own"]) == ("é" * 70_000, bytes(200_000), Path("x"))
            assert reader.dequeue(20) == "after"


def test_a_deadline_in_the_midst_of_what_follows_a_frame_loses_nothing() -> None:
    with cg.MessageQueue.create(1, n_local_readers=0, authkey=b"right") as queue:
        writer, x = FalseWriter(queue, b"right"), torch.arange(50_000.0)
        body, *beside = writer.secret.encode(OBJECT, 1, [x, bytes(70_000)])
        assert len(beside) == 2
        stream = b"".join([struct.pack(">BQ", OBJECT, len(body)), body, *beside])
        for begin, end in itertools.pairwise([0, 5, 100, 60_000, len(stream) - 1, len(stream)]):
            with pytest.raises(cg.CollectiveTimeoutError, match="call again"):
                writer.reader.dequeue(0.02)
            writer.connection.sendall(stream[begin:end])
        got = writer.reader.dequeue(20)
        assert torch.equal(got[0], x)
        assert got[1] == bytes(70_000)
        writer.close()


def test_an_object_that_cannot_be_unpickled_is_used_up_and_the_queue_goes_on() -> None:
    for options in (LOCAL, {"n_local_readers": 0, "authkey": b"key"}):
        with pair(1, **options) as (queue, (reader,)):
            queue.enqueue(Poison())
            queue.enqueue("next")
            with pytest.raises(ZeroDivisionError) as caught:
                reader.dequeue(20)
            assert any("could not be unpickled here" in note for note in caught.value.__notes__)
            assert reader.dequeue(20) == "next"


class Poison:
    def __reduce__(self) -> tuple[Any, ...]:
        return divmod, (1, 0)


# ------------------------------------------------------------------------------------------------------------------ what is refused


def test_unpicklable_objects_are_refused_before_anything_is_sent() -> None:
    with pair(2) as (queue, readers):
        for obj in (lambda: None, threading.Lock(), [1, {"x": threading.Lock()}], (i for i in range(3))):
            with pytest.raises(TypeError, match=r"enqueue on message queue .*: .*pickle.*\. Nothing was sent\."):
                queue.enqueue(obj)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(ValueError, match="nested too deep"):
            queue.enqueue(deep)
        while deep:  # or freeing it would go as deep
            deep = deep.pop()
        queue.enqueue("fine")
        assert [reader.dequeue(20) for reader in readers] == ["fine"] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_readers": 0}, ValueError, "n_readers=0"),
        ({"n_readers": True}, ValueError, "n_readers=True"),
        ({"n_readers": "2"}, TypeError, "n_readers='2' is a str"),
        ({"n_readers": 2.0}, TypeError, "n_readers=2.0 is a float"),
        ({"n_readers": 2, "n_local_readers": 3}, ValueError, "n_local_readers=3; 0 to 2"),
        ({"n_readers": 2, "n_local_readers": -1}, ValueError, "n_local_readers=-1"),
        ({"n_readers": 2, "chunk_bytes": 0}, ValueError, "chunk_bytes=0"),
        ({"n_readers": 2, "chunks": -1}, ValueError, "chunks=-1"),
        ({"n_readers": 2, "chunks": 1 << 60}, ValueError, "chunks="),
        ({"n_readers": 2, "authkey": "text"}, TypeError, "authkey is a str"),
        ({"n_readers": 2, "authkey": b""}, ValueError, "authkey is empty"),
        ({"n_readers": 2, "address": 7}, TypeError, "address=7"),
        ({"n_readers": 2, "address": "0.0.0.0"}, ValueError, "every address of this host"),
        ({"n_readers": 2, "address": "[::]:80"}, ValueError, "every address of this host"),
        ({"n_readers": 2, "address": "node0:x"}, ValueError, "address='node0:x'"),
        ({"n_readers": 2, "address": ("node0", 70000)}, ValueError, "address="),
    ],
)
def test_bad_arguments_of_create(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        cg.MessageQueue.create(**arguments)


def test_bad_arguments_of_the_rest() -> None:
    with pair() as (queue, (reader,)):
        for number in (1, -1, True):
            with pytest.raises(ValueError, match=f"reader={number}"):
                cg.MessageQueue.attach(queue.handle, number)
        with pytest.raises(TypeError, match="reader=None"):
            cg.MessageQueue.attach(queue.handle, None)
        with pytest.raises(TypeError, match=r"pass the writer's queue\.handle"):
            cg.MessageQueue.attach(queue, 0)
        bad = ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError), (timedelta(-1), ValueError))
        for timeout, error in bad:
            for call in (functools.partial(queue.enqueue, 1), reader.dequeue, queue.wait_until_ready, reader.wait_until_ready, queue.close):
                with pytest.raises(error, match="timeout="):
                    call(timeout)
        with pytest.raises(ValueError, match="only the writer enqueues"):
            reader.enqueue(1)
        with pytest.raises(ValueError, match="the writer reads nothing"):
            queue.dequeue()
        queue.enqueue("fine", float("inf"))
        assert reader.dequeue(timedelta(days=100_000)) == "fine"


def test_one_thread_at_a_time() -> None:
    for options in (LOCAL, REMOTE):
        with pair(1, **options) as (queue, (reader,)):
            got: list[Any] = []
            other = later(lambda: got.append(reader.dequeue(20)))  # noqa: B023 - it ends before the next one
            until_it_waits(other)
            with pytest.raises(RuntimeError, match="another thread is in a call"):
                reader.dequeue(20)
            queue.enqueue(1)
            other.join()
            assert got == [1]


def test_what_a_queue_says_of_itself() -> None:
    queue = cg.MessageQueue.create(2, n_local_readers=1)
    said = repr(queue)
    assert re.fullmatch(r"<MessageQueue \w{8}: the writer of 2 readers, 0 attached, 0 of them through sockets; 2097152 bytes>", said)
    readers = [cg.MessageQueue.attach(queue.handle, i) for i in range(2)]
    queue.wait_until_ready(20)
    assert "2 attached, 1 of them through sockets" in repr(queue)
    assert repr(readers[1]).endswith("reader 1 of 2, through a socket (readers from 1 on are on other hosts)>")
    assert (queue.reader, readers[1].reader, queue.n_readers, readers[0].n_readers) == (None, 1, 2, 2)
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"pass its \.handle"):
            call(queue)
    assert pickle.loads(pickle.dumps(queue.handle)).secret == queue.handle.secret
    for side in (queue, *readers):
        side.close()
        assert repr(side).endswith("closed>")
    assert hash(queue.handle) == hash(pickle.loads(pickle.dumps(queue.handle)))


def test_an_address_of_ones_own() -> None:
    with cg.MessageQueue.create(1, n_local_readers=0, address="localhost") as queue:
        assert queue.handle.address[0] == "localhost"
        taken = queue.handle.address[1]
        with pytest.raises(OSError, match="in use"):
            cg.MessageQueue.create(1, n_local_readers=0, address=f"localhost:{taken}")
        with cg.MessageQueue.attach(queue.handle, 0) as reader:
            queue.enqueue(1)
            assert reader.dequeue(20) == 1


def test_the_page_about_queues_runs_as_it_stands_there() -> None:
    names: dict[str, Any] = {"__name__": "page"}
    page = (ROOT / "docs/how-to/message-queue.md").read_text()
    found = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(found) >= 3
    for code in found:
        exec(code, names)
