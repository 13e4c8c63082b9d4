"""Parallel programs tested without processes: ranks as threads over real communicators."""

from commgraph.testing.spmd import spmd

__all__ = ["spmd"]
