"""Forked children of a rank: what they inherit is refused to them, and leaves the rank and its peers alone."""

from __future__ import annotations

import pytest

from tests.processes import PROGRAMS, Processes


@pytest.mark.parametrize("strategy", ["shm", "gloo"])
def test_a_forked_child_has_no_part_in_what_it_inherits(strategy: str, processes: Processes) -> None:
    """Every operation, object, queue and pending work; close, garbage collection and every way to end; grandchildren; worlds of its own."""
    for rank, text in enumerate(processes.launch(2, PROGRAMS / "inherited.py", strategy)):
        assert text.splitlines()[-1] == f"done {rank}", text
