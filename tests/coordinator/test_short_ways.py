"""The short ways of messages on one host: they pair with the long ones, leave to them what is not plain, and fail in the same words."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import commgraph as cg
from commgraph import compat
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.objects_shm import ShmObjects
from commgraph.shm import native_module
from commgraph.shm.mailbox import Mailbox
from commgraph.testing import spmd
from tests.helpers import on, same

if native_module.load() is None:
    pytest.skip("there is no native module", allow_module_level=True)

DTYPES = [
    torch.bool,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def mailbox(group: GroupCoordinator) -> Mailbox:
    objects = group._objects
    assert isinstance(objects, ShmObjects)
    assert objects._mailbox is not None
    return objects._mailbox


def went_short(group: GroupCoordinator, call: Callable[[], object]) -> bool:
    """Whether bytes went through the short way of tensors and dicts."""
    before = mailbox(group).native.bytes_sent
    call()
    return bool(mailbox(group).native.bytes_sent > before)


@pytest.mark.parametrize("nbytes", [4, 40_000, 3_000_000])
def test_both_ways_pair(nbytes: int) -> None:
    """A deadline of its own makes a call take the long way."""
    x = torch.arange(nbytes // 4, dtype=torch.int32)
    tree = {"hidden": x, "residual": x.view(-1, 1) + 1, "ü": torch.tensor(3.5)}
    text = "z" * nbytes

    def body(group: GroupCoordinator) -> None:
        for mine, theirs in itertools.product((None, 20.0), repeat=2):
            for _ in range(3):
                if group.rank == 0:
                    assert went_short(group, partial(group.send, x, 1, timeout=mine))
                    group.send(x, 1, timeout=mine)
                    assert went_short(group, partial(group.send_tensor_dict, tree, 1, timeout=mine)) == (mine is None)
                    put = partial(group.broadcast_tensor_dict, tree, 0, timeout=mine)
                    assert went_short(group, put) == (mine is None)
                    group.send_object(text, 1, timeout=mine)
                    group.broadcast_object(text, 0, timeout=mine)
                    assert group.broadcast_object("", 1, timeout=mine) == text * 2
                else:
                    assert torch.equal(group.recv(x.shape, x.dtype, 0, timeout=theirs), x)
                    out = torch.empty_like(x)
                    assert group.recv(x.shape, x.dtype, 0, out=out, timeout=theirs) is out
                    assert torch.equal(out, x)
                    assert same(tree, group.recv_tensor_dict(0, timeout=theirs))
                    assert same(tree, group.broadcast_tensor_dict(None, 0, timeout=theirs))
                    assert group.recv_object(0, timeout=theirs) == text
                    assert group.broadcast_object("", 0, timeout=theirs) == text
                    group.broadcast_object(text * 2, 1, timeout=theirs)

    on(2, body)


PLAIN: dict[str, dict[Any, Any]] = {
    "nothing": {},
    "dtypes": {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    "shapes": {"0-d": torch.tensor(7), "8-d": torch.ones((2,) * 8), "row": torch.ones(1, 300), "long": torch.arange(100_000)},
    "keys": {"": torch.ones(1), "a\0b": torch.ones(2), "π𝄞": torch.ones(3), "k" * 3000: torch.ones(4)},
    "order": {"z": torch.zeros(1), "a": torch.ones(1), "m": torch.ones(2)},
    "32 tensors": {str(i): torch.full((i + 1,), i) for i in range(32)},
    "the same twice": dict.fromkeys("ab", torch.ones(3)),
    "values": {
        "x": torch.ones(2),
        "none": None,
        "yes": True,
        "no": False,
        "n": -(1 << 63),
        "real": 0.1,
        "far": float("inf"),
        "text": "π𝄞",
        "": "",
    },
    "values only": {"n": 3},
    "a gradient": {"x": torch.ones(2, requires_grad=True)},
}
OTHER: dict[str, dict[Any, Any]] = {
    "an object": {"x": torch.ones(2), "n": [1]},
    "a number of 70 bits": {"x": torch.ones(2), "n": 1 << 70},
    "a text of 5,000 bytes": {"x": torch.ones(2), "n": "k" * 5000},
    "a dict within": {"x": {"y": torch.ones(2)}},
    "no entries": {"x": torch.empty(0, 3), "y": torch.ones(1)},
    "strides": {"x": torch.arange(6).view(2, 3).t()},
    "a conjugate": {"x": torch.tensor([1 + 2j]).conj()},
    "a negative": {"x": torch.tensor([1 + 2j]).conj().imag},
    "complex": {"x": torch.tensor([1 + 2j])},
    "float8": {"x": torch.ones(3).to(torch.float8_e4m3fn).view(torch.uint8).view(torch.float8_e4m3fn)},
    "9 dims": {"x": torch.ones((1,) * 9)},
    "33 tensors": {str(i): torch.full((i + 1,), i) for i in range(33)},
    "a number for a key": {1: torch.ones(2)},
    "half a surrogate": {"\ud800": torch.ones(2)},
    "a long key": {"k" * 5000: torch.ones(2)},
    "a parameter": {"x": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
}


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_a_dict_of_plain_tensors_goes_the_short_way_and_no_other(kind: str) -> None:
    tree = PLAIN.get(kind) or OTHER.get(kind, {})

    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            with torch.no_grad():  # which lets a tensor with a gradient pass
                for send in (partial(group.send_tensor_dict, dst=1), partial(group.send_tensor_dict, dst=2), group.broadcast_tensor_dict):
                    assert went_short(group, partial(send, tree)) == (kind in PLAIN)
            return
        for got in (group.recv_tensor_dict(0), group.broadcast_tensor_dict(None, 0)):
            check(got)

    def check(got: dict[Any, Any]) -> None:
        assert list(got) == list(tree)
        for x, y in zip(tree.values(), got.values(), strict=True):
            if isinstance(x, torch.Tensor):
                assert (x.dtype, x.shape) == (y.dtype, y.shape)
                assert y.is_contiguous()
                assert not y.requires_grad
                assert y.resolve_conj().resolve_neg().flatten().tolist() == x.detach().resolve_conj().resolve_neg().flatten().tolist()
            else:
                assert same(x, y)

    on(3, body)


def test_modes_see_the_tensors_that_are_made() -> None:
    """Where something looks at every operator, the short way would hide some from it."""

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def body(group: GroupCoordinator) -> None:
        with Looking():  # type: ignore[no-untyped-call]  # torch's own
            if group.rank == 0:
                assert not went_short(group, lambda: group.send_tensor_dict({"x": torch.ones(3)}, 1))
            else:
                assert same({"x": torch.ones(3)}, group.recv_tensor_dict(0))

    on(2, body)


@pytest.mark.parametrize("nbytes", [400, 2_000_000])
def test_what_came_is_its_receivers_own(nbytes: int) -> None:
    def tree(i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((nbytes,), i % 100, dtype=torch.uint8), "y": torch.full((3,), float(i))}

    def body(group: GroupCoordinator) -> None:
        kept = {}
        for i in range(40):
            if group.rank == 0:
                sent = tree(i)
                group.send_tensor_dict(sent, 1)
                sent["x"].zero_()
            else:
                got = group.recv_tensor_dict(0)
                assert same(tree(i), got)
                if i % 7 == 0:
                    kept[i] = got
                else:
                    got["x"].fill_(255)  # and its memory is used again
        assert all(same(tree(i), got) for i, got in kept.items())

    on(2, body)


def test_kinds_pass_one_another() -> None:
    """Each is asked for in its own order: what comes before it in the ring is laid aside."""
    x = torch.arange(1000)

    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            for i in range(3):
                group.send(x + i, 1)
                group.send_object(("object", i), 1)
                group.send_tensor_dict({"plain": x - i}, 1)
                group.send_tensor_dict({"not plain": i}, 1)
            return
        for i in range(3):
            assert same({"plain": x - i}, group.recv_tensor_dict(0))
            assert group.recv_tensor_dict(0) == {"not plain": i}
        for i in range(3):
            assert torch.equal(group.recv(x.shape, x.dtype, 0), x + i)
        for i in range(3):
            assert group.recv_object(0) == ("object", i)

    on(2, body)


def test_a_deadline_of_the_group_loses_nothing() -> None:
    """The objects of a group whose every wait is short."""

    def body(group: GroupCoordinator) -> None:
        if group.rank == 1:
            calls: list[Callable[[int], Any]] = [group.recv_object, group.recv_tensor_dict, lambda src: group.broadcast_object(None, src)]
            calls.append(lambda src: group.broadcast_tensor_dict(None, src))
            for call in calls:
                for _ in range(2):
                    with pytest.raises(cg.CollectiveTimeoutError, match=r"0\.2 s") as caught:
                        call(0)
                    assert (caught.value.group, caught.value.rank) == ("tp", 1)
            met.set()
            assert group.recv_object(0) == 1
            assert same({"x": torch.ones(2)}, group.recv_tensor_dict(0))
            assert same({"y": torch.ones(3)}, group.broadcast_tensor_dict(None, 0))
            assert group.broadcast_object("", 0) == "two"
        else:
            met.wait(20)
            group.send_object(1, 1)
            group.send_tensor_dict({"x": torch.ones(2)}, 1)
            group.broadcast_tensor_dict({"y": torch.ones(3)}, 0)
            group.broadcast_object("two", 0)
            done.wait(20)
        done.set()

    met, done = threading.Event(), threading.Event()
    on(2, body, host_timeout=timedelta(seconds=0.2))


def often(call: Callable[[], object]) -> None:
    for _ in range(100):
        call()


WAITS: dict[str, Callable[[GroupCoordinator], Any]] = {
    "recv": lambda group: group.recv(3, torch.float32, 1),
    "recv_object": lambda group: group.recv_object(1),
    "recv_tensor_dict": lambda group: group.recv_tensor_dict(1),
    "broadcast_object": lambda group: group.broadcast_object(None, 1),
    "broadcast_tensor_dict": lambda group: group.broadcast_tensor_dict(None, 1),
    "send": lambda group: often(lambda: group.send(torch.ones(500), 1)),
    "send_object": lambda group: often(lambda: group.send_object(bytes(2000), 1)),
    "send_tensor_dict": lambda group: often(lambda: group.send_tensor_dict({"x": torch.ones(500)}, 1)),
}


@pytest.mark.parametrize("operation", WAITS)
def test_who_leaves_and_who_closes_ends_a_wait(operation: str) -> None:
    def leaves(world: cg.World) -> None:
        context = world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(isolate=True, queue_bytes=16384))
        if world.rank == 0:
            with pytest.raises(cg.PeerLostError, match=f"{operation} on group 'tp' .*rank 1 has closed context 'a'") as caught:
                WAITS[operation](context.tp)
            assert caught.value.rank == 1
            context.tp.close()
        else:
            gone.wait(0.1)
            context.tp.close()

    def closes(world: cg.World) -> None:
        context = world.context(cg.Layout(2, tp=2), name="a", options=cg.CommunicatorOptions(isolate=True, queue_bytes=16384))
        if world.rank == 0:
            thread = threading.Timer(0.1, context.tp.close)
            thread.start()
            with pytest.raises(cg.ContextClosedError):
                WAITS[operation](context.tp)
            thread.join()
        gone.wait(0.3)

    gone = threading.Event()
    spmd(leaves, 2, timeout=30)
    spmd(closes, 2, timeout=30)


def test_nothing_goes_through_a_closed_group() -> None:
    def body(group: GroupCoordinator) -> None:
        group.barrier()
        group.close()
        for call in WAITS.values():
            with pytest.raises(cg.ContextClosedError):
                call(group)
        for src in (0, 1):
            with pytest.raises(cg.ContextClosedError):
                group.broadcast_object(1, src)
            with pytest.raises(cg.ContextClosedError):
                group.broadcast_tensor_dict({"x": torch.ones(1)}, src)

    on(2, body, isolate=True)


def test_a_slice_is_not_taken_for_the_whole() -> None:
    """Who gathers expects slices: a whole tensor that came the short way is found out."""

    def run(world: cg.World) -> None:
        options = cg.CommunicatorOptions(isolate=True)
        with world.context(cg.Layout(4, tp=2, pp=2), name="a", options=options) as ctx:
            if ctx.pp.is_first_rank:
                ctx.pp.send_tensor_dict({"x": torch.ones(4, 2)}, 1)
            else:
                with pytest.raises(cg.CollectiveMismatchError, match="recv_tensor_dict"):
                    ctx.pp.recv_tensor_dict(0, all_gather_group=ctx.tp)

    spmd(run, 4, timeout=30)


def test_a_description_that_does_not_fit_is_refused() -> None:
    def body(group: GroupCoordinator) -> None:
        box = mailbox(group)
        assert box.unpack([b"\x80 a pickle"]) is None
        assert box.unpack([b""]) is None
        for parts in (
            [b"\x01"],
            [b"\x01", box.take(8)],
            [b"\x01" + bytes(30), box.take(8)],
            [b"\x01\x02\x20\x01\x00\x01\0\0\0\xff\0\0\0", box.take(4)],
        ):
            if len(parts) == 1:
                assert box.unpack(parts) == {}
                continue
            with pytest.raises(ValueError, match="does not fit what came with it"):
                box.unpack(parts)

    on(2, body)


def test_bad_peers_and_other_threads() -> None:
    def body(group: GroupCoordinator) -> None:
        for peer in (group.rank_in_group, 2, -1, True, 1.0, "1", [1]):
            for call in (
                lambda peer=peer: group.send(torch.ones(1), peer),
                lambda peer=peer: group.recv(1, torch.float32, peer),
                lambda peer=peer: group.send_object(1, peer),
                lambda peer=peer: group.recv_object(peer),
                lambda peer=peer: group.send_tensor_dict({}, peer),
                lambda peer=peer: group.recv_tensor_dict(peer),
            ):
                with pytest.raises((ValueError, TypeError), match=r"on group 'tp'"):
                    call()
        group.barrier()
        # What was refused has not been counted.
        if group.rank == 0:
            group.send(torch.ones(1), 1)
        else:
            assert group.recv(1, torch.float32, 0) == 1
        group.barrier()

    on(2, body)


FILLS: dict[str, Callable[[GroupCoordinator, torch.Tensor, float | None], Any]] = {
    "all_reduce_": lambda group, x, timeout: group.all_reduce_(x, timeout=timeout),
    "broadcast": lambda group, x, timeout: group.broadcast(x, 0, timeout=timeout),
    "all_gather": lambda group, x, timeout: group.all_gather(torch.ones(4), 0, out=x, timeout=timeout),
    "reduce_scatter": lambda group, x, timeout: group.reduce_scatter(torch.ones(16), 0, out=x, timeout=timeout),
    "all_to_all": lambda group, x, timeout: group.all_to_all(torch.ones(8), out=x, timeout=timeout),
}


@pytest.mark.parametrize("options", [{}, {"shm": False}, {"check": True}], ids=["shm", "gloo", "check"])
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_autograd_learns_that_memory_was_filled(options: dict[str, Any], timeout: float | None) -> None:
    """What it has saved of a tensor for a derivative must not change unnoticed, whichever way a call takes."""

    def body(group: GroupCoordinator) -> None:
        calls = dict(FILLS)
        if group.rank == 0:
            calls["recv"] = lambda group, x, timeout: group.send(torch.ones(8), 1, timeout=timeout)
        else:
            calls["recv"] = lambda group, x, timeout: group.recv(8, torch.float32, 0, out=x, timeout=timeout)
        for name, call in calls.items():
            x, weight = torch.ones(8), torch.ones(8, requires_grad=True)
            loss = (weight * x).sum()
            call(group, x, timeout)
            if (name, group.rank) == ("recv", 0):
                continue  # has sent another one
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            # What is refused changes nothing.
            x = torch.ones(7)
            before = x._version
            if name not in ("all_reduce_", "broadcast"):
                with pytest.raises(cg.UnsupportedTensorError, match="out is"):
                    call(group, x, timeout)
                assert x._version == before
        group.barrier()

    on(2, body, **options)


def test_what_no_memory_holds_is_refused_and_the_group_goes_on() -> None:
    def body(group: GroupCoordinator) -> None:
        for power in (44, 48, 49, 52, 56, 57, 62, 63):
            with pytest.raises((RuntimeError, MemoryError, ValueError, TypeError)):
                group.recv((1 << power,), torch.float64, 1 - group.rank)
        assert int(group.all_reduce(torch.tensor(1))) == 2

    on(2, body)


class Interrupts:
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def test_an_interrupt_while_it_is_pickled_counts_nothing() -> None:
    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            for call in (partial(group.broadcast_object, Interrupts()), partial(group.send_object, Interrupts(), 1)):
                with pytest.raises(KeyboardInterrupt):
                    call()
            group.broadcast_object("x")
            group.send_object("y", 1)
        else:
            assert group.broadcast_object("") == "x"
            assert group.recv_object(0) == "y"
        group.barrier()

    on(2, body)


def test_without_dlpack_everything_takes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.11."""
    monkeypatch.setattr(compat, "dlpack_exchange", lambda: None)
    tree = {"x": torch.arange(5), "y": torch.ones(2, 2)}

    def body(group: GroupCoordinator) -> None:
        if group.rank == 0:
            for sent in ({}, tree):
                group.send_tensor_dict(sent, 1)
                group.broadcast_tensor_dict(sent)
            group.send(tree["x"], 1)
        else:
            for sent in ({}, tree):
                assert same(sent, group.recv_tensor_dict(0))
                assert same(sent, group.broadcast_tensor_dict())
            assert torch.equal(group.recv(5, torch.int64, 0), tree["x"])
        assert mailbox(group).native is None

    on(2, body)
