"""Rules that put every rank of a world into one group.

A *digit* is a pair ``(size, stride)``: ``rank // stride % size`` is one digit of the rank in a mixed-radix number system. Every regular
group is "all ranks that differ in these digits only", so the group of a rank is found from the rank alone, without a table of the world:

    >>> Strided(8, ((2, 4), (2, 1))).ranks(3)      # slowest digit first
    (2, 3, 6, 7)

Patterns are canonical: digits of size 1 are dropped and neighbours that count on are merged, so that equal groups have equal patterns.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from itertools import chain

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.checks import some, whole

__all__ = ["Chosen", "Digit", "Listed", "Part", "Pattern", "Strided", "chosen", "cut", "listed", "part", "strided"]

Digit = tuple[int, int]


@attrs.frozen
class Pattern(abc.ABC):
    """One rule; it puts each rank of the world into exactly one group."""

    world_size: int

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Ranks in a group; in the largest one where groups differ."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many groups there are."""

    @property
    @abc.abstractmethod
    def alone(self) -> int:
        """Number of ranks whose group is a group of one."""

    @abc.abstractmethod
    def ranks(self, rank: int) -> tuple[int, ...]:
        """The group of `rank`, in group order."""

    @abc.abstractmethod
    def firsts(self) -> Iterator[int]:
        """The first rank of every group, ascending."""

    @abc.abstractmethod
    def shared(self) -> Iterator[int]:
        """The first rank of every group of more than one rank, ascending."""

    @abc.abstractmethod
    def content(self) -> list[object]:
        """Return the parameters of the pattern, in values that JSON can write; part of a layout's digest."""

    def head(self, rank: int, limit: int) -> tuple[int, ...]:
        """The first `limit` ranks of the group of `rank`."""
        return self.ranks(rank)[:limit]


@attrs.frozen
class Strided(Pattern):
    """All ranks that differ in `digits` only. Make one with `strided`, which puts the digits in canonical form."""

    digits: tuple[Digit, ...]

    @property
    def size(self) -> int:
        return math.prod(size for size, _ in self.digits)

    @property
    def count(self) -> int:
        return self.world_size // self.size

    @property
    def alone(self) -> int:
        return 0 if self.digits else self.world_size

    def ranks(self, rank: int) -> tuple[int, ...]:
        ranks = [rank - self.offset(rank)]
        for size, stride in self.digits:
            ranks = [r + i * stride for r in ranks for i in range(size)]
        return tuple(ranks)

    def firsts(self) -> Iterator[int]:
        # The firsts are the ranks whose digits of this pattern are all 0: the digits that the pattern leaves out count through them.
        left_out, reach = [], 1
        for size, stride in sorted(self.digits, key=lambda digit: digit[1]):
            left_out.append((stride // reach, reach))
            reach = size * stride
        left_out.append((self.world_size // reach, reach))
        others = strided(self.world_size, left_out[::-1])
        return (others.member(0, index) for index in range(self.count))

    def shared(self) -> Iterator[int]:
        return self.firsts() if self.digits else iter(())

    def content(self) -> list[object]:
        return ["strided", self.digits]

    def head(self, rank: int, limit: int) -> tuple[int, ...]:
        first = rank - self.offset(rank)
        return tuple(self.member(first, index) for index in range(min(limit, self.size)))

    def offset(self, rank: int) -> int:
        """How far `rank` lies behind the first rank of its group."""
        return sum(rank // stride % size * stride for size, stride in self.digits)

    def member(self, first: int, index: int) -> int:
        """The rank at `index` in the group that begins with `first`."""
        for size, stride in reversed(self.digits):
            index, position = divmod(index, size)
            first += position * stride
        return first


@attrs.frozen
class Chosen(Pattern):
    """Of each group of `of`, the ranks at `offsets` behind its first one; every other rank is alone. Make one with `chosen`."""

    of: Strided
    offsets: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.offsets)

    @property
    def count(self) -> int:
        return self.of.count + self.alone

    @property
    def alone(self) -> int:
        return self.of.count * (self.of.size - len(self.offsets))

    def ranks(self, rank: int) -> tuple[int, ...]:
        offset = self.of.offset(rank)
        if offset not in self.offsets:
            return (rank,)
        return tuple(rank - offset + other for other in self.offsets)

    def firsts(self) -> Iterator[int]:
        followers = frozenset(self.offsets[1:])
        return (rank for rank in range(self.world_size) if self.of.offset(rank) not in followers)

    def shared(self) -> Iterator[int]:
        return (first + self.offsets[0] for first in self.of.firsts())

    def content(self) -> list[object]:
        return ["chosen", self.of.digits, self.offsets]


@attrs.frozen
class Listed(Pattern):
    """Groups that follow no rule, ordered by first rank; a rank in none of them is alone. Make one with `listed`.

    Attributes:
        lists: the groups of more than one rank.
    """

    lists: tuple[tuple[int, ...], ...]
    # The index into `lists` of each rank in one of them: proportional to the ranks listed, never to the world.
    _group_of: dict[int, int] = attrs.field(eq=False, repr=False)

    @property
    def size(self) -> int:
        return max(map(len, self.lists))

    @property
    def count(self) -> int:
        return len(self.lists) + self.alone

    @property
    def alone(self) -> int:
        return self.world_size - len(self._group_of)

    def ranks(self, rank: int) -> tuple[int, ...]:
        index = self._group_of.get(rank)
        return (rank,) if index is None else self.lists[index]

    def firsts(self) -> Iterator[int]:
        return (rank for rank in range(self.world_size) if self.ranks(rank)[0] == rank)

    def shared(self) -> Iterator[int]:
        return (ranks[0] for ranks in self.lists)

    def content(self) -> list[object]:
        return ["listed", self.lists]


@attrs.frozen
class Part(Pattern):
    """The groups of `of`, a pattern over fewer ranks, moved up by `first`; a rank outside is alone. Make one with `part`."""

    first: int
    of: Pattern

    @property
    def size(self) -> int:
        return self.of.size

    @property
    def count(self) -> int:
        return self.of.count + self.world_size - self.of.world_size

    @property
    def alone(self) -> int:
        return self.of.alone + self.world_size - self.of.world_size

    def ranks(self, rank: int) -> tuple[int, ...]:
        inner = rank - self.first
        if not 0 <= inner < self.of.world_size:
            return (rank,)
        return tuple(self.first + other for other in self.of.ranks(inner))

    def firsts(self) -> Iterator[int]:
        end = self.first + self.of.world_size
        return chain(range(self.first), (self.first + rank for rank in self.of.firsts()), range(end, self.world_size))

    def shared(self) -> Iterator[int]:
        return (self.first + rank for rank in self.of.shared())

    def content(self) -> list[object]:
        return ["part", self.first, self.of.world_size, *self.of.content()]

    def head(self, rank: int, limit: int) -> tuple[int, ...]:
        inner = rank - self.first
        if not 0 <= inner < self.of.world_size:
            return (rank,)[:limit]
        return tuple(self.first + other for other in self.of.head(inner, limit))


def strided(world_size: int, digits: Sequence[Digit]) -> Strided:
    """The pattern of `digits`, slowest first, in canonical form."""
    canonical: list[Digit] = []
    for size, stride in digits:
        if size == 1:
            continue
        if canonical and canonical[-1][1] == size * stride:
            size *= canonical.pop()[0]
        canonical.append((size, stride))
    return Strided(world_size, tuple(canonical))


def cut(digits: Sequence[Digit], size: int) -> tuple[tuple[Digit, ...], tuple[Digit, ...]]:
    """Divides canonical digits into slow ones and fast ones, so that the fast ones count through exactly `size` ranks.

    Raises:
        LayoutError: the boundary falls inside a digit that it does not divide.
    """
    slow, fast = list(digits), list[Digit]()
    while size > 1:
        digit_size, stride = slow.pop()
        if size % digit_size == 0:
            fast.insert(0, (digit_size, stride))
            size //= digit_size
        elif digit_size % size == 0:
            slow.append((digit_size // size, stride * size))
            fast.insert(0, (size, stride))
            size = 1
        else:
            raise LayoutError(f"{size} and {digit_size} (the ranks that lie {stride} apart) do not divide each other")
    return tuple(slow), tuple(fast)


def chosen(world_size: int, digits: Sequence[Digit], positions: Sequence[int]) -> Pattern:
    """The pattern of the ranks at `positions` of each group of `digits`; the simplest one that gives the same groups."""
    counted = strided(world_size, digits)
    offsets = tuple(dict.fromkeys(counted.member(0, position) for position in positions))
    if len(offsets) == 1:
        return strided(world_size, ())
    if len(offsets) == counted.size and (regular := _regular(world_size, offsets)) is not None:
        return regular
    # Offsets say which ranks are meant, whatever order the digits were counted in: keep the digits in the order of the ranks.
    return Chosen(world_size, strided(world_size, sorted(digits, key=lambda digit: -digit[1])), offsets)


def listed(world_size: int, lists: Sequence[Sequence[object]]) -> Pattern:
    """The pattern of explicit rank lists; a rank in none of them is alone. Regular lists give a strided pattern, or a part of one.

    Raises:
        LayoutError: lists every empty group and every repeated or foreign rank.
    """
    group_of: dict[int, int] = {}
    repeated: dict[int, None] = {}
    foreign: list[object] = []
    for index, ranks in enumerate(lists):
        for value in ranks:
            rank = whole(value)
            if rank is None or not 0 <= rank < world_size:
                foreign.append(value)
            elif rank in group_of:
                repeated[rank] = None
            else:
                group_of[rank] = index
    problems = []
    if empty := [index for index, ranks in enumerate(lists) if not len(ranks)]:
        problems.append(f"no ranks in group {some(empty)}")
    if repeated:
        problems.append(f"more than once: rank {some(list(repeated))}")
    if foreign:
        problems.append(f"not a rank of 0..{world_size - 1}: {some(foreign)}")
    if problems:
        raise LayoutError(f"rank lists hold each of {world_size} ranks at most once, and at least one rank each; " + "; ".join(problems))

    plain: list[list[int]] = [[] for _ in lists]
    for rank, index in group_of.items():  # a dict keeps the order in which the ranks came
        plain[index].append(rank)
    # A list of one rank says nothing that leaving it out would not: equal groups have equal patterns.
    groups = tuple(sorted(tuple(ranks) for ranks in plain if len(ranks) > 1))
    if not groups:
        return strided(world_size, ())
    found = {rank: index for index, ranks in enumerate(groups) for rank in ranks}
    first = min(found)
    if max(found) - first + 1 == len(found):
        regular = _regular(len(found), [rank - first for rank in groups[0]])
        if regular is not None:
            pattern = part(world_size, first, regular)
            if all(pattern.ranks(ranks[0]) == ranks for ranks in groups):
                return pattern
    return Listed(world_size, groups, found)


def part(world_size: int, first: int, of: Pattern) -> Pattern:
    """The pattern that `of` is for the ranks from `first` on, with every other rank of the world alone, in canonical form."""
    if of.world_size == world_size:
        return of
    return Part(world_size, first, of) if of.size > 1 else strided(world_size, ())


def _regular(world_size: int, ranks: Sequence[int]) -> Strided | None:
    """The strided pattern whose first group is `ranks`, if there is one."""
    digits: list[Digit] = []
    firsts = ranks
    while len(firsts) > 1:
        stride = firsts[1]
        size = next((i for i, rank in enumerate(firsts) if rank != i * stride), len(firsts))
        if size < 2:
            return None
        digits.insert(0, (size, stride))
        firsts = firsts[::size]
    reach = 1
    for size, stride in sorted(digits, key=lambda digit: digit[1]):
        if stride % reach:
            return None
        reach = size * stride
    pattern = strided(world_size, digits)
    return pattern if world_size % reach == 0 and pattern.ranks(0) == tuple(ranks) else None
