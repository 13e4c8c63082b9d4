"""One group of ranks and every operation on it (room 2 of `docs/explanation/design.md`)."""

from commgraph.coordinator.group import GroupCoordinator

__all__ = ["GroupCoordinator"]
