"""Intel's oneCCL for host tensors, through its C API.

Of its wheels two are needed, in this order and without what they ask for, since the C API and the part of it for CPUs are in the one, and
the library for CPUs in the other: ``pip install --no-deps oneccl && pip install --no-deps oneccl-cpu``. They want libfabric, which PyPI
does not have: that of the system (``libfabric1``) or of the wheel ``mpich``.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from commgraph.bench.library import Buffers, Library

__all__ = ["Peer"]

_INSTALL = "pip install --no-deps oneccl && pip install --no-deps oneccl-cpu, and libfabric: apt install libfabric1, or pip install mpich"
# Numbers of its header ccl/v2/types.h.
_ID_BYTES = 4096
_SUM = 0
_DTYPES = MappingProxyType(
    {
        torch.int8: 0,
        torch.uint8: 1,
        torch.int32: 2,
        torch.int64: 4,
        torch.float16: 6,
        torch.float32: 7,
        torch.float64: 8,
        torch.bfloat16: 9,
    }
)


class _Id(ctypes.Structure):
    """Made by rank 0, by which the ranks meet."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (("data", ctypes.c_char * _ID_BYTES),)


class Peer(Library):
    """The collectives and messages of its C API: it has no barrier there."""

    name = "oneCCL"

    def available(self) -> str | None:
        """Needs the libraries of two wheels and libfabric, and ranks that are processes."""
        if self.job.started == "threads":
            return "its ranks are processes"
        if os.environ.get("CCL_PLUGIN") != "ONECCL_LEGACY_CPU":
            return "its C API asks the environment for the part for CPUs: start with CCL_PLUGIN=ONECCL_LEGACY_CPU commgraph bench ..."
        try:
            self._library = _load()
        except OSError as error:
            return f"its libraries cannot be loaded ({error}): {_INSTALL}"
        return None

    def prepare(self) -> None:
        """Connects the ranks: by shared memory on one host, and by libfabric."""
        world, library = self.job.world, self._library
        library.onecclGetErrorString.restype = ctypes.c_char_p
        version, unique, pointer = ctypes.c_int(), _Id(), ctypes.c_void_p
        _check(library, "onecclGetVersion", ctypes.byref(version))
        if world.rank == 0:
            _check(library, "onecclGetUniqueId", ctypes.byref(unique))
        given = _Id.from_buffer_copy(world.group.broadcast_object(bytes(unique)))
        library.onecclCommInitRank.argtypes = [ctypes.POINTER(pointer), ctypes.c_size_t, _Id, ctypes.c_int]
        self._comm = pointer()
        _check(library, "onecclCommInitRank", ctypes.byref(self._comm), world.size, given, world.rank)
        self.name = f"oneCCL {version.value // 10000}.{version.value // 100 % 100}"

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """Every operation but the barrier, on the dtypes that it has."""
        x, out, world = buffers.x, buffers.out, self.job.world
        if x.dtype not in _DTYPES:
            return None
        place, into, dtype = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), _DTYPES[x.dtype]

        def bind(function: str, *arguments: Any) -> Callable[[], object]:
            def run(_: Buffers = buffers) -> None:  # which keeps the memory behind the addresses
                # Without a stream a call of the C API for CPUs has ended when it returns.
                _check(self._library, function, *arguments, self._comm, None)

            return run

        def both() -> None:
            first, second = (send, recv) if world.rank == 0 else (recv, send)
            first()
            second()

        # Rank 0 sends x; rank 1 sends its own x back, and both receive into `out`.
        send = bind("onecclSend", place, ctypes.c_size_t(x.numel()), dtype, 1 - world.rank)
        recv = bind("onecclRecv", into, ctypes.c_size_t(x.numel()), dtype, 1 - world.rank)
        count = ctypes.c_size_t
        calls: dict[str, Callable[[], object]] = {
            "all_reduce_": bind("onecclAllReduce", place, place, count(x.numel()), dtype, _SUM),
            "all_reduce": bind("onecclAllReduce", place, into, count(x.numel()), dtype, _SUM),
            "all_gather": bind("onecclAllGather", place, into, count(x.numel()), dtype),
            "reduce_scatter": bind("onecclReduceScatter", place, into, count(out.numel()), dtype, _SUM),
            "all_to_all": bind("onecclAllToAll", place, into, count(x.numel() // world.size), dtype),
            "broadcast": bind("onecclBroadcast", place, place, count(x.numel()), dtype, 0),
            "send_recv": both,
        }
        return calls.get(operation)

    def close(self) -> None:
        """Ends its threads."""
        if hasattr(self, "_comm"):
            self._library.onecclCommDestroy(self._comm)


def _load() -> Any:
    """Load the libraries, each with what it needs before it.

    Raises:
        OSError: one is missing, or needs another one.
    """
    folder = Path(sys.prefix, "lib")
    fabric = [ctypes.util.find_library("fabric"), str(folder / "mpich" / "libfabric.so.1")]
    found = next((name for name in fabric if name and (Path(name).is_file() or "/" not in name)), None)
    if found is None:
        raise OSError("there is no libfabric")
    ctypes.CDLL(found)
    interface = ctypes.CDLL(str(folder / "libccl.so.2"))
    # The library and the part of the C API that calls it, which the C API itself looks for under these names.
    for name in ("libccl.so.1", "libccl_legacy_cpu.so"):
        ctypes.CDLL(str(folder / name))
    return interface


def _check(library: Any, function: str, *arguments: Any) -> None:
    result = getattr(library, function)(*arguments)
    if result:
        raise RuntimeError(f"{function}: {library.onecclGetErrorString(result).decode()}")
