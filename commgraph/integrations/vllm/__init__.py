"""vLLM on commgraph: its groups, as a platform plugin, where COMMGRAPH_VLLM=1 asks for it.

vLLM finds the functions here by the entry points of this package, in every environment that has both, and calls them while it is half
imported itself. So they import nothing before they have been asked for something. How to use it: docs/how-to/vllm.md.
"""

from __future__ import annotations

import os

__all__ = ["message_queue_patch", "platform"]


def platform() -> str | None:
    """The platform, for the entry point ``vllm.platform_plugins``: vLLM's own for CPUs, with groups that commgraph serves.

    Returns:
        The name of what makes it; None, which leaves the choice to vLLM, without COMMGRAPH_VLLM=1.
    """
    return "commgraph.integrations.vllm.cpu.make_platform" if os.environ.get("COMMGRAPH_VLLM") == "1" else None


def message_queue_patch() -> None:
    """Replaces the queue between vLLM's engine and its workers, for ``vllm.general_plugins``, where COMMGRAPH_VLLM_MESSAGE_QUEUE=1.

    A patch: vLLM offers no hook for that, so a name in its executor's module is bound to `commgraph.integrations.vllm.queue.queue_class`.
    """
    if os.environ.get("COMMGRAPH_VLLM_MESSAGE_QUEUE") == "1":
        from commgraph.integrations.vllm.queue import replace_queue

        replace_queue()
