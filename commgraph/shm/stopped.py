"""Exceptions of the native module. Defined in Python, so that they can be caught where it is missing."""

from __future__ import annotations

__all__ = ["GONE", "LOST", "MISMATCH", "REFUSED", "SELF", "TIMEOUT", "Busy", "Stopped"]

# As in native/team.h.
TIMEOUT, LOST, GONE, SELF, _SIGNAL, MISMATCH = range(1, 7)
REFUSED = 9


class Stopped(Exception):  # noqa: N818 - internal; the coordinator turns it into the public error
    """Raised by the native module with two arguments.

    Attributes:
        code: TIMEOUT (the deadline passed), LOST (a process died), GONE (one closed its side), SELF (this side was closed by another
            thread), MISMATCH (the ranks called different things), REFUSED (the kernel refuses this process the memory of another).
        member: number of the participant that it is about.
    """

    def __init__(self, code: int, member: int) -> None:
        super().__init__(code, member)
        self.code = code
        self.member = member


class Busy(RuntimeError):  # noqa: N818 - internal name of a RuntimeError that says it all
    """Another thread is in a call of the same group or queue; nothing was begun."""
