"""What holds for all tests, and what they share."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.processes import Processes, fork_server

# A machine that stands still for a moment is no fault of the example that it met.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


def pytest_configure() -> None:
    """Have the processes of tests take Ctrl-C, which a shell that starts this in the background has it ignore, and them with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


# The files that take longest, most of it waiting for processes. Begun first, none is left for one worker alone at the end.
LONGEST = frozenset(
    f"test_{name}.py"
    for name in (
        *("torchrun", "message_forms", "faults", "programs", "shm", "message_queue", "operators", "builds", "demo", "endings", "native"),
        *("elastic", "conformance", "bench", "nn_checkpoint", "spmd", "waits_and_ends", "interrupts", "misuse_matrix", "structure"),
        *("ambient", "reinterpreted", "over_hosts", "lifecycle", "world", "context", "fork", "threads", "stopped", "bad_input"),
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, which `--no-loadscope-reorder` leaves as it is."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Leave what was imported out of the collections of garbage: one took 0.3 s of a processor, and tests make hundreds."""
    gc.collect()
    gc.freeze()
