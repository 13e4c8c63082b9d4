"""The ranks of a `World` find each other in a store that may hold the leavings of earlier jobs, or belong to one that is just ending.

::

    pending/<rank>          the tokens with which this rank's process waits, one for each World that it is building, in order
    invite/<token>          written by rank 0: the token of its World that this one shall join
    <token of rank 0>/here/<rank>       the answer to the invitation
    <token of rank 0>/tokens            all tokens, once all ranks have answered: the World's name is their digest

Tokens are random, so a process that has died answers no invitation, and no key of an earlier World is taken for one of this. A new process
of a rank replaces the tokens of the one before, and rank 0 invites it in place of that. Every step can be made again: where the
store begins anew (its server has ended, its file was removed) the ranks write what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence

import attrs
import msgspec
import torch.distributed as dist

from commgraph.deadline import Deadline
from commgraph.errors import BuildError
from commgraph.meeting import STORE_ERRORS, attend, forget, listing, poll, write
from commgraph.processes import Process, seconds_since_boot

__all__ = ["Session", "open_session"]

# Seconds between two looks at whether what this rank has written is still there.
_RENEW = 0.2
# Seconds that a rank that gives up takes to say so, at most.
_LEAVE = 1.0
# Seconds that rank 0 stays after it has said why it gives up: the store may end with its process.
_LINGER = 0.5
# Seconds before a rank began to search in which a peer may have begun to wait, and died, so that it died in this search.
_RECENT = 5.0


class _Hello(msgspec.Struct, frozen=True):
    """A rank that waits for the others.

    Attributes:
        token: of this World on this rank; random.
        process: that waits.
        since: when it began to wait, in seconds since boot.
    """

    token: str
    process: Process
    since: float


@attrs.frozen
class Session:
    """The ranks of one World, found.

    Attributes:
        store: in which all of them are; as the caller gave it, or opened again.
        name: of this World, which no other has; no rank can choose it alone.
        me: this process.
        processes: of all ranks.
        leavings: keys in `store` that can go once all ranks have read them; of this rank.
    """

    store: dist.Store
    name: str
    me: Process
    processes: tuple[Process, ...]
    leavings: tuple[str, ...] = ()


def open_session(
    store: dist.Store,
    rank: int,
    world_size: int,
    deadline: Deadline,
    reopen: Callable[[], dist.Store] | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Session:
    """Find the other ranks. Collective; the n-th World that a process builds with a store meets the n-th of the others.

    Args:
        store: where the ranks meet.
        rank: this rank.
        world_size: ranks in all, at least two.
        deadline: by which all have come.
        reopen: opens the store again after its server has ended, as that of the World before may do just now; None: it cannot.
        guard: called several times a second, to raise where the search is in vain.

    Raises:
        BuildError: ranks did not come, a rank on this host died meanwhile, or the store failed.
    """
    search = _Search(store, rank, world_size, deadline, reopen)

    def watch() -> None:
        guard()
        search.watch()

    try:
        return attend(search.run, deadline, watch)
    except TimeoutError as error:
        raise BuildError(f"rank {rank} of {world_size}: the store that the ranks meet in gives {error}") from None
    except BaseException as error:
        why = str(error) if isinstance(error, DeadRankError) else ""
        with contextlib.suppress(TimeoutError, *STORE_ERRORS):
            attend(lambda _: search.leave(why), Deadline.after(_LEAVE))
        if why:
            raise BuildError(why) from error.__cause__
        raise


class DeadRankError(BuildError):
    """A rank died while the ranks were searching for each other."""


class _Search:
    """One rank's part in finding the others."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, deadline: Deadline, reopen: Callable[[], dist.Store] | None) -> None:
        self._rank, self._size, self._deadline, self._reopen = rank, world_size, deadline, reopen
        self._me = _Hello(secrets.token_hex(16), Process.own(), seconds_since_boot())
        # Of rank 0, those that it has invited and those that have answered, by rank; of the others, the token of rank 0.
        self._invited: dict[int, str] = {}
        self._answers: dict[int, _Hello] = {0: self._me} if rank == 0 else {}
        self._host = ""
        # Processes that wait in this search and not in an earlier one of a job that has died, by rank.
        self._seen: dict[int, Process] = {}
        self._renewed = 0.0
        self._has_written = False
        self._use(store)

    def _use(self, store: dist.Store) -> None:
        self._raw, self._store = store, dist.PrefixStore("commgraph", store)

    def run(self, is_left: Callable[[], bool]) -> Session:
        """Search until all are found."""
        found = poll(self._look, self._deadline, is_left, lambda: f"rank {self._rank}: {self._absent()} of {self._size} did not come yet")
        if found is None:
            raise BuildError(
                f"rank {self._rank}: {self._absent()} of {self._size} did not come within {self._deadline.seconds:g} s. Either they died "
                "(look at their own output), or they wait elsewhere: ranks on several nodes, or started through a script, need the same "
                "MASTER_ADDR and MASTER_PORT"
            )
        self.leave()
        # Rank 0's list is read by all of the others.
        leavings = (f"commgraph/{self._me.token}/tokens",) if self._rank == 0 else ()
        name = hashlib.sha256(msgspec.json.encode([hello.token for hello in found])).hexdigest()[:32]
        return Session(self._raw, name, self._me.process, tuple(hello.process for hello in found), leavings)

    def watch(self) -> None:
        """Raise where a rank on this host has died."""
        for rank, process in tuple(self._seen.items()):
            if process.has_ended():
                raise DeadRankError(
                    f"rank {self._rank} of {self._size}: rank {rank} (process {process.pid}) died before all ranks had come"
                )

    def leave(self, why: str = "") -> None:
        """Remove what this rank has written, once it is found or gives up, and say why where no other rank could know."""
        if why:
            for hello in self._pending(0)[:1]:
                self._store.set(f"{hello.token}/failed", why)
            if self._rank == 0:
                time.sleep(_LINGER)
        if self._rank == 0:
            forget(self._store, [f"invite/{token}" for rank, token in self._invited.items() if rank not in self._answers])
            forget(self._store, [f"{self._me.token}/here/{rank}" for rank in range(1, self._size)])
        self._change_pending(lambda hellos: [hello for hello in hellos if hello != self._me])
        forget(self._store, [f"invite/{self._me.token}"])

    def _look(self) -> Sequence[_Hello] | None:
        try:
            if time.monotonic() - self._renewed > _RENEW:
                self._renewed = time.monotonic()
                self._renew()
            return self._look_as_host() if self._rank == 0 else self._look_as_guest()
        except BuildError:
            raise
        except STORE_ERRORS as error:
            self.watch()
            if self._reopen is None:
                raise BuildError(f"rank {self._rank} of {self._size}: the store that the ranks meet in failed: {error}") from error
            self._use(self._reopen())
            self._host, self._renewed = "", 0.0
            return None

    def _renew(self) -> None:
        """Write this rank's token where it is missing."""
        own = self._me.process
        self._change_pending(
            lambda hellos: (
                hellos if self._me in hellos else [*(hello for hello in hellos if hello.process == own and hello != self._me), self._me]
            )
        )
        if self._rank:
            hellos = self._pending(0)
            self._see(0, hellos)
            for hello in hellos[:1]:
                if self._store.check([f"{hello.token}/failed"]):
                    why = self._store.get(f"{hello.token}/failed").decode(errors="replace")
                    raise BuildError(f"rank {self._rank} of {self._size}: another rank found that a rank has died. {why}")
            if self._host and not self._store.check([f"{self._host}/here/{self._rank}"]):
                self._answer()

    def _look_as_host(self) -> Sequence[_Hello] | None:
        mine = self._pending(0)
        if not mine or mine[0] != self._me:  # another World of this process has begun before
            return None
        for rank in range(1, self._size):
            if rank in self._answers:
                continue
            hellos = self._pending(rank)
            self._see(rank, hellos)
            if self._invited.get(rank) not in [hello.token for hello in hellos]:
                chosen = next((hello.token for hello in hellos), None)
                if chosen is None:
                    continue
                self._store.set(f"invite/{chosen}", self._me.token)
                self._invited[rank] = chosen
            here = f"{self._me.token}/here/{rank}"
            if self._store.check([here]) and (answer := _decode(self._store.get(here))) and answer[0].token == self._invited[rank]:
                self._answers[rank] = answer[0]
        if len(self._answers) < self._size:
            return None
        found = [self._answers[rank] for rank in range(self._size)]
        write(self._store, f"{self._me.token}/tokens", _encode(found))
        return found

    def _look_as_guest(self) -> Sequence[_Hello] | None:
        invite = f"invite/{self._me.token}"
        if self._host and self._store.check([f"{self._host}/tokens"]):
            found = _decode(self._store.get(f"{self._host}/tokens"))
            if len(found) != self._size or found[self._rank] != self._me:
                raise BuildError(f"rank {self._rank} of {self._size}: what the store holds for the ranks that came is not rank 0's")
            return found
        if self._store.check([invite]) and (host := self._store.get(invite).decode("ascii", "replace")) != self._host:
            self._host = host
            self._answer()
        return None

    def _answer(self) -> None:
        write(self._store, f"{self._host}/here/{self._rank}", _encode([self._me]))

    def _see(self, rank: int, hellos: Sequence[_Hello]) -> None:
        """Watch the process that waits as `rank`, unless it has died and waited in an earlier job: a new one may come in its place."""
        for hello in hellos[:1]:
            if self._me.process.can_watch(hello.process):
                recent = hello.since > max(self._me.process.seconds_started, self._me.since - _RECENT)
                if recent or not hello.process.has_ended():
                    self._seen[rank] = hello.process

    def _absent(self) -> str:
        """Name the ranks that did not come."""
        try:
            if self._rank == 0:
                absent = [rank for rank in range(self._size) if rank not in self._answers]
            else:
                # Rank 0 has to be there first; a rank that has given up has taken back what it wrote.
                others = [rank for rank in range(1, self._size) if rank != self._rank and not self._pending(rank)]
                absent = others if others and self._pending(0) else [0]
        except STORE_ERRORS:
            absent = [0]
        return f"rank{'s' if len(absent) > 1 else ''} {listing(absent)}"

    # The list of a rank.

    def _pending(self, rank: int) -> list[_Hello]:
        key = f"pending/{rank}"
        return _decode(self._store.get(key)) if self._store.check([key]) else []

    def _change_pending(self, change: Callable[[list[_Hello]], list[_Hello]]) -> None:
        """Change this rank's list, which other threads of this process may change at the same time."""
        key = f"pending/{self._rank}"
        # The very first operation on the store says that this process is there, so that its death is noticed from then on.
        old = self._store.get(key) if self._has_written and self._store.check([key]) else b""
        self._has_written = True
        while True:
            hellos = _decode(old)
            changed = change(hellos)
            if changed == hellos:
                return
            new = _encode(changed)
            try:
                came = bytes(self._store.compare_set(key, old, new))  # type: ignore[arg-type]  # torch takes bytes as well
            except (NotImplementedError, TypeError):  # a store written in Python, that has none
                write(self._store, key, new)
                return
            if came == new:
                return
            old = b"" if came == old else came  # what was expected comes back where there is no such key


def _encode(hellos: Sequence[_Hello]) -> bytes:
    return msgspec.json.encode(list(hellos))


def _decode(value: bytes) -> list[_Hello]:
    """Return what `_encode` was given; nothing for what is not commgraph's, or another version's."""
    try:
        return msgspec.json.decode(value or b"[]", type=list[_Hello])
    except (msgspec.MsgspecError, ValueError):
        return []
