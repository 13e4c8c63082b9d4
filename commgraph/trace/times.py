"""When ranks called: who began a collective last, and how busy each was at what time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from commgraph.shm.recorder import COLLECTIVE
from commgraph.trace.columns import Columns
from commgraph.trace.flows import Places

__all__ = ["Late", "Span", "Stragglers", "busy", "longest", "span_of", "stragglers"]

Array = npt.NDArray[Any]


@attrs.frozen
class Late:
    """A rank that began a collective last.

    Attributes:
        label, operation: of the collective.
        sequence: its number in the group.
        rank: that began last.
        seconds: after the last but one: what this rank alone costs.
        waited: seconds that the other ranks waited for it, added up.
        site: where it was called.
    """

    label: str
    operation: str
    sequence: int
    rank: int
    seconds: float
    waited: float
    site: str


@attrs.frozen(eq=False)
class Stragglers:
    """Who began last, over all collectives that can be compared.

    Attributes:
        compared: collectives that are in the records of all ranks of their group that have a record, of two or more.
        left_out: collectives that are not: of some rank the ring has overwritten the call, or it was not made.
        times, seconds, waited: by rank of the world: how often it was the last, and the sums of `Late.seconds` and `Late.waited`.
        by_use: (label, operation, collectives, seconds that the last rank was late, the rank that was late most and its seconds).
        worst: the latest, the worst first.
    """

    compared: int
    left_out: int
    times: Array
    seconds: Array
    waited: Array
    by_use: Sequence[tuple[str, str, int, float, int, float]]
    worst: Sequence[Late]


def stragglers(columns: Columns, count: int = 20) -> Stragglers:
    """Compare when the ranks of a group began each collective; `count`: how many of the worst are kept."""
    size = columns.world_size
    uids: dict[str, int] = {}
    uid_of = np.array([uids.setdefault(group.uid, len(uids)) for group in columns.groups] or [0])
    have = np.zeros(size, bool)
    have[[one.rank for one in columns.ranks]] = True
    expected = np.zeros(max(len(uids), 1), np.int64)
    for known in columns.groups:
        expected[uids[known.uid]] = have[list(known.ranks)].sum()
    which = [np.flatnonzero(one.kind == COLLECTIVE) for one in columns.ranks]

    def joined(name: str) -> Array:
        return np.concatenate([getattr(one, name)[at] for one, at in zip(columns.ranks, which, strict=True)])

    rank = np.repeat([one.rank for one in columns.ranks], [len(at) for at in which])
    group, sequence, begin = joined("group"), joined("sequence"), joined("begin")
    nothing = np.zeros(size)
    if not len(rank):
        return Stragglers(0, 0, nothing.astype(np.int64), nothing, nothing, (), ())
    begin = begin - begin.min()  # sums of them stay small
    order = np.lexsort((begin, sequence, uid_of[group]))
    rank, group, sequence, begin, operation = (part[order] for part in (rank, group, sequence, begin, joined("operation")))
    uid = uid_of[group]
    starts = np.flatnonzero(np.append(True, (np.diff(uid) != 0) | (np.diff(sequence) != 0)))
    counts = np.diff(np.append(starts, len(uid)))
    alike = np.minimum.reduceat(operation, starts) == np.maximum.reduceat(operation, starts)
    complete = (counts == expected[uid[starts]]) & (counts > 1) & alike
    sums = np.add.reduceat(begin, starts)
    last = (starts + counts - 1)[complete]
    late = (begin[last] - begin[last - 1]) / 1e9
    waited = (begin[last] * counts[complete] - sums[complete]) / 1e9
    who = rank[last]
    label = np.array([one.label for one in columns.groups])[group[last]]
    return Stragglers(
        compared=int(complete.sum()),
        left_out=int((~complete & (expected[uid[starts]] > 1)).sum()),
        times=np.bincount(who, minlength=size),
        seconds=np.bincount(who, late, size),
        waited=np.bincount(who, waited, size),
        by_use=_by_use(label, np.array(columns.operations)[operation[last]], who, late),
        worst=tuple(
            Late(
                str(label[i]),
                columns.operations[operation[last[i]]],
                int(sequence[last[i]]),
                int(who[i]),
                float(late[i]),
                float(waited[i]),
                columns.sites[joined("site")[order[last[i]]]],
            )
            for i in _largest(late, count)
        ),
    )


def _by_use(label: Array, operation: Array, who: Array, late: Array) -> list[tuple[str, str, int, float, int, float]]:
    found = []
    for one in np.unique(label):
        for name in np.unique(operation[label == one]):
            at = (label == one) & (operation == name)
            by_rank = np.bincount(who[at], late[at])
            worst = int(by_rank.argmax())
            found.append((str(one), str(name), int(at.sum()), float(late[at].sum()), worst, float(by_rank[worst])))
    return sorted(found, key=lambda use: -use[3])


def _largest(values: Array, count: int) -> Array:
    """Return where the largest values are, the largest first."""
    if len(values) > count:
        at = np.argpartition(values, len(values) - count)[len(values) - count :]
    else:
        at = np.arange(len(values))
    return at[np.argsort(-values[at], kind="stable")]


@attrs.frozen
class Span:
    """From the first begin to the latest time of any call, in ns since 1970."""

    begin: int
    end: int


def span_of(columns: Columns) -> Span:
    """Return the time that the records cover; of no calls an empty one."""
    some = [one for one in columns.ranks if len(one)]
    if not some:
        return Span(0, 0)
    return Span(min(int(one.begin.min()) for one in some), max(int(max(one.begin.max(), one.end.max())) for one in some))


def busy(columns: Columns, places: Places, span: Span, bins: int) -> tuple[Array, Array]:
    """Return the edges of equal intervals of time, in ns since the begin, and for each place the part of each that its ranks are in calls.

    A rank that is in two calls at once, on two threads, counts twice. Calls that are under way last until the end of the span; rows of
    places without a record are not a number.
    """
    edges = np.linspace(0, max(span.end - span.begin, 1), bins + 1)
    total, ranks = np.zeros((len(places.names), bins)), np.zeros(len(places.names))
    for one in columns.ranks:
        place = places.of[one.rank]
        ranks[place] += 1
        # Time in calls up to an edge: of those that have begun, less of those that have ended.
        end = np.where(one.end == 0, span.end, one.end) - span.begin
        total[place] += np.diff(_since(one.begin - span.begin, edges) - _since(end, edges))
    with np.errstate(invalid="ignore"):
        return edges, total / (edges[1] - edges[0]) / ranks[:, None]


def _since(moments: Array, edges: Array) -> Array:
    """Return for each edge the sum of the time since those moments that come before it."""
    moments = np.sort(moments).astype(float)
    before = np.searchsorted(moments, edges)
    since: Array = before * edges - np.append(0.0, np.cumsum(moments))[before]
    return since


def longest(columns: Columns, span: Span, count: int) -> list[tuple[int, Array]]:
    """Return where the longest calls of each rank are: (index in `Columns.ranks`, places in its columns); about `count` in all.

    Half of them are shared evenly by the ranks, so that each has some; the others are the longest of all.
    """
    taken = [np.where(one.end == 0, span.end, one.end) - one.begin for one in columns.ranks]
    if sum(map(len, taken)) <= count:
        return [(i, np.arange(len(times))) for i, times in enumerate(taken)]
    each = count // 2 // len(taken)
    own = [_largest(times, each) if each else np.zeros(0, np.int64) for times in taken]
    # Of one rank no more than all can be among the longest of all.
    best = [_largest(times, count // 2) for times in taken]
    values = np.concatenate([times[at] for times, at in zip(taken, best, strict=True)])
    index = np.repeat(np.arange(len(taken)), [len(at) for at in best])
    where = np.concatenate(best)
    top = _largest(values, count // 2)
    return [(i, np.unique(np.append(at, where[top][index[top] == i]))) for i, at in enumerate(own)]
