"""`Fault` and `inject_faults`: a rank is delayed, stopped, killed or cut off at its n-th call."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import attrs

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.failures import Call
from commgraph.errors import ConfigurationError
from commgraph.world import World

__all__ = ["Fault", "RankKilled", "inject_faults"]

KINDS = ("delay", "stop", "kill", "cut")
# Seconds before a rank that is a thread drops its connections. A process's death is noticed a moment later as well, when its peers have
# taken what it sent in earlier calls.
_UNNOTICED = 0.05
# Methods of a coordinator that are no calls to its peers.
_NO_CALLS = frozenset({"communicator", "close", "graph_capture", "prepare_communication_buffer_for_model", "torch_group"})
COUNTED = tuple(
    name
    for name, member in vars(GroupCoordinator).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in _NO_CALLS
)


class RankKilled(BaseException):
    """Ends the function of a rank that is a thread and that a fault has killed. Nobody but `spmd` should catch it."""


def _known(kind: str, names: Sequence[str]) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in names and not (value is None and attribute.default is None):
            raise ConfigurationError(f"Fault({attribute.name}={value!r}): {kind} is needed, one of {', '.join(names)}")

    return check


def _number(least: int) -> Callable[[object, attrs.Attribute[int], Any], None]:
    def check(_: object, attribute: attrs.Attribute[int], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"Fault({attribute.name}={value!r}): a whole number is needed, {least} or more")

    return check


def _seconds(_: object, attribute: attrs.Attribute[float], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < threading.TIMEOUT_MAX:
        raise ConfigurationError(f"Fault({attribute.name}={value!r}): a number of seconds is needed, more than 0")


@attrs.frozen(kw_only=True)
class Fault:
    """Something that happens to one rank at one of its calls, before anything of that call is sent.

    Attributes:
        rank: global rank to which it happens.
        call: at which call of that rank, counted from 1 over all of its groups. Calls are those of the methods of a `GroupCoordinator`
            that the program itself makes, whether they succeed or not.
        kind: ``"delay"``: the call begins `seconds` later. ``"stop"``: the process is stopped (SIGSTOP) for `seconds`, all of its threads
            included; a rank that is a thread is delayed. ``"kill"``: the process ends by SIGKILL; a rank that is a thread drops its
            connections and leaves its function by `RankKilled`, through its ``finally`` blocks. ``"cut"``: every group of the rank
            ends as if its links were gone, with `PeerLostError` on this rank and on its peers; the rank itself goes on.
        operation: count calls of this method only, e.g. ``"all_reduce"``; None: of all.
        group: count calls on groups of this name only; None: on all.
        seconds: of "delay" and "stop".

    Raises:
        ConfigurationError: an argument, saying which.
    """

    rank: int = attrs.field(validator=_number(0))
    call: int = attrs.field(default=1, validator=_number(1))
    kind: str = attrs.field(validator=_known("a kind of fault", KINDS))
    operation: str | None = attrs.field(default=None, validator=_known("a method of GroupCoordinator", COUNTED))
    group: str | None = None
    seconds: float = attrs.field(default=1.0, validator=_seconds)


def inject_faults(target: World | ParallelContext, *faults: Fault, threads: bool = False) -> None:
    """Let faults happen to this rank: in a context, or in a World and all contexts that it has or makes.

    Every rank may call it with the same faults: those of other ranks do nothing here. A group in which no fault is to happen is left
    as it is, and costs what it did. Calls that torch.compile has traced, and those of a backward pass, are not counted.

    Args:
        target: where.
        faults: each happens once.
        threads: this rank is a thread of a process that has others; `spmd` says so itself.

    Raises:
        TypeError: something else than a `Fault`.
        ConfigurationError: a fault of a rank that does not exist.
    """
    size = target.size if isinstance(target, World) else target.world_size
    for fault in faults:
        if not isinstance(fault, Fault):
            raise TypeError(f"inject_faults: {fault!r} is a {type(fault).__name__}, a commgraph.testing.Fault is needed")
        if fault.rank >= size:
            raise ConfigurationError(f"inject_faults: {fault} is for rank {fault.rank}; there are ranks 0 to {size - 1}")
    mine = [fault for fault in faults if fault.rank == target.rank]
    if mine:
        _Injector(target, mine, threads).install(target)


class _Injector:
    """The faults of one rank, and the calls that were counted for each. Sits on the methods of its coordinators."""

    def __init__(self, target: World | ParallelContext, faults: Sequence[Fault], threads: bool) -> None:
        self.world: Any = target if isinstance(target, World) else target._world
        self.left = dict.fromkeys(faults, 0)
        self.threads = threads
        self.killed = False
        self.watched: list[GroupCoordinator] = []
        self._lock = threading.Lock()

    def install(self, target: World | ParallelContext) -> None:
        if isinstance(target, World):
            self.watch(target.group)
            for context in tuple(target._state.contexts.values()):
                self.watch(*(context[name] for name in context.layout.names))
            build = target.context

            def and_watch(*args: Any, **kwargs: Any) -> ParallelContext:
                made = build(*args, **kwargs)
                self.watch(*(made[name] for name in made.layout.names))
                return made

            target.context = and_watch  # type: ignore[method-assign]  # of this world alone, for which faults were asked for
        else:
            self.watch(*(target[name] for name in target.layout.names))

    def watch(self, *coordinators: GroupCoordinator) -> None:
        self.watched = [one for one in self.watched if not one._state.is_closed]
        for coordinator in coordinators:
            self.watched.append(coordinator)
            for name in COUNTED:
                # An attribute of the instance goes before the method of the class. Coordinators are frozen for everybody else.
                object.__setattr__(coordinator, name, functools.partial(self.call, coordinator, name, getattr(coordinator, name)))

    def call(self, coordinator: GroupCoordinator, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call of the program, after the faults that are due."""
        if self.killed:
            raise RankKilled
        for fault in self.due(coordinator, name):
            self.happen(fault, name)
        made = method(*args, **kwargs)
        if name == "sibling":
            self.watch(made)
        return made

    def due(self, coordinator: GroupCoordinator, name: str) -> list[Fault]:
        """Count a call, and return the faults whose call it is."""
        found = []
        with self._lock:
            for fault in tuple(self.left):
                if fault.operation in (None, name) and fault.group in (None, coordinator.name):
                    self.left[fault] += 1
                    if self.left[fault] == fault.call:
                        del self.left[fault]
                        found.append(fault)
        return found

    def happen(self, fault: Fault, name: str) -> None:
        if fault.kind == "cut":
            self.cut(fault, name)
        elif fault.kind == "kill":
            self.kill()
        elif fault.kind == "stop" and not self.threads:
            stop(fault.seconds)
        else:
            time.sleep(fault.seconds)

    def kill(self) -> NoReturn:
        if not self.threads:
            os.kill(os.getpid(), signal.SIGKILL)
        self.killed = True
        time.sleep(_UNNOTICED)
        self.world._abort()
        raise RankKilled

    def cut(self, fault: Fault, name: str) -> None:
        time.sleep(_UNNOTICED)
        for coordinator in self.watched:
            state = coordinator._state
            if state.members.world_size > 1 and not state.is_closed:
                call = Call(coordinator.name, name, state.members, state.sequence)
                state.failures.break_off(call, f"its links were cut by {fault}")


def stop(seconds: float) -> None:
    """Stop this process, all of its threads, and have it go on after so many seconds."""
    pid = os.getpid()
    # Another process has to say when.
    with subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds:.3f}; kill -CONT {pid}"]):
        os.kill(pid, signal.SIGSTOP)
