"""The two sides of a message queue: its writer, and a reader, connected by memory or by a socket."""

from __future__ import annotations

import abc
import logging
import numbers
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from commgraph.errors import CollectiveTimeoutError, ConcurrentCallError, ContextClosedError, PeerLostError
from commgraph.forks import explain_fork
from commgraph.shm.pickling import Pickler, loads
from commgraph.shm.queue_memory import FAULT_WRITER, WRITER_CLOSED, QueueMemory
from commgraph.shm.remote import CLOSED, LOST, OBJECT, READY, Entrance, HungUp, Incoming, Late, Secret, Senders
from commgraph.shm.stopped import LOST as DIED
from commgraph.shm.stopped import SELF, TIMEOUT, Busy, Stopped
from commgraph.wire import WireError

__all__ = ["MemoryReader", "Side", "SocketReader", "Timeout", "Writer"]

logger = logging.getLogger("commgraph")

Timeout = timedelta | float | None

# 2**62 ns are 146 years.
_FOREVER = 1 << 62
# Seconds to wait for readers that have not attached, where no timeout is given.
_READY_NS = 300 * 10**9
# Seconds after which a writer that never waits checks again that its readers live.
_LOOK_EVERY = 0.1
# Seconds that remote readers get to learn of a loss, and to read what came before.
_TELL_TIMEOUT = 10.0
# Nanoseconds after which a call that still waits says so in the log, and again after as many more.
_SAY_NS = 60 * 10**9
# Seconds within which an interrupted call has to end.
_LEAVE_TIMEOUT = 1.0

_KEPT = "Nothing is lost: call again to go on waiting for the same"
_USED_UP = "the object arrived and could not be unpickled here. It is used up; the queue goes on"


class Side(abc.ABC):
    """Base of both sides: one thread at a time, closing from any thread, and errors that say which queue and whose side.

    Attributes:
        name: of the queue.
        me: name of this side in errors.
        reader: its number; None for the writer.
        closed: `close` was called.
    """

    def __init__(self, name: str, me: str, reader: int | None = None) -> None:
        self.name = name
        self.me = me
        self.reader = reader
        self.closed = False
        self._call = threading.Lock()
        self._closing = threading.Lock()
        self._pid = os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether this process has yet to close it."""
        return not self.closed and os.getpid() == self._pid

    @abc.abstractmethod
    def describe(self) -> str:
        """How it is connected."""

    def enqueue(self, obj: Any, timeout: Timeout = None) -> None:
        """The writer's."""
        raise ValueError(f"{self._where('enqueue')}: only the writer enqueues; that is who called MessageQueue.create")

    def dequeue(self, timeout: Timeout = None) -> Any:
        """A reader's."""
        raise ValueError(f"{self._where('dequeue')}: the writer reads nothing; a reader calls MessageQueue.attach(queue.handle, reader)")

    def wait_until_ready(self, timeout: Timeout) -> None:
        """Waits until all are there."""
        raise NotImplementedError

    def close(self, timeout: Timeout, *, wait: bool = True) -> None:
        """Closes, from any thread.

        Args:
            timeout: for what remote readers have not taken yet.
            wait: for the threads that send it.
        """
        seconds = _nanoseconds(timeout) / 1e9
        if os.getpid() != self._pid:
            self.closed = True
            self._drop(inherited=True)
        elif self._closing.acquire(blocking=False):
            self.closed = True
            self._leave(seconds, wait)
            # A thread in a call is about to leave it. It may be this very thread, in a signal handler that closes: the wait is bounded.
            if self._call.acquire(timeout=_LEAVE_TIMEOUT):
                try:
                    self._drop(inherited=False)
                finally:
                    self._call.release()

    def disown(self) -> None:
        """Refuse every call, in a forked child; its copies are dropped when it closes them or ends."""
        self.closed = True
        self._call = threading.Lock()
        self._closing = threading.Lock()

    def release(self) -> None:
        """Close without waiting, for a queue that is collected or an interpreter that ends."""
        self.close(0.0, wait=False)

    @abc.abstractmethod
    def _leave(self, seconds: float, wait: bool) -> None:
        """Announce that this side is closed, and end the calls that wait here."""

    @abc.abstractmethod
    def _drop(self, inherited: bool) -> None:
        """Release memory and descriptors; `inherited`: in a forked process, which has copies of them and no part in the queue."""

    # One thread at a time.

    @contextmanager
    def _alone(self, operation: str) -> Iterator[None]:
        if not self._call.acquire(blocking=False):
            raise self._busy(operation)
        try:
            yield
        finally:
            self._call.release()

    def _say(self, operation: str, waited_ns: int, for_what: str) -> None:
        """Say in the log that a call has waited for long."""
        logger.warning("%s: has waited for %g s %s", self._where(operation), waited_ns / 1e9, for_what)

    # Errors.

    def _where(self, operation: str) -> str:
        return f"{operation} on message queue {self.name} ({self.me})"

    def _busy(self, operation: str) -> ConcurrentCallError:
        return ConcurrentCallError(
            f"{self._where(operation)}: another thread is in a call of this side, or a call of this thread is around this one (a signal "
            "handler, __del__, or pickling that calls in). Nothing was sent or read; the queue goes on. One thread at a time may use it",
            group=self.name,
            operation=operation,
            rank=self.reader,
        )

    def _closed_error(self, operation: str) -> ContextClosedError:
        if self._pid != os.getpid():
            why = explain_fork(self._pid, "a queue, or attach another reader to this one,")
            return ContextClosedError(f"{self._where(operation)}: this side is not this process's: {why}")
        return ContextClosedError(f"{self._where(operation)}: this side was closed")

    def _late(self, operation: str, what: str) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(f"{self._where(operation)}: {what}", group=self.name, operation=operation)

    def _lost_error(self, operation: str, reader: int | None, why: str) -> PeerLostError:
        whom = "the writer" if reader is None else f"reader {reader}"
        return PeerLostError(
            f"{self._where(operation)}: {whom} is lost: {why}. Nobody can go on with this queue: close it and make another",
            group=self.name,
            operation=operation,
            rank=reader,
        )


class Writer(Side):
    """The writer's side."""

    def __init__(self, native: Any, secret: Secret, *, n_readers: int, n_local: int, capacity: int, address: tuple[str, int]) -> None:
        super().__init__(secret.queue.hex()[:8], f"the writer of {n_readers} reader{'s' if n_readers > 1 else ''}")
        self.n_readers = n_readers
        self.n_local = n_local if native is not None else 0
        self.capacity = capacity
        self.memory = QueueMemory.create(native, n_local, capacity) if self.n_local else None
        self._senders = Senders(secret, capacity, lost=self._fail, look=self._look)
        try:
            self._entrance = Entrance(secret, address, backlog=n_readers, admit=self._admit)
        except BaseException:
            if self.memory is not None:
                self.memory.let_go()
            raise
        self.address = self._entrance.address
        self._dumps = Pickler().dumps
        self._put: Callable[..., None] = _refuse if self.memory is None else self.memory.ring.put
        self._ready = False
        # Whether the fast path serves: all readers are local, none is known to be lost, no side is closed.
        self._direct = False
        self._in_memory = False
        self._look_at = 0.0
        self._fate = threading.RLock()  # as that of the senders
        self._lost: tuple[int, str] | None = None

    def describe(self) -> str:
        """Return the state of the queue as text, for `repr`."""
        missing = 0 if self._ready or self.closed else len(self._missing())
        return f"{self.n_readers - missing} attached, {len(self._senders)} of them through sockets; {self.capacity} bytes"

    def enqueue(self, obj: Any, timeout: Timeout = None) -> None:
        """Sends an object."""
        ns = _FOREVER if timeout is None else _nanoseconds(timeout)
        if not self._call.acquire(False):
            raise self._busy("enqueue")
        try:
            if not self._direct:
                self._enqueue_by_steps(obj, ns)
                return
            try:
                parts = self._dumps(obj)
            except Exception as error:
                raise self._refused(obj, error) from error
            if time.monotonic() >= self._look_at:
                self._check("enqueue")
            self._put_and_say(parts, ns)
        except Stopped as stopped:
            raise self._ended("enqueue", stopped, ns) from None
        finally:
            self._call.release()

    def _put_and_say(self, parts: tuple[Any, ...], ns: int) -> None:
        """Put a record; if readers make no room for long, say so in the log. Not of several fragments, which would begin anew each time."""
        waited = 0
        while ns - waited > _SAY_NS and len(parts) == 1 and len(parts[0]) < self.capacity // 8:
            try:
                self._put(OBJECT, 0, parts, _SAY_NS, 0)
                return
            except Stopped as stopped:
                if stopped.code != TIMEOUT:
                    raise
                waited += _SAY_NS
                self._say("enqueue", waited, f"for reader {stopped.member - 1} to make room")
        self._put(OBJECT, 0, parts, ns if ns >= _FOREVER else ns - waited, 0)

    def _enqueue_by_steps(self, obj: Any, ns: int) -> None:
        """`enqueue` by the general path: with remote readers, before the queue is ready, and to raise an error."""
        deadline = _deadline(ns)
        self._check("enqueue")
        if not self._ready:
            self._get_ready("enqueue", ns)
        # Either form (record, frame) may refuse the object: both are made before anything is sent.
        frame: list[memoryview] = []
        try:
            parts = self._dumps(obj) if self._in_memory else ()
            if self._senders:
                frame = self._senders.frame(OBJECT, obj)
        except Exception as error:
            raise self._refused(obj, error) from error
        if frame:
            full = self._senders.wait_for_room(frame, deadline)
            self._check("enqueue")
            if full is not None:
                raise self._full(full, ns)
        if self._in_memory:
            self._put(OBJECT, 0, parts, _left(deadline), 0)
        if frame and not self._senders.push(frame):
            self._check("enqueue")

    def wait_until_ready(self, timeout: Timeout) -> None:
        """Waits for all readers."""
        ns = _nanoseconds(timeout)
        with self._alone("wait_until_ready"):
            self._check("wait_until_ready")
            if not self._ready:
                self._get_ready("wait_until_ready", ns)

    # Before it is ready.

    def _missing(self) -> list[int]:
        memory = self.memory
        return [
            reader
            for reader in range(self.n_readers)
            if reader not in self._senders and (memory is None or reader >= self.n_local or not memory.team.state(1 + reader))
        ]

    def _admit(self, reader: int) -> bool:
        if reader >= self.n_readers:
            return False
        return self.memory is None or reader >= self.n_local or bool(self.memory.ring.leave_out(reader))

    def _get_ready(self, operation: str, ns: int) -> None:
        ns = _READY_NS if ns >= _FOREVER else ns
        deadline, pause, begun, said = _deadline(ns), 0.001, time.monotonic_ns(), 0
        while missing := self._missing():
            for reader, connection in self._entrance.step(min(pause, max(deadline - time.monotonic(), 0.0))):
                self._senders.add(reader, connection)
            self._check(operation)
            if time.monotonic() >= deadline and (missing := self._missing()):
                refused = self._entrance.turned_away
                raise self._late(
                    operation,
                    f"reader{'s' if len(missing) > 1 else ''} {_listing(missing)} of {self.n_readers} did not attach within {ns / 1e9:g} s"
                    + (f"; {refused} connection{'s were' if refused > 1 else ' was'} refused" if refused else "")
                    + ". Nothing was sent: call again to go on waiting, or look why MessageQueue.attach was not called there",
                )
            if (waited := time.monotonic_ns() - begun) - said >= _SAY_NS:
                said = waited
                self._say(operation, waited, f"for readers to attach: {_listing(missing)} of {self.n_readers} are missing")
            pause = min(pause * 1.5, 0.02)
        self._entrance.close()
        if self.memory is not None:
            self.memory.let_go()
            self._in_memory = len(self._senders) < self.n_readers and any(r not in self._senders for r in range(self.n_local))
        try:
            if self._in_memory:
                self._put(READY, 0, (), _FOREVER, 0)
        except Stopped as stopped:
            raise self._ended(operation, stopped, ns) from None
        if self._senders:
            self._senders.push(self._senders.frame(READY, None))
        self._ready = True
        self._direct = not self._senders
        if self.closed or self._lost is not None:
            self._direct = False

    # Checks before a call, and the error of one that ends.

    def _check(self, operation: str) -> None:
        """Raises if the queue is closed or somebody is lost."""
        if self.closed:
            raise self._closed_error(operation)
        self._look()
        if self._lost is not None:
            raise self._lost_error(operation, *self._lost)
        self._look_at = time.monotonic() + _LOOK_EVERY

    def _look(self) -> None:
        """Check that the local readers live, and break the queue if not; from any thread."""
        memory = self.memory
        if memory is not None and self._lost is None and (found := memory.team.lost()) is not None:
            self._fail_by(memory, *found)

    def _fail_by(self, memory: QueueMemory, code: int, member: int) -> None:
        reader, why = memory.blame_of(code, member)
        self._fail(member - 1 if reader is None else reader, why)

    def _fail(self, reader: int, why: str) -> None:
        """Break the queue after a reader is lost: tell the other readers and end this side's calls; from any thread."""
        # Under a lock: a caller that sees `_lost` may close at once, and the readers have to be told of the lost reader before that.
        with self._fate:
            if self.closed or self._lost is not None:
                return
            self._lost = (reader, why)
            self._direct = False
            self._senders.end(LOST, reader, _TELL_TIMEOUT)
            memory = self.memory
            if memory is not None:
                memory.blame(1 + reader)
                memory.team.close()

    def _ended(self, operation: str, stopped: Stopped, ns: int) -> Exception:
        if stopped.code == TIMEOUT:
            return self._full(stopped.member - 1, ns)
        if stopped.code == SELF:
            if self._lost is None or self.closed:
                return self._closed_error(operation)
            return self._lost_error(operation, *self._lost)
        if self.memory is not None:
            self._fail_by(self.memory, stopped.code, stopped.member)
        return self._closed_error(operation) if self._lost is None else self._lost_error(operation, *self._lost)

    def _full(self, reader: int, ns: int) -> CollectiveTimeoutError:
        return self._late(
            "enqueue",
            f"reader {reader} has not made room within {ns / 1e9:g} s, of the {self.capacity} bytes that may wait for it. Nothing was sent "
            "to anybody: call again to send it; a queue of more chunks holds more",
        )

    def _refused(self, obj: object, error: Exception) -> Exception:
        where = self._where("enqueue")
        if isinstance(error, MemoryError | ConcurrentCallError):
            return error
        if isinstance(error, RecursionError):
            return ValueError(f"{where}: the object to send is nested too deep for pickle. Nothing was sent.")
        if isinstance(error, ValueError):
            return ValueError(f"{where}: {error}. Nothing was sent.")
        # TypeErrors are complete: pickle's for objects that can never be pickled, or that of data that is not plain.
        what = f"{error}" if isinstance(error, TypeError) else f"cannot pickle a {type(obj).__name__}: {type(error).__name__}: {error}"
        count = len(self._senders)
        remote = f" (for a queue MessageQueue.create(..., authkey=...); {count} of the readers here need one)" if count else ""
        return TypeError(f"{where}: {what}{remote}. Nothing was sent.")

    def disown(self) -> None:
        """As for every side, and leave the shared memory alone."""
        super().disown()
        self._direct = False
        self._put = _refuse
        if self.memory is not None:
            self.memory.team.disown()

    def _leave(self, seconds: float, wait: bool) -> None:
        with self._fate:
            self._direct = False
            if self.memory is not None:
                self.memory.team.close()
            self._senders.end(CLOSED, None, seconds)
        if wait:
            self._senders.join()

    def _drop(self, inherited: bool) -> None:
        self._put = _refuse
        self._entrance.close()
        if inherited:
            self._senders.drop()
        if self.memory is not None:
            self.memory.let_go()
            self.memory = None


class MemoryReader(Side):
    """A reader that shares memory with the writer."""

    def __init__(self, name: str, reader: int, n_readers: int, memory: QueueMemory, writer_pid: int) -> None:
        super().__init__(name, f"reader {reader} of {n_readers}", reader)
        self._memory: QueueMemory | None = memory
        # Once this side is ready the native module itself lets one thread at a time in.
        self._get: Callable[..., tuple[int, int, list[Any]]] = self._get_first
        self._writer_pid = writer_pid
        self._ready = False

    def describe(self) -> str:
        """How it is connected."""
        return "through memory"

    def dequeue(self, timeout: Timeout = None) -> Any:
        """The next object."""
        ns = _FOREVER if timeout is None else _nanoseconds(timeout)
        try:
            parts = self._get(min(ns, _SAY_NS), 0)[2]
        except Stopped as stopped:
            parts = self._get_and_say(stopped, ns)
        except Busy:
            raise self._busy("dequeue") from None
        try:
            return pickle.loads(parts[0]) if len(parts) == 1 else loads(parts[0], parts[1:])
        except Exception as error:
            error.add_note(f"{self._where('dequeue')}: {_USED_UP}")
            raise

    def _get_and_say(self, stopped: Stopped, ns: int) -> list[Any]:
        """Go on with a wait that is long, and say so in the log; or raise its error."""
        waited = _SAY_NS
        while stopped.code == TIMEOUT and waited < ns:
            self._say("dequeue", waited, f"for the writer (process {self._writer_pid})")
            try:
                return self._get(min(ns - waited, _SAY_NS), 0)[2]
            except Stopped as again:
                stopped = again
                waited += _SAY_NS
            except Busy:
                raise self._busy("dequeue") from None
        raise self._ended("dequeue", stopped, ns, "nothing came from the writer") from None

    def wait_until_ready(self, timeout: Timeout) -> None:
        """Waits for the writer to say that all are there."""
        ns = _nanoseconds(timeout)
        try:
            self._get_ready(ns)
        except Stopped as stopped:
            raise self._ended("wait_until_ready", stopped, ns, "not all of the writer's readers have attached") from None
        except Busy:
            raise self._busy("wait_until_ready") from None

    def _get_ready(self, ns: int) -> None:
        memory = self._memory
        if self.closed or memory is None:
            _refuse()
        if not self._call.acquire(blocking=False):
            raise Busy
        try:
            if not self._ready:
                kind, _, _ = memory.ring.get(ns, 0)
                assert kind == READY
                self._ready = True
                self._get = memory.ring.get
                if self._memory is None:
                    self._get = _refuse
        finally:
            self._call.release()

    def _get_first(self, ns: int, call_id: int) -> tuple[int, int, list[Any]]:
        """Stands in for the ring's `get` until the first object."""
        deadline = _deadline(ns)
        self._get_ready(ns)
        return self._get(_left(deadline), call_id)

    def _ended(self, operation: str, stopped: Stopped, ns: int, what: str) -> Exception:
        if stopped.code == TIMEOUT:
            return self._late(operation, f"{what} within {ns / 1e9:g} s. {_KEPT}")
        memory = self._memory
        if stopped.code == SELF or memory is None:
            return self._closed_error(operation)
        reader, why = memory.blame_of(stopped.code, stopped.member, self._writer_pid)
        # Recorded in the memory, for the participants that see this side close: the first one lost is to blame.
        if reader is not None or stopped.code == DIED:
            memory.blame(FAULT_WRITER if reader is None else 1 + reader)
        return self._lost_error(operation, reader, why)

    def disown(self) -> None:
        """As for every side, and leave the shared memory alone."""
        super().disown()
        self._get = _refuse
        if self._memory is not None:
            self._memory.team.disown()

    def _leave(self, seconds: float, wait: bool) -> None:
        if self._memory is not None:
            self._memory.team.close()

    def _drop(self, inherited: bool) -> None:
        self._memory = None
        self._get = _refuse


class SocketReader(Side):
    """A reader on another host, or one that cannot open the writer's memory."""

    def __init__(self, name: str, reader: int, n_readers: int, incoming: Incoming, why: str) -> None:
        super().__init__(name, f"reader {reader} of {n_readers}", reader)
        self._why = why
        self._incoming = incoming
        self._ready = False
        # How the connection ended: a text and the lost reader; or the text alone, where no valid frame came.
        self._lost: tuple[int | None, str] | None = None
        self._forged = ""

    def describe(self) -> str:
        """How it is connected."""
        return f"through a socket ({self._why})"

    def dequeue(self, timeout: Timeout = None) -> Any:
        """The next object."""
        ns = _nanoseconds(timeout)
        with self._alone("dequeue"):
            deadline = _deadline(ns)
            if not self._ready:
                self._get_ready("dequeue", ns, deadline)
            return self._receive("dequeue", ns, deadline, "nothing came from the writer")[1]

    def wait_until_ready(self, timeout: Timeout) -> None:
        """Waits for the writer to say that all are there."""
        ns = _nanoseconds(timeout)
        with self._alone("wait_until_ready"):
            if self.closed:
                raise self._closed_error("wait_until_ready")
            if not self._ready:
                self._get_ready("wait_until_ready", ns, _deadline(ns))

    def _get_ready(self, operation: str, ns: int, deadline: float) -> None:
        kind, _ = self._receive(operation, ns, deadline, "not all of the writer's readers have attached")
        assert kind == READY
        self._ready = True

    def _receive(self, operation: str, ns: int, deadline: float, what: str) -> tuple[int, Any]:
        if self.closed:
            raise self._closed_error(operation)
        self._raise_if_over(operation)
        try:
            kind, obj = self._receive_and_say(operation, deadline)
        except Late:
            raise self._late(operation, f"{what} within {ns / 1e9:g} s. {_KEPT}") from None
        except HungUp as error:
            if self.closed:
                raise self._closed_error(operation) from None
            kind, obj, self._lost = CLOSED, None, (None, str(error))
        except WireError as error:
            kind, obj, self._forged = CLOSED, None, str(error)
        except Exception as error:
            error.add_note(f"{self._where(operation)}: {_USED_UP}")
            raise
        if kind in (LOST, CLOSED):
            if kind == LOST:
                self._lost = (obj if isinstance(obj, int) else None, "the writer says so")
            elif self._lost is None:
                self._lost = (None, WRITER_CLOSED)
            self._incoming.interrupt()
            self._raise_if_over(operation)
        return kind, obj

    def _receive_and_say(self, operation: str, deadline: float) -> tuple[int, Any]:
        begun = time.monotonic()
        while True:
            try:
                return self._incoming.receive(min(deadline, time.monotonic() + _SAY_NS / 1e9))
            except Late:
                if time.monotonic() >= deadline:
                    raise
            self._say(operation, int((time.monotonic() - begun) * 1e9), "for the writer")

    def _raise_if_over(self, operation: str) -> None:
        if self._forged:
            raise WireError(f"{self._where(operation)}: {self._forged}. The connection was closed")
        if self._lost is not None:
            raise self._lost_error(operation, *self._lost)

    def _leave(self, seconds: float, wait: bool) -> None:
        self._incoming.interrupt()

    def _drop(self, inherited: bool) -> None:
        self._incoming.close()


def _refuse(*_: object) -> NoReturn:
    """Stands in for a ring once this side is closed."""
    raise Stopped(SELF, 0)


def _nanoseconds(timeout: Timeout) -> int:
    if timeout is None:
        return _FOREVER
    seconds: Any = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):  # numpy's floats are Real, too
        raise TypeError(f"timeout={timeout!r}: seconds or a timedelta are needed, None to wait for as long as the others live")
    if not float(seconds) >= 0:
        raise ValueError(f"timeout={timeout!r}: it must not be negative; 0 does not wait, None waits for as long as the others live")
    return int(float(seconds) * 1e9) if float(seconds) < 1e9 else _FOREVER


def _deadline(ns: int) -> float:
    return float("inf") if ns >= _FOREVER else time.monotonic() + ns / 1e9


def _left(deadline: float) -> int:
    return _FOREVER if deadline == float("inf") else max(int((deadline - time.monotonic()) * 1e9), 0)


def _listing(readers: list[int]) -> str:
    return ", ".join(map(str, readers[:16])) + (f" and {len(readers) - 16} more" if len(readers) > 16 else "")
