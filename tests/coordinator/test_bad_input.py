"""Every kind of bad input for every operation, and calls that do not fit together.

`test_misuse.py` has one of each kind; here is the table.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.communicators.tags import CHECK, COLLECTIVE, MESSAGE, OBJECT, OBJECT_REST, make_tag
from commgraph.coordinator import GroupCoordinator
from tests.helpers import again_if_late, in_time, on

Body = Callable[[GroupCoordinator], Any]


# Operations by the arguments that they have. Each is good for a group of two when given nothing else.


def x46() -> torch.Tensor:
    return torch.ones(4, 6)


TENSOR: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda g, x, **how: g.all_reduce(x, **how),
    "all_reduce_": lambda g, x, **how: g.all_reduce_(x, **how),
    "all_gather": lambda g, x, **how: g.all_gather(x, **how),
    "all_gatherv": lambda g, x, **how: g.all_gatherv(x, **how),
    "all_gatherv of a list": lambda g, x, **how: g.all_gatherv([torch.ones(4), x], **how),
    "reduce_scatter": lambda g, x, **how: g.reduce_scatter(x, **how),
    "reduce_scatterv": lambda g, x, **how: g.reduce_scatterv(x, **how),
    "all_to_all": lambda g, x, **how: g.all_to_all(x, **how),
    "gather": lambda g, x, **how: g.gather(x, **how),
    "reduce": lambda g, x, **how: g.reduce(x, **how),
    "scatter": lambda g, x, **how: g.scatter(x, g.rank_in_group, **how),
    "broadcast": lambda g, x, **how: g.broadcast(x, **how),
    "send": lambda g, x, **how: g.send(x, **how),
    "sendrecv": lambda g, x, **how: g.sendrecv(x, g.next_in_group, 3, torch.float32, g.prev_in_group, **how),
    "isend": lambda g, x, **how: g.isend(x, tag=3, **how),
    "send_tensor_dict": lambda g, x, **how: g.send_tensor_dict({"a": {"b": x}}, **how),
    "broadcast_tensor_dict": lambda g, x, **how: g.broadcast_tensor_dict({"a": x}, g.rank_in_group, **how),
}
NAMES = {"all_gatherv of a list": "all_gatherv"}
OTHERS: dict[str, Body] = {
    "recv": lambda g, **how: g.recv(3, torch.float32, **how),
    "barrier": lambda g, **how: g.barrier(**how),
    "broadcast_object": lambda g, **how: g.broadcast_object(1, **how),
    "broadcast_object_list": lambda g, **how: g.broadcast_object_list([1], **how),
    "all_gather_object": lambda g, **how: g.all_gather_object(1, **how),
    "send_object": lambda g, **how: g.send_object(1, g.next_in_group, **how),
    "recv_object": lambda g, **how: g.recv_object(g.prev_in_group, **how),
    "recv_tensor_dict": lambda g, **how: g.recv_tensor_dict(**how),
    "irecv": lambda g, **how: g.irecv(3, torch.float32, cg.ANY, **how),
    "isend_object": lambda g, **how: g.isend_object(1, g.next_in_group, **how),
    "irecv_object": lambda g, **how: g.irecv_object(g.prev_in_group, **how),
    "scatter_object": lambda g, **how: g.scatter_object([1, 2], **how),
    "gather_object": lambda g, **how: g.gather_object(1, **how),
}


class Marked(torch.Tensor):
    """A subclass whose values are elsewhere."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("the values of this tensor were asked for")


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def quantized() -> torch.Tensor:
    tensor: torch.Tensor = torch._empty_affine_quantized([4, 6], scale=1.0, zero_point=0, dtype=torch.qint8)
    return tensor


# Kind -> (tensor, what the message must name).
BAD_TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [1.0], "list"),
    "None": (lambda: None, "NoneType"),
    "meta": (lambda: torch.ones(4, 6, device="meta"), "meta"),
    "sparse": (lambda: x46().to_sparse(), "sparse_coo"),
    "without memory": (lambda: torch._efficientzerotensor(3), "no memory"),
    "nested": (nested, "nested"),
    "subclass": (lambda: torch.Tensor._make_subclass(Marked, x46()), "Marked"),
    "gradient": (lambda: x46().requires_grad_(), "commgraph.nn.functional"),
    "parameter": (lambda: torch.nn.Parameter(x46()), "no_grad"),
    "part of a graph": (lambda: x46().requires_grad_() * 2, "gradient"),
}

_WITH_GRADIENTS = ("gradient", "parameter", "part of a graph")
_DIFFERENTIABLE = ("all_reduce", "all_gather", "all_gatherv", "all_gatherv of a list", "reduce_scatter", "reduce_scatterv", "all_to_all")
_FILLED = ("all_reduce_", "broadcast")
_LISTED = ("all_reduce", "all_reduce_", "all_gather", "all_gatherv", "reduce_scatter", "broadcast")

Case = tuple[Callable[[GroupCoordinator], Any], str, str]
CASES: dict[str, Case] = {}


def case(title: str, operation: str, call: Callable[[GroupCoordinator], Any], named: str) -> None:
    assert title not in CASES
    CASES[title] = (call, operation, named)


for _op, _call in TENSOR.items():
    for _kind, (_make, _named) in BAD_TENSORS.items():
        if "tensor_dict" in _op and _kind in ("list", "None"):
            continue  # these travel as objects
        if _kind in _WITH_GRADIENTS and (_op in _DIFFERENTIABLE or (_op in _FILLED and _kind == "part of a graph")):
            continue
        if _kind in _WITH_GRADIENTS and _op in _FILLED:
            _named = "leaf"
        if _op in _LISTED and _kind == "list":
            _named = "x[0] is a float"
        case(f"{_op}: {_kind}", NAMES.get(_op, _op), lambda g, call=_call, make=_make: call(g, make()), _named)  # type: ignore[misc]

_TIMEOUTS: dict[str, Any] = {
    "negative": -1.5,
    "nan": math.nan,
    "infinite": math.inf,
    "bool": True,
    "text": "1s",
}
for _op, _other in OTHERS.items():
    for _kind, _value in _TIMEOUTS.items():
        case(f"{_op}: timeout {_kind}", _op, lambda g, call=_other, value=_value: call(g, timeout=value), repr(_value))  # type: ignore[call-arg,misc]
BEGUN: dict[str, Callable[..., Any]] = {
    "all_reduce_async": lambda g, x, **how: g.all_reduce_async(x, **how),
    "all_gather_async": lambda g, x, **how: g.all_gather_async(x, **how),
    "reduce_scatter_async": lambda g, x, **how: g.reduce_scatter_async(x, **how),
    "all_to_all_async": lambda g, x, **how: g.all_to_all_async(x, **how),
    "gather_async": lambda g, x, **how: g.gather_async(x, **how),
    "broadcast_async": lambda g, x, **how: g.broadcast_async(x, **how),
}
for _op, _call in BEGUN.items():
    for _kind, (_make, _named) in BAD_TENSORS.items():
        case(f"{_op}: {_kind}", _op, lambda g, call=_call, make=_make: call(g, make()), "gradient" if _kind in _WITH_GRADIENTS else _named)  # type: ignore[misc]

for _op, _call in {**TENSOR, **BEGUN, "barrier_async": lambda g, _, **how: g.barrier_async(**how)}.items():
    for _kind, _value in _TIMEOUTS.items():
        case(
            f"{_op}: timeout {_kind}",
            NAMES.get(_op, _op),
            lambda g, call=_call, value=_value: call(g, x46(), timeout=value),  # type: ignore[misc]
            repr(_value),
        )

# A rank that is none, for everything that takes one.
_PEERS: dict[str, Callable[[GroupCoordinator, Any], Any]] = {
    "broadcast src": lambda g, rank: g.broadcast(x46(), rank),
    "gather dst": lambda g, rank: g.gather(x46(), rank),
    "gather_async dst": lambda g, rank: g.gather_async(x46(), rank),
    "broadcast_async src": lambda g, rank: g.broadcast_async(x46(), rank),
    "reduce dst": lambda g, rank: g.reduce(x46(), rank),
    "scatter src": lambda g, rank: g.scatter(x46(), rank),
    "send dst": lambda g, rank: g.send(x46(), rank),
    "recv src": lambda g, rank: g.recv(3, torch.float32, rank),
    "broadcast_object src": lambda g, rank: g.broadcast_object(1, rank),
    "broadcast_object_list src": lambda g, rank: g.broadcast_object_list([1], rank),
    "send_object dst": lambda g, rank: g.send_object(1, rank),
    "recv_object src": lambda g, rank: g.recv_object(rank),
    "broadcast_tensor_dict src": lambda g, rank: g.broadcast_tensor_dict({}, rank),
    "send_tensor_dict dst": lambda g, rank: g.send_tensor_dict({}, rank),
    "recv_tensor_dict src": lambda g, rank: g.recv_tensor_dict(rank),
    "sendrecv dst": lambda g, rank: g.sendrecv(x46(), rank, 3, torch.float32, 0),
    "sendrecv src": lambda g, rank: g.sendrecv(x46(), 0, 3, torch.float32, rank),
    "isend dst": lambda g, rank: g.isend(x46(), rank),
    "irecv src": lambda g, rank: g.irecv(3, torch.float32, rank),
    "isend_object dst": lambda g, rank: g.isend_object(1, rank),
    "irecv_object src": lambda g, rank: g.irecv_object(rank),
    "scatter_object src": lambda g, rank: g.scatter_object([1, 2], rank),
    "gather_object dst": lambda g, rank: g.gather_object(1, rank),
}
for _op, _peer in _PEERS.items():
    _name, _argument = _op.split()
    for _value in (7, -1, 1.0, "0", True, [0]):
        case(f"{_op} = {_value!r}", _name, lambda g, call=_peer, value=_value: call(g, value), f"{_argument}={_value!r}")  # type: ignore[misc]
    if _name.startswith(("send_", "recv_")) or _name in ("send", "recv"):
        case(f"{_op} = itself", _name, lambda g, call=_peer: call(g, g.rank_in_group), "itself")  # type: ignore[misc]

for _title, _both in {
    "dst": lambda g: g.sendrecv(x46(), g.rank_in_group, 3, torch.float32, g.next_in_group),
    "src": lambda g: g.sendrecv(x46(), g.next_in_group, 3, torch.float32, g.rank_in_group),
}.items():
    case(f"sendrecv: {_title} alone is itself", "sendrecv", _both, "no other side")  # type: ignore[arg-type]

_TAGGED: dict[str, Callable[[GroupCoordinator, Any], Any]] = {
    "send": lambda g, tag: g.send(x46(), tag=tag),
    "recv": lambda g, tag: g.recv(3, torch.float32, tag=tag),
    "isend": lambda g, tag: g.isend(x46(), tag=tag),
    "irecv": lambda g, tag: g.irecv(3, torch.float32, cg.ANY, tag=tag),
    "batch": lambda g, tag: g.batch([cg.Send(x46(), tag=tag)]),
}
for _op, _peer in _TAGGED.items():
    for _value in (-1, 1 << 20, 1.0, "0", None, True):
        case(f"{_op}: tag {_value!r}", _op, lambda g, call=_peer, value=_value: call(g, value), f"tag={_value!r}")  # type: ignore[misc]
case("recv: nothing from anybody", "recv", lambda g: g.recv(0, torch.float32, cg.ANY), "no elements")
case("batch: from anybody", "batch", lambda g: g.batch([cg.Recv(x46(), cg.ANY)]), "src=commgraph.ANY")  # type: ignore[arg-type]
for _value in (None, [1], [1, 2, 3], 7):
    case(f"scatter_object: {_value!r}", "scatter_object", lambda g, value=_value: g.scatter_object(value, g.rank_in_group), "objs")  # type: ignore[misc]
case("scatter_object: a lambda", "scatter_object", lambda g: g.scatter_object([lambda: 0] * 2, g.rank_in_group), "cannot pickle")
case("gather_object: a lambda", "gather_object", lambda g: g.gather_object([lambda: 0]), "cannot pickle")
case("isend_object: a lambda", "isend_object", lambda g: g.isend_object(lambda: 0, g.next_in_group), "cannot pickle")

_DIMS: dict[str, Callable[[GroupCoordinator, Any], Any]] = {
    "all_gather dim": lambda g, dim: g.all_gather(x46(), dim),
    "all_gatherv dim": lambda g, dim: g.all_gatherv(x46(), dim),
    "reduce_scatter dim": lambda g, dim: g.reduce_scatter(x46(), dim),
    "reduce_scatterv dim": lambda g, dim: g.reduce_scatterv(x46(), dim),
    "gather dim": lambda g, dim: g.gather(x46(), 0, dim),
    "gather_async dim": lambda g, dim: g.gather_async(x46(), 0, dim),
    "scatter dim": lambda g, dim: g.scatter(x46(), g.rank_in_group, dim),
    "all_to_all_async scatter_dim": lambda g, dim: g.all_to_all_async(x46(), scatter_dim=dim),
    "all_to_all_async gather_dim": lambda g, dim: g.all_to_all_async(x46(), gather_dim=dim),
    "all_to_all scatter_dim": lambda g, dim: g.all_to_all(x46(), scatter_dim=dim),
    "all_to_all gather_dim": lambda g, dim: g.all_to_all(x46(), gather_dim=dim),
}
for _op, _peer in _DIMS.items():
    _name, _argument = _op.split()
    for _value in (2, -3, 0.0, None, "0", False):
        case(f"{_op} = {_value!r}", _name, lambda g, call=_peer, value=_value: call(g, value), f"{_argument}={_value!r}")  # type: ignore[misc]
    case(f"{_op} of a scalar", _name, lambda g, call={**TENSOR, **BEGUN}[_name]: call(g, torch.tensor(1.0)), "reshape")  # type: ignore[misc]

_REDUCTIONS = ("all_reduce", "all_reduce_", "reduce", "reduce_scatter", "reduce_scatterv")
for _op in _REDUCTIONS:
    _call = TENSOR[_op]
    for _value in ("mean", "SUM", None, 0, ("sum",)):
        case(f"{_op}: op {_value!r}", _op, lambda g, call=_call, op=_value: call(g, x46(), op=op), repr(_value))  # type: ignore[misc]
    for _dtype in (torch.int64, torch.uint8, torch.bool):
        case(
            f"{_op}: avg of {_dtype}",
            _op,
            lambda g, call=_call, dtype=_dtype: call(g, torch.ones(4, 6, dtype=dtype), op="avg"),  # type: ignore[misc]
            str(_dtype),
        )
    for _value in ("max", "min"):
        case(
            f"{_op}: {_value} of complex",
            _op,
            lambda g, call=_call, op=_value: call(g, torch.ones(4, 6, dtype=torch.complex64), op=op),  # type: ignore[misc]
            "complex64",
        )
    for _value in ("band", "bor", "bxor"):
        for _dtype in (torch.float32, torch.bfloat16, torch.complex64):
            case(
                f"{_op}: {_value} of {_dtype}",
                _op,
                lambda g, call=_call, op=_value, dtype=_dtype: call(g, torch.ones(4, 6, dtype=dtype), op=op),  # type: ignore[misc]
                str(_dtype),
            )
for _op in _REDUCTIONS:
    case(
        f"{_op}: no arithmetic",
        _op,
        lambda g, call=TENSOR[_op]: call(g, torch.zeros(4, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),  # type: ignore[misc]
        "float4",
    )

_SIZES: dict[str, Callable[[GroupCoordinator, Any], Any]] = {
    "all_gatherv sizes": lambda g, sizes: g.all_gatherv(x46(), 0, sizes),
    "reduce_scatterv sizes": lambda g, sizes: g.reduce_scatterv(x46(), 0, sizes),
    "gather sizes": lambda g, sizes: g.gather(x46(), 0, 0, sizes=sizes),
    "gather_async sizes": lambda g, sizes: g.gather_async(x46(), 0, 0, sizes=sizes),
    "scatter sizes": lambda g, sizes: g.scatter(x46(), g.rank_in_group, 0, sizes=sizes),
    "all_to_all_async output_sizes": lambda g, sizes: g.all_to_all_async(x46(), output_sizes=sizes),
    "all_to_all input_sizes": lambda g, sizes: g.all_to_all(x46(), input_sizes=sizes, output_sizes=[2, 2]),
    "all_to_all output_sizes": lambda g, sizes: g.all_to_all(x46(), output_sizes=sizes),
}
for _op, _peer in _SIZES.items():
    _name, _argument = _op.split()
    for _value in ([4], [], [1, 1, 2], [-1, 5], [3, 3], [2.0, 2.0], [True, 3], ["2", 2], 4, None):
        if _value is not None:
            case(f"{_op} = {_value!r}", _name, lambda g, call=_peer, value=_value: call(g, value), _argument)  # type: ignore[misc]

case("reduce_scatter: uneven", "reduce_scatter", lambda g: g.reduce_scatter(torch.ones(3, 5), 1), "5 elements")
case("reduce_scatterv: uneven without sizes", "reduce_scatterv", lambda g: g.reduce_scatterv(torch.ones(3, 5), 1), "5 elements")
case("scatter: uneven", "scatter", lambda g: g.scatter(torch.ones(3, 5), g.rank_in_group), "5 elements")
case("scatter: a dim that is none, of nothing", "scatter", lambda g: g.scatter(None, g.next_in_group, 1.5), "dim=1.5")
case("scatter: sizes that are none, of nothing", "scatter", lambda g: g.scatter(None, g.next_in_group, sizes=[1, 2, 3]), "sizes")
case("scatter: 25 dims", "scatter", lambda g: g.scatter(torch.ones([1] * 24 + [2]), g.rank_in_group), "24 dims")
case("all_to_all: uneven", "all_to_all", lambda g: g.all_to_all(torch.ones(3, 5), scatter_dim=1), "5 elements")
case("all_to_all: no output_sizes", "all_to_all", lambda g: g.all_to_all(x46(), input_sizes=[1, 3]), "without output_sizes")
case("all_gatherv: nothing", "all_gatherv", lambda g: g.all_gatherv(7), "int")
case(
    "all_gatherv: one of the list has another extent",
    "all_gatherv",
    lambda g: g.all_gatherv([torch.ones(2), torch.ones(3)], 0, [2, 2]),
    "x[1]",
)

_OUTS: dict[str, Callable[[GroupCoordinator, Any], Any]] = {
    "all_gather": lambda g, out: g.all_gather(x46(), 0, out=out),
    "reduce_scatter": lambda g, out: g.reduce_scatter(torch.ones(16, 6), 0, out=out),
    "all_to_all": lambda g, out: g.all_to_all(torch.ones(8, 6), out=out),
    "recv": lambda g, out: g.recv((8, 6), torch.float32, out=out),
    "irecv": lambda g, out: g.irecv((8, 6), torch.float32, cg.ANY, out=out),
    "sendrecv": lambda g, out: g.sendrecv(x46(), g.next_in_group, (8, 6), torch.float32, g.prev_in_group, out=out),
}
with torch.inference_mode():
    _INFERENCE = torch.empty(8, 6)
_BAD_OUTS: dict[str, tuple[Any, str]] = {
    "shape": (torch.empty(6, 8), "(6, 8)"),
    "flat": (torch.empty(48), "(48,)"),
    "dtype": (torch.empty(8, 6, dtype=torch.float64), "float64"),
    "device": (torch.empty(8, 6, device="meta"), "meta"),
    "list": ([0.0] * 48, "list"),
    "expanded": (torch.empty(8, 1).expand(8, 6), "expanded"),
    "gradient": (torch.empty(8, 6, requires_grad=True), "gradient"),
    "inference": (_INFERENCE, "inference"),
    "sparse": (torch.empty(8, 6).to_sparse(), "sparse"),
}
for _op, _peer in _OUTS.items():
    for _kind, (_value, _named) in _BAD_OUTS.items():
        case(f"{_op}: out's {_kind}", _op, lambda g, call=_peer, value=_value: call(g, value), _named)  # type: ignore[misc]
for _op in ("all_gather_async", "reduce_scatter_async", "all_to_all_async"):
    _given = {"all_gather_async": (4, 6), "reduce_scatter_async": (16, 6)}.get(_op, (8, 6))
    for _kind, (_value, _named) in _BAD_OUTS.items():
        _how = {"out": _value} if _op == "all_to_all_async" else {"dim": 0, "out": _value}
        case(
            f"{_op}: out's {_kind}",
            _op,
            lambda g, call=BEGUN[_op], given=_given, how=_how: call(g, torch.ones(given), **how),  # type: ignore[misc]
            _named,
        )
for _op in ("all_reduce_", "broadcast", "broadcast_async"):
    case(f"{_op}: expanded", _op, lambda g, call={**TENSOR, **BEGUN}[_op]: call(g, torch.ones(1).expand(3)), "expanded")  # type: ignore[misc]
    case(f"{_op}: inference", _op, lambda g, call={**TENSOR, **BEGUN}[_op]: call(g, _INFERENCE), "inference")  # type: ignore[misc]

for _title, _value in {"negative": (-1,), "float": 3.0, "text": "33", "None": None, "bool": True}.items():
    case(f"recv: size {_title}", "recv", lambda g, value=_value: g.recv(value, torch.float32), "size=")  # type: ignore[misc]
_RECEIVED: dict[str, dict[str, Any]] = {
    "no dtype": {"dtype": "float32"},
    "no device": {"dtype": torch.float32, "device": "nowhere"},
    "a device that is not here": {"dtype": torch.float32, "device": "xpu"},
    "meta": {"dtype": torch.float32, "device": "meta"},
}
for _title, _how in _RECEIVED.items():
    case(f"recv: {_title}", "recv", lambda g, how=_how: g.recv(3, **how), str(_how.get("device", "float32")))  # type: ignore[misc]

for _value in ((1, 2), None, "ab"):
    case(
        f"broadcast_object_list: {_value!r}",
        "broadcast_object_list",
        lambda g, value=_value: g.broadcast_object_list(value),  # type: ignore[misc]
        type(_value).__name__,
    )
_ITSELF: dict[str, Any] = {"a": {}}
_ITSELF["a"]["b"] = _ITSELF["a"]
for _title, (_value, _named) in {"list": ([x46()], "list"), "None": (None, "None"), "itself": (_ITSELF, "contains itself")}.items():
    case(f"send_tensor_dict: {_title}", "send_tensor_dict", lambda g, value=_value: g.send_tensor_dict(value), _named)  # type: ignore[misc]
    case(
        f"broadcast_tensor_dict: {_title}",
        "broadcast_tensor_dict",
        lambda g, value=_value: g.broadcast_tensor_dict(value, g.rank_in_group),  # type: ignore[misc]
        _named,
    )
case(
    "send_tensor_dict: a key that is not there",
    "send_tensor_dict",
    lambda g: g.send_tensor_dict({"a": x46()}, None, g, {"b": True}),
    "['b']",
)
case(
    "send_tensor_dict: a tensor that does not divide",
    "send_tensor_dict",
    lambda g: g.send_tensor_dict({"a": torch.ones(3)}, None, g, {"a": True}),
    "3 elements",
)
case("send_object: a lambda", "send_object", lambda g: g.send_object(lambda: 0, g.next_in_group), "cannot pickle")
case("all_gather_object: a lambda", "all_gather_object", lambda g: g.all_gather_object([lambda: 0]), "cannot pickle")

REFUSED = (cg.UnsupportedTensorError, ValueError, TypeError)


def refuse(group: GroupCoordinator, title: str) -> None:
    call, operation, named = CASES[title]
    with pytest.raises(REFUSED) as caught:
        call(group)
    message = str(caught.value)
    assert message.startswith(f"{operation} on group 'tp' (rank {group.rank},"), (title, message)
    assert named in message, (title, message)
    assert type(caught.value) in REFUSED, title


def test_the_whole_table_on_every_rank_and_the_group_goes_on() -> None:
    def body(group: GroupCoordinator) -> int:
        sent = group.bytes_sent
        for title in CASES:
            refuse(group, title)
        assert group.bytes_sent == sent
        # Every kind of call still pairs with its like.
        assert float(group.all_reduce(torch.ones(()))) == 2
        assert group.broadcast_object("x" if group.is_first_rank else None) == "x"
        if group.is_first_rank:
            group.send(torch.ones(3))
            group.send_object(1, 1)
            group.send_tensor_dict({"a": torch.ones(2)})
        else:
            assert group.recv(3, torch.float32).tolist() == [1, 1, 1]
            assert group.recv_object(0) == 1
            assert group.recv_tensor_dict()["a"].tolist() == [1, 1]
        return len(CASES)

    assert on(2, body) == [len(CASES)] * 2
    assert len(CASES) > 400


def test_the_group_works_after_each_one() -> None:
    """The table again, with a call after each: none is off by one."""

    def body(group: GroupCoordinator) -> None:
        for i, title in enumerate(CASES):
            if i % 7:
                continue
            refuse(group, title)
            assert int(group.all_reduce(torch.tensor(i))) == 2 * i

    on(2, body)


@pytest.mark.skipif("qint8" not in dir(torch), reason="this torch has no quantized tensors any more")
@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_quantized_tensors() -> None:
    def body(group: GroupCoordinator) -> None:
        for call in TENSOR.values():
            with pytest.raises(cg.UnsupportedTensorError, match="int_repr"):
                call(group, quantized())

    on(2, body)


@pytest.mark.parametrize("title", ["all_reduce: meta", "broadcast src = 7", "all_gather dim = 2", "all_to_all: uneven"])
@pytest.mark.parametrize("then", ["nothing", "another call"])
@again_if_late
def test_raised_on_one_rank_only(title: str, then: str) -> None:
    """The others end within their deadline, and from then on the group is broken for them."""
    given_up = threading.Barrier(3)

    def body(group: GroupCoordinator) -> None:
        started = time.monotonic()
        if group.rank == 1:
            refuse(group, title)
            if then == "another call":
                with pytest.raises((cg.CollectiveTimeoutError, cg.CollectiveMismatchError)):
                    group.all_gather(torch.ones(3), timeout=0.5)
                return
            given_up.wait(30)
            with pytest.raises(cg.CollectiveError):
                group.barrier(timeout=0.5)
            return
        with pytest.raises((cg.CollectiveTimeoutError, cg.CollectiveMismatchError)) as caught:
            group.all_reduce(x46(), timeout=0.5)
        if then == "nothing":
            given_up.wait(30)
        in_time(time.monotonic() - started, 2.5)
        first = caught.value
        assert "all_reduce on group 'tp'" in str(first)
        assert (first.group, first.operation) == ("tp", "all_reduce")
        for again in (group.barrier, lambda: group.all_gather_object(1), lambda: group.send(x46()), lambda: group.recv(3, torch.int8)):
            with pytest.raises(type(first)) as caught:
                again()
            assert str(caught.value) == str(first)
            assert caught.value.__cause__ is first

    on(3, body)


# One rank


def test_one_rank_gives_its_input_back_and_checks_all_the_same() -> None:
    with cg.World.from_env({}) as world, world.context(cg.Layout(1), name="a") as context:
        g = context.tp
        x = x46().t()
        for op in ("sum", "avg", "max", "min", "product"):
            assert g.all_reduce(x, op=op) is x
            assert g.all_reduce_(x, op=op) is x
            assert g.reduce_scatter(x, 1, op=op) is x
        assert g.all_gather(x) is x
        assert g.all_gatherv(x) is x
        assert g.all_gatherv(x, 1, [4]) is x
        (back,) = g.all_gatherv([x])
        assert back is x
        assert g.reduce_scatterv(x, 0, [6]) is x
        assert g.all_to_all(x) is x
        assert g.all_to_all(x, input_sizes=[6], output_sizes=[6]) is x
        assert g.gather(x) is x
        assert g.gather(x, sizes=[4]) is x
        assert g.broadcast(x) is x
        assert g.scatter(x) is x
        assert g.scatter(x, sizes=[4]) is x
        for op in ("band", "bor", "bxor"):
            whole = x.long()
            assert g.all_reduce(whole, op=op) is whole
            assert g.all_reduce_(whole, op=op) is whole
            assert g.reduce(whole, op=op) is whole
            assert g.reduce_scatter(whole, 1, op=op) is whole
            assert g.reduce_scatterv(whole, 1, [4], op=op) is whole
        for begun in (
            g.all_reduce_async,
            g.all_gather_async,
            g.reduce_scatter_async,
            g.all_to_all_async,
            g.gather_async,
            g.broadcast_async,
        ):
            assert begun(x).wait() is x
        assert g.barrier_async().wait() is None
        for fill in (g.all_gather, g.reduce_scatter):
            out = torch.zeros(6, 4)
            assert fill(x, 0, out=out) is out
            assert torch.equal(out, x)
        out = torch.zeros(6, 4)
        assert g.all_to_all(x, out=out) is out
        assert torch.equal(out, x)
        thing = object()
        assert g.broadcast_object(thing) is thing
        assert g.all_gather_object(thing) == [thing]
        things = [thing]
        assert g.broadcast_object_list(things) is things
        tree = {"a": x}
        assert g.broadcast_tensor_dict(tree) is tree
        g.barrier()
        nobody: tuple[Callable[[], Any], ...] = (
            lambda: g.send(x),
            lambda: g.recv(3, torch.float32),
            lambda: g.send_object(1, 0),
            lambda: g.recv_object(0),
            lambda: g.send_tensor_dict({}),
            g.recv_tensor_dict,
        )
        for call in nobody:
            with pytest.raises(ValueError, match="nobody to talk to"):
                call()
        # Left out: what is right for one rank, and what is refused for another reason before (nobody is there to send to).
        other = re.compile(
            r"^i?(send|recv|sendrecv|batch)(_|:| (src|dst))|scatter_object|gather_object|sizes = |itself|of nothing|lambda|uneven"
            r"|another extent|out's|no output_sizes"
        )
        for title in CASES:
            if not other.search(title):
                refuse(g, title)
        for title, (bad, named) in _BAD_OUTS.items():
            if title != "shape":
                with pytest.raises(cg.UnsupportedTensorError, match=re.escape(named)):
                    g.all_gather(torch.ones(8, 6), 0, out=bad)


def test_gradients_are_refused_in_grad_mode_only() -> None:
    def body(group: GroupCoordinator) -> None:
        x = torch.ones(3, requires_grad=True)
        with torch.no_grad():
            y = group.all_reduce(x)
            assert group.broadcast_tensor_dict({"x": x} if group.is_first_rank else None)["x"].tolist() == [1, 1, 1]
        assert y.tolist() == [2, 2, 2]
        assert not y.requires_grad
        with torch.inference_mode():
            z = torch.ones(3)
            assert group.all_reduce_(z).tolist() == [2, 2, 2]
            assert group.all_gather(x, 0).shape == (6,)
        assert group.all_reduce(z).tolist() == [4, 4, 4]

    on(2, body)


# Calls that do not fit together

MISMATCHES: dict[str, Callable[[GroupCoordinator], Any]] = {
    "operation": lambda g: g.all_gather(torch.ones(4)) if g.rank == 1 else g.all_reduce(torch.ones(4)),
    "shape": lambda g: g.all_reduce(torch.ones(4 + g.rank)),
    "dtype": lambda g: g.all_reduce(torch.ones(4, dtype=torch.float64 if g.rank else torch.float32)),
    "op": lambda g: g.all_reduce(torch.ones(4), op="max" if g.rank == 1 else "sum"),
    "dim": lambda g: g.all_gather(torch.ones(3, 3), g.rank % 2),
    "src": lambda g: g.broadcast(torch.ones(3), g.rank % 2),
    "bitwise op": lambda g: g.all_reduce(torch.ones(4, dtype=torch.int64), op="bxor" if g.rank == 1 else "bor"),
    "op of uneven pieces": lambda g: g.reduce_scatterv(torch.ones(6), 0, [1, 2, 3], op="max" if g.rank == 1 else "sum"),
    "dst of a reduction": lambda g: g.reduce(torch.ones(3), g.rank % 2),
    "op of a reduction to one": lambda g: g.reduce(torch.ones(3), 0, op="max" if g.rank == 1 else "sum"),
    "src of a scatter": lambda g: g.scatter(torch.ones(6), g.rank % 2),
    "shape of a scatter": lambda g: g.scatter(torch.ones(6 + 3 * (g.rank % 2))),
    "sizes of a scatter": lambda g: g.scatter(torch.ones(6) if g.rank == 0 else None, sizes=[1, 2, 3] if g.rank == 1 else [2, 2, 2]),
    "sizes of a gather": lambda g: g.gather(torch.ones(2), sizes=[2, 2, 1] if g.rank == 1 else [2, 2, 2]),
    "reduce or gather": lambda g: g.reduce(torch.ones(3)) if g.rank == 1 else g.gather(torch.ones(3)),
    "one of a list": lambda g: g.all_reduce([torch.ones(3), torch.ones(3 + g.rank % 2)]),
    "length of a list": lambda g: g.all_gather([torch.ones(3)] * (2 + g.rank % 2)),
    "begun": lambda g: g.broadcast_async(torch.ones(3 + g.rank)).wait(),
    "begun or not": lambda g: g.barrier_async().wait() if g.rank == 1 else g.all_to_all_async(torch.ones(3)).wait(),
    "sizes": lambda g: g.reduce_scatterv(torch.ones(6), 0, [1, 2, 3] if g.rank == 1 else [2, 2, 2]),
    "skipped": lambda g: [g.all_reduce(torch.ones(2 if i < 3 else 1)) for i in range(1 if g.rank == 2 else 0, 4)],
    "reordered": lambda g: [g.all_gather_object(1) if (i + g.rank) % 2 else g.all_reduce(torch.ones(2)) for i in range(2)],
    "what crosses": lambda g: g.all_to_all(torch.ones(6), input_sizes=[1, 2, 3], output_sizes=[[1, 2, 3], [1, 2, 2], [3, 3, 3]][g.rank]),
    "object": lambda g: g.broadcast_object(1, 0) if g.rank == 0 else g.all_reduce(torch.ones(4)),
    "object receiver": lambda g: g.broadcast_object(1, 0) if g.rank == 1 else g.all_reduce(torch.ones(4)),
    "object src": lambda g: g.broadcast_object(1, g.rank % 2),
    "object or list": lambda g: g.broadcast_object([1], 0) if g.rank == 1 else g.broadcast_object_list([1], 0),
    "gathered objects": lambda g: g.all_gather_object(1) if g.rank == 1 else g.broadcast_object(1, 2),
    "long signature": lambda g: g.all_gather(torch.ones(*([1] * 200), 2 if g.rank == 1 else 3)),
}


@pytest.mark.parametrize("kind", MISMATCHES)
@again_if_late
def test_with_check_a_mismatch_raises_on_every_rank_at_once(kind: str) -> None:
    def body(group: GroupCoordinator) -> str:
        group.barrier()
        started = time.monotonic()
        with pytest.raises(cg.CollectiveMismatchError) as caught:
            MISMATCHES[kind](group)
        in_time(time.monotonic() - started, 2)
        assert caught.value.group == "tp"
        assert caught.value.sequence is not None
        with pytest.raises(cg.CollectiveMismatchError):
            group.barrier()
        return str(caught.value)

    messages = on(3, body, check=True, timeout=20)
    for message in messages:
        assert "on group 'tp'" in message
        assert re.search(r"call #\d+", message)
        assert "test_bad_input.py:" in message
    assert any(re.search(r"rank \d: call #\d+, .*, at .*test_bad_input.py:\d+", message) for message in messages)


@pytest.mark.parametrize("kind", MISMATCHES)
@again_if_late
def test_without_check_a_mismatch_ends_at_the_deadline_and_tells_what_each_was_doing(kind: str) -> None:
    def body(group: GroupCoordinator) -> str | None:
        group.barrier(timeout=20)
        started = time.monotonic()
        said = None
        try:
            MISMATCHES[kind](group)
        except (cg.CollectiveMismatchError, cg.CollectiveTimeoutError) as error:
            said = str(error)
        # One whose part was done (a source that was heard by all) learns of it in its next call.
        with pytest.raises((cg.CollectiveMismatchError, cg.CollectiveTimeoutError)):
            group.all_gather_object(1)
        in_time(time.monotonic() - started, 2 * 0.4 + 2)
        return said

    messages = [message for message in on(3, body, host_timeout=timedelta(seconds=0.4), timeout=20, shm=False) if message]
    assert messages
    told = re.compile(r"did not end within(?s:.)*gave up in call|called different things")  # a scatter's header tells at once
    assert any(map(told.search, messages)) or "object" in kind
    assert all("test_bad_input.py:" in message for message in messages) or "object" in kind


@pytest.mark.parametrize("kind", MISMATCHES)
@again_if_late
def test_in_shared_memory_a_mismatch_raises_without_check(kind: str) -> None:
    """No rank hangs: each learns what all called, at once where tensors are concerned."""
    objects = "object" in kind

    def body(group: GroupCoordinator) -> str | None:
        group.barrier()
        started = time.monotonic()
        said = None
        try:
            MISMATCHES[kind](group)
        except cg.CollectiveMismatchError as error:
            said = str(error)
        # Whoever only puts an object waits for nobody, and learns of it in the next call.
        with pytest.raises(cg.CollectiveMismatchError):
            group.all_gather_object(1)
        in_time(time.monotonic() - started, 2)
        assert said is not None or objects
        return said

    messages = [message for message in on(3, body, timeout=20) if message]
    assert messages or objects
    for message in messages:
        assert "on group 'tp'" in message
        assert re.search(r"rank \d.*call #\d+, ", message)
        assert "test_bad_input.py:" in message


def test_with_check_objects_are_still_polled_for() -> None:
    ran_out = threading.Semaphore(0)

    def body(group: GroupCoordinator) -> int:
        tries = 0
        objects: tuple[Any, ...] = ("one", "two", list(range(100_000)))
        for expected in objects:
            if group.rank == 1:
                for _ in range(4):
                    assert ran_out.acquire(timeout=30)
                group.broadcast_object(expected, 1)
                continue
            for number in itertools.count():
                tries += 1
                try:
                    got: Any = group.broadcast_object(None, 1, timeout=0.05)
                except cg.CollectiveTimeoutError:
                    if number < 2:
                        ran_out.release()
                    continue
                assert got == expected
                break
        group.barrier()
        return tries

    tries = on(3, body, check=True)
    assert tries[0] > 5
    assert tries[2] > 5


def test_mixed_sizes_never_end_the_process() -> None:
    """gloo ends the process where a message is longer than the buffer that waits for it."""

    calls: tuple[Callable[[GroupCoordinator], Any], ...] = (
        lambda g: g.all_to_all(torch.ones(6), input_sizes=[[1, 5], [2, 4]][g.rank], output_sizes=[[1, 1], [3, 4]][g.rank], timeout=0.3),
        # The extents along gather_dim are each rank's own affair; here nobody said so.
        lambda g: g.all_to_all(torch.ones(2, 3 + g.rank), scatter_dim=0, gather_dim=1, input_sizes=[1, 1], timeout=0.3),
        lambda g: g.all_gatherv(torch.ones(2 + g.rank), 0, [[2, 2], [3, 3]][g.rank], timeout=0.3),
        lambda g: g.recv(10, torch.float32, timeout=0.3) if g.rank else g.send(torch.ones(1000), timeout=0.3),
    )

    def body(group: GroupCoordinator, call: Callable[[GroupCoordinator], Any]) -> None:
        with pytest.raises((cg.CollectiveMismatchError, cg.CollectiveTimeoutError)):
            call(group)

    for call in calls:
        on(2, partial(body, call=call), timeout=20, shm=False)
    # In shared memory a message is taken by the ring, and its sender waits for nobody: only the receiver can know.
    for call in calls[:-1]:
        on(2, partial(body, call=call), timeout=20)
    on(2, lambda group: body(group, calls[-1]) if group.rank else calls[-1](group), timeout=20)


def test_tags_tell_sizes_and_calls_apart() -> None:
    from commgraph.communicators.gloo_transport import _sized

    kinds = (COLLECTIVE, MESSAGE, OBJECT, OBJECT_REST, CHECK)
    tags = {make_tag(kind, number, text) for kind in kinds for number in range(300) for text in ("", "a", "sum torch.float32 (4,)")}
    assert len(tags) >= len(kinds) * 900 - 2
    assert all(0 <= tag < 7 << 28 for tag in tags)
    tag = make_tag(COLLECTIVE, 1, "x")
    sizes = [*range(20_000), *(2**28 + i for i in range(100)), *(2**33 * i for i in range(1, 100))]
    assert len({_sized(tag, size) for size in sizes}) > len(sizes) - 3
    assert len({_sized(tag, size) for size in range(20_000)}) == 20_000
    assert all(_sized(tag, size) >> 28 == tag >> 28 for size in sizes)


def test_a_short_deadline_is_a_timeout_and_no_lost_peer() -> None:
    def body(group: GroupCoordinator, given_up: threading.Event) -> str:
        try:
            if group.rank == 0:
                assert given_up.wait(30)
            group.all_reduce(torch.ones(2), timeout=0.0203 + 0.0007 * group.rank)
        except cg.CollectiveError as error:
            given_up.set()
            return type(error).__name__
        return "done"

    for _ in range(2):
        assert set(on(2, partial(body, given_up=threading.Event()))) == {"CollectiveTimeoutError"}


@pytest.mark.parametrize("timeout", [1e9, 1e13, 1e300, timedelta.max])
def test_a_deadline_may_be_as_far_as_one_likes(timeout: Any) -> None:
    def body(group: GroupCoordinator) -> None:
        assert float(group.all_reduce(torch.ones(()), timeout=timeout)) == 2
        assert group.broadcast_object(group.rank, 1, timeout=timeout) == 1
        assert group.all_gather_object(group.rank, timeout=timeout) == [0, 1]

    on(2, body)
