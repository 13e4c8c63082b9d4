"""Platforms and strategies of other packages, found by the entry points of their metadata."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, distribution, distributions
from typing import Any, Self

import attrs

from commgraph.accelerators.platforms import CudaPlatform, RocmPlatform, TpuPlatform, XpuPlatform
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.network import strategy_over
from commgraph.communicators.transport import Transport
from commgraph.errors import ConfigurationError
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import CpuPlatform

__all__ = ["PLATFORMS", "STRATEGIES", "Plugins", "detect"]

PLATFORMS = "commgraph.platforms"
STRATEGIES = "commgraph.communicators"


def detect() -> Platform:
    """`Platform.detect`."""
    for point in _points(PLATFORMS):
        found = _load(point)
        if not (isinstance(found, type) and issubclass(found, Platform)):
            raise ConfigurationError(f"entry point {point.name!r} of {PLATFORMS} is {point.value}, which is no commgraph.Platform class")
        if found.available():
            return found()
    return next(kind for kind in (CudaPlatform, RocmPlatform, XpuPlatform, TpuPlatform, CpuPlatform) if kind.available())()


@attrs.frozen
class Plugins:
    """The strategies that other packages bring, in the order of their names. Found once per context, as every search reads all metadata.

    An entry point of the group ``commgraph.communicators`` is a callable ``(facts, host) -> Communicator | Refused``, for example a class
    method of the strategy: `commgraph.platforms.GroupFacts`, and a strategy that serves the group's host tensors.
    """

    points: Sequence[EntryPoint] = ()

    @classmethod
    def find(cls) -> Self:
        """Return the entry points that are installed; nothing is loaded yet."""
        return cls(_points(STRATEGIES))

    def describe(self) -> str:
        """Return names and versions, which have to be equal on every rank."""
        return ", ".join(f"{point.name}={point.value} ({_package(point)})" for point in self.points)

    def strategies(self, facts: GroupFacts, transport: Transport) -> list[Communicator | Refused]:
        """Return their strategies for a group. Collective over it."""
        made = []
        for point in self.points:
            one = _load(point)(facts, strategy_over(transport))
            if not isinstance(one, Communicator | Refused):
                raise ConfigurationError(
                    f"entry point {point.name!r} of {STRATEGIES} gave a {type(one).__name__}, no Communicator and no Refused"
                )
            made.append(one)
        return made


def _points(group: str) -> Sequence[EntryPoint]:
    """Return the entry points of a group, as `importlib.metadata.entry_points` does, which takes apart those of all packages: 4 ms."""
    found: list[EntryPoint] = []
    for one in distributions():
        text = one.read_text("entry_points.txt")
        # Of a package that is installed twice the first counts.
        if text and f"[{group}]" in text and distribution(one.name).read_text("entry_points.txt") == text:
            found += one.entry_points.select(group=group)
    return sorted(set(found), key=lambda point: (point.name, point.value))


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise ConfigurationError(
            f"entry point {point.name!r} of {point.group}, {point.value} of {_package(point)}, cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
