"""The strategy on a backend of torch's own (NCCL, XCCL, ...): device tensors, ordered with the current stream as torch's are."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from commgraph import ambient, compat
from commgraph.communicators.base import OPERATIONS, Communicator, PeerClosed, PeerLate
from commgraph.communicators.gloo_transport import milliseconds
from commgraph.communicators.memory import are_slices_joined, as_bytes, copy_back, dense, is_dense, staging_for
from commgraph.deadline import Deadline

__all__ = ["TorchCommunicator"]

logger = logging.getLogger("commgraph")

_OPS = MappingProxyType(
    {
        "sum": dist.ReduceOp.SUM,
        "avg": dist.ReduceOp.AVG,
        "max": dist.ReduceOp.MAX,
        "min": dist.ReduceOp.MIN,
        "product": dist.ReduceOp.PRODUCT,
    }
)
_REDUCTIONS = frozenset({"all_reduce", "reduce", "reduce_scatter"})
_WARMUP_SECONDS = 120.0
_ABORT_SECONDS = 10.0
# Dtypes that NCCL and its relatives add up. All others are sent as bytes, and reduced by the strategy behind this one.
_REDUCIBLE = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64})


class TorchCommunicator(Communicator):
    """Serves device tensors by a backend that was made for this group alone, and that no table of torch.distributed knows.

    Even collectives are the backend's own. Uneven gathers are one broadcast, uneven reductions one reduce from (or to) each rank, coalesced
    into a single launch where the backend can do that; `gather` and `all_to_all` are its exchange of uneven pieces. An operation is
    enqueued on the current stream and does not block the host. The backend enforces deadlines: NCCL knows one for the whole
    communicator, whose watchdog by torch's default ends the process. Messages and collectives are carried by one communicator, and so in
    one order.
    """

    operations = frozenset(name for name in OPERATIONS if name != "barrier")

    def __init__(self, name: str, backend: Any, device: torch.device, rank_in_group: int, world_size: int, store: dist.Store) -> None:
        """Over a live backend.

        Args:
            name: what `explain()` calls it, e.g. ``"nccl"``.
            backend: a `torch.distributed` backend over exactly these ranks.
            device: whose tensors it serves.
            rank_in_group, world_size: this rank's place.
            store: that of the backend.
        """
        super().__init__(rank_in_group, world_size)
        self.name = name
        self.serves_host = device.type == "cpu"
        self.stream_ordered = device.type != "cpu"
        self.process_group = compat.wrap(store, rank_in_group, world_size, backend, device)
        self._backend: Any = backend
        self._device = device
        self._bytes = 0
        self._aborted = False
        # Works enqueued since `_at_once`, where the backend cannot coalesce.
        self._waiting: list[Any] | None = None

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Tensors of its device; reductions of the dtypes that the backend can add up."""
        return device.type == self._device.type and (operation not in _REDUCTIONS or dtype in _REDUCIBLE)

    # Reductions.

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self.all_reduce_(x.clone(memory_format=torch.contiguous_format), op, tag=tag, deadline=deadline)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        whole = dense(x)
        options = compat.backend_options("Allreduce", milliseconds(deadline), reduceOp=_OPS[op])
        if x.numel():
            self._do(lambda backend: backend.allreduce([whole], options), whole)
        copy_back([whole], [x])
        return x

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        staging = staging_for(out)
        if len(set(sizes)) == 1:
            if out.numel():
                whole = x if are_slices_joined(x, dim) else torch.stack(x.split(list(sizes), dim))
                options = compat.backend_options("ReduceScatter", milliseconds(deadline), reduceOp=_OPS[op])
                self._do(lambda backend: backend._reduce_scatter_base(staging.view(-1), whole.view(-1), options), whole)
        else:
            mine = [dense(piece).clone() for piece in x.split(list(sizes), dim)]  # a reduce may write to what its other ranks give
            with self._at_once():
                for root, piece in enumerate(mine):
                    options = compat.backend_options("Reduce", milliseconds(deadline), coalesced=True, reduceOp=_OPS[op], rootRank=root)
                    if piece.numel():
                        self._do(lambda backend, piece=piece, options=options: backend.reduce([piece], options), piece)  # type: ignore[misc]  # defaults of a lambda have no types
            staging.copy_(mine[self.rank_in_group])
        copy_back([staging], [out])

    # Gathers and exchanges.

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        flat = as_bytes(dense(x))
        if len(set(sizes)) == 1:
            straight = are_slices_joined(out, dim)
            whole = out if straight else ambient.empty((self.world_size, *x.shape), x.dtype, x.device)
            if flat.numel():
                self._do(
                    lambda backend: backend._allgather_base(
                        as_bytes(whole), flat, compat.backend_options("Allgather", milliseconds(deadline))
                    ),
                    flat,
                )
            if not straight:
                torch.cat(list(whole), dim, out=out) if is_dense(out) else out.copy_(torch.cat(list(whole), dim))
            return
        views = out.split(list(sizes), dim)
        pieces = [dense(x) if i == self.rank_in_group else ambient.empty(view.shape, x.dtype, x.device) for i, view in enumerate(views)]
        with self._at_once():
            for root, piece in enumerate(pieces):
                if piece.numel():
                    self._broadcast(as_bytes(piece), root, deadline, coalesced=True)
        copy_back(pieces, views)

    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        whole = dense(x)
        if x.numel():
            self._broadcast(as_bytes(whole), src, deadline)
        if self.rank_in_group != src:
            copy_back([whole], [x])

    def _broadcast(self, flat: torch.Tensor, src: int, deadline: Deadline, *, coalesced: bool = False) -> None:
        options = compat.backend_options("Broadcast", milliseconds(deadline), coalesced=coalesced, rootRank=src)
        self._do(lambda backend: backend.broadcast([flat], options), flat)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], *, tag: int, deadline: Deadline) -> None:
        given = torch.cat([as_bytes(dense(piece)) for piece in sends])
        coming = [view.numel() * view.element_size() for view in receives]
        staging = ambient.empty(sum(coming), torch.uint8, given.device)
        going = [piece.numel() * piece.element_size() for piece in sends]
        self._do(
            lambda backend: backend.alltoall_base(
                staging, given, coming, going, compat.backend_options("AllToAll", milliseconds(deadline))
            ),
            given,
        )
        for view, piece in zip(receives, staging.split(coming), strict=True):
            if view.numel():
                # The piece is cloned before it is viewed: it may begin at no multiple of its elements' size.
                view.copy_(piece.clone().view(view.dtype).view(view.shape))

    def gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor | None, dst: int, *, tag: int, deadline: Deadline
    ) -> None:
        nothing = x.new_empty(0)
        sends = [x if rank == dst else nothing for rank in range(self.world_size)]
        receives = [nothing] * self.world_size if out is None else out.split(list(sizes), dim)
        self.all_to_all(sends, receives, tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        staging = [staging_for(x) for x, _ in receives]
        # Copies are kept until all are launched: the memory of one dropped before could be that of the next.
        given = [as_bytes(dense(x)) for x, _ in sends]
        with self._at_once():
            for x, (_, peer) in zip(staging, receives, strict=True):
                if x.numel():
                    self._do(lambda backend, x=x, peer=peer: backend.recv([as_bytes(x)], peer, 0), None)  # type: ignore[misc]  # as above
            for flat, (_, peer) in zip(given, sends, strict=True):
                if flat.numel():
                    self._do(lambda backend, flat=flat, peer=peer: backend.send([flat], peer, 0), flat)  # type: ignore[misc]  # as above
        copy_back(staging, [x for x, _ in receives])

    # How the backend is called.

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """Coalesce operations into one launch, so that they cannot wait for each other; singly where the backend cannot coalesce."""
        backend = self._backend
        if backend is None or not backend.supports_coalescing:
            self._waiting = []
            try:
                yield
                for work in self._waiting:
                    self._wait(work)
            finally:
                self._waiting = None
            return
        backend._start_coalescing()
        try:
            yield
        finally:
            work = backend._end_coalescing()
        self._wait(work)

    def _do(self, call: Callable[[Any], Any], sent: torch.Tensor | None) -> None:
        backend = self._backend
        if backend is None:
            raise PeerClosed(self.rank_in_group, "this rank closed the group")
        try:
            work = call(backend)
        except RuntimeError as error:
            raise self._failure(error) from None
        self._bytes += 0 if sent is None else sent.numel() * sent.element_size()
        if self._waiting is not None:
            self._waiting.append(work)
        elif work is not None:  # None while several are coalesced
            self._wait(work)

    def _wait(self, work: Any) -> None:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._failure(error) from None

    def _failure(self, error: RuntimeError) -> Exception:
        other = (self.rank_in_group + 1) % self.world_size
        if "imed out" in str(error) and not self._aborted:
            return PeerLate(other)
        return PeerClosed(self.rank_in_group if self._aborted else other, str(error))

    # Life.

    def warmup(self, model: torch.nn.Module | None = None) -> None:
        """Run once each call for which a backend allocates: a reduction, a gather, an exchange with every peer."""
        n = self.world_size
        limits: dict[str, Any] = {"tag": 0, "deadline": Deadline.after(_WARMUP_SECONDS)}
        x = ambient.zeros(n, torch.float32, self._device)
        each = [1] * n
        self.all_reduce_(x, "sum", **limits)
        self.all_gather(x[:1].clone(), 0, each, x, **limits)
        self.reduce_scatter(x, 0, each, "sum", x[:1].clone(), **limits)
        self.all_to_all(x.split(1), torch.empty_like(x).split(1), **limits)
        self.broadcast(x, 0, **limits)

    def abort(self) -> None:
        backend, aborted, self._aborted = self._backend, self._aborted, True
        if backend is None or aborted:
            return

        def end() -> None:
            with contextlib.suppress(RuntimeError):
                backend.abort()

        # NCCL's abort waits also for graphs that use the communicator, for as long as they exist.
        ending = threading.Thread(target=end, name=f"commgraph {self.name} abort", daemon=True)
        ending.start()
        ending.join(_ABORT_SECONDS)
        if ending.is_alive():
            logger.warning(
                "%s of rank %d in its group did not end within %g s; it goes on ending. Drop the graphs that were captured with it first",
                self.name,
                self.rank_in_group,
                _ABORT_SECONDS,
            )

    def close(self) -> None:
        if self._backend is not None:
            self.abort()
            self._backend = self.process_group = None

    @property
    def bytes_sent(self) -> int:
        return self._bytes

    def describe(self) -> str:
        return f"torch's {self.name} backend, tensors of {self._device}"
