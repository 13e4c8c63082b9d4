"""One group of ranks and every operation on it (room 2 of `docs/explanation/design.md`)."""

from commgraph.coordinator.experts import Dispatched
from commgraph.coordinator.group import GroupCoordinator
from commgraph.coordinator.operation import is_watched
from commgraph.coordinator.operators import declare_operators
from commgraph.ops.fused import declare_fused

__all__ = ["Dispatched", "GroupCoordinator", "is_watched"]

# Their arguments are coordinators, which torch knows by now.
OPERATORS = (*declare_operators(), declare_fused())
