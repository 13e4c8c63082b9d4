"""`Deadline`: how long a call may wait, passed through every layer down to the native module."""

from __future__ import annotations

import math
import numbers
import time
from datetime import timedelta
from typing import Self

import attrs

__all__ = ["LONGEST", "Deadline", "Timeout", "seconds_of", "timedelta_of"]

# Accepted wherever a public method has `timeout=`.
Timeout = timedelta | float | None

# Seconds. Ten years count as for ever; clocks and thread primitives overflow not far beyond.
LONGEST = 10 * 365 * 86400.0

# Seconds that a wait has at the least, also after its deadline: backends take zero for "no deadline".
_LEAST = 0.001
_LEAST_NS = 1_000_000


@attrs.frozen(eq=False, slots=False)  # frozen slots are filled one by one by object.__setattr__, in twice the time
class Deadline:
    """The end of a wait.

    Attributes:
        seconds: length of the wait when it began.
        at_ns: its end on `time.monotonic_ns`.
    """

    seconds: float
    at_ns: int

    @classmethod
    def after(cls, seconds: float) -> Self:
        """Return a deadline that many seconds from now."""
        return cls(seconds, time.monotonic_ns() + int(seconds * 1e9))

    @classmethod
    def of(cls, timeout: Timeout, default: float) -> Self:
        """Return the deadline of a call.

        Args:
            timeout: as the caller gave it; None takes the default.
            default: seconds.

        Raises:
            ValueError: as `seconds_of`.
        """
        return cls.after(default if timeout is None else seconds_of(timeout))

    def left(self) -> float:
        """Seconds until the deadline, at least a millisecond."""
        return max((self.at_ns - time.monotonic_ns()) * 1e-9, _LEAST)

    def left_ns(self) -> int:
        """Nanoseconds until the deadline, at least a million."""
        return max(self.at_ns - time.monotonic_ns(), _LEAST_NS)

    @property
    def has_passed(self) -> bool:
        """Whether the deadline lies in the past."""
        return time.monotonic_ns() >= self.at_ns

    def at_least(self, seconds: float) -> Deadline:
        """Return this deadline, or one that many seconds from now if that is later."""
        return self if self.left() >= seconds else Deadline.after(seconds)


def seconds_of(timeout: timedelta | float) -> float:
    """Return `timeout` in seconds, at most `LONGEST`; 0 polls: what is there already counts, and nothing is waited for.

    Raises:
        ValueError: neither a timedelta nor a number, or negative.
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | numbers.Real):  # numpy's floats are Real, too
        raise ValueError(f"timeout={timeout!r} is neither a datetime.timedelta nor seconds")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"timeout={timeout!r}: a deadline must not lie in the past, and every wait has one; 0 polls")
    return float(min(seconds, LONGEST))


def timedelta_of(timeout: timedelta | float) -> timedelta:
    """Return the default deadline of a world or a group.

    Raises:
        ValueError: as `seconds_of`; and 0, which would make every call poll.
    """
    if not (seconds := seconds_of(timeout)):
        raise ValueError(f"timeout={timeout!r}: a default deadline lies in the future; to poll give one call timeout=0")
    return timedelta(seconds=seconds)
