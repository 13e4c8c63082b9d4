"""Readers of a message queue that are connected by sockets.

::

    reader -> writer    hello     magic, queue, reader, nonce, HMAC: sent while attaching, which waits for no answer
    writer -> reader    answer    magic, verdict, nonce, HMAC
    writer -> reader    frames    kind, length, body: plain data (`commgraph.wire`); with an authkey a signed pickle, and what it
                                  says that follows it (`commgraph.shm.sealed_pickle`)

Both prove that they have the secret of the queue's handle and, where there is one, the authkey; neither is sent. A frame is encoded under
the queue, its kind and its number: the same bytes for every reader, and with an authkey good for nothing elsewhere. The writer listens
until all its readers are there and no longer. A small frame that nothing waits before is sent by the caller, as far as the socket takes
it; each reader has a thread that sends the rest, from a backlog that is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from commgraph import wire
from commgraph.shm.pickling import Pickler
from commgraph.shm.sealed_pickle import Key, Sealed, key_of, open_sealed, seal

__all__ = ["CLOSED", "LOST", "OBJECT", "READY", "Entrance", "HungUp", "Incoming", "Late", "Secret", "Senders"]

# Kinds of frames, and of records in the ring.
READY, OBJECT, LOST, CLOSED = range(1, 5)

_MAGIC = b"cgqueue1"
_NONCE_BYTES = 16
_HELLO = struct.Struct(">8s16sI16s32s")
_ANSWER = struct.Struct(">8sB16s32s")
_HEAD = struct.Struct(">BQ")
_WELCOME, _NOT_PROVEN, _NO_PLACE = range(3)
_MAX_FRAME = 1 << 36
# Up to this size head and body are copied together, so that they leave in one packet.
_SMALL = 64 * 1024

# Seconds that a reader looks again and again before it sleeps, which costs about as much.
_SPIN = 50e-6
# Seconds. How long a stranger may take to say hello, and a reader to connect; how often a sender that has nothing to do looks around.
_HELLO_TIMEOUT = 5.0
_CONNECT_TIMEOUT = 10.0
_TICK = 0.4
# A host has vanished that has not answered so many sends of the same bytes for so long.
_UNANSWERED, _VANISHED = 4, 12
_STRANGERS = 128

logger = logging.getLogger("commgraph")


class HungUp(Exception):  # noqa: N818 - internal; the queue turns it into the public error
    """The other side closed its connection, the connection broke, or it carried bytes that are no valid frame."""


class Late(Exception):  # noqa: N818 - likewise
    """The deadline passed."""


@attrs.frozen
class Secret:
    """Keys that authenticate a participant: those of the queue's handle, and the authkey where there is one.

    Attributes:
        queue: 16 bytes that name the queue.
        secret: of its handle.
        authkey: of the job; None: plain data only.
    """

    queue: bytes
    secret: bytes = attrs.field(repr=False)
    authkey: bytes | None = attrs.field(repr=False)
    _key: Key | None = attrs.field(init=False, eq=False, repr=False)
    _pickler: Pickler = attrs.field(init=False, eq=False, repr=False, factory=Pickler)

    @_key.default
    def _key_of_frames(self) -> Key | None:
        return None if self.authkey is None else key_of(self.authkey)

    def sign(self, *pieces: bytes) -> bytes:
        """HMAC of pieces, each of a length that both sides know."""
        key = self.secret if self.authkey is None else hmac.digest(self.authkey, self.secret, hashlib.sha256)
        return hmac.digest(key, _MAGIC + self.queue + b"".join(pieces), hashlib.sha256)

    def encode(self, kind: int, number: int, obj: Any) -> tuple[Any, ...]:
        """Return the parts of a frame: its body, and what follows that, views of the object among them.

        Raises:
            Exception: as `commgraph.wire.encode`, with an authkey as `seal`.
        """
        context = self._context(kind, number)
        return (wire.encode(obj, key=None, context=context),) if self._key is None else seal(obj, self._pickler, self._key, context)

    def decode(self, kind: int, number: int, body: bytearray) -> Any:
        """Return the object in the body of a frame, where there is no authkey; raises as `commgraph.wire.decode` does."""
        return wire.decode(body, key=None, context=self._context(kind, number))

    def open(self, kind: int, number: int, body: bytearray) -> Sealed:
        """Return the body of a frame, where there is an authkey; raises WireError if it is not signed as this frame."""
        assert self._key is not None
        return open_sealed(body, self._key, self._context(kind, number))

    def _context(self, kind: int, number: int) -> bytes:
        return _MAGIC + self.queue + struct.pack(">BQ", kind, number)


# The writer's side.


@attrs.define
class _Stranger:
    connection: socket.socket
    until: float
    said: bytearray = attrs.field(factory=bytearray)


class Entrance:
    """The listening socket of the writer, which authenticates readers.

    Attributes:
        address: host and port, bound and listening.
        turned_away: connections that were refused, in words for an error message.
    """

    def __init__(self, secret: Secret, address: tuple[str, int], *, backlog: int, admit: Callable[[int], bool]) -> None:
        """Binds.

        Args:
            secret: which readers have to know.
            address: host and port to listen at; port 0 for any.
            backlog: readers that may come at once.
            admit: called with the number of a reader that attaches; whether it is free.
        """
        self._secret = secret
        self._admit = admit
        self._strangers: dict[int, _Stranger] = {}
        self._came: set[int] = set()
        self.turned_away = 0
        family, kind, protocol, _, bindable = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self._listener = socket.socket(family, kind, protocol)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(bindable)
            self._listener.listen(backlog + 16)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            hint = "; is the loopback interface up?" if error.errno == errno.EADDRNOTAVAIL and bindable[0] == "127.0.0.1" else ""
            why = f"a message queue cannot listen at {address[0]} port {address[1]}: {error.strerror}{hint}"
            raise OSError(error.errno, why) from error
        self.address: tuple[str, int] = (address[0], self._listener.getsockname()[1])

    def step(self, seconds: float) -> list[tuple[int, socket.socket]]:
        """Wait for a while and return the readers that attached meanwhile. No connection can block it."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        for descriptor in self._strangers:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(seconds * 1000)}
        if self._listener.fileno() in ready:
            self._accept()
        now = time.monotonic()
        came = []
        for descriptor in list(self._strangers):
            stranger = self._strangers[descriptor]
            found = self._listen_to(stranger) if descriptor in ready else None
            if found is not None:
                came.append((found, stranger.connection))
                del self._strangers[descriptor]
            elif stranger.connection.fileno() < 0 or now >= stranger.until:
                self._turn_away(descriptor)
        return came

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        for descriptor in list(self._strangers):
            self._turn_away(descriptor)

    def _accept(self) -> None:
        for _ in range(_STRANGERS):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # Too many open files, say. It stays readable, so that without a pause this would be tried without end.
                time.sleep(0.01)
                return
            connection.setblocking(False)
            if len(self._strangers) >= _STRANGERS:
                self._turn_away(next(iter(self._strangers)))
            self._strangers[connection.fileno()] = _Stranger(connection, time.monotonic() + _HELLO_TIMEOUT)

    def _turn_away(self, descriptor: int) -> None:
        self._strangers.pop(descriptor).connection.close()
        self.turned_away += 1

    def _listen_to(self, stranger: _Stranger) -> int | None:
        """Return the reader that a connection has authenticated as, None before; closes a connection that fails to."""
        try:
            said = stranger.connection.recv(_HELLO.size - len(stranger.said))
        except BlockingIOError:
            return None
        except OSError:
            said = b""
        stranger.said += said
        if not said:
            stranger.connection.close()
        if not said or len(stranger.said) < _HELLO.size:
            return None
        magic, queue, reader, nonce, mac = _HELLO.unpack(stranger.said)
        mine = secrets.token_bytes(_NONCE_BYTES)
        proof = self._secret.sign(b"hello", struct.pack(">I", reader), nonce)
        if (magic, queue) != (_MAGIC, self._secret.queue) or not hmac.compare_digest(mac, proof):
            verdict, proof = _NOT_PROVEN, bytes(32)
        elif reader in self._came or not self._admit(reader):
            verdict, proof = _NO_PLACE, bytes(32)
        else:
            self._came.add(reader)
            verdict, proof = _WELCOME, self._secret.sign(b"answer", struct.pack(">I", reader), nonce, mine)
        with contextlib.suppress(OSError):  # whoever has gone by now is missed soon
            stranger.connection.send(_ANSWER.pack(_MAGIC, verdict, mine, proof))
        if verdict == _WELCOME:
            return int(reader)
        logger.info("message queue: a connection was refused (%s)", "no such place" if verdict == _NO_PLACE else "it proved nothing")
        stranger.connection.close()
        return None


class _Sender:
    """One reader's connection, backlog and thread. "The lock" is that of its `Senders`."""

    def __init__(self, senders: Senders, reader: int, connection: socket.socket) -> None:
        self.reader = reader
        self.work = threading.Condition(senders.lock)
        self.pieces: deque[memoryview] = deque()
        self.held = 0
        self.done = False
        self._senders = senders
        self._connection = connection
        _set_up(connection)
        self.thread = threading.Thread(target=self._run, name=f"commgraph queue, reader {reader}", daemon=True)
        self.thread.start()

    def drop(self) -> None:
        self._connection.close()

    def push(self, frame: list[memoryview]) -> None:
        """Send a frame, or leave it to the thread. With the lock, which the thread does not hold while it sends: then `pieces` has some."""
        nbytes = sum(map(len, frame))
        if not self.pieces and nbytes <= _SMALL:
            try:
                sent = self._connection.sendmsg(frame)
            except OSError:  # full; or broken, of which the thread will say more
                sent = 0
            if sent == nbytes:
                return
            frame = [memoryview(b"".join(frame))[sent:]] if sent else frame
            nbytes -= sent
        self.pieces.extend(frame)
        self.held += nbytes
        self.work.notify()

    def _run(self) -> None:
        senders = self._senders
        problem = None
        try:
            while (piece := self._next()) is not None:
                self._send(piece)
                with senders.lock:
                    self.pieces.popleft()
                    self.held -= len(piece)
                    senders.room.notify_all()
            self._connection.shutdown(socket.SHUT_WR)
        except (HungUp, OSError) as error:
            problem = str(error)
        except Late:
            logger.warning(
                "message queue: reader %d did not take the last %d bytes before the queue was closed; they are lost", self.reader, self.held
            )
        self._connection.close()
        with senders.lock:
            self.done = True
            self.pieces.clear()
            self.held = 0
            senders.room.notify_all()
        # A reader that hangs up once the queue is closed has read all that it wanted.
        if problem is not None and not senders.ending:
            senders.lost(self.reader, problem)

    def _next(self) -> memoryview | None:
        """Wait for the next piece to send; None at the end."""
        while True:
            with self._senders.lock:
                if not self.pieces and not self._senders.ending:
                    self.work.wait(_TICK)
                if self.pieces:
                    return self.pieces[0]
                if self._senders.ending:
                    return None
            # A reader sends nothing after its hello.
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            if poll.poll(0):
                raise HungUp("it closed its connection")
            if has_vanished(self._connection):
                raise HungUp("its host has not answered for some seconds")
            self._senders.look()

    def _send(self, piece: memoryview) -> None:
        while piece:
            try:
                piece = piece[self._connection.send(piece) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._connection, select.POLLIN | select.POLLOUT)
                ready = poll.poll(_TICK * 1000)
                if ready and ready[0][1] & ~select.POLLOUT:
                    raise HungUp("it closed its connection") from None
                if not ready:
                    if has_vanished(self._connection):
                        raise HungUp("its host has not answered for some seconds") from None
                    self._senders.look()
                if time.monotonic() >= self._senders.until:
                    raise Late from None


class Senders:
    """The readers of one writer that are connected by sockets.

    Attributes:
        lock: guards what follows and the backlogs.
        room: notified when a backlog has shrunk, and at the end.
        ending: no frame is taken any more; the backlogs are still sent.
        until: when that ends (monotonic).
        lost: called from their threads with a reader and why it is lost.
        look: called from their threads, now and then.
    """

    def __init__(self, secret: Secret, limit: int, *, lost: Callable[[int, str], None], look: Callable[[], None]) -> None:
        """`limit`: bytes that may wait for one reader; a larger frame waits alone."""
        self.lock = threading.RLock()  # a signal handler that closes the queue may have interrupted its owner
        self.room = threading.Condition(self.lock)
        self.ending = False
        self.until = float("inf")
        self.lost = lost
        self.look = look
        self._secret = secret
        self._limit = limit
        self._number = 0
        self._all: dict[int, _Sender] = {}

    def __contains__(self, reader: int) -> bool:
        return reader in self._all

    def __len__(self) -> int:
        return len(self._all)

    def add(self, reader: int, connection: socket.socket) -> None:
        """Add a reader, before the first frame."""
        with self.lock:
            self._all[reader] = _Sender(self, reader, connection)

    def frame(self, kind: int, obj: Any) -> list[memoryview]:
        """Return the next frame, which no later change of the object reaches.

        Raises:
            ValueError: it is too large.
            Exception: as `Secret.encode`.
        """
        body, *beside = self._secret.encode(kind, self._number, obj)
        nbytes = len(body) + sum(memoryview(part).nbytes for part in beside)
        if nbytes > _MAX_FRAME:
            raise ValueError(f"an object of {nbytes} bytes does not go through a socket: {_MAX_FRAME} are the most")
        head = _HEAD.pack(kind, len(body))
        first = [memoryview(head + body)] if len(body) <= _SMALL else [memoryview(head), memoryview(body)]
        return first + [memoryview(part if type(part) is bytes else bytes(part)) for part in beside]

    def wait_for_room(self, frame: list[memoryview], deadline: float) -> int | None:
        """Wait until every backlog has room for a frame, or `end` was called; return the reader whose backlog is full at the deadline."""
        nbytes = sum(map(len, frame))
        with self.lock:
            while not self.ending:
                full = next((s.reader for s in self._all.values() if s.held and s.held + nbytes > self._limit), None)
                if full is None:
                    return None
                left = deadline - time.monotonic()
                if left <= 0:
                    return full
                self.room.wait(min(left, _TICK))
        return None

    def push(self, frame: list[memoryview]) -> bool:
        """Append a frame to all backlogs; False if `end` was called before."""
        with self.lock:
            if self.ending:
                return False
            self._push(frame)
            return True

    def _push(self, frame: list[memoryview]) -> None:
        self._number += 1
        for sender in self._all.values():
            if not sender.done:
                sender.push(frame)

    def end(self, kind: int, obj: Any, seconds: float) -> None:
        """Send the backlogs and a last frame, within that time."""
        with self.lock:
            if not self.ending:
                self._push(self.frame(kind, obj))
                self.ending = True
            self.until = min(self.until, time.monotonic() + seconds)
            for sender in self._all.values():
                sender.work.notify()
            self.room.notify_all()

    def join(self) -> None:
        """Waits for the threads, which end when the time that `end` gave them is over."""
        for sender in self._all.values():
            if sender.thread is not threading.current_thread():
                sender.thread.join()

    def drop(self) -> None:
        """Close the copies of the descriptors, in a process that was forked."""
        for sender in self._all.values():
            sender.drop()


# The reader's side.


class Incoming:
    """A reader's connection to its writer. A call that is late has lost nothing: call again."""

    def __init__(self, secret: Secret, address: tuple[str, int], reader: int) -> None:
        """Connect and send the hello; the answer is read with the first frame.

        Raises:
            OSError: nobody listens there.
        """
        self._secret = secret
        self._reader = reader
        self._spin = _SPIN if (os.cpu_count() or 1) > 1 else 0.0
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._number = 0
        self._kind = 0
        self._wanted = bytearray(_ANSWER.size)
        self._have = 0
        # Of a frame whose body has come: what follows it, and how many of these parts are there.
        self._sealed: Sealed | None = None
        self._beside: list[bytearray] = []
        self._filled = 0
        self._connection = socket.create_connection(address, timeout=_CONNECT_TIMEOUT)
        try:
            proof = secret.sign(b"hello", struct.pack(">I", reader), self._nonce)
            self._connection.sendall(_HELLO.pack(_MAGIC, secret.queue, reader, self._nonce, proof))
            self._connection.setblocking(False)
            _set_up(self._connection)
        except BaseException:
            self._connection.close()
            raise
        self._answered = False

    def receive(self, deadline: float) -> tuple[int, Any]:
        """Return the kind of the next frame, and its content.

        Raises:
            Late: the deadline (monotonic) passed.
            HungUp: the writer did, or never let this reader in.
            WireError: a frame was damaged or forged. Whatever unpickling raises: the frame is used up.
        """
        if not self._answered:
            self._fill(deadline)
            self._check_answer()
        if not self._kind:
            self._fill(deadline)
            kind, length = _HEAD.unpack(self._wanted)
            if kind not in (READY, OBJECT, LOST, CLOSED) or length > _MAX_FRAME:
                raise wire.WireError(f"no frame begins with kind {kind} and length {length}")
            # Memory is taken from the system as it is written to: an announced length alone costs nothing.
            self._kind, self._wanted, self._have = kind, bytearray(length), 0
        if self._sealed is None:
            self._fill(deadline)
            kind, number, body = self._kind, self._number, self._wanted
            if self._secret.authkey is None:
                self._expect_frame()
                return kind, self._secret.decode(kind, number, body)
            sealed = self._secret.open(kind, number, body)
            if sum(sealed.lengths) > _MAX_FRAME:
                raise wire.WireError(f"{sum(sealed.lengths)} bytes are announced to follow a frame")
            self._sealed, self._beside, self._have = sealed, [bytearray(length) for length in sealed.lengths], 0
        while self._filled < len(self._beside):
            self._wanted = self._beside[self._filled]
            self._fill(deadline)
            self._filled, self._have = self._filled + 1, 0
        kind, sealed, beside = self._kind, self._sealed, self._beside
        self._expect_frame()
        return kind, sealed.load(beside)

    def _expect_frame(self) -> None:
        self._number += 1
        self._kind, self._sealed, self._beside, self._filled, self._wanted, self._have = 0, None, [], 0, bytearray(_HEAD.size), 0

    def interrupt(self) -> None:
        """End a `receive` of another thread, and all later ones, in `HungUp`. The writer sees the connection close."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes; not beside a `receive`."""
        self._connection.close()

    def _fill(self, deadline: float) -> None:
        view, spun = memoryview(self._wanted), time.monotonic() + self._spin
        while self._have < len(view):
            try:
                got = self._connection.recv_into(view[self._have :])
            except BlockingIOError:
                if time.monotonic() >= spun:
                    self._await(deadline)
                continue
            except OSError as error:
                raise HungUp(f"the connection broke: {error}") from error
            if not got:
                raise HungUp("it closed its connection")
            self._have += got

    def _await(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if left <= 0 or (not poll.poll(min(left, 86400.0) * 1000) and time.monotonic() >= deadline):
            raise Late

    def _check_answer(self) -> None:
        magic, verdict, nonce, mac = _ANSWER.unpack(self._wanted)
        proof = self._secret.sign(b"answer", struct.pack(">I", self._reader), self._nonce, nonce)
        if magic != _MAGIC or verdict not in (_WELCOME, _NOT_PROVEN, _NO_PLACE):
            raise HungUp("what listens there is no message queue of this version of commgraph")
        if verdict == _NOT_PROVEN:
            raise HungUp("it refused the connection: the handle is of another queue, or its authkey differs from the one here")
        if verdict == _NO_PLACE:
            raise HungUp("it refused the connection: that reader has attached already, or there is none of that number")
        if not hmac.compare_digest(mac, proof):
            raise HungUp("what listens there does not have the secret of this queue")
        self._answered = True
        self._wanted, self._have = bytearray(_HEAD.size), 0


def has_vanished(connection: socket.socket) -> bool:
    """Whether the other host answers neither what was sent nor probes of its full buffer, which keepalive does not notice.

    Not by TCP_USER_TIMEOUT: it would end the connection of a reader, too, that lives and reads nothing for as long.
    """
    if not hasattr(socket, "TCP_INFO"):
        return False
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # struct tcp_info of Linux: retransmits and probes without an answer, and milliseconds since the last one.
    silent = max(info[2], info[3]) if len(info) >= 60 else 0
    return silent >= _UNANSWERED and int(struct.unpack_from("=I", info, 56)[0]) >= _VANISHED * 1000


def _set_up(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A process that ends hangs up; a host that ends says nothing. While data is unacknowledged no keepalive is sent: `has_vanished`.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
