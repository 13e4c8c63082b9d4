"""`Membership`: the ranks of a world that are still alive agree on who they are, and build a new World together, or fail together.

Every rank connects to every other at the addresses that the build of the old World has exchanged, so that no store is needed, and the end
of a connection is the death of a rank. The agreement goes by rounds; each message names its round::

    hello   a rank has come, and how long it waits for others
    view    the ranks that it takes for alive; the lowest of them adds the port of the store in which they would build
    built   whether it has built the new World, and which ranks it lost meanwhile
    end     the result: every member has built it, or all give up, and why
    out     to a rank that is not among those that go on

A view in which all of its members agree is built; everything else (views that differ, a rank that dies) leads to a further round with fewer
members. A rank returns once every member has built, and before that it tells all of them. A rank that lost a member in this moment and
began a further round therefore still hears it from whoever has returned, since it waits for a view of each member.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

import attrs
import msgspec
import torch.distributed as dist

from commgraph.communicators.base import PeerClosed
from commgraph.communicators.endpoint import Endpoint, Link
from commgraph.deadline import Deadline
from commgraph.errors import BuildError
from commgraph.meeting import PeerLeftError, attend, listing
from commgraph.reach import Reach
from commgraph.rendezvous import serve_store, visit_store

__all__ = ["Latecomers", "Membership", "View"]

W = TypeVar("W")

# Seconds that one wait for messages takes at most.
_SLICE = 0.02
# Seconds within which a rank that has come answers in a round.
_STEP = 10.0
# Seconds that a rank stays after the end, at most, until the others have heard of it.
_LINGER = 1.0
_LENGTH = struct.Struct("!I")
# Bytes of a message: a view of a million ranks has fewer.
_LONGEST = 1 << 23


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message.

    Attributes:
        kind: "hello", "view", "built", "end" or "out".
        round: that it is about.
        ranks: members of a view; those that were lost ("built"); those that go on ("out").
        port: of the store of a view.
        seconds: that a rank waits for others.
        why: what failed; empty: nothing.
        follows: it failed because another rank did.
    """

    kind: str
    round: int = 0
    ranks: tuple[int, ...] = ()
    port: int = 0
    seconds: float = 0.0
    why: str = ""
    follows: bool = False


@attrs.define(eq=False)
class _Peer:
    """What is known of another rank.

    Attributes:
        rank: in the old World.
        connection: to it.
        is_here: whether it takes part.
        lost: why it does not count any more; empty: it does.
        unread: bytes of an incomplete message.
        views, built: its messages, by round.
    """

    rank: int
    connection: socket.socket | None = None
    is_here: bool = False
    lost: str = ""
    unread: bytearray = attrs.field(factory=bytearray)
    views: dict[int, _Message] = attrs.field(factory=dict)
    built: dict[int, _Message] = attrs.field(factory=dict)


@attrs.frozen
class View:
    """Ranks that build a World together.

    Attributes:
        ranks: in the old World, ascending.
        rank: this rank's number in the new one.
        store: that all of them reach, served by the first; None for one rank.
        deadline: of the build.
        guard: raises where the build is in vain because a rank was lost; called several times a second.
    """

    ranks: tuple[int, ...]
    rank: int
    store: dist.Store | None
    deadline: Deadline
    guard: Callable[[], None]


class Membership(Generic[W]):
    """One rank's part in the agreement."""

    def __init__(self, reach: Reach, rank: int, seconds: float) -> None:
        """Without a connection as yet.

        Args:
            reach: of the old World.
            rank: this rank in it.
            seconds: to wait for ranks that are alive, or seem to be, and do not come.
        """
        self.group = hashlib.sha256(f"{reach.name}\0survivors".encode()).digest()[:16]
        self._reach = reach
        self._rank = rank
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._peers = {peer: _Peer(peer) for peer in range(len(reach.addresses)) if peer != rank}
        # Those of this round; None while ranks may still come.
        self._members: tuple[int, ...] | None = None
        self._round = 0
        # Round and members of what this rank has built; and how it ended, as soon as that is known.
        self._built: tuple[int, tuple[int, ...]] | None = None
        self._end: _Message | None = None
        self._refusal: tuple[int, _Message] | None = None
        self._store: dist.Store | None = None

    def settle(self, build: Callable[[View], W], drop: Callable[[W], None]) -> tuple[tuple[int, ...], W]:
        """Return the members and what `build` has made of them. Collective over the ranks that are alive.

        Args:
            build: makes the new World of a view. Collective over the view.
            drop: gives up what was made of a view that did not come about.

        Raises:
            BuildError: the others go on without this rank, or the new World could not be built although nobody was lost.
        """
        made: W | None = None
        try:
            members = self._gather()
            while True:
                members, settled = self._compare(members)
                if self._end is None and made is not None:
                    drop(made)
                    made = self._built = None
                if self._end is None and settled:
                    result, deadline = _Message("built", self._round), Deadline.after(max(self._seconds, _STEP))
                    try:
                        made = build(self._view(members, deadline))
                        self._built = (self._round, members)
                    except Exception as error:
                        follows = isinstance(error, PeerLeftError) or isinstance(error.__cause__, PeerLeftError)
                        result = _Message("built", self._round, why=f"{type(error).__name__}: {error}", follows=follows)
                    members = self._vote(members, result, deadline)
                if self._end is not None:
                    break
                self._round += 1
            # Whoever has not heard it hears it from this rank, which may be the only one that has.
            self._send(self._built[1] if self._built is not None else members, self._end)
            if self._end.why or self._built is None or made is None:
                raise BuildError(f"rank {self._rank}: survivors(): the World of ranks {listing(members)} was not built: {self._end.why}")
            members = self._built[1]
            self._finish(members)
            return members, made
        except BaseException:
            if made is not None:
                drop(made)
            raise
        finally:
            for peer in self._peers.values():
                self._close(peer)

    # Steps.

    def _gather(self) -> tuple[int, ...]:
        """Wait until every rank has come, is lost, or is late."""
        while any(not peer.lost and not peer.is_here for peer in self._peers.values()) and time.monotonic() < self._until:
            self._advance()
        members = tuple(sorted({self._rank, *(peer.rank for peer in self._peers.values() if peer.is_here and not peer.lost)}))
        self._members = members
        # Those that are late will read it.
        self._dismiss([peer.rank for peer in self._peers.values() if not peer.lost and not peer.is_here], members)
        return members

    def _compare(self, members: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Exchange views; return the members that follow from them, and whether all views are the same."""
        self._members = members
        port = 0
        if members[0] == self._rank and len(members) > 1:
            self._store = serve_store(self._reach.addresses[self._rank][0]) if self._store is None else self._store
            port = int(self._store.port)  # type: ignore[attr-defined]  # of a TCPStore
        self._send(members, _Message("view", self._round, members, port))
        self._await(members, lambda peer: self._round in peer.views, max(self._until - time.monotonic(), 0.0) + _STEP)
        left, alike = set(members), True
        # In the order of ranks: where two of them lost each other, the lower one stays.
        for rank in members:
            said = members if rank == self._rank else self._said_by(rank)
            alike = alike and said == members
            if said is None:
                left.discard(rank)
            elif rank in left:
                left &= {*said}
                if self._rank not in left and self._end is None:
                    raise self._refused(rank, said)
        agreed = tuple(sorted(left | {self._rank}))
        self._dismiss([rank for rank in members if rank not in agreed], agreed)
        return agreed, alike

    def _said_by(self, rank: int) -> tuple[int, ...] | None:
        """Return the view of a rank in this round; None where it is lost."""
        peer = self._peers[rank]
        return None if peer.lost or self._round not in peer.views else peer.views[self._round].ranks

    def _view(self, members: tuple[int, ...], deadline: Deadline) -> View:
        store: dist.Store | None = None
        if len(members) > 1:
            first = members[0]
            if first == self._rank:
                store = self._store
            else:
                host, port = self._reach.addresses[first][0], self._peers[first].views[self._round].port
                store = attend(lambda is_left: visit_store(host, port, deadline, is_left), deadline, self._guard)
            assert store is not None
            store = dist.PrefixStore(f"round/{self._round}", store)
        return View(members, members.index(self._rank), store, deadline, self._guard)

    def _guard(self) -> None:
        """Raise where a member is lost, or has given this round up."""
        self._advance(0)
        for peer in self._others(self._members or ()):
            failed = self._round in peer.built and peer.built[self._round].why
            if peer.lost or failed or max(peer.views, default=0) > self._round:
                why = peer.lost or failed or "it lost another one"
                raise PeerLeftError(f"rank {self._rank}: survivors(): rank {peer.rank} left while the new World was built: {why}")

    def _vote(self, members: tuple[int, ...], result: _Message, deadline: Deadline) -> tuple[int, ...]:
        """Exchange results, which may be the end; return the members that are left."""
        lost = tuple(peer.rank for peer in self._others(members) if peer.lost)
        result = msgspec.structs.replace(result, ranks=lost)
        self._send(members, result)
        seconds = deadline.left() + _STEP
        self._await(members, lambda peer: self._round in peer.built or max(peer.views, default=0) > self._round, seconds)
        if self._end is not None:
            return members
        said = {peer.rank: peer.built[self._round] for peer in self._others(members) if self._round in peer.built}
        said[self._rank] = result
        if len(said) == len(members) and not any(one.why for one in said.values()):
            self._end = _Message("end", self._round)
            return members
        left = {rank for rank in members if rank == self._rank or not self._peers[rank].lost}
        for rank in members:
            if rank in left and rank in said:
                left -= {*said[rank].ranks} - {self._rank}
        if len(left) == len(members) == len(said):
            # Nobody was lost: another attempt would fail as this one.
            by = min((rank for rank in members if said[rank].why), key=lambda rank: (said[rank].follows, rank))
            self._end = _Message("end", self._round, why=f"rank {by} could not build it: {said[by].why}")
            return members
        agreed = tuple(sorted(left))
        self._dismiss([rank for rank in members if rank not in left], agreed)
        return agreed

    def _finish(self, members: tuple[int, ...]) -> None:
        """Stay until the members have read what was sent."""
        for peer in self._others(members):
            if peer.connection is not None:
                with contextlib.suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _LINGER
        while any(not peer.lost for peer in self._others(members)) and time.monotonic() < until:
            self._advance()

    # Messages.

    def _others(self, members: Collection[int]) -> list[_Peer]:
        return [self._peers[rank] for rank in members if rank != self._rank]

    def _await(self, members: Sequence[int], has_said: Callable[[_Peer], bool], seconds: float) -> None:
        """Wait until each member has said something, or is lost, or the end is known; one that does not answer in time is lost, too."""
        until = time.monotonic() + seconds
        while waiting := [peer for peer in self._others(members) if not peer.lost and not has_said(peer)]:
            if self._end is not None:
                return
            if time.monotonic() > until:
                for peer in waiting:
                    peer.lost = "it did not answer"
                return
            self._advance()

    def _advance(self, seconds: float = _SLICE) -> None:
        """Connect, and read what has come; wait up to so many seconds for that.

        Raises:
            BuildError: the others go on without this rank.
        """
        watched = select.poll()
        watched.register(self._reach.endpoint.fileno(), select.POLLIN)
        for peer in self._peers.values():
            if peer.connection is None and not peer.lost and self._members is None:
                self._connect(peer)
            if peer.connection is not None:
                watched.register(peer.connection, select.POLLIN)
        if seconds:
            watched.poll(seconds * 1000)
        self._reach.endpoint.serve()
        for peer in self._peers.values():
            if peer.connection is not None:
                self._read(peer)
        if self._refusal is not None:
            raise self._refused(self._refusal[0], self._refusal[1].ranks)

    def _connect(self, peer: _Peer) -> None:
        link = Link(self.group, 0, min(self._rank, peer.rank), max(self._rank, peer.rank))
        try:
            peer.connection = self._reach.endpoint.find(link, peer.rank, self._reach.addresses[peer.rank])
        except PeerClosed as error:
            peer.lost = error.reason
            return
        if peer.connection is not None:
            self._send([peer.rank], _Message("hello", seconds=max(self._until - time.monotonic(), 0.0)))

    def _send(self, ranks: Collection[int], message: _Message) -> None:
        data = msgspec.msgpack.encode(message)
        for peer in self._others(ranks):
            if peer.connection is not None:
                try:
                    # Far less than fits into the socket's buffer, which is as large as it ever gets.
                    peer.connection.sendall(_LENGTH.pack(len(data)) + data)
                except OSError as error:
                    peer.lost = peer.lost or error.strerror or str(error)

    def _read(self, peer: _Peer) -> None:
        connection, ended = peer.connection, ""
        assert connection is not None
        try:
            while data := connection.recv(1 << 16):
                peer.unread += data
            ended = "it ended its connection"
        except BlockingIOError:
            pass
        except OSError as error:
            ended = error.strerror or str(error)
        while len(peer.unread) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(peer.unread)
            if length > _LONGEST:
                ended = f"a message of {length} bytes"
                break
            if len(peer.unread) < _LENGTH.size + length:
                break
            data = bytes(peer.unread[_LENGTH.size : _LENGTH.size + length])
            del peer.unread[: _LENGTH.size + length]
            try:
                self._take(peer, msgspec.msgpack.decode(data, type=_Message))
            except msgspec.MsgspecError as error:
                ended = f"a message that is none: {error}"
        if ended:
            peer.lost = peer.lost or ended
            self._close(peer)

    def _take(self, peer: _Peer, message: _Message) -> None:
        if message.kind == "hello":
            peer.is_here = True
            if self._members is None:
                self._until = max(self._until, time.monotonic() + min(message.seconds, threading.TIMEOUT_MAX))
            elif peer.rank not in self._members:
                self._dismiss([peer.rank], self._members)
        elif message.kind == "view":
            peer.views[message.round] = message
        elif message.kind == "built":
            peer.built[message.round] = message
        elif message.kind == "end" and (message.why or (self._built is not None and message.round == self._built[0])):
            # Of an earlier round, too: whoever told it has returned, and takes part in no further one.
            self._end = self._end or message
        elif message.kind == "out":
            self._refusal = self._refusal or (peer.rank, message)

    def _dismiss(self, ranks: Collection[int], members: Sequence[int]) -> None:
        """Tell ranks that the members go on without them."""
        self._send(ranks, _Message("out", ranks=tuple(members)))
        for peer in self._others(ranks):
            peer.lost = peer.lost or "the others count it out"

    def _refused(self, by: int, ranks: Sequence[int]) -> BuildError:
        return BuildError(
            f"rank {self._rank}: survivors(): ranks {listing(ranks)} go on without this rank, as rank {by} says: it was lost to them "
            "(stopped, cut off, or late). It has no part in the job any more: end it, or have it join anew, by World.join"
        )

    def _close(self, peer: _Peer) -> None:
        if peer.connection is not None:
            peer.connection.close()
            peer.connection = None


class Latecomers:
    """Tells ranks that come late that the others go on without them: a thread, until it is closed."""

    def __init__(self, endpoint: Endpoint, group: bytes, members: Sequence[int], *, owns: bool) -> None:
        """Begin.

        Args:
            endpoint: of the old World.
            group: of the agreement.
            members: ranks of the old World that go on.
            owns: whether to close the endpoint at the end.
        """
        self._endpoint = endpoint
        self._group = group
        data = msgspec.msgpack.encode(_Message("out", ranks=tuple(members)))
        self._refusal = _LENGTH.pack(len(data)) + data
        self._owns = owns
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="commgraph-latecomers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        watched = select.poll()
        watched.register(self._stopped, select.POLLIN)
        watched.register(self._endpoint.fileno(), select.POLLIN)
        while not any(fd == self._stopped.fileno() for fd, _ in watched.poll()):
            self._endpoint.serve()
            for connection in self._endpoint.take(self._group):
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(_LINGER)
                    connection.sendall(self._refusal)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):  # unread data would have the kernel reset the connection
                        pass

    def disown(self) -> None:
        """Close the copies of a forked child. Idempotent."""
        self._endpoint.disown()
        self._stop.close()
        self._stopped.close()

    def close(self) -> None:
        """End. Idempotent."""
        with contextlib.suppress(OSError):
            self._stop.send(b"x")
        self._thread.join(_LINGER * 2)
        self._stop.close()
        self._stopped.close()
        if self._owns:
            self._endpoint.close()
