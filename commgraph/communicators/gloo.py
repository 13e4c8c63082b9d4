"""The strategy that serves every operation on host tensors, over any network: the last one of each chain on the host."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence

import torch

from commgraph import ambient
from commgraph.communicators.base import OPERATIONS, Communicator, PeerLate
from commgraph.communicators.memory import copy_back, dense, staging_for
from commgraph.communicators.part import Part
from commgraph.communicators.reduction import REDUCE_OPS, reduce_pieces
from commgraph.communicators.transport import Pending, Transport
from commgraph.deadline import Deadline

__all__ = ["GlooCommunicator"]

# Bytes of a tensor up to which every rank sends it whole to the others and each reduces alone: one step in place of two.
_ONE_SHOT_BYTES = 32 * 1024
# Ranks up to which gathers send n-1 messages at once; of more ranks they take log2(n) steps of growing messages.
_DIRECT_RANKS = 4


class GlooCommunicator(Communicator):
    """Collectives from point-to-point messages, every dtype as bytes.

    Gathers among many ranks follow Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing
    systems" (1997); everything else is a direct exchange. Neither moves a byte twice. A large reduction is a direct reduce-scatter and a
    gather of the pieces, each piece reduced by one rank in the order of the ranks: the same bits everywhere. Broadcasts follow a
    binomial tree.
    """

    name = "gloo"
    operations = frozenset(OPERATIONS)
    reductions = frozenset(REDUCE_OPS)
    tagged = True

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.rank_in_group, transport.world_size)
        self.transport = transport
        # Pending receives of `receive_any`, by rank, tag and bytes: gloo has no receive from any rank, and cancels none.
        self.posted: dict[tuple[int, int, int], tuple[Pending, torch.Tensor]] = {}
        self._came = threading.Condition()

    def among(self, members: Sequence[int]) -> GlooCommunicator:
        """Return a strategy of some ranks, this one among them, which are numbered by their positions in `members`. Not collective."""
        return GlooCommunicator(Part(self.transport, members))

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on the host."""
        return device.type == "cpu"

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(x, torch.empty_like(x, memory_format=torch.contiguous_format), op, tag, deadline)

    def all_reduce_(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(x, x, op, tag, deadline)

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, deadline: Deadline) -> torch.Tensor:
        flat = dense(x).reshape(-1)
        n = self.world_size
        if n == 2 or flat.nbytes <= _ONE_SHOT_BYTES:
            pieces = self._collect(flat, [flat.numel()] * n, tag, deadline)
            total = pieces[self.rank_in_group]
            reduce_pieces(pieces, op, total)
        else:
            mine = list(flat.tensor_split(n))
            piece = torch.empty_like(mine[self.rank_in_group])
            self._reduce_to(mine, op, piece, tag, deadline)
            total = torch.cat(self._collect(piece, [part.numel() for part in mine], tag, deadline))
        return out.copy_(total.view(out.shape))

    def reduce(self, x: torch.Tensor, op: str, dst: int, *, tag: int, deadline: Deadline) -> torch.Tensor | None:
        if x.nbytes <= _ONE_SHOT_BYTES or self.world_size == 2:
            return super().reduce(x, op, dst, tag=tag, deadline=deadline)
        # Each rank reduces a share, so that `dst` need not take every rank's whole tensor.
        mine = list(dense(x).reshape(-1).tensor_split(self.world_size))
        piece = torch.empty_like(mine[self.rank_in_group])
        self._reduce_to(mine, op, piece, tag, deadline)
        out = self.new(x.shape, x.dtype, x.device) if self.rank_in_group == dst else None
        self.gather(piece, 0, [part.numel() for part in mine], None if out is None else out.view(-1), dst, tag=tag, deadline=deadline)
        return out

    def _collect(self, flat: torch.Tensor, counts: Sequence[int], tag: int, deadline: Deadline) -> list[torch.Tensor]:
        """Return the 1-D pieces of every rank as new tensors, in rank order."""
        if self.world_size > _DIRECT_RANKS:
            return self._gather_bruck(flat, counts, tag, deadline)
        pieces = list(ambient.empty(sum(counts), flat.dtype).split(list(counts)))
        self._gather_direct(flat, pieces, tag, deadline)
        return pieces

    def _gather_direct(self, flat: torch.Tensor, pieces: Sequence[torch.Tensor], tag: int, deadline: Deadline) -> None:
        others = self._others()
        self.transport.exchange([(flat, peer) for peer in others], [(pieces[peer], peer) for peer in others], tag=tag, deadline=deadline)
        pieces[self.rank_in_group].copy_(flat)

    def _gather_bruck(self, flat: torch.Tensor, counts: Sequence[int], tag: int, deadline: Deadline) -> list[torch.Tensor]:
        n, me = self.world_size, self.rank_in_group
        # The buffer begins with this rank's piece: the pieces received so far are always its front, and the next ones continue it.
        turned = [counts[(me + i) % n] for i in range(n)]
        ends = list(itertools.accumulate(turned, initial=0))
        buffer = ambient.empty(ends[-1], flat.dtype)
        buffer[: ends[1]] = flat
        held = 1
        while held < n:
            taken = min(held, n - held)
            # Sends from the front as many pieces as the receiver lacks; the peer's front continues this rank's.
            self.transport.exchange(
                [(buffer[: ends[taken]], (me - held) % n)],
                [(buffer[ends[held] : ends[held + taken]], (me + held) % n)],
                tag=tag,
                deadline=deadline,
            )
            held += taken
        pieces = buffer.split(turned)
        return [pieces[(i - me) % n] for i in range(n)]

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        views = out.split(list(sizes), dim)
        flat = dense(x).reshape(-1)
        if self.world_size > _DIRECT_RANKS:
            pieces = self._gather_bruck(flat, [view.numel() for view in views], tag, deadline)
            copy_back([piece.view(view.shape) for piece, view in zip(pieces, views, strict=True)], views)
            return
        staging = [staging_for(view) for view in views]
        self._gather_direct(flat, [piece.view(-1) for piece in staging], tag, deadline)
        copy_back(staging, views)

    def reduce_scatter(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int], op: str, out: torch.Tensor, *, tag: int, deadline: Deadline
    ) -> None:
        self._reduce_to([dense(piece) for piece in x.split(list(sizes), dim)], op, out, tag, deadline)

    def _reduce_to(self, mine: Sequence[torch.Tensor], op: str, out: torch.Tensor, tag: int, deadline: Deadline) -> None:
        """Reduce the pieces that the ranks have for this one into `out`; `mine[i]` is sent to rank i."""
        me = self.rank_in_group
        pieces = [piece if i == me else torch.empty_like(mine[me]) for i, piece in enumerate([mine[me]] * self.world_size)]
        self.all_to_all(mine, pieces, tag=tag, deadline=deadline)
        reduce_pieces(pieces, op, out)

    def barrier(self, *, tag: int, deadline: Deadline) -> None:
        self._collect(ambient.zeros(1, torch.uint8), [1] * self.world_size, tag, deadline)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int,
        deadline: Deadline,
        label: int = 0,
    ) -> None:
        # Messages of different labels have different tags.
        earlier = [(x, peer, self.posted.pop((peer, tag, x.nbytes), None) if self.posted else None) for x, peer in receives]
        receives = [(x, peer) for x, peer, posted in earlier if posted is None]
        staging = [staging_for(view) for view, _ in receives]
        self.transport.exchange(
            [(dense(x), peer) for x, peer in sends],
            [(piece, peer) for piece, (_, peer) in zip(staging, receives, strict=True)],
            tag=tag,
            deadline=deadline,
        )
        copy_back(staging, [view for view, _ in receives])
        for x, peer, posted in earlier:
            if posted is not None:
                late, buffer = posted
                if not late.wait(deadline.left()):
                    raise PeerLate(peer)
                x.copy_(buffer.view(x.shape))

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        keys = {peer: (peer, tag, x.nbytes) for peer, tag in tags.items()}
        for peer, key in keys.items():
            if key not in self.posted:
                buffer = ambient.empty(x.shape, x.dtype)
                self.posted[key] = self.transport.receive_later(buffer, peer, tag=key[1], then=self._wake), buffer
        with self._came:
            self._came.wait_for(lambda: any(self.posted[key][0].has_ended for key in keys.values()), patience)
        for peer, key in keys.items():
            late, buffer = self.posted[key]
            if late.has_ended and late.wait(0):
                del self.posted[key]
                x.copy_(buffer.view(x.shape))
                return peer
        return None

    def _wake(self) -> None:
        with self._came:
            self._came.notify_all()

    def abort(self) -> None:
        self.transport.abort()

    @property
    def has_aborted(self) -> bool:
        return self.transport.has_aborted

    def close(self) -> None:
        self.transport.close()
        for late, _ in list(self.posted.values()):
            late.join(1.0)
        self.posted.clear()

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    def describe(self) -> str:
        return "host tensors of every dtype, any network"
