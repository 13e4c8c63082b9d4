"""A rank is stopped (SIGSTOP) in the middle of a large call: whoever gives up on the call has its tensor for itself."""

from __future__ import annotations

from pathlib import Path

from tests.processes import PROGRAMS, Processes, environment, outputs


def test_a_stopped_rank_changes_no_tensor_after_its_peers_error(tmp_path: Path, processes: Processes) -> None:
    """A broadcast, a reduction in memory that the ranks share, and a message, whose receivers let the other rank write to their tensors."""
    ranks = [
        processes.start(PROGRAMS / "stopped_source.py", "96", tmp_path / name, name, env=environment({"RANK": str(rank)}))
        for name in ("broadcast", "all_reduce_", "recv")
        for rank in range(2)
    ]
    said = "".join(outputs(ranks, timeout=110))
    results = {name: (int(given_up), int(changed)) for name, given_up, changed in map(str.split, said.splitlines())}
    assert {name: changed for name, (_, changed) in results.items()} == {"broadcast": 0, "all_reduce_": 0, "recv": 0}, said
    assert sum(given_up for given_up, _ in results.values()) > 0, "no call was long enough to be stopped within"
