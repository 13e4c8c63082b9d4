"""The platform and the communicator that vLLM makes by their names: of classes derived from vLLM's, when vLLM asks for them.

vLLM is imported within the functions, so that this module can be read and checked without it.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from commgraph.integrations.vllm.communicator import Operations

__all__ = ["make_communicator", "make_platform"]

# vLLM's own where it is given none: the default of torch.distributed for gloo.
_TIMEOUT = timedelta(minutes=30)


def make_platform() -> Any:
    """Make vLLM's platform: the built-in one for this CPU, with another communicator.

    Its collectives are operators by the name of the group (``torch.ops.vllm.all_reduce(x, "tp:0")``), as on CUDA: what torch.compile
    caches then knows nothing of who serves them. With COMMGRAPH_VLLM_TRACED=1 torch.compile sees commgraph's own operators; give such an
    engine a VLLM_CACHE_ROOT of its own, because the name of vLLM's cache does not tell who serves its collectives.
    """
    from vllm.platforms import cpu_platform_plugin
    from vllm.utils.import_utils import resolve_obj_by_qualname

    builtin = cpu_platform_plugin()
    if builtin is None:
        raise RuntimeError("COMMGRAPH_VLLM=1: this vLLM is not built for CPUs, and commgraph serves vLLM's groups there only")
    base: Any = resolve_obj_by_qualname(builtin)

    class CommGraphPlatform(base):  # type: ignore[misc]  # known when vLLM has chosen it
        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return "commgraph.integrations.vllm.cpu.make_communicator"

        @classmethod
        def use_custom_op_collectives(cls) -> bool:
            return os.environ.get("COMMGRAPH_VLLM_TRACED") != "1"

    return CommGraphPlatform()


def make_communicator(**arguments: Any) -> Any:
    """Make the communicator of one of vLLM's groups. Collective over its ranks.

    Args:
        arguments: what vLLM gives its own: `cpu_group`, `device`, `device_group`, `unique_name`, `use_all2all`.
    """
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.utils import get_cpu_distributed_timeout_or_none

    base: Any = DeviceCommunicatorBase

    class CommGraphCommunicator(Operations, base):  # type: ignore[misc]  # vLLM is not there when this module is checked
        """vLLM's groups, served by commgraph."""

    communicator = CommGraphCommunicator(**arguments)
    communicator.connect(get_cpu_distributed_timeout_or_none() or _TIMEOUT)
    if communicator.use_all2all:
        # vLLM's exchange of experts by `all_gatherv` and `reduce_scatterv`: of the dp, pcp or ep group, which are served here, too.
        from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager

        communicator.all2all_manager = AgRsAll2AllManager(communicator.cpu_group)
    return communicator
