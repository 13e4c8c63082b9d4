"""The record of the calls of one group, where calls are recorded (`commgraph.shm.recorder`).

Native calls write their own entries, where they are given the record of their coordinator. Others begin an entry and end it by its token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar

from commgraph import compat
from commgraph.coordinator.spans import context_of, spanned
from commgraph.errors import CollectiveTimeoutError, ConcurrentCallError
from commgraph.shm import recorder as records
from commgraph.shm.recorder import Recorder

__all__ = ["DICTS", "OBJECTS", "TENSORS", "Entry", "GroupRecords", "Message", "entry", "observed", "recorded"]

P = ParamSpec("P")
T = TypeVar("T")

TENSORS, OBJECTS, DICTS = 1, 2, 3
"""Families of messages, each of which is numbered for itself."""

# Of a method of objects: self, group, operation, object, root, timeout.
_ARGUMENTS_WITH_ROOT: Final = 6

Message = tuple[int, int, int]
"""Family, direction (`OUTGOING`, `INCOMING`, `EXCHANGE`) and tag."""


class GroupRecords(dict[str, Any]):
    """The records of the coordinators on one `GroupState`, by their names: native objects (GroupRecord of native/module_recorder.c).

    ``begin(operation, strategy, sequence, message, peer, moved=None, reduction=None, outer=False)`` of one begins an entry:

    - operation, strategy: names; the latter may be None.
    - sequence: number of a collective; messages are numbered natively.
    - message: a `Message`, or None of a collective.
    - peer: rank in the group: the other side of a message, the root of a collective; -1 none, or not known.
    - moved: bytes, or the tensors, that the call is given; None where that is not known yet.
    - reduction: name of the op.
    - outer: further calls of this group on this thread, until it ends, are parts of this one.

    It returns a token for ``done``, ``fail`` and ``cancel``; None where the call is a part of another one.
    """

    def __init__(self, recorder: Recorder, uid: str, ranks: tuple[int, ...], rank_in_group: int) -> None:
        """`uid`, `ranks`, `rank_in_group`: of the group's `Members`."""
        super().__init__()
        self._recorder = recorder
        self._facts = {"context": context_of(uid), "uid": uid, "ranks": records.runs_of(ranks), "rank_in_group": rank_in_group}
        # Coordinators that share communicators share the numbers of their messages.
        self._lanes = recorder.native.text(uid)

    def __missing__(self, name: str) -> Any:
        found = self[name] = self._recorder.native.of(self._recorder.note(records.GROUP, {"name": name, **self._facts}), self._lanes)
        return found

    def text(self, name: str) -> int:
        """Return the number of a text."""
        number: int = self._recorder.native.text(name)
        return number


def entry(
    group: Any, operation: str, *, peer: int = -1, message: Message | None = None, sequence: int = 0, moved: int | None = None
) -> contextlib.AbstractContextManager[Entry | None]:
    """Return a context manager in which all calls of a group on this thread are one entry; it gives None where nothing is recorded.

    `moved`: bytes, where they are known before.
    """
    found: GroupRecords | None = group._state.records
    if found is None or group.world_size == 1:
        return contextlib.nullcontext()
    record = found[group.name]
    return Entry(group, record, record.begin(operation, None, sequence, message, peer, moved, None, True))


class Entry:
    """Context manager of one entry."""

    __slots__ = ("group", "record", "token")

    def __init__(self, group: Any, record: Any, token: int | None) -> None:
        self.group, self.record, self.token = group, record, token

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.token is not None and error is None:
            self.record.done(self.token)
        elif self.token is not None:
            _end_with(self.record, self.token, self.group, error)


def recorded(method: Callable[P, T]) -> Callable[P, T]:
    """Make one entry of each call of a method whose arguments are self, a group, the name of the operation, an object, and a timeout.

    Where there is one more, before the timeout, it is the root.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        group: Any = args[1]
        state = group._state
        records: GroupRecords | None = state.records
        if records is None:
            return method(*args, **kwargs)
        operation: Any = args[2]
        root: Any = args[4] if len(args) == _ARGUMENTS_WITH_ROOT else -1
        if type(root) is not int or not 0 <= root < group.world_size:
            root = -1  # which is refused
        record = records[group.name]
        token = record.begin(operation, None, state.sequence, None, root, None, None, True)
        try:
            result = method(*args, **kwargs)
        except BaseException as error:
            if token is not None:
                _end_with(record, token, group, error)
            raise
        if token is not None:
            record.done(token)
        return result

    return run


def observed(method: Callable[P, T]) -> Callable[P, T]:
    """Make an entry and a span of each call of a method, as `recorded` and `spanned` do."""
    watched = spanned(recorded(method))

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        group: Any = args[1]
        if group._state.records is None and not compat.is_profiling():
            return method(*args, **kwargs)
        return watched(*args, **kwargs)

    return run


def _end_with(record: Any, token: int, group: Any, error: BaseException | None) -> None:
    """End an entry by an error; remove it where nothing has come yet, or nothing was sent, so that the call can be made again."""
    if isinstance(error, CollectiveTimeoutError | ConcurrentCallError) and group._state.failures.broken is None:
        record.cancel(token)
    else:
        record.fail(token)
