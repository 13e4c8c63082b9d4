"""The conformance suite on the ranks of an MPI job, then a context on the strategy: mpiexec -n 3 python check.py."""

import torch
from commgraph_mpi import MpiCommunicator

import commgraph as cg
from commgraph.testing import check_communicator

with cg.World.from_env() as world:
    check_communicator(MpiCommunicator.build, world=world)
    with world.context(cg.Layout(world.size, tp=world.size), name="main") as ctx:
        assert ctx.tp.communicators["all_reduce"][0] == "mpi", "pip install . makes it the first strategy of every group"
        assert ctx.tp.all_reduce(torch.ones(1_000_000)).sum() == 1_000_000 * world.size
    if world.rank == 0:
        print(f"{world.size} ranks: passed")
