"""Who a process is and where its peers meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commgraph.errors import LaunchError
from commgraph.launch import HostFacts, Launch, authkey, detect, join_engines, meeting_name, meeting_point, private_directory, read_host

# What the launchers really set, shortened to what may matter.
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "40415",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "dc68d09e-3f6f-4baf-a1b3-aa74b4aaa798",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-vm-5538@1",
    "PMIX_RANK": "1",
    "PRTE_LAUNCHED": "1",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_num_nodes": "2",
    "OMPI_MCA_ess_base_jobid": "2871132161",
    "PMIX_NAMESPACE": "2871132161",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "11", "PMI_HOSTNAME": "vm", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INTEL = MPICH | {"I_MPI_HYDRA_UUID": "15140000-3289-e701-fa60-06005b33cb2a"}
CRAY = {"PMI_RANK": "6", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "2", "PMI_LOCAL_SIZE": "4"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "7", "SLURM_NODEID": "0"}
SLURM = BATCH | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_NODEID": "3",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "6",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "2",
}
FLUX = {
    "FLUX_TASK_RANK": "2",
    "FLUX_JOB_SIZE": "4",
    "FLUX_TASK_LOCAL_ID": "0",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f23Kq",
}
EVERY = {
    "torchrun": TORCHRUN,
    "Open MPI": OPEN_MPI_5,
    "MVAPICH": MVAPICH,
    "PMI": MPICH,
    "jsrun": JSRUN,
    "Flux": FLUX,
    "Slurm": SLURM,
}
HALVES = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
HOST = HostFacts(boot="b", init_start="1", parent="10:99")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch("single", 0, 1, 0, 1, 1)),
        (
            TORCHRUN,
            Launch("torchrun", 5, 8, 1, 4, 2, master_addr="node0", master_port=40415, agent_store=True),
        ),
        (OPEN_MPI_5, Launch("Open MPI", 1, 2, 1, 2, job="PMIX_NAMESPACE=prterun-vm-5538@1")),
        (OPEN_MPI_4, Launch("Open MPI", 3, 4, 1, 2, 2, job="PMIX_NAMESPACE=2871132161 OMPI_MCA_ess_base_jobid=2871132161")),
        (MPICH, Launch("PMI", 1, 2, 1, 2)),
        (INTEL, Launch("PMI", 1, 2, 1, 2, job="I_MPI_HYDRA_UUID=15140000-3289-e701-fa60-06005b33cb2a")),
        (CRAY, Launch("PMI", 6, 8, 2, 4)),
        (SLURM, Launch("Slurm", 6, 7, 0, 1, 4, job="SLURM_JOB_ID=77 SLURM_STEP_ID=3")),
        (SLURM | {"SLURM_PROCID": "3", "SLURM_NODEID": "1"}, Launch("Slurm", 3, 7, 0, 2, 4, job="SLURM_JOB_ID=77 SLURM_STEP_ID=3")),
        (MVAPICH, Launch("MVAPICH", 3, 4, 1, 2)),
        (JSRUN, Launch("jsrun", 5, 6, 1, 2)),
        (FLUX, Launch("Flux", 2, 4, 0, None, 2, job="FLUX_JOB_ID=f23Kq")),
        (FLUX | SLURM, Launch("Flux", 2, 4, 0, None, 2, job="FLUX_JOB_ID=f23Kq")),
        ({"PMIX_RANK": "1", "WORLD_SIZE": "2"}, Launch("PMIx", 1, 2)),
        (BATCH, Launch("single", 0, 1, 0, 1, 1)),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Launch("single", 0, 1, 0, 1, 1, master_addr="a", master_port=1)),
        (dict.fromkeys(TORCHRUN, "") | {"SLURM_STEP_NUM_TASKS": ""}, Launch("single", 0, 1, 0, 1, 1)),
    ],
)
def test_launchers(environ: dict[str, str], expected: Launch) -> None:
    assert detect(environ) == expected


def test_a_rank_of_pmix_without_a_size_is_no_world_of_one() -> None:
    with pytest.raises(LaunchError, match=r"PMIx must tell both.*PMIX_RANK='3' is set, WORLD_SIZE is not set"):
        detect({"PMIX_RANK": "3", "PMIX_NAMESPACE": "job"})


def test_facts_left_out_come_from_a_launcher_that_agrees() -> None:
    by_hand = SLURM | {"RANK": "6", "WORLD_SIZE": "7"}
    assert attrs.asdict(detect(by_hand), filter=attrs.filters.include("launcher", "local_rank", "local_size", "node_count")) == {
        "launcher": "torchrun",
        "local_rank": 0,
        "local_size": 1,
        "node_count": 4,
    }
    apart = detect(SLURM | {"RANK": "0", "WORLD_SIZE": "2"})  # two ranks somewhere inside the step
    assert (apart.local_rank, apart.local_size, apart.node_count) == (None, None, None)


@pytest.mark.parametrize(
    ("tasks", "node", "size"),
    [("4", None, 4), ("4(x2)", None, 4), ("4(x2),3", None, None), ("4(x2),3", "2", 3), ("4(x100000000)", "99999999", 4)],
)
def test_slurm_tasks_per_node(tasks: str, node: str | None, size: int | None) -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert detect(environ if node is None else environ | {"SLURM_NODEID": node}).local_size == size


@given(
    whole=st.sets(st.sampled_from(list(EVERY))),
    kept=st.dictionaries(st.sampled_from(list(EVERY)), st.sampled_from([0, 1])),
    batch=st.booleans(),
)
def test_the_first_complete_launcher_wins(whole: set[str], kept: dict[str, int], batch: bool) -> None:
    environ: dict[str, str] = dict(BATCH) if batch else {}
    for name, variables in EVERY.items():
        if name in whole:
            environ |= variables
        elif name in kept:
            environ[HALVES[name][kept[name]]] = "1"
    complete = [name for name, both in HALVES.items() if all(one in environ for one in both)]
    halves = [name for name, both in HALVES.items() if any(one in environ for one in (both[1:] if name == "Slurm" else both))]
    before = dict(environ)
    if complete:
        assert detect(environ).launcher == complete[0]
    elif halves:
        with pytest.raises(LaunchError) as caught:
            detect(environ)
        for name in halves:
            for variable in HALVES[name]:
                told = f"{variable}={environ[variable]!r} is set" if variable in environ else f"{variable} is not set"
                assert told in str(caught.value)
    else:
        assert detect(environ).launcher == "single"
    assert environ == before


@given(st.dictionaries(st.sampled_from(sorted(set().union(*EVERY.values()))), st.text("0129-x(),٣", max_size=5)))
def test_any_mapping_gives_a_launch_or_a_launch_error(environ: dict[str, str]) -> None:
    before = dict(environ)
    try:
        launch = detect(environ)
    except LaunchError:
        pass
    else:
        assert 0 <= launch.rank < launch.world_size
        assert launch.local_size is None or (launch.local_rank or 0) < launch.local_size <= launch.world_size
    assert environ == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "1_0"}, "RANK='1_0'"),
        ({"RANK": "٣"}, "RANK='٣'"),
        ({"RANK": "8"}, "RANK='8' is no rank of WORLD_SIZE='8'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_ADDR": "node0:29500"}, "MASTER_ADDR='node0:29500' ends in ':29500': a port is set as MASTER_PORT"),
        ({"MASTER_ADDR": "[fe80::1]:29500"}, "a port is set as MASTER_PORT"),
        ({"MASTER_ADDR": "tcp://node0"}, "MASTER_ADDR='tcp://node0' is a URL"),
        ({"MASTER_ADDR": "tcp://node0:29500"}, "is a URL"),
        ({"MASTER_ADDR": "node0,node1"}, "is a list"),
        ({"MASTER_ADDR": "node[0-3]"}, "is a list"),
        ({"MASTER_ADDR": "node0 "}, "has blanks"),
    ],
)
def test_bad_values_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(TORCHRUN | change)
    assert named in str(caught.value)


@pytest.mark.parametrize("addr", ["node0:29500", "tcp://10.96.0.17", "a b", "fe80::1", "node0"])
@pytest.mark.parametrize("port", ["tcp://10.96.0.17:6379", "udp://[fd00::1]:53", "http", "0", "-1", "1e9"])
def test_an_address_that_cannot_be_one_is_no_launch(addr: str, port: str) -> None:
    """In a container of Kubernetes MASTER_PORT is a URL where there is a service called master."""
    for environ in ({"MASTER_PORT": port}, {"MASTER_ADDR": addr, "MASTER_PORT": port}, {"MASTER_ADDR": addr}):
        launch = detect(environ)
        assert (launch.launcher, launch.rank, launch.world_size, launch.master_port) == ("single", 0, 1, None)


def test_a_service_link_of_kubernetes_counts_as_unset(tmp_path: Path) -> None:
    link = {"MASTER_PORT": "tcp://10.96.0.17:6379"}
    assert meeting_point(detect(OPEN_MPI_5 | link), directory=tmp_path, host=HOST).startswith("file://")
    with pytest.raises(LaunchError, match="MASTER_ADDR='node0' is set and MASTER_PORT is not"):
        meeting_point(detect(OPEN_MPI_5 | link | {"MASTER_ADDR": "node0"}), directory=tmp_path, host=HOST)


@pytest.mark.parametrize("change", [{"SLURM_STEP_TASKS_PER_NODE": "4(x"}, {"SLURM_NODEID": "4"}])
def test_bad_slurm_lists_are_named(change: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE="):
        detect(SLURM | change)


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_engines_join_in_order(dp_size: int, world_size: int, data: st.DataObject) -> None:
    dp_rank, rank = data.draw(st.integers(0, dp_size - 1)), data.draw(st.integers(0, world_size - 1))
    joined, size = join_engines(Launch("single", rank, world_size), dp_rank, dp_size)
    assert (divmod(joined, world_size), size) == ((dp_rank, rank), dp_size * world_size)


@pytest.mark.parametrize(("dp_rank", "dp_size"), [(1, 1), (-1, 2), (0, 0), (0, -1)])
def test_engines_out_of_range(dp_rank: int, dp_size: int) -> None:
    with pytest.raises(LaunchError, match=f"dp_rank={dp_rank} of dp_size={dp_size}"):
        join_engines(Launch("single", 0, 1), dp_rank, dp_size)


@pytest.mark.parametrize(
    ("addr", "point"),
    [
        ("node0", "tcp://node0:29500"),
        ("10.0.0.1", "tcp://10.0.0.1:29500"),
        ("fe80::1", "tcp://[fe80::1]:29500"),
        ("[::1]", "tcp://[::1]:29500"),
    ],
)
def test_an_address_is_where_ranks_meet(addr: str, point: str, tmp_path: Path) -> None:
    environ = MPICH | {"MASTER_ADDR": addr, "MASTER_PORT": "29500"}
    assert meeting_point(detect(environ), directory=tmp_path, host=HOST) == point
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_an_address(name: str) -> None:
    with pytest.raises(LaunchError, match=f"{name}=.* is set and MASTER_(ADDR|PORT) is not"):
        meeting_point(detect(MPICH | {name: "29500"}))


@pytest.mark.parametrize(
    ("environ", "example"),
    [(OPEN_MPI_4, "mpirun -x MASTER_ADDR=node0"), (CRAY, "mpiexec -genv MASTER_ADDR"), (SLURM, "scontrol show hostnames")],
)
def test_several_nodes_need_an_address(environ: dict[str, str], example: str) -> None:
    with pytest.raises(LaunchError) as caught:
        meeting_point(detect(environ))
    for advice in ("MASTER_ADDR", "MASTER_PORT", example):
        assert advice in str(caught.value)


def test_engines_launched_apart_need_an_address() -> None:
    with pytest.raises(LaunchError, match=r"no launcher knows all of them.*init_method"):
        meeting_point(detect(MPICH), dp_size=2)
    with pytest.raises(LaunchError, match=r"each torchrun serves.*init_method"):
        meeting_point(detect(TORCHRUN), dp_size=2)
    assert meeting_point(detect(MPICH | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}), dp_size=2) == "tcp://a:5"


def test_a_private_file_on_one_node(tmp_path: Path) -> None:
    points = {meeting_point(detect(OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": rank}), directory=tmp_path, host=HOST) for rank in "01"}
    directory = tmp_path / f"commgraph-{os.getuid()}"
    assert points == {f"file://{directory}/{meeting_name(detect(OPEN_MPI_5), HOST)}"}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not list(directory.iterdir())


def test_an_unknown_number_of_nodes_counts_as_one(tmp_path: Path) -> None:
    assert meeting_point(Launch("PMI", 0, 2), directory=tmp_path, host=HOST).startswith("file:///")


def test_a_path_that_a_url_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a?b").mkdir()
    with pytest.raises(LaunchError, match="TMPDIR"):
        meeting_point(Launch("PMI", 0, 2), directory=tmp_path / "a?b", host=HOST)


def test_jobs_have_names_of_their_own() -> None:
    launches = [detect(OPEN_MPI_5), detect(OPEN_MPI_5 | {"PMIX_NAMESPACE": "prterun-vm-5538@2"}), detect(MPICH)]
    launches += [attrs.evolve(launches[2], world_size=3), detect(INTEL)]
    hosts = [HOST, attrs.evolve(HOST, boot="c"), attrs.evolve(HOST, init_start="2")]
    assert len({meeting_name(launch, host) for launch in launches for host in hosts}) == len(launches) * len(hosts)

    other_parent = attrs.evolve(HOST, parent="11:99")
    assert meeting_name(detect(MPICH), HOST) != meeting_name(detect(MPICH), other_parent)
    assert meeting_name(detect(OPEN_MPI_5), HOST) == meeting_name(detect(OPEN_MPI_5), other_parent)  # a wrapper per rank


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: path.mkdir(mode=0o755), "open to other users"),
        (lambda path: path.symlink_to(path.parent), "is a link"),
        (lambda path: path.touch(mode=0o600), "is no directory"),
    ],
)
def test_a_directory_that_is_not_private(tmp_path: Path, make: object, fault: str) -> None:
    assert callable(make)
    make(tmp_path / f"commgraph-{os.getuid()}")
    with pytest.raises(LaunchError, match=f"{fault}.*MASTER_ADDR"):
        private_directory(tmp_path, os.getuid())


def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "commgraph-4242").mkdir(mode=0o700)
    with pytest.raises(LaunchError, match=f"belongs to user {os.getuid()}, not 4242"):
        private_directory(tmp_path, 4242)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be made"):
        private_directory(tmp_path / "absent", 1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc is Linux's")
def test_children_of_one_parent_read_the_same_host() -> None:
    script = "from commgraph.launch import read_host; print(read_host())"
    first, second = (subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert f"'{os.getpid()}:" in first
    here = read_host()
    assert "" not in (here.boot, here.init_start, here.parent.rpartition(":")[2])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc is Linux's")
def test_scripts_between_a_launcher_and_its_ranks_are_passed_over(tmp_path: Path) -> None:
    """MPICH names no job: its ranks meet by the process that started them, which is not the parent where a script runs Python."""
    (wrapper := tmp_path / "wrapper.sh").write_text('#!/bin/sh\n"$@"\nexit $?\n')
    command = [sys.executable, "-c", "from commgraph.launch import read_host; print(read_host().parent)"]
    for depth in range(3):
        wrapped = ["sh", str(wrapper)] * depth + command
        for rank in "01":
            done = subprocess.run(wrapped, env={**os.environ, **MPICH, "PMI_RANK": rank}, capture_output=True, text=True, check=True)
            assert done.stdout.startswith(f"{os.getpid()}:"), (depth, done.stdout)


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({}, None),
        ({"COMMGRAPH_AUTHKEY": ""}, None),
        ({"COMMGRAPH_AUTHKEY": "grün"}, "grün".encode()),
        ({"COMMGRAPH_AUTHKEY": "\udcff"}, b"\xff"),
    ],
)
def test_the_secret_of_the_job(environ: dict[str, str], key: bytes | None) -> None:
    assert authkey(environ) == key
