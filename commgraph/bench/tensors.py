"""The rows about tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from commgraph.bench.figures import rows_of
from commgraph.bench.library import Buffers, Library
from commgraph.bench.ours import DeviceTensors, SharedTensors, Tensors
from commgraph.bench.overhead import overhead
from commgraph.bench.session import Session
from commgraph.bench.timing import Contender, interleave

__all__ = ["OPERATIONS", "SIZELESS", "buffers_for", "largest", "measure"]

OPERATIONS = (
    "all_reduce_",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send_recv",
    "barrier",
    "tensor_dict",
    "overhead",
)
# Operations that are measured once, at a size of their own or at the smallest.
SIZELESS = frozenset({"barrier", "tensor_dict", "overhead"})

_DICT_BYTES = 4 * 2**20  # two tensors of 2 MiB, as a pipeline stage sends
_PAIRWISE = frozenset({"send_recv", "tensor_dict"})


def largest(operations: Sequence[str], sizes: Sequence[int]) -> int:
    """Bytes of the largest tensor that these operations ask a library to allocate; 0 if they ask for none."""
    fixed = _DICT_BYTES if "tensor_dict" in operations else 0
    sized = any(operation in OPERATIONS and operation not in SIZELESS for operation in operations)
    return max(fixed, *sizes) if sized else fixed


def measure(session: Session, operation: str, size: int, dtype: torch.dtype) -> None:
    """Measures one operation at one size with every library that can. Collective."""
    size = _DICT_BYTES if operation == "tensor_dict" else size
    contenders: list[Contender] = []
    for library in session.tensors:
        if operation == "overhead":
            if type(library) is Tensors:
                contenders += overhead(library, buffers_for(library, "all_reduce", size, dtype))
        elif operation != "barrier" or not isinstance(library, SharedTensors | DeviceTensors):  # a barrier has no tensors, wherever
            contenders += _contenders(session, library, operation, size, dtype)
    n = session.job.world.size
    for contender, samples in zip(contenders, interleave(contenders, session.stopwatch), strict=True):
        rows = rows_of(
            samples,
            operation=operation,
            size=max(_numels(operation, size, dtype, n)) * dtype.itemsize,
            dtype="" if operation == "barrier" else _name(dtype),
            who=contender.who,
            strategy=contender.strategy,
            ranks=n,
        )
        session.report(rows)


def buffers_for(library: Library, operation: str, size: int, dtype: torch.dtype) -> Buffers:
    """Buffers whose larger one has `size` bytes, or what is left of that if it is to be cut evenly. x is full of this rank + 1."""
    world = library.job.world
    into, outof = _numels(operation, size, dtype, world.size)
    x = library.allocate(into, dtype).fill_(world.rank + 1)
    out = x if operation in ("all_reduce_", "broadcast") else library.allocate(outof, dtype).zero_()
    return Buffers(x, out)


def _numels(operation: str, size: int, dtype: torch.dtype, n: int) -> tuple[int, int]:
    """Elements of x and of out."""
    if operation == "barrier":
        return 0, 0
    whole = max(size // dtype.itemsize // n, 1) * n
    return whole // n if operation == "all_gather" else whole, whole // n if operation == "reduce_scatter" else whole


def _contenders(session: Session, library: Library, operation: str, size: int, dtype: torch.dtype) -> list[Contender]:
    """The library at this operation, its first result found right; nothing where it lacks the operation."""
    who = f"{library.name}, {operation} of {size} bytes of {_name(dtype)}"
    rank, n = session.job.world.rank, session.job.world.size
    pairwise = operation in _PAIRWISE
    buffers = session.agreed(who, partial(buffers_for, library, operation, size, dtype))
    if buffers is None:
        return []
    # The ranks agree that all of them have it before one of them calls it.
    call = session.agreed(who, lambda: _nothing if pairwise and rank > 1 else library.call(operation, buffers))
    if call is None:
        session.note(f"{library.name} has no {operation} of {_name(dtype)} here")
        return []

    def try_it() -> bool:
        result = call()
        if call is not _nothing and library.computes:
            _check(operation, (result if isinstance(result, torch.Tensor) else buffers.out).cpu(), rank, n)
        return True

    if session.agreed(who, try_it) is None:
        return []
    return [Contender(library.name, library.strategy(operation, buffers), library.batch(call), 0.5 if pairwise else 1.0)]


def _nothing() -> None:
    """Call of a rank that has no part in an operation."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(operation: str, result: torch.Tensor, rank: int, n: int) -> None:
    """Check a result: a library that gives wrong results is not measured.

    Raises:
        ValueError: the result is wrong.
    """
    expected: dict[str, Callable[[int], int]] = {
        "all_reduce_": lambda piece: n * (n + 1) // 2,
        "all_reduce": lambda piece: n * (n + 1) // 2,
        "reduce_scatter": lambda piece: n * (n + 1) // 2,
        "all_gather": lambda piece: piece + 1,
        "all_to_all": lambda piece: piece + 1,
        "broadcast": lambda piece: 1,
        "send_recv": lambda piece: 2 - rank,
    }
    if operation not in expected:
        return
    for number, piece in enumerate(result.tensor_split(n)):
        right = torch.tensor(expected[operation](number), device="cpu").to(result.dtype).float()
        wrong = (piece.float() - right).abs() > 0.02 * right.abs()
        if wrong.any():
            raise ValueError(f"its result is wrong: {piece[wrong][0].item()} where {right.item()} belongs")
