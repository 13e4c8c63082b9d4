"""Jobs as real launchers start them: those that `nox -s launchers` installs, and Debian's Open MPI and Slurm where the machine has them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import pytest

from tests.helpers import ROOT, free_port
from tests.processes import environment

PROGRAMS = ROOT / "tests" / "programs"
# Environments that `nox -s launchers` makes, of a launcher each: two MPIs would both be `mpiexec`.
INSTALLED = ROOT / ".nox" / "launchers"
EXAMPLE = ROOT / "docs" / "examples" / "mpi"

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(300)]


@attrs.frozen
class Launcher:
    """One of MPI's.

    Attributes:
        start: its command, up to the number of ranks.
        python: runs the ranks.
    """

    start: tuple[str, ...]
    python: str

    def run(self, ranks: int, *program: str, wrapper: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
        """Run a job that must succeed; return what it wrote."""
        command = [*self.start, str(ranks), *wrapper, self.python, *program]
        # Open MPI refuses root unless it is asked twice, and counts cores; MPICH's shared memory needs no such word.
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return succeed(command, environment({**allowed, **(environ or {})}))


def succeed(command: Sequence[str], environ: Mapping[str, str], seconds: float = 120) -> str:
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def installed(name: str) -> Path:
    folder = INSTALLED / name / "bin"
    if not folder.is_dir():
        pytest.skip(f"`nox -s launchers` installs {name}")
    return folder


@pytest.fixture(params=["mpich", "openmpi", "Debian's openmpi"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "mpich":
        place = installed("mpich")
        return Launcher((str(place / "mpiexec"), "-n"), str(place / "python"))
    if request.param == "openmpi":
        place = installed("openmpi")
        return Launcher((str(place / "mpiexec"), "--oversubscribe", "-n"), str(place / "python"))
    found = shutil.which("mpirun.openmpi")
    if found is None:
        pytest.skip("apt-get install openmpi-bin")
    # mpi4py's wheel takes whichever MPI is there: in this environment Debian's alone.
    return Launcher((found, "--oversubscribe", "-n"), str(installed("debian") / "python"))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example of a strategy over MPI was installed from its sources."""
    folder, copied = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("sources") / "mpi"
    shutil.copytree(EXAMPLE, copied)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(copied)]
    succeed(install, os.environ)
    return folder


# MPI's launchers.


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_one_host_meet_without_an_address(launcher: Launcher, ranks: int) -> None:
    assert "done\n" in launcher.run(ranks, str(PROGRAMS / "smoke.py"), "close")


def test_ranks_that_a_script_starts_meet_too(launcher: Launcher, tmp_path: Path) -> None:
    """A script in between, which does not replace itself by Python: MPICH names no job, and the ranks' parents differ."""
    (script := tmp_path / "wrapper.sh").write_text('#!/bin/sh\nexport MINE=1\n"$@"\nexit $?\n')
    begun = time.monotonic()
    assert "done\n" in launcher.run(2, str(PROGRAMS / "smoke.py"), "close", wrapper=["sh", str(script)])
    assert time.monotonic() - begun < 60


def test_two_jobs_at_the_same_time_do_not_meet(launcher: Launcher) -> None:
    command = [*launcher.start, "2", launcher.python, str(PROGRAMS / "smoke.py"), "close"]
    environ = environment({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    jobs = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert all("done\n" in out for out, _ in said)


def test_ranks_meet_at_an_address(launcher: Launcher) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    assert "done\n" in launcher.run(2, str(PROGRAMS / "smoke.py"), "close", environ=place)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_strategy_over_mpi_passes_the_conformance_suite(launcher: Launcher, example: Path, ranks: int) -> None:
    path = os.pathsep.join((str(example), str(ROOT)))
    said = launcher.run(ranks, str(EXAMPLE / "check.py"), environ={"PYTHONPATH": path})
    assert f"{ranks} ranks: passed\n" in said


def test_the_strategy_over_mpi_serves_a_job(launcher: Launcher, example: Path) -> None:
    """Every operation, on the groups of two contexts."""
    path = os.pathsep.join((str(example), str(ROOT)))
    assert "done\n" in launcher.run(4, str(PROGRAMS / "smoke.py"), "close", environ={"PYTHONPATH": path})


# Ray.


def test_actors_of_ray() -> None:
    python = installed("ray") / "python"
    assert "done\n" in succeed([str(python), str(PROGRAMS / "ray_actors.py"), str(free_port())], environment())


# Slurm.


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of one node, this one; gives what its commands need in the environment."""
    missing = [
        tool for tool in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root, and {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else "needs root")
    folder, name = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for place in ("state", "spool", "munge"):
        (folder / place).mkdir(mode=0o755)
    folder.chmod(0o755)
    (key := folder / "munge" / "key").write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = [free_port(), free_port()]
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={name}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
        f"SlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\n"
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge/socket\nCryptoType=crypto/munge\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\nReturnToService=2\nMpiDefault=none\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\n"
        f"NodeName={name} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN\n"
        f"PartitionName=all Nodes={name} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8\n"
    )
    environ = environment({"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    munge, own = folder / "munge", ("socket", "key-file", "pid-file", "log-file", "seed-file")
    commands = (
        ["munged", "--foreground", "--force", *(f"--{file}={munge / file.partition('-')[0]}" for file in own)],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    daemons, logs = [], []
    try:
        for command in commands:
            logs.append((folder / f"{command[0]}.log").open("wb"))
            daemons.append(subprocess.Popen(command, env=environ, stdout=logs[-1], stderr=subprocess.STDOUT))
            time.sleep(0.5)
        until = time.monotonic() + 60
        while (
            subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%n"], env=environ, capture_output=True, check=False).stdout.strip() == b""
        ):
            said = "\n".join((folder / f"{command[0]}.log").read_text()[-2000:] for command in commands)
            assert time.monotonic() < until, said
            time.sleep(0.5)
        yield environ
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)
        for log in logs:
            log.close()


def test_srun_of_slurm(slurm: dict[str, str]) -> None:
    command = ["srun", "--overcommit", "-n", "3", sys.executable, str(PROGRAMS / "smoke.py"), "close"]
    assert "done\n" in succeed(command, slurm)


def test_a_batch_script_alone_is_no_launch(slurm: dict[str, str], tmp_path: Path) -> None:
    """Its Python is a world of one, and a step inside it is one of its size."""
    (script := tmp_path / "job.sh").write_text(
        f"#!/bin/sh\n{sys.executable} -c 'import commgraph as cg\nwith cg.World.from_env() as world: print(world.size, flush=True)'\n"
        f"srun --overcommit -n 2 {sys.executable} {PROGRAMS / 'smoke.py'} close\n"
    )
    output = tmp_path / "output"
    succeed(["sbatch", "--wait", "--overcommit", "-n", "2", "-o", str(output), str(script)], slurm)
    assert output.read_text() == "1\ndone\n"
