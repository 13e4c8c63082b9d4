"""Calls beside calls: on several threads, from within pickling, signal handlers and finalizers, and beside a context that leaves."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.assembly import Terms
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from commgraph.testing.spmd import ThreadStore
from tests.helpers import again_if_late, in_time, on, until, until_it_waits

Call = Callable[[GroupCoordinator], Any]
STRATEGIES = pytest.mark.parametrize("strategy", ["shm", "gloo", "tcp"])


def nodes_of(strategy: str) -> int:
    """How many hosts to simulate so that a group has the strategy."""
    return 2 if strategy == "tcp" else 1


LARGE = 3000  # elements: the buffer of such a tensor is sent beside the pickle


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def other(group: GroupCoordinator) -> int:
    return 1 - group.rank_in_group


# Every operation as the call of one rank of two, with the name under which it is refused.
COLLECTIVES: dict[str, tuple[str, Call]] = {
    "all_reduce": ("all_reduce", lambda g: g.all_reduce(torch.ones(8))),
    "all_reduce, strided": ("all_reduce", lambda g: g.all_reduce(torch.ones(8, 2).t())),
    "all_reduce, timeout": ("all_reduce", lambda g: g.all_reduce(torch.ones(8), timeout=20)),
    "all_reduce, gradient": ("all_reduce", lambda g: g.all_reduce(torch.ones(8, requires_grad=True))),
    "all_reduce, coalesced": ("all_reduce", lambda g: g.all_reduce([torch.ones(8)] * 2)),
    "all_reduce, no tensor": ("all_reduce", lambda g: g.all_reduce("x")),  # type: ignore[call-overload]  # wrong on purpose
    "all_reduce_": ("all_reduce_", lambda g: g.all_reduce_(torch.ones(8))),
    "all_reduce_async": ("all_reduce", lambda g: g.all_reduce_async(torch.ones(8)).wait()),
    "all_gather_async": ("all_gather", lambda g: g.all_gather_async(torch.ones(8)).wait()),
    "all_gather": ("all_gather", lambda g: g.all_gather(torch.ones(8))),
    "all_gather, out": ("all_gather", lambda g: g.all_gather(torch.ones(8), out=torch.empty(16))),
    "all_gatherv": ("all_gatherv", lambda g: g.all_gatherv(torch.ones(8))),
    "all_gatherv, list": ("all_gatherv", lambda g: g.all_gatherv([torch.ones(8)] * 2)),
    "reduce_scatter": ("reduce_scatter", lambda g: g.reduce_scatter(torch.ones(8))),
    "reduce_scatterv": ("reduce_scatterv", lambda g: g.reduce_scatterv(torch.ones(8), sizes=[3, 5])),
    "reduce": ("reduce", lambda g: g.reduce(torch.ones(8))),
    "gather": ("gather", lambda g: g.gather(torch.ones(8))),
    "scatter": ("scatter", lambda g: g.scatter(torch.ones(8) if g.is_first_rank else None)),
    "all_to_all": ("all_to_all", lambda g: g.all_to_all(torch.ones(8))),
    "broadcast": ("broadcast", lambda g: g.broadcast(torch.ones(8))),
    "barrier": ("barrier", lambda g: g.barrier()),
    "empty": ("empty", lambda g: g.empty(3, torch.float32)),
    "broadcast_object": ("broadcast_object", lambda g: g.broadcast_object(1, 1)),
    "broadcast_object_list": ("broadcast_object_list", lambda g: g.broadcast_object_list([1], 1)),
    "all_gather_object": ("all_gather_object", lambda g: g.all_gather_object(1)),
    "gather_object": ("gather_object", lambda g: g.gather_object(1)),
    "scatter_object": ("scatter_object", lambda g: g.scatter_object([1, 2], 1)),
    "broadcast_tensor_dict": ("broadcast_tensor_dict", lambda g: g.broadcast_tensor_dict({"a": torch.ones(3)}, 1)),
    "broadcast_tensor_dict, objects": ("broadcast_tensor_dict", lambda g: g.broadcast_tensor_dict({"a": torch.ones(3), "b": {1}}, 1)),
    "dispatch": ("dispatch", lambda g: g.dispatch(torch.ones(3, 4), torch.ones(3, 2))),
}
MESSAGES: dict[str, tuple[str, Call, Call]] = {
    "recv": ("recv", lambda g: g.recv(8, torch.float32, 1), lambda g: g.send(torch.ones(8), 0)),
    "recv, tag": ("recv", lambda g: g.recv(8, torch.float32, 1, tag=3), lambda g: g.send(torch.ones(8), 0, tag=3)),
    "recv, any": ("recv", lambda g: g.recv(8, torch.float32, cg.ANY), lambda g: g.send(torch.ones(8), 0)),
    "recv_object": ("recv_object", lambda g: g.recv_object(1), lambda g: g.send_object(1, 0)),
    "recv_tensor_dict": ("recv_tensor_dict", lambda g: g.recv_tensor_dict(1), lambda g: g.send_tensor_dict({"a": torch.ones(3)}, 0)),
}


def begun(call: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    """Make a call on another thread."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def waiting(call: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    """Make a call on another thread, which waits in it by the time that this returns."""
    thread, errors = begun(call)
    until_it_waits(thread)
    return thread, errors


@STRATEGIES
def test_a_second_collective_is_refused_and_leaves_no_trace(strategy: str) -> None:
    """Whichever call waits and whichever comes beside it: an error with all facts, the first one goes on, and the next ones match."""

    def body(group: GroupCoordinator) -> None:
        for name, (_, first) in COLLECTIVES.items():
            if name.endswith(("_async", "no tensor")):  # blocking calls wait for those that were begun
                continue
            if group.rank_in_group == 0:
                thread, errors = waiting(lambda: first(group))  # noqa: B023 - it ends before the next one
                for beside, (refused, second) in COLLECTIVES.items():
                    if not thread.is_alive():  # a root that sends does not wait
                        break
                    with pytest.raises(cg.ConcurrentCallError) as caught:
                        second(group)
                    assert (caught.value.group, caught.value.operation, caught.value.rank) == ("tp", refused, 0), (name, beside)
                    assert isinstance(caught.value, RuntimeError)
                group.send(torch.ones(1), 1)
                thread.join()
                assert not errors
            else:
                group.recv(1, torch.float32, 0)
                first(group)
            assert group.all_reduce(torch.ones(1)).item() == 2
        group.barrier()

    on(2, body, nodes=nodes_of(strategy), shm=strategy != "gloo")


@STRATEGIES
def test_a_second_receive_is_refused_and_loses_nothing(strategy: str) -> None:
    """Messages of other kinds go on meanwhile. Over gloo the tensors of a dict are messages without a tag."""
    alike = {"recv", "recv, any"} if strategy == "shm" else {"recv", "recv, any", "recv_tensor_dict"}

    def body(group: GroupCoordinator) -> None:
        for first, (refused, receive, send) in MESSAGES.items():
            same = alike if first in alike else {first}
            others = [pair for name, (_, *pair) in MESSAGES.items() if name not in same]
            if group.rank_in_group == 0:
                thread, errors = waiting(lambda: receive(group))  # noqa: B023 - it ends before the next one
                with pytest.raises(cg.ConcurrentCallError) as caught:
                    receive(group)
                assert (caught.value.group, caught.value.operation, caught.value.rank) == ("tp", refused, 0)
                for other_receive, _ in others:
                    other_receive(group)
                group.barrier()
                thread.join()
                assert not errors
            else:
                for _, other_send in others:
                    other_send(group)
                group.barrier()
                send(group)
        group.barrier()

    on(2, body, nodes=nodes_of(strategy), shm=strategy != "gloo")


RECEIVES: dict[str, tuple[Callable[[GroupCoordinator, int], Any], Call]] = {
    "recv": (lambda g, i: g.send(torch.tensor([i]), 1), lambda g: g.recv(1, torch.int64, 0).item()),
    "recv_object": (lambda g, i: g.send_object((i, torch.ones(LARGE)), 1), lambda g: g.recv_object(0)[0]),
    "recv_tensor_dict": (lambda g, i: g.send_tensor_dict({"i": i, "x": torch.ones(LARGE)}, 1), lambda g: g.recv_tensor_dict(0)["i"]),
    "recv_tensor_dict, objects": (
        lambda g, i: g.send_tensor_dict({"i": i, "x": torch.ones(LARGE), "s": {1}}, 1),
        lambda g: g.recv_tensor_dict(0)["i"],
    ),
    "broadcast_object": (lambda g, i: g.broadcast_object((i, torch.ones(LARGE))), lambda g: g.broadcast_object()[0]),
    "broadcast_tensor_dict": (
        lambda g, i: g.broadcast_tensor_dict({"i": i, "x": torch.ones(LARGE)}),
        lambda g: g.broadcast_tensor_dict()["i"],
    ),
    "broadcast_tensor_dict, objects": (
        lambda g, i: g.broadcast_tensor_dict({"i": i, "x": torch.ones(LARGE), "s": {1}}),
        lambda g: g.broadcast_tensor_dict()["i"],
    ),
}


class Receivers:
    """Two threads that receive `count` messages together; a call that is refused is made again."""

    def __init__(self, receive: Callable[[], int], count: int) -> None:
        self.receive = receive
        self.left = count
        self.got: list[int] = []
        self.refused = 0
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()

    def run(self) -> None:
        threads = [threading.Thread(target=self._loop) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors

    def _loop(self) -> None:
        while not self.errors:
            with self.lock:
                if not self.left:
                    return
                self.left -= 1
            try:
                self.got.append(self.receive())
            except cg.ConcurrentCallError:
                self.refused += 1
                with self.lock:
                    self.left += 1
                time.sleep(1e-4)
            except BaseException as error:
                self.errors.append(error)


@STRATEGIES
def test_two_threads_that_receive_lose_no_message(strategy: str) -> None:
    count = 150

    def body(group: GroupCoordinator) -> None:
        for send, receive in RECEIVES.values():
            if group.rank_in_group == 0:
                for i in range(count):
                    send(group, i)
            else:
                receivers = Receivers(lambda: receive(group), count)  # noqa: B023 - it ends before the next one
                receivers.run()
                assert sorted(receivers.got) == list(range(count))
            group.barrier()

    on(2, body, nodes=nodes_of(strategy), shm=strategy != "gloo")


@pytest.mark.parametrize("local", [1, 0], ids=["memory", "socket"])
def test_two_threads_that_dequeue_lose_no_message(local: int) -> None:
    count = 300
    with cg.MessageQueue.create(1, n_local_readers=local, address="127.0.0.1") as queue:
        reader = cg.MessageQueue.attach(queue.handle, 0)
        receivers = Receivers(lambda: reader.dequeue(20)[0], count)
        thread = threading.Thread(target=receivers.run)
        thread.start()
        for i in range(count):
            queue.enqueue((i, torch.ones(LARGE)))
        thread.join()
        assert sorted(receivers.got) == list(range(count))
        thread, errors = waiting(lambda: reader.dequeue(20))
        with pytest.raises(cg.ConcurrentCallError) as caught:
            reader.dequeue(20)
        assert (caught.value.group, caught.value.operation, caught.value.rank) == (queue.handle.name, "dequeue", 0)
        queue.enqueue(1)
        thread.join()
        assert not errors
        reader.close()


def test_two_threads_send_to_different_ranks() -> None:
    def body(group: GroupCoordinator) -> None:
        if group.rank_in_group == 0:
            threads = [threading.Thread(target=send, args=(group, dst)) for dst in (1, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for i in range(150):
                number, dst, x = group.recv_object(0)
                assert (number, dst) == (i, group.rank_in_group)
                assert bool((x == dst).all())
        group.barrier()

    def send(group: GroupCoordinator, dst: int) -> None:
        for i in range(150):
            group.send_object((i, dst, torch.full((LARGE,), dst)), dst)

    on(3, body)


class CallsIn:
    """An object that makes a call when it is pickled, unpickled, asked for an index or collected."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.error: BaseException | None = None

    def _call(self) -> None:
        try:
            self.call()
        except cg.CommGraphError as error:
            self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        self._call()
        return str, ("sent",)

    def __index__(self) -> int:
        self._call()
        return 0

    def __del__(self) -> None:
        self._call()


def test_pickling_that_sends_works() -> None:
    def body(group: GroupCoordinator) -> None:
        for i in range(20):
            if group.rank_in_group == 0:
                inner = CallsIn(lambda: group.send_object(("inner", torch.ones(LARGE)), 1))
                group.send_object([i, inner, torch.full((LARGE,), i)], 1)
                inner.call = lambda: None
                assert inner.error is None
            else:
                assert group.recv_object(0)[0] == "inner"
                number, text, x = group.recv_object(0)
                assert (number, text, x[0].item()) == (i, "sent", i)
        group.barrier()

    on(2, body)


def test_pickling_that_makes_a_collective_is_refused() -> None:
    calls: tuple[Callable[[GroupCoordinator, Any], Any], ...] = (
        lambda g, obj: g.broadcast_object(obj),
        lambda g, obj: g.broadcast_tensor_dict({"a": obj, "x": torch.ones(3)}),
        lambda g, obj: g.all_gather_object(obj),
        lambda g, obj: g.gather_object(obj),
        lambda g, obj: g.scatter_object([0, obj]),
    )

    def body(group: GroupCoordinator) -> None:
        for call in calls:
            inner = CallsIn(lambda: group.all_reduce(torch.ones(2)))
            call(group, inner if group.rank_in_group == 0 else None)
            inner.call = lambda: None
            if group.rank_in_group == 0:
                assert isinstance(inner.error, cg.ConcurrentCallError)
                assert inner.error.operation == "all_reduce"
            assert group.all_reduce(torch.ones(1)).item() == 2

    on(2, body)


class Unpickled:
    """Calls back when it is unpickled; `call` is set for the threads of a rank."""

    here = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpickled.make, ()

    @staticmethod
    def make() -> Any:
        call: Callable[[], Any] = Unpickled.here.call
        return call()


def test_unpickling_and_arguments_that_call_in() -> None:
    """Unpickling comes after the call, so that calls in it work; `__index__` comes within, and its call is refused."""

    def body(group: GroupCoordinator) -> None:
        Unpickled.here.call = lambda: group.recv_object(0)
        if group.rank_in_group == 0:
            group.send_object(Unpickled(), 1)
            group.send_object("next", 1)
            group.broadcast_object([Unpickled()])
            group.send_object("last", 1)
        else:
            assert group.recv_object(0) == "next"
            assert group.broadcast_object() == ["last"]
        src = CallsIn(group.barrier)
        assert group.broadcast(torch.ones(2), src).tolist() == [1, 1]  # type: ignore[arg-type, call-overload]  # an index is an int
        src.call = lambda: None
        assert isinstance(src.error, cg.ConcurrentCallError)
        group.barrier()

    on(2, body)


class Drops:
    """Drops the last reference to an object while it is pickled."""

    def __init__(self, victim: object) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        self.victim = None
        return str, ("sent",)


def test_finalizers_that_call_in() -> None:
    """A `__del__` and a callback of a weak reference run within a call, and their calls are refused."""

    def body(group: GroupCoordinator) -> None:
        errors: list[type[BaseException]] = []

        def call(reference: object = None) -> None:
            try:
                group.barrier(timeout=5)
            except cg.CommGraphError as error:
                errors.append(type(error))  # the error itself would keep the frames, and with them the object

        victim = CallsIn(call)
        reference = weakref.ref(victim, call)
        drops = Drops(victim)
        del victim
        assert group.all_gather_object(drops) == [drops if rank == group.rank_in_group else "sent" for rank in range(2)]
        assert reference() is None
        assert errors == [cg.ConcurrentCallError] * 2
        assert group.all_reduce(torch.ones(1)).item() == 2

    on(2, body)


# A call that waits, what is called within it, and what ends the wait on the other rank.
SIGNALS: tuple[tuple[Call, tuple[Call, ...], Call], ...] = (
    (
        lambda g: g.all_reduce(torch.ones(2)),
        (lambda g: g.barrier(), lambda g: g.all_reduce(torch.ones(2, 2).t()), lambda g: g.broadcast_object(1)),
        lambda g: g.all_reduce(torch.ones(2)),
    ),
    (
        lambda g: g.all_gather_object(1),
        (lambda g: g.barrier(), lambda g: g.gather_object(1), lambda g: g.broadcast_tensor_dict({})),
        lambda g: g.all_gather_object(1),
    ),
    (lambda g: g.recv_object(1), (lambda g: g.recv_object(1),), lambda g: g.send_object(1, 0)),
    (lambda g: g.recv_tensor_dict(1), (lambda g: g.recv_tensor_dict(1),), lambda g: g.send_tensor_dict({"a": torch.ones(2)}, 0)),
    (lambda g: g.recv(2, torch.float32, 1), (lambda g: g.recv(2, torch.float32, 1),), lambda g: g.send(torch.ones(2), 0)),
)


@STRATEGIES
def test_a_signal_handler_that_calls_in_is_refused(strategy: str) -> None:
    """The handler runs within a call of this very thread: its calls of the group raise, and the call around them goes on."""
    store, main = ThreadStore(), threading.get_ident()
    within: list[Callable[[], Any]] = []
    errors: list[BaseException] = []

    def handle(number: int, frame: Any) -> None:
        for call in within:
            try:
                call()
            except cg.CommGraphError as error:
                errors.append(error)

    def run(rank: int) -> None:
        label = f"node {rank}" if nodes_of(strategy) > 1 else ""
        options = cg.CommunicatorOptions(shm=strategy != "gloo")
        with cg.World._make(store, rank, 2, Terms(timeout=timedelta(seconds=20), label=label)) as world:
            group = world.context(cg.Layout(2, tp=2), name="a", options=options).tp
            for wait, calls, end in SIGNALS:
                if rank == 0:
                    within[:] = [functools.partial(call, group) for call in calls]
                    group.barrier()
                    wait(group)
                    assert [type(error) for error in errors] == [cg.ConcurrentCallError] * len(calls)
                    errors.clear()
                else:
                    group.barrier()
                    until_it_waits(threading.main_thread())
                    signal.pthread_kill(main, signal.SIGUSR1)
                    until(lambda: len(errors) == len(calls))  # noqa: B023 - it ends before the next one
                    end(group)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        thread, failed = waiting(lambda: run(1))
        run(0)
        thread.join()
        assert not failed
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_that_dequeues_is_refused() -> None:
    errors: list[BaseException] = []
    dequeues = threading.Event()
    with cg.MessageQueue.create(1) as queue, cg.MessageQueue.attach(queue.handle, 0) as reader:

        def handle(number: int, frame: Any) -> None:
            try:
                reader.dequeue(20)
            except cg.ConcurrentCallError as error:
                errors.append(error)

        def write() -> None:
            queue.enqueue(0)
            dequeues.wait(20)
            until_it_waits(threading.main_thread())
            signal.pthread_kill(main, signal.SIGUSR1)
            until(lambda: errors)
            queue.enqueue(1)

        main, before = threading.get_ident(), signal.signal(signal.SIGUSR1, handle)
        try:
            thread, failed = waiting(write)
            dequeues.set()
            assert [reader.dequeue(20), reader.dequeue(20)] == [0, 1]
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert len(errors) == 1
    assert not failed


def in_turn(*calls: Call) -> Call:
    return lambda group: [call(group) for call in calls]


BESIDE: dict[str, Call] = {
    **{name: call for name, (_, call) in COLLECTIVES.items() if name not in ("all_reduce, no tensor", "empty")},
    "sendrecv": lambda g: g.sendrecv(torch.ones(8), other(g), 8, torch.float32, other(g)),
    "send, recv": in_turn(lambda g: g.send(torch.ones(8), other(g)), lambda g: g.recv(8, torch.float32, other(g))),
    "send, recv any": in_turn(lambda g: g.send(torch.ones(8), other(g), tag=2), lambda g: g.recv(8, torch.float32, cg.ANY, tag=2)),
    "objects": in_turn(lambda g: g.send_object(1, other(g)), lambda g: g.recv_object(other(g))),
    "dicts": in_turn(lambda g: g.send_tensor_dict({"a": torch.ones(3)}, other(g)), lambda g: g.recv_tensor_dict(other(g))),
    "facts": lambda g: (
        g.bytes_sent,
        g.communicators,
        g.refused,
        g.is_broken,
        g.siblings,
        repr(g),
        *(g.communicator(name).describe() for name in dict.fromkeys(sum(g.communicators.values(), ()))),
    ),
}


@STRATEGIES
def test_a_context_leaves_beside_calls(strategy: str) -> None:
    """It is left by an exception while another thread calls in a loop: every call ends with its result or a public error.

    Over gloo a call that is posted in the very moment in which both sides leave may wait in torch until its deadline.
    """
    ends = (cg.ContextClosedError, cg.PeerLostError, *((cg.CollectiveTimeoutError,) if strategy == "gloo" else ()))
    options = cg.CommunicatorOptions(host_timeout=timedelta(seconds=5), shm=strategy != "gloo")

    def body(world: cg.World) -> None:
        for number, (name, call) in enumerate(BESIDE.items()):
            left = False

            def loop() -> None:
                while not left:  # noqa: B023 - it ends before the next one
                    call(context.tp)  # noqa: B023

            with contextlib.suppress(KeyError), world.context(cg.Layout(2, tp=2), name=name, options=options) as context:
                thread, errors = begun(loop)
                time.sleep(0.05 + 0.001 * (number % 5))
                raise KeyError
            left = True
            thread.join()
            assert all(isinstance(error, ends) for error in errors), (name, errors)

    spmd(body, 2, nodes=nodes_of(strategy))


@STRATEGIES
@pytest.mark.parametrize("first", [0, 1], ids=["where it waits", "elsewhere"])
@again_if_late
def test_close_ends_a_call_that_waits(strategy: str, first: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever rank closes first: the call ends in ContextClosedError, and both close within seconds."""
    waits: dict[str, Call] = {
        "all_reduce": COLLECTIVES["all_reduce"][1],
        "all_reduce, strided": COLLECTIVES["all_reduce, strided"][1],
        "gather_object": lambda g: g.gather_object(1),
        "broadcast_object": lambda g: g.broadcast_object(1, 1),
        "recv": lambda g: g.recv(8, torch.float32, 1),
        "recv_object": lambda g: g.recv_object(1),
    }

    def body(world: cg.World) -> None:
        for name, wait in waits.items():
            context = world.context(cg.Layout(2, tp=2), name=name, options=cg.CommunicatorOptions(shm=strategy != "gloo"))
            thread, errors = waiting(lambda: wait(context.tp) if world.rank == 0 else None)  # noqa: B023 - it ends before the next one
            world.group.barrier()
            time.sleep(0.1 if world.rank != first else 0)
            began = time.monotonic()
            context.close()
            assert context.closed
            in_time(time.monotonic() - began, 3)
            thread.join()
            assert [type(error) for error in errors] == [cg.ContextClosedError] * (world.rank == 0), (name, errors)

    spmd(body, 2, nodes=nodes_of(strategy))


def test_two_threads_close() -> None:
    def body(world: cg.World) -> None:
        context = world.context(cg.Layout(2, tp=2), name="a")
        threads = [waiting(context.close) for _ in range(3)]
        for thread, errors in threads:
            thread.join()
            assert not errors
        assert context.closed

    spmd(body, 2)
