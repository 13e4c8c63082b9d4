"""Waits that end in C++: they run on another thread while the caller waits in Python, where Ctrl-C is answered and a deadline kept."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Background", "End", "Errand", "interruptible", "wait_for_calls"]

T = TypeVar("T")

# Seconds beyond its deadline after which a store that does not answer is left alone.
_GRACE = 1.0


class End:
    """An event that is set once. Construction and wait take a third of the time of those of `threading.Event`."""

    __slots__ = ("_happened", "_lock")

    def __init__(self) -> None:
        self._happened = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._happened

    def set(self) -> None:
        """Set it."""
        self._happened = True
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False if that takes longer than `seconds`."""
        if self._happened:
            return True
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._lock.release()
        return True


class Background:
    """A wait on a thread of its own, so that a caller's deadline or Ctrl-C leaves it behind without harm."""

    def __init__(self, wait: Callable[[], object], then: Callable[[], None] | None = None) -> None:
        """Begin `wait`; `then` is called, on its thread, once it has ended."""
        self._then = then
        self._error: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(wait,), name="commgraph-wait", daemon=True)
        self._thread.start()

    def _run(self, wait: Callable[[], object]) -> None:
        try:
            wait()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()
            if (then := self._then) is not None:
                self._then = None
                then()

    @property
    def has_ended(self) -> bool:
        """Whether the wait has ended, with an error or without."""
        return self._done.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; whether it has ended. Raises its error."""
        if not self._done.wait(timeout):
            return False
        self._thread.join()
        if self._error is not None:
            raise self._error
        return True

    def join(self, timeout: float) -> None:
        """Waits for the thread after the group was closed."""
        self._thread.join(timeout)


class Errand:
    """A thread that waits in C++ for the main one: signal handlers run on the main thread, and only while that is in Python."""

    def __init__(self) -> None:
        self._errands: queue.SimpleQueue[tuple[Callable[[], Any], list[Any], End] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, act: Callable[[], T]) -> T:
        """Return what `act` returns; called on the thread where the caller is the main one. A signal handler may end the wait for it."""
        if threading.get_ident() != threading.main_thread().ident:
            return act()
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._errands,), name="commgraph-errand", daemon=True)
            self._thread.start()
        came: list[Any] = []
        end = End()
        self._errands.put((act, came, end))
        end.wait()
        result, error = came
        try:
            if error is not None:
                raise error
        finally:
            del error, came  # whose traceback holds this frame
        return result  # type: ignore[no-any-return]  # that of `act`

    def close(self) -> None:
        """End the thread, once it has ended what it waits for."""
        if self._thread is not None:
            self._thread = None
            self._errands.put(None)


def _serve(errands: queue.SimpleQueue[tuple[Callable[[], Any], list[Any], End] | None]) -> None:
    while (errand := errands.get()) is not None:
        act, came, end = errand
        try:
            came += (act(), None)
        except BaseException as error:
            came[:] = None, error
        end.set()
        del errand, act, came, end  # the tensors of the call


def interruptible(act: Callable[[Callable[[], bool]], T], seconds: float) -> T:
    """Return what `act` returns. On the main thread it is called on another one, and left behind at Ctrl-C or when the time is over.

    Args:
        act: given a function that says whether it was left behind.
        seconds: after which it should have ended by itself.

    Raises:
        TimeoutError: it did not end.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return act(lambda: False)
    left: list[bool] = []
    came: list[T] = []
    waiting = Background(lambda: came.append(act(lambda: bool(left))))
    try:
        if not waiting.wait(seconds + _GRACE):
            raise TimeoutError(f"no answer within {seconds:g} s")
        return came[0]
    finally:
        left.append(True)


def wait_for_calls() -> None:
    """At the interpreter's exit: wait until no other thread is in this package, where its calls are just ending with an error.

    A thread that comes back from torch's C++ once Python is gone ends the process by SIGABRT.
    """
    package, own = Path(__file__).parent, threading.get_ident()
    runs_users_code = str(package / "testing")

    def is_inside(frame: FrameType | None) -> bool:
        while frame is not None and not frame.f_code.co_filename.startswith(str(package)):
            frame = frame.f_back
        return frame is not None and not frame.f_code.co_filename.startswith(runs_users_code)

    until = time.monotonic() + _GRACE
    while time.monotonic() < until and any(is_inside(frame) for ident, frame in sys._current_frames().items() if ident != own):
        time.sleep(0.001)
