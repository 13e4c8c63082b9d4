"""Python objects as bytes that are safe to decode.

::

    with a key       0x12 | HMAC-SHA256 (32 bytes) | pickle      any object; nothing is unpickled before the HMAC is right
    without a key    0x11 | MessagePack                          plain data; reading it runs no code of the sender's

In a plain frame None, bool, float, bytes, str and integers of up to 64 bits are MessagePack's own. Every container is an array that
begins with the number of its kind; other types are extension types. A tuple stays a tuple, and nothing is guessed.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import io
import math
import pickle
import reprlib
import struct
from collections.abc import Callable
from types import MappingProxyType, NoneType
from typing import Any

import msgspec
import torch

from commgraph import ambient
from commgraph.carriers import CARRIERS, QUANTIZED
from commgraph.errors import CommGraphError
from commgraph.strided import pack, unpack

__all__ = ["WireError", "decode", "encode"]

# The upper half of the first byte is the version of the format.
_PLAIN, _SIGNED = b"\x11", b"\x12"
_MAC_BYTES = 32
_MAX_DEPTH = 200

_LIST, _TUPLE, _SET, _FROZENSET, _DICT, _SIZE, _TENSOR = range(7)
_BIG_INT, _COMPLEX, _BYTEARRAY, _SURROGATES, _DTYPE, _DEVICE = range(6)

_AS_THEY_ARE = frozenset({NoneType, bool, float, bytes})
_SEQUENCES: MappingProxyType[type, int] = MappingProxyType(
    {list: _LIST, tuple: _TUPLE, set: _SET, frozenset: _FROZENSET, torch.Size: _SIZE}
)
_BUILDERS: MappingProxyType[int, Callable[[list[Any]], Any]] = MappingProxyType({number: kind for kind, number in _SEQUENCES.items()})
_DTYPES = MappingProxyType({str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)})


class WireError(CommGraphError, ValueError):
    """Bytes that are no frame, or no frame signed with the key."""


def encode(obj: Any, *, key: bytes | None, context: bytes) -> bytes:
    """Return an object as a frame.

    Without a key an object is None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset,
    ``torch.dtype``, ``torch.Size``, ``torch.device`` or a strided ``torch.Tensor`` on the host, of exactly these types (no subclass,
    no enum), nested up to 200 deep. An object that occurs twice arrives as two, and a tensor with its strides and the attributes
    that were set on it (plain data, too), without its history of gradients.

    Args:
        obj: what to send.
        key: secret that sender and receiver share; None if there is none. It then must be plain data.
        context: identity of this frame (group, source, counter): `decode` takes the frame under this context only, so that a signed
            frame cannot be replayed or moved. Means nothing without a key.

    Raises:
        TypeError: an object in it is no plain data, saying which and where. With a key: what pickle raises.
        ValueError: nested too deep, or contains itself; larger than 4 GiB - 1 in one piece; the key is empty.
    """
    if key is not None:
        try:
            buffer = io.BytesIO()
            _Pickler(buffer, protocol=5).dump(obj)
            payload = buffer.getvalue()
        except RecursionError:
            raise ValueError("the object to send is nested too deep for pickle") from None
        return b"".join((_SIGNED, _mac(key, context, payload), payload))
    try:
        return _PLAIN + msgspec.msgpack.encode(_pack(obj, _MAX_DEPTH))
    except _RefusedError as refused:
        raise refused.kind(refused.describe()) from None
    except (OverflowError, msgspec.EncodeError) as error:
        raise ValueError(f"an object to send has a piece that is too large: {error}; {_ADVICE}") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def decode(frame: bytes | bytearray | memoryview, *, key: bytes | None, context: bytes) -> Any:
    """Return the object of a frame.

    Without a key it runs nothing and allocates in proportion to the frame. Tensors are on the host, writable, and own their memory.

    Args:
        frame: the result of `encode`.
        key: the sender's key; None if it has none.
        context: the sender's context.

    Raises:
        WireError: malformed, not signed with this key for this context, or signed where there is no key. Of a frame that is
            signed rightly, whatever unpickling raises.
        ValueError: the key is empty.
    """
    view = memoryview(frame).cast("B")
    codec = bytes(view[:1])
    if codec not in (_PLAIN, _SIGNED):
        raise WireError(f"no frame of this version of commgraph: it begins with {codec!r}")
    if key is None:
        if codec != _PLAIN:
            raise WireError("the sender has an authkey and this rank has none: give every rank the same, World.from_env(authkey=...)")
        return _decode_plain(view[1:])
    if codec != _SIGNED:
        raise WireError("this rank has an authkey and the frame is not signed: give every rank the same, World.from_env(authkey=...)")
    mac, payload = view[1 : 1 + _MAC_BYTES], view[1 + _MAC_BYTES :]
    if not hmac.compare_digest(mac, _mac(key, context, payload)):
        raise WireError("the frame is not signed with this rank's authkey, or belongs elsewhere: it was damaged, moved or forged")
    return pickle.loads(payload)


class _Pickler(pickle.Pickler):
    """Pickles plain host tensors by their values.

    torch's own reduction sends the whole storage of a view, and fails on dtypes without a typed storage (float8, most unsigned integers).
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is pickled; NotImplemented leaves it to pickle."""
        if type(obj) is not torch.Tensor or obj.requires_grad:
            return NotImplemented
        try:
            made = tuple(_pack_tensor(obj)[1:])
        except _RefusedError:
            return NotImplemented
        return (_unpack_tensor, made, obj.__dict__, None, None, _set_attributes) if obj.__dict__ else (_unpack_tensor, made)


def _mac(key: bytes, context: bytes, payload: bytes | memoryview) -> bytes:
    if not key:
        raise ValueError("the authkey is empty; None means that there is none")
    # With the length in front, no byte can pass from the context to the payload.
    mac = hmac.new(key, _SIGNED + struct.pack(">Q", len(context)) + context, hashlib.sha256)
    mac.update(payload)
    return mac.digest()


_ADVICE = "set an authkey (World.from_env(authkey=...) or COMMGRAPH_AUTHKEY) to send any picklable object between hosts"
_TOO_DEEP = f"an object to send is nested deeper than {_MAX_DEPTH} levels, or contains itself"


class _RefusedError(Exception):
    """An object that cannot be sent; its path is assembled while the exception passes through the containers."""

    def __init__(self, kind: type[Exception], what: str, advice: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.advice = advice
        self.steps: list[str] = []

    def describe(self) -> str:
        steps = self.steps[::-1]
        place = "obj" + "".join(steps if len(steps) <= 8 else [*steps[:8], "..."])
        return f"{self.what} at {place}{self.advice}"


def _not_plain(what: str) -> _RefusedError:
    return _RefusedError(TypeError, f"without an authkey only plain data travels between hosts, not {what}", f"; {_ADVICE}")


def _pack(value: Any, depth: int) -> Any:
    """Return the value as a tree of MessagePack types. Types are compared by identity: a subclass would arrive as something else."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is str:
        return value if _is_utf8(value) else _ext(_SURROGATES, value.encode("utf-8", "surrogatepass"))
    if kind is int:
        return value if -(2**63) <= value < 2**64 else _ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if kind in _SEQUENCES or kind is dict:
        if not depth:
            raise _RefusedError(ValueError, _TOO_DEEP)
        return _pack_dict(value, depth - 1) if kind is dict else _pack_sequence(value, _SEQUENCES[kind], depth - 1)
    if kind is torch.Tensor:
        return _pack_attributes(value, _pack_tensor(value), depth)
    if kind is complex:
        return _ext(_COMPLEX, struct.pack(">dd", value.real, value.imag))
    if kind is bytearray:
        return _ext(_BYTEARRAY, bytes(value))
    if kind is torch.dtype:
        return _ext(_DTYPE, _name(value).encode())
    if kind is torch.device:
        return _ext(_DEVICE, str(value).encode())
    raise _not_plain(f"a {kind.__module__}.{kind.__qualname__}")


def _pack_sequence(value: Any, number: int, depth: int) -> list[Any]:
    packed: list[Any] = [number]
    for index, item in enumerate(value):
        try:
            packed.append(_pack(item, depth))
        except _RefusedError as refused:
            refused.steps.append("{...}" if number in (_SET, _FROZENSET) else f"[{index}]")
            raise
    return packed


def _pack_dict(value: dict[Any, Any], depth: int) -> list[Any]:
    packed: list[Any] = [_DICT]
    for name, item in value.items():
        place = ".keys()"
        try:
            packed.append(_pack(name, depth))
            place = ""
            packed.append(_pack(item, depth))
        except _RefusedError as refused:
            # The repr of a key that was not found plain may be anything.
            refused.steps.append(place or f"[{reprlib.repr(name)}]")
            raise
    return packed


@ambient.sheltered
def _pack_tensor(value: torch.Tensor) -> list[Any]:
    if value.device.type != "cpu":
        raise _not_plain(f"a tensor on {value.device} (move it to the host first)")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.dtype in QUANTIZED:
        raise _not_plain(f"a tensor of layout {value.layout}, nested or quantized")
    bits, strides = pack(value)
    data = bytes((ctypes.c_ubyte * bits.nbytes).from_address(bits.data_ptr())) if bits.nbytes else b""
    return [_TENSOR, _name(value.dtype), list(value.shape), data, *(() if strides is None else (list(strides),))]


def _pack_attributes(value: torch.Tensor, packed: list[Any], depth: int) -> list[Any]:
    """Add the attributes that its user gave to a tensor, if any."""
    if not value.__dict__:
        return packed
    if not depth:
        raise _RefusedError(ValueError, _TOO_DEEP)
    try:
        return [*packed, *[None] * (5 - len(packed)), _pack_dict(value.__dict__, depth - 1)]
    except _RefusedError as refused:
        refused.steps.append(".__dict__")
        raise


def _ext(code: int, data: bytes) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode_plain(payload: memoryview) -> Any:
    try:
        return _unpack(msgspec.msgpack.decode(payload), _MAX_DEPTH)
    except WireError:
        raise
    # Errors of msgspec, of int, str and struct, of hashing an unhashable key, and of torch about sizes and names.
    except (ValueError, TypeError, struct.error, RecursionError, RuntimeError, OverflowError) as error:
        raise WireError(f"malformed frame: {error}") from error


def _unpack(node: Any, depth: int) -> Any:
    kind = type(node)
    if kind in _AS_THEY_ARE or kind is int or kind is str:
        return node
    if kind is msgspec.msgpack.Ext:
        return _unpack_ext(node.code, node.data)
    if kind is not list or not node or type(node[0]) is not int:
        raise WireError(f"malformed frame: no object is a {kind.__name__} in MessagePack")
    if not depth:
        raise WireError(f"malformed frame: nested deeper than {_MAX_DEPTH} levels")
    number = node[0]
    if number == _TENSOR:
        made = _unpack_tensor(*node[1:5])
        for attributes in node[5:]:
            found = _unpack(attributes, depth - 1)
            if type(found) is not dict or not all(type(name) is str for name in found):
                raise WireError("malformed frame: attributes of a tensor are a dict of names")
            _set_attributes(made, found)
        return made
    items = [_unpack(item, depth - 1) for item in node[1:]]
    if number == _DICT:
        return dict(zip(items[::2], items[1::2], strict=True))
    if number not in _BUILDERS:
        raise WireError(f"malformed frame: no container has the number {number}")
    return _BUILDERS[number](items)


def _unpack_ext(code: int, data: bytes) -> Any:
    if code == _BIG_INT:
        return int.from_bytes(data, "big", signed=True)
    if code == _COMPLEX:
        return complex(*struct.unpack(">dd", data))
    if code == _BYTEARRAY:
        return bytearray(data)
    if code == _SURROGATES:
        return data.decode("utf-8", "surrogatepass")
    if code == _DTYPE:
        return _dtype(data.decode("ascii"))
    if code == _DEVICE:
        name = data.decode("ascii")
        device = torch.device(name)
        if str(device) != name:  # torch cuts the index to 8 bits
            raise WireError(f"malformed frame: no device {reprlib.repr(name)}")
        return device
    raise WireError(f"malformed frame: no extension has the number {code}")


@ambient.sheltered
def _unpack_tensor(name: Any, shape: Any, data: Any, strides: Any = None) -> torch.Tensor:
    sizes = shape if _are_sizes(shape) else None
    if type(name) is not str or sizes is None or type(data) is not bytes or not (strides is None or _are_sizes(strides)):
        raise WireError("malformed frame: a tensor is a dtype, sizes, bytes and strides")
    dtype = _dtype(name)
    # Checked before anything is allocated. Quantized dtypes are refused: their tensors have a scale, too.
    fits = math.prod(sizes) * dtype.itemsize == len(data) if strides is None else len(data) % dtype.itemsize == 0
    if not fits or dtype in QUANTIZED:
        raise WireError(f"malformed frame: {len(data)} bytes are no {name} tensor of shape {reprlib.repr(sizes)}")
    bits = ambient.empty(sizes if strides is None else len(data) // dtype.itemsize, CARRIERS[dtype.itemsize])
    ctypes.memmove(bits.data_ptr(), data, len(data))
    return bits.view(dtype) if strides is None else unpack(bits, sizes, strides).view(dtype)


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(size) is int and size >= 0 for size in value)


def _set_attributes(x: torch.Tensor, attributes: dict[str, Any]) -> None:
    x.__dict__.update(attributes)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise WireError(f"this torch has no dtype {reprlib.repr(name)}")
    return _DTYPES[name]
