"""The only module that imports private names of torch.

All of them were seen in torch 2.13, the version that the tests run on, and in no other yet. A torch release that moves one of them is a
change in this file.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["GlooDevice", "default_store", "dlpack_exchange", "gloo_available", "gloo_device", "make_gloo", "mark_written", "wrap_gloo"]

# The opaque handle of a gloo network device (one event loop thread); torch gives it no public type.
GlooDevice = Any


def gloo_available() -> bool:
    """Whether this torch was built with gloo (public)."""
    return dist.is_available() and dist.is_gloo_available()


def gloo_device(*, loopback: bool) -> GlooDevice:
    """A network device for gloo groups; groups that are given the same one share its event loop thread.

    Args:
        loopback: bind to 127.0.0.1, right where all ranks are known to share a network namespace. Otherwise gloo resolves this host's
            name, or takes GLOO_SOCKET_IFNAME.
    """
    # ProcessGroupGloo and its two device factories: torch._C._distributed_c10d.
    from torch._C._distributed_c10d import ProcessGroupGloo

    # lazy_init=False: a lazily connected pair blocks its first receive until the peer sends, which deadlocks a ring of receivers.
    if loopback:
        return ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)
    return ProcessGroupGloo.create_default_device()


def make_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta, device: GlooDevice) -> Any:
    """A connected ProcessGroupGloo that no table of torch.distributed knows.

    `_Options` with `_devices`, `_threads`, `_timeout`: torch._C._distributed_c10d.
    """
    from torch._C._distributed_c10d import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stub
    options._devices = [device]
    # Threads serve torch's own asynchronous collectives only, which commgraph does not use: one is enough for a caller of `cpu_group`.
    options._threads = 1
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


def wrap_gloo(store: dist.Store, rank: int, size: int, backend: Any) -> dist.ProcessGroup:
    """`backend` as the torch ProcessGroup that other libraries expect, without a default group.

    By the private `ProcessGroup._register_backend` and `_set_default_backend`.
    """
    group = dist.ProcessGroup(store, rank, size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


def default_store() -> dist.Store:
    """The store of torch's default process group. Privately `torch.distributed.distributed_c10d._get_default_store`."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def dlpack_exchange() -> Any:
    """The capsule of DLPack's C functions, None in a torch that has none (it came after 2.11): then tensors are read by their addresses."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def mark_written() -> Any:
    """A function of a tuple of tensors whose memory is going to be filled past torch: counts their versions up, so that autograd notices.

    Privately `torch._C._increment_version`: `torch.autograd.graph.increment_version` is public and takes twice the time.
    """
    from torch._C import _increment_version

    return _increment_version
