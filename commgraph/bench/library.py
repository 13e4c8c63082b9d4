"""`Library`: moves tensors, objects or both, and can be measured. commgraph itself is one, and so is each of its peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from commgraph.world import World

__all__ = ["Buffers", "Channel", "Job", "Library", "repeat", "there_and_back"]


def repeat(call: Callable[[], object]) -> Callable[[int], None]:
    """Return a batch: a function that makes so many calls, one after the other."""

    def batch(calls: int) -> None:
        for _ in range(calls):
            call()

    return batch


def there_and_back(rank: int, send: Callable[[int], object], receive: Callable[[int], object]) -> Callable[[], None]:
    """Return a call in which rank 0 sends to rank 1 and receives from it, and rank 1 the other way about; both functions get the peer."""
    first, second = (send, receive) if rank == 0 else (receive, send)

    def call() -> None:
        first(1 - rank)
        second(1 - rank)

    return call


@attrs.frozen(eq=False)
class Job:
    """The ranks of one run, as one of them sees it.

    Attributes:
        world: all of them.
        started: by what: ``"processes"`` or ``"threads"`` of `commgraph bench` itself, else the launcher (``"torchrun"``, ``"PMI"``, ...).
        directory: private to this user and the same on every rank of one node, for sockets; removed afterwards.
        inherited: result of `Library.inherit` in the process that started the ranks; None where a launcher did.
    """

    world: World
    started: str
    directory: Path
    inherited: Any = None


@attrs.frozen(eq=False)
class Buffers:
    """1-D tensors of one dtype for one operation on one rank; only `out` changes, except in operations in place.

    Attributes:
        x: the input. The operation's size is that of the larger of the two, as in nccl-tests.
        out: for the result; x itself for ``all_reduce_`` and ``broadcast``.
    """

    x: torch.Tensor
    out: torch.Tensor


class Channel:
    """Objects between one writer, rank 0, and readers, ranks 1 to n. Objects sent in one direction arrive in order."""

    def send(self, obj: object) -> None:
        """On the writer: to every reader. On a reader: to the writer."""
        raise NotImplementedError

    def recv(self, source: int = 0) -> Any:
        """Returns the next object: on the writer that of the reader `source`, on a reader that of the writer."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases the resources of this rank."""


class Library:
    """One library on one rank. A peer's file holds a class `Peer` derived from this one.

    Made once per run. `available` is asked first; then come `prepare`, `call` and `channel` in the same order on every rank, and
    `close`. A library that does not override a method lacks what it measures.

    Attributes:
        name: as the tables show it; may be refined in `prepare` (by a version, say).
        computes: whether its results are those of the operations, and are checked; not of a limit, which only moves bytes.
        job: the ranks.
    """

    name: str
    computes: bool = True

    def __init__(self, job: Job) -> None:
        self.job = job

    @staticmethod
    def inherit(ranks: int) -> Any:
        """Makes, in the process that starts the ranks, the objects that they inherit: `Job.inherited`, pickled as multiprocessing does."""
        return None

    def available(self) -> str | None:
        """Why this library cannot be measured here, in one line; None if it can."""
        return None

    def prepare(self) -> None:
        """Connects the ranks. Collective."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor for `Buffers`. Collective."""
        return torch.empty(numel, dtype=dtype, device="cpu")

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """Return a callable that performs `operation` once, or None where this library lacks it or the dtype.

        Args:
            operation: ``all_reduce_`` (sum, in place), ``all_reduce`` (sum, x unchanged), ``all_gather``, ``reduce_scatter`` (sum),
                ``all_to_all``, ``broadcast`` (from rank 0), ``barrier``, ``send_recv`` (rank 0 sends x to rank 1, which sends its own
                back; asked on these two only) or ``tensor_dict`` (the same with x's two halves as a dict of tensors).
            buffers: what it works on, made by `allocate`. The callable may return its result; otherwise it is in `out`.
        """
        return None

    def batch(self, call: Callable[[], object]) -> Callable[[int], object]:
        """Return a callable that performs so many calls and returns when they have ended: here, one after the other."""
        return repeat(call)

    def strategy(self, operation: str, buffers: Buffers) -> str:
        """Return the name of the algorithm that the library uses for that call, for the table; "" if it has but one."""
        return ""

    def channel(self, readers: int) -> Channel | None:
        """Connects a writer and so many readers, None where the library sends no objects. Called on these ranks only."""
        return None

    def close(self) -> None:
        """Releases the resources of this rank, its channels being closed already."""
