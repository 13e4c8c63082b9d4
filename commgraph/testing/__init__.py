"""Parallel programs tested without processes: ranks as threads over real communicators."""

from commgraph.testing.conformance import check_communicator
from commgraph.testing.fake import fake_world
from commgraph.testing.faults import Fault, inject_faults
from commgraph.testing.spmd import spmd

__all__ = ["Fault", "check_communicator", "fake_world", "inject_faults", "spmd"]
