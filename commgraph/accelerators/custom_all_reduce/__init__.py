"""Kernels that read and write the peers' memory: the strategy, its kernels, and the probe of the peers' access."""

from commgraph.accelerators.custom_all_reduce.kernels import Kernels, TorchKernels
from commgraph.accelerators.custom_all_reduce.peers import PeerAccess, PeerAccessCache, probe_peer_access
from commgraph.accelerators.custom_all_reduce.strategy import CustomAllReduce

__all__ = ["CustomAllReduce", "Kernels", "PeerAccess", "PeerAccessCache", "TorchKernels", "probe_peer_access"]
