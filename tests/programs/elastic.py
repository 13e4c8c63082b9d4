"""A rank of a job that loses ranks and goes on without them. Prints a line of JSON for each step.

    elastic.py INIT_METHOD RANK SIZE SECONDS RANK=PLACE...

PLACE is what happens to that rank: ``work``: it kills itself between two calls; ``stop``: it stops itself there, and somebody lets it go
on; ``cut``: somebody cuts it off; the name of a method of `Membership`, or ``end``: it kills itself in the agreement that follows.
SECONDS: how long ranks wait for each other. INIT_METHOD ``env``: the launcher says who it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

import commgraph as cg
from commgraph.membership import Membership


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refused(me: int, **calls: Callable[[], object]) -> None:
    """Say how each call of a rank that was counted out ends."""
    for name, call in calls.items():
        begun = time.monotonic()
        try:
            call()
        except cg.CommGraphError as error:
            say(rank=me, call=name, error=type(error).__name__, text=str(error), seconds=time.monotonic() - begun)
        else:
            say(rank=me, call=name, error=None)


def main() -> None:
    method, rank, size, seconds, *places = sys.argv[1:]
    fate = dict(place.split("=") for place in places)
    if method == "env":
        world = cg.World.from_env(timeout=30)
    else:
        world = cg.World.connect(method, rank=int(rank), world_size=int(size), timeout=30)
    me, left = world.rank, world.size - len(fate)
    place = fate.get(str(me), "")
    context = world.context(cg.Layout(world.size, tp=world.size), name="main")
    context.tp.barrier()
    say(rank=me, ready=True)
    if place == "work":
        die()
    if place == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        refused(
            me,
            all_reduce=lambda: context.tp.all_reduce(torch.ones(4)),
            context=lambda: world.context(cg.Layout(world.size), name="another"),
            survivors=lambda: world.survivors(timeout=20),
        )
        world.close()
        return
    if place == "end":
        # After it has heard that all have built, before it tells anybody.
        Membership._send = send_until_end  # type: ignore[method-assign]  # of this process, which ends in it
    elif place not in ("", "cut"):
        setattr(Membership, place, die)
    begun, found = time.monotonic(), None
    while found is None:
        try:
            if context.closed:
                context = world.context(cg.Layout(world.size, tp=world.size), name="main")
            if world.size == left:
                found = context.tp.all_reduce(torch.tensor([float(me)])).item()
            else:
                context.tp.all_reduce(torch.ones(1), timeout=float(seconds))
        except (cg.CollectiveError, cg.BuildError):  # the latter of a context, where a rank died since the ranks agreed
            world = world.survivors(timeout=float(seconds))
            if place == "cut":
                say(rank=me, alone=world.size)
                return
            context.close()
    say(rank=me, new=world.rank, size=world.size, sum=found, seconds=time.monotonic() - begun)
    if "stop" in fate.values():
        sys.stdin.readline()
    context.tp.barrier()
    world.close()


SEND = Membership._send


def send_until_end(self: Any, ranks: Any, message: Any) -> None:
    """Send, but die in place of the last message."""
    if message.kind == "end":
        die()
    SEND(self, ranks, message)


if __name__ == "__main__":
    main()
