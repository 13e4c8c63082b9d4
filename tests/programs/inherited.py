"""Rank 0 forks children that use and drop everything that they inherit from it; then parent and peers go on. Argument: "shm" or "gloo"."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import commgraph as cg

X = torch.arange(6.0)


def forked(body: Callable[[], Any]) -> str:
    """Return what `body` said in a forked child, or how the child ended."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writable, str(body()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return said if status == 0 else f"{said} status {status}"


def refusals(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Return what each call did that did not raise the public error."""
    wrong = {}
    for name, call in calls.items():
        try:
            wrong[name] = f"returned {call()!r}"
        except cg.ContextClosedError as error:
            if "forked child" not in str(error):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


def calls_of(g: cg.GroupCoordinator) -> dict[str, Callable[[], Any]]:
    return {
        "all_reduce": lambda: g.all_reduce(X),
        "all_reduce, strided": lambda: g.all_reduce(X.view(2, 3).t()),
        "all_reduce, timeout": lambda: g.all_reduce(X, timeout=1),
        "all_reduce, list": lambda: g.all_reduce([X, X]),
        "all_reduce, gradient": lambda: g.all_reduce(X.clone().requires_grad_()),
        "all_reduce_": lambda: g.all_reduce_(X.clone()),
        "all_reduce_async": lambda: g.all_reduce_async(X).wait(),
        "reduce": lambda: g.reduce(X),
        "reduce_scatter": lambda: g.reduce_scatter(X),
        "all_gather": lambda: g.all_gather(X),
        "all_gather_async": lambda: g.all_gather_async(X).wait(),
        "all_gatherv": lambda: g.all_gatherv(X),
        "gather": lambda: g.gather(X),
        "scatter": lambda: g.scatter(X),
        "all_to_all": lambda: g.all_to_all(X),
        "broadcast": lambda: g.broadcast(X.clone()),
        "barrier": g.barrier,
        "barrier_async": lambda: g.barrier_async().wait(),
        "send": lambda: g.send(X, 1),
        "recv": lambda: g.recv(6, torch.float32, 1),
        "recv, any": lambda: g.recv(6, torch.float32, cg.ANY),
        "isend": lambda: g.isend(X, 1).wait(),
        "irecv": lambda: g.irecv(6, torch.float32, 1).wait(),
        "isend to itself": lambda: g.isend(X, 0).wait(),
        "sendrecv": lambda: g.sendrecv(X, 1, 6, torch.float32, 1),
        "batch": lambda: g.batch([cg.Send(X, 1)]).wait(),
        "send_object": lambda: g.send_object(1, 1),
        "recv_object": lambda: g.recv_object(1),
        "isend_object": lambda: g.isend_object(1, 1).wait(),
        "broadcast_object": lambda: g.broadcast_object(1),
        "broadcast_object_list": lambda: g.broadcast_object_list([1]),
        "all_gather_object": lambda: g.all_gather_object(1),
        "gather_object": lambda: g.gather_object(1),
        "scatter_object": lambda: g.scatter_object([1, 2]),
        "send_tensor_dict": lambda: g.send_tensor_dict({"x": X}, 1),
        "recv_tensor_dict": lambda: g.recv_tensor_dict(1),
        "broadcast_tensor_dict": lambda: g.broadcast_tensor_dict({"x": X}),
        "isend_tensor_dict": lambda: g.isend_tensor_dict({"x": X}, 1).wait(),
        "dispatch": lambda: g.dispatch(X.view(6, 1), X.view(6, 1)),
        "empty": lambda: g.empty(6, torch.float32),
        "sibling": lambda: g.sibling("again"),
        "torch_group": lambda: g.torch_group("cpu"),
        "warmup": g.warmup,
    }


def main() -> None:
    options = cg.CommunicatorOptions(shm=sys.argv[1] == "shm")
    world = cg.World.from_env()
    ctx = world.context(cg.Layout(2, tp=2), name="a", options=options)
    other = ctx.tp.sibling("other")
    queue = cg.MessageQueue.create(1) if world.rank == 0 else None
    handle = world.group.broadcast_object(None if queue is None else queue.handle)
    if queue is None:
        with cg.MessageQueue.attach(handle, 0) as reader:
            peer(world, ctx, other, reader)
    else:
        queue.wait_until_ready(20)
        with queue:
            parent(world, ctx, other, queue)
    world.close()
    print("done", world.rank, flush=True)


def goes_on(world: cg.World, ctx: cg.ParallelContext, other: cg.GroupCoordinator) -> None:
    for group in (world.group, ctx.tp, other):
        assert torch.equal(group.all_reduce(X), 2 * X)
        assert group.all_gather_object(group.rank) == [0, 1]


def peer(world: cg.World, ctx: cg.ParallelContext, other: cg.GroupCoordinator, reader: cg.MessageQueue) -> None:
    while (number := reader.dequeue(60)) >= 0:
        if number == 1:
            other.all_reduce(X[:3])
        ctx.tp.send(X, 0)
        goes_on(world, ctx, other)
        ctx.tp.send_object(number, 0)


def parent(world: cg.World, ctx: cg.ParallelContext, other: cg.GroupCoordinator, queue: cg.MessageQueue) -> None:
    pending = [ctx.tp.irecv(6, torch.float32, 1)]
    numbers = iter(range(1000))

    def go_on(what: str) -> None:
        print(what, flush=True)
        number = next(numbers)
        queue.enqueue(number)
        assert torch.equal(pending.pop().wait(20), X)
        goes_on(world, ctx, other)
        assert ctx.tp.recv_object(1, timeout=20) == number
        pending.append(ctx.tp.irecv(6, torch.float32, 1))

    go_on("before")
    half = other.all_reduce_async(X[:3])  # has sent what the peer needs, and is not at its end
    calls: dict[str, Callable[[], Any]] = {
        **{f"tp.{name}": call for name, call in calls_of(ctx.tp).items()},
        **{f"world.group.{name}": call for name, call in calls_of(world.group).items()},
        **{f"sibling.{name}": call for name, call in calls_of(other).items()},
        "one rank": lambda: ctx.pp.all_reduce(X),
        "one rank, object": lambda: ctx.pp.all_gather_object(1),
        "context": lambda: world.context(cg.Layout(2), name="b"),
        "split": lambda: world.split([0, 1]),
        "split_by": lambda: world.split_by(1),
        "graph_capture": lambda: ctx.graph_capture().__enter__(),
        "enqueue": lambda: queue.enqueue(1),
        "wait_until_ready": lambda: queue.wait_until_ready(1),
        "work": lambda: pending[0].wait(1),
        "work, whether it has ended": lambda: bool(pending[0].is_completed()),
        "half done work": half.wait,
    }
    said = forked(lambda: refusals(calls))
    assert said == "{}", said
    del calls["half done work"]  # once it has ended its result is at hand in a child, too
    queue.enqueue(next(numbers))
    half.wait(20)
    assert torch.equal(pending.pop().wait(20), X)
    goes_on(world, ctx, other)
    ctx.tp.recv_object(1)
    pending.append(ctx.tp.irecv(6, torch.float32, 1))

    def close_all() -> str:
        for one in (queue, other, ctx.tp, world.group):
            one.close()
        ctx.close()
        world.close()
        with ctx, world, queue:
            pass
        return f"{ctx.closed} {world.closed} {queue.closed}"

    assert forked(close_all) == "True True True"
    go_on("closed")

    def collect() -> str:
        pending.clear()
        calls.clear()
        gc.collect()
        return "collected"

    assert forked(collect) == "collected"
    go_on("collected")
    grandchildren = forked(lambda: forked(lambda: refusals(calls)))
    assert grandchildren == "{}", grandchildren

    def alone() -> str:
        with cg.World.from_env({}) as mine, cg.MessageQueue.create(1) as writer, cg.MessageQueue.attach(writer.handle, 0) as reader:
            writer.enqueue(7)
            ctx = mine.context(cg.Layout(1), name="a")
            return f"{reader.dequeue(20)} {float(ctx.tp.all_reduce(X).sum())}"

    assert forked(alone) == "7 15.0"
    go_on("worlds of its own")
    for body in (lambda: refusals(calls), close_all):
        child = multiprocessing.get_context("fork").Process(target=body)
        child.start()
        child.join(60)
        assert child.exitcode == 0, child.exitcode
        go_on("multiprocessing")
    # A child that ends as a program does, by the exit handlers of the interpreter.
    if (pid := os.fork()) == 0:
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    go_on("exit")
    queue.enqueue(-1)


if __name__ == "__main__":
    main()
