"""The first failure of a group, reported to every rank as a public error that names rank, group, operation and call site."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch.distributed as dist

from commgraph.communicators.base import AccessRefused, CallsDiffer, FastPath, PeerClosed, PeerLate, PeerLeft
from commgraph.coordinator.spans import context_of
from commgraph.deadline import Deadline
from commgraph.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    ConcurrentCallError,
    ContextClosedError,
    PeerLostError,
)
from commgraph.meeting import STORE_ERRORS, attend

__all__ = ["CLOSE", "EXPECTED", "Call", "Failures", "Members", "call_site", "concurrent"]

# Failures of a strategy, which end a call.
EXPECTED = (PeerLate, PeerClosed, CallsDiffer, AccessRefused, CollectiveError)

# Seconds that a store may take, at most, to take or give what a rank says of a failure.
_PUBLISH_SECONDS = 0.5
# Name of the call by which the ranks wait for each other before they close a group.
CLOSE = "close"
# Seconds within which ranks that close a group together do so.
_CLOSING = 0.5
# Seconds that a rank waits to hear how a call ended for its peers, at most and at least; between them as long as its deadline was. Peers
# that are in the call end with it, and say so at once; who has a short deadline, or 0 to poll, does not want to wait for the others.
_LONGEST_WORD, _SHORTEST_WORD = 1.0, 0.25
# Seconds by which a wait ends after its deadline where the process was not run meanwhile: waits look at the clock many times a second.
_STOOD_STILL = 0.5
# How a note begins that says where a rank gave up; other notes say what it called.
_GAVE_UP = "gave up in call #"

# Frames that are not the user's: this package's, and those of the context managers in it.
_OURS = (str(Path(__file__).parent.parent), contextlib.__file__)
_METHODS = str(Path(__file__).with_name("group.py"))


@attrs.frozen
class Members:
    """The ranks of a group.

    Attributes:
        uid: names the group among all groups of all contexts of the job; the same on its ranks.
        ranks: global ranks in group order.
        rank_in_group: index of this rank in `ranks`.
    """

    uid: str
    ranks: tuple[int, ...]
    rank_in_group: int

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.ranks[self.rank_in_group]


@attrs.frozen
class Call:
    """Identity of a call, for errors; made when one is raised.

    Attributes:
        group: name of the coordinator.
        operation: name of the method.
        members: of the group.
        sequence: collectives that this rank had begun on the group before.
    """

    group: str
    operation: str
    members: Members
    sequence: int

    @property
    def where(self) -> str:
        """The head of every message."""
        m = self.members
        return f"{self.operation} on group {self.group!r} (rank {m.rank}, {m.rank_in_group} of {m.world_size} in the group)"

    @property
    def facts(self) -> dict[str, Any]:
        """Keyword arguments of a `CollectiveError` (group, operation, rank and sequence number)."""
        return {"group": self.group, "operation": self.operation, "rank": self.members.rank, "sequence": self.sequence}


def concurrent(call: Call, *, message: bool) -> ConcurrentCallError:
    """Return the error of a call that was refused because another one is under way; `message`: of messages, not of collectives."""
    one = "another such message with this very rank" if message else "another call"
    return ConcurrentCallError(
        f"{call.where}: {one} is under way, on another thread or around this one (a signal handler, __del__, or pickling that calls in). "
        "Nothing was sent, and the group is unharmed. A group serves one thread at a time: let them take turns, or give another "
        "thread a group of its own (group.sibling)",
        **call.facts,
    )


@attrs.frozen
class _Fault:
    """Record that a rank writes to the store when its group breaks, for its peers to read."""

    kind: str
    at: str
    lost: int | None
    sequence: int
    text: str


class Failures:
    """The first error of a group, which every later call raises again. Peers learn of it through the store and through notes."""

    def __init__(self, members: Members, store: dist.Store | None, abort: Callable[[], None], notes: FastPath | None) -> None:
        """Without an error as yet.

        Args:
            members: of the group.
            store: holds this group's keys only; None for one rank.
            abort: ends what runs on the group, here and on the peers.
            notes: texts in shared memory in which each rank says which call it made; None without shared memory.
        """
        self.broken: CollectiveError | None = None
        self.closed = False
        # Whether this rank is about to close the group: the others may close it first.
        self.closing = False
        self._members = members
        self._store = store
        # Whether the store did not answer.
        self._store_is_gone = False
        self._abort = abort
        self._notes = notes
        # Held by the thread that determines the error.
        self._failing = threading.Lock()

    def forget(self) -> None:
        """Drop what would keep a closed group's memory: the store, the traceback of the error, and the group itself."""
        self._store = None
        self.broken = None
        self._abort = _nothing

    def not_open(self, group: str, why: str) -> ContextClosedError:
        """Return the error of a call on a group that is closed, or is not this process's."""
        return ContextClosedError(f"{Call(group, called_method(), self._members, 0).where}: {why}")

    def end(self, call: Call, what: str, seconds: float, error: Exception, *, overrun: float = 0.0) -> NoReturn:
        """Break the group, release the peers and raise the public error of a call that failed.

        Args:
            call: the one that failed.
            what: the call with its arguments, as all ranks have them in common.
            seconds: deadline that it had.
            error: one of `EXPECTED`.
            overrun: seconds since the deadline.
        """
        if isinstance(error, PeerClosed) and error.peer == self._members.rank_in_group:
            # A call of another lane ended this one and is about to say why.
            patience = time.monotonic() + 1.0
            while self.broken is None and not self.closed and time.monotonic() < patience:
                time.sleep(0.001)
        with self._failing:
            if self.broken is not None:
                raise copy.copy(self.broken) from None
            if isinstance(error, PeerLate):
                self._timed_out(call, what, seconds, error, overrun)
            if isinstance(error, PeerClosed):
                self._lost(call, what, seconds, error)
            if isinstance(error, CallsDiffer):
                self._differ(call, what)
            if isinstance(error, AccessRefused):
                error = CollectiveError(
                    f"{call.where}: {what}: the kernel refuses this process the memory of rank {self._members.ranks[error.peer]} "
                    "(process_vm_readv), which it gave when the group was built. That process has changed (PR_SET_DUMPABLE, setuid), "
                    "or a rule of the system (kernel.yama.ptrace_scope, a seccomp filter). Both ranks are alive: build the context again, "
                    "which then copies large tensors through shared memory",
                    **call.facts,
                )
            assert isinstance(error, CollectiveError)
            self._break(call, error, what)

    def break_off(self, call: Call, why: str) -> None:
        """End the group because of an error outside of any call, so that the peers, who go on, raise as well. Send nothing to them."""
        with self._failing:
            if self.broken is None and self._members.world_size > 1:
                self._publish(_Fault("lost", f"{call.sequence} {why}", self._members.rank, call.sequence, why))
                self._abort()
                self._remember(PeerLostError(f"{call.where}: {why}", **call.facts))

    def announce(self, sequence: int, why: str) -> None:
        """Write for the peers why this rank is about to leave the group, after so many calls. Blocks as long as the store does."""
        if self._store is not None and self.broken is None:
            fault = _Fault("lost", f"{sequence} {why}", self._members.rank, sequence, why)
            self._store.set(f"fault/{self._members.rank_in_group}", json.dumps(attrs.asdict(fault)))

    def _timed_out(self, call: Call, what: str, seconds: float, error: PeerLate, overrun: float) -> NoReturn:
        ranks = self._members.ranks
        at = call_site()
        head = f"{call.where}: call #{call.sequence}, {what}, at {at}, did not end within a timeout of {seconds:g} s; "
        head += f"it waited for rank {ranks[error.peer]}"
        if overrun > _STOOD_STILL:
            head += f", and was not run itself for {overrun:.1f} s of it or more (stopped, or on a machine that stood still)"
        self._note(call, what, at)
        self._publish(_Fault("timeout", f"{call.sequence} {what}", None, call.sequence, f"{what} at {at}"))
        self._abort()
        raise self._remember(self._late(call, head, seconds, what)) from None

    def _late(self, call: Call, head: str, seconds: float, what: str | None = None, *, in_time: bool = False) -> CollectiveError:
        """Return the error of a call for which some rank waited in vain: who gave up, and who has said nothing.

        Args:
            call: of this rank.
            head: of the message.
            seconds: deadline of the call.
            what: the call with its arguments, to be compared with those of the ranks that gave up; None where this rank did not wait in
                vain itself: a message that another one waited for differs from this call, and is no mismatch.
            in_time: this rank's own deadline had not passed.
        """
        ranks, me = self._members.ranks, self._members.rank_in_group
        # A rank that closes is about to leave, and what it learns here is for its log.
        longest = _CLOSING if call.operation == CLOSE else _LONGEST_WORD
        faults = self._read_faults(range(len(ranks)), wait=min(longest, max(seconds, _SHORTEST_WORD)))
        lines = [f"  rank {ranks[peer]} gave up in call #{fault.sequence}, {fault.text}" for peer, fault in sorted(faults.items())]
        silent = [ranks[i] for i in range(len(ranks)) if i != me and i not in faults]
        if silent:
            named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
            lines.append(f"  no word from {named}: late, dead, or elsewhere in the program")
        elif in_time:
            lines.append(f"  they waited for rank {ranks[me]}, this one, which was late or stopped")
        differs = what is not None and any(fault.kind == "timeout" and fault.at != f"{call.sequence} {what}" for fault in faults.values())
        kind: type[CollectiveError] = CollectiveMismatchError if differs else CollectiveTimeoutError
        return kind(head + ":\n" + "\n".join(lines), **call.facts)

    def _raise_if_closing(self, call: Call) -> None:
        """Raise where this rank, too, closes the group, on another thread."""
        if self.closed or (self.closing and call.operation != CLOSE):
            raise ContextClosedError(f"{call.where}: its context was closed during the call") from None

    def _lost(self, call: Call, what: str, seconds: float, error: PeerClosed) -> NoReturn:
        self._raise_if_closing(call)
        ranks = self._members.ranks
        # A peer whose deadline passed closes its connection a moment before it has published why.
        faults = self._read_faults([error.peer], wait=0.0 if isinstance(error, PeerLeft) else 0.25)
        self._raise_if_closing(call)
        fault = faults.get(error.peer) or next(iter(faults.values()), None)
        at = call_site()
        lost: int | None = ranks[error.peer]
        kind: type[CollectiveError] = PeerLostError
        during = f"call #{call.sequence}, {what}, at {at}"
        if fault is None and isinstance(error, PeerLeft):
            context = context_of(self._members.uid)
            closed = f"context {context!r}" if context else "its World"
            message = f"{call.where}: rank {lost} has closed {closed}, and takes no part in {during}"
        elif fault is None:
            message = f"{call.where}: rank {lost} is gone (died, or closed its side) during {during}: {error.reason}"
            if self._store_is_gone:
                message += ". The store, which knows why, is gone too: where this process was late or stopped, the others gave up on it"
        else:
            kind = {"timeout": CollectiveTimeoutError, "mismatch": CollectiveMismatchError, "other": CollectiveError}.get(
                fault.kind, PeerLostError
            )
            lost = fault.lost
            gone = f"rank {lost} is gone (a peer reported it in its call #{fault.sequence})"
            if lost == ranks[error.peer]:
                gone = f"rank {lost} left the group (it had begun {fault.sequence} calls): {fault.text}"
            gave_up = f"rank {ranks[error.peer]} gave up in call #{fault.sequence}, {fault.text}"
            message = f"{call.where}: ended in {during}, because {gave_up if lost is None else gone}"
        if kind is CollectiveTimeoutError:
            self._note(call, what, at)
        self._publish(_Fault(fault.kind if fault else "lost", f"{call.sequence} {what}", lost, call.sequence, f"{what} at {at}"))
        self._abort()
        if kind is CollectiveTimeoutError:
            # The peer's deadline was a moment before this rank's, which waits in the same call: as in `_timed_out`, the arguments count.
            theirs = "" if fault is None else fault.at
            both = theirs.startswith(f"{call.sequence} {call.operation}(") and theirs != f"{call.sequence} {what}"
            raise self._remember(self._late(call, message, seconds, what if both else None, in_time=True)) from None
        raise self._remember(kind(message, **call.facts | ({} if lost is None else {"rank": lost}))) from None

    def _differ(self, call: Call, what: str) -> NoReturn:
        """Post a note with this rank's call, read those of the peers, and raise with all of them."""
        ranks, n, me = self._members.ranks, self._members.world_size, self._members.rank_in_group
        said: dict[int, str] = {me: f"call #{call.sequence}, {what}, at {call_site()}"}
        if self._notes is not None:
            self._notes.post_note(said[me])
            patience = time.monotonic() + 1.0
            while len(said) < n and time.monotonic() < patience:
                said |= {peer: note for peer in range(n) if peer not in said and (note := self._notes.read_note(peer)) is not None}
                time.sleep(0.001)
        else:
            text = said[me].partition(", ")[2]
            self._publish(_Fault("mismatch", f"{call.sequence} {what}", None, call.sequence, text))
            said |= {peer: f"call #{fault.sequence}, {fault.text}" for peer, fault in self._read_faults(range(n), wait=1.0).items()}
        if call.operation != CLOSE and any(f", {CLOSE}()" in note for note in said.values()):
            # A rank closes the group while a thread of this one is in a call: if this rank closes it, too, that is no mismatch.
            patience = time.monotonic() + _CLOSING
            while not self.closing and not self.closed and time.monotonic() < patience:
                time.sleep(0.001)
            self._raise_if_closing(call)
        lines = [f"  rank {ranks[peer]}: {said.get(peer, 'has not said what it called')}" for peer in range(n)]
        self._break(
            call,
            CollectiveMismatchError(f"{call.where}: the ranks of the group called different things:\n" + "\n".join(lines), **call.facts),
            what,
        )

    def _break(self, call: Call, error: CollectiveError, what: str) -> NoReturn:
        kinds = {CollectiveMismatchError: "mismatch", CollectiveTimeoutError: "timeout", CollectiveError: "other"}
        kind = kinds.get(type(error), "lost")
        lost = error.rank if isinstance(error, PeerLostError) else None
        self._publish(_Fault(kind, f"{call.sequence} {what}", lost, call.sequence, f"{what}: {error}"))
        self._abort()
        raise self._remember(error)

    def _remember(self, error: CollectiveError) -> CollectiveError:
        if self.broken is None:
            self.broken = error
        return error

    def _publish(self, fault: _Fault) -> None:
        store, key = self._store, f"fault/{self._members.rank_in_group}"
        if store is None or self.broken is not None:
            return
        text = json.dumps(attrs.asdict(fault))
        # The store may be gone with the rest of the job, or not answer: then nothing is published.
        with contextlib.suppress(TimeoutError, *STORE_ERRORS):
            attend(lambda _: store.set(key, text), Deadline.after(_PUBLISH_SECONDS), grace=0)

    def _read_faults(self, awaited: Sequence[int], *, wait: float) -> dict[int, _Fault]:
        """Return the peers' `_Fault`s by rank in the group, waiting up to `wait` seconds for those of the ranks in `awaited`."""
        me = self._members.rank_in_group
        missing = set(awaited) - {me}
        # Notes are there as well where the store has ended with its process.
        found = {peer: fault for peer in range(self._members.world_size) if peer != me and (fault := self._noted(peer)) is not None}
        store = self._store

        def read(is_left: Callable[[], bool]) -> None:
            patience = time.monotonic() + wait
            while store is not None and not is_left():
                for peer in range(self._members.world_size):
                    if peer != me and peer not in found and store.check([f"fault/{peer}"]):
                        found[peer] = _Fault(**json.loads(store.get(f"fault/{peer}")))
                if missing <= found.keys() or time.monotonic() >= patience:
                    return
                time.sleep(0.02)

        # Where the store does not answer, as where its process was stopped, this rank has an error of its own. TypeError: not commgraph's.
        try:
            attend(read, Deadline.after(max(wait, _PUBLISH_SECONDS)), grace=0)
        except (TimeoutError, TypeError, *STORE_ERRORS):
            self._store_is_gone = True
        return dict(found)

    def _note(self, call: Call, what: str, at: str) -> None:
        """Post a note that this rank gave up, if there are notes."""
        if self._notes is not None:
            self._notes.post_note(f"{_GAVE_UP}{call.sequence}, {what} at {at}")

    def _noted(self, peer: int) -> _Fault | None:
        """Return the fault of a peer that gave up on a call, from its note in shared memory."""
        note = None if self._notes is None else self._notes.read_note(peer)
        if note is None or not note.startswith(_GAVE_UP):
            return None
        number, _, text = note.removeprefix(_GAVE_UP).partition(", ")
        what, at, _ = text.partition(" at ")
        return _Fault("timeout", f"{number} {what}", None, int(number), text) if at else None  # one that is too long for a note is cut


def _nothing() -> None:
    """Stand in for what ends the calls of a group that was closed."""


def called_method() -> str:
    """Return the name of the coordinator's method that the user has called, from the stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename != _METHODS or frame.f_code.co_name.startswith("_")):
        frame = frame.f_back
    return frame.f_code.co_name if frame.f_back is not None else "a call"


def call_site() -> str:
    """Return file and line of the innermost caller outside commgraph; in a job of a lane, of the call that began it."""
    site: str | None = getattr(threading.current_thread(), "commgraph_site", None)
    if site is not None:
        return site
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
