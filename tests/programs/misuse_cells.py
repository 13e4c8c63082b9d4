"""The cells of the misuse matrix: what the ranks of one job do, and what is made of each call's result."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch

import commgraph as cg
from commgraph.testing import spmd
from tests.programs.misuse_operations import OPERATIONS, RANKS, WRONG, Args, Operation

__all__ = ["CELLS", "RANKS", "Cell", "Rank", "run_in_threads", "run_rank"]

# Those of the ranks themselves; turn 2 is that of a forked child.
TURNS = (1, 3, 9)
# Of calls that must succeed, and of those that wait in vain.
LONG, SHORT = 4.0, 1.0
BUILDING = 6.0
GRACE = 2.0
LATE = 0.3
METHODS = {name.split(".")[-1].split("[")[0].split("(")[0] for name in OPERATIONS} | {
    "all_reduce",
    "dispatch",
    "close",
    "context",
    "attach",
}


class UsersError(Exception):
    """Raised by a rank in the place of a call."""


@attrs.frozen
class Cell:
    """One misuse of one operation, over one transport, on one kind of ranks."""

    operation: str
    misuse: str
    transport: str
    ranks: str

    @property
    def name(self) -> str:
        return f"{self.operation}/{self.misuse}/{self.transport}/{self.ranks}"

    @property
    def what(self) -> Operation:
        return OPERATIONS[self.operation]

    @property
    def large(self) -> bool:
        """A third of the cells has tensors of 2.9 MB, and the others of 288 bytes."""
        return zlib.crc32(self.name.encode()) % 3 == 0

    @property
    def seconds(self) -> float:
        """Deadline of each call; what builds has that of the world."""
        if self.what.builds:
            return BUILDING
        return LONG if self.misuse in MUST_WORK else SHORT


def same(a: Any, b: Any) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Queue:
    """A message queue, as operations and misuses use a group."""

    def __init__(self, queue: cg.MessageQueue, seconds: float) -> None:
        self.queue, self.seconds = queue, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)


class OfWorld:
    """A group and its world, as operations and misuses use a group."""

    def __init__(self, group: Any, world: cg.World) -> None:
        self.group, self.world = group, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


class Rank:
    """One rank of one cell."""

    def __init__(self, cell: Cell, me: int, folder: Path) -> None:
        self.cell, self.me, self.folder = cell, me, folder
        self.seconds = cell.seconds
        self.root = cell.what.root[0]
        self.g: Any = None
        self.ctx: Any = None
        self._lock = threading.Lock()

    # What is said.

    def say(self, outcome: str, **more: Any) -> None:
        line = json.dumps({"rank": self.me, "outcome": outcome, **more}) + "\n"
        with self._lock, (self.folder / f"{self.me}.out").open("a") as file:
            file.write(line)

    def has_said(self, phase: str) -> bool:
        place = self.folder / f"{self.me}.out"
        return place.exists() and json.dumps(phase) in place.read_text()

    def sign(self, name: str) -> None:
        (self.folder / name).touch()

    def wait_for(self, *names: str, seconds: float = 15.0) -> None:
        until = time.monotonic() + seconds
        while not all((self.folder / name).exists() for name in names):
            if time.monotonic() > until:
                raise TimeoutError(f"{names} did not come")
            time.sleep(0.002)

    def attempt(self, phase: str, call: Callable[[], Any], want: Callable[[], Any], *, must: str = "", patient: float = 0.0) -> bool:
        """Make a call, and say how it ended; `must`: "work" or "fail". Return whether it gave a result."""
        started = time.monotonic()
        outcome, kind, text, worked, value = "right", "", "", False, None
        try:
            value = call()
            worked = True
        except Exception as error:
            outcome, kind, text = self.judge(error)
            del error
        else:
            known = self.cell.misuse == "empty" and self.cell.transport == "gloo"
            try:
                right = want()
            except (AssertionError, RuntimeError, IndexError, ValueError):
                outcome, text = "limit" if known else "wrong", f"a result where none is right: {short(value)}"
            else:
                if not same(value, right):
                    outcome, text = "limit" if known else "wrong", f"{short(value)} in the place of {short(right)}"
        took = time.monotonic() - started
        if outcome in ("right", "error"):
            if took > self.seconds + GRACE + patient:
                outcome, text = "late", f"{took:.1f} s with a deadline of {self.seconds:g} s. {text}"
            elif must == "work" and outcome == "error":
                outcome = "refused"
            elif must == "fail" and outcome == "right":
                outcome, text = "wrong", f"{short(value)} in the place of an error"
        more = {"class": kind} if kind and outcome == "error" else {"error": kind} if kind else {}
        self.say(outcome, phase=phase, took=round(took, 3), **more, **({"text": text[:600]} if text else {}))
        return worked

    def judge(self, error: Exception) -> tuple[str, str, str]:
        kind, text = type(error).__name__, str(error)
        if not isinstance(error, cg.CommGraphError | ValueError | TypeError):
            return "bare", kind, f"{text[:300]} {frames(error)}"
        what = self.cell.what
        built = r"'(tp|world)'|context '|sibling '|group |\bsplit(_by)?\b|<World"
        group = "message queue" if what.queue else built if what.builds else "'tp'|context 'a'"
        lacks = [] if re.search(r"ranks? \d|writer|reader \d", text) else ["rank"]
        lacks += [] if re.search(group, text) else ["group"]
        # A build says what was to be built.
        lacks += [] if what.builds or any(re.search(rf"\b{name}\b", text) for name in METHODS) else ["operation"]
        if lacks:
            return "nameless", kind, f"lacks {', '.join(lacks)}: {text[:300]} {frames(error)}"
        return "error", kind, text[:300]

    # Calls.

    def args(self, turn: int = 1, changes: dict[str, Any] | None = None) -> list[Args]:
        """What every rank gives; `changes` are those of rank 1."""
        base = Args(0, self.root, turn, scaled(self.cell, 6, 12))
        return [attrs.evolve(base, me=me, **(changes or {} if me == WRONG else {})) for me in range(RANKS)]

    def op(self, phase: str = "call", turn: int = 1, changes: dict[str, Any] | None = None, **how: Any) -> bool:
        w, what = self.args(turn, changes), self.cell.what
        got: list[Any] = []

        def call() -> Any:
            got.append(what.call(self.g, w[self.me]))
            return got[0]

        def want() -> Any:
            # A queue gives its messages in order, whichever call of the reader it is; those of a forked child are none.
            if what.queue and isinstance(got[0], dict) and (turn := got[0].get("round")) in TURNS:
                return what.want(self.me, self.args(turn))
            return what.want(self.me, w)

        if what.idle == self.me:
            how.pop("must", None)
        return self.attempt(phase, call, want, **how)

    def after(self, **how: Any) -> None:
        """A call that all ranks make alike, and that is another one than before."""
        if self.cell.what.queue:
            if self.cell.operation != "MessageQueue.wait_until_ready":
                self.op("after", 9, **how)
            return
        x = torch.full((5,), self.me + 1.0)
        self.attempt("after", lambda: self.g.all_reduce(x, op="max"), lambda: torch.full((5,), float(RANKS)), **how)

    def other(self) -> None:
        """Another operation than that of the cell."""
        if self.cell.what.queue:
            wrong = self.g.dequeue if self.g.reader is None else lambda timeout: self.g.enqueue(1, timeout)
            self.attempt("other", lambda: wrong(timeout=self.seconds), lambda: None, must="fail")
            return
        name = "all_reduce" if self.cell.operation.startswith("all_gather") else "all_gather"
        x = torch.full((4,), float(self.me))
        want = torch.full((4,), 3.0) if name == "all_reduce" else torch.arange(float(RANKS)).repeat_interleave(4)
        self.attempt("other", lambda: getattr(self.g, name)(x), lambda: want)

    def close(self) -> None:
        if self.cell.what.queue:
            self.g.queue.close(timeout=GRACE)
        else:
            self.ctx.close(timeout=timedelta(seconds=GRACE))


def frames(error: BaseException) -> str:
    return " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:])


def short(value: Any) -> str:
    return " ".join(repr(value).split())[:160]


def scaled(cell: Cell, *shape: int) -> tuple[int, ...]:
    return tuple(100 * extent for extent in shape) if cell.large else shape


# The misuses. Each is what every rank does, between the building of a context and its end.


def arguments(letter: str, change: Callable[[Cell], dict[str, Any]]) -> tuple[str, Callable[[Rank], None]]:
    """Rank 1 gives another argument than the others."""

    def misuse(r: Rank) -> None:
        r.op(changes=change(r.cell))
        r.after()

    return letter, misuse


def another_operation(r: Rank) -> None:
    r.other() if r.me == WRONG else r.op()
    r.after()


def another_order(r: Rank) -> None:
    calls = (r.op, r.other)
    for call in calls[::-1] if r.me == WRONG else calls:
        call()
    r.after()


def skips(r: Rank) -> None:
    if r.me != WRONG:
        r.op()
    if not r.cell.what.queue:
        r.after()


def raises(r: Rank) -> None:
    if r.me == WRONG:
        raise UsersError
    r.op()
    r.after()


def is_late(r: Rank) -> None:
    if r.me == WRONG:
        time.sleep(LATE)
    r.op(must="work", patient=LATE)
    r.after(must="work")


def is_too_late(r: Rank) -> None:
    if r.me == WRONG:
        time.sleep(r.seconds + 0.5)
    r.op()
    r.after()


def two_threads(r: Rank) -> None:
    """Rank 1 calls from two threads at once, and again what was refused, until as many calls have worked as the others make."""
    rounds = 1 if r.cell.operation == "sibling" else 4
    if r.me != WRONG:
        for _ in range(2 * rounds):
            r.op()
        r.after()
        return
    ready = threading.Barrier(2)

    def calls() -> None:
        ready.wait(10)
        for _ in range(rounds):
            until = time.monotonic() + r.seconds
            while not r.op("in two threads") and time.monotonic() < until and not is_broken(r):
                time.sleep(0.001)

    in_threads(calls, calls)
    r.after()


def is_broken(r: Rank) -> bool:
    return bool(r.g.closed if r.cell.what.queue else r.g.is_broken or r.ctx.closed)


def in_threads(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG + SHORT + 2 * GRACE)


def after_close(r: Rank) -> None:
    r.op(must="work")
    r.close()
    r.op("after close", 2, must="fail")
    r.close()


def one_closes(r: Rank) -> None:
    if r.me == WRONG:
        r.close()
        r.op("after close", must="fail")
    else:
        r.op()
        r.after()


def closes_beside(r: Rank) -> None:
    """Rank 1 closes while a thread of it is in a call, for which the others come late or never."""
    if r.me == WRONG:

        def close() -> None:
            time.sleep(0.2)
            r.attempt("close", r.close, lambda: None, patient=GRACE)

        in_threads(lambda: r.op("beside close"), close)
        return
    time.sleep(0.6)
    r.op()
    r.after()


def leaves_beside(r: Rank) -> None:
    """Rank 1 leaves its context by an exception, while a thread of it calls in a loop."""
    stop = threading.Event()

    def calls() -> None:
        for turn in range(1, 400):
            if not r.op("beside leaving", turn) or stop.is_set():
                return

    if r.me == WRONG:
        thread = threading.Thread(target=calls, daemon=True)
        thread.start()
        time.sleep(0.03)
        if not r.cell.what.queue:
            r.ctx.__exit__(UsersError, UsersError(), None)
        else:
            r.g.queue.close()
        thread.join(LONG + GRACE)
        return
    threading.Timer(1.0, stop.set).start()
    calls()


def forks(r: Rank) -> None:
    """Rank 1 forks, and the child calls, closes, and ends; the parent goes on."""
    r.op(must="work")
    if r.me == WRONG:
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(10)
                r._lock = threading.Lock()
                r.op("in a forked child", 2, must="fail" if r.cell.operation != "MessageQueue.wait_until_ready" else "")
                started = time.monotonic()
                r.close()
                if time.monotonic() - started > GRACE + 1:
                    r.say("late", phase="close in a forked child", took=time.monotonic() - started)
            except BaseException as error:
                r.say("bare", phase="close in a forked child", error=type(error).__name__, text=traceback.format_exc()[-600:])
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            r.say("hang" if code == -signal.SIGALRM else "crash", phase="in a forked child", text=f"it ended with {code}")
    r.op("after a fork", 3, must="work", patient=8.0)
    r.after(must="work")


# Calls in a call.


def nested(r: Rank, arrange: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
    """Rank 1 calls within a call, once, while the others are late; then again, if the call in the call was refused.

    Args:
        r: who.
        arrange: is given the call in the call, and returns the outer one.
    """
    if r.me != WRONG:
        time.sleep(0.5)
        for _ in range(2):
            r.op()
        r.after()
        return
    worked: list[bool] = []

    def inner() -> None:
        if not worked:
            worked.append(False)
            worked[0] = r.op("call in a call")

    arrange(inner)()
    if not worked:
        inner()
    if not worked[0] and not is_broken(r):
        r.op("again")
    r.after()


def in_a_handler(r: Rank) -> None:
    def arrange(inner: Callable[[], None]) -> Callable[[], None]:
        HANDLER.append(inner)

        def outer() -> None:
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            r.op("interrupted", patient=r.seconds + GRACE)
            timer.join()

        return outer

    nested(r, arrange)


# What the handler of SIGUSR1 calls.
HANDLER: list[Callable[[], None]] = []


class Dropped:
    """Calls when it is collected."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.itself = call, self

    def __del__(self) -> None:
        self.call()


def in_del(r: Rank) -> None:
    def arrange(inner: Callable[[], None]) -> Callable[[], None]:
        def outer() -> None:
            gc.collect()
            before = gc.get_threshold()
            Dropped(inner)
            gc.set_threshold(1, 1, 1)
            try:
                r.op("collected in it", patient=r.seconds + GRACE)
            finally:
                gc.set_threshold(*before)
            gc.collect()

        return outer

    nested(r, arrange)


def in_reduce(r: Rank) -> None:
    """An object of rank 1, which sends, calls while it is pickled."""
    if r.cell.operation.startswith(("broadcast", "scatter")):
        r.root = WRONG

    def arrange(inner: Callable[[], None]) -> Callable[[], None]:
        def outer() -> None:
            what, w = r.cell.what, r.args()
            mine = attrs.evolve(w[WRONG], me=Number(WRONG, inner))
            r.attempt("pickled in it", lambda: what.call(r.g, mine), lambda: what.want(WRONG, w), patient=r.seconds + GRACE)

        return outer

    nested(r, arrange)


class Number(int):
    """A rank that calls when it is pickled."""

    call: Callable[[], None]

    def __new__(cls, value: int, call: Callable[[], None]) -> Number:
        made = super().__new__(cls, value)
        made.call = call
        return made

    def __reduce__(self) -> Any:
        self.call()
        return (int, (int(self),))


def at_exit(r: Rank) -> None:
    """Rank 1 calls from an exit handler, and from a `__del__` when its module is taken down; nobody closes anything."""
    r.op(must="work")
    if r.me == WRONG:
        # torch itself may abort where a tensor is made so late.
        mine = [attrs.evolve(a, given=a.x) for a in r.args(3)][WRONG]
        call = r.cell.what.call
        left = Dropped(lambda: r.attempt("in __del__ at exit", lambda: call(r.g, mine), lambda: None, must="fail"))
        sys.modules["__main__"].left = left  # type: ignore[attr-defined]  # an object that lives until modules are taken down
        if r.cell.ranks == "processes":
            atexit.register(r.op, "at exit", 2)
        else:
            r.sign("in")
            threading.Event().wait()
        return
    if r.cell.ranks == "threads":
        r.sign(f"in {r.me}")
    r.op("while a peer exits", 2)


MUST_WORK = frozenset({"late", "fork", "at exit", "after close"})

MISUSES: dict[str, tuple[str, Callable[[Rank], None]]] = {
    "dtype": arguments("d", lambda cell: {"dtype": torch.int32}),
    "shape of as many": arguments("s", lambda cell: {"shape": scaled(cell, 12, 6), "odd": True}),
    "shape of more": arguments("s", lambda cell: {"shape": scaled(cell, 9, 12), "odd": True}),
    "empty": arguments("s", lambda cell: {"shape": (0, scaled(cell, 12)[0]), "odd": True}),
    "dim": arguments("m", lambda cell: {"dim": 1}),
    "impossible dim": arguments("m", lambda cell: {"dim": 7}),
    "src, dst or name": arguments("r", lambda cell: {"root": cell.what.root[1]}),
    "impossible src or dst": arguments("r", lambda cell: {"root": 9}),
    "another operation": ("", another_operation),
    "another order": ("", another_order),
    "skips": ("", skips),
    "raises": ("", raises),
    "late": ("", is_late),
    "too late": ("", is_too_late),
    "two threads": ("", two_threads),
    "after close": ("", after_close),
    "one closes": ("", one_closes),
    "close beside": ("", closes_beside),
    "leave beside": ("", leaves_beside),
    "fork": ("", forks),
    "signal handler": ("", in_a_handler),
    "__del__": ("", in_del),
    "__reduce__": ("o", in_reduce),
    "at exit": ("", at_exit),
}


def applies(operation: str, misuse: str) -> bool:
    what, letter = OPERATIONS[operation], MISUSES[misuse][0]
    if operation == "MessageQueue.wait_until_ready" and misuse in ("another order", "skips", "late", "too late", "two threads"):
        return False
    if misuse == "impossible src or dst" and operation in ("sibling", "World.context"):
        return False
    if "close" in misuse and operation.startswith("World"):
        return False  # of a context: its world goes on
    return what.sends if letter == "o" else letter in what.takes


CELLS = tuple(
    Cell(operation, misuse, transport, ranks)
    for operation in OPERATIONS
    for misuse in MISUSES
    if applies(operation, misuse)
    for transport in ("shm", "gloo")
    for ranks in ("threads", "processes")
    if not OPERATIONS[operation].builds or (transport, ranks) == ("shm", "processes")
)


# Ranks.


def make_queue(r: Rank) -> cg.MessageQueue:
    writer = r.cell.what.root[0]
    if r.me == writer:
        local = None if r.cell.transport == "shm" else 0
        queue = cg.MessageQueue.create(RANKS - 1, n_local_readers=local, address=None if local is None else "127.0.0.1")
        (r.folder / "handle.part").write_bytes(pickle.dumps(queue.handle))
        (r.folder / "handle.part").rename(r.folder / "handle")
    else:
        r.wait_for("handle")
        number = sorted({0, 1, 2} - {writer}).index(r.me)
        queue = cg.MessageQueue.attach(pickle.loads((r.folder / "handle").read_bytes()), number)
    queue.wait_until_ready(timeout=15)
    return queue


def body(r: Rank, world: cg.World | None) -> None:
    _, misuse = MISUSES[r.cell.misuse]
    if r.cell.what.queue:
        r.g = Queue(make_queue(r), r.seconds)
        with contextlib.suppress(UsersError):
            if r.cell.misuse == "at exit":
                misuse(r)
                return
            with r.g.queue:
                misuse(r)
        return
    assert world is not None
    shared = r.cell.transport == "shm"
    options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=r.seconds), shm=shared, message_queue=shared)
    ctx = r.ctx = world.context(cg.Layout(RANKS, tp=RANKS), name="a", options=options)
    r.g = OfWorld(ctx.tp, world) if r.cell.operation.startswith("World") else ctx.tp
    if r.cell.misuse == "at exit":
        misuse(r)
        return
    with contextlib.suppress(UsersError), ctx:
        misuse(r)
        r.attempt("close", r.close, lambda: None, patient=GRACE)


def run(r: Rank, world: cg.World | None) -> None:
    try:
        body(r, world)
        r.say("n/a", phase="end")
    except Exception as error:
        r.say("bare", phase="outside of any call", error=type(error).__name__, text=traceback.format_exc()[-1500:])


def handle(*_: Any) -> None:
    if HANDLER:
        HANDLER.pop()()


def run_rank(r: Rank) -> None:
    """A rank that is a process."""
    signal.signal(signal.SIGUSR1, handle)
    world, building = None, r.cell.what.builds
    if not r.cell.what.queue:
        world = cg.World.connect(f"file://{r.folder}/store", rank=r.me, world_size=RANKS, timeout=BUILDING if building else 15.0)
    run(r, world)
    if r.cell.misuse == "at exit":
        return
    if world is not None:
        world.close(timeout=timedelta(seconds=GRACE))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait_until_said(ranks: Sequence[Rank], phase: str) -> None:
    """Wait until ranks have said how a call ended, a little longer than their deadlines at the most."""
    until = time.monotonic() + max(rank.seconds for rank in ranks) + GRACE
    while time.monotonic() < until and not all(rank.has_said(phase) for rank in ranks):
        time.sleep(0.01)


def run_in_threads(cell: Cell, folder: Path) -> None:
    """All ranks, as threads of this process."""
    signal.signal(signal.SIGUSR1, handle)
    ranks: Sequence[Rank] = [Rank(cell, me, folder) for me in range(RANKS)]
    if cell.misuse != "at exit":
        spmd(lambda world: run(ranks[world.rank], world), RANKS, timeout=30)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    threading.Thread(target=lambda: spmd(lambda world: run(ranks[world.rank], world), RANKS, timeout=30), daemon=True).start()
    ranks[0].wait_for("in", "in 0", "in 2")
    time.sleep(0.05)
    # Once the call at exit, which is registered last and so runs first, has given the others their results: a thread that compares tensors
    # while the interpreter ends is aborted within torch.
    atexit.register(wait_until_said, [ranks[0], ranks[2]], "while a peer exits")
    atexit.register(ranks[WRONG].op, "at exit", 2)
