"""Reads the records of ranks (`commgraph.shm.recorder` has the layout)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import attrs

from commgraph.shm import recorder as layout

__all__ = ["STATES", "Call", "Group", "RankRecord", "calls_of", "open_numbers", "parse", "read_file", "read_process", "recorded_processes"]

STATES: Final = MappingProxyType({layout.OPEN: "under way", layout.DONE: "done", layout.FAILED: "failed"})
_LINK: Final = f"/memfd:{layout.NAME}"


@attrs.frozen
class Group:
    """A group of a record.

    Attributes:
        context: name of its context; empty for groups of a world.
        name: as the layout calls it.
        uid: equal on its ranks; coordinators that share communicators share it.
        runs: its ranks as [first, last, step], in group order.
        rank_in_group: of the rank whose record it is.
    """

    context: str
    name: str
    uid: str
    runs: tuple[tuple[int, int, int], ...]
    rank_in_group: int

    @property
    def label(self) -> str:
        """``target/tp``."""
        return f"{self.context}/{self.name}" if self.context else self.name

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks, in group order."""
        return tuple(rank for first, last, step in self.runs for rank in range(first, last + 1, step))

    def rank_of(self, index: int) -> int:
        """Return the global rank of a rank in the group."""
        for first, last, step in self.runs:
            count = (last - first) // step + 1
            if index < count:
                return first + index * step
            index -= count
        raise IndexError(index)

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return sum((last - first) // step + 1 for first, last, step in self.runs)


@attrs.frozen
class Call:
    """One call of one rank.

    Attributes:
        number: of the entry: the order in which the rank's calls began.
        state: `OPEN`, `DONE` or `FAILED` of `commgraph.shm.recorder`.
        begin, end: CLOCK_MONOTONIC of the rank's host in ns; end 0 where it is under way.
        group: on which.
        operation: name of the method.
        strategy: that served it; empty where that is not known.
        sequence: of a collective its number in the group; of a message how many of its family, direction, peer and tag came before.
        kind: `COLLECTIVE`, `OUTGOING`, `INCOMING` or `EXCHANGE`.
        family: of messages: 1 tensors, 2 objects, 3 dicts.
        peer: rank in the group: the other side of a message, the root of a collective, -1 for none.
        tag: of a message.
        dtype, shape: of its first tensor; empty for none.
        tensors: how many it was given.
        nbytes: of what this rank gave to it, of a receive what came.
        reduction: name of the op; empty for none.
        site: ``file:line in function`` of the caller.
        thread: identity of the thread in its process.
    """

    number: int
    state: int
    begin: int
    end: int
    group: Group
    operation: str
    strategy: str
    sequence: int
    kind: int
    family: int
    peer: int
    tag: int
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    nbytes: int
    reduction: str
    site: str
    thread: int

    @property
    def is_open(self) -> bool:
        """Whether it had not ended when the record was read."""
        return self.state == layout.OPEN

    @property
    def what(self) -> str:
        """``tp all_reduce #118``, ``pp recv #41 from rank 2``."""
        if self.kind in (layout.OUTGOING, layout.INCOMING):
            who = "any rank" if self.peer < 0 else f"rank {self.group.rank_of(self.peer)}"
            tag = f" tag {self.tag}" if self.tag else ""
            return f"{self.group.label} {self.operation} #{self.sequence}{tag} {'to' if self.kind == layout.OUTGOING else 'from'} {who}"
        return f"{self.group.label} {self.operation} #{self.sequence}"


@attrs.frozen
class RankRecord:
    """The record of one rank.

    Attributes:
        facts: of the rank: world, rank, world_size, node, host, pid, ...
        entries: as they are in memory, in no order.
        texts: by number; groups as `Group`.
        capacity: how many calls the ring holds.
        begun: how many entries were begun, cancelled ones included.
        dropped: calls for which there was no room.
        to_real: added to a time of an entry gives ns since 1970 by rank 0's clock.
        clock_error: of that between hosts, in ns; -1 where the clocks were not compared.
        source: where it was read.
    """

    facts: Mapping[str, Any]
    entries: bytes | bytearray = attrs.field(repr=False)
    texts: Sequence[Any] = attrs.field(repr=False)
    capacity: int
    begun: int
    dropped: int
    to_real: int
    clock_error: int
    source: str

    @property
    def rank(self) -> int:
        """Rank in its world."""
        return int(self.facts["rank"])

    @property
    def world(self) -> str:
        """Name of its world."""
        return str(self.facts["world"])

    @property
    def groups(self) -> list[Group]:
        """The groups that it names."""
        return [text for text in self.texts if isinstance(text, Group)]


def parse(data: bytes | bytearray, source: str) -> RankRecord:
    """Read a record.

    Raises:
        ValueError: it is none, or is of another version, or was cut off.
    """
    if len(data) < layout.HEADER.size or data[: len(layout.MAGIC)] != layout.MAGIC:
        raise ValueError(f"{source} is no record of calls")
    _, version, entry, capacity, texts_at, texts_size, entries_at, used, begun, dropped, mono, real, offset, error = (
        layout.HEADER.unpack_from(data)
    )
    if version != layout.VERSION or entry != layout.ENTRY.size:
        raise ValueError(f"{source} is a record of version {version}, this commgraph reads version {layout.VERSION}")
    if entries_at + capacity * entry > len(data) or used > texts_size:
        raise ValueError(f"{source} is cut off: {len(data)} bytes of {entries_at + capacity * entry}")
    texts: list[Any] = []
    facts: Mapping[str, Any] = {}
    at, end = texts_at, texts_at + used
    while at < end:
        head = int.from_bytes(data[at : at + 4], "little")
        kind, size = head >> 24, head & 0xFFFFFF
        text: Any = data[at + 4 : at + 4 + size].decode(errors="replace")
        at += 4 + size
        if kind == layout.GROUP:
            said = json.loads(text)
            text = Group(said["context"], said["name"], said["uid"], tuple(map(tuple, said["ranks"])), said["rank_in_group"])
        elif kind == layout.FACTS:
            facts = json.loads(text)
        texts.append(text)
    if "rank" not in facts:
        raise ValueError(f"{source} does not say whose record it is: its process ended while it was made")
    entries = data[entries_at : entries_at + capacity * entry]
    return RankRecord(facts, entries, texts, capacity, begun, dropped, real - mono + offset, error, source)


def open_numbers(record: RankRecord) -> set[int]:
    """Return the numbers of the calls that had not ended."""
    return {state >> 3 for state in _states(record) if state & 7 == layout.OPEN}


def _states(record: RankRecord) -> list[int]:
    return memoryview(record.entries).cast("Q")[:: layout.ENTRY.size // 8].tolist()


def calls_of(record: RankRecord, latest: int | None = None) -> Iterator[Call]:
    """Return the calls of a record in the order in which they began; `latest`: so many at most, and all that have not ended."""
    order = sorted([(state, at) for at, state in enumerate(_states(record)) if state])
    if latest is not None and len(order) > latest:
        order = [one for one in order[:-latest] if one[0] & 7 == layout.OPEN] + order[-latest:]
    found = [layout.ENTRY.unpack_from(record.entries, at * layout.ENTRY.size) for _, at in order]
    texts = record.texts
    for (
        state,
        begin,
        end,
        sequence,
        nbytes,
        thread,
        site,
        group,
        operation,
        strategy,
        tensors,
        peer,
        tag,
        dtype,
        ndim,
        kind,
        *rest,
    ) in found:
        *shape, reduction, family = rest
        if not isinstance(texts[group], Group):
            continue  # an entry that was being written
        yield Call(
            number=state >> 3,
            state=state & 7,
            begin=begin,
            end=end,
            group=texts[group],
            operation=texts[operation],
            strategy=texts[strategy],
            sequence=sequence,
            kind=kind,
            family=family,
            peer=peer,
            tag=tag,
            dtype=texts[dtype],
            shape=tuple(shape[: min(ndim, 6)]),
            tensors=tensors,
            nbytes=nbytes,
            reduction=texts[reduction],
            site=texts[site],
            thread=thread,
        )


def read_file(path: Path) -> RankRecord:
    """Read the record in a file, of a job that runs or has ended.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    return parse(_copied(path), str(path))


def _copied(path: Path) -> bytearray:
    """Return the bytes of a record, to which calls may be added meanwhile: texts are read last, so that those of each entry are there."""
    with path.open("rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        file.readinto(data)
        if len(data) >= layout.HEADER.size:
            entries_at = layout.HEADER.unpack_from(data)[6]
            file.seek(0)
            file.readinto(memoryview(data)[:entries_at])
    return data


def read_process(pid: int) -> list[RankRecord]:
    """Read the records that a process has in memory: of its own ranks, and of neighbours, which may have ended.

    Raises:
        OSError: there is no such process, or it is another user's.
    """
    found: dict[tuple[str, int], RankRecord] = {}
    folder = Path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str((folder / name).readlink())
            if target.startswith(_LINK) or target.endswith(layout.SUFFIX):
                with contextlib.suppress(ValueError):  # just being made
                    record = parse(_copied(folder / name), f"{folder / name}")
                    found[record.world, record.rank] = record
    for path in _mapped_files(pid):
        with contextlib.suppress(OSError, ValueError):
            record = read_file(path)
            found.setdefault((record.world, record.rank), record)
    return list(found.values())


def recorded_processes() -> Iterable[int]:
    """Return the processes of this user on this host that have records in memory."""
    for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{entry}").st_uid == os.geteuid() and (_mapped_files(entry) or _has_memory(entry)):
                yield entry


def _has_memory(pid: int) -> bool:
    return any(str(Path(f"/proc/{pid}/fd/{name}").readlink()).startswith(_LINK) for name in os.listdir(f"/proc/{pid}/fd"))


def _mapped_files(pid: int) -> list[Path]:
    """Return the files of records that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sorted({Path(line.split(maxsplit=5)[5]) for line in lines if line.endswith(layout.SUFFIX)})
