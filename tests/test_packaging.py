"""What is built from the repository: a wheel named after what it holds, and a source distribution that tests itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import commgraph
from tests.helpers import ROOT

# A compiler that writes nothing into its output, and its arguments into a file.
COMPILER = """\
#!{python}
import pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
with open("{log}", "a") as log:
    print(*sys.argv[1:], file=log)
"""
NOT_SHIPPED = (".git", ".nox", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis", "_build")


def build(kind: str, source: Path, out: Path, compiler: str = "false") -> Path:
    """Build without isolation, which would fetch setuptools anew."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, env={**os.environ, "CC": compiler}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this checkout, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, place / "source", ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    with tarfile.open(build("sdist", place / "source", place)) as archive:
        archive.extractall(place, filter="data")
    return next(place.glob("commgraph-*/"))


def test_a_wheel_is_named_after_what_it_holds(unpacked: Path, tmp_path: Path) -> None:
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(COMPILER.format(python=sys.executable, log=log))
    compiler.chmod(0o755)
    # In one folder, where each build finds what the one before has left.
    for available, name in ((True, r"cp311-abi3-linux_\w+"), (False, "py3-none-any"), (True, r"cp311-abi3-linux_\w+")):
        wheel = build("wheel", unpacked, tmp_path, str(compiler) if available else "false")
        assert re.fullmatch(rf"commgraph-{commgraph.__version__}-{name}\.whl", wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            pure = next(archive.read(name) for name in names if name.endswith("/WHEEL")).decode()
        assert ("commgraph/shm/_native.abi3.so" in names) == available
        assert f"Root-Is-Purelib: {str(not available).lower()}" in pure
        assert "commgraph/py.typed" in names
        assert not [name for name in names if name.endswith((".safetensors", ".c", ".h")) or name.startswith(("tests", "docs", "tools"))]
    linked = [line for line in log.read_text().splitlines() if "-shared" in line]
    assert linked
    assert all("-Wl,-s" in line for line in linked)
    log.unlink()
    environ = {**os.environ, "CC": str(compiler)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], cwd=unpacked, env=environ, check=True)
    assert "-shared" in log.read_text()
    assert "-Wl,-s" not in log.read_text()  # a checkout keeps the symbols
    (unpacked / "commgraph/shm/_native.abi3.so").unlink()


def test_the_source_distribution_is_the_repository(unpacked: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    missing = [name for name in tracked if (ROOT / name).exists() and not (unpacked / name).exists()]
    assert not missing


@pytest.mark.long
def test_the_source_distribution_runs_its_own_tests(unpacked: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/layout/test_layout_tables.py",
        "tests/launch/test_launch.py",
    ]
    done = subprocess.run(command, cwd=unpacked, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_said_alike_everywhere() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == commgraph.__version__
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == commgraph.__version__  # type: ignore[index]
