"""What holds for all tests, and what they share."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.processes import Processes, fork_server

# A machine that stands still for a moment is no fault of the example that it met.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture(scope="session")
def forks() -> Iterator[socket.socket]:
    """A process that has imported torch, which forks others."""
    with fork_server() as asked:
        yield asked


@pytest.fixture
def processes(forks: socket.socket) -> Iterator[Processes]:
    """Starts programs in processes, which end with the test."""
    started = Processes(forks)
    yield started
    started.close()


def pytest_collection_finish() -> None:
    """Leave what was imported out of the collections of garbage: one took 0.3 s of a processor, and tests make hundreds."""
    gc.collect()
    gc.freeze()
