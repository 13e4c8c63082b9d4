"""torch's own tests of torch.distributed (`DistributedTest`, shipped in its wheel), over a backend of choice.

    python tests/programs/torch_tests.py gloo --json gloo.json
    python tests/programs/torch_tests.py commgraph --expect gloo.json

Decides as for gloo which tests apply, and then gives the tests the backend: what asks for it by name while a test runs gets that. Ranks are
forked, eight of them. Prints one line for each test. With `--expect` it fails where a test does that passed in that run.

Two things are changed for the backend. One test asks for gloo by name to find out whether ranks have devices, and is told yes (`Stand`).
And torch's `monitored_barrier` refuses every backend but gloo by name, so the tests of it call the group's own method.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import unittest
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 8  # with fewer a fifth of the tests skip themselves


class Stand(str):
    """The name of a backend of which a test believes that it is gloo: one asks for it by name to find out whether ranks have devices."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other in (str(self), "gloo")

    def __hash__(self) -> int:
        return str.__hash__(self)


def monitored_barrier(group: Any = None, timeout: timedelta | float | None = None, wait_all_ranks: bool = False) -> None:
    """`torch.distributed.monitored_barrier` without its refusal of every backend but gloo."""
    if group is not dist.GroupMember.NON_GROUP_MEMBER:
        of: Any = group or dist.group.WORLD
        of.monitored_barrier(timedelta(seconds=timeout) if isinstance(timeout, float) else timeout, wait_all_ranks)


def prepare(backend: str) -> type[unittest.TestCase]:
    """Return the class of the tests."""
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(RANKS), "TEMP_DIR": tempfile.mkdtemp(), "OMP_NUM_THREADS": "1"}
    from torch.testing._internal.distributed import distributed_test

    if backend == "commgraph":
        import commgraph.torch_backend  # noqa: F401 - which registers the backend

        distributed_test.BACKEND = Stand("commgraph")
        dist.monitored_barrier = monitored_barrier

    class Forked(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()  # type: ignore[no-untyped-call]  # as all of torch's tests
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    assert dist.is_available()
    return Forked


class Lines(unittest.TestResult):
    """Prints a line for each test, and keeps its outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.begun = 0.0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
        super().startTest(test)
        self.begun = time.monotonic()

    def note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        name = test.id().rpartition(".")[2]
        self.outcomes[name] = outcome
        self.reasons[name] = why
        print(f"{outcome:8} {name} {time.monotonic() - self.begun:.1f} s", flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
        self.note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802 - unittest's name
        self.note(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: object) -> None:  # noqa: N802 - unittest's name
        super().addFailure(test, err)  # type: ignore[arg-type]  # unittest's private type
        self.note(test, "failed", self.failures[-1][1])

    def addError(self, test: unittest.TestCase, err: object) -> None:  # noqa: N802 - unittest's name
        super().addError(test, err)  # type: ignore[arg-type]  # unittest's private type
        self.note(test, "failed", self.errors[-1][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("gloo", "commgraph"))
    parser.add_argument("names", nargs="*", help="tests to run; all by default")
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--expect", type=Path, help="outcomes of another run, of which all that passed have to pass here")
    parser.add_argument("--verbose", action="store_true", help="print why tests failed")
    arguments = parser.parse_intermixed_args()
    tests = prepare(arguments.backend)
    names = arguments.names or unittest.TestLoader().getTestCaseNames(tests)
    result = Lines()
    unittest.TestSuite(tests(name) for name in names).run(result)
    if arguments.verbose:
        for name, why in result.reasons.items():
            if result.outcomes[name] == "failed":
                print(f"\n{name}\n{why}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"outcomes": result.outcomes, "reasons": result.reasons}, indent=1))
    counts = {outcome: list(result.outcomes.values()).count(outcome) for outcome in ("passed", "skipped", "failed")}
    print(f"{arguments.backend}: {counts}")
    if arguments.expect:
        there = json.loads(arguments.expect.read_text())["outcomes"]
        worse = {name for name in names if there.get(name) == "passed" and result.outcomes.get(name) != "passed"}
        if worse:
            sys.exit(f"passed there, and not here: {', '.join(sorted(worse))}")


if __name__ == "__main__":
    main()
