"""Operations that run while their caller goes on: the result to wait for, and the lane in which it comes about.

What is begun and not waited for is made later by the blocking call itself, on a thread of its lane, in the order in which it was begun. So
what goes over the wire is the same as if the caller had waited, and a rank may wait where its peer does not.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import attrs
import torch

from commgraph.errors import CollectiveTimeoutError, CommGraphError

__all__ = ["ANY", "AnySource", "Finished", "Job", "Lane", "LaneThread", "Recv", "Send", "Work"]

T = TypeVar("T")

# Seconds that a thread without jobs stays: the next job of a pipeline comes sooner, and a group that is idle for longer has none.
_LINGERING = 0.5


@attrs.frozen(repr=False)
class AnySource:
    """The type of `ANY`."""

    def __repr__(self) -> str:
        return "commgraph.ANY"


ANY: Final = AnySource()
"""As `src` of a receive: whichever rank of the group has sent first."""


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


class End:
    """An event that happens once. In a third of the time that `threading.Event` takes to be made and waited for."""

    __slots__ = ("_happened", "_lock")

    def __init__(self) -> None:
        self._happened = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._happened

    def set(self) -> None:
        """It happens."""
        self._happened = True
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for it; False where that takes longer than so many seconds."""
        if self._happened:
            return True
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._lock.release()
        return True


class Job:
    """Something to be done on a lane."""

    def __init__(self, run: Callable[[], Any], at: str, has_arrived: Callable[[], bool] | None = None) -> None:
        """Not run.

        Args:
            run: does it.
            at: place in the user's code that asked for it.
            has_arrived: whether `run` would wait for nobody. Given where the peers do not wait for `run`, as this rank has sent all that
                they need: a thread need not run the job, the one that waits for it does. None: it is to be run at once.
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
        """Does it, as the thread that asked for it would have; never raises."""
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
            # It says all there is to say, and its frames would keep what the call held for as long as the error is kept.
            self.error = error.with_traceback(None)
            error.__context__ = None
        except BaseException as error:
            self.error = error
        finally:
            thread.commgraph_site = None
            self._run = None
            self.ended.set()


class Described(Protocol):
    """Something that says who called what."""

    @property
    def where(self) -> str:
        """Names the operation, its group and rank."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a `CollectiveError` about it carries."""


class HasEnd(Protocol):
    """Something that a device comes to the end of."""

    @property
    def has_ended(self) -> bool:
        """Whether it has."""

    def join(self) -> None:
        """Orders the current stream after that."""


class Work(Generic[T]):
    """The result of an operation that goes on while its caller does something else.

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
            jobs: what has to end.
            finish: makes the result from those of the jobs, in `wait`.
            enqueued: what a device has to come to the end of.
        """
        self._call = call
        self._jobs = tuple(jobs)
        self._enqueued = tuple(enqueued)
        self._finish: Callable[[Sequence[Any]], T] | None = finish
        self._result: Any = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def is_completed(self) -> bool:
        """Whether it has ended, well or not: `wait` would not have to wait for a peer's part of it, nor a device."""
        for job in self._jobs:
            if job.has_arrived is not None and job.lane is not None and not job.ended.is_set() and job.has_arrived():
                job.lane.run_here(job)
        return all(job.ended.is_set() for job in self._jobs) and all(part.has_ended for part in self._enqueued)

    def wait(self, timeout: Any = None) -> T:
        """Waits for the end, and gives the result; again and again the same one.

        With tensors of a device the current stream waits, and the host only until everything was enqueued.

        Args:
            timeout: a timedelta or seconds; None: as long as the operation's own deadline lets it go on.

        Raises:
            CollectiveTimeoutError: `timeout` passed; the operation goes on and may be waited for again.
            CommGraphError, ValueError, TypeError: what the operation itself came to.
        """
        seconds = None if timeout is None else _seconds(timeout, self._call.where)
        deadline = None if seconds is None else time.monotonic() + seconds
        for job in self._jobs:
            if not job.ended.is_set() and job.lane is not None:
                if deadline is None and job.lane.run_here(job):
                    continue
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
        return f"<Work: {self._call.where}, {'ended' if self.is_completed() else 'under way'}>"


class Finished(Work[T]):
    """One that had nothing to wait for, as where torch traces; simple enough that it may be made there."""

    def __init__(self, result: T) -> None:
        self._result = result

    def is_completed(self) -> bool:
        """True."""
        return True

    def wait(self, timeout: Any = None) -> T:
        """The result."""
        return self._result  # type: ignore[no-any-return]  # what it was made of

    def __repr__(self) -> str:
        return "<Work: ended>"


def _seconds(timeout: Any, where: str) -> float:
    seconds = timeout.total_seconds() if hasattr(timeout, "total_seconds") else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"wait of {where}: timeout={timeout!r} is neither a datetime.timedelta nor seconds")
    return float(seconds)


class LaneThread(threading.Thread):
    """Makes the jobs of one lane."""


class Lane:
    """Jobs one after the other, on a thread that is there while there are some."""

    def __init__(self, name: str, hold: Callable[[bool], None] | None = None) -> None:
        """Without a thread as yet.

        Args:
            name: of its threads.
            hold: told when the lane gets jobs and when it has none left.
        """
        self._name = name
        self._hold = hold
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._open = 0  # jobs that have not ended
        self._closed = False
        self._thread: LaneThread | None = None
        # Who is making a job: the thread of the lane, or one that waits for it.
        self._maker: int | None = None

    @property
    def is_idle(self) -> bool:
        """Whether everything that was begun has ended."""
        return not self._open

    @property
    def is_here(self) -> bool:
        """Whether the caller is a job of this very lane."""
        return self._maker == threading.get_ident()

    def submit(self, job: Job) -> None:
        """Does it after everything that was begun before."""
        with self._changed:
            if self._hold is not None and self.is_idle:
                self._hold(True)
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
        """Makes a job on the thread that waits for it, if its turn has come and nobody has begun it: without a change of threads.

        Returns:
            Whether it was made.
        """
        with self._changed:
            if self._maker is not None or not self._jobs or self._jobs[0] is not job:
                return False
            self._jobs.popleft()
            self._maker = threading.get_ident()
            if self._open == 1 and self._hold is not None:
                self._hold(False)  # nobody is before this job, so it may be made by a native call
        job.run()
        self._done()
        return True

    def _done(self) -> None:
        with self._changed:
            self._maker = None
            self._open -= 1
            if not self._open and self._hold is not None:
                self._hold(False)
            if not self._open or self._jobs:
                self._changed.notify_all()

    @property
    def has_gone(self) -> bool:
        """Whether there is neither a job nor a thread."""
        return not self._open and self._thread is None

    def settle(self, seconds: float) -> bool:
        """Waits until everything that was begun has ended; False where that takes longer."""
        with self._changed:
            job = self._jobs[0] if self._jobs else None
        if job is not None and not (job.has_arrived is not None and job.has_arrived() and self.run_here(job)):
            self.start()
        with self._changed:
            return self._changed.wait_for(lambda: self.is_idle, seconds)

    def join(self, seconds: float) -> None:
        """Waits for the thread, after the group was closed: its jobs end with an error."""
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
            # Kept by its Work alone: what it holds goes with that, and not when the next one comes.
            del job
            self._done()
