"""A sample of the misuse matrix, drawn anew each time: `nox -s faults` runs all of it."""

from __future__ import annotations

import random
import re

import pytest

import commgraph as cg
from commgraph.testing import spmd
from tests.processes import PROGRAMS, Processes
from tests.programs.misuse_operations import OPERATIONS, RANKS, WRONG, Args


def test_a_sample_of_the_misuse_matrix_ends_without_crash_hang_or_wrong_number(processes: Processes) -> None:
    """A seed that failed is in the message, and gives these cells again."""
    seed = random.randrange(1 << 32)
    cells = ["--sample", "40", "--jobs", "4", "--seed", str(seed)]
    done = processes.run(PROGRAMS / "misuse.py", *cells, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-3000:]}"


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
