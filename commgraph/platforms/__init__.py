"""Which strategies exist on a kind of machine, and in what order. `commgraph.accelerators.platforms` has those of accelerators."""

from commgraph.platforms.base import GroupFacts, Platform
from commgraph.platforms.cpu import CpuPlatform

__all__ = ["CpuPlatform", "GroupFacts", "Platform"]
