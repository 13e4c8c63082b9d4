"""Builds in which ranks die, end early, come again, or find what a job before them has left, in real processes: programs/builds.py."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import commgraph as cg
from tests.helpers import again_if_late, in_time, may_unshare
from tests.processes import PROGRAMS, Processes


@pytest.mark.parametrize("authkey", [None, b"with one the keys go through a store that is written in Python"], ids=["plain", "sealed"])
def test_builds_leave_no_keys_in_the_store(authkey: bytes | None) -> None:
    store = dist.HashStore()
    counts: list[int] = []

    def run(rank: int) -> None:
        with cg.World.from_store(store, rank=rank, world_size=2, authkey=authkey) as world:
            for _ in range(3):
                with world.context(cg.Layout(2, tp=2), name="a") as ctx:
                    ctx.tp.barrier()
                    if rank == 0:
                        counts.append(store.num_keys())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # The ranks' lists of tokens, which are empty; a rank may just be deleting what is its own.
    assert len(counts) == 3
    assert counts[-1] <= 10, counts


@pytest.mark.parametrize(
    ("scenario", "cells"),
    [
        ("ends", 12),
        ("again", 4),
        ("deaths", 14),
        ("closes", 3),
        ("leavings", 4),
        ("stopped", 1),
        ("leaves", 4),
        ("continued", 4),
        pytest.param("no_loopback", 1, marks=pytest.mark.skipif(not may_unshare(), reason="needs root and unshare")),
    ],
)
@again_if_late
def test_builds(scenario: str, cells: int, tmp_path: Path, processes: Processes) -> None:
    """See the functions of these names in the program, each of which says what it does.

    docs/explanation/reliability.md promises that a death in a build is heard within two seconds.
    """
    done = processes.run(PROGRAMS / "builds.py", scenario, tempfile.mkdtemp(dir=tmp_path), timeout=200)
    assert done.returncode == 0, done.stderr
    came = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(came) == cells
    assert not [cell for cell in came if not cell["fine"]], done.stderr[-2000:]
    slowest = max(came, key=lambda cell: cell.get("took", 0.0))
    in_time(slowest.get("took", 0.0), 2, slowest)
