"""Python objects between the ranks of a group: the interface, and its implementation over a network, as authenticated frames.

A message is one block of `_BLOCK` bytes (its length, then as much of the frame as fits) and, for a longer frame, the rest of it: most
objects are one message. A receive that times out before its block arrived stays pending, and the next receive from that rank goes on
waiting for it.
"""

from __future__ import annotations

import abc
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from commgraph import ambient, wire
from commgraph.communicators.base import Communicator
from commgraph.communicators.tags import COLLECTIVE, OBJECT_REST, make_tag
from commgraph.communicators.transport import Pending
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.failures import Call, call_site
from commgraph.coordinator.frames import STREAMS, Frames
from commgraph.coordinator.operation import Group, collective, deadline_of, explain, perform, wait_pending
from commgraph.coordinator.pending import DICTS, OBJECTS, MessageKey
from commgraph.coordinator.recorded import recorded
from commgraph.coordinator.state import GroupState, Network
from commgraph.coordinator.tensor_dict import Entry
from commgraph.coordinator.turns import Turn
from commgraph.deadline import LONGEST, Deadline, Timeout
from commgraph.errors import CollectiveTimeoutError, ConcurrentCallError, ContextClosedError
from commgraph.shm.recorder import INCOMING, OUTGOING
from commgraph.waiting import Background

__all__ = [
    "NetworkObjects",
    "Objects",
    "UnreadableDictError",
    "checked_objects",
    "checked_peer",
    "gather_frames",
    "has_come",
    "nothing_yet",
    "refuse_object",
    "unreadable",
]


_BLOCK = 4096
_LENGTH = struct.Struct("<Q")
_INLINE = _BLOCK - _LENGTH.size
# The block that every rank gives to all, of objects that are gathered: a length, and a frame that fits.
_GATHERED = 1024
# A frame beyond this is not a message but a mistake (or an attack); nothing is allocated for it.
_MAX_FRAME = 1 << 40


class UnreadableDictError(Exception):
    """A description does not unpickle, and tensors follow it, which have to be received all the same.

    Attributes:
        error: the public error.
        follow: dtype, shape, and whether it is on the host, of each tensor.
    """

    def __init__(self, error: Exception, follow: Sequence[tuple[torch.dtype, tuple[int, ...], bool]]) -> None:
        super().__init__(error)
        self.error = error
        self.follow = follow

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """Return tensors to receive them with."""
        return [ambient.empty(shape, dtype, ambient.HOST if on_host else device) for dtype, shape, on_host in self.follow]


class Objects(abc.ABC):
    """Interface: sends the objects of one group, and descriptions of tensor dicts with some of their tensors."""

    @abc.abstractmethod
    def send(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> None:
        """Send `obj` to one rank."""

    @abc.abstractmethod
    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        """Return the next object from one rank."""

    @abc.abstractmethod
    def broadcast(self, group: Group, operation: str, obj: object, src: Any, timeout: Timeout) -> Any:
        """Return the object of `src` on every rank; `obj` itself on `src`."""

    @abc.abstractmethod
    def all_gather(self, group: Group, operation: str, obj: object, timeout: Timeout) -> list[Any]:
        """Return every rank's object, in rank order."""

    @abc.abstractmethod
    def scatter(self, group: Group, operation: str, objs: Any, src: Any, timeout: Timeout) -> Any:
        """Return this rank's object of those that `src` gives, one for each rank; the very object on `src`."""

    @abc.abstractmethod
    def gather(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> list[Any] | None:
        """Return every rank's object, in rank order, on `dst`, and None elsewhere."""

    @abc.abstractmethod
    def pack(self, group: Group, operation: str, obj: object, dst: int) -> Callable[[Deadline], None] | None:
        """Pickle and number an object for one rank; return a function that sends it, None if it was sent at once."""

    def sends_in_parts(self, peer: int) -> bool:
        """Whether the tensors of a dict to or from a rank follow its description as messages without a tag."""
        return True

    # Dicts that hold nothing but what the native module describes by itself.

    def send_plain(self, group: Group, tree: object, dst: Any, timeout: Timeout) -> bool:
        """Send a plain dict; return False, with nothing sent, for another one."""
        return False

    def recv_plain(self, group: Group, src: Any, timeout: Timeout) -> dict[Any, Any] | None:
        """Receive a plain dict; return None if the next one is not plain: it is still to be received."""
        return None

    def broadcast_plain(self, group: Group, tree: object, src: Any, timeout: Timeout) -> bool:
        """Broadcast a plain dict on `src`; return False, with nothing sent, for another dict or another rank."""
        return False

    # Dicts, taken apart. `operation` is in every case that of the caller.

    @abc.abstractmethod
    def pack_dict(
        self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[Deadline], None]]:
        """Return the indices of the tensors that are sent with the description, and a function that sends both."""

    @abc.abstractmethod
    def recv_dict(self, group: Group, operation: str, src: int, deadline: Deadline) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        """Return the description, and the tensors that came with it as 1-D tensors, by index among all."""

    @abc.abstractmethod
    def broadcast_dict(
        self,
        group: Group,
        operation: str,
        entries: Sequence[Entry] | None,
        tensors: Sequence[torch.Tensor],
        src: int,
        timeout: Timeout,
    ) -> tuple[list[Entry], Mapping[int, torch.Tensor]] | dict[Any, Any]:
        """Broadcast a description and tensors that are sent with it; `entries` and `tensors` are None and empty elsewhere than on `src`.

        Return both; or the dict itself, where `src` sent it by `broadcast_plain`.
        """

    def join(self, timeout: float) -> None:  # noqa: B027 - only where threads are left behind
        """Wait for the threads of pending receives, after the group was closed."""


class NetworkObjects(Objects):
    """Objects of a group whose ranks do not share memory, and of a group of one rank."""

    def __init__(self, state: GroupState) -> None:
        self._state = state
        self._key = None if state.network is None else state.network.key
        # Receives pending after their caller's deadline, by tag and source.
        self._late: dict[tuple[int, int], tuple[Pending, bytearray]] = {}
        # Comparisons of broadcasts pending after their caller's deadline, by tag.
        self._comparing: dict[int, Background] = {}

    def send(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> None:
        deadline, dst = _begin_message(group, operation, dst, "dst", timeout)
        self._pack(group, operation, obj, (dst, True, OBJECTS))(deadline)

    def pack(self, group: Group, operation: str, obj: object, dst: int) -> Callable[[Deadline], None] | None:
        return self._pack(group, operation, obj, (dst, True, OBJECTS))

    def _pack(self, group: Group, operation: str, obj: object, key: MessageKey) -> Callable[[Deadline], None]:
        state, turn, (dst, _, kind) = self._state, Turn(), key
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counted(key)
            frame = self._encode_message(group, operation, obj, f"{STREAMS[kind]} {group.rank_in_group} {dst} {number}")
            # Counted only now: the receiver goes on waiting for the number of an object that is refused, and the next one takes it.
            state.count(key)
        finally:
            state.turns.release(key, turn)
        return lambda deadline: self._send_frames(Frames.of_message(group, operation, deadline, kind, number, OUTGOING), {dst: frame})

    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        deadline, src = _begin_message(group, operation, src, "src", timeout)
        return self._recv(group, operation, (src, False, OBJECTS), deadline)

    def _recv(self, group: Group, operation: str, key: MessageKey, deadline: Deadline) -> Any:
        state, turn, (src, _, kind) = self._state, Turn(), key
        try:
            state.begin_message(group.name, operation, key, turn)
            number = state.counted(key)
            context = f"{STREAMS[kind]} {src} {group.rank_in_group} {number}"
            frame = self._await(Frames.of_message(group, operation, deadline, kind, number, INCOMING), src, context)
            if frame is None:
                raise nothing_yet(group, operation, state.sequence, src, deadline.seconds)
            state.waited_in_vain = False
            state.count(key)
        finally:
            state.turns.release(key, turn)
        return self._decode_message(group, operation, src, frame, context)

    @recorded
    def broadcast(self, group: Group, operation: str, obj: object, src: Any, timeout: Timeout) -> Any:
        with collective(group, operation, timeout) as (sequence, deadline):
            src = checked_peer(group, operation, src, "src", sequence)
            if group.world_size == 1:
                return obj
            context = f"broadcast {src} {sequence}"
            frames = Frames.of_collective(group, operation, deadline, sequence, src)

            def make() -> Mapping[int, Any]:
                return dict.fromkeys(_others(group), self._encode_message(group, operation, obj, context))

            if self._give(frames, src, make):
                return obj
            frame = self._get(frames, src, context)
        return self._decode_message(group, operation, src, frame, context)

    @recorded
    def scatter(self, group: Group, operation: str, objs: Any, src: Any, timeout: Timeout) -> Any:
        with collective(group, operation, timeout) as (sequence, deadline):
            src, me = checked_peer(group, operation, src, "src", sequence), group.rank_in_group
            given: list[Any] = []
            frames = Frames.of_collective(group, operation, deadline, sequence, src)

            def make() -> Mapping[int, Any]:
                given[:] = checked_objects(group, operation, objs, sequence)
                return {
                    peer: self._encode_message(group, operation, given[peer], f"scatter {src} {peer} {sequence}") for peer in _others(group)
                }

            if self._give(frames, src, make):
                return given[me]
            context = f"scatter {src} {me} {sequence}"
            frame = self._get(frames, src, context)
        return self._decode_message(group, operation, src, frame, context)

    def _give(self, frames: Frames, src: int, make: Callable[[], Mapping[int, Any]]) -> bool:
        """Send every other rank its frame, on `src`; return False elsewhere."""
        group, state = frames.group, self._state
        if group.rank_in_group != src:
            return False
        try:
            made = make()
        except BaseException:
            # The others wait for this call's object, and get that of the next call.
            state.uncount_collective()
            raise
        if group.world_size == 1:
            return True
        if (comparison := state.comparison) is not None:
            call = Call(group.name, frames.operation, state.members, frames.sequence)
            frames.perform(lambda: comparison.compare(call, frames.what, frames.deadline), 0)
        self._send_frames(frames, made)
        return True

    def _get(self, frames: Frames, src: int, context: str) -> Any:
        """Return the frame of `src` on another rank."""
        state = self._state
        received = None
        if state.comparison is None or self._compared(frames):
            received = self._await(frames, src, context)
        if received is None:
            state.uncount_collective()
            raise nothing_yet(frames.group, frames.operation, frames.sequence, src, frames.deadline.seconds)
        state.waited_in_vain = False
        self._comparing.pop(frames.tag, None)
        return received

    def _compared(self, frames: Frames) -> bool:
        """Compare this call with those of the peers, once; False if not all came in time: the next call goes on waiting."""
        comparison, tag = self._state.comparison, frames.tag
        call = Call(frames.group.name, frames.operation, self._state.members, frames.sequence)
        assert comparison is not None

        def act() -> bool:
            if tag not in self._comparing:
                at = call_site()
                # The deadline is enforced by the wait below, and not by the thread.
                self._comparing[tag] = Background(lambda: comparison.compare(call, frames.what, Deadline.after(LONGEST), at=at))
            return self._comparing[tag].wait(frames.deadline.left())

        return frames.perform(act, 0)

    @recorded
    def all_gather(self, group: Group, operation: str, obj: object, timeout: Timeout) -> list[Any]:
        with collective(group, operation, timeout) as (sequence, deadline):
            if group.world_size == 1:
                return [obj]
            frame = self._encode(group, operation, obj, f"gather {group.rank_in_group} {sequence}")
            frames = self._all_gather(group, operation, frame, sequence, deadline)
        return self._decoded(group, operation, frames, obj, sequence)

    def _all_gather(self, group: Group, operation: str, frame: bytes, sequence: int, deadline: Deadline) -> list[memoryview]:
        """Return every rank's frame: first a block of each, which holds its length and a short frame, then the longer ones."""
        state, n = self._state, group.world_size
        route = state.strategies.route("all_gather", (n, 1), torch.uint8, torch.device("cpu"))
        what = f"{operation}()"
        tag, rest = make_tag(COLLECTIVE, sequence, what), make_tag(OBJECT_REST, sequence, "gather")

        def act() -> list[memoryview]:
            if state.comparison is not None:
                state.comparison.compare(Call(group.name, operation, state.members, sequence), what, deadline)
            short, sizes = _exchange_blocks(route, frame, n, tag, deadline)
            memory, out = _buffer(sum(sizes))
            if any(sizes):
                route.all_gather(_tensor(frame if sizes[group.rank_in_group] else b""), 0, sizes, out, tag=rest, deadline=deadline)
            return _frames_of(short, sizes, memory)

        return perform(group, operation, sequence, what, deadline, act, len(frame))

    def _decoded(self, group: Group, operation: str, frames: Sequence[memoryview], obj: object, sequence: int) -> list[Any]:
        """Return the objects of all ranks, this rank's own one itself."""
        me = group.rank_in_group
        return [obj if i == me else self._decode(group, operation, i, frame, f"gather {i} {sequence}") for i, frame in enumerate(frames)]

    @recorded
    def gather(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> list[Any] | None:
        n = group.world_size
        with collective(group, operation, timeout) as (sequence, deadline):
            dst = checked_peer(group, operation, dst, "dst", sequence)
            if n == 1:
                return [obj]
            frame = self._encode(group, operation, obj, f"gather {group.rank_in_group} {sequence}")
            route = self._state.strategies.route("gather", (n, 1), torch.uint8, torch.device("cpu"))
            frames = gather_frames(group, operation, sequence, route, frame, dst, deadline)
        return None if frames is None else self._decoded(group, operation, frames, obj, sequence)

    # Dicts: only the description is an object here, and the tensors go as tensors.

    def pack_dict(
        self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[Deadline], None]]:
        return frozenset(), self._pack(group, operation, self._describe(group, operation, entries, tensors), (dst, True, DICTS))

    def recv_dict(self, group: Group, operation: str, src: int, deadline: Deadline) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        return self._described(group, operation, src, self._recv(group, operation, (src, False, DICTS), deadline)), {}

    def broadcast_dict(
        self,
        group: Group,
        operation: str,
        entries: Sequence[Entry] | None,
        tensors: Sequence[torch.Tensor],
        src: int,
        timeout: Timeout,
    ) -> tuple[list[Entry], Mapping[int, torch.Tensor]]:
        if entries is not None:
            self.broadcast(group, operation, self._describe(group, operation, entries, tensors), src, timeout)
            return list(entries), {}
        return self._described(group, operation, src, self.broadcast(group, operation, None, src, timeout)), {}

    def _describe(self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> tuple[Any, bytes]:
        """Return the tensors that follow as plain data, and the description as a frame of its own."""
        follow = [(x.dtype, tuple(x.shape), x.is_cpu) for x in tensors]
        return follow, self._encode(group, operation, list(entries), f"description {group.rank_in_group}")

    def _described(self, group: Group, operation: str, src: int, received: tuple[Any, bytes]) -> list[Entry]:
        """Return the description in what `_describe` made."""
        follow, frame = received
        try:
            entries: list[Entry] = self._decode(group, operation, src, memoryview(frame), f"description {src}")
        except Exception as error:
            raise UnreadableDictError(error, follow) from None
        return entries

    def _encode(self, group: Group, operation: str, obj: object, context: str) -> bytes:
        try:
            return wire.encode(obj, key=self._key, context=f"{self._state.members.uid} {context}".encode())
        except (ConcurrentCallError, ContextClosedError):
            raise
        except ValueError as error:
            raise explain(BadArgument(str(error)), group, operation, self._state.sequence) from error
        except Exception as error:
            raise refuse_object(group, operation, obj, error) from error

    def _decode(self, group: Group, operation: str, src: int, frame: memoryview, context: str) -> Any:
        try:
            return wire.decode(frame, key=self._key, context=f"{self._state.members.uid} {context}".encode())
        except Exception as error:
            raise unreadable(group, operation, src, error) from error

    # A message to one rank, or from one; here it is a frame.

    def _encode_message(self, group: Group, operation: str, obj: object, context: str) -> Any:
        """Return what `_send_frames` sends."""
        return self._encode(group, operation, obj, context)

    def _decode_message(self, group: Group, operation: str, src: int, message: Any, context: str) -> Any:
        """Return the object of what `_await` returned."""
        return self._decode(group, operation, src, message, context)

    def _send_frames(self, frames: Frames, to: Mapping[int, Any]) -> None:
        """Send ranks what `_encode_message` made for each."""
        # A frame that goes to several ranks is copied once.
        distinct = {id(frame): frame for frame in to.values()}
        parts = {key: _split(frame) for key, frame in distinct.items()}

        def act() -> None:
            transport = self._network(frames.group).transport
            heads = [(parts[id(frame)][0], peer) for peer, frame in to.items()]
            transport.exchange(heads, [], tag=frames.tag, deadline=frames.deadline)
            tails = [(tail, peer) for peer, frame in to.items() if (tail := parts[id(frame)][1]) is not None]
            if tails:
                transport.exchange(tails, [], tag=frames.rest, deadline=frames.deadline)

        frames.perform(act, sum(map(len, distinct.values())), peer=next(iter(to)))

    def _await(self, frames: Frames, src: int, context: str) -> Any:
        """Return the next message from `src`, None if none began to arrive in time."""
        tag, deadline = frames.tag, frames.deadline

        def act() -> memoryview | None:
            transport = self._network(frames.group).transport
            waiting: tuple[Pending, bytearray] | None = self._late.pop((tag, src), None)
            if waiting is None:
                block, staging = _buffer(_BLOCK)
                waiting = (transport.receive_later(staging, src, tag=tag), block)
            late, block = waiting
            if not late.wait(deadline.left()):
                self._late[tag, src] = waiting
                return None
            (length,) = _LENGTH.unpack_from(block)
            if length <= _INLINE:
                return memoryview(block)[_LENGTH.size : _LENGTH.size + length]
            if length > _MAX_FRAME:
                where = Call(frames.group.name, frames.operation, self._state.members, self._state.sequence).where
                raise wire.WireError(f"{where}: rank {src} in the group announced an object of {length} bytes")
            whole, staging = _buffer(length)
            whole[:_INLINE] = memoryview(block)[_LENGTH.size :]
            # The sender has begun: from here on a timeout is a failure of the group, and not only of this receive.
            left = deadline.at_least(self._state.timeouts.host)
            transport.exchange([], [(staging[_INLINE:], src)], tag=frames.rest, deadline=left)
            return memoryview(whole)

        return frames.perform(act, peer=src, is_made=has_come)

    def _network(self, group: Group) -> Network:
        """Return the connections of a group that is open; another thread may close it at any moment."""
        network = self._state.network
        if network is None:
            raise ContextClosedError(f"group {group.name!r} (rank {group.rank}): its context was closed during the call")
        return network

    def join(self, timeout: float) -> None:
        for late, _ in self._late.values():
            late.join(timeout)
        for comparing in self._comparing.values():
            comparing.join(timeout)
        self._late.clear()
        self._comparing.clear()


def has_come(frame: Any) -> bool:
    """Whether `_await` returned a message."""
    return frame is not None


def _others(group: Group) -> list[int]:
    return [peer for peer in range(group.world_size) if peer != group.rank_in_group]


@ambient.sheltered
def _block(frame: bytes, size: int) -> torch.Tensor:
    """Return the block of `size` bytes that announces a frame: its length, and as much of it as fits."""
    block = ambient.zeros(size, torch.uint8)
    head = _LENGTH.pack(len(frame)) + frame[: size - _LENGTH.size]
    block[: len(head)] = _tensor(head)
    return block


@ambient.sheltered
def _split(frame: bytes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the block that announces a message, and the rest that does not fit into it."""
    return _block(frame, _BLOCK), _tensor(frame[_INLINE:]) if len(frame) > _INLINE else None


def gather_frames(
    group: Group, operation: str, sequence: int, strategy: Communicator, frame: bytes, dst: int, deadline: Deadline
) -> list[memoryview] | None:
    """Return every rank's frame, in rank order, on `dst`, and None elsewhere: first a block of each on every rank, then the longer ones."""
    state, n = group._state, group.world_size
    what = f"{operation}(dst={dst})"
    tag, rest = make_tag(COLLECTIVE, sequence, what), make_tag(OBJECT_REST, sequence, "gather")

    def act() -> list[memoryview] | None:
        if state.comparison is not None:
            state.comparison.compare(Call(group.name, operation, state.members, sequence), what, deadline)
        short, sizes = _exchange_blocks(strategy, frame, n, tag, deadline)
        memory, out = _buffer(sum(sizes)) if group.rank_in_group == dst else (bytearray(), None)
        if any(sizes):
            strategy.gather(_tensor(frame if sizes[group.rank_in_group] else b""), 0, sizes, out, dst, tag=rest, deadline=deadline)
        return None if out is None else _frames_of(short, sizes, memory)

    return perform(group, operation, sequence, what, deadline, act, len(frame))


def _exchange_blocks(strategy: Communicator, frame: bytes, n: int, tag: int, deadline: Deadline) -> tuple[list[memoryview], list[int]]:
    """Give every rank a block; return the frames that fit into theirs, and of each rank the bytes of a longer one, else 0."""
    blocks, gathered = _buffer(n * _GATHERED)
    strategy.all_gather(_block(frame, _GATHERED), 0, [_GATHERED] * n, gathered, tag=tag, deadline=deadline)
    found = [memoryview(blocks)[start : start + _GATHERED] for start in range(0, n * _GATHERED, _GATHERED)]
    lengths = [_LENGTH.unpack_from(block)[0] for block in found]
    short = [block[_LENGTH.size : _LENGTH.size + length] for block, length in zip(found, lengths, strict=True)]
    return short, [length if length > _GATHERED - _LENGTH.size else 0 for length in lengths]


def _frames_of(short: Sequence[memoryview], sizes: Sequence[int], memory: bytearray) -> list[memoryview]:
    """Return the frames of all ranks: those that fitted into a block, and those of these sizes in `memory`, one after the other."""
    spans = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [memoryview(memory)[start:end] if end > start else frame for frame, (start, end) in zip(short, spans, strict=True)]


def checked_objects(group: Group, operation: str, objs: Any, sequence: int) -> list[Any]:
    """Return the objects of `scatter_object`, if there is one for each rank."""
    n = group.world_size
    try:
        if objs is None:
            raise BadArgument(f"objs is None on src, which has to give an object for each of {n} ranks")
        given = checks.several(objs, "objs")
        if len(given) != n:
            raise BadArgument(f"objs has {len(given)} entries, one for each of {n} ranks is needed")
    except BadArgument as error:
        raise explain(error, group, operation, sequence) from None
    return given


def _begin_message(group: Group, operation: str, peer: Any, name: str, timeout: Timeout) -> tuple[Deadline, int]:
    state = group._state
    state.ensure_open(group.name)
    deadline = deadline_of(group, operation, timeout)
    found = checked_peer(group, operation, peer, name, state.sequence, other=True)
    wait_pending(group, (found, name == "dst", OBJECTS), operation, deadline)
    return deadline, found


def checked_peer(group: Group, operation: str, value: Any, name: str, sequence: int, *, other: bool = False) -> int:
    """Return `value`, if it is a rank in the group; `other`: not the caller itself."""
    try:
        return checks.peer(group, value, name, other=other)
    except BadArgument as error:
        raise explain(error, group, operation, sequence) from None


def refuse_object(group: Group, operation: str, obj: object, error: Exception) -> TypeError:
    """Return the error for an object that could not be pickled."""
    # pickle raises AttributeError for a local function, PicklingError for others, and whatever an object's own __reduce__ raises.
    # TypeErrors are complete: our own of data that is not plain, or pickle's of an object that can never be pickled.
    what = f"{error}" if isinstance(error, TypeError) else f"cannot pickle a {type(obj).__name__}: {type(error).__name__}: {error}"
    return TypeError(f"{Call(group.name, operation, group._state.members, group._state.sequence).where}: {what}. Nothing was sent.")


def unreadable(group: Group, operation: str, src: int, error: Exception) -> Exception:
    """Return the error for an object from a rank in the group that does not unpickle: of its kind, and with a text that names them all."""
    kind, where = type(error), Call(group.name, operation, group._state.members, group._state.sequence).where
    text = (
        f"{where}: the object from rank {group.ranks[src]} ({src} in the group) came and is used up, but does not unpickle here: "
        f"{kind.__name__}: {error}. The group is unharmed"
    )
    named: Any = type(kind.__name__, (kind,), {"__str__": lambda _: text, "__module__": kind.__module__})
    made: Exception = named.__new__(named)
    made.args = error.args
    return made


def nothing_yet(group: Group, operation: str, sequence: int, src: int, seconds: float) -> CollectiveTimeoutError:
    """Return the error of a receive whose deadline passed before its object came, and note the wait: closing waits less after it."""
    group._state.note_wait_in_vain(seconds)
    call = Call(group.name, operation, group._state.members, sequence)
    return CollectiveTimeoutError(
        f"{call.where}: nothing came from rank {group.ranks[src]} ({src} in the group) within {seconds:g} s. The group is "
        "unharmed: call again to go on waiting for the same object",
        **call.facts,
    )


@ambient.sheltered
def _buffer(size: int) -> tuple[bytearray, torch.Tensor]:
    """Memory and a tensor over it (numpy, which could do the same, is not needed to run commgraph)."""
    memory = bytearray(size)
    return memory, ambient.over(memory)


@ambient.sheltered
def _tensor(data: bytes) -> torch.Tensor:
    memory, tensor = _buffer(len(data))
    memory[:] = data
    return tensor
