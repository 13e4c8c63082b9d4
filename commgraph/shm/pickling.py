"""Python objects as a pickle and its large buffers, which are sent beside it without a copy (pickle protocol 5, PEP 574).

For processes that share memory and so trust each other; `commgraph.wire` is for frames from a network.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from commgraph import ambient
from commgraph.carriers import CARRIERS, QUANTIZED
from commgraph.strided import pack, unpack

__all__ = ["Pickler", "buffer_of", "loads", "tensor_over"]

# Bytes of a buffer from which on it is sent beside the pickle.
_OUT_OF_BAND = 4096
# Picklers that are kept for later calls.
_IDLE = 4


class Pickler:
    """Pickles objects to the parts of records, on several threads at once and also within itself: an object's `__reduce__` may call in."""

    def __init__(self) -> None:
        # Those that no call uses. Appending and popping are atomic.
        self._idle = [_Parts()]

    def dumps(self, obj: object) -> tuple[Any, ...]:
        """Return the parts of a record: the pickle, then its buffers. They are views of the object: write them before it changes.

        Raises:
            Exception: whatever pickling raises.
        """
        one = self._take()
        pieces = one.pieces
        try:
            one.dump(obj)
            return (pieces[0] if len(pieces) == 1 else b"".join(pieces), *one.buffers)
        finally:
            self._give_back(one)

    def dumps_in_pieces(self, obj: object) -> tuple[list[bytes], list[memoryview]]:
        """Return the pieces in which pickle writes an object, and its buffers, as `dumps`.

        Raises:
            Exception: whatever pickling raises.
        """
        one = self._take()
        try:
            one.dump(obj)
            return one.pieces[:], one.buffers[:]
        finally:
            self._give_back(one)

    def _take(self) -> _Parts:
        try:
            return self._idle.pop()
        except IndexError:
            return _Parts()

    def _give_back(self, one: _Parts) -> None:
        # The memo knows objects by address, which another object may have by the next call.
        one.clear_memo()
        one.pieces.clear()
        one.buffers.clear()
        if len(self._idle) < _IDLE:
            self._idle.append(one)


class _Parts:
    """Pickles one object at a time: `dump(obj)` fills `pieces` and `buffers`."""

    __slots__ = ("buffers", "clear_memo", "dump", "pieces")

    def __init__(self) -> None:
        # What pickle writes: one piece, and three for each large bytes object in it.
        self.pieces: list[bytes] = []
        self.buffers: list[memoryview] = []
        pickler = _Pickler(SimpleNamespace(write=self.pieces.append), protocol=5, buffer_callback=self._take)
        self.dump, self.clear_memo = pickler.dump, pickler.clear_memo

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _OUT_OF_BAND:
            return True  # in band
        self.buffers.append(view)
        return False


class _Pickler(pickle.Pickler):
    """Pickles plain host tensors by their values: torch's own reduction copies the whole storage of a view, and fails on float8."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object that is not of a built-in kind is pickled; NotImplemented leaves it to pickle."""
        if type(obj) is not torch.Tensor or obj.requires_grad:
            return NotImplemented
        if obj.device.type != "cpu" or obj.layout is not torch.strided or obj.is_nested or obj.is_quantized or obj.dtype in QUANTIZED:
            return NotImplemented
        return reduce_tensor(obj)


@ambient.sheltered
def reduce_tensor(x: torch.Tensor) -> Any:
    """Return how a tensor is pickled: by its elements and strides, and with the attributes that its user gave it."""
    elements, strides = pack(x)
    made = (pickle.PickleBuffer(_memory_of(elements)), x.dtype, tuple(x.shape), *(() if strides is None else (strides,)))
    return (tensor_over, made, x.__dict__, None, None, set_attributes) if x.__dict__ else (tensor_over, made)


def set_attributes(x: torch.Tensor, attributes: dict[str, Any]) -> None:
    """Give an unpickled tensor its attributes."""
    x.__dict__.update(attributes)


@ambient.sheltered
def buffer_of(x: torch.Tensor) -> Any:
    """Return the bytes of a strided host tensor as a buffer, which keeps them alive: its own memory, or that of a contiguous copy."""
    return _memory_of(x.detach().resolve_conj().resolve_neg().view(CARRIERS[x.dtype.itemsize]).contiguous())


def _memory_of(bits: torch.Tensor) -> Any:
    if not bits.nbytes:
        return bytearray()
    buffer = (ctypes.c_ubyte * bits.nbytes).from_address(bits.data_ptr())
    buffer.owner = bits  # type: ignore[attr-defined]  # it takes any attribute
    return buffer


@ambient.sheltered
def tensor_over(buffer: Any, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None) -> torch.Tensor:
    """Return a tensor over a writable buffer, which it keeps alive; with strides it may have memory of its own."""
    if not len(buffer):
        return ambient.empty(tuple(shape), dtype)
    return unpack(ambient.over(buffer, dtype), shape, strides)


def loads(pickled: bytes | memoryview, buffers: Iterable[Any]) -> Any:
    """Return the object of a record, over the memory of its buffers. An iterator of buffers is advanced by those of the object."""
    return pickle.loads(pickled, buffers=buffers)
