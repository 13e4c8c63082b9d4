"""Every public operation as the misuse matrix calls it: how a rank calls it, and what the rank must get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from commgraph import ANY, Layout, Recv, Send

RANKS, WRONG = 3, 1


@attrs.frozen
class Args:
    """What one rank gives to one call.

    `x` has values of its rank and of the round, so that a result of another call is not taken for the right one. `odd`: its shape is
    not that of the other ranks. `given`: x, made before.
    """

    me: int
    root: int
    round: int = 1
    shape: tuple[int, ...] = (6, 12)
    dtype: torch.dtype = torch.float32
    dim: int = 0
    odd: bool = False
    given: torch.Tensor | None = None

    @property
    def x(self) -> torch.Tensor:
        if self.given is not None:
            return self.given
        x = torch.arange(torch.Size(self.shape).numel()).remainder_(50).add_(10 * self.me + 100 * self.round)
        return x.to(self.dtype).reshape(self.shape)

    @property
    def obj(self) -> Any:
        x = self.x
        return {"rank": self.me, "round": self.round, "x": x, "blob": b"b" * x.numel()}

    @property
    def tree(self) -> dict[str, Any]:
        return {"x": self.x, "in": {"y": self.x * 2, "rank": self.me}, "round": self.round}


Call = Callable[[Any, Args], Any]
Want = Callable[[int, Sequence[Args]], Any]


@attrs.frozen
class Operation:
    """One public operation.

    Attributes:
        call: has a rank call it, on a coordinator or a queue.
        want: what a rank must get, given what all ranks gave; raises where nothing would be right.
        takes: which misuses of arguments it knows: d(type), s(hape), m (dim), r(oot or peer).
        root: of rank 1, and the wrong one.
        sends: objects, in which a `__reduce__` of the user's can run.
        idle: the rank that has no part in it.
        builds: communicators: the deadline of each call is that of the world.
    """

    call: Call
    want: Want
    takes: str = ""
    root: tuple[int, int] = (0, 2)
    sends: bool = False
    queue: bool = False
    idle: int | None = None
    builds: bool = False


def total(w: Sequence[Args]) -> torch.Tensor:
    xs = [a.x for a in w]
    assert len({(x.shape, x.dtype) for x in xs}) == 1
    return torch.stack(xs).sum(0, dtype=xs[0].dtype)


def joined(w: Sequence[Args], dim: int) -> torch.Tensor:
    assert len({a.dtype for a in w}) == 1
    return torch.cat([a.x for a in w], dim)


def part(x: torch.Tensor, me: int, dim: int) -> torch.Tensor:
    cut: torch.Tensor = x.chunk(RANKS, dim)[me]
    return cut


def sizes(a: Args) -> list[int]:
    """Uneven pieces of x along dim."""
    whole = a.shape[a.dim] if abs(a.dim) < len(a.shape) else 6
    return [1, 2, whole - 3] if whole >= 3 else [0, 0, whole]


def of_root(me: int, w: Sequence[Args]) -> torch.Tensor:
    """x of the root, which every rank must have expected."""
    assert (w[me].shape, w[me].dtype) == (w[w[me].root].shape, w[w[me].root].dtype)
    return w[w[me].root].x


def piece(x: torch.Tensor, me: int, extents: Sequence[int], dim: int) -> torch.Tensor:
    cut: torch.Tensor = x.split(list(extents), dim)[me]
    return cut


def exchanged(me: int, w: Sequence[Args]) -> torch.Tensor:
    assert len({(a.dtype, a.shape) for a in w}) == 1
    return torch.cat([part(a.x, me, a.dim) for a in w], w[me].dim)


def waits(call: Call) -> Call:
    return lambda g, a: call(g, a).wait()


def nothing(me: int, w: Sequence[Args]) -> None:
    return None


# From rank to rank. In "send" rank 1 sends to 2, in "recv" it receives from 0; the third rank has no part.


def sending(send: Call, recv: Call) -> Call:
    return lambda g, a: send(g, a) if a.me == WRONG else recv(g, attrs.evolve(a, root=WRONG)) if a.me == 2 else None


def receiving(send: Call, recv: Call) -> Call:
    return lambda g, a: recv(g, a) if a.me == WRONG else send(g, attrs.evolve(a, root=WRONG)) if a.me == 0 else None


def sent(of: Callable[[Args], Any], *, expected: bool) -> Want:
    """What the receiver of a "send" gets; `expected`: it says itself what comes."""

    def want(me: int, w: Sequence[Args]) -> Any:
        if me != 2:
            return None
        assert not expected or (w[2].shape, w[2].dtype) == (w[1].shape, w[1].dtype)
        return of(w[1])

    return want


def received(of: Callable[[Args], Any], *, expected: bool) -> Want:
    """What rank 1 gets in a "recv"."""

    def want(me: int, w: Sequence[Args]) -> Any:
        if me != WRONG:
            return None
        assert not expected or (w[0].shape, w[0].dtype) == (w[1].shape, w[1].dtype)
        return of(w[0])

    return want


def ring(call: Callable[[Any, Args, int, int], Any]) -> Call:
    """Every rank sends to the next one and receives from the one before; a wrong root is a wrong next one."""
    return lambda g, a: call(g, a, a.root if a.root > 2 or (a.me, a.root) == (WRONG, 0) else (a.me + 1) % RANKS, (a.me - 1) % RANKS)


def from_before(me: int, w: Sequence[Args]) -> torch.Tensor:
    before = (me - 1) % RANKS
    assert (w[me].shape, w[me].dtype) == (w[before].shape, w[before].dtype)
    return w[before].x


def in_batch(g: Any, a: Args, dst: int, src: int) -> Any:
    return g.batch([Send(a.x, dst), Recv(torch.empty(a.shape, dtype=a.dtype), src)]).wait()[1]


def combined(g: Any, a: Args) -> Any:
    x = Args(a.me, 0, a.round).x if a.given is None else a.given
    dispatched = g.dispatch(x, x[:, :4], sizes="equal")
    rows = dispatched[0]
    return g.combine((rows[1:] if a.odd else rows).to(a.dtype), dispatched)


def wanted_of_combine(me: int, w: Sequence[Args]) -> Any:
    assert len({(a.dtype, a.odd) for a in w}) == 1
    return Args(me, 0, w[me].round).x.to(w[me].dtype) * RANKS


def by_sibling(g: Any, a: Args) -> Any:
    sibling = g.sibling(f"sibling{a.root}")
    y = sibling.all_reduce(torch.full((3,), float(a.round)))
    sibling.close()
    return y


def shared(g: Any, a: Args) -> Any:
    y = g.empty(a.shape, a.dtype).fill_(a.me)
    return [*y.shape], y.dtype, y.eq(a.me).all().item()


def captured(g: Any, a: Args) -> Any:
    with g.graph_capture():
        return g.all_reduce(a.x)


def of_context(w: Any, a: Args) -> Any:
    """An operation of a context of its own."""
    with w.world.context(Layout(RANKS, **{"tp" if a.root == 0 else "pp": RANKS}), name=f"of turn {a.round}") as ctx:
        return ctx.world.all_reduce(torch.full((3,), float(a.round)))


def in_split(world: Any, a: Args) -> Any:
    """An operation of a world of ranks 0 and 1; a wrong root is a rank that does not come."""
    if a.me == 2:
        return None
    with world.split([a.root, 1]) as part_:
        return part_.group.all_reduce(torch.full((3,), float(a.round)))


def in_split_by(world: Any, a: Args) -> Any:
    with world.split_by(a.root) as part_:
        return part_.group.all_reduce(torch.full((3,), float(a.round)))


COLLECTIVES: dict[str, Operation] = {
    "all_reduce": Operation(lambda g, a: g.all_reduce(a.x), lambda me, w: total(w), "ds"),
    "all_reduce_": Operation(lambda g, a: g.all_reduce_(a.x), lambda me, w: total(w), "ds"),
    "reduce": Operation(lambda g, a: g.reduce(a.x, a.root), lambda me, w: total(w) if me == w[me].root else None, "dsr"),
    "reduce_scatter": Operation(lambda g, a: g.reduce_scatter(a.x, a.dim), lambda me, w: part(total(w), me, w[me].dim), "dsm"),
    "reduce_scatterv": Operation(
        lambda g, a: g.reduce_scatterv(a.x, a.dim, sizes(a)), lambda me, w: piece(total(w), me, sizes(w[me]), w[me].dim), "dsm"
    ),
    "all_gather": Operation(lambda g, a: g.all_gather(a.x, a.dim), lambda me, w: joined(w, w[me].dim), "dsm"),
    "all_gatherv": Operation(
        lambda g, a: g.all_gatherv(a.x, a.dim, [a.shape[0] if a.dim == 0 else a.shape[1]] * RANKS),
        lambda me, w: joined(w, w[me].dim),
        "dsm",
    ),
    "gather": Operation(
        lambda g, a: g.gather(a.x, a.root, a.dim), lambda me, w: joined(w, w[me].dim) if me == w[me].root else None, "dsmr"
    ),
    "scatter": Operation(
        lambda g, a: g.scatter(a.x if a.me == a.root else None, a.root, a.dim),
        lambda me, w: part(w[w[me].root].x, me, w[w[me].root].dim),  # dim counts there alone
        "dsmr",
        root=(1, 2),
    ),
    "broadcast": Operation(lambda g, a: g.broadcast(a.x, a.root), of_root, "dsr"),
    "all_to_all": Operation(lambda g, a: g.all_to_all(a.x, scatter_dim=a.dim, gather_dim=a.dim), exchanged, "dsm"),
    "barrier": Operation(lambda g, a: g.barrier(), nothing),
    "all_reduce[]": Operation(lambda g, a: g.all_reduce([a.x, a.x]), lambda me, w: [total(w)] * 2, "ds"),
    "all_reduce_[]": Operation(lambda g, a: g.all_reduce_([a.x, a.x]), lambda me, w: [total(w)] * 2, "ds"),
    "all_gather[]": Operation(lambda g, a: g.all_gather([a.x, a.x], a.dim), lambda me, w: [joined(w, w[me].dim)] * 2, "dsm"),
    "all_gatherv[]": Operation(lambda g, a: g.all_gatherv([a.x, a.x]), lambda me, w: [joined(w, 0)] * 2, "ds"),
    "reduce_scatter[]": Operation(
        lambda g, a: g.reduce_scatter([a.x, a.x], a.dim), lambda me, w: [part(total(w), me, w[me].dim)] * 2, "dsm"
    ),
    "broadcast[]": Operation(lambda g, a: g.broadcast([a.x, a.x], a.root), lambda me, w: [of_root(me, w)] * 2, "dsr"),
    "dispatch": Operation(
        lambda g, a: list(g.dispatch(a.x, a.x[:, :2].float())),
        lambda me, w: [joined(w, 0), torch.cat([a.x[:, :2].float() for a in w])],
        "ds",
    ),
    "combine": Operation(combined, wanted_of_combine, "ds"),
    "empty": Operation(shared, lambda me, w: ([*w[me].shape], w[me].dtype, True), "ds"),
    "sibling": Operation(by_sibling, lambda me, w: torch.full((3,), 3.0 * w[me].round), "r", builds=True),
    "warmup": Operation(lambda g, a: g.warmup(), nothing),
    "prepare_communication_buffer_for_model": Operation(
        lambda g, a: g.prepare_communication_buffer_for_model(torch.nn.Linear(4, 4)), nothing
    ),
    "graph_capture": Operation(captured, lambda me, w: total(w), "ds"),
}
COLLECTIVES |= {
    f"{name}_async": attrs.evolve(COLLECTIVES[name], call=waits(call))
    for name, call in {
        "all_reduce": lambda g, a: g.all_reduce_async(a.x),
        "reduce_scatter": lambda g, a: g.reduce_scatter_async(a.x, a.dim),
        "all_gather": lambda g, a: g.all_gather_async(a.x, a.dim),
        "gather": lambda g, a: g.gather_async(a.x, a.root, a.dim),
        "broadcast": lambda g, a: g.broadcast_async(a.x, a.root),
        "all_to_all": lambda g, a: g.all_to_all_async(a.x, scatter_dim=a.dim, gather_dim=a.dim),
        "barrier": lambda g, a: g.barrier_async(),
    }.items()
}

SENDS: dict[str, tuple[Call, Call]] = {
    "send": (lambda g, a: g.send(a.x, a.root), lambda g, a: g.recv(a.shape, a.dtype, a.root)),
    "isend": (waits(lambda g, a: g.isend(a.x, a.root)), waits(lambda g, a: g.irecv(a.shape, a.dtype, a.root))),
    "send_object": (lambda g, a: g.send_object(a.obj, a.root), lambda g, a: g.recv_object(a.root)),
    "isend_object": (waits(lambda g, a: g.isend_object(a.obj, a.root)), waits(lambda g, a: g.irecv_object(a.root))),
    "send_tensor_dict": (lambda g, a: g.send_tensor_dict(a.tree, a.root), lambda g, a: g.recv_tensor_dict(a.root)),
    "isend_tensor_dict": (waits(lambda g, a: g.isend_tensor_dict(a.tree, a.root)), waits(lambda g, a: g.irecv_tensor_dict(a.root))),
}


def _messages() -> dict[str, Operation]:
    made = {}
    for name, (send, recv) in SENDS.items():
        of: Callable[[Args], Any] = (lambda a: a.obj) if "object" in name else (lambda a: a.tree) if "dict" in name else (lambda a: a.x)
        expected = name in ("send", "isend")
        made[name] = Operation(sending(send, recv), sent(of, expected=expected), "dsr", root=(2, 0), sends="object" in name, idle=0)
        other = name.replace("send", "recv")
        made[other] = Operation(receiving(send, recv), received(of, expected=expected), "dsr" if expected else "r", root=(0, 2), idle=2)
    send, _ = SENDS["send"]
    made["recv(ANY)"] = Operation(
        receiving(send, lambda g, a: g.recv(a.shape, a.dtype, ANY)), received(lambda a: (a.x, 0), expected=True), "ds", idle=2
    )
    made["sendrecv"] = Operation(ring(lambda g, a, dst, src: g.sendrecv(a.x, dst, a.shape, a.dtype, src)), from_before, "dsr", root=(2, 0))
    made["batch"] = Operation(ring(in_batch), from_before, "dsr", root=(2, 0))
    return made


OBJECTS: dict[str, Operation] = {
    "broadcast_object": Operation(
        lambda g, a: g.broadcast_object(a.obj if a.me == a.root else None, a.root), lambda me, w: w[w[me].root].obj, "r", sends=True
    ),
    "broadcast_object_list": Operation(
        lambda g, a: g.broadcast_object_list([a.obj, a.me] if a.me == a.root else [None] * 2, a.root),
        lambda me, w: [w[w[me].root].obj, w[me].root],
        "r",
        sends=True,
    ),
    "all_gather_object": Operation(lambda g, a: g.all_gather_object(a.obj), lambda me, w: [a.obj for a in w], sends=True),
    "gather_object": Operation(
        lambda g, a: g.gather_object(a.obj, a.root), lambda me, w: [a.obj for a in w] if me == w[me].root else None, "r", sends=True
    ),
    "scatter_object": Operation(
        lambda g, a: g.scatter_object([(a.obj, i) for i in range(RANKS)] if a.me == a.root else None, a.root),
        lambda me, w: (w[w[me].root].obj, me),
        "r",
        sends=True,
    ),
    "broadcast_tensor_dict": Operation(
        lambda g, a: g.broadcast_tensor_dict(a.tree if a.me == a.root else None, a.root), lambda me, w: w[w[me].root].tree, "r"
    ),
}

# Of a queue. In "enqueue" rank 1 writes, in "dequeue" rank 0.
QUEUE: dict[str, Operation] = {
    "MessageQueue.enqueue": Operation(
        lambda q, a: q.enqueue(a.obj, timeout=q.seconds) if q.reader is None else q.dequeue(timeout=q.seconds),
        lambda me, w: None if me == WRONG else w[WRONG].obj,
        root=(1, 1),
        sends=True,
        queue=True,
    ),
    "MessageQueue.dequeue": Operation(
        lambda q, a: q.enqueue(a.obj, timeout=q.seconds) if q.reader is None else q.dequeue(timeout=q.seconds),
        lambda me, w: None if me == 0 else w[0].obj,
        root=(0, 0),
        queue=True,
    ),
    "MessageQueue.wait_until_ready": Operation(lambda q, a: q.wait_until_ready(timeout=q.seconds), nothing, root=(0, 0), queue=True),
}

CONTEXT: dict[str, Operation] = {
    "World.context": Operation(of_context, lambda me, w: torch.full((3,), 3.0 * w[me].round), "r", builds=True),
    "World.split": Operation(
        lambda w, a: in_split(w.world, a),
        lambda me, w: torch.full((3,), 2.0 * w[me].round) if me != 2 else None,
        "r",
        root=(0, 2),
        idle=2,
        builds=True,
    ),
    "World.split_by": Operation(lambda w, a: in_split_by(w.world, a), lambda me, w: torch.full((3,), 3.0 * w[me].round), builds=True),
}

OPERATIONS: dict[str, Operation] = {**COLLECTIVES, **_messages(), **OBJECTS, **CONTEXT, **QUEUE}
