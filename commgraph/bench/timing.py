"""Samples of several contenders, taken in turn in the same processes.

The cores of a virtual machine move while it runs, and the same program is up to ten times slower for it. Contenders are therefore
measured sample by sample, A B A B, and not one after the other; each sample beside a ping-pong that shows where the ranks run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import attrs

from commgraph.bench.figures import Sample
from commgraph.bench.probe import Probe

__all__ = ["Contender", "Stopwatch", "interleave", "slowest"]

T = TypeVar("T")

# A sample is a batch of calls timed together, long enough that clock resolution and cache effects of one call do not count.
_SAMPLE_SECONDS = 200e-6
_FEWEST, _MOST = 5, 2000
_WARMUP_CALLS = 3
_MOST_CALLS = 1_000_000


@attrs.frozen(eq=False)
class Contender:
    """One library's implementation of an operation, to be timed.

    Attributes:
        who, strategy: as in `figures.Row`.
        batch: performs so many calls, on this rank. Ranks that have no part in it do nothing.
        share: of a call's time that is reported: 0.5 for there and back.
    """

    who: str
    strategy: str
    batch: Callable[[int], object]
    share: float = 1.0


@attrs.frozen(eq=False)
class Stopwatch:
    """How samples are taken; equal on all ranks.

    Attributes:
        gather: a value of this rank -> those of all.
        sync: a barrier.
        probe: taken beside each sample; rank 0's counts.
        samples: of each contender; None: as many as fit.
        seconds: for each contender, where `samples` is None.
    """

    gather: Callable[[Any], list[Any]]
    sync: Callable[[], None]
    probe: Probe
    samples: int | None
    seconds: float

    def time(self, contender: Contender, calls: int) -> float:
        """Return the seconds that this rank took for so many calls, which all ranks begin together, after warm-up calls."""
        self.sync()
        contender.batch(_lead(calls))
        start = time.perf_counter()
        contender.batch(calls)
        return time.perf_counter() - start

    def rounds(self, seconds: float) -> int:
        """Return the number of samples of each contender, given the mean duration of one; alike on all ranks."""
        if self.samples is not None:
            return self.samples
        return min(max(int(self.seconds / max(seconds, 1e-9)), _FEWEST), _MOST)


def _unwatched(rounds: int) -> AbstractContextManager[Callable[[], None]]:
    return contextlib.nullcontext(lambda: None)


def slowest(values: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each sample, the value of its slowest rank."""
    return [max(column) for column in zip(*values, strict=True)]


def interleave(
    contenders: Sequence[Contender],
    stopwatch: Stopwatch,
    *,
    at_least: float = _SAMPLE_SECONDS,
    watch: Callable[[int], AbstractContextManager[Callable[[], None]]] = _unwatched,
) -> list[list[Sample]]:
    """Takes samples of the contenders in turn. Collective.

    Args:
        contenders: the same ones on every rank.
        stopwatch: how.
        at_least: seconds that the batch of a sample takes.
        watch: given the number of rounds, a context manager with a function that is called after each.

    Returns:
        For each contender its samples, of one call each; a sample takes as long as its slowest rank.
    """
    calls, durations = [], []
    for contender in contenders:
        contender.batch(_WARMUP_CALLS)
        number, duration = _fit(contender, stopwatch, at_least)
        calls.append(number)
        durations.append(duration)
    rounds = stopwatch.rounds(sum(durations) / len(durations)) if contenders else 0
    times: list[list[float]] = [[] for _ in contenders]
    probed: list[list[float | None]] = [[] for _ in contenders]
    with watch(rounds) as advance:
        for _ in range(rounds):
            for number, contender, mine, places in zip(calls, contenders, times, probed, strict=True):
                places.append(stopwatch.probe.measure())
                mine.append(stopwatch.time(contender, number) * contender.share / number)
            advance()
    everyone = stopwatch.gather((times, probed))
    return [
        [
            Sample(seconds, nanoseconds)
            for seconds, nanoseconds in zip(slowest([theirs[i] for theirs, _ in everyone]), everyone[0][1][i], strict=True)
        ]
        for i in range(len(contenders))
    ]


def _fit(contender: Contender, stopwatch: Stopwatch, at_least: float) -> tuple[int, float]:
    """Return how many calls take at least so long, and their duration with the warm-up calls; alike on all ranks."""
    calls = 1
    while True:
        duration = max(stopwatch.gather(stopwatch.time(contender, calls)))
        if duration >= at_least or calls >= _MOST_CALLS:
            return calls, duration * (calls + _lead(calls)) / calls
        calls = min(max(2 * calls, math.ceil(1.2 * calls * at_least / max(duration, 1e-9))), _MOST_CALLS)


def _lead(calls: int) -> int:
    return max(calls // 4, 1)
