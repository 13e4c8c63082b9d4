"""`Session`: one run on one rank. Its contenders, stopwatch and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import attrs

from commgraph.bench.figures import Row
from commgraph.bench.library import Channel, Job, Library
from commgraph.bench.timing import Stopwatch
from commgraph.errors import CollectiveMismatchError, CollectiveTimeoutError, ContextClosedError, PeerLostError

__all__ = ["Session"]

T = TypeVar("T")

# Errors after which commgraph's own groups are broken, and the run ends.
_FATAL = (CollectiveMismatchError, CollectiveTimeoutError, ContextClosedError, PeerLostError)


@attrs.frozen(eq=False)
class Session:
    """A run.

    Attributes:
        job: the ranks.
        stopwatch: how samples are taken.
        idle: seconds of silence before an idle reader is looked at.
        report: takes finished rows.
        note: takes a line about what could not be measured.
        tensors: the libraries whose tensor operations are measured, ours first.
        objects: those whose objects are measured, ours first.
    """

    job: Job
    stopwatch: Stopwatch
    idle: float
    report: Callable[[Sequence[Row]], None]
    note: Callable[[str], None]
    tensors: list[Library] = attrs.field(factory=list)
    objects: list[Library] = attrs.field(factory=list)
    _channels: dict[int, list[tuple[Library, Channel]]] = attrs.field(factory=dict)

    def add(self, library: Library) -> None:
        """Adds a library for the operations that it has."""
        if type(library).call is not Library.call:
            self.tensors.append(library)
        if type(library).channel is not Library.channel:
            self.objects.append(library)

    def channels(self, readers: int) -> list[tuple[Library, Channel]]:
        """Returns the channels of all libraries to so many readers, placeholders on other ranks. Collective, made once."""
        if readers not in self._channels:
            made = self._channels[readers] = []
            for library in self.objects:
                connect = partial(library.channel, readers) if self.job.world.rank <= readers else Channel
                channel = self.agreed(f"{library.name}, objects", connect)
                if channel is not None:
                    made.append((library, channel))
        return self._channels[readers]

    def close(self) -> None:
        """Closes the channels and the libraries."""
        for channels in self._channels.values():
            for _, channel in channels:
                channel.close()
        for library in {id(library): library for library in (*self.tensors, *self.objects)}.values():
            library.close()

    def agreed(self, who: str, attempt: Callable[[], T | None]) -> T | None:
        """Return the value of `attempt` if no rank gets None or an error from it, else None; errors become a note. Collective."""
        value, reason = None, None
        try:
            value = attempt()
        except _FATAL:
            raise
        except Exception as error:
            reason = f"rank {self.job.world.rank}: {type(error).__name__}: {error}"
        outcomes = self.stopwatch.gather((value is not None, reason))
        reasons = [text for _, text in outcomes if text is not None]
        if reasons:
            self.note(f"{who}: {reasons[0]}")
        return value if all(there for there, _ in outcomes) else None
