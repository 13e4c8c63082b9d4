"""The record of a world: made once on each rank, when the first group is to be recorded, and known to the neighbours on the host."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any, Final

import attrs
import msgspec
import torch

import commgraph
from commgraph.communicators.shm_fast import tensors_of
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.hosts import Hosts
from commgraph.meeting import Meeting
from commgraph.shm import recorder as records
from commgraph.shm.recorder import Recorder

__all__ = ["Recording"]

# Of one measurement of a clock.
_ROUNDS: Final = 5
_JOB_VARIABLES: Final = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE", "PMI_JOBID")


@attrs.define
class Recording:
    """The record of one rank of a world; none as yet."""

    recorder: Recorder | None = None
    is_aligned: bool = False

    def start(self, setting: bool | str, calls: int, *, world: str, rank: int, hosts: Hosts, local_rank: int, meeting: Meeting) -> None:
        """Make the record and open those of the neighbours. Collective over the ranks of `meeting`, which all ask for the same.

        Args:
            setting: True, or the folder for files.
            calls: how many the ring holds.
            world: name of the world, in the job and in file names.
            rank: in it.
            hosts: its node map.
            local_rank: of this rank.
            meeting: of the build.

        Raises:
            ConfigurationError: the world is recorded elsewhere already.
            BackendUnavailableError, BuildError: the record cannot be made.
        """
        if self.recorder is not None:
            if self.recorder.setting != setting:
                raise ConfigurationError(
                    f"record={setting!r}: the calls of this world are recorded already, {_where(self.recorder.setting)}; a world has "
                    "one record"
                )
            return
        recorder = Recorder(setting, calls, f"{world[:12]}-rank{rank}", tensors_of)
        try:
            recorder.note(
                records.FACTS,
                {
                    "world": world,
                    "rank": rank,
                    "world_size": len(hosts.nodes),
                    "local_rank": local_rank,
                    "node": hosts.node_rank,
                    "nodes": hosts.node_count,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "thread": threading.get_ident(),
                    "native_thread": threading.get_native_id(),
                    "program": " ".join(sys.argv)[:500],
                    "job": next((os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)), ""),
                    "commgraph": commgraph.__version__,
                    "torch": torch.__version__,
                },
            )
            said = meeting.exchange("record", msgspec.msgpack.encode(recorder.place))
            here = [other for other in range(len(hosts.nodes)) if hosts.nodes[other] == hosts.node_rank]
            places = [msgspec.msgpack.decode(said[other], type=tuple[int, int, int]) for other in here]
            recorder.keep(places, here.index(rank))
        except BaseException:
            recorder.close()
            raise
        self.recorder = recorder

    def close(self) -> None:
        """Close the descriptors of the record."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close()

    def align_clocks(self, group: GroupCoordinator, nodes: tuple[int, ...]) -> None:
        """Measure once how far the clocks of the hosts are from rank 0's. Collective over a group of all ranks; not recorded itself.

        Args:
            group: of all ranks.
            nodes: node of each.
        """
        if self.recorder is not None and not self.is_aligned:
            if max(nodes) == 0:
                self.recorder.set_clock(0, 0)
            else:
                _align_clocks(self.recorder, group, nodes)
            self.is_aligned = True


def _align_clocks(recorder: Recorder, group: GroupCoordinator, nodes: tuple[int, ...]) -> None:
    """The first rank of each other host exchanges objects with rank 0: in the fastest exchange the answer was written in its middle."""
    state, me = group._state, group.rank_in_group
    kept, state.records = state.records, None
    try:
        best: tuple[int, int] | None = (0, 0) if nodes[me] == 0 else None
        for node in range(1, max(nodes) + 1):
            first = nodes.index(node)
            if me not in (0, first):
                continue
            for _ in range(_ROUNDS):
                if me == 0:
                    group.recv_object(first)
                    group.send_object(time.time_ns(), first)
                else:
                    begun = time.time_ns()
                    group.send_object(None, 0)
                    theirs: int = group.recv_object(0)
                    took = time.time_ns() - begun
                    if best is None or took < 2 * best[1]:
                        best = (theirs - begun - took // 2, -(-took // 2))
        measured: list[tuple[int, int] | None] = group.all_gather_object(best)
        found = measured[nodes.index(nodes[me])]
        if found is not None:
            recorder.set_clock(*found)
    finally:
        state.records = kept


def _where(setting: Any) -> str:
    return "in memory" if setting is True else f"in the folder {setting}"
