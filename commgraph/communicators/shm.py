"""The strategy for ranks of one host: tensors through shared memory."""

from __future__ import annotations

import hmac
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import attrs
import torch

from commgraph import ambient
from commgraph.communicators.base import OPERATIONS, CallsDiffer, Communicator, Limits, Refused
from commgraph.communicators.blocks import Block, Staging, block, cut, run
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.memory import copy_back, dense, is_dense, pooled, staging_for
from commgraph.communicators.reduction import REDUCE_OPS, reduce_pieces
from commgraph.communicators.shm_fast import ShmFastPath, by_peer
from commgraph.communicators.tags import SETUP, make_tag
from commgraph.deadline import Deadline
from commgraph.errors import BuildError
from commgraph.options import CommunicatorOptions
from commgraph.shm import host_memory, segments
from commgraph.shm.mailbox import Mailbox, tensors_with
from commgraph.shm.pickling import tensor_over
from commgraph.shm.stopped import Busy

__all__ = ["ShmCommunicator", "exchange_bytes", "kernel_of"]

# Bytes of the ring from one rank to all others of its host, in a group over several hosts.
_RELAYED_BYTES = 64 * 1024

# Most bytes of a message between ranks while the memory is made.
_WORD_BYTES = 1024
_MAC_BYTES = 32

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

# Ranks up to which the words of a build are exchanged directly, so that each knows who did not come; those of more go up and down a tree.
_DIRECT_RANKS = 4


class ShmCommunicator(Communicator):
    """Collectives, messages and objects of the ranks of one host.

    Small reductions take one step, in which each rank reads what all others staged; large ones take two for each chunk, a
    reduce-scatter and a gather (native/reduce.c). Two ranks read and write a chunk at once (native/pipelined.c). Sums are taken in the
    order of the ranks, small floats in float32, so that every rank gets the same bits. Each call carries a header, and ranks whose headers
    differ raise. Large tensors made by `empty` are not staged, if those of all ranks are.
    """

    name = "shm"
    operations = frozenset(OPERATIONS)
    reductions = frozenset(REDUCE_OPS)
    tagged = True
    fast: ShmFastPath

    def __init__(self, memory: host_memory.HostMemory, timeout: float, numbers: Sequence[int] | None = None) -> None:
        """Over memory that the ranks share.

        Args:
            memory: that it is.
            timeout: default deadline in seconds.
            numbers: by which messages and errors name the ranks, where they are a part of a group; the collectives name their positions.
        """
        super().__init__(memory.rank_in_group, memory.sizes.n)
        self._memory = memory
        self._native = memory.native
        self._timeout = timeout
        self._extra_bytes = 0
        self._closed: int | None = None  # what `bytes_sent` was when it was closed
        self._group = memory.native.Group(memory.team, memory.pool, memory.group_offset, memory.sizes.slot_bytes)
        self._mailbox = Mailbox(memory, numbers) if memory.sizes.pair_bytes else None
        if self._mailbox is None:  # without rings there are no messages
            self.operations = self.operations - {"send", "recv"}
        self.fast = self.rings = ShmFastPath(self._group, memory, self._mailbox, range(memory.sizes.n) if numbers is None else numbers)

    @classmethod
    def build(
        cls, gloo: GlooCommunicator, options: CommunicatorOptions, limits: Limits, numbers: Sequence[int] | None = None
    ) -> ShmCommunicator | Refused:
        """Make the memory of a group. Collective; return the strategy on every rank, or on every rank the same `Refused`.

        Args:
            gloo: serves the group, and carries the messages of the build.
            options: of the group.
            limits: of the build and of what is built.
            numbers: as for the constructor.
        """
        sizes = host_memory.Sizes.plan(
            gloo.world_size, shm_bytes=options.shm_bytes, queue_bytes=options.queue_bytes, queues=options.message_queue
        )
        if numbers is not None and sizes.broadcast_bytes:
            # A rank that stops reading is noticed when the ring is full; what comes over a link is never far ahead, either.
            sizes = attrs.evolve(sizes, broadcast_bytes=min(sizes.broadcast_bytes, _RELAYED_BYTES))
        deadline = Deadline.after(limits.build_timeout)
        exchange = _signed(exchange_bytes(gloo, cls.name, deadline), limits.handover_key, gloo.rank_in_group)
        found = host_memory.join(exchange, sizes, gloo.rank_in_group, sharing=limits.sharing)
        if isinstance(found, str):
            return Refused(cls.name, found)
        strategy = cls(found, limits.timeout, numbers)
        try:
            strategy._group.probe_cma(make_tag(SETUP, 0, cls.name), deadline.left_ns())
        except BaseException as error:
            strategy._raise(error)
        if strategy._group.has_cma and strategy._mailbox is not None:
            strategy._mailbox.enable_rendezvous()
        return strategy

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on the host."""
        return device.type == "cpu"

    # Reductions.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(dense(x), self.new(x.shape, x.dtype, x.device), op, tag, deadline, in_place=False)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        if is_dense(x):
            return self._reduce(x, x, op, tag, deadline, in_place=True)
        whole = dense(x)
        return x.copy_(self._reduce(whole, whole, op, tag, deadline, in_place=True))

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, deadline: Deadline, *, in_place: bool) -> torch.Tensor:
        kind, number, width = kernel_of(x.dtype, op)
        if not x.numel():
            self.barrier(tag=tag, deadline=deadline)
        elif kind < 0:
            pieces = list(ambient.empty((self.world_size, *x.shape), x.dtype))
            self._all_gatherv(
                self._native.OP_ALL_GATHER, x, [x.nbytes] * self.world_size, [run(piece) for piece in pieces], pieces, tag, deadline
            )
            reduce_pieces(pieces, op, out)
        else:
            try:
                where = x.data_ptr(), out.data_ptr(), x.numel() * width
                self._group.all_reduce(tag, deadline.left_ns(), *where, kind, number, in_place, (x, out))
            except BaseException as error:
                self._raise(error)
        return out

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        x = dense(x)
        kind, number, _ = kernel_of(x.dtype, op)
        if kind < 0:
            mine = list(ambient.empty((self.world_size, *out.shape), x.dtype))
            self.all_to_all(x.split(list(sizes), dim), mine, tag=tag, deadline=deadline)
            reduce_pieces(mine, op, out)
            return
        staging = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        try:
            self._group.reduce_scatter(tag, deadline.left_ns(), cut(x, dim, sizes), staging.data_ptr(), kind, number, (x, staging))
        except BaseException as error:
            self._raise(error)
        if staging is not out:
            out.copy_(staging)

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        me, flat = self.rank_in_group, dense(x).view(-1)
        out = self.new(x.shape, x.dtype, x.device) if me == dst else None
        if x.nbytes <= _ONE_RANK_BYTES or self.world_size == 2:
            sizes = [flat.numel() if rank == dst else 0 for rank in range(self.world_size)]
            self.reduce_scatter(flat, 0, sizes, op, flat[:0] if out is None else out.view(-1), tag=tag, deadline=deadline)
            return out
        # Each rank reduces a share, so that `dst` need not read every rank's whole tensor.
        sizes = [piece.numel() for piece in flat.tensor_split(self.world_size)]
        mine = flat.new_empty(sizes[me])
        self.reduce_scatter(flat, 0, sizes, op, mine, tag=tag, deadline=deadline)
        into: list[Block | None] = [None] * self.world_size if out is None else [run(piece) for piece in out.view(-1).split(sizes)]
        self._all_gatherv(self._native.OP_GATHER, mine, [size * x.itemsize for size in sizes], into, out, tag, deadline)
        return out

    # Gathers and exchanges.

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        staging = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        blocks = cut(staging, dim, sizes)
        nbytes = [rows * row for _, rows, row, _ in blocks]
        self._all_gatherv(self._native.OP_ALL_GATHER, dense(x), nbytes, blocks, staging, tag, deadline)
        if staging is not out:
            out.copy_(staging)

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        row = _row_bytes(x, dim)
        nbytes = [row * size for size in sizes]
        if out is None:
            self._all_gatherv(self._native.OP_GATHER, dense(x), nbytes, [None] * self.world_size, None, tag, deadline)
            return
        staging = out if is_dense(out) else self.new(out.shape, out.dtype, out.device)
        self._all_gatherv(self._native.OP_GATHER, dense(x), nbytes, cut(staging, dim, sizes), staging, tag, deadline)
        if staging is not out:
            out.copy_(staging)

    def scatter(
        self, x: torch.Tensor | None, dim: int, sizes: Sequence[int], out: torch.Tensor, src: int, *, tag: int, deadline: Deadline
    ) -> None:
        n, staging = self.world_size, Staging([out])
        into: list[Block | None] = [None] * n
        into[src] = staging.blocks[0]
        given = None if x is None else dense(x)
        try:
            self._group.all_to_allv(tag, deadline.left_ns(), [None] * n if given is None else cut(given, dim, sizes), into)
        except BaseException as error:
            self._raise(error)
        staging.copy_back()

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        staging = dense(x) if self.rank_in_group == src else staging_for(x)
        sizes = [staging.nbytes if rank == src else 0 for rank in range(self.world_size)]
        into = [run(staging) if rank == src else None for rank in range(self.world_size)]
        self._all_gatherv(self._native.OP_BROADCAST, staging, sizes, into, staging, tag, deadline)
        if staging is not x and self.rank_in_group != src:
            x.copy_(staging)

    def _all_gatherv(
        self,
        operation: int,
        x: torch.Tensor,
        sizes: Sequence[int],
        into: Sequence[Block | None],
        owner: object,
        tag: int,
        deadline: Deadline,
    ) -> None:
        """Run the native `operation`, an all_gatherv, gather or broadcast; `owner` keeps the memory of `into` alive."""
        try:
            self._group.all_gatherv(operation, tag, deadline.left_ns(), x.data_ptr(), sizes, into, owner)
        except BaseException as error:
            self._raise(error)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        staging, blocks, given = Staging(receives), [], []
        for piece in sends:
            found = block(piece)
            if found is None:  # such a copy lives until the call has ended
                given.append(dense(piece))
                found = block(given[-1])
            blocks.append(found)
        try:
            self._group.all_to_allv(tag, deadline.left_ns(), blocks, staging.blocks)
        except BaseException as error:
            self._raise(error)
        staging.copy_back()

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        try:
            self._group.barrier(tag, deadline.left_ns())
        except BaseException as error:
            self._raise(error)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        mailbox, kind = self._mailbox, tensors_with(label)
        assert mailbox is not None
        for peer, tensors in by_peer(sends).items():
            given = [dense(x) for x in tensors]
            try:
                mailbox.send(peer, kind, tag, tuple([(x.data_ptr(), x.nbytes) for x in given]), deadline.left_ns())
            except BaseException as error:
                self._raise(error, halfway=True)
        for peer, tensors in by_peer(receives).items():
            staging = [staging_for(x) for x in tensors]
            try:
                fits = mailbox.receive_into(peer, kind, tag, [(x.data_ptr(), x.nbytes) for x in staging], staging, deadline.left_ns())
            except BaseException as error:
                self._raise(error, halfway=True)
            if not fits:
                raise CallsDiffer(peer)
            copy_back(staging, tensors)

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        mailbox, staging = self._mailbox, staging_for(x)
        assert mailbox is not None
        rest_ns = deadline.at_least(self._timeout).left_ns()
        into = [(staging.data_ptr(), staging.nbytes)]
        try:
            found = mailbox.receive_first(tags, tensors_with(label), into, staging, int(patience * 1e9), rest_ns)
        except BaseException as error:
            self._raise(error, halfway=True)
        if found is None:
            return None
        src, fits = found
        if not fits:
            raise CallsDiffer(src)
        copy_back([staging], [x])
        return src

    # Memory.

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return pooled(self._memory.pool, shape, dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, tag: int, deadline: Deadline) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.barrier(tag=tag, deadline=deadline)  # compares what the ranks ask for
        if not nbytes:
            return ambient.empty(tuple(shape), dtype)
        stride = -(-nbytes // 4096) * 4096
        segment = self._shared_segment(stride * self.world_size, tag, deadline)
        self._group.add_region(segment, 0, stride, nbytes)
        self._extra_bytes += stride * self.world_size
        begin = self.rank_in_group * stride
        return tensor_over(memoryview(segment)[begin : begin + nbytes], dtype, shape)

    def _shared_segment(self, nbytes: int, tag: int, deadline: Deadline) -> Any:
        """Return memory made by the first rank and mapped by all."""
        word = ambient.zeros(3, torch.int64)
        fd, problem = -1, None
        if self.rank_in_group == 0:
            try:
                fd = segments.create(nbytes)
                word = ambient.integers([1, os.getpid(), fd])
            except Exception as error:
                problem = error
        segment = None
        try:
            self.broadcast(word, 0, tag=tag, deadline=deadline)
            made, pid, there = word.tolist()
            if made:
                try:
                    segment = self._map(pid, there, nbytes)
                except OSError as error:
                    problem = error
            # 1 + the rank that could not.
            failed = ambient.integers([0 if segment is not None else 1 + self.rank_in_group])
            self.all_reduce_(failed, "max", tag=tag, deadline=deadline)
        finally:
            if fd >= 0:
                os.close(fd)
        if int(failed):
            # All ranks raise it: the group goes on.
            what = f"{nbytes} bytes of shared memory for a tensor of each of {self.world_size} ranks"
            who = "rank 0 in the group could not make" if not made else f"rank {int(failed) - 1} in the group could not map"
            raise BuildError(f"{who} {what}" + (f": {problem}" if problem is not None else "; its own error says why"))
        return segment

    def _map(self, pid: int, fd: int, nbytes: int) -> Any:
        here = segments.open_peer(pid, fd, nbytes)
        try:
            return self._native.Segment(here, nbytes)
        finally:
            os.close(here)

    def warmup(self, model: torch.nn.Module | None = None) -> None:
        self._memory.segment.populate()

    def memory(self) -> int:
        return self._memory.nbytes + self._extra_bytes if self._closed is None else 0

    # Measuring.

    def ping_pong(self, rounds: int = 200) -> float:
        """Return the nanoseconds that a cache line takes between the first two ranks, which shows their placement. Collective."""
        try:
            return float(self._group.ping_pong(0x5050, Deadline.after(10.0).left_ns(), rounds))
        except BaseException as error:
            self._raise(error)

    # Lifetime.

    def _raise(self, error: BaseException, *, halfway: bool = False) -> NoReturn:
        """Raise `PeerLate`, `PeerClosed` or `CallsDiffer` for the error of a native call, or the error itself.

        Args:
            error: that of the call.
            halfway: the call was a message: a signal handler that raises leaves it half sent or read, and later ones cannot be matched.
        """
        try:
            translated = self.fast.translate(error)
            if translated is not None:
                raise translated from None
            if not isinstance(error, Busy) and (halfway or self.fast.interrupted):
                self.abort()  # the others must not wait for this rank
            raise error
        finally:
            del error  # whose traceback holds this frame

    def abort(self) -> None:
        self.fast.break_off()

    @property
    def has_aborted(self) -> bool:
        return self._closed is None and self.fast.interrupted

    def close(self) -> None:
        if self._closed is None:
            self._closed = self.bytes_sent
            self.fast.close()
            # Memory is unmapped with its last reference: that of another thread's call, or of a tensor made by `empty`.
            del self._group, self._memory, self._mailbox

    @property
    def bytes_sent(self) -> int:
        try:
            group, mailbox = self._group, self._mailbox
        except AttributeError:  # `close` deletes them, on another thread at any moment
            return self._closed or 0
        return int(group.bytes_sent) + (mailbox.bytes_sent if mailbox is not None else 0)

    def describe(self) -> str:
        try:
            memory, group = self._memory, self._group
        except AttributeError:  # likewise
            return "closed"
        sizes = memory.sizes
        return (
            f"shared memory of one host, {memory.nbytes} bytes (slots of {sizes.slot_bytes}, rings of {sizes.broadcast_bytes} and "
            f"{sizes.pair_bytes})"
            + (f", {self._extra_bytes} bytes of shared tensors" if self._extra_bytes else "")
            + ("; large pieces are read where they lie" if group.has_cma else "")
            + f"; {self._native.isa}"
        )


def exchange_bytes(gloo: GlooCommunicator, name: str, deadline: Deadline) -> Callable[[bytes], list[bytes]]:
    """Return a function by which the ranks that build the strategy `name` exchange up to 1,000 bytes; each call of it is collective."""
    n = gloo.world_size
    steps = iter(range(1 << 20))

    def exchange(word: bytes) -> list[bytes]:
        mine = tensor_over(bytearray(struct.pack(f"<H{_WORD_BYTES - 2}s", len(word), word)), torch.uint8, (_WORD_BYTES,))
        words = ambient.empty(n * _WORD_BYTES, torch.uint8)
        tag = make_tag(SETUP, next(steps), name)
        if n <= _DIRECT_RANKS:
            gloo.all_gather(mine, 0, [_WORD_BYTES] * n, words, tag=tag, deadline=deadline)
        else:
            _gather_by_tree(gloo, words, mine, tag, deadline)
            gloo.broadcast(words, 0, tag=tag, deadline=deadline)
        said = [bytes(piece.tolist()) for piece in words.split(_WORD_BYTES)]
        return [text[2 : 2 + int.from_bytes(text[:2], "little")] for text in said]

    return exchange


def _gather_by_tree(gloo: GlooCommunicator, words: torch.Tensor, mine: torch.Tensor, tag: int, deadline: Deadline) -> None:
    """Fill `words` on the first rank, along the tree by which a broadcast then comes back: links are made that way once, and few."""
    n, me = gloo.world_size, gloo.rank_in_group
    pieces = words.view(n, _WORD_BYTES)
    pieces[me] = mine
    step = 1
    while step < n and not me & step:
        if me + step < n:
            gloo.exchange([], [(pieces[me + step : me + 2 * step], me + step)], tag=tag, deadline=deadline)
        step *= 2
    if me:
        gloo.exchange([(pieces[me : me + step], me - step)], [], tag=tag, deadline=deadline)


def _signed(exchange: Callable[[bytes], list[bytes]], key: bytes, me: int) -> Callable[[bytes], list[bytes]]:
    """Return `exchange` for words that are signed by a key that only ranks of this host have: gloo takes a connection from anybody."""
    steps = iter(range(1 << 20))

    def mac(step: int, rank: int, word: bytes) -> bytes:
        return hmac.digest(key, step.to_bytes(4, "little") + rank.to_bytes(4, "little") + word, "sha256")

    def exchange_signed(word: bytes) -> list[bytes]:
        step = next(steps)
        said = exchange(mac(step, me, word) + word)
        for rank, text in enumerate(said):
            if not hmac.compare_digest(text[:_MAC_BYTES], mac(step, rank, text[_MAC_BYTES:])):
                raise BuildError(f"rank {rank} in the group did not sign where its memory is: somebody else has taken its connection")
        return [text[_MAC_BYTES:] for text in said]

    return exchange_signed


def kernel_of(dtype: torch.dtype, op: str) -> tuple[int, int, int]:
    """Return kind and op of the kernel, and how many of its elements one element is; a negative kind: there is no kernel."""
    if op not in _OPS:
        return -1, 0, 1
    if dtype == torch.bool:
        return _KERNELS[torch.uint8], _OPS[_LOGICAL[op]], 1
    if dtype in (torch.complex64, torch.complex128) and op in ("sum", "avg"):
        return _KERNELS[torch.float32 if dtype == torch.complex64 else torch.float64], _OPS[op], 2
    return _KERNELS.get(dtype, -1), _OPS[op], 1


# Bytes of one tensor up to which a reduction to one rank is done by that rank alone.
_ONE_RANK_BYTES = 256 * 1024


def _row_bytes(x: torch.Tensor, dim: int) -> int:
    """Return the bytes of the elements at one index of `dim`."""
    return math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :]) * x.element_size()
