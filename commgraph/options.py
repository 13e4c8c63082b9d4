"""What a user may turn on the communicators of a context."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import attrs

from commgraph.errors import ConfigurationError

__all__ = ["CommunicatorOptions"]


def _isolate(value: bool | str | Iterable[str]) -> bool | frozenset[str]:
    if isinstance(value, bool):
        return value
    return frozenset((value,)) if isinstance(value, str) else frozenset(value)


def _positive(_: object, attribute: attrs.Attribute[timedelta | None], value: timedelta | None) -> None:
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise ConfigurationError(
            f"CommunicatorOptions({attribute.name}={value!r}): a datetime.timedelta is needed, e.g. timedelta(seconds=60)"
        )
    if value <= timedelta(0):
        raise ConfigurationError(f"CommunicatorOptions({attribute.name}={value!r}): a deadline must lie in the future")


@attrs.frozen(kw_only=True)
class CommunicatorOptions:
    """How the groups of a context communicate. Immutable; compared across ranks before anything is built.

    Give one to `World.context` for all groups, or a mapping from group name to one.

    Attributes:
        timeout: deadline of every operation on tensors of an accelerator; None takes the world's.
        host_timeout: deadline of every operation on host tensors and objects; None takes `timeout`.
        backend: torch backend of the device group (``"gloo"``, ...); None leaves it to the platform.
        check: compare (sequence, operation, shape, dtype) across the group before each collective, so that a skipped, reordered or
            differently shaped call raises `CollectiveMismatchError` on every rank at once. Costs one small message per call and peer.
            Without it such calls still never pair, and end at the deadline.
        isolate: groups that share communicators with none, though their ranks equal another group's: True for every group that
            these options apply to, or the names of some.
    """

    timeout: timedelta | None = attrs.field(default=None, validator=_positive)
    host_timeout: timedelta | None = attrs.field(default=None, validator=_positive)
    backend: str | None = attrs.field(default=None)
    check: bool = attrs.field(default=False)
    isolate: bool | frozenset[str] = attrs.field(default=False, converter=_isolate)

    def isolates(self, name: str) -> bool:
        """Whether the group called `name` must share its communicators with no other."""
        return self.isolate if isinstance(self.isolate, bool) else name in self.isolate

    def describe(self) -> str:
        """The same text on every rank for equal options."""
        isolate = self.isolate if isinstance(self.isolate, bool) else sorted(self.isolate)
        return f"timeout={self.timeout} host_timeout={self.host_timeout} backend={self.backend} check={self.check} isolate={isolate}"
