"""The demo and the command line, as a newcomer starts them: real processes, real output."""

from __future__ import annotations

import subprocess
import sys

import pytest

from commgraph.cli import main
from tests.processes import Processes


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "commgraph.cli", *arguments], capture_output=True, text=True, timeout=110, check=False)


def test_the_demo_generates_what_the_target_alone_and_an_unsharded_process_generate() -> None:
    done = run("demo", "--tokens", "24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same tokens as the target alone" in done.stdout
    assert "same tokens as one unsharded process" in done.stdout
    assert "DIFFERS" not in done.stdout
    # Both layouts are drawn, and what moved is told by group.
    assert "4 ranks = pp 2 x tp 2" in done.stdout
    assert "4 ranks along replica" in done.stdout
    assert "target.tp" in done.stdout
    assert "target.pp" in done.stdout
    assert "Traceback" not in done.stderr


def test_launched_with_two_engines_and_a_sharded_draft(processes: Processes) -> None:
    asked = ("--dp", "2", "--pp", "1", "--tp", "2", "--draft-tp", "2", "--tokens", "12", "--prompt", "A list is", "--prompt", "The module")
    said = "".join(processes.launch(4, "-m", "commgraph.demo", *asked))
    assert said.count("same tokens as one unsharded process") == 2
    assert "A list is" in said
    assert "The module" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "3", "--pp", "1"], "cannot be cut by tp=3"),
        (["--tp", "2", "--nproc", "3"], "not a multiple"),
        (["--draft-tp", "3", "--nproc", "12"], "whole drafts of 3"),
        (["--tokens", "0"], "at least one"),
        (["--tokens", "100000"], "positions"),
        (["--prompt", ""], "empty"),
        (["--dp", "0"], "dp"),
        (["--weights", "/nowhere"], "no /nowhere/target.safetensors and no /nowhere/draft.safetensors: wheels come without"),
    ],
)
def test_sizes_that_cannot_work_end_in_one_clear_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_layout_is_printed_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "8", "--tp", "2", "--pp", "2", "--rank", "3"]) == 0
    out = capsys.readouterr().out
    assert "[3]" in out
    assert "rank 3 sits at" in out


def test_a_layout_that_does_not_factor_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "8", "--tp", "3", "--dcp", "2"]) == 2
    err = capsys.readouterr().err
    assert "8" in err
    assert "dcp=2" in err
    assert len(err.splitlines()) == 1
