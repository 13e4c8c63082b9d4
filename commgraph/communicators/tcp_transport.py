"""Messages between the ranks of one group over TCP links of commgraph's own (native/net.c), made when they are first used."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from commgraph.communicators.base import CallsDiffer, PeerClosed, PeerLeft
from commgraph.communicators.endpoint import Endpoint, Link
from commgraph.communicators.shm_fast import translated
from commgraph.communicators.tags import CHECK, COLLECTIVE, SETUP
from commgraph.deadline import Deadline
from commgraph.shm.stopped import Stopped

__all__ = ["Late", "TcpTransport"]

# Kinds of tags whose messages arrive as they are waited for; those of the others pair by tag, in any order.
_ORDERED = frozenset({COLLECTIVE, CHECK, SETUP})
_KIND_SHIFT = 28

# Seconds between two attempts to link the peers of a receive from several.
_SLICE = 0.01

# Bytes of unused memory that one group keeps for the next calls.
_POOL_BYTES = 64 * 1024 * 1024

# Nanoseconds that a wait spins before it sleeps, where each rank has a core. Longer spins are slower on a busy machine.
_SPIN_NS = 20_000


class TcpTransport:
    """Links of one rank to the others of its group: one for collectives and one for messages, so that neither waits for the other."""

    def __init__(
        self,
        native: Any,
        endpoint: Endpoint,
        group: bytes,
        addresses: Sequence[tuple[str, int]],
        rank_in_group: int,
        *,
        spins: bool,
    ) -> None:
        """Without any link as yet. Not collective.

        Args:
            native: the native module.
            endpoint: of this rank's world.
            group: 16 bytes that name the group.
            addresses: host and port at which each rank of the group listens.
            rank_in_group: this rank's.
            spins: whether waits may spin: the ranks of this host are not more than its cores.
        """
        self.rank_in_group = rank_in_group
        self.world_size = len(addresses)
        self.native = native
        self._endpoint = endpoint
        self._group = group
        self._spins = spins
        self._addresses = tuple(addresses)
        spin_ns = _SPIN_NS if spins and (os.cpu_count() or 1) > 1 else 0
        self.pool = native.Pool(_POOL_BYTES)
        self.collectives = native.Net(self.world_size, rank_in_group, True, spin_ns, self.pool)
        self.messages = native.Net(self.world_size, rank_in_group, False, spin_ns, self.pool)
        for net in (self.collectives, self.messages):
            net.watch(endpoint.fileno(), endpoint.serve)
        self._aborted = False
        # Held while links are made: two threads must not make the same one.
        self._linking = threading.Lock()

    def among(self, members: Sequence[int]) -> TcpTransport:
        """Return a transport of some ranks with links of its own, which are numbered by their positions in `members`. Not collective."""
        name = hashlib.sha256(self._group + repr(tuple(members)).encode()).digest()[: len(self._group)]
        addresses = [self._addresses[member] for member in members]
        return TcpTransport(self.native, self._endpoint, name, addresses, members.index(self.rank_in_group), spins=self._spins)

    @property
    def has_aborted(self) -> bool:
        """Whether its links were closed by `abort`."""
        return self._aborted

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far."""
        return int(self.collectives.bytes_sent + self.messages.bytes_sent)

    def net_for(self, tag: int, peers: Sequence[int], deadline: Deadline) -> Any:
        """Return the native links for messages of that tag, after linking all of `peers`."""
        channel = int(tag >> _KIND_SHIFT not in _ORDERED)
        net = self.messages if channel else self.collectives
        if not net.are_linked(peers):
            for peer in peers:
                self._link(net, channel, peer, deadline)
        return net

    def _link(self, net: Any, channel: int, peer: int, deadline: Deadline) -> None:
        with self._linking:
            if not net.is_linked(peer):
                try:
                    connection = self._endpoint.wait(*self._link_to(channel, peer), deadline)
                except PeerClosed as error:
                    if self._aborted:
                        raise PeerClosed(self.rank_in_group, "this rank closed the group") from None
                    raise error from None
                self._attach(net, peer, connection)

    def _link_to(self, channel: int, peer: int) -> tuple[Link, int, tuple[str, int]]:
        me = self.rank_in_group
        return Link(self._group, channel, min(me, peer), max(me, peer)), peer, self._addresses[peer]

    def _attach(self, net: Any, peer: int, connection: socket.socket) -> None:
        fd = connection.detach()
        try:
            net.attach(peer, fd)
        except BaseException as error:
            os.close(fd)
            self.fail(net, error)

    def has_link(self, tag: int, peer: int) -> bool:
        """Whether there is a link for messages of that tag; made now if that needs no wait."""
        channel = int(tag >> _KIND_SHIFT not in _ORDERED)
        net = self.messages if channel else self.collectives
        if net.is_linked(peer):
            return True
        with self._linking:
            if not net.is_linked(peer):
                connection = self._endpoint.find(*self._link_to(channel, peer))
                if connection is None:
                    return False
                self._attach(net, peer, connection)
        return True

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
            tag: the same number on both sides of each message, 31 bits; one for all peers, or one for each.
            deadline: of all of them.
        """
        given = [(x, peer) for x, peer in sends if x.numel()]
        wanted = [(x, peer) for x, peer in receives if x.numel()]
        if not given and not wanted:
            return
        tags = tag if isinstance(tag, Mapping) else dict.fromkeys([peer for _, peer in (*given, *wanted)], tag)
        net = self.net_for(next(iter(tags.values())), [peer for _, peer in (*given, *wanted)], deadline)
        try:
            net.exchange(
                [(peer, tags[peer], x.data_ptr(), x.nbytes) for x, peer in given],
                [(peer, tags[peer], x.data_ptr(), x.nbytes) for x, peer in wanted],
                deadline.left_ns(),
            )
        except BaseException as error:
            self.fail(net, error)

    def send_parts(self, parts: tuple[Any, ...], peers: list[int], tag: int, rest: int, deadline: Deadline) -> None:
        """Send buffers to each of some peers, as a frame each: the first with `tag`, the others with `rest`."""
        net = self.net_for(tag, peers, deadline)
        try:
            net.send_parts(peers, tag, rest, parts, deadline.left_ns())
        except BaseException as error:
            self.fail(net, error)

    def take(self, peer: int, tag: int, deadline: Deadline, once_begun: Deadline) -> Any:
        """Return the memory of a frame of any size; None if none has begun to come by `deadline`."""
        net = self.net_for(tag, (peer,), deadline)
        try:
            return net.take(peer, tag, deadline.left_ns(), once_begun.left_ns())
        except BaseException as error:
            self.fail(net, error)

    def take_all(self, peer: int, tag: int, rest: int, sizes: list[int], deadline: Deadline) -> list[Any]:
        """Return the memory of frames of these sizes, which follow with `rest` the one with `tag`, on its link."""
        net = self.net_for(tag, (peer,), deadline)
        try:
            return net.take_all(peer, rest, sizes, deadline.left_ns())  # type: ignore[no-any-return]  # the native module has no types
        except BaseException as error:
            self.fail(net, error)

    def receive_later(self, tensor: torch.Tensor, peer: int, *, tag: int, then: Callable[[], None] | None = None) -> Late:
        """Begin a receive that may be waited for several times; its waits make the link. `then` is not used: no thread receives."""
        return Late(self, tensor, peer, tag)

    def first_of(self, lates: Sequence[Late], patience: float) -> Late | None:
        """Return one of several receives that has ended, within so many seconds; None if none has. Raises its error."""
        deadline = Deadline.after(patience)
        while True:
            posted = [late for late in lates if late.post()]
            left = 0.0 if deadline.has_passed else deadline.left()
            slice_ns = int((left if len(posted) == len(lates) else min(left, _SLICE)) * 1e9)
            found = self._first(posted, slice_ns) if posted else None
            if found is not None or deadline.has_passed:
                return found
            if not posted:
                time.sleep(slice_ns * 1e-9)

    def _first(self, posted: Sequence[Late], timeout_ns: int) -> Late | None:
        net = posted[0].net
        try:
            index = net.first_of([late.native for late in posted], timeout_ns)
        except BaseException as error:
            self.fail(net, error)
        return None if index < 0 else posted[index]

    def fail(self, net: Any, error: BaseException) -> NoReturn:
        """Raise `PeerLate`, `PeerClosed` or `CallsDiffer` for the error of a native call, or the error itself."""
        try:
            if not isinstance(error, Stopped):
                self.abort()  # a signal's handler has raised: messages may be half sent, and the others must not wait for this rank
                raise error
            found = translated(error, self.rank_in_group, lambda peer, rank: self.lost(net, peer, rank))
            assert found is not None
            raise found from None
        finally:
            del error  # whose traceback holds this frame

    def translate(self, error: BaseException) -> Exception | None:
        """Return `PeerLate`, `PeerClosed` or `CallsDiffer` for what ended a native call for messages; None for any other exception."""
        return translated(error, self.rank_in_group, lambda peer, rank: self.lost(self.messages, peer, rank))

    def lost(self, net: Any, peer: int, rank: int) -> PeerClosed:
        """Return the error of a link to `peer` that has ended, which names it `rank`."""
        if net.has_left(peer):
            return PeerLeft(rank)
        number = net.error(peer)
        return PeerClosed(rank, f"its connection ended: {os.strerror(number) if number else 'it closed the connection'}")

    def abort(self) -> None:
        """Close every link at once: all waits end with an error, here and on the peers. Never raises."""
        self._aborted = True
        self.collectives.abort()
        self.messages.abort()
        self._endpoint.leave(self._group)

    def disown(self) -> None:
        """Close the copies of the links, in a forked child: a peer notices that the parent has died although the child lives."""
        self.collectives.disown()
        self.messages.disown()

    def close(self) -> None:
        """Drop the links. What was sent before still arrives."""
        self._aborted = True
        self.collectives.close()
        self.messages.close()
        self._endpoint.leave(self._group)


class Late:
    """A receive that may be waited for several times: a wait that runs out harms nothing."""

    def __init__(self, transport: TcpTransport, tensor: torch.Tensor, peer: int, tag: int) -> None:
        self._transport = transport
        self._tensor = tensor
        self._peer = peer
        self._tag = tag
        self.net: Any = None
        self.native: Any = None

    def post(self) -> bool:
        """Begin the receive, if there is a link or one can be had without a wait; whether it has begun."""
        if self.native is None and self._transport.has_link(self._tag, self._peer):
            x, net = self._tensor, self._transport.net_for(self._tag, (), Deadline.after(0))
            try:
                self.net, self.native = net, net.receive_later(self._peer, self._tag, x.data_ptr(), x.nbytes, x)
            except BaseException as error:
                self._transport.fail(net, error)
        return self.native is not None

    @property
    def has_ended(self) -> bool:
        """Whether the receive has ended, with an error or without."""
        try:
            return self.wait(0.0)
        except (PeerClosed, CallsDiffer):
            return True

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; whether it has ended. Raises its error."""
        return self._transport.first_of([self], timeout) is not None

    def join(self, timeout: float) -> None:
        """Do nothing: there is no thread."""
