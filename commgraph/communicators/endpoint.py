"""`Endpoint`: where a process listens, and how two ranks connect and prove to each other who they are.

One for all groups of a world. A rank connects when it first needs a link, and accepts inside whatever call it waits in. If both ranks of a
link connect at once, the call of the higher one counts, and the lower one is told to wait for it. A rank that has closed the group says so,
as it has no link whose end would tell.

Both sides prove knowledge of the world's secret over both sides' random numbers (HMAC-SHA256), so that neither a stranger nor a recorded
handshake gets in; what follows is not encrypted. A handshake that takes longer than `_PATIENCE` is dropped, and at most `_STRANGERS` are
pending at once: for one more the oldest is dropped, of those that have said nothing if there are any. A rank whose call was dropped calls
again, up to `_CALLS` times, since that may have been one of a flood.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import select
import selectors
import socket
import struct
import threading
import time

import attrs

from commgraph.communicators.base import PeerClosed, PeerLate, PeerLeft
from commgraph.deadline import Deadline

__all__ = ["Endpoint", "Link"]

_MAGIC = b"commgraph\x01"
_NONCE_BYTES, _GROUP_BYTES, _PROOF_BYTES = 16, 16, 32
# Magic, group, channel, rank in the group that connects, and that it connects to, random number.
_HELLO = struct.Struct(f"!{len(_MAGIC)}s{_GROUP_BYTES}sBII{_NONCE_BYTES}s")
_ANSWER_BYTES = _NONCE_BYTES + _PROOF_BYTES
# What the side that was called answers: that it accepts, that its own call counts, that it has closed the group. Part of what it proves.
_ACCEPTS, _YIELDS, _LEFT = b"accepts", b"yields", b"left"
_CONNECTS = b"connects"

# Seconds that a handshake may take, how many may be pending, and how often a rank calls whose connection is dropped.
_PATIENCE = 5.0
_STRANGERS = 64
_CALLS = 8
# Seconds between two looks at what another thread may have accepted.
_SLICE = 0.02
# Seconds after which a host that does not answer counts as vanished.
_VANISHED = 15


@attrs.frozen
class Link:
    """Names one connection, on both of its sides.

    Attributes:
        group: 16 bytes that name the group in this world.
        channel: number of the connection between the two ranks.
        low, high: the two ranks in the group.
    """

    group: bytes
    channel: int
    low: int
    high: int


class Endpoint:
    """A listening socket, the handshakes that are pending on both sides, and connections that are made and not yet taken."""

    def __init__(self, address: str) -> None:
        """Listen. Until `trust` was called nobody gets in.

        Args:
            address: of this host, as the other ranks reach it; empty: all of its IPv4 addresses.

        Raises:
            OSError: it is no address of this host, or descriptors ran out.
        """
        self._secret: bytes | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._made: dict[Link, socket.socket | PeerClosed] = {}
        self._pending: dict[socket.socket, _Handshake] = {}
        # Handshakes of links that this rank calls for, and those that it was called for, by link.
        self._calling: dict[Link, _Handshake] = {}
        self._called: dict[Link, _Handshake] = {}
        # Calls that were dropped, by link.
        self._dropped: dict[Link, int] = {}
        # Links that a call of this rank has made.
        self._made_by_own: set[Link] = set()
        # Groups that this rank has closed.
        self._left: set[bytes] = set()
        self._listener = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            self._listener.bind((address, 0))
            self._listener.listen(128)
            self.address: tuple[str, int] = (address, self._listener.getsockname()[1])
            # Readable whenever one of its sockets is ready: native waits poll its descriptor.
            self._selector = selectors.EpollSelector()
        except BaseException:
            self._listener.close()
            raise
        self._selector.register(self._listener, selectors.EVENT_READ)

    def trust(self, secret: bytes) -> None:
        """Let in whoever knows a secret, which every rank of the world has, and nobody else."""
        self._secret = secret

    def fileno(self) -> int:
        """Return the descriptor that is readable while `serve` has something to do."""
        return self._selector.fileno()

    def find(self, link: Link, peer: int, address: tuple[str, int]) -> socket.socket | None:
        """Return the connected socket of a link, which does not block; None while there is none. It is given once.

        Args:
            link: whose.
            peer: the rank on its other side.
            address: of that rank.

        Raises:
            PeerClosed: nobody listens there, or another process; it has closed the group; or this endpoint was closed.
        """
        with self._lock:
            if self._closed:
                raise PeerClosed(peer, "this rank closed its world")
            if link.group in self._left:
                raise PeerClosed(peer, "this rank closed the group")
            if not any(link in known for known in (self._calling, self._called, self._made)):
                self._call(link, peer, address)
        self.serve()
        with self._lock:
            found = self._made.pop(link, None)
        if isinstance(found, PeerClosed):
            raise found
        return found

    def wait(self, link: Link, peer: int, address: tuple[str, int], deadline: Deadline) -> socket.socket:
        """Return the connected socket of a link as `find` does, once there is one.

        Raises:
            PeerLate: there was none in time.
            PeerClosed: as `find`.
        """
        watched = select.poll()
        watched.register(self.fileno(), select.POLLIN)
        while True:
            found = self.find(link, peer, address)
            if found is not None:
                return found
            if deadline.has_passed:
                raise PeerLate(peer)
            watched.poll(min(_SLICE, deadline.left()) * 1000)

    def take(self, group: bytes) -> list[socket.socket]:
        """Return the connections that other ranks have made for a group and that nobody has found; none of them is given again."""
        with self._lock:
            made = [link for link in self._made if link.group == group]
            taken = [self._made.pop(link) for link in made]
        return [connection for connection in taken if isinstance(connection, socket.socket)]

    def serve(self) -> None:
        """Accept, and advance handshakes, as far as that needs no wait. From any thread."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._closed or self._secret is None:
                return
            for key, _ in self._selector.select(0):
                if key.fileobj is self._listener:
                    self._accept_all()
                elif (handshake := self._pending.get(key.fileobj)) is not None:  # type: ignore[call-overload]  # always a socket
                    self._advance(handshake)
            now = time.monotonic()
            for handshake in [one for one in self._pending.values() if not one.calls and one.until < now]:
                self._end(handshake)
        finally:
            self._lock.release()

    def _call(self, link: Link, peer: int, address: tuple[str, int]) -> None:
        connection = socket.socket(_family(address[0]), socket.SOCK_STREAM)
        connection.setblocking(False)
        handshake = _Handshake(connection, time.monotonic(), calls=True, link=link, peer=peer, address=address)
        try:
            set_up(connection)
            error = connection.connect_ex(address)
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, os.strerror(error))
            self._selector.register(connection, selectors.EVENT_WRITE)
        except OSError as failed:
            connection.close()
            self._made[link] = handshake.failure(failed.strerror or str(failed))
            return
        self._calling[link] = handshake
        self._pending[connection] = handshake

    def _accept_all(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(_SLICE)  # it stays readable, and the wait must not spin
                return
            if len(self._strangers()) >= _STRANGERS:
                self._make_room()
            connection.setblocking(False)
            set_up(connection)
            self._pending[connection] = _Handshake(connection, time.monotonic() + _PATIENCE)
            self._selector.register(connection, selectors.EVENT_READ)

    def _strangers(self) -> list[_Handshake]:
        return [one for one in self._pending.values() if not one.calls]

    def _make_room(self) -> None:
        """Drop a stranger: the oldest that has said nothing, else the oldest."""
        strangers = self._strangers()
        for dropped in strangers:
            if not dropped.hello:
                self._advance(dropped)  # what it has said may be there, and not be read yet
            if not dropped.hello:
                break
        else:
            dropped = strangers[0]
        if dropped.connection in self._pending:
            self._end(dropped)

    def _advance(self, handshake: _Handshake) -> None:
        try:
            if handshake.calls:
                self._advance_calling(handshake)
            else:
                self._advance_called(handshake)
        except BlockingIOError:
            return
        except OSError as error:
            # Without a reason `find` calls again.
            self._end(handshake, "" if self._may_call_again(handshake, error) else error.strerror or str(error))

    def _may_call_again(self, handshake: _Handshake, error: OSError) -> bool:
        """Count a call of this rank that was answered and then dropped; whether it may be made again."""
        link = handshake.link
        if link is None or not handshake.calls or not handshake.hello or not isinstance(error, ConnectionError):
            return False
        calls = self._dropped[link] = self._dropped.get(link, 0) + 1
        if calls == _CALLS:
            del self._dropped[link]
        return calls < _CALLS

    def _advance_calling(self, handshake: _Handshake) -> None:
        connection, link = handshake.connection, handshake.link
        assert link is not None
        if not handshake.hello:
            if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            handshake.hello = _HELLO.pack(_MAGIC, link.group, link.channel, link.high, link.low, secrets.token_bytes(_NONCE_BYTES))
            connection.sendall(handshake.hello)
            self._selector.modify(connection, selectors.EVENT_READ)
            return
        answer = handshake.receive(_ANSWER_BYTES)
        if answer is None:
            return
        nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        said = next(
            (one for one in (_ACCEPTS, _YIELDS, _LEFT) if hmac.compare_digest(proof, self._prove(one, handshake.hello, nonce))), None
        )
        if said == _ACCEPTS:
            connection.sendall(self._prove(_CONNECTS, handshake.hello, nonce))
            self._made_by_own.add(link)
            self._finish(handshake, link)
        elif said == _YIELDS:
            self._end(handshake)  # the other side's call is on its way
        elif said == _LEFT:
            self._end(handshake)
            self._made[link] = PeerLeft(handshake.peer)
        else:
            self._end(handshake, "the process there does not know the job's secret")

    def _advance_called(self, handshake: _Handshake) -> None:
        connection = handshake.connection
        if not handshake.hello:
            hello = handshake.receive(_HELLO.size)
            if hello is None:
                return
            if not hello.startswith(_MAGIC):
                self._end(handshake)
                return
            _, group, channel, high, low, _ = _HELLO.unpack(hello)
            named = Link(group, channel, low, high)
            handshake.hello, handshake.nonce = hello, secrets.token_bytes(_NONCE_BYTES)
            own = self._calling.get(named)
            # A call of the low rank may still be under way when that of the high one has made the link.
            counts = named in self._made_by_own or (own is not None and own.peer == named.low)
            answer = _LEFT if group in self._left else _YIELDS if counts else _ACCEPTS
            connection.sendall(handshake.nonce + self._prove(answer, hello, handshake.nonce))
            if answer != _ACCEPTS:
                self._end(handshake)
            else:
                handshake.link = named
                self._called[named] = handshake
            return
        proof = handshake.receive(_PROOF_BYTES)
        if proof is None:
            return
        if not hmac.compare_digest(proof, self._prove(_CONNECTS, handshake.hello, handshake.nonce)):
            self._end(handshake)
            return
        link = handshake.link
        assert link is not None
        if (own := self._calling.get(link)) is not None:
            self._end(own)  # of the lower rank, whose call does not count
        self._finish(handshake, link)

    def _finish(self, handshake: _Handshake, link: Link) -> None:
        self._selector.unregister(handshake.connection)
        del self._pending[handshake.connection]
        self._forget_handshake(handshake)
        self._dropped.pop(link, None)
        before = self._made.pop(link, None)
        if isinstance(before, socket.socket):
            before.close()
        self._made[link] = handshake.connection

    def _end(self, handshake: _Handshake, why: str = "") -> None:
        """Drop a handshake; of a call that this rank made `why`, if there is one, is what `find` raises."""
        self._selector.unregister(handshake.connection)
        del self._pending[handshake.connection]
        handshake.connection.close()
        self._forget_handshake(handshake)
        if handshake.calls and why and handshake.link is not None:
            self._made[handshake.link] = handshake.failure(why)

    def _forget_handshake(self, handshake: _Handshake) -> None:
        for known in (self._calling, self._called):
            if handshake.link is not None and known.get(handshake.link) is handshake:
                del known[handshake.link]

    def _prove(self, role: bytes, hello: bytes, nonce: bytes) -> bytes:
        assert self._secret is not None
        return hmac.digest(self._secret, role + hello + nonce, hashlib.sha256)

    def leave(self, group: bytes) -> None:
        """Drop connections of a group that were not taken, and from now on tell whoever connects that this rank has closed it."""
        with self._lock:
            self._left.add(group)
            self._made_by_own = {link for link in self._made_by_own if link.group != group}
            self._dropped = {link: calls for link, calls in self._dropped.items() if link.group != group}
            for link in [one for one in self._made if one.group == group]:
                left = self._made.pop(link)
                if isinstance(left, socket.socket):
                    left.close()
            for handshake in [one for one in self._pending.values() if one.link is not None and one.link.group == group]:
                self._end(handshake)

    def disown(self) -> None:
        """Close the copies of a forked child, which are the parent's. Idempotent: its own children call it again."""
        if self._closed:
            return
        self._closed = True
        self._lock = threading.Lock()
        self._selector.close()
        for connection in (self._listener, *self._pending, *self._made.values()):
            if isinstance(connection, socket.socket):
                connection.close()

    def close(self) -> None:
        """Close the listener and what was not taken. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._selector.close()
            self._listener.close()
            for connection in (*self._pending, *self._made.values()):
                if isinstance(connection, socket.socket):
                    connection.close()
            self._pending.clear()
            self._made.clear()
            self._calling.clear()
            self._called.clear()


@attrs.define(eq=False)
class _Handshake:
    """One that is pending.

    Attributes:
        connection: its socket.
        until: when it is dropped, if this rank was called; a call of its own lasts as long as the caller waits.
        calls: whether this rank calls.
        link: that it is for; None before the other side has said so.
        peer, address: that is called.
    """

    connection: socket.socket
    until: float
    calls: bool = False
    link: Link | None = None
    peer: int = -1
    address: tuple[str, int] | None = None
    read: bytes = b""
    hello: bytes = b""
    nonce: bytes = b""

    def receive(self, count: int) -> bytes | None:
        """Return the next `count` bytes once they are there, None before."""
        more = self.connection.recv(count - len(self.read))
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection during the handshake")
        self.read += more
        if len(self.read) < count:
            return None
        said, self.read = self.read, b""
        return said

    def failure(self, why: str) -> PeerClosed:
        """Return the error of a call that failed."""
        assert self.address is not None
        return PeerClosed(self.peer, f"connecting to it at {self.address[0]} port {self.address[1]}: {why}")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def set_up(connection: socket.socket) -> None:
    """Have small messages sent at once, and a vanished host noticed while nothing is under way; else waits notice it (native/net.c).

    Not TCP_USER_TIMEOUT: it would also end the connection to a rank that is alive and does not read, as one that computes for long.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(AttributeError, OSError):  # of Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _VANISHED // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _VANISHED // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
