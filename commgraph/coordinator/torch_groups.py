"""The torch process groups of a coordinator, and their entries in the tables of torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.communicators.base import Communicator
from commgraph.forks import keep_for_ever

__all__ = ["TorchGroups"]


class _State(Protocol):
    """The attributes of a `GroupState` that `TorchGroups` reads."""

    members: Any
    network: Any
    timeouts: Any

    @property
    def strategies(self) -> Any: ...


class TorchGroups:
    """torch's process groups over the ranks of one group; those that were asked for by `enter` are listed with torch.distributed."""

    def __init__(self, state: _State) -> None:
        self._members = state.members
        self._network = state.network
        self._communicators: tuple[Communicator, ...] = state.strategies.communicators
        self._host_timeout: float = state.timeouts.host
        self._entered: list[dist.ProcessGroup] = []
        # Connected for torch's group only, where the ranks communicate by other means.
        self._gloo: Any = None
        self._lazy: dist.ProcessGroup | None = None
        self._lock = threading.Lock()

    @property
    def cpu(self) -> dist.ProcessGroup | None:
        """Of host tensors; None for one rank. Made now where the ranks communicate by other means, and connected as torch uses it."""
        if (connected := self._connected) is not None or self._network is None:
            return connected
        with self._lock:
            if self._lazy is None and self._network.lazy_gloo is not None:
                self._lazy = self._network.lazy_gloo()
        return self._lazy

    @property
    def _connected(self) -> dist.ProcessGroup | None:
        """The group of host tensors if every rank has connected it."""
        return None if self._network is None else getattr(self._gloo or self._network.transport, "process_group", None)

    @property
    def device(self) -> dist.ProcessGroup | None:
        """Of device tensors, where a backend serves them; else that of host tensors."""
        return self._own_device or self.cpu

    @property
    def _own_device(self) -> dist.ProcessGroup | None:
        return next((c.process_group for c in self._communicators if c.process_group is not None), None)

    def enter(self, kind: str, exchange: Callable[[int], Sequence[int]]) -> dist.ProcessGroup:
        """Return `cpu` or `device`, listed with torch.distributed until closed. Collective the first time.

        Args:
            kind: "device" or "cpu".
            exchange: sends a rank's number to all ranks and returns those of all.
        """
        own = self._own_device if kind == "device" else None
        group = own or self._connected
        if group is None and self._network is None:
            group = next(iter(self._entered), None)
        if group is None or group not in self._entered:
            # First of all: a rank that has left, or calls something else, is found out as in any call.
            ranks = exchange(dist.get_rank())
            if group is None and self._network is not None:
                self._gloo = self._network.connect_gloo()
                group = self._connected
            store = dist.HashStore() if self._network is None else self._network.store
            if group is None:
                backend = compat.make_gloo(store, 0, 1, timedelta(seconds=self._host_timeout), compat.gloo_device("127.0.0.1"))
                group = compat.wrap(store, 0, 1, backend, torch.device("cpu"))
            device = " device" if own is not None and own is not self._connected else ""
            compat.enter_tables(group, f"commgraph {self._members.uid}{device}", ranks, store)
            self._entered.append(group)
        return group

    def disown(self) -> None:
        """Give up the groups, in a forked child. The tables of torch.distributed are left as they are, as all of torch's."""
        keep_for_ever(self._network, self._communicators, self._entered, self._gloo, self._lazy)
        self._network, self._communicators, self._entered, self._gloo, self._lazy = None, (), [], None, None

    def close(self) -> None:
        """Remove the groups from the tables of torch.distributed."""
        for group in self._entered:
            compat.leave_tables(group)
        self._entered = []
        self._network = self._lazy = None
        if self._gloo is not None:
            self._gloo.close()
