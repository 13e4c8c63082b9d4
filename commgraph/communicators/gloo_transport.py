"""Messages between the ranks of one group over gloo's TCP connections.

Everything that commgraph does over gloo is built from `exchange`: some sends and some receives at once, under one deadline.
Point-to-point messages run on the caller's thread, serve every dtype as bytes, and let the order of a reduction be ours.

Relied upon, as observed in gloo (torch 2.13):

* Messages pair by (peer, tag), in order. A message that is longer than the buffer it meets ends the *process*, so the tags of
  calls that do not fit together must differ (`coordinator.operation` makes them), and the size of each message is worked into its tag here.
* `Work.wait(timeout)` that runs out closes every connection of the group: this rank's other waits and its peers' end with an error.
  `abort` uses just that; nothing else releases a blocked wait.
* Dropping the group closes its connections; what was written before still arrives.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commgraph import ambient, compat
from commgraph.communicators.base import PeerClosed, PeerLate
from commgraph.communicators.memory import as_bytes
from commgraph.deadline import Deadline
from commgraph.waiting import Background, Errand

__all__ = ["GlooTransport", "milliseconds"]

# The highest tag, which no call uses: a receive on it can only time out.
_NEVER_SENT = 2**31 - 1
# Part of gloo's errors on a connection that was closed because a wait of this process timed out.
_RAN_OUT = "Application timeout"
# The bits of a tag that differ between calls; those above are the kind of message.
_TAG_MASK = (1 << 28) - 1


def _sized(tag: int, nbytes: int) -> int:
    """Return `tag` for a message of so many bytes: messages of one call but of different sizes are never matched."""
    # The factor is odd, so products of sizes below 2**28 all differ; larger sizes differ in the bits shifted down.
    return tag ^ ((nbytes * 0x9E3779B1 ^ nbytes >> 28) & _TAG_MASK)


def milliseconds(deadline: Deadline) -> timedelta:
    """Return the time left until a deadline, rounded up: torch's backends cut it to milliseconds and take zero for "no deadline"."""
    return timedelta(milliseconds=math.ceil(deadline.left() * 1000))


class GlooTransport:
    """Connections of one rank to every other rank of its group."""

    def __init__(
        self,
        store: dist.Store,
        rank_in_group: int,
        world_size: int,
        *,
        timeout: timedelta,
        device: compat.GlooDevice,
        connect_timeout: timedelta | None = None,
    ) -> None:
        """Connect. Collective over the group; `store` holds nothing but this group's keys.

        Args:
            store, rank_in_group, world_size, device: of the group.
            timeout: default deadline of operations on `process_group`.
            connect_timeout: within which the peers come; None: `timeout`.

        Raises:
            RuntimeError: from torch, where a peer did not come in time or descriptors ran out.
        """
        self.rank_in_group = rank_in_group
        self.world_size = world_size
        self._backend: Any = compat.make_gloo(store, rank_in_group, world_size, timeout, device, connect_timeout)
        self.process_group: dist.ProcessGroup | None = compat.wrap(store, rank_in_group, world_size, self._backend, torch.device("cpu"))
        self._bytes_sent = 0
        self._errand = Errand()
        self._lock = threading.RLock()  # reentrant: a signal handler may call in
        self._aborted = False
        # Buffers of operations that failed: gloo may still write to them until the connections are gone.
        self._keep: list[object] = []

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far."""
        return self._bytes_sent

    @property
    def has_aborted(self) -> bool:
        """Whether its connections were closed by `abort`."""
        return self._aborted

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        *,
        tag: int | Mapping[int, int],
        deadline: Deadline,
    ) -> None:
        """Sends and receives (tensor, peer) pairs, all at once.

        Args:
            sends, receives: contiguous host tensors of any dtype and the rank in the group they go to or come from. Empty ones are
                left out on both sides.
            tag: the same number on both sides of each message, below 7 * 2**28; one for all peers, or one for each.
            deadline: of all of them.
        """
        backend = self._backend
        if backend is None:
            raise PeerClosed(self.rank_in_group, "this rank closed the group")
        works: list[tuple[Any, int]] = []
        peer = self.rank_in_group
        tags = tag if isinstance(tag, Mapping) else dict.fromkeys((peer for _, peer in (*sends, *receives)), tag)

        def wait() -> None:
            nonlocal peer
            for work, peer in works:  # noqa: B007 - read where it fails
                work.wait(milliseconds(deadline))

        try:
            for tensor, peer in receives:
                if tensor.numel():
                    works.append((backend.recv([as_bytes(tensor)], peer, _sized(tags[peer], tensor.nbytes)), peer))
            for tensor, peer in sends:
                if tensor.numel():
                    works.append((backend.send([as_bytes(tensor)], peer, _sized(tags[peer], tensor.nbytes)), peer))
                    with self._lock:
                        self._bytes_sent += tensor.nbytes
            if self._aborted:
                # By another thread, since this one has begun: nothing may be left that would end these waits.
                raise RuntimeError("its connections were closed")
            self._errand.run(wait)
        except RuntimeError as error:
            self._keep.append((sends, receives, works))
            if deadline.has_passed and not self._aborted:
                raise PeerLate(peer) from None
            # gloo's text for a timeout on this side: that of another thread's wait, as this one has not timed out.
            mine = self._aborted or _RAN_OUT in str(error)
            raise PeerClosed(self.rank_in_group if mine else peer, str(error)) from None
        except BaseException:
            # Messages are pending that nobody waits for any more: their buffers must live until the connections are gone.
            self._keep.append((sends, receives, works))
            self.abort()
            raise

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Background:
        """Begin a receive that can be waited for several times: gloo's own wait closes the group when it times out, this one does not.

        `then` is called, from another thread, once it has ended.
        """
        if self._backend is None:
            raise PeerClosed(self.rank_in_group, "this rank closed the group")
        try:
            work = self._backend.recv([as_bytes(tensor)], peer, _sized(tag, tensor.nbytes))
        except RuntimeError as error:
            raise PeerClosed(peer, str(error)) from None

        def receive(_buffer: torch.Tensor = tensor) -> None:  # which must live as long as gloo may write to it
            try:
                # Beyond any deadline, which the caller keeps; closing the group ends this wait.
                work.wait(timedelta(days=365))
            except RuntimeError as error:
                raise PeerClosed(peer, str(error)) from None

        return Background(receive, then)

    def abort(self) -> None:
        """Closes every connection at once: all waits end with an error, here and on the peers. Never raises."""
        with self._lock:
            backend = self._backend
            if self._aborted or backend is None:
                return
            self._aborted = True
            for distance in range(1, self.world_size):
                try:
                    receive = backend.recv([ambient.empty(1, torch.uint8)], (self.rank_in_group + distance) % self.world_size, _NEVER_SENT)
                    receive.wait(timedelta(milliseconds=1))
                except RuntimeError as error:
                    if _RAN_OUT in str(error):
                        return
                    # This peer has left already: the wait failed at once, and only a wait that times out closes the other connections.

    def close(self) -> None:
        """Drop the group. Nothing is sent."""
        self.abort()
        self._errand.close()
        with self._lock:
            self._backend = None
            self.process_group = None
            self._keep.clear()
