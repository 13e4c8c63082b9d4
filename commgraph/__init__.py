"""Communication groups for distributed inference and training, without globals.

>>> import commgraph as cg
>>> with cg.World.from_env() as world:
...     ctx = world.context(cg.Layout(world.size, tp=2), name="target")
...     y = ctx.tp.all_reduce(x)

Names are loaded when they are first used: `Layout` and the errors need no torch.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from commgraph.errors import (
    BackendUnavailableError,
    BuildError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    CommGraphError,
    ConcurrentCallError,
    ConfigurationError,
    ContextClosedError,
    LaunchError,
    LayoutError,
    LayoutMismatchError,
    PeerLostError,
    UnsupportedTensorError,
)

if TYPE_CHECKING:
    from commgraph import nn as nn
    from commgraph import testing as testing
    from commgraph.accelerators.kernel_table import KernelTable
    from commgraph.accelerators.platforms import CudaPlatform, RocmPlatform, TpuPlatform, XpuPlatform
    from commgraph.communicators.base import Communicator
    from commgraph.context import ParallelContext
    from commgraph.coordinator import Dispatched, GroupCoordinator
    from commgraph.deadline import Deadline
    from commgraph.layout import Grid, Layout, Positions, Split
    from commgraph.options import CommunicatorOptions
    from commgraph.platforms import CpuPlatform, Platform
    from commgraph.shm.message_queue import MessageQueue
    from commgraph.work import ANY, Recv, Send, Work
    from commgraph.world import World

__version__ = "0.1.0"

__all__ = [
    "ANY",
    "BackendUnavailableError",
    "BuildError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "CommGraphError",
    "Communicator",
    "CommunicatorOptions",
    "ConcurrentCallError",
    "ConfigurationError",
    "ContextClosedError",
    "CpuPlatform",
    "CudaPlatform",
    "Deadline",
    "Dispatched",
    "Grid",
    "GroupCoordinator",
    "KernelTable",
    "LaunchError",
    "Layout",
    "LayoutError",
    "LayoutMismatchError",
    "MessageQueue",
    "ParallelContext",
    "PeerLostError",
    "Platform",
    "Positions",
    "Recv",
    "RocmPlatform",
    "Send",
    "Split",
    "TpuPlatform",
    "UnsupportedTensorError",
    "Work",
    "World",
    "XpuPlatform",
]

_HOMES = MappingProxyType(
    {
        "ANY": "commgraph.work",
        "Communicator": "commgraph.communicators.base",
        "CommunicatorOptions": "commgraph.options",
        "CpuPlatform": "commgraph.platforms",
        "CudaPlatform": "commgraph.accelerators.platforms",
        "RocmPlatform": "commgraph.accelerators.platforms",
        "TpuPlatform": "commgraph.accelerators.platforms",
        "XpuPlatform": "commgraph.accelerators.platforms",
        "Deadline": "commgraph.deadline",
        "Dispatched": "commgraph.coordinator",
        "Grid": "commgraph.layout",
        "GroupCoordinator": "commgraph.coordinator",
        "KernelTable": "commgraph.accelerators.kernel_table",
        "Layout": "commgraph.layout",
        "MessageQueue": "commgraph.shm.message_queue",
        "ParallelContext": "commgraph.context",
        "Platform": "commgraph.platforms",
        "Positions": "commgraph.layout",
        "Recv": "commgraph.work",
        "Send": "commgraph.work",
        "Split": "commgraph.layout",
        "Work": "commgraph.work",
        "World": "commgraph.world",
    }
)
# Subpackages that `import commgraph` alone makes reachable, as attributes.
_SUBPACKAGES = frozenset({"nn", "testing"})


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one that this gives

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in _SUBPACKAGES:
            return importlib.import_module(f"commgraph.{name}")
        raise AttributeError(f"module 'commgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})
