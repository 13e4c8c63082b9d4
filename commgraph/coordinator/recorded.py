"""The record of the calls of one group, where calls are recorded (`commgraph.shm.recorder`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar

from commgraph import compat
from commgraph.coordinator.spans import context_of, spanned
from commgraph.errors import CollectiveTimeoutError, ConcurrentCallError
from commgraph.shm import recorder as records
from commgraph.shm.recorder import CANCELLED, COLLECTIVE, FAILED, Recorder, bytes_of

__all__ = ["DICTS", "OBJECTS", "TENSORS", "Entry", "GroupRecorder", "Message", "entry", "observed", "recorded"]

P = ParamSpec("P")
T = TypeVar("T")

TENSORS, OBJECTS, DICTS = 1, 2, 3
"""Families of messages, each of which is numbered for itself."""

# Of a method of objects: self, group, operation, object, root, timeout.
_ARGUMENTS_WITH_ROOT: Final = 6

Message = tuple[int, int, int]
"""Family, `OUTGOING` or `INCOMING`, and tag."""


class GroupRecorder:
    """Records the calls of the coordinators on one `GroupState`."""

    def __init__(self, recorder: Recorder, uid: str, ranks: tuple[int, ...], rank_in_group: int) -> None:
        """`uid`, `ranks`, `rank_in_group`: of the group's `Members`."""
        self.native = recorder.native
        # Ends an entry that is open, by the result of its call: done(token, moved=None).
        self.done: Callable[..., None] = recorder.native.done
        self._recorder = recorder
        self._facts = {"context": context_of(uid), "uid": uid, "ranks": records.runs_of(ranks), "rank_in_group": rank_in_group}
        self._groups: dict[str, int] = {}
        # Coordinators that share communicators share the numbers of their messages.
        self._lanes = recorder.native.text(uid)

    def group(self, name: str) -> int:
        """Return the number of the text about the group, as the coordinator of that name."""
        found = self._groups.get(name)
        if found is None:
            found = self._groups[name] = self._recorder.note(records.GROUP, {"name": name, **self._facts})
        return found

    def begin(
        self,
        name: str,
        operation: str,
        sequence: int,
        moved: Any = None,
        *,
        strategy: str | None = None,
        peer: int = -1,
        message: Message | None = None,
        reduction: str | None = None,
        outer: bool = False,
    ) -> int | None:
        """Begin an entry.

        Args:
            name: of the coordinator.
            operation: name of its method.
            sequence: number of a collective; messages are numbered here.
            moved: bytes, or the tensors, that the call is given; None where that is not known yet.
            strategy: that serves the call.
            peer: rank in the group: the other side of a message, the root of a collective; -1 none, or not known.
            message: of what kind, where it is one.
            reduction: name of the op.
            outer: further calls of this group on this thread, until it ends, are parts of this one.

        Returns:
            A token; None where the call is a part of another one.
        """
        found = self._groups.get(name)
        group = self.group(name) if found is None else found
        if message is None:
            return self.native.begin(  # type: ignore[no-any-return]  # native/module_recorder.c
                group, self._lanes, operation, strategy, sequence, COLLECTIVE, 0, peer, 0, moved, reduction, outer
            )
        family, direction, tag = message
        token: int | None = self.native.begin(
            group, self._lanes, operation, strategy, 0, direction, family, peer, tag, moved, reduction, outer
        )
        return token

    def fail(self, token: int) -> None:
        """End an entry that is open, by an error; no other one is changed."""
        self.native.end(token, 0, FAILED, None)

    def cancel(self, token: int) -> None:
        """Remove an entry that is open: the call was not made, or another path makes it."""
        self.native.end(token, self._lanes, CANCELLED, None)

    def came_from(self, name: str, src: int) -> None:
        """Say from whom the message came that this thread has received from any rank."""
        self.native.assign(self.group(name), self._lanes, src)

    def number(self, name: str, sequence: int) -> None:
        """Say the number of the collective that is under way on this thread."""
        self.native.number(self.group(name), sequence)

    def add(self, name: str, moved: Any) -> None:
        """Add bytes or tensors to the call that is under way on this thread."""
        self.native.grow(self.group(name), moved)


def entry(
    group: Any, operation: str, *, peer: int = -1, message: Message | None = None, sequence: int = 0, parts: Sequence[Any] | None = None
) -> contextlib.AbstractContextManager[Entry | None]:
    """Return a context manager in which all calls of a group on this thread are one entry; it gives None where nothing is recorded.

    Args:
        group, operation, peer, message, sequence: as for `GroupRecorder.begin`.
        parts: of a record of the mailbox, where they are known before the call.
    """
    recorder: GroupRecorder | None = group._state.recorder
    if recorder is None or group.world_size == 1:
        return contextlib.nullcontext()
    moved = None if parts is None else bytes_of(parts)
    return Entry(group, recorder, recorder.begin(group.name, operation, sequence, moved, peer=peer, message=message, outer=True))


class Entry:
    """Context manager of one entry."""

    __slots__ = ("group", "moved", "recorder", "token")

    def __init__(self, group: Any, recorder: GroupRecorder, token: int | None) -> None:
        self.group, self.recorder, self.token = group, recorder, token
        self.moved: int | None = None

    def __enter__(self) -> Entry:
        return self

    def came(self, parts: Sequence[Any]) -> None:
        """Say of what parts the record of the mailbox is that has come."""
        self.moved = bytes_of(parts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.token is None:
            if self.moved is not None:
                self.recorder.add(self.group.name, self.moved)
        elif error is None:
            self.recorder.done(self.token, self.moved)
        else:
            _end_with(self.recorder, self.token, self.group, error)


def recorded(method: Callable[P, T]) -> Callable[P, T]:
    """Make one entry of each call of a method whose arguments are self, a group, the name of the operation, an object, and a timeout.

    Where there is one more, before the timeout, it is the root.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        group: Any = args[1]
        state = group._state
        recorder: GroupRecorder | None = state.recorder
        if recorder is None:
            return method(*args, **kwargs)
        operation: Any = args[2]
        root: Any = args[4] if len(args) == _ARGUMENTS_WITH_ROOT else -1
        if type(root) is not int or not 0 <= root < group.world_size:
            root = -1  # which is refused
        token = recorder.begin(group.name, operation, state.sequence, peer=root, outer=True)
        try:
            result = method(*args, **kwargs)
        except BaseException as error:
            if token is not None:
                _end_with(recorder, token, group, error)
            raise
        if token is not None:
            recorder.done(token)
        return result

    return run


def observed(method: Callable[P, T]) -> Callable[P, T]:
    """Make an entry and a span of each call of a method, as `recorded` and `spanned` do."""
    watched = spanned(recorded(method))

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        group: Any = args[1]
        if group._state.recorder is None and not compat.is_profiling():
            return method(*args, **kwargs)
        return watched(*args, **kwargs)

    return run


def _end_with(recorder: GroupRecorder, token: int, group: Any, error: BaseException) -> None:
    """End an entry by an error; remove it where nothing has come yet, or nothing was sent, so that the call can be made again."""
    if isinstance(error, CollectiveTimeoutError | ConcurrentCallError) and group._state.failures.broken is None:
        recorder.cancel(token)
    else:
        recorder.fail(token)
