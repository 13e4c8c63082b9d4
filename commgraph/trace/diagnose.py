"""Who waits for whom, and what the first divergence is, from the records of some or all ranks of a world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import attrs

from commgraph.coordinator.failures import CLOSE
from commgraph.shm.recorder import COLLECTIVE, INCOMING, OUTGOING
from commgraph.trace.read import Call, RankRecord, calls_of, open_numbers

__all__ = ["Diagnosis", "RankState", "Wait", "diagnose"]

_DONE_BY: Final = MappingProxyType({COLLECTIVE: "called", OUTGOING: "received", INCOMING: "sent"})
# Calls of a rank that are looked at: a rank that is so many calls ahead of another one is in no group with it.
_LATEST: Final = 1 << 14


@attrs.frozen
class RankState:
    """What one rank is doing.

    Attributes:
        rank: in its world.
        record: of it.
        under_way: calls that have not ended, in the order of their begin.
        last: the last one that has ended; None for none.
        process: what its process or thread does, where that is known: ``"is stopped (SIGSTOP)"``, ``"has ended"``, ...; else empty.
        is_moving: its record has grown between two looks.
        now: time of the look by the clock of the record, in ns.
    """

    rank: int
    record: RankRecord
    under_way: tuple[Call, ...]
    last: Call | None
    process: str
    is_moving: bool
    now: int

    def since(self, time_ns: int) -> str:
        """Return how long ago that was, as text."""
        return f"{max(self.now - time_ns, 0) / 1e9:.1f} s"

    @property
    def says(self) -> str:
        """What it does, as the rest of a sentence about it."""
        parts = [f"is in {call.what} since {self.since(call.begin)} ({call.site or 'place unknown'})" for call in self.under_way]
        if not parts:
            if self.last is None:
                parts.append("has made no call yet")
            else:
                parts.append(
                    f"is in no call: it ended {self.last.what} {self.since(self.last.end)} ago ({self.last.site or 'place unknown'})"
                )
        if self.is_moving:
            parts.append("it makes progress")
        if self.process and (not self.under_way or self.process.startswith(("is stopped", "has ended"))):
            parts.append(f"its process {self.process}")
        return "; ".join(parts)


@attrs.frozen
class Wait:
    """A rank that waits in a call for another one.

    Attributes:
        rank: that waits.
        call: in which.
        on: rank that is waited for.
        calls_instead: what that one has called in its place, where it has called something else.
    """

    rank: int
    call: Call
    on: int
    calls_instead: Call | None = None

    @property
    def lacks(self) -> str:
        """What the other rank has not done, as the rest of a sentence about it."""
        if self.calls_instead is not None:
            return f"has called {self.calls_instead.what} ({self.calls_instead.site}) in the place of {self.call.what} ({self.call.site})"
        what = self.call.what.partition(" from ")[0].partition(" to ")[0]
        if self.call.kind == COLLECTIVE:
            return f"has not called {what} ({self.call.site})"
        return f"has not {_DONE_BY[self.call.kind]} what {what} of rank {self.rank} waits for ({self.call.site})"


@attrs.frozen
class Diagnosis:
    """What is known of a world.

    Attributes:
        states: by rank, of the ranks whose records were found.
        waits: who waits for whom.
        unknown: ranks that are waited for, or in a group of a rank that waits, whose records were not found.
        culprits: ranks at which the waits end; of a circle all ranks in it.
        finding: the first divergence as sentences; empty where no rank waits for another one.
    """

    states: Mapping[int, RankState]
    waits: Sequence[Wait]
    unknown: tuple[int, ...]
    culprits: tuple[int, ...]
    finding: str

    @property
    def text(self) -> str:
        """All of it."""
        size = next(iter(self.states.values())).record.facts["world_size"]
        lines = [f"{len(self.states)} of {size} ranks have a record that can be read here"]
        for rank in sorted(self.states):
            state = self.states[rank]
            waited = sorted({wait.on for wait in self.waits if wait.rank == rank})
            on = f"; waits for rank{'s' if len(waited) > 1 else ''} {_listing(waited)}" if waited else ""
            lines.append(f"  rank {rank} (process {state.record.facts['pid']} on {state.record.facts['host']}) {state.says}{on}")
        if self.unknown:
            lines.append(f"  no record was found of rank{'s' if len(self.unknown) > 1 else ''} {_listing(self.unknown)}")
        lines.append("")
        lines.append(self.finding or "No rank waits for another one.")
        return "\n".join(lines)


def diagnose(
    records: Iterable[RankRecord],
    now: Mapping[int, int],
    *,
    processes: Mapping[int, str] = MappingProxyType({}),
    before: Iterable[RankRecord] = (),
) -> Diagnosis:
    """Find who waits for whom in one world.

    Args:
        records: of some or all of its ranks.
        now: time of the look by the clock of each rank's record, in ns.
        processes: what a rank's process does, where that explains a hang.
        before: the records at an earlier look: only calls that were under way then, too, are waits.
    """
    before = list(before)
    earlier = {record.rank: open_numbers(record) for record in before}
    begun = {record.rank: record.begun for record in before}
    states, made = {}, {}
    for record in records:
        calls = list(calls_of(record, _LATEST))
        under_way = tuple([call for call in calls if call.is_open])
        ended = max((call for call in calls if not call.is_open), key=lambda call: call.end, default=None)
        rank = record.rank
        is_moving = begun.get(rank, record.begun) != record.begun
        states[rank] = RankState(rank, record, under_way, ended, processes.get(rank, ""), is_moving, now[rank])
        made[rank] = _Made(calls)
    waits, unknown = [], set()
    for rank, state in states.items():
        for call in state.under_way:
            if rank in earlier and call.number not in earlier[rank]:
                continue
            found, missing = _waits_of(rank, call, made)
            waits += found
            unknown |= missing
    culprits, finding = _first_divergence(states, waits, sorted(unknown))
    return Diagnosis(states, waits, tuple(sorted(unknown)), culprits, finding)


class _Made:
    """The calls of one rank, by what other ranks look for."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.collectives: dict[tuple[str, int], Call] = {}
        self.last: dict[str, int] = {}
        self.messages: dict[tuple[str, int, int, int, int], int] = {}
        for call in calls:
            uid = call.group.uid
            if call.kind == COLLECTIVE:
                self.collectives[uid, call.sequence] = call
                self.last[uid] = max(self.last.get(uid, -1), call.sequence)
            elif call.kind in (OUTGOING, INCOMING) and call.peer >= 0:
                key = (uid, call.kind, call.family, call.group.rank_of(call.peer), call.tag)
                self.messages[key] = max(self.messages.get(key, -1), call.sequence)


def _waits_of(rank: int, call: Call, made: Mapping[int, _Made]) -> tuple[list[Wait], set[int]]:
    """Return for whom a rank waits in a call, and of which ranks that is not known."""
    group = call.group
    if call.kind == COLLECTIVE:
        others = [other for other in group.ranks if other != rank]
        waits = []
        for other in others:
            if other in made:
                theirs = made[other].collectives.get((group.uid, call.sequence))
                if theirs is None and made[other].last.get(group.uid, -1) < call.sequence:
                    waits.append(Wait(rank, call, other))
                elif theirs is not None and theirs.operation != call.operation:
                    waits.append(Wait(rank, call, other, theirs))
        return waits, {other for other in others if other not in made}
    if call.kind not in (OUTGOING, INCOMING):
        return [], set()
    if call.peer < 0:  # from any rank: each that has a record has sent nothing that is left
        others = [other for other in group.ranks if other != rank]
        return [Wait(rank, call, other) for other in others if other in made], {other for other in others if other not in made}
    other = group.rank_of(call.peer)
    if other == rank or other not in made:
        return [], set() if other == rank else {other}
    key = (group.uid, INCOMING if call.kind == OUTGOING else OUTGOING, call.family, rank, call.tag)
    return ([Wait(rank, call, other)] if made[other].messages.get(key, -1) < call.sequence else []), set()


def _first_divergence(states: Mapping[int, RankState], waits: Sequence[Wait], unknown: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Return the ranks at which all waits end, and why, as sentences."""
    if not waits:
        if unknown:
            return (), (
                f"The ranks that wait, wait for ranks without a record here: {_listing(unknown)}. Look on their hosts, or record into a "
                "folder that all hosts share (COMMGRAPH_RECORD=FOLDER) and give it with --record"
            )
        return (), ""
    # A rank that closes has no more calls to make: others may wait for it, and what it waits for is a consequence.
    own = [wait for wait in waits if wait.call.operation != CLOSE]
    waits = own or waits
    waiting = {wait.rank for wait in waits}
    ends = sorted({wait.on for wait in waits if wait.on not in waiting})
    head: list[str] = []
    if not ends:
        circle = sorted({wait.rank for wait in _circle(waits)})
        head = [f"Ranks {_listing(circle)} wait for each other: they make their calls in different orders"]
        # Of a circle most ranks wait for the one that left the common order; where two differ, both are named.
        waiters = {rank: len({wait.rank for wait in waits if wait.on == rank}) for rank in circle}
        ends = [rank for rank in circle if waiters[rank] == max(waiters.values())]
    first = {end: min((wait for wait in waits if wait.on == end), key=lambda wait: wait.call.begin) for end in ends}
    # The one that was waited for first comes first.
    ends.sort(key=lambda end: states[first[end].rank].now - first[end].call.begin, reverse=True)
    return tuple(ends), "\n".join([*head, *(_named(states, waits, first[end]) for end in ends)])


def _named(states: Mapping[int, RankState], waits: Sequence[Wait], first: Wait) -> str:
    """Return sentences about a rank that is waited for: what it lacks, who waits since when, and what it does instead."""
    end = first.on
    lacking: dict[str, list[Wait]] = {}
    for wait in sorted((wait for wait in waits if wait.on == end), key=lambda wait: wait.call.begin):
        lacking.setdefault(wait.lacks, []).append(wait)
    lines = []
    for lack, waiting in lacking.items():
        ranks = sorted({wait.rank for wait in waiting})
        who = f"rank {ranks[0]} waits" if len(ranks) == 1 else f"ranks {_listing(ranks)} wait"
        lines.append(f"Rank {end} {lack}, in which {who} since {states[waiting[0].rank].since(waiting[0].call.begin)}")
    return "\n".join([*lines, f"  rank {end} {states[end].says}"])


def _circle(waits: Sequence[Wait]) -> list[Wait]:
    """Return waits that form a circle; there is one where every rank that is waited for waits."""
    by_rank: dict[int, Wait] = {}
    for wait in sorted(waits, key=lambda wait: wait.call.begin):
        by_rank.setdefault(wait.rank, wait)
    rank, path = next(iter(by_rank)), list[int]()
    while rank not in path:
        path.append(rank)
        rank = by_rank[rank].on
    return [by_rank[one] for one in path[path.index(rank) :]]


def _listing(ranks: Sequence[int]) -> str:
    shown = [str(rank) for rank in ranks[:8]]
    return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
