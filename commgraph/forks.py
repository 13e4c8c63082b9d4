"""What belongs to one process: a forked child has copies of it, and no part in what it connects to.

The copies share the parent's memory, sockets and stores, and lack its threads: a call on one would stand in for the parent, and freeing one
of torch's objects would wait for a thread that the child does not have. In the child every object is therefore disowned before any other
code runs: calls on it raise, closing it does nothing, and what it held is never freed there.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

__all__ = ["Owner", "disown_in_children", "explain_fork", "keep_for_ever"]


class Owner(Protocol):
    """An object that is to be used by one process only."""

    def _disown(self) -> None:
        """Called in a forked child, before any other code: make every later call raise. Takes no lock, which a lost thread may hold."""


def disown_in_children(owner: Owner) -> None:
    """Have `owner` disowned, and never freed, in every child that this process forks while it lives."""
    reference = weakref.ref(owner)

    def disown() -> None:
        found = reference()
        if found is not None:
            keep_for_ever(found)
            found._disown()

    # A callback cannot be taken back: a few words stay for each owner.
    os.register_at_fork(after_in_child=disown)


def keep_for_ever(*objects: object) -> None:
    """Never free these objects in this process, also when the interpreter ends."""
    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def explain_fork(owner_pid: int, what: str) -> str:
    """Return why a forked child cannot use `what`, as the end of an error message."""
    return (
        f"it belongs to process {owner_pid}, and this is process {os.getpid()}, a forked child of it. Nothing was sent. Make {what} in "
        "the child, or start processes by spawn"
    )
