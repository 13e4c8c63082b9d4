"""Calls of many ranks as columns of numbers: some 50 bytes a call, and no object of Python for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from commgraph.shm.recorder import DONE, ENTRY, FAILED, OPEN
from commgraph.trace.read import Group, RankRecord

__all__ = ["Columns", "RankColumns", "columns_of", "entry_type"]

Array = npt.NDArray[Any]


def entry_type() -> np.dtype[Any]:
    """Return `ENTRY` of `commgraph.shm.recorder` as a dtype, of the fields that are read here."""
    fields = {
        "state": ("<u8", 0),
        "begin": ("<i8", 8),
        "end": ("<i8", 16),
        "sequence": ("<i8", 24),
        "nbytes": ("<i8", 32),
        "site": ("<u4", 48),
        "group": ("<u2", 52),
        "operation": ("<u2", 54),
        "peer": ("<i4", 60),
        "kind": ("u1", 71),
    }
    return np.dtype(
        {
            "names": list(fields),
            "formats": [form for form, _ in fields.values()],
            "offsets": [at for _, at in fields.values()],
            "itemsize": ENTRY.size,
        }
    )


@attrs.frozen(eq=False)
class RankColumns:
    """The calls of one rank, in the order in which they began.

    Attributes:
        rank: in its world.
        facts: of its record.
        lost: calls that the ring has overwritten, or for which there was no room.
        clock_error: of times between hosts, in ns; -1 where the clocks were not compared.
        group, operation, site: numbers in `Columns.groups`, `Columns.operations`, `Columns.sites`.
        state, kind: as in `Call`.
        peer: as in `Call`: a rank in the group.
        sequence, nbytes: as in `Call`.
        begin, end: ns since 1970 by rank 0's clock; end 0 where the call is under way.
    """

    rank: int
    facts: Mapping[str, Any]
    lost: int
    clock_error: int
    group: Array
    operation: Array
    site: Array
    state: Array
    kind: Array
    peer: Array
    sequence: Array
    nbytes: Array
    begin: Array
    end: Array

    def __len__(self) -> int:
        return len(self.begin)


@attrs.frozen(eq=False)
class Columns:
    """The calls of the ranks of one world.

    Attributes:
        ranks: by rank, of those whose records were given.
        groups: that their calls are on; ranks of one group share the entry (whose `rank_in_group` is that of any of them).
        operations: names.
        sites: ``file:line in function``.
        world_size: ranks of the world, with a record or without.
    """

    ranks: tuple[RankColumns, ...]
    groups: tuple[Group, ...]
    operations: tuple[str, ...]
    sites: tuple[str, ...]
    world_size: int

    @property
    def missing(self) -> list[int]:
        """Ranks without a record."""
        have = {one.rank for one in self.ranks}
        return [rank for rank in range(self.world_size) if rank not in have]


def columns_of(records: Iterable[RankRecord]) -> Columns:
    """Read the calls of records, one record after the other: an iterator of records needs memory for one.

    Raises:
        ValueError: there is none, they are of more than one world, or two are of one rank.
    """
    groups: dict[tuple[Any, ...], int] = {}
    found: list[Group] = []
    operations: dict[str, int] = {}
    sites: dict[str, int] = {}
    ranks: dict[int, RankColumns] = {}
    worlds: dict[str, int] = {}

    def number_of(group: Group) -> int:
        key = (group.context, group.name, group.uid, group.runs)
        if key not in groups:
            groups[key] = len(found)
            found.append(group)
        return groups[key]

    for record in records:
        worlds[record.world] = int(record.facts["world_size"])
        if len(worlds) > 1:
            names = ", ".join(sorted(world[:12] for world in worlds))
            raise ValueError(f"the records are of {len(worlds)} worlds ({names}), whose ranks have equal numbers: give those of one")
        if record.rank in ranks:
            raise ValueError(f"{record.source} is a second record of rank {record.rank}: give one of each rank")

        is_group = np.array([isinstance(text, Group) for text in record.texts], bool)
        entries = np.frombuffer(record.entries, entry_type())
        state = (entries["state"] & 7).astype(np.uint8)
        kept = np.isin(state, (OPEN, DONE, FAILED))
        # An entry that is just being written names no group.
        kept &= (entries["group"] < len(is_group)) & np.append(is_group, False)[np.minimum(entries["group"], len(is_group))]
        at = np.flatnonzero(kept)
        at = at[np.argsort(entries["state"][at], kind="stable")]
        rows = entries[at]
        end = rows["end"].copy()
        end[end != 0] += record.to_real
        ranks[record.rank] = RankColumns(
            rank=record.rank,
            facts=record.facts,
            lost=max(record.begun - record.capacity, 0) + record.dropped,
            clock_error=record.clock_error,
            group=_renumbered(rows["group"], lambda text, texts=record.texts: number_of(texts[text])),
            operation=_renumbered(rows["operation"], lambda text, texts=record.texts: operations.setdefault(texts[text], len(operations))),
            site=_renumbered(rows["site"], lambda text, texts=record.texts: sites.setdefault(texts[text], len(sites))),
            state=state[at],
            kind=rows["kind"].copy(),
            peer=rows["peer"].copy(),
            sequence=rows["sequence"].copy(),
            nbytes=rows["nbytes"].copy(),
            begin=rows["begin"] + record.to_real,
            end=end,
        )
    if not ranks:
        raise ValueError("there is no record of a rank")
    return Columns(tuple(ranks[rank] for rank in sorted(ranks)), tuple(found), tuple(operations), tuple(sites), next(iter(worlds.values())))


def _renumbered(texts: Array, number_of: Any) -> Array:
    """Return the numbers of texts of one record as numbers that all records share."""
    known, inverse = np.unique(texts, return_inverse=True)
    return np.array([number_of(int(text)) for text in known], np.int32)[inverse]
