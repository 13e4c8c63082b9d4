"""What only a GPU can show, each check on processes that share one. Skipped where there is none; `tests/gpu/run.sh` runs them all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import CHECKS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 100.0
ALL_SECONDS = 540.0
REHEARSAL = bool(os.environ.get("COMMGRAPH_GPU_REHEARSAL"))

# Check, ranks. NCCL comes last: it may refuse to have several ranks on one GPU, whatever it is told.
RUNS = (
    ("overhead", 1),
    ("kernels", 2),
    ("kernels", 4),
    ("graphs", 2),
    ("graphs", 4),
    ("refused", 2),
    ("work", 2),
    ("memory", 2),
    ("compiled", 2),
    ("nccl_alone", 1),
    ("nccl", 2),
    ("lost", 2),
)


@pytest.fixture(scope="module")
def began() -> float:
    return time.monotonic()


def test_every_check_is_run() -> None:
    assert {check for check, _ in RUNS} == set(CHECKS)


@pytest.mark.gpu
@pytest.mark.timeout(150)
@pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="there is no GPU")
@pytest.mark.parametrize(("check", "ranks"), RUNS, ids=str)
def test_on_one_gpu(check: str, ranks: int, tmp_path: Path, began: float) -> None:
    left = ALL_SECONDS - (time.monotonic() - began)
    if left < 20:
        pytest.skip(f"{check} of {ranks} ranks: the ten minutes are over")
    run(check, ranks, tmp_path, min(SECONDS, left))


@pytest.mark.parametrize("check", ["kernels", "work"])
def test_checks_run_without_a_gpu_as_far_as_they_can(check: str, tmp_path: Path) -> None:
    """So that what is wrong in them shows before a GPU is at hand."""
    run(check, 2, tmp_path, SECONDS, COMMGRAPH_GPU_REHEARSAL="1")


def run(check: str, ranks: int, tmp_path: Path, seconds: float, **more: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        # Read by torch: symmetric memory of several processes on one device.
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
    started = time.monotonic()
    children = []
    for rank in range(ranks):
        # NCCL takes ranks with different identities for hosts, which may use the same device number.
        own = (
            {
                "NCCL_HOSTID": f"commgraph-{rank}",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1",
                "NCCL_NET": "Socket",
            }
            if check in ("nccl", "lost")
            else {}
        )
        command = [sys.executable, "-m", "tests.gpu.ranks", check, str(rank), str(ranks), str(tmp_path / "meet")]
        with (tmp_path / f"out{rank}").open("wb") as out:
            children.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment | own | more))
    try:
        for child in children:
            child.wait(max(seconds - (time.monotonic() - started), 1.0))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = [(tmp_path / f"out{rank}").read_text(errors="replace") for rank in range(ranks)]
    codes = [child.returncode for child in children]
    notes = [line.removeprefix("# ") for text in said for line in text.splitlines() if line.startswith("# ")]
    if (report := os.environ.get("COMMGRAPH_GPU_REPORT")) is not None:
        outcome = "passed" if codes == [0] * ranks else f"FAILED with {codes}"
        with Path(report).open("a") as file:
            file.writelines(
                f"{line}\n"
                for line in (f"{check}, {ranks} ranks: {outcome} in {time.monotonic() - started:.0f} s", *(f"  {note}" for note in notes))
            )
    assert codes == [0] * ranks, "\n".join(f"rank {rank}:\n{text[-3000:]}" for rank, text in enumerate(said))
