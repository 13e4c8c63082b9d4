"""Python objects between the ranks of a group, as authenticated frames over the group's connections.

A message is one block of `_BLOCK` bytes (its length, then as much of the frame as fits) and, for a longer frame, the rest of it: most
objects travel in one message. A receive that runs out before its block arrived stays posted, and the next receive from
that rank goes on waiting for it.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commgraph import wire
from commgraph.communicators.gloo_transport import Background, GlooTransport
from commgraph.communicators.signature import COLLECTIVE, OBJECT, OBJECT_REST, make_tag
from commgraph.coordinator.call import Call, place
from commgraph.coordinator.link import GroupLink
from commgraph.coordinator.tensor_dict import Entry
from commgraph.errors import CollectiveTimeoutError

__all__ = ["ObjectPath", "nothing_yet", "refuse_object"]

_BLOCK = 4096
_LENGTH = struct.Struct("<Q")
_INLINE = _BLOCK - _LENGTH.size
# Seconds; the caller's own deadlines are kept elsewhere.
_FOR_EVER = 365 * 86400.0
# A frame beyond this is not a message but a mistake (or an attack); nothing is allocated for it.
_MAX_FRAME = 1 << 40


class ObjectPath:
    """Sends and receives objects for one link."""

    def __init__(self, link: GroupLink) -> None:
        self._link = link
        # Receives that a caller's deadline left behind, by tag and source.
        self._late: dict[tuple[int, int], tuple[Background, bytearray]] = {}
        # The same for a comparison with the peers, by tag.
        self._comparing: dict[int, Background] = {}

    def send(self, call: Call, obj: object, dst: int, timeout: float) -> None:
        """Sends `obj` to one rank."""
        self._pack(call, obj, dst)(timeout)

    def _pack(self, call: Call, obj: object, dst: int) -> Callable[[float], None]:
        """Encodes and numbers a message to one rank; what is returned sends it."""
        number = self._link.count(OBJECT, dst, outgoing=True)
        try:
            frame = self._encode(call, obj, f"message {call.rank_in_group} {dst} {number}")
        except (TypeError, ValueError):
            # The receiver goes on waiting for this number: the next object takes it.
            self._link.uncount(OBJECT, dst, outgoing=True)
            raise
        return lambda timeout: self._post(call, frame, [dst], make_tag(OBJECT, number), make_tag(OBJECT_REST, number), timeout)

    def recv(self, call: Call, src: int, timeout: float) -> Any:
        """The next object from one rank."""
        number = self._link.count(OBJECT, src, outgoing=False)
        frame = self._await(call, src, make_tag(OBJECT, number), make_tag(OBJECT_REST, number), timeout)
        if frame is None:
            self._link.uncount(OBJECT, src, outgoing=False)
            raise nothing_yet(self._link, call, src, timeout)
        return self._decode(frame, f"message {src} {call.rank_in_group} {number}")

    def broadcast(self, call: Call, obj: object, src: int, timeout: float) -> Any:
        """`obj` of `src`, on every rank. On `src` the object itself."""
        context = f"broadcast {src} {call.sequence}"
        what = f"{call.operation}(src={src})"
        tag = make_tag(COLLECTIVE, call.sequence, what)
        rest = make_tag(OBJECT_REST, call.sequence, "broadcast")
        if call.rank_in_group == src:
            try:
                frame = self._encode(call, obj, context)
            except (TypeError, ValueError):
                # The others wait for this call's object: the next one is theirs.
                self._link.uncount_collective()
                raise
            if self._link.check:
                with self._link.guard(call, what, timeout):
                    self._link.compare(call, what, timeout)
            self._post(call, frame, [peer for peer in range(call.world_size) if peer != src], tag, rest, timeout)
            return obj
        started = time.monotonic()
        received = None
        if not self._link.check or self._compared(call, what, tag, timeout):
            received = self._await(call, src, tag, rest, max(timeout - (time.monotonic() - started), 0.001))
        if received is None:
            self._link.uncount_collective()
            raise nothing_yet(self._link, call, src, timeout)
        self._comparing.pop(tag, None)
        return self._decode(received, context)

    def _compared(self, call: Call, what: str, tag: int, timeout: float) -> bool:
        """Compares this call with those of the peers, once; False if not all of them came in time, so that the next call goes on."""
        with self._link.guard(call, what, timeout):
            if tag not in self._comparing:
                at = place()
                self._comparing[tag] = Background(lambda: self._link.compare(call, what, _FOR_EVER, at=at))
            return self._comparing[tag].wait(timeout)

    def all_gather(self, call: Call, obj: object, timeout: float) -> list[Any]:
        """Every rank's object, in rank order."""
        deadline = time.monotonic() + timeout
        me, n = call.rank_in_group, call.world_size
        frame = self._encode(call, obj, f"gather {me} {call.sequence}")
        link = self._link
        route = link.route("all_gather", (n, 1), torch.uint8, torch.device("cpu"))

        def gather(tag: int, seconds: float) -> list[memoryview]:
            lengths = torch.empty(n, dtype=torch.int64)
            route.all_gather(torch.tensor([len(frame)]), 0, [1] * n, lengths, tag=tag, timeout=seconds)
            sizes = [int(length) for length in lengths]
            memory, out = _buffer(sum(sizes))
            rest = make_tag(OBJECT_REST, call.sequence, "gather")
            route.all_gather(_tensor(frame), 0, sizes, out, tag=rest, timeout=max(deadline - time.monotonic(), 0.001))
            ends = list(itertools.accumulate(sizes, initial=0))
            return [memoryview(memory)[begin:end] for begin, end in itertools.pairwise(ends)]

        frames = link.run(call, "", timeout, gather)
        return [obj if i == me else self._decode(frame, f"gather {i} {call.sequence}") for i, frame in enumerate(frames)]

    # Dicts, taken apart: here only the description is an object, and the tensors go as tensors.

    def pack_dict(
        self, call: Call, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[float], None]]:
        """Which tensors go with the description, and what sends both."""
        return frozenset(), self._pack(call, list(entries), dst)

    def recv_dict(self, call: Call, src: int, timeout: float) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        """The description, and the tensors that came with it."""
        return self.recv(call, src, timeout), {}

    def broadcast_dict(
        self, call: Call, entries: Sequence[Entry] | None, tensors: Sequence[torch.Tensor], src: int, timeout: float
    ) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        """The same from one rank to all."""
        return self.broadcast(call, None if entries is None else list(entries), src, timeout), {}

    def _encode(self, call: Call, obj: object, context: str) -> bytes:
        try:
            return wire.encode(obj, key=self._link.key, context=f"{self._link.ident} {context}".encode())
        except ValueError as error:
            raise call.wrong(str(error)) from error
        except Exception as error:
            raise refuse_object(call, obj, error) from error

    def _decode(self, frame: memoryview, context: str) -> Any:
        return wire.decode(frame, key=self._link.key, context=f"{self._link.ident} {context}".encode())

    def _post(self, call: Call, frame: bytes, peers: Sequence[int], tag: int, rest: int, timeout: float) -> None:
        block = torch.zeros(_BLOCK, dtype=torch.uint8)
        head = _LENGTH.pack(len(frame)) + frame[:_INLINE]
        block[: len(head)] = _tensor(head)
        deadline = time.monotonic() + timeout
        with self._link.guard(call, f"{call.operation}(...)", timeout):
            transport = self._transport()
            transport.exchange([(block, peer) for peer in peers], [], tag=tag, timeout=timeout)
            if len(frame) > _INLINE:
                tail = _tensor(frame[_INLINE:])
                transport.exchange([(tail, peer) for peer in peers], [], tag=rest, timeout=max(deadline - time.monotonic(), 0.001))

    def _await(self, call: Call, src: int, tag: int, rest: int, timeout: float) -> memoryview | None:
        """The next frame from `src`, None if none began to arrive in time."""
        deadline = time.monotonic() + timeout
        with self._link.guard(call, f"{call.operation}(...)", timeout):
            transport = self._transport()
            waiting = self._late.pop((tag, src), None)
            if waiting is None:
                block, landing = _buffer(_BLOCK)
                waiting = (transport.receive_later(landing, src, tag=tag), block)
            late, block = waiting
            if not late.wait(timeout):
                self._late[tag, src] = waiting
                return None
            (length,) = _LENGTH.unpack_from(block)
            if length <= _INLINE:
                return memoryview(block)[_LENGTH.size : _LENGTH.size + length]
            if length > _MAX_FRAME:
                raise wire.WireError(f"{call.where}: rank {src} in the group announced an object of {length} bytes")
            whole, landing = _buffer(length)
            whole[:_INLINE] = memoryview(block)[_LENGTH.size :]
            # The sender is at it: from here on a pause is a failure of the group, and not only of this receive.
            left = max(deadline - time.monotonic(), self._link.host_timeout)
            transport.exchange([], [(landing[_INLINE:], src)], tag=rest, timeout=left)
            return memoryview(whole)

    def _transport(self) -> GlooTransport:
        transport = self._link.transport
        assert transport is not None
        return transport

    def join(self, timeout: float) -> None:
        """Waits for the threads of receives that were left behind, after the connections were closed."""
        for late, _ in self._late.values():
            late.join(timeout)
        for comparing in self._comparing.values():
            comparing.join(timeout)
        self._late.clear()
        self._comparing.clear()


def refuse_object(call: Call, obj: object, error: Exception) -> TypeError:
    """The error for an object that could not be pickled."""
    # pickle raises AttributeError for a local function, PicklingError for others, and whatever an object's own __reduce__ raises.
    # TypeErrors are our own, of what is no plain data, or pickle's of what never can be: they say it all.
    what = f"{error}" if isinstance(error, TypeError) else f"cannot pickle a {type(obj).__name__}: {type(error).__name__}: {error}"
    return TypeError(f"{call.where}: {what}. Nothing was sent.")


def nothing_yet(link: GroupLink, call: Call, src: int, timeout: float) -> CollectiveTimeoutError:
    """The error of a receive whose deadline passed before its object came."""
    return CollectiveTimeoutError(
        f"{call.where}: nothing came from rank {link.ranks[src]} ({src} in the group) within {timeout:g} s. The group is "
        "unharmed: call again to go on waiting for the same object",
        **call.facts,
    )


def _buffer(size: int) -> tuple[bytearray, torch.Tensor]:
    """Memory and a tensor over it (numpy, which could do the same, is not needed to run commgraph)."""
    memory = bytearray(size)
    return memory, torch.frombuffer(memory, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _tensor(data: bytes) -> torch.Tensor:
    memory, tensor = _buffer(len(data))
    memory[:] = data
    return tensor
