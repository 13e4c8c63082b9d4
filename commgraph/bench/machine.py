"""Description of the measured machine: processor, system and versions. Nothing here names the machine, its paths or its network."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import commgraph
from commgraph.bench.figures import size_text

__all__ = ["describe"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, str]:
    """Processor, cores, caches and versions, as text for people."""
    info = _read(Path("/proc/cpuinfo"))
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in info.split("\n\n")[0].splitlines()}
    virtual = " (virtual machine)" if "hypervisor" in facts.get("flags", "").split() else ""
    return {
        "processor": (facts.get("model name") or platform.machine()) + virtual,
        "cores": f"{len(os.sched_getaffinity(0))} for these processes, {os.cpu_count()} in all",
        "caches": _caches() or "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "commgraph": commgraph.__version__,
    }


def _caches() -> str:
    """``L1d 32 KiB, ..., L3 32 MiB (cpus 0-1)`` as the first core sees them."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size, cpus = (_read(index / name).strip() for name in ("level", "type", "size", "shared_cpu_list"))
        if kind != "Instruction" and size.removesuffix("K").isdigit():
            shared = f" (cpus {cpus})" if "-" in cpus or "," in cpus else ""
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size_text(int(size.removesuffix('K')) * 1024)}{shared}")
    return ", ".join(found)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or a container that hides it
        return ""
