"""`Meeting`: the ranks that build something together, and every wait of theirs on the store that they share.

Each wait ends at the deadline of the build, at Ctrl-C, where a rank reports that it cannot go on, and within a fraction of a second after
a rank on this host that is still needed has died. The store itself may stop answering: its calls run on a thread that is left behind then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import attrs
import torch.distributed as dist

from commgraph.deadline import Deadline
from commgraph.errors import BuildError, LayoutMismatchError
from commgraph.processes import Process
from commgraph.waiting import Background

__all__ = ["STORE_ERRORS", "ForeignValueError", "Meeting", "PeerLeftError", "attend", "end_builds", "forget", "listing", "poll", "write"]

logger = logging.getLogger("commgraph")

T = TypeVar("T")

# Errors of stores: torch's are RuntimeErrors, those written in Python raise what they like.
STORE_ERRORS = (RuntimeError, OSError, LookupError, ValueError, NotImplementedError)

# Seconds between two looks at a store, at least and at most; between them a tenth of the time waited so far.
_SOONEST, _LATEST = 0.0002, 0.1
# Seconds between two looks at the processes of peers, and at a job that runs on another thread.
_WATCH = 0.1
# Seconds beyond its deadline after which a store that does not answer is left alone.
_GRACE = 1.0
# Nanoseconds that the others wait longer than rank 0.
_LATER_NS = 500_000_000
# Seconds of a wait after which the log says who is waited for.
_LONG = 10.0
# Seconds that rank 0 stays, at most, until all others have read its answer: the store may end with its process.
_LINGER = 2.0
_FAILED, _HEARD = "failed", "failed/heard"
# Key of a world's store: why nothing can be built in it any more.
_ENDED = "ended"


class ForeignValueError(BuildError):
    """What a store holds was not written by a rank of this job.

    Attributes:
        key: under which it is.
    """

    def __init__(self, text: str, key: str) -> None:
        super().__init__(text)
        self.key = key


class PeerLeftError(BuildError):
    """A build ended because another rank of the group had ended it."""


class _ReportedError(PeerLeftError):
    """A build ended because another rank has reported an error."""


class _SilentStoreError(BuildError):
    """The store gives no answer, so that nothing can be reported in it."""


def attend(
    job: Callable[[Callable[[], bool]], T], deadline: Deadline, watch: Callable[[], None] = lambda: None, *, grace: float = _GRACE
) -> T:
    """Return what `job` returns, which runs on another thread.

    Args:
        job: given a function that says whether it was left behind.
        deadline: by which it should have ended by itself.
        watch: called several times a second, to raise where it is not worth waiting any longer.
        grace: seconds beyond the deadline after which it is left behind.

    Raises:
        TimeoutError: it did not end.
    """
    left: list[bool] = []
    came: list[T] = []
    background = Background(lambda: came.append(job(lambda: bool(left))))
    try:
        while not background.wait(min(_WATCH, deadline.left() + grace)):
            watch()
            if time.monotonic_ns() > deadline.at_ns + int(grace * 1e9):
                raise TimeoutError(f"no answer within {deadline.seconds:g} s")
        return came[0]
    finally:
        left.append(True)


def poll(look: Callable[[], T | None], deadline: Deadline, is_left: Callable[[], bool], tell: Callable[[], str] = lambda: "") -> T | None:
    """Return the first result of `look` that is not None, or None at the deadline or where nobody waits any more.

    Looks, and no wait of the store's in slices: each slice of a TCPStore that ends without the key is two warnings on stderr.

    Args:
        look: asked again and again, at longer and longer intervals.
        deadline: until when.
        is_left: as `attend` gives it.
        tell: says who is waited for, in the log of a long wait.
    """
    began = time.monotonic()
    told = False
    while not is_left():
        if (found := look()) is not None:
            return found
        if deadline.has_passed:
            return None
        waited = time.monotonic() - began
        if waited > _LONG and not told and (text := tell()):
            told = True
            logger.warning("waiting for %.0f s: %s", waited, text)
        time.sleep(min(max(waited / 10, _SOONEST), _LATEST, deadline.left()))
    return None


@attrs.frozen
class Meeting:
    """The ranks that build something together, as one of them sees it.

    Attributes:
        store: where they write; holds keys of this part of the build only.
        root: of the whole build: where a rank that cannot go on says so.
        ranks: their numbers in the world, in order.
        rank: index of this one among them.
        what: what is built, for messages, e.g. ``"context 'target'"``.
        deadline: of the build.
        me: this process.
        processes: of all ranks of the world.
        leavings: keys that this rank has written and nobody reads once all ranks are done.
        ends: called, on another thread, once another rank has reported an error: they end waits of this rank that the store does not.
        world: holds the keys of the world; None while there is none.
        guard: called several times a second, to raise where the build is in vain.
    """

    store: dist.Store
    root: dist.Store
    ranks: Sequence[int]
    rank: int
    what: str
    deadline: Deadline
    me: Process
    processes: Sequence[Process]
    leavings: list[tuple[dist.Store, str]] = attrs.field(factory=list)
    ends: list[Callable[[], None]] = attrs.field(factory=list)
    world: dist.Store | None = None
    guard: Callable[[], None] = lambda: None

    def at(self, prefix: str) -> Meeting:
        """Return the same meeting with keys of its own."""
        return attrs.evolve(self, store=dist.PrefixStore(prefix, self.store))

    def among(self, ranks: Sequence[int], store: dist.Store, what: str) -> Meeting:
        """Return the part of the build that only `ranks` of the world take part in, with keys in `store`."""
        mine = self.ranks[self.rank]
        return attrs.evolve(self, store=store, ranks=tuple(ranks), rank=ranks.index(mine), what=what)

    def exchange(self, topic: str, value: bytes) -> list[bytes]:
        """Return what every rank gave, in order. Two operations on the store, whatever the number of ranks, beside looking."""
        if len(self.ranks) == 1:
            return [value]
        keys = [f"{topic}/{peer}" for peer in range(len(self.ranks))]
        self.leavings.append((self.store, keys[self.rank]))

        def job(is_left: Callable[[], bool]) -> list[bytes]:
            write(self.store, keys[self.rank], value)
            self._await(keys, dict(enumerate(keys)), is_left)
            return self._read(keys)

        said = self._run(job)
        said[self.rank] = value
        return said

    def answer(self, topic: str, value: bytes, judge: Callable[[list[bytes]], bytes]) -> bytes:
        """Return what `judge` makes, on the first rank, of what every rank gave.

        Each rank writes one key and reads one, so that the traffic grows with the number of ranks and not with its square. The first
        rank stays until all others have read: where it serves the store, the store ends with its process. No key is left.
        """
        n = len(self.ranks)
        keys = [f"{topic}/said/{peer}" for peer in range(n)]
        verdict, heard = f"{topic}/verdict", f"{topic}/heard"

        def job(is_left: Callable[[], bool]) -> bytes:
            write(self.store, keys[self.rank], value)
            if self.rank == 0:
                self._await(keys, dict(enumerate(keys)), is_left)
                said = self._read(keys)
                said[0] = value
                result = judge(said)
                write(self.store, verdict, result)
                linger = Deadline.after(_LINGER)
                poll(lambda: int(self.store.add(heard, 0)) >= n - 1 or None, linger, is_left)
                forget(self.store, [keys[0], verdict, heard])
            else:
                # The others are needed as well: the first rank may be on another host than one that has died.
                self._await([verdict], dict(enumerate(keys)), is_left, first=verdict)
                (result,) = self._read([verdict])
                forget(self.store, [keys[self.rank]])
                self.store.add(heard, 1)
            return bytes(result)

        return self._run(job)

    def attend(self, job: Callable[[Callable[[], bool]], T]) -> T:
        """Return what `job` returns, on another thread; raise where one of the ranks dies, all of which it needs.

        Raises:
            PeerLeftError: a rank on this host died.
            TimeoutError: it did not end in time.
        """

        def watch() -> None:
            self.guard()
            if dead := self._ended(range(len(self.ranks))):
                raise self._lost(dead[0])

        return attend(job, self.deadline, watch)

    def clean(self) -> None:
        """Delete the keys that were left, once all ranks are done."""
        if not self.leavings:
            return

        def job(is_left: Callable[[], bool]) -> None:
            for store, key in self.leavings:
                if not is_left():
                    forget(store, [key])

        with contextlib.suppress(TimeoutError):
            attend(job, Deadline.after(_GRACE))
        self.leavings.clear()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Context manager that reports an exception in it to the other ranks, whose waits end, and whose errors say so.

        A `PeerLeftError` follows from what another rank is about to report, and is replaced by that.
        """
        is_over = threading.Event()
        watcher = Background(lambda: self._watch(is_over)) if len(self.ranks) > 1 else None
        try:
            yield
        except LayoutMismatchError:  # every rank has the same
            raise
        except PeerLeftError as error:
            reported = error if isinstance(error, _ReportedError) else self._reported_soon() or error
            self._report(str(error))
            raise BuildError(str(reported)) from reported
        except _SilentStoreError as error:
            raise BuildError(str(error)) from None
        except BaseException as error:
            # At Ctrl-C rank 0 does not wait until the others have read that.
            self._report(f"{type(error).__name__}: {error}", linger=isinstance(error, Exception))
            raise
        finally:
            is_over.set()
            if watcher is not None:
                watcher.join(_WATCH)

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(_WATCH):
            try:
                if not self.ends or self._failure() is None:
                    continue
            except STORE_ERRORS:  # whoever reads the store for the build says so
                return
            for end in self.ends:
                end()
            return

    def _report(self, why: str, *, linger: bool = True) -> None:
        """Write why this rank cannot go on, unless another has done so before. Never raises, waits little."""
        rank = self.ranks[self.rank]

        def job(is_left: Callable[[], bool]) -> None:
            if not self.root.check([_FAILED]):
                self.root.set(_FAILED, json.dumps({"rank": rank, "why": why}))
            if self.rank:
                self.root.add(_HEARD, 1)
            elif linger and any(self._process(peer) != self.me for peer in range(len(self.ranks))):  # the store may end with this process
                poll(lambda: int(self.root.add(_HEARD, 0)) >= len(self.ranks) - 1 or None, Deadline.after(_GRACE), is_left)

        with contextlib.suppress(TimeoutError, *STORE_ERRORS):
            attend(job, Deadline.after(_GRACE))

    def _reported_soon(self) -> BuildError | None:
        with contextlib.suppress(TimeoutError, *STORE_ERRORS):
            return attend(lambda is_left: poll(self._failure, Deadline.after(_GRACE), is_left), Deadline.after(_GRACE))
        return None

    def _run(self, job: Callable[[Callable[[], bool]], T]) -> T:
        try:
            return attend(job, self.deadline, self.guard)
        except BuildError:
            raise
        except TimeoutError as error:
            raise _SilentStoreError(f"{self._head}: the store that the ranks meet in gives {error}") from None
        except STORE_ERRORS as error:
            dead = self._ended(range(len(self.ranks)))
            why = f": {self._name(dead[0])} has ended" if dead else ""
            raise BuildError(
                f"{self._head}: the store that the ranks meet in failed after {self.waited()}{why}. Rank 0 or a launcher serves it, and it "
                f"ends with that ({error})"
            ) from error

    def _await(self, keys: Sequence[str], needed: Mapping[int, str], is_left: Callable[[], bool], *, first: str = "") -> None:
        """Wait for keys.

        Args:
            keys: to wait for.
            needed: rank -> the key without which it has not come, and its death ends the wait.
            is_left: as `attend` gives it.
            first: another key without which the death of the first rank ends the wait: of its answer, which comes at its deadline at
                the latest. It may have begun later.
        """
        wanted, watched = list(keys), {peer: key for peer, key in needed.items() if self._can_watch(peer)}
        deadline = self.deadline
        if first:
            watched |= {0: first} if 0 in watched else {}
            deadline = attrs.evolve(deadline, at_ns=deadline.at_ns + _LATER_NS)
        looked = time.monotonic()

        def look() -> bool | None:
            nonlocal looked
            if self.store.check(wanted):
                return True
            if (error := self._failure()) is not None:
                raise error
            if time.monotonic() - looked >= _WATCH:
                looked = time.monotonic()
                if self.world is not None and self.world.check([_ENDED]):
                    raise BuildError(f"{self._head}: {self.world.get(_ENDED).decode(errors='replace')}")
                for peer in self._ended(watched):
                    if self.store.check([watched[peer]]):
                        del watched[peer]
                    else:
                        raise self._lost(peer)
            return None

        if poll(look, deadline, is_left, lambda: f"{self._head}: {self._absent(needed)[0]}") is None:
            absent, plural = self._absent(needed)
            raise BuildError(
                f"{self._head}: {absent} of {len(self.ranks)} did not come within {self.deadline.seconds:g} s. "
                f"{'They' if plural else 'It'} died (look at {'their' if plural else 'its'} own output), or wait{'' if plural else 's'} "
                "elsewhere: building is collective, every rank makes the same calls in the same order. Ranks on several nodes, or started "
                "through a script, need the same MASTER_ADDR and MASTER_PORT"
            )

    def _failure(self) -> BuildError | None:
        """Return the error for what another rank has reported."""
        if not self.root.check([_FAILED]):
            return None
        text = self.root.get(_FAILED)
        try:
            said = json.loads(text)
            rank, why = int(said["rank"]), str(said["why"])
        except (ValueError, TypeError, KeyError):
            return BuildError(f"{self._head}: the store of the ranks holds {bytes(text)[:80]!r} where a rank reports an error")
        return _ReportedError(f"{self._head}: rank {rank} could not build it: {why}")

    def _read(self, keys: list[str]) -> list[bytes]:
        """Return the values of keys, each of the rank at that position."""
        extended = self.store.has_extended_api()  # type: ignore[attr-defined]  # missing in torch's stub
        try:
            return [bytes(value) for value in (self.store.multi_get(keys) if extended else map(self.store.get, keys))]
        except ForeignValueError as error:
            ranks = [self.ranks[peer] for peer, key in enumerate(keys) if f"/{error.key}".endswith(f"/{key}")]
            raise ForeignValueError(f"{self._head}: rank {listing(ranks)} has not the authkey: {error}", error.key) from None

    def _absent(self, needed: Mapping[int, str]) -> tuple[str, bool]:
        absent = [self.ranks[peer] for peer, key in needed.items() if not self.store.check([key])] or [self.ranks[0]]
        return f"rank{'s' if len(absent) > 1 else ''} {listing(absent)}", len(absent) > 1

    def _process(self, peer: int) -> Process:
        return self.processes[self.ranks[peer]]

    def _can_watch(self, peer: int) -> bool:
        return self.me.can_watch(self._process(peer))

    def _ended(self, peers: Iterable[int]) -> list[int]:
        return [peer for peer in peers if self._can_watch(peer) and self._process(peer).has_ended()]

    def _lost(self, peer: int) -> PeerLeftError:
        return PeerLeftError(f"{self._head}: {self._name(peer)} died while it was built, {self.waited()} after this rank had begun")

    def _name(self, peer: int) -> str:
        return f"rank {self.ranks[peer]} (process {self._process(peer).pid})"

    def waited(self) -> str:
        """Return how long ago the build began, for messages."""
        return f"{self.deadline.seconds - (self.deadline.at_ns - time.monotonic_ns()) * 1e-9:.1f} s"

    @property
    def _head(self) -> str:
        return f"rank {self.ranks[self.rank]}: {self.what}"


def end_builds(world: dist.Store, why: str) -> None:
    """Say, in the store of a world, why nothing can be built in it any more. Never raises, waits little."""
    with contextlib.suppress(TimeoutError, *STORE_ERRORS):
        attend(lambda _: world.set(_ENDED, why), Deadline.after(_GRACE / 2), grace=0)


def write(store: dist.Store, key: str, value: bytes) -> None:
    """Set a key of a store."""
    store.set(key, value)  # type: ignore[arg-type]  # torch's stub says str, and means both


def forget(store: dist.Store, keys: Sequence[str]) -> None:
    """Delete keys that nobody reads any more, where the store can."""
    with contextlib.suppress(*STORE_ERRORS):
        for key in keys:
            store.delete_key(key)


def listing(ranks: Sequence[int]) -> str:
    """Return the first of the ranks, and how many more there are."""
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
