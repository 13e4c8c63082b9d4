"""One call on a coordinator, and every check of what a user gave it. All of it happens before anything is sent."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import attrs
import torch

from commgraph import compat
from commgraph.communicators.reduction import REDUCE_OPS, refuse_reduction
from commgraph.errors import UnsupportedTensorError
from commgraph.work import LaneThread

__all__ = ["Call", "Timeout"]

T = TypeVar("T")
Timeout = timedelta | float | None

# Seconds. Ten years are for ever; clocks and thread primitives overflow not far beyond.
_LONGEST = 10 * 365 * 86400.0

# Frames that are not the user's: this package's, and those of the context managers in it.
_OURS = (str(Path(__file__).parent.parent), contextlib.__file__)


@attrs.frozen(eq=False, slots=False)  # frozen slots are filled one by one by object.__setattr__, in twice the time
class Call:
    """Who called what. Its methods check arguments and raise errors that say so.

    Attributes:
        group: name of the group.
        operation: name of the method.
        rank: global rank of the caller.
        rank_in_group: its rank in the group.
        world_size: ranks in the group.
        sequence: collectives that this rank had begun on the group before.
        device: device of the coordinator.
        limited: whether the user gave it a deadline of its own.
    """

    group: str
    operation: str
    rank: int
    rank_in_group: int
    world_size: int
    sequence: int
    device: torch.device
    limited: bool = False

    @property
    def where(self) -> str:
        return f"{self.operation} on group {self.group!r} (rank {self.rank}, {self.rank_in_group} of {self.world_size} in the group)"

    @property
    def facts(self) -> dict[str, Any]:
        """What a `CollectiveError` carries."""
        return {"group": self.group, "operation": self.operation, "rank": self.rank, "sequence": self.sequence}

    def unsupported(self, what: str) -> UnsupportedTensorError:
        return UnsupportedTensorError(f"{self.where}: {what}. Nothing was sent.", **self.facts)

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.where}: {what}. Nothing was sent.")

    def tensor(self, x: object, name: str = "x", *, differentiable: bool = False) -> torch.Tensor:
        """`x`, if it is a tensor that can be communicated as it is. `differentiable`: the operation of one rank passes its gradient."""
        if not isinstance(x, torch.Tensor):
            raise self.unsupported(f"{name} is a {type(x).__name__}, a torch.Tensor is needed")
        if x.is_nested:
            raise self.unsupported(f"{name} is a nested tensor; send its values and its lengths")
        if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise self.unsupported(f"{name} is a {type(x).__name__}, whose memory is not its values; send the plain tensors it is made of")
        if x.layout != torch.strided:
            raise self.unsupported(f"{name} has layout {x.layout}; send a strided tensor, e.g. {name}.to_dense() or its indices and values")
        if x.is_quantized:
            raise self.unsupported(f"{name} is quantized ({x.dtype}); send {name}.int_repr() and its scales")
        if compat.is_without_memory(x):
            raise self.unsupported(f"{name} is a zero that has no memory, as forward-mode derivatives make them; send {name}.clone()")
        if x.device.type not in ("cpu", self.device.type):
            hint = "a meta tensor has no data" if x.is_meta else f"move it to {self.device} or to the host first"
            raise self.unsupported(f"{name} is on {x.device}, the group serves cpu and {self.device.type}: {hint}")
        if x.requires_grad and torch.is_grad_enabled() and not (differentiable and self.world_size == 1):
            raise self.unsupported(
                f"{name} requires a gradient, which {self.operation} would cut silently. In a layer use commgraph.nn.functional (copy_to, "
                "reduce_from, gather_from, scatter_to, reduce_scatter_to); elsewhere call it under torch.no_grad() or on "
                f"{name}.detach()"
            )
        return x

    def written(self, x: torch.Tensor, name: str = "x") -> torch.Tensor:
        """`x`, if a result may be written to it."""
        if x.numel() and any(stride == 0 and extent > 1 for stride, extent in zip(x.stride(), x.shape, strict=True)):
            raise self.unsupported(f"{name} is expanded (strides {x.stride()}): several of its entries share memory and cannot be filled")
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise self.unsupported(
                f"{name} is a leaf that requires a gradient, which autograd does not let be filled; call it under torch.no_grad() or on "
                f"{name}.detach()"
            )
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise self.unsupported(f"{name} was made in inference mode, where alone torch lets it be filled")
        return x

    def filling(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, of which autograd is told that its values change, which it may have saved: its memory is filled past torch."""
        if not x.is_inference():
            compat.mark_written()((x,))
        return x

    def dim(self, x: torch.Tensor, dim: int, name: str = "dim") -> int:
        """`dim` counted from the front."""
        index = self._index(dim, name)
        if x.dim() == 0:
            raise self.unsupported(f"x has no dimensions and so no {name}; give it one by x.reshape(1)")
        if not -x.dim() <= index < x.dim():
            raise self.wrong(f"{name}={index} is out of range for shape {tuple(x.shape)}: {-x.dim()} to {x.dim() - 1}")
        return index % x.dim()

    def op(self, op: str, dtype: torch.dtype) -> str:
        if op not in REDUCE_OPS:
            raise self.wrong(f"op={op!r} is not one of {', '.join(REDUCE_OPS)}")
        if (reason := refuse_reduction(dtype, op)) is not None:
            raise self.unsupported(f"op={op!r} over dtype {dtype}: {reason}")
        return op

    def even(self, extent: int, name: str) -> list[int]:
        """`extent` in equal pieces, one per rank."""
        if extent % self.world_size:
            raise self.wrong(f"{name} has {extent} entries, which {self.world_size} ranks cannot share equally")
        return [extent // self.world_size] * self.world_size

    def sizes(self, sizes: Sequence[SupportsIndex], name: str = "sizes") -> list[int]:
        """One size per rank, none negative."""
        checked = [self._index(size, f"{name}[{i}]") for i, size in enumerate(self.several(sizes, name))]
        if len(checked) != self.world_size:
            raise self.wrong(f"{name}={checked} has {len(checked)} entries, one for each of {self.world_size} ranks is needed")
        if any(size < 0 for size in checked):
            raise self.wrong(f"{name}={checked}: a size cannot be negative")
        return checked

    def several(self, values: Iterable[T], name: str) -> list[T]:
        """`values` as a list."""
        try:
            return list(values)
        except TypeError:
            raise self.unsupported(f"{name} is a {type(values).__name__}, a sequence is needed") from None

    def split(self, sizes: Sequence[SupportsIndex], extent: int, of: str, name: str = "sizes") -> list[int]:
        """`sizes`, which must add up to `extent`."""
        checked = self.sizes(sizes, name)
        if sum(checked) != extent:
            raise self.wrong(f"{name}={checked} adds up to {sum(checked)}, {of} has {extent}")
        return checked

    def peer(self, value: int, name: str, *, other: bool = False) -> int:
        """A rank in the group; `other`: not the caller itself."""
        index = self._index(value, name)
        if not 0 <= index < self.world_size:
            raise self.wrong(f"{name}={index} is not a rank in the group: 0 to {self.world_size - 1} (not a global rank)")
        if other and index == self.rank_in_group:
            raise self.wrong(
                f"{name}={index} is this rank itself" + ("; a group of one rank has nobody to talk to" if self.world_size == 1 else "")
            )
        return index

    def out(
        self,
        out: torch.Tensor | None,
        shape: Sequence[int],
        like: torch.Tensor,
        new: Callable[[Sequence[int], torch.dtype, torch.device], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The caller's `out`, or a new tensor: one by `new`, where that is given."""
        if out is None and new is not None:
            return new(tuple(shape), like.dtype, like.device)
        if out is None:
            return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        self.written(self.tensor(out, "out"), "out")
        if tuple(out.shape) != tuple(shape) or out.dtype != like.dtype or out.device != like.device:
            raise self.unsupported(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}, the result is {like.dtype} {tuple(shape)} on {like.device}"
            )
        return self.filling(out)

    def like(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """An empty tensor of the dtype and device of one to receive."""
        try:
            like = torch.empty(0, dtype=dtype, device=device)
        # torch's own errors for what is no dtype, no device, or a device that it was not built for.
        except (TypeError, RuntimeError, AssertionError) as error:
            raise self.unsupported(f"no tensor of dtype={dtype!r} on device={str(device)!r} can be made here: {error}") from None
        return self.tensor(like, "the result")

    def size(self, size: Sequence[SupportsIndex] | SupportsIndex) -> tuple[int, ...]:
        """The shape of a tensor to receive."""
        extents = size if isinstance(size, Sequence) else (size,)
        checked = tuple(self._index(extent, "size") for extent in extents)
        if any(extent < 0 for extent in checked):
            raise self.wrong(f"size={checked}: an extent cannot be negative")
        return checked

    def seconds(self, timeout: Timeout, default: float) -> float:
        """`timeout` in seconds."""
        if timeout is None:
            return default
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise self.wrong(f"timeout={timeout!r} is neither a datetime.timedelta nor seconds")
        if not 0 < seconds < math.inf:
            raise self.wrong(f"timeout={timeout!r}: a deadline must lie in the future, and every wait has one")
        return float(min(seconds, _LONGEST))

    def _index(self, value: SupportsIndex, name: str) -> int:
        try:
            if not isinstance(value, bool):
                return operator.index(value)
        except TypeError:
            pass
        raise self.wrong(f"{name}={value!r} is not an integer")


def place() -> str:
    """File and line of the innermost caller outside commgraph: in a job of a lane, of the one who asked for it."""
    thread = threading.current_thread()
    if isinstance(thread, LaneThread):
        return thread.at
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
