"""What the ranks of a world find between them: hosts, shared memory, strategies and the reasons for those that were refused."""

from __future__ import annotations

import json
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import commgraph as cg
from commgraph.commands import run_ranks

__all__ = ["find", "look_alone"]

# Ranks that are started where no launcher has started several.
_RANKS = 2
_ANSWER = "ranks.json"


def find(world: cg.World) -> dict[str, Any]:
    """Return what the ranks of a world of two ranks or more find between them, equal on every rank. Collective."""
    names: list[str] = world.group.all_gather_object(socket.gethostname())
    hosts = {
        f"host {node} ({names[ranks[0]]})": f"ranks {_ranges(ranks)}" + (" proved to share memory" if len(ranks) > 1 else " alone")
        for node in range(world.node_count)
        if (ranks := [rank for rank in range(world.size) if world.nodes[rank] == node])
    }
    with world.context(cg.Layout(world.size, tp=world.size), name="doctor") as context:
        group = context.tp
        served: dict[str, list[str]] = {}
        for operation, strategies in group.communicators.items():
            served.setdefault(", then ".join(strategies), []).append(operation)
        live = {name for strategies in group.communicators.values() for name in strategies}
        return {
            "ranks": {"world": f"{world.size} ranks on {world.node_count} host{'s' if world.node_count > 1 else ''}", **hosts},
            "strategies": {
                **{strategies: ", ".join(operations) for strategies, operations in served.items()},
                **{f"{name} is": group.communicator(name).describe() for name in sorted(live)},
                **{f"{refused.name} is not used": refused.reason for refused in group.refused},
            },
        }


def look_alone() -> dict[str, Any]:
    """Start two ranks on this host, and return what they find between them; the reason under ``ranks`` where they fail."""
    with tempfile.TemporaryDirectory(prefix="commgraph-") as folder:
        code = run_ranks("commgraph doctor", _rank, _RANKS, folder)
        answer = Path(folder) / _ANSWER
        if code or not answer.exists():
            return {"ranks": {"world": f"two ranks on this host could not be connected (exit code {code}); see above"}, "strategies": {}}
        found: dict[str, Any] = json.loads(answer.read_text())
        found["ranks"]["world"] = f"{_RANKS} ranks that the doctor has started here"
        return found


def _rank(rank: int, ranks: int, meeting: Path, answers: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the doctor itself says where the native module is missing
        with cg.World.connect(f"file://{meeting}/store", rank=rank, world_size=ranks, timeout=30) as world:
            found = find(world)
    if rank == 0:
        (Path(answers) / _ANSWER).write_text(json.dumps(found))
    return 0


def _ranges(ranks: list[int]) -> str:
    """Return ascending numbers as text: ``0-3, 8``."""
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
