"""Kernels that read and write the peers' memory: the strategy, what it runs on, and the proof that the peers can be reached."""

from commgraph.accelerators.custom_all_reduce.kernels import Kernels, TorchKernels
from commgraph.accelerators.custom_all_reduce.peers import Proof, Proofs, prove
from commgraph.accelerators.custom_all_reduce.strategy import CustomAllReduce

__all__ = ["CustomAllReduce", "Kernels", "Proof", "Proofs", "TorchKernels", "prove"]
