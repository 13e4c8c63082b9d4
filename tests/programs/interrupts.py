"""Interrupt the main thread in an operation that waits, for every operation that waits, and print how soon the wait ended.

Two programs are started for each KIND: ``interrupts.py KIND 0 FILE`` waits, and ``interrupts.py KIND 1 FILE`` builds what the other one
builds and then does not come. KIND is ``shm`` or ``gloo``, operations over these; ``builds``; or ``alone``, which needs no second one.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.communicators import gloo_transport

LONG = timedelta(seconds=60)
# Seconds after which the signal comes.
AFTER = 0.05


def connected(method: str, rank: int) -> cg.World:
    return cg.World.connect(method, rank=rank, world_size=2, timeout=LONG)


# Waits before there is a world. They are given a fresh file and a free port.


def connect_client(path: str, port: int) -> None:
    connected(f"tcp://127.0.0.1:{port}", 1)


def connect_server(path: str, port: int) -> None:
    connected(f"tcp://127.0.0.1:{port}", 0)


def connect_file(path: str, port: int) -> None:
    connected(f"file://{path}", 0)


def from_store_tcp(path: str, port: int) -> None:
    cg.World.from_store(dist.TCPStore("127.0.0.1", port, 2, True, timeout=LONG, wait_for_workers=False), rank=0, world_size=2)


def from_store_file(path: str, port: int) -> None:
    cg.World.from_store(dist.FileStore(path, 2), rank=0, world_size=2)


def from_store_hash(path: str, port: int) -> None:
    cg.World.from_store(dist.HashStore(), rank=0, world_size=2)


def from_env(path: str, port: int) -> None:
    cg.World.from_env({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def from_env_file(path: str, port: int) -> None:
    cg.World.from_env({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, init_method=f"file://{path}")


MEETINGS = (connect_client, connect_server, connect_file, from_store_tcp, from_store_file, from_store_hash, from_env, from_env_file)

# Waits of a queue, given both its sides, and how the queue is made.


def queue_ready(queue: cg.MessageQueue, reader: None) -> None:
    queue.wait_until_ready(60)


def queue_dequeue(queue: cg.MessageQueue, reader: cg.MessageQueue) -> None:
    reader.dequeue(timeout=60)


def queue_enqueue(queue: cg.MessageQueue, reader: cg.MessageQueue) -> None:
    for _ in range(100):
        queue.enqueue(bytes(4000), timeout=60)


def queue_remote(queue: cg.MessageQueue, reader: cg.MessageQueue) -> None:
    reader.dequeue(timeout=60)


QUEUES: dict[Callable[[Any, Any], None], dict[str, Any]] = {
    queue_ready: {},
    queue_dequeue: {},
    queue_enqueue: {"chunk_bytes": 4096, "chunks": 2},
    queue_remote: {"n_local_readers": 0, "address": "127.0.0.1", "authkey": b"k" * 32},
}

# Builds in a world that has met.


def build_context(world: cg.World) -> None:
    world.context(cg.Layout(2, tp=2), name="other")


def build_split(world: cg.World) -> None:
    world.split([0, 1])


def build_split_by(world: cg.World) -> None:
    world.split_by(1)


def close_world(world: cg.World) -> None:
    world.close(timeout=60)


# The last one breaks the group of the world.
BUILDS = (build_context, build_split, build_split_by, close_world)

# Operations of a group.
BIG = 4 << 20


def sibling(ctx: cg.ParallelContext) -> None:
    ctx.tp.sibling("other")


def close_context(ctx: cg.ParallelContext) -> None:
    ctx.close(timeout=60)


def empty(ctx: cg.ParallelContext) -> None:
    ctx.tp.empty([4096], torch.float32)


def warmup(ctx: cg.ParallelContext) -> None:
    ctx.warmup()


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "all_reduce": lambda g: g.all_reduce(torch.ones(4)),
    "all_reduce_": lambda g: g.all_reduce_(torch.ones(BIG)),
    "all_reduce_list": lambda g: g.all_reduce([torch.ones(4), torch.ones(5)]),
    "all_gather": lambda g: g.all_gather(torch.ones(4)),
    "reduce_scatter": lambda g: g.reduce_scatter(torch.ones(4)),
    "all_to_all": lambda g: g.all_to_all(torch.ones(4)),
    "gather": lambda g: g.gather(torch.ones(4)),
    "scatter": lambda g: g.scatter(None, src=1, sizes=None),
    "reduce": lambda g: g.reduce(torch.ones(4)),
    "broadcast": lambda g: g.broadcast(torch.ones(4), src=1),
    "barrier": lambda g: g.barrier(),
    "dispatch": lambda g: g.dispatch(torch.ones(4, 4), torch.ones(4, 2)),
    "send": lambda g: g.send(torch.ones(BIG), dst=1),
    "recv": lambda g: g.recv([4], torch.float32, src=1),
    "recv_any": lambda g: g.recv([4], torch.float32, src=cg.ANY),
    "recv_tag": lambda g: g.recv([4], torch.float32, src=1, tag=3),
    "sendrecv": lambda g: g.sendrecv(torch.ones(4), 1, [4], torch.float32, 1),
    "send_object": lambda g: g.send_object(bytes(4 * BIG), 1),
    "recv_object": lambda g: g.recv_object(1),
    "broadcast_object": lambda g: g.broadcast_object(None, src=1),
    "broadcast_object_src": lambda g: [g.broadcast_object(bytes(BIG), src=0) for _ in range(8)],
    "all_gather_object": lambda g: g.all_gather_object(1),
    "gather_object": lambda g: g.gather_object(1),
    "scatter_object": lambda g: g.scatter_object(None, src=1),
    "recv_tensor_dict": lambda g: g.recv_tensor_dict(1),
    "send_tensor_dict": lambda g: g.send_tensor_dict({"a": torch.ones(BIG)}, 1),
    "broadcast_tensor_dict": lambda g: g.broadcast_tensor_dict(None, src=1),
    "irecv": lambda g: g.irecv([4], torch.float32, src=1).wait(),
    "irecv_timeout": lambda g: g.irecv([4], torch.float32, src=1).wait(timeout=60),
    "isend": lambda g: g.isend(torch.ones(BIG), dst=1).wait(),
    "irecv_object": lambda g: g.irecv_object(1).wait(),
    "batch": lambda g: g.batch([cg.Recv(torch.ones(4), 1)]).wait(),
    "all_reduce_async": lambda g: g.all_reduce_async(torch.ones(4)).wait(),
    "all_reduce_async_big": lambda g: g.all_reduce_async(torch.ones(BIG)).wait(),
    "barrier_async": lambda g: g.barrier_async().wait(),
    "after_begun": lambda g: (g.all_reduce_async(torch.ones(BIG)), g.barrier()),
    "irecv_tensor_dict": lambda g: g.irecv_tensor_dict(1).wait(),
    "checked": lambda g: g.all_reduce(torch.ones(4)),
}
# After these the context is closed as if nothing had happened.
CLOSED = frozenset({"all_reduce", "send", "recv_object", "irecv", "sibling", "close_context"})
ON_CONTEXT = (sibling, close_context, empty, warmup)


# The cells.


class InterruptError(BaseException):
    """Raised by the handler of a signal, as KeyboardInterrupt is."""


def interrupt(*_: object) -> None:
    raise InterruptError


def measured(act: Callable[[], object]) -> dict[str, Any]:
    """Call what waits; return how many seconds after the signal its handler has ended the wait."""
    due = time.monotonic() + AFTER
    signal.setitimer(signal.ITIMER_REAL, AFTER)
    try:
        act()
    except InterruptError:
        return {"seconds": round(time.monotonic() - due, 3)}
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"failed": "did not wait"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def options_of(kind: str, name: str) -> cg.CommunicatorOptions:
    return cg.CommunicatorOptions(shm=kind == "shm", host_timeout=LONG, check=name == "checked")


def names(kind: str) -> list[str]:
    return [*OPERATIONS, *(one.__name__ for one in ON_CONTEXT if one is not empty or kind == "shm")]


def say(kind: str, name: str, found: dict[str, Any]) -> None:
    print(json.dumps({"kind": kind, "name": name} | found), flush=True)


def wait_alone(path: str) -> None:
    for one in MEETINGS:
        say("alone", one.__name__, measured(partial(one, f"{path}-{one.__name__}", free_port())))
    for wait, made in QUEUES.items():
        queue = cg.MessageQueue.create(1, **made)
        # Without a reader nobody is ready.
        reader = None if wait is queue_ready else cg.MessageQueue.attach(queue.handle, 0, authkey=made.get("authkey"))
        say("alone", wait.__name__, measured(partial(wait, queue, reader)))
        for side in (reader, queue):
            if side is not None:
                side.close(timeout=0)


def wait_in_operations(world: cg.World, kind: str) -> None:
    for name in names(kind):
        ctx = world.context(cg.Layout(2, tp=2), name=f"{kind} {name}", options=options_of(kind, name))
        ctx.tp.barrier()
        if name in OPERATIONS:
            found = measured(partial(OPERATIONS[name], ctx.tp))
        else:
            found = measured(partial(next(one for one in ON_CONTEXT if one.__name__ == name), ctx))
        began = time.monotonic()
        if name in CLOSED:
            ctx.close(timeout=0.2)
        else:
            ctx._drop()  # as `with` does where an exception leaves it
        say(kind, name, found | {"closed": round(time.monotonic() - began, 3)})
        world.store.set(f"done {kind} {name}", "")


def wait_in_builds(world: cg.World) -> None:
    say("build", "connecting", measured(lambda: world.context(cg.Layout(2, tp=2), name="a", options=options_of("gloo", ""))))
    for build in BUILDS:
        say("build", build.__name__, measured(partial(build, world)))
    began = time.monotonic()
    world.close(timeout=0.2)
    say("close", "world", {"seconds": 0, "closed": round(time.monotonic() - began, 3)})
    # The threads of waits that were left behind are daemons, which must not hold up the end.


def stay_away(world: cg.World, kind: str) -> None:
    """Be rank 1, which builds what rank 0 builds, and then does not come."""
    if kind == "builds":
        # It comes, and never connects.
        gloo_transport.GlooTransport.__init__ = lambda *_, **__: time.sleep(600)  # type: ignore[method-assign]
        world.context(cg.Layout(2, tp=2), name="a", options=options_of("gloo", ""))
    for name in names(kind):
        ctx = world.context(cg.Layout(2, tp=2), name=f"{kind} {name}", options=options_of(kind, name))
        ctx.tp.barrier()
        world.store.wait([f"done {kind} {name}"], LONG)
        ctx._drop()


def main() -> None:
    kind, rank, path = sys.argv[1:]
    signal.signal(signal.SIGALRM, interrupt)
    if kind == "alone":
        return wait_alone(path)
    world = connected(f"file://{path}", int(rank))
    if rank == "1":
        return stay_away(world, kind)
    return wait_in_builds(world) if kind == "builds" else wait_in_operations(world, kind)


if __name__ == "__main__":
    main()
