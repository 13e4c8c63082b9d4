"""`check_communicator`: whether a strategy does what a coordinator relies on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commgraph.communicators.base import OPERATIONS, CallsDiffer, Communicator, Limits, PeerClosed, PeerLate, Refused
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.reduction import accumulator, reduce_pieces, refuse_reduction
from commgraph.deadline import Deadline
from commgraph.errors import CollectiveError
from commgraph.options import CommunicatorOptions
from commgraph.platforms import GroupFacts
from commgraph.testing.spmd import spmd
from commgraph.world import World

__all__ = ["check_communicator"]

Factory = Callable[[GroupFacts, GlooCommunicator], Communicator | Refused]

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.float8_e5m2,
)
_SHAPES = ((4, 3), (1,), (0, 2), (2, 3, 4), ())
_LATE = 0.5
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")


def check_communicator(
    factory: Factory,
    *,
    world_sizes: Sequence[int] = (2, 3),
    device: torch.device | str = "cpu",
    options: CommunicatorOptions | None = None,
    ends_waits: bool = True,
    world: World | None = None,
) -> None:
    """Runs a strategy through every operation that it lists, on ranks that are threads, against what one process computes.

    Values, bits that agree on all ranks, inputs left alone, strides of every kind, empty tensors, uneven pieces; that `accepts` answers
    alike on all ranks and whenever it is asked; that a rank whose peers do not come raises within its deadline; that it can be aborted and
    closed twice. Calls that `accepts` declines are not tried.

    Args:
        factory: ``(facts, host) -> Communicator | Refused``, as an entry point of ``commgraph.communicators`` is called; collective. `host`
            serves host tensors of the group, so that its ranks can exchange data.
        world_sizes: how many ranks to try it with; it must not refuse all of them.
        device: whose tensors it serves.
        options: of the group.
        ends_waits: whether its operations block the host and end by their deadline; False for stream-ordered ones.
        world: its ranks in place of threads, for a strategy that needs processes; collective over them. `world_sizes` is not used then.

    Raises:
        AssertionError: says operation, expected and actual result.
    """

    def check(world: World) -> str | None:
        return _Check(world, factory, torch.device(device), options or CommunicatorOptions(), ends_waits).run()

    sizes = tuple(world_sizes) if world is None else (world.size,)
    found = [spmd(check, n)[0] for n in sizes] if world is None else [check(world)]
    refusals = [reason for reason in found if reason is not None]
    _expect(len(refusals) < len(sizes), f"it refused every number of ranks of {sizes}: {'; '.join(refusals)}")


class _Check:
    """One rank of one check."""

    def __init__(self, world: World, factory: Factory, device: torch.device, options: CommunicatorOptions, ends_waits: bool) -> None:
        self.world, self.n, self.me = world, world.size, world.rank
        host = world.group.communicator(world.group.communicators["send"][-1])
        assert isinstance(host, GlooCommunicator)
        facts = GroupFacts(tuple(range(self.n)), self.me, (0,) * self.n, options, True, Limits(60.0, 60.0, self.n), world.store)
        self.made = factory(facts, host)
        self.device, self.ends_waits = device, ends_waits
        self.tags = itertools.count(1)

    def run(self) -> str | None:
        """Run the check; return why the strategy was refused, None where it passed."""
        made = self.made
        kinds = self.world.group.all_gather_object("refused" if isinstance(made, Refused) else "made")
        _expect(len(set(kinds)) == 1, f"the ranks do not agree whether there is one: {kinds}")
        if isinstance(made, Refused):
            return made.reason
        _expect(isinstance(made, Communicator), f"the factory gave a {type(made).__name__}, a Communicator or a Refused is needed")
        unknown = sorted(made.operations - set(OPERATIONS))
        _expect(not unknown, f"{made!r} lists operations that do not exist: {unknown}")
        _expect(isinstance(made.describe(), str) and made.memory() >= 0 and made.bytes_sent >= 0, f"{made!r}: its facts are none")
        for dtype in _DTYPES:
            for shape in _SHAPES:
                for strided in (False, True):
                    self._all(made, dtype, shape, strided)
        if "barrier" in made.operations and self._accepts(made, "barrier", (), None):
            self._call(made, lambda tag: made.barrier(tag=tag, deadline=Deadline.after(30.0)))
        if self.ends_waits:
            self._late(made)
        made.abort()
        made.abort()
        made.close()
        made.close()
        return None

    def _all(self, made: Communicator, dtype: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
        for operation in sorted(made.operations - {"barrier", "recv"}):
            if operation in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter") and not shape:
                continue
            for op in sorted(made.reductions) if operation in _REDUCTIONS else ("sum",):
                if operation in _REDUCTIONS and refuse_reduction(dtype, op) is not None:
                    continue
                # Shape of the whole for these two, whose pieces have several sizes.
                if operation in ("all_gather", "reduce_scatter") or self._accepts(made, operation, shape, dtype):
                    getattr(self, f"_{operation}")(made, _Case(self, operation, dtype, shape, strided), op)

    def _accepts(self, made: Communicator, operation: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        asked = [made.accepts(operation, shape, dtype, self.device, capturing=False) for _ in range(2)]
        capturing = made.accepts(operation, shape, dtype, self.device, capturing=True)
        said = self.world.group.all_gather_object((asked, capturing))
        _expect(
            asked[0] == asked[1] and all(one == said[0] for one in said),
            f"{made!r}.accepts({operation!r}, {shape}, {dtype}): it has to answer alike on all ranks and each time: {said}",
        )
        return bool(asked[0])

    def _call(self, made: Communicator, call: Callable[[int], Any]) -> Any:
        if made.fast is not None:
            made.fast.counter.sequence += 1
        return call(next(self.tags))

    # One method for each operation.

    def _all_reduce(self, made: Communicator, case: _Case, op: str) -> None:
        x = case.mine()
        y = self._call(made, lambda tag: made.all_reduce(x, op, tag=tag, deadline=Deadline.after(30.0)))
        case.same(x, case.mine(), "its input was changed")
        case.reduced(y, case.everyone(), op)
        case.alike(y)
        _expect(y.is_contiguous(), f"{case}: its result has strides {y.stride()}, it has to be contiguous")
        z = case.mine()
        _expect(
            self._call(made, lambda tag: made.all_reduce_(z, op, tag=tag, deadline=Deadline.after(30.0))) is z,
            f"{case}: all_reduce_ must return x",
        )
        case.same(z, y, "all_reduce_ and all_reduce differ")

    def _reduce_scatter(self, made: Communicator, case: _Case, op: str) -> None:
        for sizes in ([2] * self.n, [(i + 1) % self.n for i in range(self.n)]):
            dim = len(case.shape) - 1
            whole = (*case.shape[:dim], sum(sizes))
            if not self._accepts(made, "reduce_scatter", whole, case.dtype):
                continue
            given = [case.made(rank, whole) for rank in range(self.n)]
            out = case.made(99, (*case.shape[:dim], sizes[self.me]))
            self._call(
                made,
                lambda tag, g=given, s=sizes, d=dim, o=out: made.reduce_scatter(
                    g[self.me], d, s, op, o, tag=tag, deadline=Deadline.after(30.0)
                ),  # type: ignore[misc]  # defaults of a lambda have no types
            )
            case.same(given[self.me], case.made(self.me, whole), "its input was changed")
            case.reduced(out, [x.split(sizes, dim)[self.me] for x in given], op)

    def _all_gather(self, made: Communicator, case: _Case, op: str) -> None:
        for sizes in ([2] * self.n, [(i + 1) % self.n for i in range(self.n)]):
            if not self._accepts(made, "all_gather", (sum(sizes), *case.shape[1:]), case.dtype):
                continue
            given = [case.made(rank, (sizes[rank], *case.shape[1:])) for rank in range(self.n)]
            out = case.made(99, (sum(sizes), *case.shape[1:]))
            self._call(
                made,
                lambda tag, g=given, s=sizes, o=out: made.all_gather(g[self.me], 0, s, o, tag=tag, deadline=Deadline.after(30.0)),  # type: ignore[misc]  # as above
            )
            case.same(out, torch.cat(given), "the pieces are not joined in rank order")
            case.same(given[self.me], case.made(self.me, (sizes[self.me], *case.shape[1:])), "its input was changed")

    def _all_to_all(self, made: Communicator, case: _Case, op: str) -> None:
        def piece(source: int, target: int) -> torch.Tensor:
            return case.made(10 * source + target, ((source + target) % 3, *case.shape[1:]))

        sends = [piece(self.me, peer) for peer in range(self.n)]
        receives = [torch.zeros_like(piece(peer, self.me)) for peer in range(self.n)]
        self._call(made, lambda tag: made.all_to_all(sends, receives, tag=tag, deadline=Deadline.after(30.0)))
        for peer, got in enumerate(receives):
            case.same(got, piece(peer, self.me), f"the piece of rank {peer} did not come")

    def _gather(self, made: Communicator, case: _Case, op: str) -> None:
        dst = self.n - 1
        for sizes in ([2] * self.n, [(i + 1) % self.n for i in range(self.n)]):
            given = [case.made(rank, (sizes[rank], *case.shape[1:])) for rank in range(self.n)]
            out = case.made(99, (sum(sizes), *case.shape[1:])) if self.me == dst else None
            self._call(
                made,
                lambda tag, g=given, s=sizes, o=out: made.gather(g[self.me], 0, s, o, dst, tag=tag, deadline=Deadline.after(30.0)),  # type: ignore[misc]  # as above
            )
            if out is not None:
                case.same(out, torch.cat(given), "the pieces are not joined in rank order")
            case.same(given[self.me], case.made(self.me, (sizes[self.me], *case.shape[1:])), "its input was changed")

    def _scatter(self, made: Communicator, case: _Case, op: str) -> None:
        src = self.n - 1
        for sizes in ([2] * self.n, [(i + 1) % self.n for i in range(self.n)]):
            whole = case.made(7, (sum(sizes), *case.shape[1:]))
            out = case.made(99, (sizes[self.me], *case.shape[1:]))
            x = whole if self.me == src else None
            self._call(
                made,
                lambda tag, x=x, s=sizes, o=out: made.scatter(x, 0, s, o, src, tag=tag, deadline=Deadline.after(30.0)),  # type: ignore[misc]  # as above
            )
            case.same(out, whole.split(sizes)[self.me], "not this rank's piece of what the source has")

    def _reduce(self, made: Communicator, case: _Case, op: str) -> None:
        x, dst = case.mine(), self.n - 1
        y = self._call(made, lambda tag: made.reduce(x, op, dst, tag=tag, deadline=Deadline.after(30.0)))
        case.same(x, case.mine(), "its input was changed")
        _expect((y is None) == (self.me != dst), f"{case}: reduce must give a tensor on dst={dst} and None elsewhere, and gave {y}")
        if y is not None:
            case.reduced(y, case.everyone(), op)

    def _broadcast(self, made: Communicator, case: _Case, op: str) -> None:
        x = case.mine()
        self._call(made, lambda tag: made.broadcast(x, 1, tag=tag, deadline=Deadline.after(30.0)))
        case.same(x, case.made(1, case.shape), "not what the source has")

    def _send(self, made: Communicator, case: _Case, op: str) -> None:
        out = torch.zeros_like(case.mine())
        after, before = (self.me + 1) % self.n, (self.me - 1) % self.n
        sends, receives = [(case.mine(), after)], [(out, before)]
        first, second = ((sends, []), ([], receives)) if self.me == 0 else (([], receives), (sends, []))
        tag = next(self.tags)
        for going, coming in (first, second):
            made.exchange(going, coming, tag=tag, deadline=Deadline.after(30.0))
        case.same(out, case.made(before, case.shape), "not what the previous rank sent")

    def _late(self, made: Communicator) -> None:
        """Check a rank whose peers do not come. The strategy cannot be used afterwards, as that of a broken group."""
        operation = next((name for name in ("all_reduce", "all_gather", "broadcast") if name in made.operations), None)
        if operation is None or not self._accepts(made, operation, (4, 3), torch.float32):
            return
        case = _Case(self, operation, torch.float32, (4, 3), strided=False)
        if self.me == 0:
            started = time.monotonic()
            try:
                if operation == "all_gather":
                    out = case.made(0, (4 * self.n, 3))
                    self._call(
                        made, lambda tag: made.all_gather(case.mine(), 0, [4] * self.n, out, tag=tag, deadline=Deadline.after(_LATE))
                    )
                elif operation == "broadcast":
                    self._call(made, lambda tag: made.broadcast(case.mine(), 1, tag=tag, deadline=Deadline.after(_LATE)))
                else:
                    self._call(made, lambda tag: made.all_reduce(case.mine(), "sum", tag=tag, deadline=Deadline.after(_LATE)))
            except (PeerLate, PeerClosed, CallsDiffer, CollectiveError):
                pass
            else:
                _expect(False, f"{made!r}: {operation} returned though no other rank called it")
            took = time.monotonic() - started
            _expect(took < _LATE + 5, f"{made!r}: {operation} took {took:.1f} s to find out that nobody came within {_LATE} s")
            # Over the store: the connections of the group may have ended with it.
            self.world.store.set("late", "")
        self.world.store.wait(["late"])


class _Case:
    """Tensors of one kind, equal on all ranks that make them."""

    def __init__(self, check: _Check, operation: str, dtype: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
        self.check, self.operation, self.dtype, self.shape, self.strided = check, operation, dtype, shape, strided

    def __repr__(self) -> str:
        kind = "strided" if self.strided else "contiguous"
        return f"{self.check.made!r}, rank {self.check.me} of {self.check.n}: {self.operation} of {kind} {self.dtype} {self.shape}"

    def made(self, seed: int, shape: Sequence[int]) -> torch.Tensor:
        """Small numbers, which every dtype holds and whose reductions stay small."""
        shape = tuple(shape)
        random = torch.Generator("cpu").manual_seed(1000 + seed)
        lying = (*shape[:-1], 2 * shape[-1]) if self.strided and shape else shape
        few = torch.randint(1, 3, lying, generator=random, device="cpu")
        x = few.to(self.dtype).to(self.check.device)
        return x[..., ::2] if self.strided and shape else x

    def mine(self) -> torch.Tensor:
        return self.made(self.check.me, self.shape)

    def everyone(self) -> list[torch.Tensor]:
        return [self.made(rank, self.shape) for rank in range(self.check.n)]

    def same(self, got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        fine = got.shape == wanted.shape and got.dtype == wanted.dtype and torch.equal(_plain(got), _plain(wanted))
        _expect(fine, f"{self}: {what}: got {_plain(got).tolist()}, expected {_plain(wanted).tolist()}")

    def reduced(self, got: torch.Tensor, pieces: Sequence[torch.Tensor], op: str) -> None:
        if self.dtype == torch.bool and op not in ("band", "bor", "bxor"):
            stack = torch.stack([_plain(x) for x in pieces])
            self.same(got, (stack.any(0) if op in ("sum", "max") else stack.all(0)).to(got.device), op)
            return
        if op in ("band", "bor", "bxor"):
            out = _plain(pieces[0])
            reduce_pieces([_plain(x) for x in pieces], op, out)
            self.same(got, out.to(got.device), op)
            return
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        stack = torch.stack([_plain(x) for x in pieces]).to(wide)
        wanted = {
            "sum": lambda: stack.sum(0),
            "avg": lambda: stack.mean(0),
            "max": lambda: stack.amax(0),
            "min": lambda: stack.amin(0),
            "product": lambda: stack.prod(0),
        }[op]()
        fine = got.dtype == self.dtype and got.shape == wanted.shape and torch.allclose(_plain(got).to(wide), wanted, rtol=0.15, atol=0.01)
        _expect(fine, f"{self}: {op}: got {_plain(got).tolist()}, expected {wanted.tolist()}")
        _expect(accumulator(self.dtype) is not None, f"{self}: {self.dtype} cannot be reduced")

    def alike(self, got: torch.Tensor) -> None:
        """Expect the same bits on every rank."""
        said = self.check.world.group.all_gather_object(
            _plain(got).contiguous().reshape(-1).view(torch.uint8).tolist() if got.numel() else []
        )
        _expect(all(one == said[0] for one in said), f"{self}: the ranks' results differ: {said}")


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Return x on the host, contiguous, in a dtype that torch can compare."""
    x = x.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return x.float() if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
