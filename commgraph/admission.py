"""How new processes come to a world that grows: they wait in a store, and rank 0 of the world gives each its rank.

::

    arrived             how many have come
    newcomer/<n>        the n-th: a random token and its process
    seat/<token>        its rank and the size of the World that follows; empty: there was no rank left

A process that has died while it waited gets no rank where rank 0 can see that, which is on its own host.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TypeVar

import msgspec
import torch.distributed as dist

from commgraph.deadline import Deadline
from commgraph.errors import BuildError
from commgraph.meeting import STORE_ERRORS, attend, poll, write
from commgraph.processes import Process
from commgraph.session import DeadRankError

__all__ = ["admit", "apply"]

T = TypeVar("T")


class _Newcomer(msgspec.Struct, frozen=True):
    token: str
    process: Process


def admit(store: dist.Store, size: int, extra: int, deadline: Deadline) -> Callable[[], None]:
    """Give `extra` newcomers the ranks from `size` on, in the order in which they came. Called by rank 0.

    Returns:
        A function that raises `DeadRankError` where one of them has died since. Nobody else knows its process before it has come again, as
        a rank of the World that follows.

    Raises:
        BuildError: they did not come in time, or the store failed.
    """
    apart = dist.PrefixStore("commgraph/grow", store)
    me, came = Process.own(), dict[int, _Newcomer]()

    def has_died(one: _Newcomer) -> bool:
        return me.can_watch(one.process) and one.process.has_ended()

    def look() -> list[_Newcomer] | None:
        for number in range(int(apart.add("arrived", 0))):
            if number not in came and apart.check([f"newcomer/{number}"]):
                came[number] = msgspec.json.decode(apart.get(f"newcomer/{number}"), type=_Newcomer)
        alive = [came[number] for number in sorted(came) if not has_died(came[number])]
        return alive if len(alive) >= extra else None

    def job(is_left: Callable[[], bool]) -> list[_Newcomer]:
        alive = poll(look, deadline, is_left, lambda: f"grow: {len(came)} of {extra} new processes have come")
        if alive is None:
            raise BuildError(f"rank 0: grow: {len(came)} of {extra} new processes came within {deadline.seconds:g} s")
        for number, one in enumerate(alive):
            write(apart, f"seat/{one.token}", msgspec.json.encode([size + number, size + extra]) if number < extra else b"")
        return alive[:extra]

    seated = _run(job, deadline, "rank 0: grow")

    def watch() -> None:
        for number, one in enumerate(seated):
            if has_died(one):
                raise DeadRankError(
                    f"rank 0 of {size + extra}: rank {size + number} (process {one.process.pid}), a new one, died before all ranks had come"
                )

    return watch


def apply(store: dist.Store, deadline: Deadline) -> tuple[int, int]:
    """Return the rank of this process, which is new, and the size of the World.

    Raises:
        BuildError: there is no rank for it, nobody answers in time, or the store failed.
    """
    apart = dist.PrefixStore("commgraph/grow", store)
    token = secrets.token_hex(16)
    seat = f"seat/{token}"

    def job(is_left: Callable[[], bool]) -> tuple[int, int]:
        number = int(apart.add("arrived", 1)) - 1
        write(apart, f"newcomer/{number}", msgspec.json.encode(_Newcomer(token, Process.own())))
        found = poll(
            lambda: apart.get(seat) if apart.check([seat]) else None, deadline, is_left, lambda: "join: the world has given no rank yet"
        )
        if found is None:
            raise BuildError(
                f"join: this process was the {number + 1}. to come, and the world gave it no rank within {deadline.seconds:g} s: every "
                "rank of it calls grow with the same ticket, and for as many processes as come"
            )
        if not found:
            raise BuildError("join: as many processes as the world asked for had come before this one: end it, or grow again")
        rank, size = msgspec.json.decode(found, type=tuple[int, int])
        return rank, size

    return _run(job, deadline, "join")


def _run(job: Callable[[Callable[[], bool]], T], deadline: Deadline, what: str) -> T:
    try:
        return attend(job, deadline)
    except BuildError:
        raise
    except TimeoutError as error:
        raise BuildError(f"{what}: the store gives {error}") from None
    except STORE_ERRORS as error:
        raise BuildError(f"{what}: the store, which rank 0 of the world serves, failed: {error}") from error
