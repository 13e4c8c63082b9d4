"""The strategy for ranks of several hosts: TCP links of commgraph's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commgraph import ambient
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.link_fast import LinkFastPath
from commgraph.communicators.memory import dense, pooled
from commgraph.communicators.shm import kernel_of
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.deadline import Deadline

__all__ = ["TcpCommunicator"]


class TcpCommunicator(GlooCommunicator):
    """Collectives from messages, with reductions in the native module (native/net_reduce.c).

    An all-reduce of up to 64 KiB (of two ranks 1 MiB) takes one step, in which every rank sends its whole tensor to all others; among more
    than eight ranks log2(n) steps, in which it passes on those of others, so that each rank has links to 2 log2(n) of them. A larger one is
    a reduce-scatter and a gather of chunks that overlap: each rank reduces its share as the parts come, and sends the result back. Sums are
    taken in the order of the ranks, small floats in float32, so that every rank gets the same bits.
    """

    name = "tcp"
    transport: TcpTransport
    fast: LinkFastPath

    def __init__(self, transport: TcpTransport) -> None:
        super().__init__(transport)
        self.pool = transport.pool
        self.links = transport
        self.fast = LinkFastPath(transport, self.pool)

    def among(self, members: Sequence[int]) -> TcpCommunicator:
        return TcpCommunicator(self.transport.among(members))

    def _reduce(self, x: torch.Tensor, out: torch.Tensor, op: str, tag: int, deadline: Deadline) -> torch.Tensor:
        kind, number, width = kernel_of(x.dtype, op)
        if kind < 0 or not x.numel():
            return super()._reduce(x, out, op, tag, deadline)
        given = dense(x)
        into = given if out is x else out if out.is_contiguous() else torch.empty_like(given)
        transport = self.transport
        net = transport.net_for(tag, transport.collectives.reduces_with(given.nbytes), deadline)
        try:
            net.all_reduce(tag, deadline.left_ns(), given.data_ptr(), into.data_ptr(), given.numel() * width, kind, number, self.pool)
        except BaseException as error:
            transport.fail(net, error)
        return out if into is out else out.copy_(into)

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return pooled(self.pool, shape, dtype)

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return self._reduce(x, self.new(x.shape, x.dtype, x.device), op, tag, deadline)

    def receive_any(self, x: torch.Tensor, tags: Mapping[int, int], *, label: int, patience: float, deadline: Deadline) -> int | None:
        posted = self.posted
        keys = {(peer, tag, x.nbytes): peer for peer, tag in tags.items()}
        for key, peer in keys.items():
            if key not in posted:
                buffer = ambient.empty(x.shape, x.dtype)
                posted[key] = self.transport.receive_later(buffer, peer, tag=key[1]), buffer
        found = self.transport.first_of([posted[key][0] for key in keys], patience)  # type: ignore[misc]  # all from receive_later above
        for key, peer in keys.items():
            late, buffer = posted[key]
            if late is found:
                del posted[key]
                x.copy_(buffer)
                return peer
        return None

    def abort(self) -> None:
        self.fast.break_off()
        super().abort()

    def disown(self) -> None:
        self.transport.disown()

    def close(self) -> None:
        self.fast.close()
        super().close()

    def describe(self) -> str:
        return "host tensors of every dtype, over TCP links that are made when they are first used"
