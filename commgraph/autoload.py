"""What torch calls when it is imported, by the entry point `torch.backends` of this package."""

from __future__ import annotations

import os

__all__ = ["torch_backend"]


def torch_backend() -> None:
    """Registers the backend commgraph with torch.distributed where COMMGRAPH_TORCH_BACKEND=1 asks for it, and does nothing elsewhere.

    It has to be asked for, because a registration is not without effect: torch 2.13 then takes the default backend of a group "cpu:gloo"
    for unknown, in every program of the environment.
    """
    if os.environ.get("COMMGRAPH_TORCH_BACKEND") == "1":
        import commgraph.torch_backend  # noqa: F401 - which registers it
