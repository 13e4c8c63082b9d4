"""DeepSpeed's shared-memory all-reduce for the host (`ShareMemCommBuilder`), which it compiles on first use."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from commgraph.bench.library import Buffers, Library

__all__ = ["Peer"]


class Peer(Library):
    """Its only operation, all-reduce."""

    name = "DeepSpeed shm"

    def available(self) -> str | None:
        """Needs DeepSpeed, ranks that are processes of one node, and an environment that says so."""
        world = self.job.world
        if importlib.util.find_spec("deepspeed") is None:
            return "DeepSpeed is not installed: pip install deepspeed (and a C++ compiler, with which it builds the operator)"
        if self.job.started == "threads" or world.node_count > 1:
            return "its operator is for processes of one node"
        if os.environ.get("LOCAL_SIZE") != str(world.size):
            return f"its operator asks the environment: start with LOCAL_SIZE={world.size} commgraph bench ..."
        return None

    def prepare(self) -> None:
        """Compiles the operator and maps its memory."""
        builder = importlib.import_module("deepspeed.ops.op_builder.cpu").ShareMemCommBuilder()
        builder.load().initialize(self.job.world.size, self.job.world.rank)

    def call(self, operation: str, buffers: Buffers) -> Callable[[], object] | None:
        """All-reduce of float32 and bfloat16; with others the operator does nothing and says nothing.

        Its conversion of bfloat16 is written in AVX-512, and ends the process elsewhere.
        """
        x = buffers.x
        if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
            return None
        if operation == "all_reduce_":
            return lambda: torch.ops.deepspeed.inference_all_reduce_(x)
        if operation == "all_reduce":
            return lambda: torch.ops.deepspeed.inference_all_reduce(x)
        return None
