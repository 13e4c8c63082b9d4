"""Probe whether the ranks of a group can access each other's device memory, by moving data and not by asking the driver.

Drivers have claimed access that then hung or gave wrong bytes. Each rank therefore has a child process take the path that the strategy
will take (allocate, map, write, barrier, read, reduce) while it waits with a deadline itself. A child that hangs is killed. The
results of all children are exchanged, so that all ranks come to one verdict.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta

import attrs
import msgspec
import torch.distributed as dist

__all__ = ["MARK", "PeerAccess", "PeerAccessCache", "Word", "command_of", "probe_peer_access"]

# Begin of the line on which a child prints its `Word`; libraries may print other lines.
MARK = "commgraph peers: "


class Word(msgspec.Struct, frozen=True):
    """One rank's result of the test.

    Attributes:
        problem: why it cannot access the others' memory; empty where it can.
        multicast: whether it can send to all others in one instruction.
        gigabytes: read from the slowest peer in a second, in 10^9 bytes.
    """

    problem: str = ""
    multicast: bool = False
    gigabytes: float = 0.0


@attrs.frozen
class PeerAccess:
    """The verdict of all ranks.

    Attributes:
        problem: that of the first rank that has one; empty where every rank can access the memory of every other.
        multicast: whether every rank can send to all others in one instruction.
        gigabytes: of the slowest pair.
    """

    problem: str
    multicast: bool
    gigabytes: float


class PeerAccessCache:
    """Results among the ranks of one world, by set of ranks. A subset of a set whose test succeeded needs no test of its own."""

    def __init__(self) -> None:
        self._known: dict[frozenset[int], PeerAccess] = {}

    def find(self, ranks: Sequence[int]) -> PeerAccess | None:
        """Return the result for these ranks, None if they were not tested; alike on each of them, as all took part in the test."""
        wanted = frozenset(ranks)
        return next((access for known, access in self._known.items() if known == wanted or (wanted < known and not access.problem)), None)

    def add(self, ranks: Sequence[int], access: PeerAccess) -> None:
        """Add the result for a set of ranks."""
        self._known[frozenset(ranks)] = access


def probe_peer_access(
    exchange: Callable[[bytes], list[bytes]],
    command: Callable[[int], Sequence[str]],
    ranks: Sequence[int],
    rank_in_group: int,
    *,
    seconds: float,
) -> PeerAccess:
    """Test in one child process per rank whether the ranks can access each other's memory. Collective.

    Args:
        exchange: sends a rank's bytes to all ranks and returns those of all in rank order.
        command: from a port of this host, where the children meet, to the command line of this rank's child.
        ranks: global ranks in group order.
        rank_in_group: this rank.
        seconds: deadline of a child.
    """
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))
        if rank_in_group == 0
        else None
    )
    (port, *_) = [int(said) for said in exchange(b"0" if store is None else str(store.port).encode())]
    mine = _ask(command(port), seconds)
    words = [msgspec.json.decode(said, type=Word) for said in exchange(msgspec.json.encode(mine))]
    del store
    return PeerAccess(
        next((f"rank {rank}: {word.problem}" for rank, word in zip(ranks, words, strict=True) if word.problem), ""),
        all(word.multicast for word in words),
        min(word.gigabytes for word in words),
    )


def _ask(command: Sequence[str], seconds: float) -> Word:
    """Run the child and return its result, or a `Word` with the problem that it ended in."""
    with tempfile.TemporaryFile() as printed:
        # A session of its own: what it started is ended with it.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return Word(f"moving data to its peers did not end within {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        printed.seek(0)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    said = next((line.removeprefix(MARK) for line in lines if line.startswith(MARK)), None)
    if code == 0 and said is not None:
        return msgspec.json.decode(said, type=Word)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return Word(f"its probe of the peers' memory {how}: {lines[-1][:300] if lines else 'it said nothing'}")


def command_of(rank_in_group: int, world_size: int, device: int) -> Callable[[int], Sequence[str]]:
    """Return a function from the port where the children meet to the command line of a child (`probe.main`)."""
    module = f"{__package__}.probe"
    return lambda port: [sys.executable, "-m", module, *map(str, (port, rank_in_group, world_size, device))]
