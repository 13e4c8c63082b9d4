"""A user's file under mypy and pyright: every public name has its type, so that a misspelt operation is an error."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import commgraph as cg
from tests.helpers import ROOT

pytestmark = pytest.mark.long  # `nox -s types` runs it

# Lines that end in "# error" are those that a checker must report; all others are right.
USER = """\
from datetime import timedelta

import torch

import commgraph as cg
from commgraph.testing import spmd


def program(world: cg.World) -> float:
    ctx = world.context(cg.Layout(world.size, tp=2), name="a", options=cg.CommunicatorOptions(timeout=5, host_timeout=timedelta(seconds=5)))
    names: list[str] = [name for name in ctx if "tp" in ctx]
    first: torch.Tensor = ctx.tp.all_reduce(torch.ones(2))
    both: list[torch.Tensor] = ctx["tp"].all_reduce([first, first], timeout=3)
    work: cg.Work[torch.Tensor] = ctx.tp.all_reduce_async(both[0])
    ctx.tp.all_redcue(first)  # error
    ctx["tp"].all_redcue(first)  # error
    world.group.barier()  # error
    ctx.ttp.barrier()  # error
    ctx.tp.all_reduce(first, opp="max")  # error
    ctx.tp.all_reduce("x")  # error
    work.wiat()  # error
    cg.Wrold  # error
    cg.Layout(4, ttp=2)  # error
    cg.CommunicatorOptions(shmm=False)  # error
    wrong: int = ctx.tp.all_reduce(first)  # error
    return work.wait(5).item() + len(names)


with cg.World.from_env(timeout=5, authkey=b"secret") as world:
    program(world)
cg.World.from_env(authkey="secret")  # error
cg.World.from_env(timeout="5")  # error
cg.World.from_env(timout=5)  # error
sums: list[float] = spmd(program, 4, timeout=timedelta(seconds=5))
spmd(program, 4, timeout="5")  # error
layer = cg.nn.ColumnParallelLinear
cg.nn.ColumnParalelLinear  # error
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The program above, and a misspelt member of each public class."""
    classes = [name for name in cg.__all__ if isinstance(getattr(cg, name), type)]
    members = "".join(
        f"\n\ndef use_{name}(one: cg.{name}{'[int]' if name == 'Work' else ''}) -> None:\n    one.misspelt()  # error\n" for name in classes
    )
    path = tmp_path / "user.py"
    path.write_text(USER + members)
    return path


def check(file: Path, command: list[str], pattern: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = file.read_text().splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    found = {int(number) for number in re.findall(pattern, done.stdout)}
    wrong = "\n".join(f"{number}: {lines[number - 1]}" for number in sorted(expected ^ found))
    assert found == expected, f"not as expected in\n{wrong}\n{done.stdout}{done.stderr}"


def test_a_misspelt_operation_is_an_error_to_mypy(file: Path) -> None:
    pytest.importorskip("mypy", reason="no mypy here: nox -s types runs this test")
    # With the project's settings, and so with the cache of its own run.
    check(file, [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)], r"user\.py:(\d+): error")


def test_a_misspelt_operation_is_an_error_to_pyright(file: Path) -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("no pyright here: nox -s types runs this test")
    settings = file.with_name("pyrightconfig.json")
    settings.write_text(f'{{"include": ["user.py"], "extraPaths": ["{ROOT}"], "typeCheckingMode": "standard"}}')
    check(file, [pyright, "--pythonpath", sys.executable, "--project", str(settings)], r"user\.py:(\d+):\d+ - error")
