"""Facts of this machine and this process that decide how ranks communicate."""

from __future__ import annotations

import os
import platform
import resource
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

import torch

import commgraph
from commgraph import addresses, compat, launch
from commgraph.accelerators.platforms import CudaPlatform, RocmPlatform, TpuPlatform, XpuPlatform
from commgraph.errors import CommGraphError
from commgraph.platforms.base import Platform
from commgraph.platforms.detection import PLATFORMS, STRATEGIES
from commgraph.shm import native_module, segments

__all__ = ["look"]

# Variables by which launchers and users tell commgraph something; values of secrets are not shown.
_SECRET: Final = "COMMGRAPH_AUTHKEY"
_PREFIXES: Final = ("COMMGRAPH_", "MASTER_", "GLOO_", "OMPI_COMM_WORLD_", "PMI_", "SLURM_STEP_", "SLURM_PROCID", "SLURM_LOCALID")
_EXACT: Final = frozenset(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"))

# The kernel's number for a cgroup without a limit, and numbers beyond every machine.
_NO_LIMIT: Final = 1 << 60


def look(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the facts by section and name; every value can be written as JSON. A fact that cannot be had is the reason, as text."""
    return {
        "versions": _versions(),
        "launcher": _launcher(environ),
        "network": _network(environ),
        "platform": _platform(),
        "native module": _native(),
        "shared memory": _memory(),
        "limits": _limits(),
    }


def _versions() -> dict[str, Any]:
    glibc = "-".join(platform.libc_ver()) or "unknown C library"
    return {
        "commgraph": commgraph.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {glibc}",
    }


def _launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    said = {
        name: "(set, not shown)" if name == _SECRET else value
        for name, value in sorted(environ.items())
        if name in _EXACT or name.startswith(_PREFIXES)
    }
    try:
        found = launch.detect(environ)
    except CommGraphError as error:
        return {"launcher": f"none can be determined: {error}", "variables": said}
    if found.launcher == "single":
        return {"launcher": "none: no launcher has set rank and size, so World.from_env() is one rank alone", "variables": said}
    local = "" if found.local_rank is None else f", local rank {found.local_rank} of {found.local_size or 'an unknown number'}"
    return {
        "launcher": f"{found.launcher}: rank {found.rank} of {found.world_size}{local}",
        "meets at": f"{found.master_addr}:{found.master_port}" if found.master_addr else "a private file of this node",
        "variables": said,
    }


def _network(environ: Mapping[str, str]) -> dict[str, Any]:
    interfaces = {name: addresses.interface_addresses(name) for _, name in socket.if_nameindex()}
    host = None
    try:
        found = launch.detect(environ)
        host = (found.master_addr, found.master_port) if found.master_addr and found.master_port else None
        announced = addresses.address_of(None, environ, host)
    except CommGraphError as error:
        announced = str(error)
    return {"host name": socket.gethostname(), "interfaces": interfaces, "address that would be announced": announced}


def _platform() -> dict[str, Any]:
    chosen = Platform.detect()
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    plugins = [f"{point.name} ({point.value})" for kind in (PLATFORMS, STRATEGIES) for point in entry_points(group=kind)]
    return {
        "platform": chosen.name,
        "not used": ", ".join(kind.name for kind in (CudaPlatform, RocmPlatform, XpuPlatform, TpuPlatform) if not kind.available())
        + " (this torch sees no such device)",
        "device of local rank 0": str(chosen.device(0)),
        "accelerators": count,
        "gloo": "available" if compat.gloo_available() else "missing in this torch",
        "plugins": plugins or "none",
        "cores": f"{len(os.sched_getaffinity(0))} for this process, {os.cpu_count()} in all",
    }


def _native() -> dict[str, Any]:
    why = native_module.why_missing()
    if why is not None:
        return {"native module": f"missing: {why}. The ranks of one host go through gloo, at a hundredth of the speed"}
    module = native_module.load()
    assert module is not None
    build = Path(module.__file__)
    return {"native module": str(build), "kernels": module.isa, "bytes": build.stat().st_size}


def _memory() -> dict[str, Any]:
    def memfd() -> str:
        os.close(segments.create(4096))
        return "works"

    def pidfd() -> str:
        os.close(os.pidfd_open(os.getpid()))
        return "works: the end of a rank is noticed at once"

    def shm() -> str:
        found = os.statvfs("/dev/shm")
        return f"{_size(found.f_bavail * found.f_frsize)} free of {_size(found.f_blocks * found.f_frsize)} (only where torch uses it)"

    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    yama = "no yama" if scope is None else f"yama ptrace_scope {scope}"
    return {
        "memfd": _tried(memfd),
        "pidfd": _tried(pidfd),
        "reads of other processes": f"{yama}; whether ranks may: see strategies",
        "/dev/shm": _tried(shm),
    }


def _limits() -> dict[str, Any]:
    def limit(kind: int, size: bool) -> str:
        soft, hard = (
            "unlimited" if one == resource.RLIM_INFINITY else _size(one) if size else str(one) for one in resource.getrlimit(kind)
        )
        return soft if soft == hard else f"{soft} (up to {hard})"

    group = (_read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes") or "").strip()
    return {
        "open files": limit(resource.RLIMIT_NOFILE, False),
        "processes": limit(resource.RLIMIT_NPROC, False),
        "locked memory": limit(resource.RLIMIT_MEMLOCK, True),
        "file size": limit(resource.RLIMIT_FSIZE, True),
        "address space": limit(resource.RLIMIT_AS, True),
        "memory of the cgroup": _size(int(group)) if group.isdigit() and int(group) < _NO_LIMIT else "unlimited",
    }


def _tried(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except (OSError, CommGraphError) as error:
        return f"missing: {error}"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _size(nbytes: int) -> str:
    """Return bytes as text with a binary prefix."""
    amount, unit = float(nbytes), 0
    while amount >= 1024 and unit < 6:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"
