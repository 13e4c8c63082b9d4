"""Parallel programs tested without processes: ranks as threads over real communicators."""

from commgraph.testing.fake import fake_world
from commgraph.testing.spmd import spmd

__all__ = ["fake_world", "spmd"]
