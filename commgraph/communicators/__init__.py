"""Strategies: implementations of the operations of one group (room 3 of `docs/explanation/design.md`)."""
