"""What other packages bring: platforms and strategies, by the entry points of their metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.gloo_transport import GlooTransport
from commgraph.errors import ConfigurationError
from commgraph.platforms.accelerators import CudaPlatform, RocmPlatform, TpuPlatform, XpuPlatform
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import CpuPlatform

__all__ = ["PLATFORMS", "STRATEGIES", "detect", "plugins", "strategies_of_others"]

PLATFORMS = "commgraph.platforms"
STRATEGIES = "commgraph.communicators"


def detect() -> Platform:
    """As `Platform.detect` says."""
    for point in _points(PLATFORMS):
        found = _load(point)
        if not (isinstance(found, type) and issubclass(found, Platform)):
            raise ConfigurationError(f"entry point {point.name!r} of {PLATFORMS} is {point.value}, which is no commgraph.Platform class")
        if found.available():
            return found()
    return next(kind for kind in (CudaPlatform, RocmPlatform, XpuPlatform, TpuPlatform, CpuPlatform) if kind.available())()


def plugins() -> str:
    """What is installed beside commgraph that may serve a group, with versions: to be the same on every rank."""
    found = [(point, point.dist) for point in _points(STRATEGIES)]
    return ", ".join(
        f"{point.name}={point.value} ({'?' if package is None else f'{package.name} {package.version}'})" for point, package in found
    )


def strategies_of_others(facts: GroupFacts, transport: GlooTransport) -> Sequence[Communicator | Refused]:
    """The strategies that other packages bring, in the order of their names; collective over the group.

    An entry point of the group ``commgraph.communicators`` is a callable ``(facts, host) -> Communicator | Refused``, for example a class
    method of the strategy: `commgraph.platforms.GroupFacts`, and a strategy that serves the group's host tensors.
    """
    made = []
    for point in _points(STRATEGIES):
        one = _load(point)(facts, GlooCommunicator(transport))
        if not isinstance(one, Communicator | Refused):
            raise ConfigurationError(
                f"entry point {point.name!r} of {STRATEGIES} gave a {type(one).__name__}, no Communicator and no Refused"
            )
        made.append(one)
    return made


def _points(group: str) -> Iterable[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        package = "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        raise ConfigurationError(
            f"entry point {point.name!r} of {point.group}, {point.value} of {package}, cannot be loaded: {type(error).__name__}: {error}"
        ) from error
