"""A rank that lacks what shared memory needs is a node of its own, or its groups go another way; nobody waits for it in vain."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import free_port
from tests.processes import PROGRAMS, Processes, outputs


def on_two_ranks(lack: str, processes: Processes) -> list[dict[str, Any]]:
    """Run both ranks, one of which lacks `lack`; return what they print."""
    port = str(free_port())
    ranks = [processes.start(PROGRAMS / "unshared.py", str(rank), port, lack) for rank in range(2)]
    return [json.loads(out) for out in outputs(ranks, timeout=120)]


@pytest.mark.parametrize(
    ("lack", "nodes", "first"),
    [
        ("memfd", [0, 1], "tcp"),
        ("file sizes", [0, 1], "tcp"),
        ("proc", [0, 1], "tcp"),
        ("large files", [0, 0], "tcp"),
        ("native module", [0, 0], "gloo"),
    ],
)
def test_one_rank_cannot_share_memory(lack: str, nodes: list[int], first: str, processes: Processes) -> None:
    for found in on_two_ranks(lack, processes):
        assert (found["nodes"], found["first"], found["sum"]) == (nodes, first, [2.0] * 4)
        assert found["built"] < 50


def test_memory_that_is_refused_after_the_build(processes: Processes) -> None:
    """Neither rank has died, and no error says so; a context that is built again copies."""
    for found in on_two_ranks("dumpable", processes):
        broadcast, message = found["errors"]
        assert "the kernel refuses this process the memory of rank 1" in broadcast
        assert all("gone" not in text and "died" not in text for text in (broadcast, message)), found["errors"]
        assert found["again"] == 1.0
