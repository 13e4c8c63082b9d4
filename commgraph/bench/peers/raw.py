"""What the network alone takes: one exchange of an operation's messages on TCP links, without checks, reductions or copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commgraph.bench.library import Buffers, Library
from commgraph.communicators.tags import SETUP, make_tag
from commgraph.deadline import Deadline

__all__ = ["Peer"]

_TIMEOUT_NS = 120 * 10**9


class Peer(Library):
    """Each rank sends its tensor to every other one at once, natively and on links of its own: a limit that no collective passes."""

    name = "raw exchange"
    computes = False

    def available(self) -> str | None:
        """Needs the native module on all ranks."""
        return None if self.job.world._builder.reach is not None else "there is no native module, or there is one rank"

    def prepare(self) -> None:
        """Links all ranks."""
        world = self.job.world
        reach = world._builder.reach
        assert reach is not None
        self._transport = reach.transport("bench raw", range(world.size), world.rank)
        self._others = [(world.rank + i) % world.size for i in range(1, world.size)]
        self._tag = make_tag(SETUP, 1, "raw")
        self._net: Any = self._transport.net_for(self._tag, self._others, Deadline.after(_TIMEOUT_NS * 1e-9))

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """The exchange of an all-reduce, and of messages there and back."""
        x, net, tag = buffers.x, self._net, self._tag
        landing = [torch.empty_like(x) for _ in self._others]
        sends = [(peer, tag, x.data_ptr(), x.nbytes) for peer in self._others]
        receives = [(peer, tag, there.data_ptr(), there.nbytes) for peer, there in zip(self._others, landing, strict=True)]

        # Both return the tensors whose addresses they use, which thus live as long as these functions.
        def exchange() -> tuple[torch.Tensor, list[torch.Tensor]]:
            net.exchange(sends, receives, _TIMEOUT_NS)
            return x, landing

        def there_and_back() -> tuple[torch.Tensor, list[torch.Tensor]]:
            first = self.job.world.rank == 0
            net.exchange(sends if first else [], [] if first else receives, _TIMEOUT_NS)
            net.exchange([] if first else sends, receives if first else [], _TIMEOUT_NS)
            return x, landing

        if operation in ("all_reduce", "all_reduce_"):
            return exchange
        return there_and_back if operation == "send_recv" and len(self._others) == 1 else None

    def close(self) -> None:
        """Drops the links."""
        self._transport.close()
