"""Measures commgraph, alone or beside its peers: `commgraph bench`."""

from __future__ import annotations

from commgraph.bench.library import Buffers, Channel, Job, Library

__all__ = ["Buffers", "Channel", "Job", "Library"]
