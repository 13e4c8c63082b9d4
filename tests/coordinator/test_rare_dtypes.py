"""Dtypes that torch hardly serves: moved as bytes by operations that only move data, refused by all others before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.carriers import CARRIERS, QUANTIZED, UNSERVED
from commgraph.coordinator import GroupCoordinator
from tests.helpers import on


def tensor(dtype: torch.dtype, rank: int) -> torch.Tensor:
    """Return four rows of twelve elements or, of two bytes, six."""
    return (torch.arange(48, dtype=torch.uint8).reshape(4, 12) + 100 * rank).view(dtype)


def moved(g: GroupCoordinator, dtype: torch.dtype) -> dict[str, tuple[Any, torch.Tensor | None]]:
    """Return results of every operation that moves data, and the bits expected."""
    me, you = g.rank_in_group, 1 - g.rank_in_group
    number = CARRIERS[dtype.itemsize]
    xs = [tensor(dtype, rank) for rank in range(2)]
    whole = [x.view(number) for x in xs]
    x, joined = xs[me], torch.cat(whole)
    fresh = partial(tensor, dtype, me)
    out = torch.zeros_like(joined).view(dtype)
    filled = fresh()
    mine: Any = {"a": x, "b": {"c": x.t()}}
    found: dict[str, tuple[Any, torch.Tensor | None]] = {
        "all_gather": (g.all_gather(x, 0), joined),
        "all_gather of strides": (g.all_gather(x.t(), 1), torch.cat([one.t() for one in whole], 1)),
        "all_gather, out": (g.all_gather(x, 0, out=out), joined),
        "out itself": (out, joined),
        "all_gather of a list": (g.all_gather([x, x.t()], 0)[1], torch.cat([one.t() for one in whole])),
        "all_gatherv": (g.all_gatherv(x, 0, [4, 4]), joined),
        "all_gatherv of a list": (g.all_gatherv([x, x], 0, [4, 4])[1], joined),
        "all_to_all": (g.all_to_all(x), torch.cat([one[2 * me : 2 * me + 2] for one in whole])),
        "gather": (g.gather(x, 0, 0), joined if me == 0 else None),
        "scatter": (g.scatter(x if me == 1 else None, 1, 0), whole[1][2 * me : 2 * me + 2]),
        "broadcast": (g.broadcast(filled, 1), whole[1]),
        "broadcast of a list": (g.broadcast([fresh(), fresh()], 1)[1], whole[1]),
        "sendrecv": (g.sendrecv(x, you, x.shape, dtype, you), whole[you]),
        "batch": (g.batch([cg.Send(x.t(), you), cg.Recv(fresh().t(), you)]).wait()[1], whole[you].t()),
        "all_gather_async": (g.all_gather_async(x, 0).wait(), joined),
        "all_gather_object": (g.all_gather_object(mine)[you]["b"]["c"], whole[you].t()),
        "broadcast_tensor_dict": (g.broadcast_tensor_dict(mine, 0)["b"]["c"], whole[0].t()),
    }
    for name, tag, src, dst in (("isend", 0, you, you), ("a tag", 5, you, you), ("from any", 6, cg.ANY, you), ("to itself", 0, me, me)):
        sent, received = g.isend(x, dst, tag=tag), g.irecv(x.shape, dtype, src, tag=tag).wait()
        sent.wait()
        found[name] = received[0] if isinstance(received, tuple) else received, whole[dst]
    if me == 0:
        g.send(x, 1)
        g.send_tensor_dict(mine, 1)
    else:
        found["recv"] = g.recv(x.shape, dtype, 0), whole[0]
        found["recv_tensor_dict"] = g.recv_tensor_dict(0)["a"], whole[0]
    assert g.broadcast(filled, 1) is filled
    return found


@pytest.mark.parametrize("shm", [True, False], ids=["shm", "gloo"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic fill"])
def test_operations_that_move_data_serve_them(shm: bool, deterministic: bool) -> None:
    def body(g: GroupCoordinator) -> None:
        for dtype in sorted(UNSERVED, key=str):
            for name, (got, expected) in moved(g, dtype).items():
                if expected is not None:
                    assert got.dtype == dtype, f"{name} of {dtype}"
                    assert torch.equal(got.view(expected.dtype), expected), f"{name} of {dtype}"
            x = tensor(dtype, g.rank_in_group)
            for reduce in (g.all_reduce, g.all_reduce_, g.reduce, g.reduce_scatter, g.all_reduce_async):
                with pytest.raises(cg.UnsupportedTensorError, match="has no arithmetic"):
                    reduce(x)
            g.barrier()

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        on(2, body, shm=shm)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shm", [True, False], ids=["shm", "gloo"])
def test_quantized_ones_are_refused_before_anything_is_sent(shm: bool) -> None:
    def calls(g: GroupCoordinator, dtype: torch.dtype) -> tuple[Callable[[], Any], ...]:
        x, you = torch.zeros(16, dtype=torch.uint8).view(dtype), 1 - g.rank_in_group
        collectives = (g.all_gather, g.broadcast, g.all_to_all, g.gather, g.all_reduce, g.reduce, g.all_gather_async)
        return (
            *(partial(collective, x) for collective in collectives),
            lambda: g.send(x, you),
            lambda: g.isend(x, you),
            lambda: g.recv(3, dtype, you),
            lambda: g.irecv(3, dtype, you),
            lambda: g.send_tensor_dict({"a": x}, you),
            lambda: g.scatter(x, g.rank_in_group),
        )

    def body(g: GroupCoordinator) -> None:
        for dtype in sorted(QUANTIZED, key=str):
            for call in calls(g, dtype):
                with pytest.raises(cg.UnsupportedTensorError, match="quantized"):
                    call()
            g.barrier()

    on(2, body, shm=shm)
