"""Objects as pickle gives them back: tensors with strides and attributes; and those that do not unpickle, which spare their group."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NoReturn

import pytest
import torch

from commgraph import wire
from commgraph.coordinator import GroupCoordinator
from commgraph.shm.pickling import Pickler, loads
from tests.helpers import on, same

INT4: torch.dtype = vars(torch)["int4"]


def cut(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


TENSORS: MappingProxyType[str, torch.Tensor] = MappingProxyType(
    {
        "contiguous": cut(3, 4),
        "transposed": cut(3, 4).t(),
        "permuted": cut(2, 3, 4).permute(2, 0, 1),
        "channels last": cut(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "every other": cut(12)[::2],
        "a column": cut(5, 6)[:, 2],
        "columns": cut(5, 6)[:, 1:4].t(),
        "expanded": cut(3, 1).expand(3, 4),
        "expanded and cut": cut(3, 1, 6)[:, :, ::3].expand(3, 4, 2),
        "windows": cut(8).unfold(0, 3, 1),
        "large": cut(300, 200).t(),
        "half": cut(40, 6).to(torch.bfloat16).t(),
        "bytes": torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(INT4).t(),
    }
)


def by_pickler(x: Any) -> Any:
    parts = tuple([bytes(part) for part in Pickler().dumps(x)])
    return loads(parts[0], map(bytearray, parts[1:]))


def by_wire(x: Any, key: bytes | None) -> Any:
    return wire.decode(wire.encode(x, key=key, context=b""), key=key, context=b"")


WAYS: MappingProxyType[str, Callable[[Any], Any]] = MappingProxyType(
    {"shared memory": by_pickler, "plain": lambda x: by_wire(x, None), "signed": lambda x: by_wire(x, b"k")}
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TENSORS)
def test_strides_are_kept(name: str, way: str) -> None:
    x = TENSORS[name]
    y = WAYS[way](x)
    assert same(y, x)
    assert y.stride() == x.stride()
    if name not in ("expanded", "expanded and cut", "windows", "bytes"):
        y.zero_()
        assert not y.any()


def test_elements_spread_thin_arrive_dense() -> None:
    x = torch.arange(100_000.0).reshape(10, 10_000)[:, 3]
    for way in WAYS.values():
        assert same(way(x), x)
        assert way(x).stride() == (1,)
    assert len(wire.encode(torch.zeros(1).expand(10**12), key=None, context=b"")) < 100


@pytest.mark.parametrize("way", WAYS)
def test_attributes_are_kept(way: str) -> None:
    x = cut(2, 3).t()
    x.label, x.scale, x.shards = "weight", torch.ones(3), {"a": [1, (2, 3)]}  # type: ignore[attr-defined]  # a tensor takes any
    got = WAYS[way]([x, {"again": x}])
    for y in (got[0], got[1]["again"]):
        assert y.__dict__.keys() == {"label", "scale", "shards"}
        assert same([y.label, y.scale, y.shards], ["weight", torch.ones(3), {"a": [1, (2, 3)]}])
        assert y.stride() == x.stride()


def test_attributes_that_cannot_be_sent_are_refused() -> None:
    x = torch.ones(2)
    x.check = print  # type: ignore[attr-defined]  # as above
    with pytest.raises(TypeError, match=r"at obj\[0\].__dict__\['check'\]"):
        wire.encode([x], key=None, context=b"")
    x.check = x  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="contains itself"):
        wire.encode(x, key=None, context=b"")
    y = by_pickler(x)
    assert y.check is y


@pytest.mark.parametrize(
    "node",
    [
        [6, "float32", [3, 4], bytes(48), [1]],
        [6, "float32", [3, 4], bytes(48), [1, -3]],
        [6, "float32", [3, 4], bytes(44), [1, 3]],
        [6, "float32", [3, 4], bytes(48), [1, 3], [0, 1]],
        [6, "float32", [3, 4], bytes(48), None, [4, 1, 2]],
        [6, "float32", [2], bytes(8), [1 << 40]],
        [6, "float32", [1 << 62, 2], bytes(8), [0, 1 << 62]],
        [6, "float32", [2, 2], bytes(16), [1, 1]],
        [6, "float32", [3, 4], bytes(48), "x"],
    ],
)
def test_malformed_strides_are_no_tensor(node: list[Any]) -> None:
    import msgspec

    with pytest.raises(wire.WireError):
        wire.decode(b"\x11" + msgspec.msgpack.encode(node), key=None, context=b"")


class Sour:
    """Pickles, and does not unpickle elsewhere."""

    def __init__(self, filling: bytes = b"") -> None:
        self.filling = filling

    def __reduce__(self) -> Any:
        return spoil, (self.filling,)


def spoil(filling: bytes) -> NoReturn:
    raise LookupError(f"sour, {len(filling)} bytes")


@pytest.mark.parametrize("filling", [0, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("shm", [True, False], ids=["shm", "gloo"])
def test_an_object_that_does_not_unpickle_spares_its_group(shm: bool, filling: int) -> None:
    """Every operation with objects: the error names operation, group and source, and the next calls are right."""

    def body(g: GroupCoordinator) -> None:
        me, you, sour = g.rank_in_group, 1 - g.rank_in_group, Sour(bytes(filling))
        tree = {"a": torch.ones(3), "b": sour}

        def sent_by_both(send: Callable[[Any, int], Any], receive: Callable[[int], Any]) -> Any:
            work = send(sour, you)
            try:
                return receive(you)
            finally:
                if work is not None:
                    work.wait()

        calls: dict[str, tuple[bool, Callable[[], Any]]] = {
            "broadcast_object": (me == 1, lambda: g.broadcast_object(sour if me == 0 else None, 0)),
            "broadcast_object_list": (me == 0, lambda: g.broadcast_object_list([sour if me == 1 else None], 1)),
            "all_gather_object": (True, lambda: g.all_gather_object(sour)),
            "gather_object": (me == 1, lambda: g.gather_object(sour, 1)),
            "scatter_object": (me == 1, lambda: g.scatter_object([sour, sour] if me == 0 else None, 0)),
            "recv_object": (me == 1, lambda: g.send_object(sour, 1) if me == 0 else g.recv_object(0)),
            "irecv_object": (True, lambda: sent_by_both(g.isend_object, lambda src: g.irecv_object(src).wait())),
            "recv_tensor_dict": (me == 1, lambda: g.send_tensor_dict(tree, 1) if me == 0 else g.recv_tensor_dict(0)),
            "broadcast_tensor_dict": (me == 1, lambda: g.broadcast_tensor_dict(tree if me == 0 else None, 0)),
        }
        for name, (fails, call) in calls.items():
            if fails:
                text = rf"{name} on group 'tp' \(rank {me}, .*object from rank {you} .*LookupError: sour"
                with pytest.raises(LookupError, match=text):
                    call()
            else:
                call()
            assert g.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
            assert g.all_gather_object([me]) == [[0], [1]]
            assert g.broadcast_object(me, 1) == 1
        assert not g.is_broken

    on(2, body, shm=shm)
