"""The exceptions of commgraph.

::

    CommGraphError
      ConfigurationError (ValueError)     what was asked for cannot be
        LayoutError                       sizes, names or ranks of a layout
        LaunchError                       who this process is, or where its peers meet
      BuildError (RuntimeError)           a collective build ended, on every rank
        LayoutMismatchError               ranks disagree about what is to be built, or sizes differ from expected ones
        BackendUnavailableError           nothing here can serve the group
      CollectiveError (RuntimeError)      an operation of a group ended
        CollectiveTimeoutError (TimeoutError)   the deadline passed
        CollectiveMismatchError           ranks called different things
        PeerLostError                     a rank of the group is gone
        ConcurrentCallError               another call of the group is under way; nothing was sent
        UnsupportedTensorError (TypeError)      this tensor cannot be served; nothing was sent
      ContextClosedError (RuntimeError)   the context, world or coordinator was closed

Every class is also an attribute of ``commgraph``. ``CollectiveError`` and its subclasses carry the facts of their message as attributes.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackendUnavailableError",
    "BuildError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "CommGraphError",
    "ConcurrentCallError",
    "ConfigurationError",
    "ContextClosedError",
    "LaunchError",
    "LayoutError",
    "LayoutMismatchError",
    "PeerLostError",
    "UnsupportedTensorError",
]


class CommGraphError(Exception):
    """Base of everything that commgraph raises on purpose, misuse of a single argument (``ValueError``, ``TypeError``) apart."""


class ConfigurationError(CommGraphError, ValueError):
    """Arguments or settings that cannot be served; nothing was begun."""


class LayoutError(ConfigurationError):
    """Sizes that do not factor, an unknown group or axis name, a rank out of range."""


class LaunchError(ConfigurationError):
    """The environment does not say who this process is, or where its peers meet."""


class BuildError(CommGraphError, RuntimeError):
    """A world or a context could not be built. Raised on every rank; nothing was left half made."""


class LayoutMismatchError(BuildError):
    """Ranks disagree about what is to be built, or a layout differs from the sizes that the caller expects."""


class BackendUnavailableError(BuildError):
    """No strategy of this platform can serve the group here."""


class CollectiveError(CommGraphError, RuntimeError):
    """An operation of a group ended without a result.

    Attributes:
        group: name of the group, e.g. ``"tp"``.
        operation: the method that was called, e.g. ``"all_reduce"``.
        rank: global rank that the error is about: for `PeerLostError` the lost one (None where it cannot be told), otherwise the
            rank that raised.
        sequence: how many operations this rank had begun on the group before this one.
    """

    def __init__(
        self,
        message: str,
        *,
        group: str | None = None,
        operation: str | None = None,
        rank: int | None = None,
        sequence: int | None = None,
    ) -> None:
        super().__init__(message)
        self.group = group
        self.operation = operation
        self.rank = rank
        self.sequence = sequence

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException rebuilds from args alone, which would lose the facts when an error crosses a process boundary.
        return (_rebuild, (type(self), self.args[0], self.group, self.operation, self.rank, self.sequence))


def _rebuild(
    cls: type[CollectiveError],
    message: str,
    group: str | None,
    operation: str | None,
    rank: int | None,
    sequence: int | None,
) -> CollectiveError:
    return cls(message, group=group, operation=operation, rank=rank, sequence=sequence)


class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """The deadline of an operation passed before its peers had done their part."""


class CollectiveMismatchError(CollectiveError):
    """The ranks of a group called different operations, or the same with arguments that do not fit together."""


class PeerLostError(CollectiveError):
    """A rank of the group died or dropped its connection."""


class ConcurrentCallError(CollectiveError):
    """Another call of the group (or of the side of a queue) is under way, on another thread or around this one.

    Nothing was sent and nothing counted: the call under way goes on, and the group is unharmed. "Around this one": a signal handler, a
    ``__del__`` or the ``__reduce__`` of an object called in while a call of the same thread was under way.
    """


class UnsupportedTensorError(CollectiveError, TypeError):
    """A tensor that this operation cannot take (dtype, shape, device, dim); raised before anything is sent."""


class ContextClosedError(CommGraphError, RuntimeError):
    """The context, world or coordinator was closed before this call."""
