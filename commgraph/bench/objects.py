"""The rows about Python objects: one writer, rank 0, and one reader, or three."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from commgraph.bench.figures import Row, Sample, rows_of
from commgraph.bench.library import Channel, Library
from commgraph.bench.session import Session
from commgraph.bench.timing import Contender, interleave, slowest

__all__ = ["OPERATIONS", "lists", "measure", "small"]

OPERATIONS = ("object_small", "object_lists", "object_tensor", "object_rate", "object_readers", "object_wake", "object_idle")

_TENSOR_BYTES = 10 * 2**20
_RATE_SECONDS = 20e-3  # a stream is answered once: long enough for the answer not to count
_WAKE_SECONDS = 1.2
_PAUSES = 5
_BLOCKS, _BLOCK = 20, 20  # messages that three readers get in a row


def small() -> dict[str, Any]:
    """A dict whose pickle has 75 bytes."""
    return {"call": "execute_model", "step": 123456, "sent": time.perf_counter(), "last": True}


def lists() -> dict[str, Any]:
    """A dict of lists whose pickle has 9.4 KB: as a scheduler sends its workers for one step."""
    return {
        "requests": [f"request-{number}" for number in range(184)],
        "tokens": [[number * 7 % 32000, number * 11 % 32000] for number in range(184)],
        "blocks": [list(range(number, number + 12)) for number in range(184)],
    }


def measure(session: Session, operation: str) -> None:
    """Measures one of `OPERATIONS` with every library that can. Collective."""
    readers = 3 if operation == "object_readers" else 1
    world = session.job.world
    if world.size <= readers:
        session.note(f"{operation} needs {readers + 1} ranks, these are {world.size}")
        return
    if operation in ("object_readers", "object_wake") and world.node_count > 1:
        session.note(f"{operation} compares the clocks of its ranks, which have to be on one node")
        return
    if operation == "object_idle" and session.job.started == "threads":
        session.note("object_idle needs processes: threads have one processor time together")
        return
    _MEASURES[operation](session, operation, session.channels(readers))


def _one_way(session: Session, operation: str, channels: Sequence[tuple[Library, Channel]]) -> None:
    """Measure half of a round trip, without pauses."""
    obj, size = _payload(operation)

    def there_and_back(library: Library, channel: Channel) -> Callable[[int], None]:
        mine = obj
        if isinstance(obj, torch.Tensor) and library.name != "commgraph":
            mine = obj.numpy()  # the same bytes, which pickle writes without a copy; torch's own pickling takes several times as long

        def write(calls: int) -> None:
            for _ in range(calls):
                channel.send(mine)
                channel.recv(1)

        def read(calls: int) -> None:
            for _ in range(calls):
                channel.recv()
                channel.send(mine)

        return _part(session, write, read)

    contenders = [Contender(library.name, _method_of(library), there_and_back(library, channel), 0.5) for library, channel in channels]
    _report(session, operation, size, channels, interleave(contenders, session.stopwatch))


def _rate(session: Session, operation: str, channels: Sequence[tuple[Library, Channel]]) -> None:
    """Measure messages in a row, of which the last one is answered."""
    obj, size = _payload(operation)

    def stream(channel: Channel) -> Callable[[int], None]:
        def write(calls: int) -> None:
            for _ in range(calls):
                channel.send(obj)
            channel.recv(1)

        def read(calls: int) -> None:
            for _ in range(calls):
                channel.recv()
            channel.send(obj)

        return _part(session, write, read)

    contenders = [Contender(library.name, _method_of(library), stream(channel)) for library, channel in channels]
    samples = interleave(contenders, session.stopwatch, at_least=_RATE_SECONDS)
    _report(session, operation, size, channels, samples, unit="messages/s", convert=lambda seconds: 1 / seconds)


def _readers(session: Session, operation: str, channels: Sequence[tuple[Library, Channel]]) -> None:
    """Measure messages to three readers, from sending to the slowest receipt; each is sent when all have answered the one before."""
    _report(session, operation, len(pickle.dumps(small())), channels, _latencies(session, channels, 3, _BLOCK, skip=1, pause=0.0))


def _wake(session: Session, operation: str, channels: Sequence[tuple[Library, Channel]]) -> None:
    """Measure the time from sending to receipt, after a pause."""
    pause = min(_WAKE_SECONDS, session.idle)
    _report(session, operation, len(pickle.dumps(small())), channels, _latencies(session, channels, 1, 1, skip=0, pause=pause))


def _latencies(
    session: Session, channels: Sequence[tuple[Library, Channel]], readers: int, block: int, *, skip: int, pause: float
) -> list[list[Sample]]:
    """Take samples by the clock that all processes of a node share, in turn, in blocks; the first `skip` of a block are dropped."""
    rank, stopwatch = session.job.world.rank, session.stopwatch
    most = _PAUSES if pause else _BLOCKS
    rounds = min(stopwatch.samples or most, most)
    times: list[list[float]] = [[] for _ in channels]
    probed: list[list[float | None]] = [[] for _ in channels]
    for _ in range(rounds):
        for (_, channel), mine, places in zip(channels, times, probed, strict=True):
            nanoseconds = stopwatch.probe.measure()
            stopwatch.sync()
            for number in range(skip + block):
                latency = 0.0
                if rank == 0:
                    if pause:  # a sleep of nothing takes a tenth of a millisecond, in which the readers' cores go to sleep as well
                        time.sleep(pause)
                    channel.send(small())
                    for reader in range(1, readers + 1):
                        channel.recv(reader)
                elif rank <= readers:
                    latency = -channel.recv()["sent"] + time.perf_counter()
                    channel.send(number)
                if number >= skip:
                    mine.append(latency)
                    places.append(nanoseconds)
    everyone = stopwatch.gather((times, probed))
    return [
        [Sample(*pair) for pair in zip(slowest([theirs[i] for theirs, _ in everyone]), everyone[0][1][i], strict=True)]
        for i in range(len(channels))
    ]


def _idle(session: Session, operation: str, channels: Sequence[tuple[Library, Channel]]) -> None:
    """Measure the share of a core that an idle reader's process uses, and that of one that only sleeps, for comparison."""
    rank = session.job.world.rank

    def measured(wait: Callable[[], object]) -> list[Sample]:
        session.stopwatch.sync()
        share = 0.0
        if rank == 1:
            wall, busy = time.perf_counter(), time.process_time()
            wait()
            share = (time.process_time() - busy) / (time.perf_counter() - wall)
        elif rank == 0:
            wait()
        return [Sample(max(session.stopwatch.gather(share)), None)]

    def silence(channel: Channel) -> None:
        if rank == 0:
            time.sleep(session.idle)
            channel.send(None)
        else:
            channel.recv()

    asleep = Library(session.job)
    asleep.name = "time.sleep"
    samples = [measured(partial(silence, channel)) for _, channel in channels]
    samples.append(measured(lambda: time.sleep(session.idle)))
    everybody = [*channels, (asleep, Channel())]
    _report(session, operation, 0, everybody, samples, unit="% of a core", convert=lambda share: 100 * share)


def _part(session: Session, write: Callable[[int], None], read: Callable[[int], None]) -> Callable[[int], None]:
    rank = session.job.world.rank
    return write if rank == 0 else read if rank == 1 else lambda calls: None


def _payload(operation: str) -> tuple[Any, int]:
    if operation == "object_tensor":
        return torch.arange(_TENSOR_BYTES // 4, dtype=torch.float32, device="cpu"), _TENSOR_BYTES
    obj = lists() if operation == "object_lists" else small()
    return obj, len(pickle.dumps(obj, protocol=5))


def _method_of(library: Library) -> str:
    return str(getattr(library, "method", ""))


def _report(
    session: Session,
    operation: str,
    size: int,
    channels: Sequence[tuple[Library, Channel]],
    samples: Sequence[Sequence[Sample]],
    **how: Any,
) -> None:
    for (library, _), taken in zip(channels, samples, strict=True):
        rows: list[Row] = rows_of(
            taken,
            operation=operation,
            size=size,
            dtype="",
            who=library.name,
            strategy=_method_of(library),
            ranks=session.job.world.size,
            **how,
        )
        session.report(rows)


_MEASURES = MappingProxyType(
    {
        "object_small": _one_way,
        "object_lists": _one_way,
        "object_tensor": _one_way,
        "object_rate": _rate,
        "object_readers": _readers,
        "object_wake": _wake,
        "object_idle": _idle,
    }
)
