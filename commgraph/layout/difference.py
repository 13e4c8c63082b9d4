"""What differs between two layouts of one world."""

from __future__ import annotations

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.layout import Layout
from commgraph.layout.patterns import Pattern, Strided

__all__ = ["Change", "difference"]


@attrs.frozen
class Change:
    """How the groups of one name differ between two layouts, `before` and `after`.

    Attributes:
        name: of the groups.
        before, after: the group of `rank` in each layout, its first ranks where it is long; None where the layout has no such name.
        sizes: ranks in a group, of each layout; 0 where it has no such name.
        counts: groups of each layout; 0 likewise.
        changed: ranks whose group is another one, or has another order; the world where one layout has no such name; 0 if nothing differs.
        rank: the first rank whose group differs; 0 if none does.
    """

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    sizes: tuple[int, int]
    counts: tuple[int, int]
    changed: int
    rank: int

    @property
    def mirrored(self) -> Change:
        """The change from the second layout to the first."""
        return attrs.evolve(self, before=self.after, after=self.before, sizes=self.sizes[::-1], counts=self.counts[::-1])


def difference(before: Layout, after: Layout, *, shown: int = 8) -> tuple[Change, ...]:
    """Compare two layouts, name by name.

    Args:
        before, after: layouts of equal world size.
        shown: ranks of a group that a `Change` keeps.

    Returns:
        A change for each name of either layout, in the order of `before` and then of `after`; ``changed`` is 0 for equal groups.
        Exchanging the layouts mirrors each change.

    Raises:
        LayoutError: the world sizes differ.
    """
    if before.world_size != after.world_size:
        raise LayoutError(f"layouts of {before.world_size} and {after.world_size} ranks are not compared: no rank corresponds to another")
    return tuple(_change(name, before, after, shown) for name in dict.fromkeys((*before.names, *after.names)))


def _change(name: str, before: Layout, after: Layout, shown: int) -> Change:
    patterns = [layout.pattern(name) if name in layout.names else None for layout in (before, after)]
    sizes = tuple(0 if pattern is None else pattern.size for pattern in patterns)
    counts = tuple(0 if pattern is None else pattern.count for pattern in patterns)
    one, other = patterns
    changed, rank = before.world_size, 0
    if one is not None and other is not None:
        changed, rank = _changed(one, other)
    heads = [None if pattern is None else pattern.head(rank, shown) for pattern in patterns]
    return Change(name, heads[0], heads[1], (sizes[0], sizes[1]), (counts[0], counts[1]), changed, rank)


def _changed(one: Pattern, other: Pattern) -> tuple[int, int]:
    """How many ranks have different groups, and the first of them."""
    if one == other:
        return 0, 0
    if isinstance(one, Strided) and isinstance(other, Strided):
        return one.world_size, 0  # equal groups of one rank would make the digits equal, and digits are canonical
    changed: set[int] = set()
    for pattern, counterpart in ((one, other), (other, one)):
        for first in pattern.shared():
            ranks = pattern.ranks(first)
            # Were the other group of one rank of it the same, it would be that of every rank of it.
            if counterpart.head(first, len(ranks) + 1) != ranks:
                changed.update(ranks)
    return len(changed), min(changed, default=0)
