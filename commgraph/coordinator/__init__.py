"""One group of ranks and every operation on it (room 2 of `docs/explanation/design.md`)."""

from commgraph.coordinator.experts import Dispatched
from commgraph.coordinator.group import GroupCoordinator
from commgraph.ops import ordered, tensors  # noqa: F401 - declare the operators that coordinators go through, of which they are arguments

__all__ = ["Dispatched", "GroupCoordinator"]
