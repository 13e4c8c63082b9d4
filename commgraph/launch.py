"""Who this process is: what torchrun, MPI's launchers, Slurm, Flux and jsrun say in the environment, and where its peers meet.

`detect` is a pure function of a mapping and `meeting_name` one of facts; only `read_host` and `private_directory` touch the
system, and nothing here writes the environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from commgraph.errors import LaunchError

__all__ = [
    "HostFacts",
    "Launch",
    "authkey",
    "check_authkey",
    "detect",
    "join_engines",
    "meeting_name",
    "meeting_point",
    "private_directory",
    "read_host",
]


@attrs.frozen
class Launch:
    """This process's place in its job, as its launcher says.

    Attributes:
        launcher: ``"torchrun"``, ``"Open MPI"``, ``"MVAPICH"``, ``"PMI"``, ``"jsrun"``, ``"Flux"``, ``"Slurm"``, ``"PMIx"``, or
            ``"single"``: nobody launched this process.
        rank: number of this process in the job, 0 to ``world_size - 1``.
        world_size: processes in the job.
        local_rank: number of this process on its node; None where the launcher does not say.
        local_size: processes of the job on this node; None where the launcher does not say.
        node_count: nodes of the job; None where the launcher does not say.
        master_addr: host name or address where the ranks meet.
        master_port: TCP port there, 1 to 65535.
        agent_store: torchrun's agent already serves the store at that address: rank 0 connects to it like everybody else.
        job: text that identifies this job among others of the same launcher; None where the launcher sets none.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_size: int | None = None
    node_count: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    job: str | None = None


@attrs.frozen
class _Launcher:
    """The variables of one launcher. Of several for one fact the first that is set counts; a job is identified by all of its together."""

    name: str
    rank: str
    size: str
    presence: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    node_count: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


# In order of precedence. torchrun and Flux may run inside a Slurm step, and mpirun starts its daemons by one: the launcher that is likely
# to have started this process comes first.
_LAUNCHERS = (
    _Launcher(
        name="torchrun",
        rank="RANK",
        size="WORLD_SIZE",
        presence=("RANK", "WORLD_SIZE"),
        local_rank=("LOCAL_RANK",),
        local_size=("LOCAL_WORLD_SIZE",),
        node_count=("GROUP_WORLD_SIZE",),
        # TORCHELASTIC_RUN_ID is no job id (it may be anybody's "none"), and torchrun always sets an address anyway.
    ),
    _Launcher(
        name="Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        presence=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        node_count=("OMPI_MCA_orte_num_nodes",),
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher(
        name="MVAPICH",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        presence=("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        name="PMI",
        rank="PMI_RANK",
        size="PMI_SIZE",
        presence=("PMI_RANK", "PMI_SIZE"),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        job=("PMI_JOBID", "I_MPI_HYDRA_UUID"),
    ),
    _Launcher(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK",
        size="JSM_NAMESPACE_SIZE",
        presence=("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_size=("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    _Launcher(
        name="Flux",
        rank="FLUX_TASK_RANK",
        size="FLUX_JOB_SIZE",
        presence=("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        node_count=("FLUX_JOB_NNODES",),
        job=("FLUX_JOB_ID",),
    ),
    _Launcher(
        name="Slurm",
        rank="SLURM_PROCID",
        size="SLURM_STEP_NUM_TASKS",
        # A batch script has SLURM_PROCID=0 and SLURM_NTASKS without being one of several tasks: only a step is a launch.
        presence=("SLURM_STEP_NUM_TASKS",),
        local_rank=("SLURM_LOCALID",),
        # The size of a node is in one list for all nodes: _slurm_local_size.
        node_count=("SLURM_STEP_NUM_NODES",),
        # A job that Slurm requeues keeps its id and begins again at step 0.
        job=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ),
    _Launcher(
        name="PMIx",
        rank="PMIX_RANK",
        # PMIx tells the size to its own library only: whoever starts the ranks has to set it.
        size="WORLD_SIZE",
        presence=("PMIX_RANK",),
    ),
)
_EXAMPLES = MappingProxyType(
    {
        "Open MPI": "mpirun -x MASTER_ADDR=node0 -x MASTER_PORT=29500 python app.py",
        "PMI": "mpiexec -genv MASTER_ADDR node0 -genv MASTER_PORT 29500 python app.py",
        "Slurm": "MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500 srun python app.py",
    }
)
_ADVICE = "set MASTER_ADDR and MASTER_PORT"
_NATURAL = re.compile(r"[0-9]{1,18}")
# Kubernetes sets MASTER_PORT to tcp://10.96.0.17:6379 in every container of a namespace that has a service called master.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
_TASKS_PER_NODE = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


def detect(environ: Mapping[str, str]) -> Launch:
    """Return rank, size and address of this process from the variables of its launcher.

    The first of torchrun, Open MPI, MVAPICH, PMI, jsrun, Flux, Slurm and PMIx that sets both rank and size is used. A local rank, local
    size or number of nodes that it leaves out is taken from a later one that sets the same rank and size (a script that sets
    ``RANK=$SLURM_PROCID``, Slurm's own PMI). MASTER_ADDR and MASTER_PORT alone are no launcher. An empty variable counts as unset, and
    so does the URL that Kubernetes puts into MASTER_PORT for a service called master.

    Args:
        environ: the environment, e.g. ``os.environ``; only read.

    Returns:
        The facts found; launcher ``"single"``, rank 0 of 1, where nobody launched this process.

    Raises:
        LaunchError: a launcher sets only one of rank and size and no other sets both; a variable that is used is no number or
            out of range (the message has its name and value).
    """
    env = {name: value for name, value in environ.items() if value}
    complete = [launcher for launcher in _LAUNCHERS if launcher.rank in env and launcher.size in env]
    if _SERVICE_LINK.match(env.get("MASTER_PORT", "")):
        del env["MASTER_PORT"]
    if not complete:
        _refuse_half_a_launch(env)
        # Nobody launched this process, so an address that cannot be one was not meant for it, as in a container of another framework's.
        with contextlib.suppress(LaunchError):
            return Launch("single", 0, 1, local_rank=0, local_size=1, node_count=1, master_addr=_address(env), master_port=_port(env))
        return Launch("single", 0, 1, local_rank=0, local_size=1, node_count=1)

    chosen = complete[0]
    agreeing = [other for other in complete if (env[other.rank], env[other.size]) == (env[chosen.rank], env[chosen.size])]
    rank, world_size = _number(env, chosen.rank), _number(env, chosen.size)
    if rank >= world_size:
        raise LaunchError(
            f"{chosen.rank}={env[chosen.rank]!r} is no rank of {chosen.size}={env[chosen.size]!r}: ranks are 0 to {world_size - 1}"
            if world_size
            else f"{chosen.size}={env[chosen.size]!r}: a job has at least one rank"
        )
    local_rank = _first_natural(env, (name for launcher in agreeing for name in launcher.local_rank))
    local_size = _first_natural(env, (name for launcher in agreeing for name in launcher.local_size))
    if local_size is None and agreeing[-1].name == "Slurm":
        local_size = _slurm_local_size(env)
    if local_size is not None and not (local_rank or 0) < local_size <= world_size:
        places = [name for launcher in agreeing for name in (*launcher.local_rank, *launcher.local_size) if name in env]
        raise LaunchError(
            f"{chosen.name} tells numbers that do not fit together: local rank {local_rank} of {local_size} ranks on this node, "
            f"{world_size} in all ({_listing(env, (*places, chosen.size))})"
        )
    return Launch(
        launcher=chosen.name,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        node_count=_first_natural(env, (name for launcher in agreeing for name in launcher.node_count)),
        master_addr=_address(env),
        master_port=_port(env),
        agent_store=chosen.name == "torchrun" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job=_listing(env, (name for name in chosen.job if name in env)) or None,
    )


def authkey(environ: Mapping[str, str]) -> bytes | None:
    """The secret of the job, COMMGRAPH_AUTHKEY, as bytes; None where it is unset or empty.

    Args:
        environ: the environment, e.g. ``os.environ``; only read.
    """
    # surrogateescape: bytes that are no UTF-8 stand in os.environ as surrogates.
    return environ.get("COMMGRAPH_AUTHKEY", "").encode("utf-8", "surrogateescape") or None


def check_authkey(where: str, value: Any) -> bytes | None:
    """Return an authkey as a caller gave it; None for none.

    Args:
        where: the public call, for messages.
        value: as given.

    Raises:
        TypeError: it is not bytes.
        ValueError: it is empty.
    """
    if value is not None and not isinstance(value, bytes):
        hint = "; a text is made bytes by .encode()" if isinstance(value, str) else ""
        raise TypeError(f"{where}: authkey is a {type(value).__name__}; bytes are needed{hint}")
    if value == b"":
        raise ValueError(f"{where}: authkey is empty; None means that there is none")
    return value


def join_engines(launch: Launch, dp_rank: int, dp_size: int) -> tuple[int, int]:
    """Return rank and size of this process in a job of data-parallel engines that were launched as worlds of their own.

    Args:
        launch: who this process is in its engine.
        dp_rank: number of the engine, 0 to ``dp_size - 1``.
        dp_size: engines, each of ``launch.world_size`` ranks.

    Returns:
        ``(dp_rank * world_size + rank, dp_size * world_size)``.

    Raises:
        LaunchError: ``dp_rank`` or ``dp_size`` is out of range.
    """
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise LaunchError(f"dp_rank={dp_rank} of dp_size={dp_size}: engines are numbered 0 to dp_size - 1, and there is at least one")
    return dp_rank * launch.world_size + launch.rank, dp_size * launch.world_size


@attrs.frozen
class HostFacts:
    """Facts that distinguish jobs of one host where the launcher has no name for them.

    Attributes:
        boot: identity of this boot of the kernel.
        init_start: when process 1 of this pid namespace started, in clock ticks since boot: a container that is started again has
            the same host name and pids.
        parent: pid of the process that launched this rank, its parent or the parent of scripts between the two, and when it started,
            in clock ticks since boot.
    """

    boot: str
    init_start: str
    parent: str


def read_host() -> HostFacts:
    """Reads the facts from ``/proc``; what cannot be read (another system than Linux) is an empty text."""
    parent = _launching_process(os.environ)
    return HostFacts(
        boot=_read(Path("/proc/sys/kernel/random/boot_id")),
        init_start=_start_time(1),
        parent=f"{parent}:{_start_time(parent)}",
    )


def meeting_name(launch: Launch, host: HostFacts) -> str:
    """Return the name of the file by which the ranks of a job on one host meet: equal for all of them, and unique to the job.

    Where the launcher names the job, by that name alone. Else by the launcher's daemon, which started the job's ranks on one host and
    whose pid and start time no other job has. (A wrapper whose environment cannot be read, or that changes the rank's variables, is
    taken for the daemon: the ranks then need an address, wait for each other in vain, and the error says so.)

    Args:
        launch: who this process is.
        host: facts about the host, from `read_host`.
    """
    job = f"job {launch.job}" if launch.job is not None else f"parent {host.parent}"
    facts = (launch.launcher, str(launch.world_size), job, host.boot, host.init_start)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def private_directory(parent: Path, uid: int) -> Path:
    """Make, or find, the directory ``commgraph-<uid>`` that no other user can read.

    Args:
        parent: where, e.g. ``/tmp``.
        uid: user id of this process.

    Raises:
        LaunchError: something else is there (a link, another owner, open to others), or it cannot be made.
    """
    path = parent / f"commgraph-{uid}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise LaunchError(f"the directory {path} by which the ranks would meet cannot be made: {error}; {_ADVICE}") from error
    faults = []
    if not stat.S_ISDIR(status.st_mode):
        faults.append("is a link" if stat.S_ISLNK(status.st_mode) else "is no directory")
    if status.st_uid != uid:
        faults.append(f"belongs to user {status.st_uid}, not {uid}")
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o077:
        faults.append(f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o})")
    if faults:
        raise LaunchError(f"{path}, by which the ranks would meet, {' and '.join(faults)}: remove it, or {_ADVICE}")
    return path


def meeting_point(
    launch: Launch,
    *,
    dp_size: int = 1,
    uid: int | None = None,
    directory: Path | None = None,
    host: HostFacts | None = None,
) -> str:
    """Return where the ranks of a job meet, as an init method of torch's rendezvous.

    With MASTER_ADDR and MASTER_PORT that is ``tcp://address:port``; without, on one node, ``file://`` and a file in a directory of
    this user alone. Where the launcher sets neither the size of the node nor the number of nodes, one node is assumed: if there are
    more, the ranks wait for each other until the deadline, so the error raised then should speak of MASTER_ADDR.

    Args:
        launch: who this process is.
        dp_size: engines that join (`join_engines`); more than one need an address that all of them know.
        uid: user id of this process; asked of the system if None.
        directory: where the private directory is made; the system's temporary directory if None.
        host: facts about the host; read if None.

    Raises:
        LaunchError: only one of MASTER_ADDR and MASTER_PORT is set; several nodes or several engines without an address; the
            private directory is not private.
    """
    addr, port = launch.master_addr, launch.master_port
    if (addr is None) != (port is None):
        set_, missing = (f"MASTER_PORT={port}", "MASTER_ADDR") if addr is None else (f"MASTER_ADDR={addr!r}", "MASTER_PORT")
        raise LaunchError(f"{set_} is set and {missing} is not: the ranks meet at both or, on one node, at none")
    if dp_size > 1 and (addr is None or launch.agent_store):
        why = "each torchrun serves a store for its own engine only" if launch.agent_store else "no launcher knows all of them"
        raise LaunchError(
            f"{dp_size} engines that were launched apart must be told where they meet, because {why}: "
            'World.from_env(dp_rank=..., dp_size=..., init_method="tcp://node0:29501"), the same in all of them'
        )
    if addr is not None:
        bare = addr.removeprefix("[").removesuffix("]")
        return f"tcp://[{bare}]:{port}" if ":" in bare else f"tcp://{addr}:{port}"
    if (launch.node_count or 1) > 1 or (launch.local_size or launch.world_size) < launch.world_size:
        nodes = "several nodes" if launch.node_count in (None, 1) else f"{launch.node_count} nodes"
        here = "" if launch.local_size is None else f", {launch.local_size} of them here"
        example = _EXAMPLES.get(launch.launcher, "MASTER_ADDR=node0 MASTER_PORT=29500 python app.py")
        raise LaunchError(
            f"rank {launch.rank}: {launch.launcher} started {launch.world_size} ranks on {nodes}{here}, and nothing says where they "
            f"meet: set MASTER_ADDR (a name or address of rank 0's node) and MASTER_PORT (a free port there) on every rank, e.g.\n"
            f"    {example}"
        )
    private = private_directory(directory or Path(tempfile.gettempdir()), os.getuid() if uid is None else uid)
    path = str((private / meeting_name(launch, host or read_host())).absolute())
    if any(character in path for character in "?#%"):
        # torch takes the path from the address as that of a URL, so these characters would change it.
        raise LaunchError(f"torch cannot meet at the file {path!r} (it has one of ?#%): set TMPDIR to another directory, or {_ADVICE}")
    return f"file://{path}"


def _listing(env: Mapping[str, str], names: Iterable[str]) -> str:
    return " ".join(f"{name}={env[name]}" for name in names)


def _address(env: Mapping[str, str]) -> str | None:
    """MASTER_ADDR.

    Raises:
        LaunchError: it is more than one name or address: with a port or a scheme, or a list of nodes.
    """
    if (addr := env.get("MASTER_ADDR")) is None:
        return None
    host, colon, port = addr.rpartition(":")
    if "/" in addr:
        fault = "is a URL or a path"
    elif colon and (host.endswith("]") or ":" not in host):  # an IPv6 address has two colons at least
        fault = f"ends in {colon + port!r}: a port is set as MASTER_PORT"
    elif "," in addr or "[" in addr[1:] or any(character.isspace() for character in addr):
        fault = "is a list, or has blanks"
    else:
        return addr
    raise LaunchError(f"MASTER_ADDR={addr!r} {fault}; it has to be one host name or address of rank 0's node, as in MASTER_ADDR=node0")


def _port(env: Mapping[str, str]) -> int | None:
    port = _natural(env, "MASTER_PORT")
    if port is not None and not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT={env['MASTER_PORT']!r} is no TCP port: 1 to 65535 are")
    return port


def _natural(env: Mapping[str, str], name: str) -> int | None:
    return _number(env, name) if name in env else None


def _number(env: Mapping[str, str], name: str) -> int:
    # int() would take "1_0", " 1" and digits of other scripts too.
    if not _NATURAL.fullmatch(env[name]):
        raise LaunchError(f"{name}={env[name]!r} is not a number from 0 on")
    return int(env[name])


def _first_natural(env: Mapping[str, str], names: Iterable[str]) -> int | None:
    return next((_number(env, name) for name in names if name in env), None)


def _refuse_half_a_launch(env: Mapping[str, str]) -> None:
    halves = [launcher for launcher in _LAUNCHERS if any(name in env for name in launcher.presence)]
    if halves:
        told = ", ".join(
            f"{name}={env[name]!r} is set" if name in env else f"{name} is not set"
            for launcher in halves
            for name in (launcher.rank, launcher.size)
        )
        raise LaunchError(f"{' and '.join(half.name for half in halves)} must tell both rank and size: {told}. Set both, or neither")


def _slurm_local_size(env: Mapping[str, str]) -> int | None:
    """Tasks on this node, from a list such as ``2(x3),1``: two on each of the first three nodes, one on the last."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return None
    runs = [_TASKS_PER_NODE.fullmatch(run) for run in env[name].split(",")]
    node = _natural(env, "SLURM_NODEID")
    first = 0
    for run in runs:
        if run is None:
            raise LaunchError(f"{name}={env[name]!r} is not a list such as 4(x2),3")
        first += int(run[2] or 1)
        if node is not None and node < first:
            return int(run[1])
    if node is not None:
        raise LaunchError(f"SLURM_NODEID={env['SLURM_NODEID']!r} is no node of {name}={env[name]!r}")
    sizes = {int(run[1]) for run in runs if run is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _launching_process(env: Mapping[str, str]) -> int:
    """Return the nearest ancestor that was not started as this rank: scripts between it and the rank were, and have its variables."""
    names = ("PMI_FD", *(name for launcher in _LAUNCHERS for name in (launcher.rank, launcher.size, *launcher.local_rank)))
    told = {os.fsencode(f"{name}={env[name]}") for name in names if name in env}
    pid = os.getppid()
    with contextlib.suppress(OSError, IndexError):  # another user's, or no Linux; or it has just ended
        while told and pid > 1 and told <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            pid = int(_stat_fields(pid)[1])
    return pid


def _start_time(pid: int) -> str:
    fields = _stat_fields(pid)
    return fields[19] if len(fields) > 19 else ""


def _stat_fields(pid: int) -> list[str]:
    """Fields of ``/proc/<pid>/stat`` from the third one on; the name of the command before them may contain spaces and parentheses."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
