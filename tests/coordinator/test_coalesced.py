"""Coalesced calls: a list of tensors as one call, against a call for each of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph.communicators.base import Communicator
from commgraph.communicators.reduction import refuse_reduction
from commgraph.coordinator import GroupCoordinator
from commgraph.shm import native_module
from commgraph.testing import fake_world, spmd
from commgraph.testing._program import TensorSpec
from commgraph.testing.strategies import tensors
from tests.helpers import bits, on
from tests.stand_ins import FakeDevice, Memory

QUICK = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
WAYS = pytest.mark.parametrize("options", [{}, {"shm": False}, {"check": True}], ids=str)
# torch.export patches what all threads use, and the ranks here are threads. Nothing is sent while it traces.
EXPORTING = threading.Lock()
Call = Callable[[GroupCoordinator, Any], Any]

# Of a list and of each of its tensors.
CALLS: dict[str, Call] = {
    "all_reduce": lambda g, x: g.all_reduce(x),
    "all_reduce product": lambda g, x: g.all_reduce(x, op="product"),
    "all_reduce_": lambda g, x: g.all_reduce_(x),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x, 0),
    "reduce_scatter last": lambda g, x: g.reduce_scatter(x, op="product"),
    "all_gather": lambda g, x: g.all_gather(x, 0),
    "all_gather last": lambda g, x: g.all_gather(x),
    "broadcast": lambda g, x: g.broadcast(x, g.world_size - 1),
}


def of_rank(x: torch.Tensor, rank: int, times: int) -> torch.Tensor:
    """Return a tensor of the dtype, the strides and the shape of x, `times` as large in each dim, with the values of a rank."""
    shape = tuple([extent * times for extent in x.shape])
    spec = TensorSpec(str(x.dtype).removeprefix("torch."), shape, "plain" if x.is_contiguous() else "transposed")
    return spec.make(rank + 1)


def compare(group: GroupCoordinator, name: str, given: Sequence[torch.Tensor], container: type[Any] = list) -> None:
    """One call on a list gives the bits of a call on each, in tensors of their own."""
    call, in_place = CALLS[name], name in ("all_reduce_", "broadcast")
    n = group.world_size

    def make() -> list[torch.Tensor]:
        return [of_rank(x, 7 * i + group.rank, n if "scatter" in name else 1) for i, x in enumerate(given)]

    separate = [call(group, x) for x in make()]
    xs = make()
    before = group._state.sequence
    results = call(group, container(xs))
    assert group._state.sequence == before + 1
    assert type(results) is list
    assert [bits(y) for y in results] == [bits(y) for y in separate], name
    if in_place or n == 1:
        assert all(y is x for y, x in zip(results, xs, strict=True))
        return
    assert [bits(x) for x in xs] == [bits(x) for x in make()], "an input was changed"
    assert all(y.is_contiguous() for y in results)
    for one, other in itertools.combinations([*results, *xs], 2):
        if one.numel() and other.numel():
            assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.timeout(600)
@WAYS
@pytest.mark.parametrize("name", CALLS)
def test_a_list_has_the_bits_of_separate_calls(name: str, options: dict[str, Any]) -> None:
    with_dims = "gather" in name or "scatter" in name

    @settings(QUICK, max_examples=10)
    @given(st.integers(1, 3), st.lists(tensors(min_dims=int(with_dims), max_dims=3, strides=["plain", "transposed"]), max_size=7))
    def play(n: int, given: list[torch.Tensor]) -> None:
        op = "product" if "product" in name or "last" in name else "sum"
        given = [x for x in given if refuse_reduction(x.dtype, op) is None]
        on(n, lambda group: compare(group, name, given, tuple if len(given) % 2 else list), **options)

    play()


@pytest.mark.parametrize("name", CALLS)
def test_large_lists_and_several_hosts(name: str) -> None:
    given = [torch.empty(3, 5), torch.empty(700, 90), torch.empty(4, dtype=torch.int64), torch.empty(90_000), torch.empty(0, 2)]
    on(2, lambda group: compare(group, name, given))
    on(3, lambda group: compare(group, name, given), shm=False)
    on(4, lambda group: compare(group, name, given), nodes=2)


@pytest.mark.parametrize("op", ["sum", "avg", "max", "min", "band", "bor", "bxor"])
def test_every_reduction(op: str) -> None:
    def body(group: GroupCoordinator) -> None:
        dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint16, torch.float8_e4m3fn]
        xs = [
            TensorSpec(str(dtype).removeprefix("torch."), (4, 3)).make(group.rank + i)
            for i, dtype in enumerate(dtypes)
            if refuse_reduction(dtype, op) is None
        ]
        assert len(xs) >= 3
        assert [*map(bits, group.all_reduce(xs, op=op))] == [bits(group.all_reduce(x, op=op)) for x in xs]
        assert [*map(bits, group.reduce_scatter(xs, 0, op=op))] == [bits(group.reduce_scatter(x, 0, op=op)) for x in xs]

    on(2, body)


@pytest.mark.skipif(native_module.load() is None, reason="no native module")
@pytest.mark.parametrize("nodes", [1, 3])
def test_small_lists_are_native_calls_and_each_rank_may_take_either_way(nodes: int) -> None:
    def body(group: GroupCoordinator) -> None:
        fast, state = group._fast, group._state.detects
        assert state is not None
        group.all_gather([torch.ones(3)] * 2, 0)  # makes the links
        group.broadcast([torch.ones(3), torch.ones(3)], group.world_size - 1)
        for dtype in (torch.float32, torch.int16, torch.bool):
            given = [torch.empty(3, 2, dtype=dtype), torch.empty(6, dtype=dtype), torch.empty(1, 6, 5, dtype=dtype)]
            for turn, name in enumerate(name for name in CALLS if "product" not in name):
                state.pause(turn % 3 == group.rank)
                compare(group, name, given)
                state.pause(False)
        xs = [torch.ones(3), torch.ones(3, 2)]
        calls: list[Callable[[], Any]] = [
            lambda: fast.all_reduce(xs, "sum", None),
            lambda: fast.all_reduce_((*xs,), "max", 5.0),
            lambda: fast.all_gather(xs, -1, None, None),
            lambda: fast.reduce_scatter(xs, 0, "sum", None, None),
            lambda: fast.broadcast(xs, 0, None),
        ]
        assert [call() is not None for call in calls] == [True] * 5
        # Left to the general path: other dtypes among them, a large tensor, one that is not plain, one that lies in another.
        others = [[*xs, torch.ones(3).long()], [*xs, torch.ones(1 << 16)], [*xs, torch.ones(4, 2).T], [*xs, xs[0]]]
        assert [fast.all_reduce_(other, "sum", None) for other in others] == [None] * 4

    on(3, body, nodes=nodes)


def test_a_list_may_change_while_its_call_waits() -> None:
    entered = threading.Event()

    def body(group: GroupCoordinator) -> None:
        xs = [torch.ones(30_000) for _ in range(4)]
        if group.rank:
            assert entered.wait(30)
            group.all_reduce_(xs)
            return
        kept = list(xs)

        def change() -> None:
            while group._state.sequence == 0:
                time.sleep(1e-4)
            del xs[1:]
            entered.set()

        changing = threading.Thread(target=change)
        changing.start()
        group.all_reduce_(xs)
        changing.join()
        assert all(torch.equal(x, torch.full((30_000,), 2.0)) for x in kept)

    on(2, body)


def test_tensors_of_one_dtype_travel_at_once() -> None:
    def body(group: GroupCoordinator) -> None:
        called: list[str] = []
        for strategy in group._state.strategies.communicators:
            for name in ("all_reduce", "all_reduce_", "reduce_scatter", "all_gather", "broadcast"):
                overhear(strategy, name, called)
        xs = [torch.ones(2, 2), torch.ones(3, 2, dtype=torch.int64), torch.ones(4, 2), torch.ones(6, 2, dtype=torch.int64)]
        group.all_reduce(xs)
        group.all_reduce_(xs)
        assert called == ["all_reduce_"] * 4
        group.reduce_scatter(xs)
        group.all_gather(xs)
        group.broadcast(xs)
        assert called[4:] == ["reduce_scatter"] * 2 + ["all_gather"] * 2 + ["broadcast"] * 2
        del called[:]
        assert group.all_reduce([]) == group.broadcast(()) == []
        assert called == []

    def overhear(strategy: Communicator, name: str, called: list[str]) -> None:
        inner = getattr(strategy, name)

        def heard(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return inner(*args, **kwargs)

        setattr(strategy, name, heard)

    on(2, body, timeout=30)


@WAYS
@pytest.mark.parametrize("name", ["all_reduce", "all_reduce_", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("differs", ["shape", "dtype", "number", "order", "one tensor or a list"])
def test_any_difference_is_a_mismatch_on_every_rank(name: str, differs: str, options: dict[str, Any]) -> None:
    def body(group: GroupCoordinator) -> str:
        xs = [torch.ones(6), torch.ones(12), torch.ones(6, dtype=torch.int32)]
        if group.rank == 1:
            xs = {
                "shape": [xs[0], torch.ones(6, 6), xs[2]],
                "dtype": [xs[0], xs[1].double(), xs[2]],
                "number": xs[:2],
                "order": [xs[1], xs[0], xs[2]],
                "one tensor or a list": xs,
            }[differs]
        one = differs == "one tensor or a list"
        with pytest.raises((cg.CollectiveMismatchError, cg.CollectiveTimeoutError)) as caught:
            CALLS[name](group, xs if not one else xs[0] if group.rank else xs[:1])
        with pytest.raises(type(caught.value)):
            group.barrier()
        return type(caught.value).__name__

    seconds = {"host_timeout": timedelta(seconds=1)} if options == {"shm": False} else {}
    found = set(on(3, body, timeout=30, **options, **seconds))
    assert found == {"CollectiveMismatchError"}


def test_bad_entries_name_their_index_and_the_group_goes_on() -> None:
    x = torch.ones(4, 6)
    cases: list[tuple[Callable[[GroupCoordinator], Any], str]] = [
        (lambda g: g.all_reduce([x, 1.0]), r"^all_reduce on group 'tp' .*: x\[1\] is a float"),  # type: ignore[list-item]
        (lambda g: g.all_reduce([x, [x]]), r"x\[1\] is a list"),  # type: ignore[list-item]
        (lambda g: g.all_reduce([x, x.long()], op="avg"), r"x\[1\]: op='avg' over dtype torch.int64"),
        (lambda g: g.all_reduce([x.to_sparse()]), r"x\[0\] has layout torch.sparse_coo"),
        (lambda g: g.all_reduce_([x, x[:1].expand(4, 6)]), r"^all_reduce_ .*x\[1\] is expanded"),
        (lambda g: g.all_reduce_([x, x.clone(), x]), r"x\[2\] lies where x\[0\] does"),
        (lambda g: g.all_gather([x, torch.tensor(1.0)]), r"x\[1\] has no dimensions"),
        (lambda g: g.all_gather([x, torch.ones(3)], 1), r"x\[1\]: dim=1 is out of range"),
        (lambda g: g.all_gather([x], 0, out=torch.ones(8, 6)), "out= goes with one tensor"),  # type: ignore[call-overload]
        (lambda g: g.reduce_scatter([x], 0, out=torch.ones(2, 6)), "out= goes with one tensor"),  # type: ignore[call-overload]
        (lambda g: g.reduce_scatter([x, torch.ones(3)], 0), r"x\[1\]: dim 0 of x \(3,\) has 3 elements"),
        (lambda g: g.broadcast([x, x], 7), r"x\[0\]: src=7"),
        (lambda g: g.broadcast([x, x.to("meta")]), r"x\[1\] is on meta"),
        (lambda g: g.all_reduce([x], timeout=-1), "timeout=-1"),
        (lambda g: g.all_reduce_([x.clone().requires_grad_()]), r"x\[0\] is a leaf"),
    ]

    def body(group: GroupCoordinator) -> None:
        sent = group.bytes_sent
        for call, words in cases:
            with pytest.raises((cg.UnsupportedTensorError, ValueError), match=words) as caught:
                call(group)
            assert "Nothing was sent" in str(caught.value)
        assert group.bytes_sent == sent
        assert float(group.all_reduce([torch.ones(())])[0]) == group.world_size

    on(2, body)


def test_with_a_gradient_they_are_separate_calls() -> None:
    def body(group: GroupCoordinator) -> None:
        xs = [(torch.arange(4.0) + group.rank + i).requires_grad_(i != 1) for i in range(3)]
        ys = [(x.detach().clone()).requires_grad_(x.requires_grad) for x in xs]
        before = group._state.sequence
        for name, call in CALLS.items():
            given = [x * 1.0 for x in xs] if name in ("all_reduce_", "broadcast") else xs
            same = [y * 1.0 for y in ys] if name in ("all_reduce_", "broadcast") else ys
            sum((y * y).sum() for y in call(group, given)).backward()  # type: ignore[union-attr]  # a tensor
            sum((y * y).sum() for y in [call(group, y) for y in same]).backward()  # type: ignore[union-attr]  # a tensor
            assert group._state.sequence >= before + 6
        for x, y in zip(xs, ys, strict=True):
            assert (x.grad is None) == (not x.requires_grad)
            assert x.grad is None or torch.equal(x.grad, y.grad)  # type: ignore[arg-type]  # of which there is one, too
        with pytest.raises(ValueError, match="timeout= cannot go with"):
            group.all_reduce(xs, timeout=3.0)
        with torch.no_grad():
            assert not any(y.requires_grad for y in group.all_reduce(xs))

    on(2, body)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "export"])
def test_traced_they_are_separate_operators(backend: str) -> None:
    class Several(torch.nn.Module):
        def __init__(self, tp: GroupCoordinator) -> None:
            super().__init__()
            self.tp = tp

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
            a, b = self.tp.all_reduce([x, z], op="max")
            c, d = self.tp.all_gather((a, b * 2), 0)
            e, f = self.tp.reduce_scatter([c, d], 0)
            g, h = self.tp.all_reduce_([e.clone(), f.clone()])
            return [*self.tp.broadcast([g.clone(), h.clone()], 1), *self.tp.all_reduce([])]

    def body(group: GroupCoordinator) -> None:
        module, given = Several(group), (torch.arange(6.0).view(2, 3) + group.rank, torch.arange(4) + group.rank)
        wanted = module(*given)
        if backend == "export":
            with EXPORTING:
                traced: Any = torch.export.export(module, given).module()
        else:
            traced = torch.compile(module, backend=backend, fullgraph=True)
        assert [bits(y) for y in traced(*given)] == [bits(y) for y in wanted]

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch's
    on(2, body, timeout=120)


def test_shapes_in_a_world_without_peers() -> None:
    with fake_world(4, 1) as world:
        tp = world.context(cg.Layout(4, tp=4), name="a").tp
        xs = [torch.empty(4, 3, device="meta"), torch.empty(8, device="meta", dtype=torch.int32)]
        assert [tuple(y.shape) for y in tp.all_reduce(xs)] == [(4, 3), (8,)]
        assert [tuple(y.shape) for y in tp.all_gather(xs, 0)] == [(16, 3), (32,)]
        assert [tuple(y.shape) for y in tp.reduce_scatter(xs, 0)] == [(1, 3), (2,)]
        assert all(y is x for y, x in zip(tp.broadcast(xs), xs, strict=True))
        assert all(y is x for y, x in zip(tp.all_reduce_(xs), xs, strict=True))
        assert tp.all_reduce([]) == []


def test_on_a_stand_in_for_a_device() -> None:
    memory = Memory()

    def run(world: cg.World) -> None:
        options = cg.CommunicatorOptions(custom_all_reduce=False)
        with world.context(cg.Layout(2, tp=2), name="device", platform=FakeDevice(memory), options=options) as context:
            given = [torch.empty(2, 3), torch.empty(4, dtype=torch.int16), torch.empty(5, 2), torch.empty(2, dtype=torch.bool)]
            for name in CALLS:
                compare(context.tp, name, given)

    spmd(run, 2)


def test_inference_mode_and_versions() -> None:
    def body(group: GroupCoordinator) -> None:
        with torch.inference_mode():
            made = [torch.ones(3), torch.ones(2)]
            assert group.all_reduce_(made)[0] is made[0]
            assert group.broadcast(made)[1] is made[1]
        with pytest.raises(cg.UnsupportedTensorError, match=r"x\[0\] was made in inference mode"):
            group.broadcast(made)
        plain = [torch.ones(3), torch.ones(2)]
        versions = [x._version for x in plain]
        group.broadcast(plain)
        group.all_reduce_(plain)
        assert all(x._version > version for x, version in zip(plain, versions, strict=True))

    on(2, body)
