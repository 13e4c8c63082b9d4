"""How many bytes went from rank to rank, and what time that took, by group and operation: sums over the calls of all ranks.

A record says what a rank gave to a call, and nothing of the way that the bytes took. They are counted as the least that the operation has
to move, evenly over the other ranks of its group; with n ranks in the group and b bytes given by a rank that is::

    all_reduce                              2 b / n to each of the others (a reduce_scatter and an all_gather of the result)
    all_gather, all_gatherv, ..._object     b to each of the others
    dispatch                                the same; more than moves where `CommunicatorOptions.experts` says who needs which rows
    broadcast, also of objects and dicts    b from the root to each of the others
    scatter                                 b / n from the root to each of the others; of objects, whose b is without its own, b / (n - 1)
    reduce, gather                          b to the root
    all others, e.g. all_to_all             b / n to each of the others

A message counts where it was sent; where the sender has no record, where it was received.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from commgraph.shm.recorder import COLLECTIVE, DONE, INCOMING, OUTGOING
from commgraph.trace.columns import Columns, RankColumns
from commgraph.trace.read import Group

__all__ = ["Flows", "Places", "Use", "flows_of", "places_of"]

Array = npt.NDArray[Any]

_FROM_ROOT: Final = frozenset({"broadcast", "broadcast_object", "broadcast_object_list", "broadcast_tensor_dict"})
_TO_ROOT: Final = frozenset({"reduce", "gather", "gather_object"})
_TO_ALL: Final = frozenset({"all_gather", "all_gatherv", "all_gather_object", "dispatch"})
_SUMS: Final = frozenset({"all_reduce", "all_reduce_"})


@attrs.frozen(eq=False)
class Places:
    """What a row of a matrix or of a timeline stands for: a rank, a host, or a block of consecutive ranks.

    Attributes:
        of: number of the place of each rank of the world.
        names: of the places, in the order of their numbers.
        node: of each place: number of its host, of a block that of its first rank; -1 not known, as its ranks have no record.
        unit: what a place is: ``"rank"``, ``"host"``, ``"block of 8 ranks"``.
    """

    of: Array
    names: tuple[str, ...]
    node: Array
    unit: str


def places_of(columns: Columns, limit: int) -> Places:
    """Return at most `limit` places: ranks if there are not more, else hosts (where all are known), else blocks of equal size."""
    size = columns.world_size
    node = np.full(size, -1)
    for one in columns.ranks:
        node[one.rank] = one.facts["node"]
    if size <= limit:
        return Places(np.arange(size), tuple(str(rank) for rank in range(size)), node, "rank")
    hosts = np.unique(node)
    if hosts[0] >= 0 and 1 < len(hosts) <= limit:
        of = np.searchsorted(hosts, node)
        names = {int(node[one.rank]): str(one.facts["host"]) for one in columns.ranks}
        # Containers of one image may all have the same name.
        unique = len(set(names.values())) == len(names)
        return Places(of, tuple(names[int(host)] if unique else f"host {host}" for host in hosts), hosts, "host")
    each = math.ceil(size / limit)
    first = np.arange(0, size, each)
    names_of = tuple(f"{rank}-{min(rank + each, size) - 1}" for rank in range(0, size, each))
    return Places(np.arange(size) // each, names_of, node[first], f"block of {each} ranks")


@attrs.define
class Use:
    """Sums over calls that have ended well.

    Attributes:
        calls: how many, on all ranks.
        given: bytes that ranks gave to them; of receives what came.
        moved: bytes that these are counted as; of receives what came.
        seconds: in them, on all ranks.
        longest: seconds of one.
    """

    calls: int = 0
    given: int = 0
    moved: float = 0.0
    seconds: float = 0.0
    longest: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a rank moves in such a call."""
        return self.moved / self.seconds if self.seconds else 0.0


@attrs.frozen(eq=False)
class Flows:
    """What moved.

    Attributes:
        matrices: by label of a group: bytes from place (row) to place (column).
        sent, received: bytes by rank of the world.
        uses: by label and operation.
        by_size: by operation and the power of two below the bytes that a rank gave.
        unattributed: bytes of messages that were received from an unknown rank.
    """

    matrices: Mapping[str, Array]
    sent: Array
    received: Array
    uses: Mapping[tuple[str, str], Use]
    by_size: Mapping[tuple[str, int], Use]
    unattributed: int


def flows_of(columns: Columns, places: Places) -> Flows:
    """Sum the calls of all ranks."""
    have = {one.rank for one in columns.ranks}
    members = [np.array(group.ranks) for group in columns.groups]
    counted = [np.bincount(places.of[ranks], minlength=len(places.names)) for ranks in members]
    matrices: dict[str, Array] = {}
    sent, received = np.zeros(columns.world_size), np.zeros(columns.world_size)
    uses: dict[tuple[str, str], Use] = {}
    by_size: dict[tuple[str, int], Use] = {}
    unattributed = 0
    for one in columns.ranks:
        me = one.rank
        for number, operation, kind, peer, size, use in _sums(one, columns.operations):
            group, ranks = columns.groups[number], members[number]
            source, every, single = _way(operation, kind, group, peer, me)
            if kind == INCOMING:
                use.moved = float(use.given)
                if source is None:
                    unattributed += use.given
                elif source in have:
                    every = single = 0.0  # counted where it was sent
            else:
                use.moved = use.given * (every * (len(ranks) - 1) + single)
            _add(uses.setdefault((group.label, operation), Use()), use)
            if use.given:
                _add(by_size.setdefault((operation, size), Use()), use)
            if source is None or not (every or single):
                continue
            matrix = matrices.setdefault(group.label, np.zeros((len(places.names),) * 2))
            if every:
                each = use.given * every
                row = counted[number] * each
                row[places.of[me]] -= each
                matrix[places.of[me]] += row
                received[ranks] += each
                received[me] -= each
                sent[me] += each * (len(ranks) - 1)
            if single:
                target = me if kind == INCOMING else group.rank_of(peer)
                matrix[places.of[source], places.of[target]] += use.given * single
                sent[source] += use.given * single
                received[target] += use.given * single
    return Flows(matrices, sent, received, uses, by_size, unattributed)


def _way(operation: str, kind: int, group: Group, peer: int, me: int) -> tuple[int | None, float, float]:
    """Return who sends, and for each byte that is given how many go to every other rank, and to the peer."""
    root = group.rank_of(peer) if peer >= 0 else None
    if kind == INCOMING:
        return root, 0.0, 1.0
    if kind == OUTGOING and root is not None:
        return me, 0.0, 1.0
    n = group.size
    if kind == COLLECTIVE:
        if operation in _SUMS:
            return me, 2 / n, 0.0
        if operation in _TO_ALL:
            return me, 1.0, 0.0
        if root is not None:
            if operation in _FROM_ROOT:
                return me, float(root == me), 0.0
            if operation == "scatter":
                return me, (root == me) / n, 0.0
            if operation == "scatter_object":
                return me, (root == me) / (n - 1), 0.0
            if operation in _TO_ROOT:
                return me, 0.0, float(root != me)
    return me, 1 / n, 0.0


def _sums(one: RankColumns, operations: tuple[str, ...]) -> list[tuple[int, str, int, int, int, Use]]:
    """Return sums over the calls of a rank that have ended well: group, operation, kind, peer, power of two below the bytes, sums."""
    done = np.flatnonzero(one.state == DONE)
    if not len(done):
        return []
    nbytes, taken = one.nbytes[done], (one.end[done] - one.begin[done]).astype(float)
    size = np.frexp(np.maximum(nbytes, 1).astype(float))[1] - 1
    # One number for each combination, whose digits are its parts.
    parts = (one.group[done], one.operation[done], one.kind[done], one.peer[done] + 1, size)
    extents = tuple(int(part.max()) + 1 for part in parts)
    keys, inverse = np.unique(np.ravel_multi_index(tuple(part.astype(np.int64) for part in parts), extents), return_inverse=True)
    calls = np.bincount(inverse)
    given = np.zeros(len(keys), np.int64)
    np.add.at(given, inverse, nbytes)
    seconds = np.bincount(inverse, taken) / 1e9
    longest = np.zeros(len(keys))
    np.maximum.at(longest, inverse, taken)
    found = zip(*np.unravel_index(keys, extents), calls, given, seconds, longest / 1e9, strict=True)
    return [
        (
            int(group),
            operations[operation],
            int(kind),
            int(peer) - 1,
            int(power),
            Use(int(count), int(total), 0.0, float(time), float(most)),
        )
        for group, operation, kind, peer, power, count, total, time, most in found
    ]


def _add(to: Use, use: Use) -> None:
    to.calls += use.calls
    to.given += use.given
    to.moved += use.moved
    to.seconds += use.seconds
    to.longest = max(to.longest, use.longest)
