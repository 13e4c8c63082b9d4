"""The operations of vLLM's device communicators, on a coordinator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.compiler import is_dynamo_compiling

from commgraph import compat
from commgraph.coordinator import GroupCoordinator
from commgraph.options import CommunicatorOptions
from commgraph.platforms import CpuPlatform
from commgraph.work import Recv, Send
from commgraph.world import World

__all__ = ["Operations"]

# Below the logger that vLLM configures, so that the line is seen.
logger = logging.getLogger("vllm.commgraph")

_CLOSING = timedelta(seconds=5)


class Operations:
    """Every operation that vLLM asks of a device communicator; to be derived from together with vLLM's `DeviceCommunicatorBase`.

    Attributes:
        coordinator: serves the group; `coordinator.bytes_sent` says how much it has carried.
    """

    # Of vLLM's base.
    cpu_group: dist.ProcessGroup
    device_group: dist.ProcessGroup | None
    unique_name: str
    all2all_manager: Any
    # vLLM then gives this class the dicts between the stages of a pipeline, whole and synchronously.
    supports_tensor_dict = True

    _world: World
    coordinator: GroupCoordinator

    def connect(self, timeout: timedelta) -> None:
        """Connects the ranks of the group; collective over them.

        Args:
            timeout: deadline of this and of every operation.
        """
        self._world = World.from_torch(
            self.device_group or self.cpu_group,
            timeout=timeout,
            device="cpu",
            platform=CpuPlatform(),
            options=CommunicatorOptions(timeout=timeout),
        )
        self.coordinator = self._world.group._joined(self.unique_name or "vllm")
        logger.info("vLLM's group %s: %d ranks, served by commgraph", self.unique_name, self._world.size)

    def destroy(self) -> None:
        """Closes the connections; waits for the other ranks for five seconds at most."""
        self._world.close(timeout=_CLOSING)

    # Collectives. `dst` and `src` are ranks in the group, as vLLM has it.

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the group; the input is unchanged."""
        return self.coordinator.all_reduce(input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The pieces of all ranks along `dim`."""
        return self.coordinator.all_gather(input_, dim)

    def all_gatherv(
        self, input_: torch.Tensor | Sequence[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """The pieces of all ranks along `dim`, of uneven sizes; of a list a list."""
        if sizes is not None and is_dynamo_compiling():
            # vLLM compares the result's rows with zero, and dynamo cannot decide that of sizes that it does not know.
            for size in sizes:
                compat.check(size > 0, lambda: "all_gatherv: a rank without rows, which vLLM's engines do not have")
        return self.coordinator.all_gatherv(input_, dim, sizes)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The sum over the group, of which each rank keeps its piece of `dim`."""
        return self.coordinator.reduce_scatter(input_, dim)

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """`reduce_scatter` into pieces of uneven sizes."""
        return self.coordinator.reduce_scatterv(input_, dim, sizes)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """The pieces of all ranks along `dim` on `dst`, None elsewhere."""
        return self.coordinator.gather(input_, dst, dim)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fills a tensor with that of `src`, and returns it."""
        return self.coordinator.broadcast(tensor, src)

    # Messages.

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Sends a tensor to `dst`, by default to the next rank."""
        self.coordinator.send(tensor, dst)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Receives a tensor from `src`, by default from the rank before."""
        return self.coordinator.recv(size, dtype, src)

    def send_tensor_dict(self, tensor_dict: dict[str, Any], dst: int) -> None:
        """Sends a dict of tensors and other values."""
        self.coordinator.send_tensor_dict(tensor_dict, dst)

    def recv_tensor_dict(self, src: int) -> dict[str, Any]:
        """Receives what `send_tensor_dict` sends."""
        return self.coordinator.recv_tensor_dict(src)

    def batch_isend_irecv(self, p2p_ops: Sequence[dist.P2POp]) -> None:
        """Sends and receives several tensors at once, and waits for them."""
        batch = [Send(op.tensor, op.group_peer) if op.op is dist.isend else Recv(op.tensor, op.group_peer) for op in p2p_ops]
        self.coordinator.batch(batch).wait()

    # Experts: by vLLM's manager, which calls `all_gatherv` and `reduce_scatterv` of the right group.

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> Any:
        """The rows of all ranks and their router logits."""
        return self.all2all_manager.dispatch_router_logits(hidden_states, router_logits, is_sequence_parallel, extra_tensors)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> Any:
        """The rows of all ranks, with the weights and ids of their experts."""
        return self.all2all_manager.dispatch(hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors=extra_tensors)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """This rank's rows, summed over the ranks."""
        combined: torch.Tensor = self.all2all_manager.combine(hidden_states, is_sequence_parallel)
        return combined
