"""Memory that all ranks of a group can access, and kernels over it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.accelerators.custom_all_reduce.renumbered import Renumbered

__all__ = ["ALIGNMENT", "Kernels", "TorchKernels"]

# Bytes that one thread moves at once: size and address of a kernel's message are multiples of it.
ALIGNMENT = 16


class Kernels(abc.ABC):
    """A buffer of the same size on each rank, and the kernels that work on all of them. Enqueued on the current stream.

    Tensors are contiguous, not empty, of a multiple of 16 bytes for each rank, and fit into the buffer. The kernels copy their input
    into the buffer themselves. All ranks call the same kernel with the same sizes, in the same order.
    """

    room: int
    """Bytes of the buffer."""

    multicast: bool
    """Whether `multimem` kernels can run."""

    @abc.abstractmethod
    def all_reduce(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the sum of every rank's x, 1-D, float32 or bfloat16, to `out`, which may be x."""

    @abc.abstractmethod
    def all_gather(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write every rank's x, 1-D, one after the other to `out`."""

    @abc.abstractmethod
    def reduce_scatter(self, kernel: str, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the sum of every rank's ``pieces[rank_in_group]`` to `out`, all 1-D, float32 or bfloat16."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Wait until the device is idle: for ever, where a kernel waits for a peer that never comes."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the memory. Idempotent; the peers are not told."""


class TorchKernels(Kernels):
    """The kernels of ``torch.ops.symm_mem`` over torch's symmetric memory. Not yet run on a GPU.

    Relied upon, as read in torch's sources (2.11 to 2.13): every kernel begins and ends with a barrier of the ranks, block by
    block, so that the buffer may be filled again by whatever follows on the stream; the one- and two-shot kernels add in rank order, and
    bfloat16 in bfloat16; `multimem_all_reduce_` adds each part on one rank and hands the sum to all, in float32 for bfloat16, while
    `multimem_one_shot_all_reduce` may give other bits on other ranks and is therefore not used. They wait for peers without a deadline.
    """

    def __init__(self, name: str, store: dist.Store, rank_in_group: int, world_size: int, device: torch.device, room: int) -> None:
        """Allocate the buffer and map those of the peers. Collective.

        Args:
            name: the same on all ranks, and of no other group in any of their processes.
            store: holds keys of this buffer only.
            rank_in_group, world_size: of the group.
            device: of this rank.
            room: bytes of the buffer.
        """
        self.room = room
        # Kernels are enqueued on the current stream of the thread's current device, which need not be that of the tensors.
        self._device = device
        self._name = name
        self._n = world_size
        self._memory: torch.Tensor | None = None
        # Kept, because a store written in Python ends with its last reference here, whatever torch still holds.
        self._store = Renumbered(store)
        with torch.cuda.device(device):
            self._memory, handle, group = compat.symmetric_memory(name, self._store, rank_in_group, world_size, device, room)
        self.multicast = bool(handle.multicast_ptr)
        # Kept for as long as the buffer: the mappings of the peers' buffers, and the group, which torch finds by name.
        self._handle: Any = handle
        self._group: Any = group

    def peer(self, rank: int, nbytes: int) -> torch.Tensor:
        """Return the first bytes of a rank's buffer, mapped."""
        found: torch.Tensor = self._handle.get_buffer(rank, (nbytes,), torch.uint8)
        return found

    def barrier(self) -> None:
        """Enqueue a barrier of the ranks on the current stream."""
        self._handle.barrier(0)

    def all_reduce(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        ops, buffer = torch.ops.symm_mem, self._buffer(x.numel(), x.dtype)
        with torch.cuda.device(self._device):
            if kernel == "multimem":
                buffer.copy_(x)
                ops.multimem_all_reduce_(buffer, "sum", self._name)
                out.copy_(buffer)
                return
            target = out if _aligned(out) else torch.empty_like(out)
            # Not one_shot_all_reduce_copy_out: in its source some threads signal the peers before others have copied their part of x.
            buffer.copy_(x)
            run = ops.two_shot_all_reduce_out if kernel == "two_shot" else ops.one_shot_all_reduce_out
            run(buffer, "sum", self._name, target)
            if target is not out:
                out.copy_(target)

    def all_gather(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
        buffer = self._buffer(out.numel(), out.dtype)
        with torch.cuda.device(self._device):
            torch.ops.symm_mem.multimem_all_gather_out(x if _aligned(x) else x.clone(), self._name, buffer)
            out.copy_(buffer)

    def reduce_scatter(self, kernel: str, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        buffer = self._buffer(out.numel() * self._n, out.dtype)
        with torch.cuda.device(self._device):
            torch.cat(list(pieces), out=buffer)
            target = out if _aligned(out) else torch.empty_like(out)
            torch.ops.symm_mem.reduce_scatter_out(buffer, self._name, False, target)
            if target is not out:
                out.copy_(target)

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        if self._memory is not None:
            compat.forget_symmetric_group(self._name)
            self._memory = self._handle = self._group = None

    def _buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        assert self._memory is not None
        return self._memory[: numel * dtype.itemsize].view(dtype)


def _aligned(x: torch.Tensor) -> bool:
    """Whether a kernel can read or write x without a copy. torch checks the offset, the processor the address."""
    return x.data_ptr() % ALIGNMENT == 0 and x.storage_offset() * x.itemsize % ALIGNMENT == 0
