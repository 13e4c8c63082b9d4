"""Whether the ranks of a group can reach each other's device memory: shown by moving data, not asked of the driver.

Drivers have claimed access that then hung or gave wrong bytes. So each rank has a child process go through the very path that the strategy
will take (allocate, map, write, barrier, read, reduce) while it waits with a deadline itself. A child that hangs is ended, whatever it says
is heard by all ranks, and all come to one verdict.
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

__all__ = ["MARK", "Proof", "Proofs", "Word", "command_of", "prove"]

# A child prints its word on a line that begins like this; whatever else libraries print there is not it.
MARK = "commgraph peers: "


class Word(msgspec.Struct, frozen=True):
    """What a rank found out.

    Attributes:
        problem: why it cannot reach the others; empty where it can.
        multicast: whether it can send to all others in one instruction.
        gigabytes: read from the slowest peer in a second, in 10^9 bytes.
    """

    problem: str = ""
    multicast: bool = False
    gigabytes: float = 0.0


@attrs.frozen
class Proof:
    """The verdict of all ranks.

    Attributes:
        problem: why not, of the first rank that had one; empty where every rank reached every other.
        multicast: whether every rank can send to all others in one instruction.
        gigabytes: of the slowest pair.
    """

    problem: str
    multicast: bool
    gigabytes: float


class Proofs:
    """What was shown among the ranks of one world: a group within a group that was shown to be connected needs no children of its own."""

    def __init__(self) -> None:
        self._known: dict[frozenset[int], Proof] = {}

    def find(self, ranks: Sequence[int]) -> Proof | None:
        """What is known of these ranks; each of them knows the same, as all took part in finding it out."""
        wanted = frozenset(ranks)
        return next((proof for known, proof in self._known.items() if known == wanted or (wanted < known and not proof.problem)), None)

    def add(self, ranks: Sequence[int], proof: Proof) -> None:
        """Notes what was found."""
        self._known[frozenset(ranks)] = proof


def prove(
    tell: Callable[[bytes], list[bytes]],
    command: Callable[[int], Sequence[str]],
    ranks: Sequence[int],
    rank_in_group: int,
    *,
    seconds: float,
) -> Proof:
    """Has children of the ranks reach for each other. Collective.

    Args:
        tell: tells the ranks each other's bytes.
        command: of a port on this host where the children meet: the command line of this rank's.
        ranks: global ranks in group order.
        rank_in_group: this rank's place.
        seconds: deadline of a child.
    """
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))
        if rank_in_group == 0
        else None
    )
    (port, *_) = [int(said) for said in tell(b"0" if store is None else str(store.port).encode())]
    mine = _ask(command(port), seconds)
    words = [msgspec.json.decode(said, type=Word) for said in tell(msgspec.json.encode(mine))]
    del store
    return Proof(
        next((f"rank {rank}: {word.problem}" for rank, word in zip(ranks, words, strict=True) if word.problem), ""),
        all(word.multicast for word in words),
        min(word.gigabytes for word in words),
    )


def _ask(command: Sequence[str], seconds: float) -> Word:
    """What the child says, or what became of it."""
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
    return Word(f"its trial of the peers' memory {how}: {lines[-1][:300] if lines else 'it said nothing'}")


def command_of(rank_in_group: int, world_size: int, device: int) -> Callable[[int], Sequence[str]]:
    """The command line of the real child, by the port where the children meet."""
    module = f"{__package__}.trial"
    return lambda port: [sys.executable, "-m", module, *map(str, (port, rank_in_group, world_size, device))]
