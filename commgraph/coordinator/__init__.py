"""One group of ranks and every operation on it (room 2 of `docs/explanation/design.md`)."""

from commgraph.coordinator.experts import Dispatched
from commgraph.coordinator.group import GroupCoordinator
from commgraph.ops import fused, ordered, tensors  # noqa: F401 - declare the operators, of which coordinators are arguments

__all__ = ["Dispatched", "GroupCoordinator"]
