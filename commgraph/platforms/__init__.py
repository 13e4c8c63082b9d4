"""Which strategies exist on a kind of machine, and in what order. Those of accelerators are in `commgraph.accelerators.platforms`."""

from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import CpuPlatform

__all__ = ["CpuPlatform", "GroupFacts", "Platform"]
