"""Which groups of a layout leave their host, and what is usually a mistake in that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.checks import size_of
from commgraph.layout.layout import Layout
from commgraph.layout.patterns import Chosen, Pattern, Strided, strided

__all__ = ["Crossing", "Hosts", "crossing", "warnings"]

# Groups that communicate in every layer of a model, and what they exchange there.
_EVERY_LAYER: Final = (
    ("tp", "two all-reduces of the activations"),
    ("pcp", "the keys and values of a long prompt"),
    ("dcp", "the partial results of attention"),
)
_EXPERTS: Final = "ep"


@attrs.frozen
class Hosts:
    """The hosts of a world: ranks are numbered host by host, as launchers number them, and all hosts have as many.

    Attributes:
        world_size: number of ranks.
        count: number of hosts.
    """

    world_size: int
    count: int

    @classmethod
    def of(cls, world_size: int, nodes: int) -> Hosts:
        """Return `nodes` hosts of equal size.

        Raises:
            LayoutError: the ranks cannot be divided among so many hosts.
        """
        problems: list[str] = []
        count = size_of("nodes", nodes, problems)
        if count is not None and world_size % count:
            problems.append(f"world_size={world_size} is not a multiple of nodes={count}: all hosts have as many ranks")
        if problems or count is None:
            raise LayoutError("; ".join(problems))
        return cls(world_size, count)

    @property
    def size(self) -> int:
        """Ranks on a host."""
        return self.world_size // self.count

    def of_rank(self, rank: int) -> int:
        """Return the number of the host that a rank is on."""
        return rank // self.size


@attrs.frozen
class Crossing:
    """How the groups of one name lie on the hosts. Groups of one rank are not counted.

    Attributes:
        within: groups whose ranks share a host.
        across: groups that have ranks on several hosts.
        first: the first rank of the first group that crosses hosts; None if none does.
        cut: the first rank of the first group that crosses hosts and has only a part of the ranks of one of them; None if none has.
    """

    within: int
    across: int
    first: int | None
    cut: int | None


def crossing(pattern: Pattern, hosts: Hosts) -> Crossing:
    """Count the groups of `pattern` that cross hosts, exactly.

    The groups of a regular pattern repeat with the period of the pattern, and hosts repeat, too: one common period is looked at.
    """
    size = hosts.size
    whole, times = pattern, 1
    if isinstance(pattern, Strided | Chosen):
        regular = pattern if isinstance(pattern, Strided) else pattern.of
        span = _span(pattern)
        period = math.lcm(size, max((count * stride for count, stride in regular.digits), default=1))
        if span >= size:
            shared = pattern.count - pattern.alone
            first = next(pattern.shared(), None)
            return Crossing(0, shared, first, _cut([] if first is None else [pattern.ranks(first)], size))
        # Every group counts as many ranks, so what the first period holds, the others hold, too.
        times = hosts.world_size // period
        inner = strided(period, regular.digits)
        whole = inner if isinstance(pattern, Strided) else Chosen(period, inner, pattern.offsets)
        outside = [first for first, low in _lowest(whole) if low // size != (low + span) // size]
    else:
        outside = [first for first in pattern.shared() if len({rank // size for rank in pattern.ranks(first)}) > 1]
    shared = whole.count - whole.alone
    cut = _cut((pattern.ranks(first) for first in outside), size)
    return Crossing((shared - len(outside)) * times, len(outside) * times, outside[0] if outside else None, cut)


def _span(pattern: Strided | Chosen) -> int:
    """How far the highest rank of each group lies behind its lowest."""
    if isinstance(pattern, Chosen):
        return max(pattern.offsets) - min(pattern.offsets)
    return sum((size - 1) * stride for size, stride in pattern.digits)


def _lowest(pattern: Strided | Chosen) -> Iterator[tuple[int, int]]:
    """The first and the lowest rank of each group of several ranks."""
    shift = min(pattern.offsets) - pattern.offsets[0] if isinstance(pattern, Chosen) else 0
    return ((first, first + shift) for first in pattern.shared())


def _cut(groups: Iterable[tuple[int, ...]], size: int) -> int | None:
    return next((ranks[0] for ranks in groups if min(Counter(rank // size for rank in ranks).values()) < size), None)


def warnings(layout: Layout, hosts: Hosts) -> tuple[str, ...]:
    """Say what is usually a mistake in how a layout lies on hosts.

    Two things are: a group that communicates in every layer (``tp``, ``pcp``, ``dcp``) crosses hosts, and ``ep`` crosses hosts without
    consisting of whole ones. Both may be meant, e.g. where a fabric joins the hosts.

    Args:
        layout: which ranks form which groups.
        hosts: where they are.

    Returns:
        A sentence or two for each, with the numbers and the nearest sizes that avoid it.
    """
    said = []
    for name, what in _EVERY_LAYER:
        if name not in layout.names:
            continue
        pattern = layout.pattern(name)
        found = crossing(pattern, hosts)
        if found.first is not None:
            best = max((size for size in range(1, hosts.size + 1) if hosts.size % size == 0 and pattern.size % size == 0), default=1)
            spread = len({hosts.of_rank(rank) for rank in pattern.ranks(found.first)})
            groups = f"{_number(found.across, 'group')} of {found.within + found.across:,}"
            said.append(
                f"{name} crosses hosts: {groups}, e.g. that of rank {found.first}, which is on {spread} hosts. "
                f"Each layer exchanges {what} over it, now on the network. With {hosts.size} ranks on a host, {name}={best} stays inside."
            )
    if _EXPERTS in layout.names:
        pattern = layout.pattern(_EXPERTS)
        found = crossing(pattern, hosts)
        if found.cut is not None:
            ranks = pattern.ranks(found.cut)
            inside, host = min((count, host) for host, count in Counter(map(hosts.of_rank, ranks)).items())
            said.append(
                f"{_EXPERTS} cuts hosts: the group of rank {found.cut} has {inside} of the {hosts.size} ranks of host {host}, and the "
                f"other {len(ranks) - inside} elsewhere. A group inside a host, or of whole hosts, needs fewer messages over the network."
            )
    return tuple(said)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
