"""`commgraph doctor` of a machine, and the self-test of a layout's groups."""

from __future__ import annotations

import json
import os

import pytest

import commgraph as cg
from commgraph import progress, selftest
from commgraph.cli import main
from commgraph.doctor import machine
from commgraph.shm import native_module
from commgraph.testing import spmd
from tests.processes import Processes


def test_the_doctor_fits_one_screen_and_its_json_says_as_much(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["versions"]["commgraph"] == cg.__version__
    assert facts["platform"]["platform"] == "cpu"
    assert facts["ranks"]["world"] == "2 ranks that the doctor has started here"
    assert any(said == "ranks 0-1 proved to share memory" for said in facts["ranks"].values())
    assert "all_reduce" in facts["strategies"]["shm, then tcp"]
    assert "127.0.0.1" in facts["network"]["interfaces"]["lo"]
    assert sum(map(len, facts.values())) + len(facts) < 50


def test_the_launcher_and_what_it_lacks_are_named() -> None:
    said = machine.look({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "COMMGRAPH_AUTHKEY": "secret"})
    assert said["launcher"]["launcher"] == "torchrun: rank 3 of 8"
    assert said["launcher"]["variables"]["RANK"] == "3"
    assert "secret" not in json.dumps(said)
    assert "WORLD_SIZE" in machine.look({"RANK": "3"})["launcher"]["launcher"]
    assert machine.look({})["launcher"]["launcher"].startswith("none: no launcher")


def test_what_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(native_module, "why_missing", lambda: "ImportError: no such file")
    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(os, "pidfd_open", refused)
    monkeypatch.setenv("COMMGRAPH_ADDRESS", "no-such-interface")
    said = machine.look(os.environ)
    assert said["native module"]["native module"].startswith("missing: ImportError: no such file")
    assert "Function not implemented" in said["shared memory"]["memfd"]
    assert "Function not implemented" in said["shared memory"]["pidfd"]
    assert "no-such-interface" in said["network"]["address that would be announced"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_operation_of_every_group(nodes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    layout = cg.Layout(4, tp=2, pp=2)
    assert spmd(lambda world: selftest.run(world, layout), 4, nodes=nodes) == [0] * 4
    said, shown = capsys.readouterr()
    total = 4 * len(selftest.OPERATIONS)
    assert shown.splitlines()[-1] == f"commgraph.selftest: {total} of {total} operations"
    assert f"all right: {len(selftest.OPERATIONS)} operations on 4 kinds of groups" in said
    rows = {line.split("  ")[0]: line.split()[-4:] for line in said.splitlines() if line}
    assert all(cell.isdigit() for operation, _ in selftest.OPERATIONS for cell in rows[operation])


def test_an_operation_that_is_wrong_on_one_rank_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(group: cg.GroupCoordinator) -> None:
        group.barrier()
        assert group.rank != 1, "rank 1 got another sum"

    monkeypatch.setattr(selftest, "OPERATIONS", (("barrier", selftest.OPERATIONS[11][1]), ("wrong", wrong)))
    assert spmd(lambda world: selftest.run(world, cg.Layout(2, tp=2)), 2) == [1, 1]
    said = capsys.readouterr().out
    assert "rank 1, tp (0, 1), wrong: AssertionError: rank 1 got another sum" in said
    assert "FAILED" in said


def test_the_self_test_is_a_program_of_launched_ranks(processes: Processes) -> None:
    first, second = processes.launch(2, "-m", "commgraph.selftest", "--tp", "2")
    assert "all right" in first
    assert second == ""


def test_a_rank_alone_has_nothing_to_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([]) == 2
    assert "nothing is sent" in capsys.readouterr().out
    assert selftest.main(["--tp", "2"]) == 2
    assert "dp*pp*pcp*tp" in capsys.readouterr().err
