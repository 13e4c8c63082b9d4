"""Pickled objects in parts, of which the first is signed: what decides how the rest is read, and which code runs.

::

    0x13 | keyed BLAKE2b (32 bytes) | payloads, buffers (4 bytes each) | their lengths (8 bytes each) | offsets of the payloads | pickle

Payloads are the contents of large bytes, bytearrays and strings, which pickle writes behind an opcode and their length: they are taken
out of the pickle at these offsets. Buffers are those of pickle's protocol 5 (PEP 574), such as the elements of tensors. Both are bytes
that nothing interprets; they are sent beside the first part, unsigned as tensors are, and without a copy. The signature is over everything
else and over the context of the frame; nothing is unpickled, and no memory taken, before it is right.
"""

from __future__ import annotations

import hmac
import pickle
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from commgraph.shm.pickling import Pickler, loads
from commgraph.wire import WireError

__all__ = ["Key", "Sealed", "key_of", "open_sealed", "seal"]

# A keyed hash that has taken no message in.
Key = blake2b

_CODEC = b"\x13"
_MAC_BYTES = 32
_COUNTS = struct.Struct("<II")
# Bytes of a payload from which on it is sent beside the pickle: pickle writes pieces of that size apart from its frames.
_APART = 1 << 16
# Opcodes in front of a payload, by how many bytes of length follow them.
_OPCODES = ((8, (b"\x8d", b"\x8e", b"\x96")), (4, (b"X", b"B")))
_MOST_BYTES = 1 << 40


def seal(obj: object, pickler: Pickler, key: Key, context: bytes) -> tuple[Any, ...]:
    """Return the parts of an object, the signed one first. The others are views of the object: send them before it changes.

    Raises:
        ValueError: nested too deep.
        Exception: whatever pickling raises.
    """
    try:
        pieces, buffers = pickler.dumps_in_pieces(obj)
    except RecursionError:
        raise ValueError("the object to send is nested too deep for pickle") from None
    if len(pieces) == 1 and not buffers:
        body = _COUNTS.pack(0, 0) + pieces[0]
        return (b"".join((_CODEC, _sign(key, context, body), body)),)
    kept: list[bytes] = []
    payloads: list[Any] = []
    offsets: list[int] = []
    at = 0
    for piece in pieces:
        if len(piece) >= _APART and kept and _announces(kept[-1], len(piece)):
            payloads.append(piece)
            offsets.append(at)
        else:
            kept.append(piece)
            at += len(piece)
    beside = [*payloads, *buffers]
    lengths = [memoryview(part).nbytes for part in beside]
    numbers = struct.pack(f"<{len(lengths) + len(offsets)}Q", *lengths, *offsets)
    body = b"".join((_COUNTS.pack(len(payloads), len(buffers)), numbers, *kept))
    return (b"".join((_CODEC, _sign(key, context, body), body)), *beside)


def _announces(piece: bytes, length: int) -> bool:
    """Whether a piece of a pickle ends with the opcode and the length of a payload."""
    return any(
        len(piece) > width and piece[-width - 1 : -width] in opcodes and int.from_bytes(piece[-width:], "little") == length
        for width, opcodes in _OPCODES
    )


def _sign(key: Key, context: bytes, body: bytes | memoryview) -> bytes:
    # RFC 7693. Of small messages a third of the time of an HMAC. With the length in front, no byte can pass from the context to the body.
    mac = key.copy()
    mac.update(len(context).to_bytes(8, "big") + context)
    mac.update(body)
    return mac.digest()


def key_of(authkey: bytes) -> Key:
    """Return the key by which messages are signed where the job has this authkey: the hash that has taken it in, copied for each message.

    Raises:
        ValueError: it is empty.
    """
    if not authkey:
        raise ValueError("the authkey is empty; None means that there is none")
    key = blake2b(authkey, digest_size=_MAC_BYTES, person=b"commgraph key").digest()
    return blake2b(key=key, digest_size=_MAC_BYTES, person=_CODEC)


class Sealed:
    """A first part whose signature was right.

    Attributes:
        lengths: bytes of the parts beside it, in order.
    """

    __slots__ = ("_body", "_n_payloads", "_offsets", "lengths")

    def __init__(self, body: memoryview, n_payloads: int, lengths: list[int], offsets: Sequence[int]) -> None:
        self.lengths = lengths
        self._body = body
        self._n_payloads = n_payloads
        self._offsets = offsets

    def load(self, beside: Sequence[Any]) -> Any:
        """Return the object, over the memory of its buffers.

        Args:
            beside: the other parts.

        Raises:
            Exception: whatever unpickling raises.
        """
        payloads, buffers = beside[: self._n_payloads], beside[self._n_payloads :]
        if not payloads:
            return loads(self._body, buffers)
        ends = [*self._offsets, len(self._body)]
        segments = [self._body[: ends[0]]]
        for payload, begin, end in zip(payloads, ends, ends[1:], strict=False):
            segments += [memoryview(payload), self._body[begin:end]]
        return pickle.Unpickler(_Stream(segments), buffers=buffers).load()


def open_sealed(head: Any, key: Key, context: bytes) -> Sealed:
    """Return a first part after a check of its signature.

    Raises:
        WireError: it is not signed with this key for this context.
    """
    view = memoryview(head)
    body = view[1 + _MAC_BYTES :]
    if view[:1] != _CODEC or len(body) < _COUNTS.size:
        raise WireError(f"no signed object of this version of commgraph: it begins with {bytes(view[:1])!r}")
    if not hmac.compare_digest(view[1 : 1 + _MAC_BYTES], _sign(key, context, body)):
        raise WireError("the object is not signed with this rank's authkey, or belongs elsewhere: it was damaged, moved or forged")
    n_payloads, n_buffers = _COUNTS.unpack_from(body)
    if not n_payloads and not n_buffers:
        return Sealed(body[_COUNTS.size :], 0, [], ())
    numbers = struct.unpack_from(f"<{2 * n_payloads + n_buffers}Q", body, _COUNTS.size)
    lengths = list(numbers[: n_payloads + n_buffers])
    if sum(lengths) > _MOST_BYTES:
        raise WireError(f"an object of {sum(lengths)} bytes was announced")
    return Sealed(body[_COUNTS.size + 8 * len(numbers) :], n_payloads, lengths, numbers[len(lengths) :])


class _Stream:
    """A file that pickle reads: segments one after the other, without a copy of all."""

    def __init__(self, segments: Sequence[memoryview]) -> None:
        self._segments = [segment for segment in segments if len(segment)][::-1]
        self._at = 0

    def readinto(self, into: Any) -> int:
        """Fill as much of `into` as the segments have."""
        whole = memoryview(into).cast("B")
        filled = 0
        while filled < len(whole) and self._segments:
            segment = self._segments[-1]
            some = min(len(whole) - filled, len(segment) - self._at)
            whole[filled : filled + some] = segment[self._at : self._at + some]
            filled += some
            self._at += some
            if self._at == len(segment):
                self._segments.pop()
                self._at = 0
        return filled

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, or what is left."""
        made = bytearray(count)
        return bytes(memoryview(made)[: self.readinto(made)])

    def readline(self) -> bytes:
        """Return the next bytes up to the end of a line."""
        made = bytearray()
        while (one := self.read(1)) and one != b"\n":
            made += one
        return bytes(made + one)
