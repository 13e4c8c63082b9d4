"""The C core of commgraph.shm without Python: a short form of what `nox -s tsan` runs for longer, and under sanitizers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from commgraph.shm import native_module
from tests.helpers import ROOT
from tests.processes import PROGRAMS, Processes

HERE = Path(__file__).parent
CORE = ROOT / "commgraph" / "shm" / "native"
# The core. The harness takes in kernels.c itself, to reach the kernels of every instruction set; module*.c are Python's side.
SOURCES = (
    HERE / "native" / "harness.c",
    *(path for path in sorted(CORE.glob("*.c")) if not path.stem.startswith(("module", "kernels"))),
)
PARTS = (
    "guards",
    "cores",
    "kernels",
    "collectives",
    "rings",
    "zero_copies",
    "pool",
    "endings",
    "withdrawals",
    "nets",
    "frames",
    "processes",
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with the compiler's options of the package."""
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C compiler ({compiler[0]})")
    program = tmp_path_factory.mktemp("native") / "harness"
    flags = ["-std=gnu11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{CORE}"]
    command = [*compiler, *flags, *map(str, SOURCES), "-o", str(program), "-lpthread", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "warnings"
    return program


@pytest.mark.slow  # the compiler takes ten seconds
@pytest.mark.parametrize("part", PARTS)
def test_the_core(harness: Path, part: str) -> None:
    """Random operations from a seed that differs from run to run, and is told when something is wrong."""
    seed = str(random.randrange(1 << 32))
    done = subprocess.run([str(harness), part, "1", seed], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"harness {part} 1 {seed}: {done.stderr}"
    assert f"{part}: fine" in done.stdout


@pytest.mark.skipif(native_module.load() is None, reason="there is no native module")
def test_absurd_arguments_are_errors_and_no_signals(processes: Processes) -> None:
    """Every function and method, each in a process of its own. A longer run: tests/programs/absurd.py SEED CALLS."""
    seed = random.randrange(1 << 32)
    done = processes.run(PROGRAMS / "absurd.py", str(seed), "20", timeout=110)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["done"]), f"seed {seed}: {done.stdout} {done.stderr}"
