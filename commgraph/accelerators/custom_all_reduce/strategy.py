"""The strategy for small messages between accelerators that can access each other's memory."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from commgraph import ambient
from commgraph.accelerators.custom_all_reduce.kernels import ALIGNMENT, Kernels
from commgraph.accelerators.kernel_table import KERNELS, OTHERS, Plan
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import Communicator, PeerClosed
from commgraph.communicators.memory import are_slices_joined, as_bytes, dense, is_dense
from commgraph.deadline import Deadline

__all__ = ["CustomAllReduce"]

logger = logging.getLogger("commgraph")

_CLOSE_SECONDS = 10.0

_REDUCIBLE = frozenset({torch.float32, torch.bfloat16})
_REDUCTIONS = frozenset({"all_reduce", "reduce_scatter"})


class CustomAllReduce(Communicator):
    """All-reduce, all-gather and reduce-scatter by kernels over memory that all ranks can access.

    A `Plan` chooses the kernel by size. It serves sums and averages of float32 and bfloat16; other reductions and uneven pieces go to the
    strategy behind it, on all ranks alike. A tensor larger than the buffer goes through in pieces. Its buffer is made when the
    context is built and stays where it is, so its calls can be captured into graphs.

    A kernel waits for its peers without a deadline: where one never comes the device is busy until the process ends. Closing is bounded
    all the same.
    """

    name = "custom_all_reduce"
    operations = frozenset(KERNELS)
    size_dependent = True
    stream_ordered = True

    def __init__(
        self,
        kernels: Kernels,
        plan: Plan,
        rest: Communicator,
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        """Over existing kernels, of a group of the ranks of `rest`.

        Args:
            kernels: over the memory.
            plan: which of them serve what.
            rest: serves what they cannot; its owner's to close.
            device: whose tensors it serves.
            streams: of that device; None where calls are not stream-ordered.
        """
        super().__init__(rest.rank_in_group, rest.world_size)
        self.serves_host = device.type == "cpu"
        self._kernels: Kernels | None = kernels
        self._room = kernels.room
        self._plan = plan
        self._rest = rest
        self._device = device
        self._streams = streams
        self._last: Any = None  # the stream of the last call
        self._bytes = 0

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Tensors of its device whose size has a kernel, and whose parts are multiples of 16 bytes."""
        if device.type != self._device.type or dtype is None:
            return False
        return self.kernel_for(operation, math.prod(shape) * dtype.itemsize, dtype) != OTHERS

    def kernel_for(self, operation: str, nbytes: int, dtype: torch.dtype) -> str:
        """Return the kernel that serves such a call, `nbytes` as `commgraph.KernelTable` counts them; ``""`` where none does."""
        parts = 1 if operation == "all_reduce" else self.world_size
        if nbytes == 0 or nbytes % (ALIGNMENT * parts) or (operation in _REDUCTIONS and dtype not in _REDUCIBLE):
            return OTHERS
        return self._plan.kernel(operation, str(dtype).removeprefix("torch."), nbytes)

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        if op not in ("sum", "avg"):
            return self._rest.all_reduce(x, op, tag=tag, deadline=deadline)
        out = self.new(x.shape, x.dtype, x.device)
        self._reduce(dense(x), out, op)
        return out

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        if op not in ("sum", "avg"):
            return self._rest.all_reduce_(x, op, tag=tag, deadline=deadline)
        out = x if is_dense(x) else self.new(x.shape, x.dtype, x.device)
        self._reduce(dense(x), out, op)
        return x if out is x else x.copy_(out)

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str) -> None:
        kernels, kernel = self._begin(), self.kernel_for("all_reduce", x.nbytes, x.dtype)
        step = self._step(x.itemsize, 1)
        for mine, theirs in zip(x.view(-1).split(step), out.view(-1).split(step), strict=True):
            kernels.all_reduce(kernel, mine, theirs)
        self._bytes += x.nbytes
        self._average(out, op)

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        if len(set(sizes)) > 1:
            self._rest.all_gather(x, dim, sizes, out, tag=tag, deadline=deadline)
            return
        kernels, kernel = self._begin(), self.kernel_for("all_gather", out.nbytes, out.dtype)
        flat = as_bytes(dense(x))
        # Without a copy where the pieces of the result lie one after the other.
        straight = are_slices_joined(out, dim)
        whole = as_bytes(out) if straight else ambient.empty(out.nbytes, torch.uint8, out.device)
        step = self._step(1, self.world_size)
        if flat.numel() <= step:
            kernels.all_gather(kernel, flat, whole)
        else:
            by_rank = whole.view(self.world_size, -1)
            for begin, piece in zip(range(0, flat.numel(), step), flat.split(step), strict=True):
                part = ambient.empty(piece.numel() * self.world_size, torch.uint8, out.device)
                kernels.all_gather(kernel, piece, part)
                by_rank[:, begin : begin + piece.numel()].copy_(part.view(self.world_size, -1))
        self._bytes += flat.numel()
        if not straight:
            pieces = whole.view(out.dtype).view(self.world_size, *x.shape)
            out.copy_(torch.cat(list(pieces), dim))

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        if len(set(sizes)) > 1 or op not in ("sum", "avg"):
            self._rest.reduce_scatter(x, dim, sizes, op, out, tag=tag, deadline=deadline)
            return
        kernels, kernel = self._begin(), self.kernel_for("reduce_scatter", x.nbytes, x.dtype)
        staging = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        step = self._step(x.itemsize, self.world_size)
        cut = [dense(piece).view(-1).split(step) for piece in x.split(list(sizes), dim)]
        for part, pieces in zip(staging.view(-1).split(step), zip(*cut, strict=True), strict=True):
            kernels.reduce_scatter(kernel, pieces, part)
        self._bytes += x.nbytes
        self._average(staging, op)
        if staging is not out:
            out.copy_(staging)

    def _begin(self) -> Kernels:
        if self._kernels is None:
            raise PeerClosed(self.rank_in_group, "this rank closed the group")
        self._take_turn()
        return self._kernels

    def _take_turn(self) -> None:
        """Order the current stream after the one of the last call: the buffer serves one call at a time."""
        streams = self._streams
        # A graph cannot wait for an event outside of it. A program that replays it beside other calls orders the two.
        if streams is None or streams.is_capturing():
            return
        now = streams.current()
        if self._last is not None and self._last != now:
            streams.wait_event(self._end())
        self._last = now

    def _end(self) -> Any:
        assert self._streams is not None
        with self._streams.use(self._last):
            return self._streams.record_event()

    def _average(self, out: torch.Tensor, op: str) -> None:
        if op == "avg":
            out.div_(self.world_size)

    def _step(self, itemsize: int, parts: int) -> int:
        """Return how many elements of each rank's part fit into the buffer at once."""
        return self._room // (ALIGNMENT * parts) * ALIGNMENT // itemsize

    # Life.

    def warmup(self, model: torch.nn.Module | None = None) -> None:
        """Run every kernel once: the first run of each loads it."""
        unit = ALIGNMENT * self.world_size
        smallest = sorted({0, *(step.max_bytes for steps in self._plan.steps.values() for step in steps)})
        for operation in KERNELS:
            for dtype in (torch.float32, torch.bfloat16):
                tried = {OTHERS}
                for nbytes in (size // unit * unit + unit for size in smallest):
                    if (kernel := self.kernel_for(operation, nbytes, dtype)) not in tried:
                        tried.add(kernel)
                        self._try(operation, ambient.zeros(nbytes // dtype.itemsize, dtype, self._device))

    def _try(self, operation: str, whole: torch.Tensor) -> None:
        n, me = self.world_size, self.rank_in_group
        part = whole.view(n, -1)[me].clone()
        each = [part.numel()] * n
        limits: dict[str, Any] = {"tag": 0, "deadline": Deadline.after(0.0)}
        if operation == "all_reduce":
            self.all_reduce_(whole, "sum", **limits)
        elif operation == "all_gather":
            self.all_gather(part, 0, each, whole, **limits)
        else:
            self.reduce_scatter(whole, 0, each, "sum", part, **limits)

    def abort(self) -> None:
        """Nothing to do: no call waits on the host."""

    def close(self) -> None:
        kernels, self._kernels = self._kernels, None
        if kernels is None:
            return
        # Whether a replayed graph still waits for a peer only the device knows. Freeing the memory waits for the device, too, and would
        # hold the interpreter meanwhile.
        waiting = threading.Thread(target=kernels.drain, name="commgraph synchronize", daemon=True)
        waiting.start()
        waiting.join(_CLOSE_SECONDS)
        if not waiting.is_alive():
            kernels.close()
            return
        logger.warning(
            "custom_all_reduce of rank %d in its group: the device is still busy after %g s, as with a kernel that waits for a peer which "
            "never came. A buffer of %d bytes stays where it is",
            self.rank_in_group,
            _CLOSE_SECONDS,
            self._room,
        )

    def memory(self) -> int:
        return 0 if self._kernels is None else self._room

    @property
    def bytes_sent(self) -> int:
        return self._bytes

    def describe(self) -> str:
        cast = "" if self._kernels is None or self._kernels.multicast else ", without multicast"
        return f"kernels over a buffer of {self._room} bytes{cast}: {self._plan.describe()}"
