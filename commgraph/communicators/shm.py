"""The strategy for ranks of one host: tensors through memory that they share, at the speed of that memory."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from commgraph import compat
from commgraph.communicators.base import OPERATIONS, CallsDiffer, Communicator, Limits, PeerClosed, PeerLate, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.memory import dense, is_dense, land, landing_for
from commgraph.communicators.reduction import reduce_pieces
from commgraph.communicators.signature import SETUP, make_tag, plain
from commgraph.options import CommunicatorOptions
from commgraph.shm import host_memory, segments
from commgraph.shm.mailbox import TENSORS, Mailbox, nanoseconds
from commgraph.shm.pickling import tensor_over
from commgraph.shm.stopped import GONE, LOST, MISMATCH, TIMEOUT, Busy, Stopped

__all__ = ["ShmCommunicator", "make_door", "teller", "tensors_of"]

# Bytes of what a rank tells the others while the memory is made.
_WORD_BYTES = 1024

# As in native/kernels.h.
_KERNELS = MappingProxyType(
    {
        torch.float32: 0,
        torch.float64: 1,
        torch.bfloat16: 2,
        torch.float16: 3,
        torch.int8: 4,
        torch.int16: 5,
        torch.int32: 6,
        torch.int64: 7,
        torch.uint8: 8,
        torch.uint16: 9,
        torch.uint32: 10,
        torch.uint64: 11,
    }
)
_OPS = MappingProxyType({"sum": 0, "avg": 1, "max": 2, "min": 3, "product": 4})
# On bool, sum is "or" and product is "and".
_LOGICAL = MappingProxyType({"sum": "max", "max": "max", "product": "min", "min": "min"})

# (address, rows, bytes of a row, bytes from row to row), as native/copy.h has it.
_Block = tuple[int, int, int, int]


class ShmCommunicator(Communicator):
    """Collectives, messages and objects of the ranks of one host.

    Small reductions take one step, in which each rank reads what all others staged; large ones take two for each chunk, a
    reduce-scatter and a gather (native/reduce.c). Two ranks read and write a chunk at once (native/relay.c). Sums are taken in the order of
    the ranks, small floats in float32, so that every rank gets the same bits. Each call carries a header, and ranks whose headers differ
    raise. Large tensors made by `empty` are not staged, if those of all ranks are.
    """

    name: ClassVar[str] = "shm"
    operations: ClassVar[frozenset[str]] = frozenset(OPERATIONS)
    compares: ClassVar[bool] = True

    def __init__(self, memory: host_memory.HostMemory, timeout: float) -> None:
        super().__init__(memory.rank_in_group, memory.sizes.n)
        self._memory = memory
        self._native = memory.native
        self._extra_bytes = 0
        self._closed: int | None = None  # what `bytes_sent` was when it was closed
        self._group = memory.native.Group(
            memory.team,
            memory.pool,
            memory.group_offset,
            memory.sizes.slot_bytes,
            nanoseconds(timeout),
            torch.Tensor,
            compat.dlpack_exchange(),
            _Describe(memory.sizes.n),
        )
        self.mailbox = Mailbox(memory) if memory.sizes.pair_bytes else None
        if self.mailbox is None:
            self.operations = self.operations - {"send", "recv"}  # type: ignore[misc]  # of this one: it has no rings

    @classmethod
    def build(cls, gloo: GlooCommunicator, options: CommunicatorOptions, limits: Limits) -> ShmCommunicator | Refused:
        """Makes the memory of a group. Collective; on every rank the strategy, or on every rank the same reason why there is none.

        Args:
            gloo: serves the group, and carries what the ranks tell each other.
            options: of the group.
            limits: of the build and of what is built.
        """
        sizes = host_memory.Sizes.plan(
            gloo.world_size, shm_bytes=options.shm_bytes, queue_bytes=options.queue_bytes, queues=options.message_queue
        )
        tell = teller(gloo, cls.name, limits.build_timeout)
        found = host_memory.join(tell, sizes, gloo.rank_in_group, crowd=limits.crowd)
        if isinstance(found, str):
            return Refused(cls.name, found)
        strategy = cls(found, limits.timeout)
        with strategy._stops():
            strategy._group.reach(make_tag(SETUP, 0, cls.name), nanoseconds(limits.build_timeout))
            strategy._memory.team.unpost()  # the calls of users begin after it
        if strategy._group.reaches and strategy.mailbox is not None:
            strategy.mailbox.hand_over()
        return strategy

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on the host."""
        return device.type == "cpu"

    def door(self) -> Any:
        """The short way of one coordinator (native/module_door.c)."""
        return make_door(self._native, self._group)

    def hold(self, held: bool) -> None:
        with contextlib.suppress(AttributeError):  # closed meanwhile
            self._group.held = int(held)

    @property
    def sequence(self) -> int:
        """Collectives begun: the short way counts, too."""
        return int(self._group.sequence)

    @sequence.setter
    def sequence(self, number: int) -> None:
        self._group.sequence = number

    # Reductions.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, timeout: float) -> torch.Tensor:
        return self._reduce(dense(x), self.new(x.shape, x.dtype, x.device), op, tag, timeout, in_place=False)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, timeout: float) -> torch.Tensor:
        if is_dense(x):
            return self._reduce(x, x, op, tag, timeout, in_place=True)
        whole = dense(x)
        return x.copy_(self._reduce(whole, whole, op, tag, timeout, in_place=True))

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, timeout: float, *, in_place: bool) -> torch.Tensor:
        kind, number, width = _kernel(x.dtype, op)
        if not x.numel():
            self.barrier(tag=tag, timeout=timeout)
        elif kind < 0:
            pieces = list(torch.empty((self.world_size, *x.shape), dtype=x.dtype))
            self._share("all_gather", x, [x.nbytes] * self.world_size, [_run(piece) for piece in pieces], pieces, tag, timeout)
            reduce_pieces(pieces, op, out)
        else:
            with self._stops():
                where = x.data_ptr(), out.data_ptr(), x.numel() * width
                self._group.all_reduce(tag, nanoseconds(timeout), *where, kind, number, in_place, (x, out))
        return out

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, timeout: float
    ) -> None:
        x = dense(x)
        kind, number, _ = _kernel(x.dtype, op)
        pieces = x.split(list(sizes), dim)
        if kind < 0:
            mine = list(torch.empty((self.world_size, *out.shape), dtype=x.dtype))
            self.all_to_all(pieces, mine, tag=tag, timeout=timeout)
            reduce_pieces(mine, op, out)
            return
        landing = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        blocks = [_block(piece) or (piece.data_ptr(), 0, 0, 0) for piece in pieces]
        with self._stops():
            self._group.reduce_scatter(tag, nanoseconds(timeout), blocks, landing.data_ptr(), kind, number, (x, landing))
        if landing is not out:
            out.copy_(landing)

    # Gathers and exchanges.

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, timeout: float) -> None:
        landing = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        pieces = landing.split(list(sizes), dim)
        self._share("all_gather", dense(x), [piece.nbytes for piece in pieces], [_block(piece) for piece in pieces], landing, tag, timeout)
        if landing is not out:
            out.copy_(landing)

    def gather(self, x: torch.Tensor, pieces: Sequence[torch.Tensor] | None, dst: int, *, tag: int, timeout: float) -> None:
        landing = None if pieces is None else _Landing(pieces)
        into = [None] * self.world_size if landing is None else landing.blocks
        self._share("gather", dense(x), [x.nbytes] * self.world_size, into, landing, tag, timeout)
        if landing is not None:
            landing.finish()

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, timeout: float) -> None:
        landing = dense(x) if self.rank_in_group == src else landing_for(x)
        sizes = [landing.nbytes if rank == src else 0 for rank in range(self.world_size)]
        into = [_run(landing) if rank == src else None for rank in range(self.world_size)]
        self._share("broadcast", landing, sizes, into, landing, tag, timeout)
        if landing is not x and self.rank_in_group != src:
            x.copy_(landing)

    def _share(
        self,
        operation: str,
        x: torch.Tensor,
        sizes: Sequence[int],
        into: Sequence[_Block | None],
        owner: object,
        tag: int,
        timeout: float,
    ) -> None:
        """`owner` keeps the memory of `into`."""
        number = {
            "all_gather": self._native.OP_ALL_GATHER,
            "gather": self._native.OP_GATHER,
            "broadcast": self._native.OP_BROADCAST,
        }[operation]
        with self._stops():
            self._group.share(number, tag, nanoseconds(timeout), x.data_ptr(), sizes, into, owner)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, timeout: float) -> None:
        landing = _Landing(receives)
        packed = [piece if _block(piece) is not None else dense(piece) for piece in sends]
        with self._stops():
            self._group.trade(tag, nanoseconds(timeout), [_block(piece) for piece in packed], landing.blocks)
        landing.finish()

    def barrier(self, *, tag: int, timeout: float) -> None:
        with self._stops():
            self._group.barrier(tag, nanoseconds(timeout))

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        timeout: float,
    ) -> None:
        assert self.mailbox is not None
        for peer, tensors in _by_peer(sends).items():
            plain_ = [dense(x) for x in tensors]
            with self._stops(halfway=True):
                self.mailbox.send(peer, TENSORS, tag, tuple((x.data_ptr(), x.nbytes) for x in plain_), timeout)
        for peer, tensors in _by_peer(receives).items():
            landing = [landing_for(x) for x in tensors]
            with self._stops(halfway=True):
                fits = self.mailbox.receive_into(peer, tag, [(x.data_ptr(), x.nbytes) for x in landing], landing, timeout)
            if not fits:
                raise CallsDiffer(peer)
            land(landing, tensors)

    def offer(self, sends: Sequence[tuple[torch.Tensor, int]], *, tag: int) -> bool:
        assert self.mailbox is not None
        for peer, tensors in _by_peer(sends).items():
            plain_ = [dense(x) for x in tensors]
            with self._stops(halfway=True):
                if not self.mailbox.offer(peer, TENSORS, tag, tuple((x.data_ptr(), x.nbytes) for x in plain_)):
                    return False
        return True

    # Memory.

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes < _POOLED_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        return tensor_over(self._memory.pool.take(nbytes), dtype, shape)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, tag: int, timeout: float) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.barrier(tag=tag, timeout=timeout)  # compares what the ranks ask for
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        stride = -(-nbytes // 4096) * 4096
        segment = self._shared_segment(stride * self.world_size, tag, timeout)
        self._group.add_region(segment, 0, stride, nbytes)
        self._extra_bytes += stride * self.world_size
        begin = self.rank_in_group * stride
        return tensor_over(memoryview(segment)[begin : begin + nbytes], dtype, shape)

    def _shared_segment(self, nbytes: int, tag: int, timeout: float) -> Any:
        """Memory made by the first rank and mapped by all."""
        word = torch.zeros(3, dtype=torch.int64)
        fd, problem = -1, None
        if self.rank_in_group == 0:
            try:
                fd = segments.create(nbytes)
                word = torch.tensor([1, os.getpid(), fd])
            except Exception as error:
                problem = error
        segment = None
        try:
            self.broadcast(word, 0, tag=tag, timeout=timeout)
            made, pid, there = word.tolist()
            if made:
                try:
                    segment = self._map(pid, there, nbytes)
                except OSError as error:
                    problem = error
            fine = torch.tensor([int(segment is not None)])
            self.all_reduce_(fine, "min", tag=tag, timeout=timeout)
        finally:
            if fd >= 0:
                os.close(fd)
        if not int(fine):
            raise problem if problem is not None else RuntimeError("a peer could not make or map the memory of the tensor")
        return segment

    def _map(self, pid: int, fd: int, nbytes: int) -> Any:
        here = segments.open_peer(pid, fd, nbytes)
        try:
            return self._native.Segment(here, nbytes)
        finally:
            os.close(here)

    def warmup(self) -> None:
        self._memory.segment.populate()

    def memory(self) -> int:
        return self._memory.nbytes + self._extra_bytes if self._closed is None else 0

    # Measuring.

    def ping_pong(self, rounds: int = 200) -> float:
        """Nanoseconds for a cache line from one of the first two ranks to the other. Collective: it shows where the host has put them."""
        with self._stops():
            return float(self._group.ping_pong(0x5050, nanoseconds(10.0), rounds))

    # Failures and life.

    def post_note(self, text: str) -> None:
        self._group.post_note(text.encode(errors="replace"))

    def read_note(self, rank: int) -> str | None:
        text = self._group.read_note(rank)
        return None if text is None else text.decode(errors="replace")

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        n = self.world_size
        return [(row[:n], row[n:]) for row in self._group.pairs()]

    @contextlib.contextmanager
    def _stops(self, *, halfway: bool = False) -> Iterator[None]:
        """`halfway`: a signal's handler that raises leaves a message half sent or half read, after which nothing can be paired."""
        try:
            yield
        except Stopped as stopped:
            raise self.translate(stopped) from None
        except Busy:
            raise
        except BaseException:
            if halfway or self.interrupted:  # the others must not wait for this rank
                self.abort()
            raise

    def translate(self, stopped: Stopped) -> Exception:
        if stopped.code == TIMEOUT:
            return PeerLate(stopped.seat)
        if stopped.code == MISMATCH:
            return CallsDiffer(stopped.seat)
        reason = {LOST: "its process ended", GONE: "it closed its side"}.get(stopped.code, "this rank closed the group")
        return PeerClosed(stopped.seat if stopped.code in (LOST, GONE) else self.rank_in_group, reason)

    @property
    def interrupted(self) -> bool:
        return self._closed is not None or not self._group.enabled

    def abort(self) -> None:
        with contextlib.suppress(AttributeError):  # another thread closes it at this very moment
            self._group.enabled = 0
            self._memory.team.close(True)

    def close(self) -> None:
        if self._closed is None:
            self._closed = self.bytes_sent
            self._group.enabled = 0
            self._memory.team.close()
            # What is mapped goes with the last reference: that of a call that another thread is in, or of a tensor by `empty`.
            del self._group, self._memory, self.mailbox

    @property
    def bytes_sent(self) -> int:
        if self._closed is not None:
            return self._closed
        return int(self._group.bytes_sent) + (self.mailbox.bytes_sent if self.mailbox is not None else 0)

    def describe(self) -> str:
        if self._closed is not None:
            return "closed"
        sizes = self._memory.sizes
        return (
            f"shared memory of one host, {self._memory.nbytes} bytes (slots of {sizes.slot_bytes}, rings of {sizes.broadcast_bytes} and "
            f"{sizes.pair_bytes})"
            + (f", {self._extra_bytes} bytes of shared tensors" if self._extra_bytes else "")
            + ("; large pieces are read where they lie" if self._group.reaches else "")
            + f"; {self._native.isa}"
        )


def teller(gloo: GlooCommunicator, name: str, timeout: float) -> Callable[[bytes], list[bytes]]:
    """A function by which ranks that build the strategy `name` tell each other up to 1,000 bytes, each call of it being collective."""
    n = gloo.world_size
    steps = iter(range(1 << 20))

    def tell(word: bytes) -> list[bytes]:
        mine = tensor_over(bytearray(struct.pack(f"<H{_WORD_BYTES - 2}s", len(word), word)), torch.uint8, (_WORD_BYTES,))
        words = torch.empty(n * _WORD_BYTES, dtype=torch.uint8)
        gloo.all_gather(mine, 0, [_WORD_BYTES] * n, words, tag=make_tag(SETUP, next(steps), name), timeout=timeout)
        said = [bytes(piece.tolist()) for piece in words.split(_WORD_BYTES)]
        return [text[2 : 2 + int.from_bytes(text[:2], "little")] for text in said]

    return tell


def make_door(native: Any, group: Any) -> Any:
    """The short way of a coordinator; `group` is None for one rank."""
    return native.Door(group, tensors_of(native))


def tensors_of(native: Any) -> Any:
    """How the native module looks at tensors, and makes them (native/module_tensors.h)."""
    return native.Tensors(
        torch.Tensor, compat.dlpack_exchange(), torch.is_inference_mode_enabled, compat.count_modes(), compat.mark_written()
    )


class _Describe:
    """`plain` for groups of one size: a callable without a cycle to the group that holds it."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, operation: str, x: Any, argument: Any) -> int:
        return plain(self.n, operation, x, argument)


class _Landing:
    """Where pieces are written to, those that are no runs of memory by way of a buffer."""

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        plain_ = [not piece.is_conj() and not piece.is_neg() and _block(piece) is not None for piece in pieces]
        self._landing = [piece if fine else torch.empty(piece.shape, dtype=piece.dtype) for piece, fine in zip(pieces, plain_, strict=True)]
        self.blocks = [_block(piece) for piece in self._landing]

    def finish(self) -> None:
        land(self._landing, self._pieces)


def _kernel(dtype: torch.dtype, op: str) -> tuple[int, int, int]:
    """Kind and op of the kernel, and how many of its entries one entry is; a negative kind: there is none."""
    if dtype == torch.bool:
        return _KERNELS[torch.uint8], _OPS[_LOGICAL[op]], 1
    if dtype in (torch.complex64, torch.complex128) and op in ("sum", "avg"):
        return _KERNELS[torch.float32 if dtype == torch.complex64 else torch.float64], _OPS[op], 2
    return _KERNELS.get(dtype, -1), _OPS[op], 1


def _run(x: torch.Tensor) -> _Block:
    return (x.data_ptr(), 1, x.nbytes, x.nbytes)


def _block(x: torch.Tensor) -> _Block | None:
    """x as rows of contiguous bytes at equal distances, None if it is nothing of the kind."""
    size = x.element_size()
    if x.is_conj() or x.is_neg():
        return None
    if not x.numel():
        return (0, 0, 0, 0)
    dims = [(extent, stride) for extent, stride in zip(x.shape, x.stride(), strict=True) if extent > 1]
    row = 1
    while dims and dims[-1][1] == row:
        row *= dims.pop()[0]
    if not dims:
        return (x.data_ptr(), 1, row * size, row * size)
    rows, pitch = dims.pop()
    if pitch < row:
        return None
    while dims:
        extent, stride = dims.pop()
        if stride != pitch * rows:
            return None
        rows *= extent
    return (x.data_ptr(), rows, row * size, pitch * size)


def _by_peer(pairs: Sequence[tuple[torch.Tensor, int]]) -> dict[int, list[torch.Tensor]]:
    by_peer: dict[int, list[torch.Tensor]] = {}
    for x, peer in pairs:
        by_peer.setdefault(peer, []).append(x)
    return by_peer


# Bytes from which on a result is put into memory that is used again.
_POOLED_BYTES = 128 * 1024
