"""Division of a World by colors: the ranks that give equal ones go together. MPI's Comm_split."""

from __future__ import annotations

from typing import Any

from commgraph.coordinator import GroupCoordinator
from commgraph.errors import LayoutError
from commgraph.layout.checks import whole

__all__ = ["ranks_of_color"]


def ranks_of_color(group: GroupCoordinator, color: Any, key: Any) -> list[int] | None:
    """Return the ranks in `group` that gave this rank's color, ordered by their keys; None for the color None. Collective.

    Args:
        group: over all ranks that may be asked.
        color, key: of this rank, as for `World.split_by`.

    Raises:
        LayoutError: a color or key of another type, on any rank; on every rank.
    """
    mine, order, problems = None, whole(key), list[str]()
    try:
        mine = _plain(color)
    except TypeError as error:
        problems.append(f"color={color!r:.200}: {error}")
    if order is None:
        problems.append(f"key={key!r:.200} is not a whole number")
    # A rank with wrong arguments reports that in the exchange: otherwise the others would wait for it.
    said = group.all_gather_object(("; ".join(problems), mine, order))
    if refused := [f"rank {rank}: {why}" for rank, (why, _, _) in enumerate(said) if why]:
        raise LayoutError(f"split_by on rank {group.rank_in_group} of {group.world_size}: {'; '.join(refused)}")
    if mine is None:
        return None
    return [rank for _, rank in sorted((place, rank) for rank, (_, other, place) in enumerate(said) if other == mine)]


def _plain(color: object) -> object:
    """Return a color as plain data, which is sent between hosts without an authkey.

    Raises:
        TypeError: it is none of the kinds that a color may be.
    """
    if color is None or isinstance(color, bool):
        return color
    if isinstance(color, str):
        return str.__str__(color)  # of an enumeration's member its text, not its name
    if isinstance(color, bytes):
        return bytes(color)
    if isinstance(color, tuple):
        return tuple(map(_plain, color))
    if (number := whole(color)) is None:
        raise TypeError(f"a {type(color).__name__} is no color, which is a whole number, a string, bytes, a tuple of these, or None")
    return number
