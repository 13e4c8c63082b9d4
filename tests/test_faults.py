"""What happens to ranks that are real processes: killed, stopped, interrupted, short of memory, in other namespaces.

The scenarios are in tests/programs/faults.py, which also is the long form: `nox -s faults` kills a rank a hundred times.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.helpers import TooLateError, again_if_late
from tests.processes import PROGRAMS, Processes

Scenario = Callable[..., None]


@pytest.fixture(scope="module")
def scenario(forks: socket.socket) -> Iterator[Scenario]:
    """Runs a scenario by name."""
    processes = Processes(forks)
    server = processes.start(PROGRAMS / "faults.py", "serve")

    @again_if_late
    def run(*what: str | int) -> None:
        server.stdin.write(json.dumps(what) + "\n")
        server.stdin.flush()
        how, text = json.loads(server.stdout.readline())
        if how == "skip":
            pytest.skip(text)
        if how == "late":
            raise TooLateError(text)
        assert how == "fine", text

    yield run
    server.stdin.close()
    server.wait(10)
    processes.close()


def test_a_killed_rank_is_named_and_leaves_nothing(scenario: Scenario) -> None:
    """Survivors raise PeerLostError with its rank within 2 s; no file, no line of a resource tracker, no traceback."""
    scenario("kills", 3, random.randrange(1 << 32))


def test_an_unreaped_rank_is_dead(scenario: Scenario) -> None:
    """A zombie still answers kill(pid, 0)."""
    scenario("zombie")


def test_faults_that_users_inject_happen_in_processes(scenario: Scenario) -> None:
    """Killed, stopped and cut at the n-th call."""
    scenario("injected")


def test_a_stopped_rank_is_late_and_not_lost(scenario: Scenario) -> None:
    scenario("stopped")


def test_ctrl_c_ends_waits_and_releases_the_peers(scenario: Scenario) -> None:
    scenario("interrupted", 3)


def test_a_send_that_was_broken_off_and_made_again(scenario: Scenario) -> None:
    scenario("sent_again")


def test_a_receive_that_was_given_up_halfway_loses_nothing(scenario: Scenario) -> None:
    scenario("given_up_halfway")


def test_large_messages_that_both_sides_copy(scenario: Scenario) -> None:
    scenario("handed_over", 30, random.randrange(1 << 32))


def test_sixteen_contexts_of_two_jobs_never_meet(scenario: Scenario) -> None:
    scenario("sixteen_contexts")


def test_other_namespaces_are_other_hosts(scenario: Scenario) -> None:
    """Nobody claims memory that he cannot have, and explain() says why there is none."""
    scenario("namespaces")


def test_cycles_leave_no_descriptor_thread_or_mapping(scenario: Scenario) -> None:
    scenario("nothing_grows", 8)


def test_waiting_leaves_the_core_alone(scenario: Scenario) -> None:
    """Idle under 1 % of a core; under 10 % at 100 messages/s."""
    scenario("cpu")


def test_a_dev_shm_of_one_mebibyte_is_no_limit(scenario: Scenario) -> None:
    scenario("small_dev_shm")


def test_memory_that_cannot_be_had_is_told_in_bytes(scenario: Scenario) -> None:
    """A typed reason on every rank, and gloo in its place; where a shared tensor is refused the group goes on."""
    scenario("no_memory")
