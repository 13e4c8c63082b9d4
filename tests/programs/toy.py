"""Runs where toy_commgraph is installed: detection, routing, conformance, deterministic mode, and that nothing is loaded by an import."""

from __future__ import annotations

import os
import sys

import torch

import commgraph as cg
from commgraph.testing import check_communicator, spmd

assert "toy_commgraph" not in sys.modules, "loaded by an import of commgraph"


def run(world: cg.World) -> str:
    assert world.platform.name == ("toy" if "TOY_PLATFORM" in os.environ else "cpu")
    with world.context(cg.Layout(world.size, tp=world.size), name="a") as ctx:
        tp = ctx.tp
        assert tp.communicators["all_reduce"][0] == "toy"
        assert tp.communicators["all_gather"][0] == "shm"
        toy = tp.communicator("toy")
        assert tp.all_reduce(torch.full((3,), 2)).tolist() == [2 * world.size] * 3
        assert toy.calls == 1  # type: ignore[attr-defined]  # of the toy
        assert tp.all_reduce(torch.ones(5000)).sum() == 5000 * world.size
        assert toy.calls == 1  # type: ignore[attr-defined]  # too large for it
        text = ctx.explain()
        assert "toy: up to 4096 bytes" in text
    deterministic = cg.CommunicatorOptions(deterministic=True)
    with world.context(cg.Layout(world.size, tp=world.size), name="b", options=deterministic) as ctx:
        assert ctx.tp.communicators["all_reduce"][0] == "shm"
        assert "toy: not used, options.deterministic=True, and it serves some sizes only" in ctx.explain()
        assert ctx.tp.all_reduce(torch.ones(3)).tolist() == [world.size] * 3
    return text


def crowd(world: cg.World) -> None:
    with world.context(cg.Layout(5, tp=5), name="a") as ctx:
        assert "toy: not used, 5 ranks, serves up to 4" in ctx.explain()
        assert ctx.tp.all_reduce(torch.ones(2)).tolist() == [5, 5]


print(spmd(run, 2)[0])
spmd(crowd, 5)
from toy_commgraph import ToyCommunicator  # type: ignore[import-not-found]  # noqa: E402 - only now, and only where it is installed

check_communicator(ToyCommunicator.build)
print("done")
