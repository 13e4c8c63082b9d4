"""Host tensors by MPI: its point-to-point messages carry the collectives of the base class."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from mpi4py import MPI

import commgraph as cg
from commgraph.communicators.base import OPERATIONS, PeerClosed, PeerLate, Refused
from commgraph.communicators.memory import as_bytes, copy_back, dense, staging_for
from commgraph.deadline import Deadline
from commgraph.forks import keep_for_ever
from commgraph.platforms import GroupFacts

SMALL = 32 * 1024  # bytes up to which an all-reduce is one step in place of two
PART = 1 << 30  # bytes of a message, which MPI before version 4 counts in 31 bits


class MpiCommunicator(cg.Communicator):
    """Every operation on host tensors, for ranks that are processes of one MPI job."""

    name = "mpi"
    operations = frozenset(OPERATIONS)

    def __init__(self, comm: MPI.Comm) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm, self._aborted = comm, False
        self._leaving = comm.Get_attr(MPI.TAG_UB)  # the tag by which a rank gives up; those of calls are below it

    @classmethod
    def build(cls, facts: GroupFacts, host: cg.Communicator) -> MpiCommunicator | Refused:
        """Return the strategy of a group: MPI's own communicator of these ranks. Collective over them."""
        threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        facts.store.set(str(facts.rank_in_group), str(MPI.COMM_WORLD.rank if threads else -1))
        processes = [int(facts.store.get(str(rank))) for rank in range(len(facts.ranks))]
        if -1 in processes or len(set(processes)) < len(processes):
            return Refused(cls.name, f"ranks {processes} in MPI's world: each needs one of its own, and MPI_THREAD_MULTIPLE")
        return cls(MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.group.Incl(processes)))

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        """Every call on the host."""
        return device.type == "cpu"

    def exchange(self, sends, receives, *, tag: int, deadline: Deadline, label: int = 0) -> None:  # noqa: D102 - as Communicator's
        landing, peers, requests = [staging_for(x) for x, _ in receives], [], []
        messages = [(self._comm.Irecv, x, peer) for x, (_, peer) in zip(landing, receives, strict=True)]
        messages += [(self._comm.Isend, dense(x), peer) for x, peer in sends]
        try:
            for begin, x, peer in messages:
                for part in as_bytes(x).split(PART):
                    requests.append(begin([part, MPI.BYTE], peer, tag % self._leaving))
                    peers.append(peer)
            self._wait(requests, peers, deadline)
        except BaseException:
            keep_for_ever(*requests)  # with their memory: MPI may yet read or write it
            raise
        copy_back(landing, [x for x, _ in receives])

    def _wait(self, requests: list[MPI.Request], peers: list[int], deadline: Deadline) -> None:
        status = MPI.Status()
        while not MPI.Request.Testall(requests):
            if self._aborted:
                raise PeerClosed(self.rank_in_group, "this rank has given up the group")
            if self._comm.Iprobe(tag=self._leaving, status=status):
                raise PeerClosed(status.source, "it has given up the group")
            if deadline.has_passed:
                raise PeerLate(next((peer for peer, request in zip(peers, requests, strict=True) if not request.Test()), peers[0]))
            os.sched_yield()  # MPI makes progress inside its calls only

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        """Large ones as a reduce-scatter and a gather: each rank sends its tensor twice, however many ranks there are."""
        if x.nbytes <= SMALL:
            return super().all_reduce(x, op, tag=tag, deadline=deadline)
        out = self.new(x.shape, x.dtype, x.device)
        sizes = [len(part) for part in out.view(-1).tensor_split(self.world_size)]
        mine = torch.empty(sizes[self.rank_in_group], dtype=x.dtype)
        self.reduce_scatter(dense(x).view(-1), 0, sizes, op, mine, tag=tag, deadline=deadline)
        self.all_gather(mine, 0, sizes, out.view(-1), tag=tag, deadline=deadline)
        return out

    def abort(self) -> None:
        """Tell every rank, of whom one may wait for this one."""
        if not self._aborted and not MPI.Is_finalized():
            self._aborted = True
            keep_for_ever(*(self._comm.Isend([b"", MPI.BYTE], peer, self._leaving) for peer in self._others()))

    def close(self) -> None:
        """Give MPI's communicator back; what is under way on it ends first."""
        if self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
            self._comm.Free()
