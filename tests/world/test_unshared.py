"""A rank that lacks what shared memory needs is a node of its own, or its groups go another way; nobody waits for it in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import ROOT, free_port

PROGRAM = str(ROOT / "tests" / "programs" / "unshared.py")


def on_two_ranks(lack: str) -> list[dict[str, Any]]:
    """Run both ranks, one of which lacks `lack`; return what they print."""
    command = [sys.executable, PROGRAM]
    port, env = str(free_port()), os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([*command, str(rank), port, lack], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert all(out for out, _ in told), told
    return [json.loads(out) for out, _ in told]


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
def test_one_rank_cannot_share_memory(lack: str, nodes: list[int], first: str) -> None:
    for found in on_two_ranks(lack):
        assert (found["nodes"], found["first"], found["sum"]) == (nodes, first, [2.0] * 4)
        assert found["built"] < 50


def test_memory_that_is_refused_after_the_build() -> None:
    """Neither rank has died, and no error says so; a context that is built again copies."""
    for found in on_two_ranks("dumpable"):
        broadcast, message = found["errors"]
        assert "the kernel refuses this process the memory of rank 1" in broadcast
        assert all("gone" not in text and "died" not in text for text in (broadcast, message)), found["errors"]
        assert found["again"] == 1.0
