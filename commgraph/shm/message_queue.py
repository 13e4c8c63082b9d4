"""`MessageQueue`: one writer and many readers, each of which gets every object, by shared memory on one host and by sockets elsewhere."""

from __future__ import annotations

import operator
import os
import secrets
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import get_spawning_popen
from types import TracebackType
from typing import Any, NoReturn, Self

import attrs

from commgraph import launch
from commgraph.errors import ConfigurationError, PeerLostError
from commgraph.forks import disown_in_children
from commgraph.shm import native_module, segments
from commgraph.shm.queue_memory import QueueMemory
from commgraph.shm.queue_sides import MemoryReader, Side, SocketReader, Timeout, Writer
from commgraph.shm.recorded_queue import side_of
from commgraph.shm.remote import Incoming, Secret

__all__ = ["MessageQueue", "QueueHandle"]

_CHUNK_BYTES = 256 * 1024
_CHUNKS = 8
_MOST_BYTES = 1 << 40
_LEAST_BYTES = 4096
_MOST_READERS = 4096
_CLOSE_TIMEOUT = timedelta(seconds=30)
_ANYWHERE = frozenset({"", "0.0.0.0", "::"})


@attrs.frozen
class QueueHandle:
    """Address and secret with which a reader attaches. Pickle it and send it over a channel that others cannot read.

    The authkey is not pickled with it, except into a process that multiprocessing is about to start.

    Attributes:
        name: of the queue.
        n_readers, n_local_readers: the readers from `n_local_readers` on always go through sockets.
        address: host and port of the writer.
        pid: of the writer.
        signed: frames are authenticated by an authkey.
    """

    queue: bytes = attrs.field(repr=False)
    n_readers: int
    n_local_readers: int
    address: tuple[str, int]
    pid: int
    signed: bool
    secret: bytes = attrs.field(repr=False)
    capacity: int = attrs.field(repr=False)
    memory: tuple[int, int, bytes] | None = attrs.field(repr=False)
    namespace: int = attrs.field(repr=False)
    authkey: bytes | None = attrs.field(repr=False, default=None)

    @property
    def name(self) -> str:
        """Name of the queue in errors."""
        return self.queue.hex()[:8]

    def __reduce__(self) -> tuple[Any, ...]:
        # As multiprocessing does with its own: a child is started through a pipe that nobody else reads.
        authkey = self.authkey if get_spawning_popen() is not None else None
        return QueueHandle, attrs.astuple(attrs.evolve(self, authkey=authkey), recurse=False)


class MessageQueue:
    """A queue of Python objects with one writer and a fixed number of readers; every reader gets every object, in order.

    The writer calls `create`, hands `handle` to its readers, and each calls `attach` once, in the process or thread that reads. They need
    not be ranks of anything. On one host objects go through shared memory, large buffers in them (tensors, arrays) beside their pickle.
    An object from `dequeue` is the reader's own: writable, and not changed by later messages.

    A full queue makes the writer wait for its slowest reader. A deadline that passes changes nothing: nobody got anything of an `enqueue`
    that timed out, and a `dequeue` that timed out is called again. When a participant dies or closes, all others get `PeerLostError` within
    a second, after what was sent before; its `rank` is the reader that is lost, None for the writer.

    One thread at a time uses a side; `close` may come from any. Close it, or use it in a ``with`` statement.

    Raises:
        CollectiveTimeoutError: the deadline of a call passed.
        PeerLostError: a participant died, or closed its side.
        ConcurrentCallError: another thread is in a call of this side, or a call of this thread is around this one.
        ContextClosedError: this side was closed, before the call or during it.
    """

    def __new__(cls, *made: object) -> Self:
        """Refuse a call by users, who know no side."""
        if not made or not isinstance(made[0], Side):
            raise TypeError(
                "a MessageQueue is made by MessageQueue.create(n_readers) in its writer and MessageQueue.attach(handle, reader) in a "
                "reader, and not by calling the class"
            )
        return super().__new__(cls)

    def __init__(self, side: Side, handle: QueueHandle, reader: int | None) -> None:
        """Not for users: see `create` and `attach`."""
        self._side = side_of(side, os.environ, handle.n_readers, reader)
        self._handle = handle
        self._reader = reader
        self._finalizer = weakref.finalize(self, self._side.release)
        disown_in_children(self)

    @classmethod
    def create(
        cls,
        n_readers: int,
        *,
        n_local_readers: int | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
        chunks: int = _CHUNKS,
        address: str | tuple[str, int] | None = None,
        authkey: bytes | None = None,
    ) -> Self:
        """Makes a queue and becomes its writer. Returns at once: readers attach later.

        Args:
            n_readers: how many there will be.
            n_local_readers: how many of them, those of the lowest numbers, are on this host; None for all. The others go through sockets.
            chunk_bytes, chunks: the queue holds ``chunk_bytes * chunks`` bytes (at least a page) of what its slowest reader has not read,
                and as much for each reader behind a socket. An object may be larger: it passes in pieces.
            address: to which readers on other hosts connect, ``"host"``, ``"host:port"``, ``"[v6]:port"`` or ``(host, port)``;
                None for readers of this host only. Without a port any free one is taken.
            authkey: secret of the job, which lets any picklable object travel through sockets; else COMMGRAPH_AUTHKEY. Without one they
                carry plain data only (`GroupCoordinator.broadcast_object` says what that is).

        Raises:
            ValueError, TypeError: an argument, saying which.
            BuildError: there is not as much memory as it needs. Where this process cannot make any (a seccomp filter, no descriptor left),
                all readers go through sockets, with a warning.
            OSError: the address cannot be bound.
        """
        n_readers = _integer("create", "n_readers", n_readers, 1, _MOST_READERS)
        n_local = n_readers if n_local_readers is None else _integer("create", "n_local_readers", n_local_readers, 0, n_readers)
        chunk_bytes = _integer("create", "chunk_bytes", chunk_bytes, 1, _MOST_BYTES)
        chunks = _integer("create", "chunks", chunks, 1, _MOST_BYTES // chunk_bytes)
        key = launch.check_authkey("MessageQueue.create", authkey) or launch.authkey(os.environ)
        secret = Secret(secrets.token_bytes(16), secrets.token_bytes(32), key)
        native = _native_with_memory() if n_local else None
        capacity = max(chunk_bytes * chunks, _LEAST_BYTES)
        host, port = _address(address)
        try:
            writer = Writer(native, secret, n_readers=n_readers, n_local=n_local, capacity=capacity, address=(host, port))
        except OSError as error:
            raise OSError(
                error.errno,
                f"MessageQueue.create: cannot listen at {host!r} port {port}: {error.strerror or error}. address= is a name or address of "
                "this host, by which readers on other hosts reach it",
            ) from error
        memory = writer.memory
        handle = QueueHandle(
            queue=secret.queue,
            n_readers=n_readers,
            n_local_readers=n_local,
            address=writer.address,
            pid=os.getpid(),
            signed=key is not None,
            secret=secret.secret,
            capacity=capacity,
            memory=None if memory is None else (memory.fd, memory.nbytes, memory.nonce),
            namespace=_pid_namespace(),
            authkey=key,
        )
        return cls(writer, handle, None)

    @classmethod
    def attach(cls, handle: QueueHandle, reader: int, *, authkey: bytes | None = None) -> Self:
        """Becomes a reader. Returns at once; each reader attaches one time.

        Args:
            handle: the writer's.
            reader: which one, ``0`` to ``n_readers - 1``.
            authkey: as the writer's, where this reader goes through a socket; else what the handle brought along or COMMGRAPH_AUTHKEY.

        Raises:
            ValueError, TypeError: an argument, saying which; somebody else is this reader.
            PeerLostError: the writer cannot be reached.
        """
        if not isinstance(handle, QueueHandle):
            raise TypeError(f"MessageQueue.attach: handle is a {type(handle).__name__}; pass the writer's queue.handle")
        reader = _integer("attach", "reader", reader, 0, handle.n_readers - 1)
        key = launch.check_authkey("MessageQueue.attach", authkey) or handle.authkey or launch.authkey(os.environ)
        where = f"attach on message queue {handle.name} (reader {reader} of {handle.n_readers})"
        opened = _open_memory(handle, reader, where)
        if isinstance(opened, QueueMemory):
            return cls(MemoryReader(handle.name, reader, handle.n_readers, opened, handle.pid), handle, reader)
        if handle.signed and key is None:
            raise ConfigurationError(
                f"{where}: the writer has an authkey, and this reader goes through a socket ({opened}): give it the same, "
                "MessageQueue.attach(handle, reader, authkey=...) or COMMGRAPH_AUTHKEY"
            )
        secret = Secret(handle.queue, handle.secret, key if handle.signed else None)
        try:
            incoming = Incoming(secret, handle.address, reader)
        except OSError as error:
            host, port = handle.address
            raise PeerLostError(
                f"{where}: the writer (process {handle.pid}) cannot be reached, neither through memory ({opened}) nor at {host}:{port} "
                f"({error}). It closed or died, all its readers have attached already, "
                f"{'its authkey is another one than this reader has, ' if handle.signed else ''}or the address is not one that this host "
                "reaches: MessageQueue.create(..., address=...)",
                group=handle.name,
                operation="attach",
            ) from error
        return cls(SocketReader(handle.name, reader, handle.n_readers, incoming, opened), handle, reader)

    @property
    def handle(self) -> QueueHandle:
        """The `QueueHandle` with which readers attach. Can be pickled."""
        return self._handle

    @property
    def reader(self) -> int | None:
        """Number of this reader, None on the writer."""
        return self._reader

    @property
    def n_readers(self) -> int:
        """How many readers the queue has."""
        return self._handle.n_readers

    @property
    def closed(self) -> bool:
        """Whether this side was closed."""
        return self._side.closed

    def wait_until_ready(self, timeout: Timeout = None) -> None:
        """Waits until all readers have attached; on a reader, until the writer says that they have.

        Calling it is optional: the first `enqueue` of the writer, and the first `dequeue` of a reader, do. Only while the writer waits here
        readers come in through sockets.

        Args:
            timeout: seconds or a timedelta. None: as long as the others live, and five minutes for a reader that nobody has seen yet.
        """
        self._side.wait_until_ready(timeout)

    def enqueue(self, obj: Any, timeout: Timeout = None) -> None:
        """Sends an object to every reader; returns when the queue holds it, which may be before anybody reads it.

        Args:
            obj: anything that can be pickled; plain data where a reader is behind a socket and there is no authkey.
            timeout: seconds or a timedelta, 0 not to wait; None: as long as the readers live.

        Raises:
            TypeError, ValueError: it cannot be sent, saying why.
            CollectiveTimeoutError: a reader made no room in time. Nobody got anything; call again.
        """
        self._side.enqueue(obj, timeout)

    def dequeue(self, timeout: Timeout = None) -> Any:
        """The next object, in the order in which the writer sent them.

        Args:
            timeout: seconds or a timedelta, 0 not to wait; None: as long as the others live.

        Raises:
            CollectiveTimeoutError: none came in time. Nothing is lost; call again.
        """
        return self._side.dequeue(timeout)

    def close(self, timeout: Timeout = _CLOSE_TIMEOUT) -> None:
        """Closes this side; from any thread. Calls that wait here end in `ContextClosedError`, those of the others in `PeerLostError`.

        Objects that the writer sent before can still be read.

        Args:
            timeout: how long the writer stays for readers behind sockets that have not taken everything yet.
        """
        self._side.close(timeout)

    def _disown(self) -> None:
        """Refuse every call, in a forked child: `commgraph.forks.Owner`. The child may attach by `handle`."""
        self._side.disown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:  # at exit the module's names may be gone
        # The finalizer closes the queue; the warning says that the program did not.
        side = getattr(self, "_side", None)
        if side is not None and side.is_open:
            try:
                _warn(f"{self!r} was never closed: use `with`, or close()", ResourceWarning, stacklevel=2, source=self)
            except (AttributeError, ImportError, TypeError):  # not made in full, or the interpreter is about to end
                return

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} is one side of a queue, in one process, and cannot be pickled: pass its .handle, and call "
            "MessageQueue.attach(handle, reader) there"
        )

    def __repr__(self) -> str:
        return f"<MessageQueue {self._side.name}: {self._side.me}, {'closed' if self.closed else self._side.describe()}>"


def _open_memory(handle: QueueHandle, reader: int, where: str) -> QueueMemory | str:
    """Return the writer's memory, or why it cannot be opened."""
    if reader >= handle.n_local_readers:
        return f"readers from {handle.n_local_readers} on are on other hosts"
    if handle.memory is None:
        return "the writer shares no memory"
    if handle.namespace != _pid_namespace():
        # Pids of its processes differ here, so that a death could not be detected.
        return "the writer is in another pid namespace"
    native = _native()
    if native is None:
        return "no native module here"
    fd, nbytes, nonce = handle.memory
    try:
        return QueueMemory.open(native, (handle.pid, fd, nbytes), nonce, reader, handle.n_local_readers, handle.capacity)
    except OSError as error:
        return f"its memory cannot be opened: {error}"
    except ValueError as error:
        raise ValueError(f"{where}: it has attached already, and each reader attaches once; make another queue to begin anew") from error


def _native() -> Any:
    reason = native_module.why_missing()
    if reason is None:
        return native_module.load()
    warnings.warn(f"commgraph's native module is missing ({reason}): message queues go through sockets", RuntimeWarning, stacklevel=4)
    return None


def _native_with_memory() -> Any:
    """Return the native module for a writer; None where it is missing or this process can make no shared memory."""
    native = _native()
    if native is not None and (reason := segments.why_impossible()) is not None:
        warnings.warn(
            f"this process can make no shared memory ({reason}): the readers of this message queue go through sockets, which carry plain "
            "data only without an authkey",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return native


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _integer(call: str, name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"MessageQueue.{call}: {name}={value!r} is a {type(value).__name__}; an integer is needed") from None
    if isinstance(value, bool) or not least <= number <= most:
        raise ValueError(f"MessageQueue.{call}: {name}={value!r}; {least} to {most} is possible")
    return number


def _address(address: Any) -> tuple[str, int]:
    if address is None:
        return "127.0.0.1", 0
    how = 'the name or address by which readers reach this host, "node0", "node0:29600", "[fe80::1]:29600" or ("node0", 29600)'
    host: Any = address
    port: Any = 0
    if isinstance(address, str):
        bare, _, rest = address.rpartition("]")
        if bare:  # [v6] or [v6]:port
            host, port = bare.removeprefix("["), rest.removeprefix(":") or 0
        elif address.count(":") == 1:
            host, _, port = address.partition(":")
    elif isinstance(address, tuple) and len(address) == 2:
        host, port = address
    else:
        raise TypeError(f"MessageQueue.create: address={address!r}; give {how}")
    if isinstance(port, str) and port.isascii() and port.isdigit():
        port = int(port)
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
        raise ValueError(f"MessageQueue.create: address={address!r}; give {how}")
    if host in _ANYWHERE:
        raise ValueError(f"MessageQueue.create: address={address!r} is every address of this host, and readers need one: give {how}")
    return host, port
