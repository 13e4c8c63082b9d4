"""Placement of two ranks, measured by the time that a cache line takes between them."""

from __future__ import annotations

from collections.abc import Callable

from commgraph.coordinator import GroupCoordinator
from commgraph.errors import BackendUnavailableError

__all__ = ["PLACEMENTS", "Probe", "connect", "placement"]

PLACEMENTS = ("", "siblings", "one L3", "across L3s")

# Nanoseconds in one direction. A virtual machine's cores move while it runs, which only this time shows.
_SIBLINGS = 45.0
_ONE_L3 = 120.0


class Probe:
    """A cache-line ping-pong between ranks 0 and 1."""

    def __init__(self, ping_pong: Callable[[], float] | None = None) -> None:
        self._ping_pong = ping_pong

    def measure(self) -> float | None:
        """Return the nanoseconds of a cache line in one direction; None where it cannot be measured. Collective over the two."""
        return None if self._ping_pong is None else self._ping_pong()


def connect(group: GroupCoordinator) -> Probe:
    """Connect the probe to its native code, the shared-memory strategy's `ping_pong`.

    Args:
        group: of ranks 0 and 1; on the other ranks of one rank. Nothing is measured there, nor where the group lacks that
            strategy.
    """
    try:
        strategy = group.communicator("shm")
    except BackendUnavailableError:
        return Probe()
    return Probe(getattr(strategy, "ping_pong", None))


def placement(nanoseconds: float | None) -> str:
    """Return the name of the distance that such a time shows; "" without a time."""
    if nanoseconds is None:
        return ""
    return "siblings" if nanoseconds < _SIBLINGS else "one L3" if nanoseconds < _ONE_L3 else "across L3s"
