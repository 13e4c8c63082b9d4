"""Real processes: started by torchrun, and by a parent that says what Open MPI, PMI and Slurm say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import pytest

from tests.helpers import again_if_late, free_port, in_time
from tests.processes import PROGRAMS, Processes, environment, outputs

ABORTED = ("terminate called", "Aborted", "Segmentation fault", "Fatal Python error", "leaked")


def torchrun(processes: Processes, ranks: int, program: str, *args: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program under torch's launcher, which gives it a port of its own and starts an interpreter for each rank."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options)
    return processes.run(*command, PROGRAMS / program, *args)


@attrs.frozen
class End:
    """How a process ended: its exit code (negative: the signal) and what it wrote."""

    code: int
    out: str
    err: str


@attrs.frozen
class Launcher:
    """Starts processes as a launcher does that has no address for them: all of them children of one parent."""

    processes: Processes
    tmp: Path

    def run(self, *jobs: tuple[int, Callable[[int, int], Mapping[str, str]], Sequence[str]]) -> list[list[End]]:
        """Runs jobs at the same time: (number of ranks, what the launcher says to a rank, program and arguments)."""
        started = [
            [
                self.processes.start(PROGRAMS / program[0], *program[1:], env=environment({"TMPDIR": str(self.tmp), **says(rank, ranks)}))
                for rank in range(ranks)
            ]
            for ranks, says, program in jobs
        ]
        said = [[rank.communicate(timeout=60) for rank in job] for job in started]
        return [[End(rank.wait(), *text) for rank, text in zip(*job, strict=True)] for job in zip(started, said, strict=True)]

    def files(self) -> list[Path]:
        """What jobs left in the temporary directory."""
        return [path for path in self.tmp.rglob("*") if not path.is_dir()]


@pytest.fixture
def launcher(processes: Processes, tmp_path: Path) -> Launcher:
    return Launcher(processes, tmp_path)


def well(ends: Sequence[End]) -> None:
    """All of them ended as they should, and rank 0 found everything right."""
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.err for end in ends)
    assert not [end.err for end in ends for word in ABORTED if word in end.err]
    assert "done\n" in ends[0].out


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


# torchrun itself.


def test_every_operation_under_torchrun(processes: Processes) -> None:
    done = torchrun(processes, 4, "smoke.py", "close")
    well([End(done.returncode, done.stdout, done.stderr)])


def test_an_end_with_everything_open_under_torchrun(processes: Processes) -> None:
    done = torchrun(processes, 2, "smoke.py", "exit")
    well([End(done.returncode, done.stdout, done.stderr)])


def test_torchrun_restarts_the_workers_into_a_store_that_remembers(tmp_path: Path, processes: Processes) -> None:
    """The agent's store outlives the workers: what the first attempt left in it must not be taken for the second's."""
    done = torchrun(processes, 2, "fail_once.py", str(tmp_path / "failed"), options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 1 done\n"


def test_one_of_two_agents_restarts_its_workers(tmp_path: Path, processes: Processes) -> None:
    """Each agent of torchrun counts the restarts of its own workers, so that the ranks are told different numbers of them."""
    port = str(free_port())
    command = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += [str(PROGRAMS / "fail_once.py"), str(tmp_path / "failed")]
    said = outputs([processes.start(*command) for _ in range(2)])
    assert "".join(said) == "attempt 1 done\n"


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_goes_on_with_fewer_hosts(tmp_path: Path) -> None:
    """``--nnodes 1:2``: one of two agents and its worker are killed; the other starts its worker again, as a world of one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-conf", "last_call_timeout=15,keep_alive_interval=2,keep_alive_max_attempt=3"]
    command += [str(PROGRAMS / "fewer_hosts.py"), str(tmp_path)]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) for _ in range(2)]
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < until, "the first round did not begin"
            time.sleep(0.1)
        # Of the two, the one that does not serve torchrun's own rendezvous, which was bound first.
        listens = {one for one in agents if f"{one.pid}" in _listeners(command)}
        (lost,) = [one for one in agents if one not in listens]
        for child in Path(f"/proc/{lost.pid}/task/{lost.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        lost.kill()
        (left,) = listens
        out, err = left.communicate(timeout=150)
        assert left.returncode == 0, err
        assert out.splitlines()[-1] == "1 ranks, sum 1"
    finally:
        for agent in agents:
            agent.kill()
            agent.communicate()


def _listeners(command: Sequence[str]) -> set[str]:
    """Processes that listen at the port of a command's rendezvous."""
    port = f"{int(command[command.index('--rdzv-endpoint') + 1].rpartition(':')[2]):04X}"
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port}") and fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) in inodes:
                found.add(link.parts[2])
        except OSError:
            continue
    return found


# Other launchers.


def test_a_default_group_of_torchs_stays_as_it_was(launcher: Launcher) -> None:
    """All meet at one port: torch's own rendezvous, and every world beside it."""
    port = str(free_port())

    def says(rank: int, size: int) -> dict[str, str]:
        return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    (ends,) = launcher.run((4, says, ("beside_torch.py",)))
    well(ends)


@pytest.mark.parametrize(("says", "ranks"), [(open_mpi, 3), (pmi, 2), (slurm, 2)])
def test_one_node_meets_by_a_private_file(launcher: Launcher, says: Callable[[int, int], dict[str, str]], ranks: int) -> None:
    for _ in range(2):  # the second job has the name of the first, and a file of the same name
        (ends,) = launcher.run((ranks, says, ("smoke.py", "close")))
        well(ends)
        assert not launcher.files(), "a job leaves no file behind"
    assert (launcher.tmp / f"commgraph-{os.getuid()}").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.long) for ranks in (3, 4))])
def test_interpreters_that_end_with_everything_open_end_well(launcher: Launcher, ranks: int) -> None:
    """Repeated, since a gloo group that lived until the end of the interpreter aborted 2 of 12 runs."""
    for attempt in range(2):
        (ends,) = launcher.run((ranks, partial(open_mpi, job=f"job-{attempt}"), ("smoke.py", "exit")))
        well(ends)


def test_two_jobs_of_one_user_at_the_same_time_do_not_meet(launcher: Launcher) -> None:
    for ends in launcher.run(
        (2, partial(open_mpi, job="job-1"), ("smoke.py", "close")),
        (2, partial(open_mpi, job="job-2"), ("smoke.py", "close")),
    ):
        well(ends)


@pytest.mark.parametrize(("victim", "place", "meeting"), [(0, "all_reduce", "file"), (2, "object", "file"), (0, "object", "tcp")])
@again_if_late
def test_sigkill_of_a_rank_is_heard_by_all_others_in_time(launcher: Launcher, victim: int, place: str, meeting: str) -> None:
    """Rank 0 is the one whose death is hardest; over TCP it takes the store along, which then cannot say who died."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if meeting == "tcp" else {}
    (ends,) = launcher.run((3, lambda rank, size: {**open_mpi(rank, size), **address}, ("lose_a_rank.py", str(victim), place)))
    assert ends[victim].code == -9
    for rank in {0, 1, 2} - {victim}:
        assert ends[rank].code == 0, ends[rank].err
        heard = re.fullmatch(r"rank (\d): (\w+) (\S+) ([\d.]+), then (\w+), closed in ([\d.]+)\n", ends[rank].out)
        assert heard is not None, ends[rank].out
        assert heard.group(1, 2, 3, 5) == (str(rank), "PeerLostError", str(victim), "PeerLostError"), ends[rank].out
        in_time(float(heard[4]), 2, ends[rank].out)
        in_time(float(heard[6]), 2, ends[rank].out)
        assert not [word for word in ABORTED if word in ends[rank].err], ends[rank].err


@pytest.mark.parametrize("job", ["job-1", "job-2"])
def test_a_job_after_one_that_was_killed(launcher: Launcher, job: str) -> None:
    """The dead job's file is still there. The next job, another one or another program of the same, meets and removes it."""
    launcher.run((1, lambda rank, size: open_mpi(rank, 2), ("killed.py",)))
    assert len(launcher.files()) == 2, "else this test shows nothing"
    (ends,) = launcher.run((2, partial(open_mpi, job=job), ("smoke.py", "close")))
    well(ends)
    assert not launcher.files()


def test_children_by_fork_leave_the_groups_of_their_parent_alone(launcher: Launcher) -> None:
    (ends,) = launcher.run((2, open_mpi, ("fork.py",)))
    well(ends)
    assert ends[0].out.count("child\n") == 2
