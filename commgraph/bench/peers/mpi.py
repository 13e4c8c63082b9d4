"""MPI through mpi4py, with whichever MPI it finds (the `mpich` wheel, say)."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from commgraph.bench.library import Buffers, Channel, Library, there_and_back

__all__ = ["Peer"]

_LAUNCHERS = ("PMI", "Open MPI", "Slurm")


class Peer(Library):
    """MPI's collectives on buffers; objects by mpi4py's pickling send and receive."""

    name = "MPI"

    def available(self) -> str | None:
        """Needs mpi4py, and processes that MPI's own launcher started."""
        if importlib.util.find_spec("mpi4py") is None:
            return "mpi4py is not installed: pip install 'commgraph[bench]'"
        if importlib.util.find_spec("numpy") is None:
            return "numpy is not installed, through which tensors reach MPI: pip install numpy"
        if self.job.started not in _LAUNCHERS:
            return f"MPI's own launcher has to start the ranks, these are {self.job.started}: mpiexec -n 2 python -m commgraph.bench ..."
        return None

    def prepare(self) -> None:
        """Joins MPI's world, which has the ranks of ours."""
        self._mpi: Any = importlib.import_module("mpi4py.MPI")
        self._comm = self._mpi.COMM_WORLD
        if (self._comm.rank, self._comm.size) != (self.job.world.rank, self.job.world.size):
            raise RuntimeError(f"MPI calls this rank {self._comm.rank} of {self._comm.size}: mpi4py found another MPI than the launcher's")
        version = re.search(r"(MPICH|Open MPI|Intel\S* MPI)\D*([\d.]+)", self._mpi.Get_library_version())
        self.name = " ".join(version.groups()) if version else "MPI"

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """Every operation on the dtypes that numpy has: bfloat16 is not among them."""
        try:
            x, out = buffers.x.numpy(), buffers.out.numpy()
        except TypeError:
            return None
        mpi, comm = self._mpi, self._comm

        calls: dict[str, Callable[[], object]] = {
            "all_reduce_": lambda: comm.Allreduce(mpi.IN_PLACE, x),
            "all_reduce": lambda: comm.Allreduce(x, out),
            "all_gather": lambda: comm.Allgather(x, out),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(x, out),
            "all_to_all": lambda: comm.Alltoall(x, out),
            "broadcast": lambda: comm.Bcast(x, 0),
            "barrier": comm.Barrier,
            "send_recv": there_and_back(comm.rank, lambda peer: comm.Send(x, peer), lambda peer: comm.Recv(out, peer)),
            "tensor_dict": self._tensor_dict(x),
        }
        return calls.get(operation)

    def _tensor_dict(self, x: Any) -> Callable[[], object]:
        """As MPI does it fastest: the description as an object, then every array from its own memory into a new one."""
        numpy: Any = importlib.import_module("numpy")
        comm, (first, second) = self._comm, numpy.array_split(x, 2)

        def send(peer: int) -> None:
            comm.send([(key, value.shape, value.dtype) for key, value in (("a", first), ("b", second))], peer)
            for value in (first, second):
                comm.Send(value, peer)

        def recv(peer: int) -> dict[str, Any]:
            received = {}
            for key, shape, dtype in comm.recv(source=peer):
                received[key] = numpy.empty(shape, dtype)
                comm.Recv(received[key], peer)
            return received

        return there_and_back(comm.rank, send, recv)

    def channel(self, readers: int) -> Channel | None:
        """Point to point: the broadcast of all ranks would need those that do not read."""
        return _Objects(self._comm, readers)


class _Objects(Channel):
    """mpi4py's send and recv, which pickle."""

    def __init__(self, comm: Any, readers: int) -> None:
        self._comm = comm
        self._targets = range(1, readers + 1) if comm.rank == 0 else (0,)

    def send(self, obj: object) -> None:
        for target in self._targets:
            self._comm.send(obj, target)

    def recv(self, source: int = 0) -> Any:
        return self._comm.recv(source=source)
