"""Operations of the misuse matrix, which `nox -s faults` runs whole."""

from __future__ import annotations

import re

import pytest

import commgraph as cg
from commgraph.testing import spmd
from tests.programs.misuse_operations import OPERATIONS, RANKS, WRONG, Args


def test_every_operation_on_a_closed_group_says_which_one_it_is() -> None:
    def program(world: cg.World) -> None:
        with world.context(cg.Layout(RANKS, tp=RANKS), name="main") as ctx:
            group = ctx.tp
        for name, operation in OPERATIONS.items():
            if not operation.queue and not name.startswith("World") and world.rank != operation.idle:
                with pytest.raises(cg.ContextClosedError) as caught:
                    operation.call(group, Args(world.rank, operation.root[0]))
                where = rf"\w+ on group 'tp' \(rank {world.rank}, {world.rank} of 3 in the group\): its context was closed"
                assert re.match(where, str(caught.value)), name
                method = re.split(r"[\[(]", name)[0]
                if world.rank == WRONG and name not in ("combine", "graph_capture"):
                    assert str(caught.value).startswith(method), name

    spmd(program, RANKS)
