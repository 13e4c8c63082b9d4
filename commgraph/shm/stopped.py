"""How a wait in shared memory ends early. In Python, so that it can be caught where the native module is missing."""

from __future__ import annotations

__all__ = ["GONE", "LOST", "MISMATCH", "SELF", "TIMEOUT", "Busy", "Stopped"]

# As in native/team.h.
TIMEOUT, LOST, GONE, SELF, _SIGNAL, MISMATCH = range(1, 7)


class Stopped(Exception):  # noqa: N818 - internal; the coordinator turns it into the public error
    """Raised by the native module with two arguments.

    Attributes:
        code: TIMEOUT (the deadline passed), LOST (a process died), GONE (one closed its side), SELF (this side was closed by another
            thread), MISMATCH (the ranks called different things).
        seat: of the participant that it is about.
    """

    def __init__(self, code: int, seat: int) -> None:
        super().__init__(code, seat)
        self.code = code
        self.seat = seat


class Busy(RuntimeError):  # noqa: N818 - internal name of a RuntimeError that says it all
    """Another thread is in a call of the same group or queue; nothing was begun."""
