"""Which strategies exist on a kind of machine, and in what order."""

from commgraph.platforms.accelerators import CudaPlatform, RocmPlatform, TpuPlatform, XpuPlatform
from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import CpuPlatform
from commgraph.streams import Streams

__all__ = ["CpuPlatform", "CudaPlatform", "GroupFacts", "Platform", "RocmPlatform", "Streams", "TpuPlatform", "XpuPlatform"]
