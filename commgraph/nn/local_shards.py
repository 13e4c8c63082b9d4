"""`LocalShards`: a full tensor of which each rank holds some boxes, as torch.distributed.checkpoint saves and loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commgraph.compat import make_wrapper
from commgraph.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["LocalShards"]

COPYING = frozenset({"aten::detach", "aten::clone", "aten::_to_copy", "aten::empty_like", "aten::zeros_like"})


class LocalShards(torch.Tensor):
    """A tensor of the full shape, of which this rank holds the boxes in `tensors`, at `offsets`.

    A DTensor would need a process group, and cannot say that a parameter is several tensors side by side, that neighbours hold the same
    heads, or that a vocabulary is padded. torch.distributed.checkpoint needs the offsets alone. It reads and fills the boxes where they
    are; ``detach``, ``clone``, ``to``, ``copy_`` (from one with equal boxes), ``empty_like`` and ``zeros_like`` work on them, too. Every
    other operation raises TypeError.

    Attributes:
        offsets: where each box begins in the full tensor.
        tensors: the boxes.
        ranks: how many ranks share the full tensor.
    """

    offsets: tuple[tuple[int, ...], ...]
    tensors: tuple[torch.Tensor, ...]
    ranks: int
    _like: torch.Tensor  # of no elements: dtype and device, where there is no box

    @staticmethod
    def __new__(
        cls: type[LocalShards],
        shape: Sequence[int],
        offsets: Sequence[Sequence[int]],
        tensors: Sequence[torch.Tensor],
        like: torch.Tensor,
        ranks: int,
    ) -> LocalShards:
        """Makes one of its boxes; `like` gives dtype and device."""
        self: LocalShards = make_wrapper(cls, shape, dtype=like.dtype, device=like.device)
        self.offsets, self.tensors, self.ranks = tuple(map(tuple, offsets)), tuple(tensors), ranks
        self._like = like if like.numel() == 0 else like.new_empty(0)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> LocalShards:  # type: ignore[override]  # torch's is a stub
        """Runs the few operations that work box by box."""
        first = next(arg for arg in args if isinstance(arg, LocalShards))
        name = func.name().partition(".")[0]
        if name == "aten::new_empty" and tuple(args[1]) == tuple(first.shape):
            func, args, name = torch.ops.aten.empty_like.default, (first,), "aten::empty_like"
        if name != "aten::copy_" and name not in COPYING:
            raise TypeError(f"{name} of {first!r}: the full tensor is on no rank; work on .tensors, or gather it by full_state_dict")

        def run(number: int | None) -> torch.Tensor:
            """Run it on one of the boxes; None: on the tensor of no elements."""
            parts = (arg if not isinstance(arg, LocalShards) else arg._like if number is None else arg.tensors[number] for arg in args)
            result: torch.Tensor = func(*parts, **(kwargs or {}))
            return result

        if name == "aten::copy_":
            source = args[1]
            if not isinstance(args[0], LocalShards) or not isinstance(source, LocalShards) or source.boxes != first.boxes:
                raise TypeError(f"copy_ of {source!r} to {args[0]!r}: both must hold the same boxes of equal shapes")
            for number in range(len(first.tensors)):
                run(number)
            return first
        return cls(first.shape, first.offsets, [run(number) for number in range(len(first.tensors))], run(None), first.ranks)

    @property
    def boxes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and shape of each box."""
        return [(offsets, tuple(tensor.shape)) for offsets, tensor in zip(self.offsets, self.tensors, strict=True)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves the default without a type
        boxes = ", ".join(f"{shape} at {offsets}" for offsets, shape in self.boxes) or "nothing"
        return f"LocalShards({tuple(self.shape)}, {self.dtype}, of {self.ranks} ranks; here {boxes})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return LocalShards, (tuple(self.shape), self.offsets, self.tensors, self._like, self.ranks)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalShards:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]  # type: ignore[no-any-return]  # what was put there

    # What torch.distributed.checkpoint asks of a tensor.

    def write_items(self, name: str) -> list[WriteItem]:
        """Return how each box is saved under `name`; ranks that hold the same box give equal items, of which one is written."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.ranks > 1 and not dist.is_initialized():
            raise ConfigurationError(
                f"{name}: {self!r} in a process without a default process group, where torch.distributed.checkpoint saves the part of one "
                "rank as if it were all. Use commgraph.nn.save_checkpoint, or init_process_group first"
            )
        return self.write_items(name)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for offsets, shape in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.tensors[self.offsets.index(tuple(index.offset or ()))]
