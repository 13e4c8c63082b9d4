"""Calls every function and method of the native module with absurd arguments, each in a process of its own, and prints those that crash.

Arguments: a seed, the number of calls, and names; all without.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from commgraph.communicators.shm_fast import tensors_of
from commgraph.shm import native_module, segments
from commgraph.shm.recorder import Recorder

SHOW = "SHOW" in os.environ
NBYTES = 1 << 22
HUGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
NUMBERS = (0, 1, 2, 3, 7, 64, 100, 1024, 4096, 8192, 1 << 20, *HUGE, -1, -2, -64, -4096, *(-number for number in HUGE))


class Late(Exception):  # noqa: N818 - no error
    """A call waits: that is no absurd argument's fault."""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Late


class Objects:
    """One object of each type, that of a member whose peer never comes."""

    def __init__(self) -> None:
        native: Any = native_module.load()
        fd = segments.create(NBYTES)
        self.fd, self.native = fd, native
        self.segment = native.Segment(fd, NBYTES)
        self.team = native.Team(self.segment, 4096, 2, 0, 1)
        self.pool = native.Pool(1 << 20)
        self.group = native.Group(self.team, self.pool, 8192, 4096)
        offset = 8192 + native.group_layout(2, 4096)[1]
        ring_bytes = -(-native.ring_bytes(1, 4096) // 4096) * 4096
        self.outgoing = native.Ring(self.team, self.pool, offset, 0, 1, 1, 4096, False, True)
        self.incoming = native.Ring(self.team, self.pool, offset + ring_bytes, 1, 0, 1, 4096, False, True)
        self.broadcast = native.Ring(self.team, self.pool, offset + 2 * ring_bytes, 0, 0, 1, 4096, True, False)
        self.tensors = tensors_of(native)
        self.fast = native.FastCalls(self.group, self.tensors, lambda name, args: 7, 10_000_000)
        self.alone = native.FastCalls(None, self.tensors, None, 10_000_000)
        self.messages = native.Messages(self.tensors, lambda kind, shape, label: 7, 10_000_000, {}, {})
        # With a link to rank 1, which sends nothing. Its own methods take addresses, of which none is checked.
        self.nets = [native.Net(2, 0, False, 0, self.pool)]
        here, self.there = socket.socketpair()
        here.setblocking(False)
        self.nets[0].attach(1, here.detach())
        self.block = self.pool.take(100)
        self.recorder = Recorder(True, 64, "absurd", tensors_of).native
        self.record = self.recorder.of(self.recorder.text("a group"), self.recorder.text("its messages"))
        self.kept: list[torch.Tensor] = []

    def close(self) -> None:
        self.fast.close()
        self.alone.close()
        self.team.close()


def callables(o: Objects) -> dict[str, Callable[..., Any]]:
    """Every function, type, method and settable attribute of the module."""
    found: dict[str, Callable[..., Any]] = {name: value for name, value in vars(o.native).items() if callable(value)}
    named = {name: value for name, value in vars(o).items() if type(value).__module__ == "commgraph.shm._native"}
    for name, value in named.items():
        for attribute in dir(type(value)):
            kind = getattr(type(value), attribute)
            if attribute.startswith("__"):
                continue
            if callable(kind):
                found[f"{name}.{attribute}"] = getattr(value, attribute)
            else:
                found[f"{name}.{attribute}="] = lambda x=0, *_, value=value, attribute=attribute: setattr(value, attribute, x)
    return found


def arguments(o: Objects, dice: random.Random) -> Iterator[Any]:
    """Arguments of any type."""
    things = [value for name, value in vars(o).items() if name != "native"]
    memory = torch.ones(64)
    while True:
        yield dice.choice(
            (
                lambda: dice.choice(NUMBERS),
                lambda: dice.choice(NUMBERS),
                lambda: dice.choice(things),
                lambda: dice.choice((None, True, "", "sum", b"", b"x" * 100, 1.5, float("nan"), float("inf"), object(), ...)),
                lambda: dice.choice(([], (), {}, [1], (1, 2), [None, None], (b"a", b"b"), ["x"], {"x": torch.ones(3)}, {1: 2})),
                lambda: dice.choice((torch.ones(4), torch.ones(0), torch.tensor(1), torch.ones(4, 4).t(), torch.ones(3).bool())),
                lambda: [(memory.data_ptr(), 16)] * dice.randrange(3),
                lambda: tuple([(memory.data_ptr(), dice.choice((0, 16, 256)))] * dice.randrange(3)),
                lambda: [(memory.data_ptr(), *[dice.choice(NUMBERS) for _ in range(3)])] * 2,
                lambda: [dice.choice(NUMBERS) for _ in range(2)],
                lambda: tuple(dice.choice(things) for _ in range(dice.randrange(3))),
            )
        )()


def fitting(o: Objects, parameter: str, dice: random.Random) -> Any:
    """An argument of the type that a parameter of that name has; its value may still be absurd."""
    memory = torch.ones(1024)
    o.kept.append(memory)
    where, several = memory.data_ptr(), dice.randrange(4)
    owned = {"segment": o.segment, "team": o.team, "pool": o.pool, "group": dice.choice((o.group, None)), "tensors": o.tensors}
    if parameter in owned:
        return owned[parameter]
    if parameter == "net":
        return o.nets[0]
    if parameter in ("dst", "src"):
        return dice.choice((1, 1, *NUMBERS))
    if parameter == "ring":
        return dice.choice((o.outgoing, o.incoming, o.broadcast))
    if parameter == "rings":
        return tuple(dice.choice((o.outgoing, o.incoming)) for _ in range(several))
    if parameter in ("timeout", "timeout_ns"):
        return dice.choice((0, 1, 1000, 1_000_000, None, 0.001, *NUMBERS))
    if parameter in ("x", "out", "given"):
        return dice.choice((memory, memory[:several], torch.ones(2, 2), torch.ones(4).bool(), torch.ones(8).int(), None))
    if parameter in ("from", "to", "mine"):
        return dice.choice((where, where, 0, *NUMBERS))
    if parameter in ("out_blocks", "into", "sends", "receives"):
        return [dice.choice((None, (where, *(dice.choice((0, 1, 2, 8, 64, *NUMBERS)) for _ in range(3))))) for _ in range(2)]
    if parameter in ("parts", "targets"):
        made = [
            dice.choice((b"x" * dice.choice((0, 10, 3000)), (dice.choice((where, where, 0, 4096)), dice.choice((0, 10, 3000, *NUMBERS)))))
            for _ in range(several)
        ]
        if parameter == "parts" and dice.random() < 0.3:  # of a record of a dict
            return [b"\1" + dice.randbytes(dice.randrange(60)), *(o.pool.take(dice.randrange(100)) for _ in range(several))]
        return tuple(made) if parameter == "parts" else tuple([one for one in made if isinstance(one, tuple)])
    if parameter in ("op", "name"):
        return dice.choice(("sum", "avg", "max", 0, 1, 2, 3, 4))
    if parameter in ("sizes", "input_sizes", "output_sizes", "bytes") and dice.random() < 0.7:
        return dice.choice((None, [dice.choice(NUMBERS) for _ in range(2)], [2, 2], (1, 3)))
    if parameter in ("lane", "there", "here"):
        return dice.choice(((1, True, 0), (1, False, 0), (-1, False, 0)))
    if parameter in ("counts", "claims"):
        return {}
    if parameter == "record":
        return dice.choice((o.record, None))
    if parameter == "told":
        return dice.choice((None, (o.record, "send_object", dice.choice((2, 3)), 1, None), (o.record, "broadcast_object", 2, 0, 1 << 33)))
    if parameter == "message":
        return dice.choice((None, (1, 1, 0), (2, 2, 7), (1, 3, 0)))
    if parameter in ("operation", "strategy", "reduction"):
        return dice.choice(("send", "sum", None))
    if parameter == "fd":
        return o.fd
    return dice.choice((0, 1, 2, *NUMBERS))


def run(name: str, seed: int, count: int) -> None:
    """Call one function many times; sooner or later on objects that were closed."""
    signal.signal(signal.SIGALRM, interrupt)
    dice = random.Random(f"{seed} {name}")
    o, calls = Objects(), 0
    while calls < count:
        o = Objects()
        if dice.random() < 0.2:
            o.close()
        call = callables(o)[name]
        signature = getattr(call, "__text_signature__", None) or "(x)"
        for _ in range(20):
            names = [word.strip(" $/").partition("=")[0] for word in signature.strip("()").split(",")]
            odd = dice.choice((0.0, 0.1, 0.3, 1.0))
            given = [next(arguments(o, dice)) if dice.random() < odd else fitting(o, parameter, dice) for parameter in names if parameter]
            given = given[: dice.randrange(12)] if dice.random() < 0.05 else given
            calls += 1
            if SHOW:
                print(name, given, flush=True)
            with contextlib.suppress(BaseException):  # any error is an answer
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.02)
                    call(*given)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    seed, count, *names = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    for name in names or list(callables(Objects())):
        pid = os.fork()
        if pid == 0:
            run(name, seed, count)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            print(f"{name} {seed}: {signal.Signals(status).name if status < 64 else status}", flush=True)
    print("done")


if __name__ == "__main__":
    main()
