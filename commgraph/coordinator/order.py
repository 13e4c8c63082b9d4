"""Comparison of calls where `CommunicatorOptions.check` is set: ranks exchange texts before a call, and raise where they differ."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from commgraph import ambient
from commgraph.accelerators.device_order import DeviceOrder
from commgraph.communicators.tags import CHECK, make_tag
from commgraph.communicators.transport import Transport
from commgraph.coordinator.failures import Call, Members, call_site
from commgraph.deadline import Deadline
from commgraph.errors import CollectiveMismatchError

__all__ = ["Comparison", "check_text", "differences"]

# Bytes of the message with which a rank describes its call to a peer, and of the call site at its end.
_CHECK_BYTES = 512
_SITE_BYTES = 200
_ONE_ORDER = (
    "\nOn a device all ranks begin what they have in common in one order, whatever groups it is of: else they can wait for each other"
)


class Comparison:
    """Compares the calls of one group."""

    def __init__(self, members: Members, transport: Transport, order: DeviceOrder | None) -> None:
        """`order`: compares stream-ordered calls, in one order for all groups of the world."""
        self._members = members
        self._transport = transport
        self._order = order

    def compare(
        self,
        call: Call,
        what: str,
        deadline: Deadline,
        *,
        pair_sizes: Sequence[tuple[int, int]] | None = None,
        at: str | None = None,
        on_device: bool = False,
    ) -> None:
        """Exchange the text of this call with every rank; all raise alike where the texts differ.

        Args:
            call, what, deadline: of the call.
            pair_sizes: elements that go to and come from each rank, where they are not in `what`.
            at: call site; None finds it.
            on_device: whether the call is stream-ordered.

        Raises:
            CollectiveMismatchError: the ranks called different things, in words.
            PeerLate, PeerClosed: as of the transport.
        """
        members, order = self._members, self._order if on_device else None
        n, me = members.world_size, members.rank_in_group
        if order is not None:
            what = f"{what} in group {members.uid}"
        site = call_site() if at is None else at
        mine = [check_text(call.sequence, sizes, what, site) for sizes in pair_sizes or [(0, 0)] * n]
        others = [(me + i) % n for i in range(1, n)]
        heard = {peer: torch.empty_like(mine[peer]) for peer in others}
        if order is None:
            sends, receives = [(mine[peer], peer) for peer in others], [(text, peer) for peer, text in heard.items()]
            self._transport.exchange(sends, receives, tag=make_tag(CHECK, call.sequence), deadline=deadline)
        else:
            heard = order.swap(members.ranks, {peer: mine[peer] for peer in others}, deadline)
        said = [heard.get(peer, mine[me]) for peer in range(n)]
        if wrong := differences(said, members.ranks, me, pair_sizes, ordered=order is not None):
            raise CollectiveMismatchError(f"{call.where}: {wrong}", **call.facts)


def check_text(sequence: int, sizes: tuple[int, int], what: str, at: str) -> torch.Tensor:
    """Return the text of a call for a peer; a long one is cut, and ends in a digest of the rest.

    Args:
        sequence: number of the call in its group.
        sizes: elements that go to the peer and come from it.
        what: the call.
        at: its call site.
    """
    end = f"\0{sizes[0]}\0{sizes[1]}\0".encode() + at.encode()[-_SITE_BYTES:]
    head = f"{sequence}\0{what}".encode()
    room = _CHECK_BYTES - len(end)
    if len(head) > room:
        mark = f"... {zlib.crc32(head):08x}".encode()
        head = head[: room - len(mark)] + mark
    text = ambient.zeros(_CHECK_BYTES, torch.uint8)
    text[: len(head) + len(end)] = ambient.over(bytearray(head + end))
    return text


def differences(
    texts: Sequence[torch.Tensor], ranks: Sequence[int], me: int, pair_sizes: Sequence[tuple[int, int]] | None, *, ordered: bool
) -> str:
    """Return how the calls do not fit together, in words; empty where they do.

    Args:
        texts: of every rank of the group, as this one received them.
        ranks: global ranks.
        me: this rank in the group.
        pair_sizes: elements that go from here to each rank and come from it, where they are not in the calls themselves.
        ordered: whether the calls may be of several groups.
    """
    said = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace").split("\0") for text in texts]
    calls = [f"  rank {ranks[i]}: call #{number}, {words}, at {there}" for i, (number, words, *_, there) in enumerate(said)]
    if len({tuple(words[:2]) for words in said}) > 1:
        return "the ranks of the group called different things:\n" + "\n".join(calls) + (_ONE_ORDER if ordered else "")
    wrong = []
    for peer, (_, _, sent, expected, _) in enumerate(said if pair_sizes else ()):
        to, back = pair_sizes[peer] if pair_sizes else (0, 0)
        if int(expected) != to:
            wrong.append(f"  rank {ranks[me]} sends {to} elements to rank {ranks[peer]}, which expects {expected}")
        if int(sent) != back and peer != me:
            wrong.append(f"  rank {ranks[peer]} sends {sent} elements to rank {ranks[me]}, which expects {back}")
    return "the sizes of the ranks do not fit together:\n" + "\n".join([*wrong, *calls]) if wrong else ""
