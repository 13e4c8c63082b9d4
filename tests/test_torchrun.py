"""Real processes: started by torchrun, and by a parent that says what Open MPI, PMI and Slurm say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"

# What any launcher may have left in the environment of this very process, which the children must not see.
LAUNCHERS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMPI_.*|PMIX?_.*|MPI_.*|SLURM_.*|COMMGRAPH_.*)"
)
ABORTED = ("terminate called", "Aborted", "Segmentation fault", "Fatal Python error", "leaked")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    # One thread of torch's own per rank: there are more ranks than cores.
    return {**clean, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", **(extra or {})}


def torchrun(ranks: int, program: str, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a program under torch's launcher and gives it a port of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(PROGRAMS / program),
        *args,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())


def start(ranks: int, says: Callable[[int], Mapping[str, str]], tmp: Path, program: str, *args: str) -> list[subprocess.Popen[str]]:
    """Starts the ranks of a job as a launcher does that has no address for them: all children of one parent, in one TMPDIR."""
    command = [sys.executable, str(PROGRAMS / program), *args]
    return [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment({"TMPDIR": str(tmp), **says(rank)})
        )
        for rank in range(ranks)
    ]


def ends(processes: list[subprocess.Popen[str]], timeout: float = 60) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each."""
    deadline = time.monotonic() + timeout
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def open_mpi(rank: int, size: int, job: str = "job-1") -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(size),
        "PMIX_NAMESPACE": job,
    }


def pmi(rank: int, size: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size)}  # MPICH's Hydra says no more


def slurm(rank: int, size: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
    }


def meeting_files(tmp: Path) -> list[Path]:
    return [path for path in tmp.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_operation_under_torchrun(ranks: int) -> None:
    done = torchrun(ranks, "smoke.py", "close")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert not [word for word in ABORTED if word in done.stderr], done.stderr


@pytest.mark.parametrize(("ranks", "_run"), [(ranks, run) for run in (1, 2) for ranks in (2, 3, 4)])
def test_an_interpreter_that_ends_with_everything_open_ends_well(ranks: int, _run: int) -> None:
    """Repeated, since a gloo group that lives until the end of the interpreter aborted 2 of 12 runs."""
    done = torchrun(ranks, "smoke.py", "exit")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert not [word for word in ABORTED if word in done.stderr], done.stderr


def test_a_default_group_of_torchs_stays_as_it_was() -> None:
    done = torchrun(4, "beside_torch.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@pytest.mark.parametrize(("launcher", "ranks"), [(open_mpi, 3), (pmi, 2), (slurm, 4)])
def test_one_node_without_an_address_meets_by_a_private_file(
    launcher: Callable[[int, int], dict[str, str]], ranks: int, tmp_path: Path
) -> None:
    found = ends(start(ranks, lambda rank: launcher(rank, ranks), tmp_path, "smoke.py", "close"))
    assert [code for code, _, _ in found] == [0] * ranks, [err for _, _, err in found]
    assert found[0][1] == "done\n"
    assert meeting_files(tmp_path) == [], "a job leaves no file behind"
    assert (tmp_path / f"commgraph-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_ranks_that_end_without_closing_leave_no_file_either(tmp_path: Path) -> None:
    found = ends(start(2, lambda rank: open_mpi(rank, 2), tmp_path, "smoke.py", "exit"))
    assert [code for code, _, _ in found] == [0, 0], [err for _, _, err in found]
    assert not [word for _, _, err in found for word in ABORTED if word in err], found
    assert meeting_files(tmp_path) == []


def test_two_jobs_of_one_user_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    jobs = [start(2, partial(open_mpi, size=2, job=job), tmp_path, "smoke.py", "close") for job in ("job-1", "job-2")]
    for found in map(ends, jobs):
        assert [code for code, _, _ in found] == [0, 0], [err for _, _, err in found]
        assert found[0][1] == "done\n"
    assert meeting_files(tmp_path) == []


@pytest.mark.parametrize(("victim", "place"), [(0, "all_reduce"), (2, "object")])
def test_sigkill_of_a_rank_is_heard_by_all_others_in_time(victim: int, place: str, tmp_path: Path) -> None:
    """Rank 0 is the one whose death is hardest: it is the first of everything."""
    found = ends(start(3, lambda rank: open_mpi(rank, 3), tmp_path, "lose_a_rank.py", str(victim), place))
    assert found[victim][0] == -9
    for rank in {0, 1, 2} - {victim}:
        code, out, err = found[rank]
        assert code == 0, err
        heard = re.fullmatch(r"rank (\d): (\w+) (\S+) ([\d.]+), then (\w+), closed in ([\d.]+)\n", out)
        assert heard is not None, out
        assert heard.group(1, 2, 3, 5) == (str(rank), "PeerLostError", str(victim), "PeerLostError"), out
        assert float(heard[4]) < 5
        assert float(heard[6]) < 5
        assert not [word for word in ABORTED if word in err], err


def test_sigkill_where_the_store_dies_too() -> None:
    """Over TCP rank 0 serves the store: its peers must not wait for the store to say who died."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = ends(start(3, lambda rank: {**open_mpi(rank, 3), **address}, Path("/tmp"), "lose_a_rank.py", "0", "all_reduce"))
    for rank in (1, 2):
        code, out, err = found[rank]
        assert code == 0, err
        assert re.match(rf"rank {rank}: PeerLostError 0 [0-4]\.\d, then PeerLostError, closed in [0-4]\.", out), (out, err)


def test_a_job_after_one_that_was_killed(tmp_path: Path) -> None:
    """The dead job's file is still there; the next job, which Open MPI gives another name, does not read it."""
    ends(start(2, lambda rank: open_mpi(rank, 2, "job-1"), tmp_path, "lose_a_rank.py", "1", "all_reduce"))
    found = ends(start(2, lambda rank: open_mpi(rank, 2, "job-2"), tmp_path, "smoke.py", "close"))
    assert [code for code, _, _ in found] == [0, 0], [err for _, _, err in found]


def test_torchrun_restarts_the_workers_into_a_store_that_remembers(tmp_path: Path) -> None:
    """The agent's store outlives the workers: what the first attempt left in it must not be taken for the second's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [*command, str(PROGRAMS / "fail_once.py"), str(tmp_path / "failed")],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 1 done\n"


def test_children_by_fork_leave_the_groups_of_their_parent_alone(tmp_path: Path) -> None:
    found = ends(start(2, lambda rank: open_mpi(rank, 2), tmp_path, "fork.py"))
    assert [code for code, _, _ in found] == [0, 0], [err for _, _, err in found]
    assert found[0][1].count("child\n") == 2
    assert "done\n" in found[0][1]
