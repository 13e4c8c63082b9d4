"""torch's `Work` over a call of commgraph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commgraph.work import Work as Begun

__all__ = ["Ended", "Pending", "Recorded"]


class Ended(dist.Work):
    """A blocking call that has returned. Holds nothing, so one object serves all of a group."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def exception(self) -> None:
        """None."""

    def synchronize(self) -> None:
        """Returns at once."""

    def get_future(self) -> Any:
        """A future without a result."""
        future: Any = torch.futures.Future()
        future.set_result([])
        return future


class Recorded:
    """A call whose end completes a future, if somebody asks for one."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Not called yet."""
        self._call: Callable[[], object] | None = call
        self._lock = threading.Lock()
        self._has_ended = False
        self._error: BaseException | None = None
        # Made by `future`, with what it is to be completed with.
        self._future: Any = None
        self._result: list[torch.Tensor] = []

    def __call__(self) -> None:
        """Make the call, once."""
        assert self._call is not None
        try:
            self._call()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._call = None
            with self._lock:
                self._has_ended = True
                future = self._future
            if future is not None:
                self._complete(future)

    def future(self, result: list[torch.Tensor]) -> Any:
        """Return a future that the end of the call completes: with `result`, or with the call's error."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._future, self._result = torch.futures.Future(), result
            has_ended = self._has_ended
        if has_ended:
            self._complete(self._future)
        return self._future

    def _complete(self, future: Any) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            # torch's C++ takes the text of an error, and a future no exception that is none of `Exception`.
            future.set_exception(self._error if isinstance(self._error, Exception) else RuntimeError(repr(self._error)))


class Pending(dist.Work):
    """A call that was begun, and goes on beside its caller."""

    def __init__(
        self,
        begun: Begun[Any],
        tensors: Sequence[torch.Tensor],
        call: Recorded | None = None,
        source: Callable[[Any], int] | None = None,
    ) -> None:
        """Of a call that was begun.

        Args:
            begun: the work of commgraph.
            tensors: that it fills or sends.
            call: what its job runs, or ran; None of a message, which has no future, as over gloo.
            source: takes the result of `begun` and returns the rank in the group that a message came from.
        """
        super().__init__()
        self._begun = begun
        self._tensors = list(tensors)
        self._call = call
        self._source = source

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits for the end.

        Args:
            timeout: after which it raises; zero, as torch has it: that of the group.

        Raises:
            CollectiveTimeoutError: it passed; the operation goes on.
            CommGraphError: the error of the operation.
        """
        self._begun.wait(timeout or None)
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it has ended, with an error or without."""
        return self._begun.is_completed()

    def is_success(self) -> bool:
        """Whether it has ended without an error."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """The error with which it has ended."""
        try:
            if self._begun.is_completed():
                self._begun.wait()
        except Exception as error:
            return error
        return None

    def result(self) -> list[torch.Tensor]:
        """The tensors that it fills or sends."""
        return self._tensors

    def get_future(self) -> Any:
        """A future of the tensors.

        Raises:
            RuntimeError: of a message.
        """
        if self._call is None:
            raise RuntimeError("get_future: a message has none; wait for its work")
        return self._call.future(self._tensors)

    def source_rank(self) -> int:
        """The rank in the group that a message came from, once it is there.

        Raises:
            RuntimeError: it is no receive.
        """
        if self._source is None:
            raise RuntimeError("source_rank: only a receive has a source")
        return self._source(self._begun.wait())

    _source_rank = source_rank
