"""Asynchronous operations: `Work`, whose result is waited for, and the lanes that run them.

An operation begun without waiting is run by the blocking call itself, on a thread of its lane, in the order in which it was begun. The
bytes on the wire are the same as if the caller had waited, and a rank may wait where its peer does not.
"""

from __future__ import annotations

import copy
import numbers
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import attrs
import torch

from commgraph.deadline import Timeout
from commgraph.errors import CollectiveTimeoutError, CommGraphError, ConcurrentCallError, ContextClosedError
from commgraph.waiting import End

__all__ = ["ANY", "AnySource", "Finished", "Job", "Lane", "LaneThread", "Recv", "Send", "Work"]

T = TypeVar("T")

# Seconds after which a thread without jobs ends: the next job of a pipeline comes sooner, and an idle group has no thread.
_LINGERING = 0.5


@attrs.frozen(repr=False)
class AnySource:
    """The type of `ANY`."""

    def __repr__(self) -> str:
        return "commgraph.ANY"


ANY: Final = AnySource()
"""As `src` of a receive, the rank of the group that has sent first."""


@attrs.frozen(eq=False)
class Send:
    """One message of a `batch`.

    Attributes:
        x: any shape; not to be changed until the batch has ended.
        dst: rank in the group, by default the next one; the rank itself is one, too.
        tag: as for `GroupCoordinator.send`.
    """

    x: torch.Tensor
    dst: int | None = None
    tag: int = 0


@attrs.frozen(eq=False)
class Recv:
    """One message of a `batch`.

    Attributes:
        out: filled; of the shape and dtype of what is sent.
        src: rank in the group, by default the previous one; the rank itself is one, too.
        tag: that of the message.
    """

    out: torch.Tensor
    src: int | None = None
    tag: int = 0


class Job:
    """A call queued on a lane."""

    def __init__(self, run: Callable[[], Any], at: str, has_arrived: Callable[[], bool] | None = None) -> None:
        """Not run.

        Args:
            run: called once, on the lane's thread or the one that waits.
            at: call site.
            has_arrived: whether `run` would wait for no peer. Given where this rank has sent all that its peers need: no thread has to run
                the job, the caller of `Work.wait` does. None: the lane's thread runs it at once.
        """
        self._run: Callable[[], Any] | None = run
        self._inference = torch.is_inference_mode_enabled()
        self.at = at
        self.has_arrived = has_arrived
        self.lane: Lane | None = None
        self.ended = End()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run it without autograd and in the inference mode of the thread that submitted it; never raises."""
        assert self._run is not None
        thread: Any = threading.current_thread()
        thread.commgraph_site = self.at
        try:
            if torch.is_inference_mode_enabled() != self._inference:
                with torch.inference_mode(self._inference), torch.no_grad():
                    self.result = self._run()
            else:
                with torch.no_grad():
                    self.result = self._run()
        except CommGraphError as error:
            # The error needs no traceback, whose frames would keep the call's tensors for as long as the error is kept.
            self.error = error.with_traceback(None)
            error.__context__ = None
        except BaseException as error:
            self.error = error
        finally:
            thread.commgraph_site = None
            self._run = None
            self.ended.set()


class Described(Protocol):
    """A call that can name its operation, group and rank."""

    @property
    def where(self) -> str:
        """Operation, group and rank as the begin of an error message."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Keyword arguments of a `CollectiveError` about it."""


class HasEnd(Protocol):
    """Work on a device whose end can be polled, or waited for by a stream."""

    @property
    def has_ended(self) -> bool:
        """Whether the device has come to the end."""

    def join(self) -> None:
        """Orders the current stream after the end."""


class Work(Generic[T]):
    """An asynchronous operation, whose result `wait` returns.

    Tensors that it reads or fills are kept until it has ended; until then they must not be changed, or read if they are filled. Dropping it
    does not end it: messages are sent and received all the same. Any one thread may wait.
    """

    def __init__(
        self,
        call: Described,
        jobs: Sequence[Job],
        finish: Callable[[Sequence[Any]], T],
        enqueued: Sequence[HasEnd] = (),
    ) -> None:
        """Not for users: made by the operations of a coordinator.

        Args:
            call: names the operation, its group and rank.
            jobs: of the operation.
            finish: makes the result from the jobs' results, in `wait`.
            enqueued: work of the operation on a device.
        """
        self._call = call
        self._jobs = tuple(jobs)
        self._enqueued = tuple(enqueued)
        self._finish: Callable[[Sequence[Any]], T] | None = finish
        self._result: Any = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def is_completed(self) -> bool:
        """Whether it has ended, with an error or without: `wait` would wait for no peer and no device."""
        self._ensure_own()
        for job in self._jobs:
            if job.has_arrived is not None and job.lane is not None and not job.ended.is_set() and job.has_arrived():
                job.lane.run_here(job)
        return all(job.ended.is_set() for job in self._jobs) and all(part.has_ended for part in self._enqueued)

    def wait(self, timeout: Timeout = None) -> T:
        """Waits for the end, and returns the result; every call returns the same one.

        With tensors of a device the current stream waits, and the host only until everything was enqueued.

        Args:
            timeout: a timedelta or seconds; None: as long as the operation's own deadline lets it go on.

        Raises:
            CollectiveTimeoutError: `timeout` passed; the operation goes on and may be waited for again.
            ConcurrentCallError: waited for within a call that it has to follow, in a signal handler: it would never end.
            CommGraphError, ValueError, TypeError: the error of the operation.
            ContextClosedError: this is a forked child of the process that began it, and it had not ended.
        """
        seconds = None if timeout is None else _seconds(timeout, self._call.where)
        deadline = None if seconds is None else time.monotonic() + seconds
        self._ensure_own()
        for job in self._jobs:
            if not job.ended.is_set() and job.lane is not None:
                if deadline is None and job.lane.run_here(job):
                    continue
                if job.lane.is_here and not job.ended.is_set():
                    raise ConcurrentCallError(
                        f"{self._call.where}: waited for within a call of its lane, which has to end first (a signal handler, __del__). "
                        "It goes on: wait again",
                        **self._call.facts,
                    )
                if job.has_arrived is not None:
                    job.lane.start()
            if not job.ended.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                raise CollectiveTimeoutError(
                    f"{self._call.where}: not at its end after {seconds:g} s. It goes on: wait again", **self._call.facts
                )
        with self._lock:
            if self._finish is not None:
                self._end()
            else:
                for part in self._enqueued:
                    part.join()  # this may be another stream than that of the wait before
            error = self._error
        if error is not None:
            raise copy.copy(error) if isinstance(error, CommGraphError) else error
        return self._result  # type: ignore[no-any-return]  # what `finish` gave

    def _ensure_own(self) -> None:
        for job in self._jobs:
            if job.lane is not None and job.lane.inherited is not None and not job.ended.is_set():
                raise ContextClosedError(f"{self._call.where}: {job.lane.inherited}")

    def _end(self) -> None:
        finish, self._finish = self._finish, None
        assert finish is not None
        self._error = next((job.error for job in self._jobs if job.error is not None), None)
        if self._error is None:
            try:
                self._result = finish([job.result for job in self._jobs])
            except BaseException as error:
                self._error = error
        self._jobs = ()

    def __repr__(self) -> str:
        try:
            state = "ended" if self.is_completed() else "under way"
        except ContextClosedError:
            state = "begun by the parent of this process"
        return f"<Work: {self._call.where}, {state}>"


class Finished(Work[T]):
    """Work that has ended already, as where torch traces; simple enough to be made in traced code."""

    def __init__(self, result: T) -> None:
        self._result = result

    def is_completed(self) -> bool:
        """True."""
        return True

    def wait(self, timeout: Timeout = None) -> T:
        """The result."""
        return self._result  # type: ignore[no-any-return]  # what it was made of

    def __repr__(self) -> str:
        return "<Work: ended>"


def _seconds(timeout: Any, where: str) -> float:
    seconds: Any = timeout.total_seconds() if hasattr(timeout, "total_seconds") else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | numbers.Real) or not 0 <= float(seconds) <= threading.TIMEOUT_MAX:
        raise ValueError(f"wait of {where}: timeout={timeout!r} is neither a datetime.timedelta nor seconds")
    return float(seconds)


class LaneThread(threading.Thread):
    """Runs the jobs of one lane."""


class Lane:
    """A queue of jobs, run one after the other on a thread that ends when there are none."""

    def __init__(self, name: str, pause: Callable[[bool], None] | None = None) -> None:
        """Without a thread as yet.

        Args:
            name: of its threads.
            pause: called with True when the lane gets its first job, with False when it has none left.
        """
        self._name = name
        self._pause = pause
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._open = 0  # jobs that have not ended
        self._closed = False
        self._thread: LaneThread | None = None
        # Ident of the thread that runs a job: that of the lane, or one that waits for it.
        self._maker: int | None = None
        # In a forked child, which does not have the thread: why no job of this lane can be waited for.
        self.inherited: str | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no job is pending."""
        return not self._open

    @property
    def is_here(self) -> bool:
        """Whether the caller is a job of this lane."""
        return self._maker == threading.get_ident()

    def submit(self, job: Job) -> None:
        """Append a job: it runs after all that were submitted before."""
        with self._changed:
            if self._pause is not None and self.is_idle:
                self._pause(True)
            job.lane = self
            self._jobs.append(job)
            self._open += 1
            if job.has_arrived is None:
                self._start()

    def start(self) -> None:
        """Have the thread run the jobs that nobody runs."""
        with self._changed:
            if self._jobs:
                self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = LaneThread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        else:
            self._changed.notify_all()

    def run_here(self, job: Job) -> bool:
        """Run a job on the thread that waits for it, if it is the next one and not begun yet: without a change of threads.

        Returns:
            Whether it was run.
        """
        with self._changed:
            if self._maker is not None or not self._jobs or self._jobs[0] is not job:
                return False
            self._jobs.popleft()
            self._maker = threading.get_ident()
            if self._open == 1 and self._pause is not None:
                self._pause(False)  # no job is before this one, so it may be a native call
        job.run()
        self._done()
        return True

    def _done(self) -> None:
        with self._changed:
            self._maker = None
            self._open -= 1
            if not self._open and self._pause is not None:
                self._pause(False)
            if not self._open or self._jobs:
                self._changed.notify_all()

    @property
    def has_gone(self) -> bool:
        """Whether the lane has neither a job nor a thread."""
        return not self._open and self._thread is None

    def wait_idle(self, seconds: float) -> bool:
        """Wait until every job has ended; False if that takes longer than `seconds`."""
        with self._changed:
            job = self._jobs[0] if self._jobs else None
        if job is not None and not (job.has_arrived is not None and job.has_arrived() and self.run_here(job)):
            self.start()
        with self._changed:
            return self._changed.wait_for(lambda: self.is_idle, seconds)

    def join(self, seconds: float) -> None:
        """Wait for the thread, after the group was closed: its jobs end with an error."""
        with self._changed:
            self._closed = True
            if self._jobs:
                self._start()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._maker is None and (bool(self._jobs) or self._closed), _LINGERING)
                if self._maker is not None:
                    continue  # a thread that waits for a job is still making it
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
                self._maker = threading.get_ident()
            job.run()
            # Only its Work keeps the job: its tensors are freed with that, and not when the next job comes.
            del job
            self._done()
