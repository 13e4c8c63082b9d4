"""The native module, where it could be built and loaded."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

__all__ = ["load", "why_missing"]


def load() -> Any | None:
    """The module `commgraph.shm._native`, None where there is none; then one warning says why."""
    reason = why_missing()
    if reason is None:
        return importlib.import_module("commgraph.shm._native")
    # Python shows a warning of one place and text once: so this is its place, and not that of whoever asked.
    warnings.warn(
        f"commgraph's native module is missing ({reason}): the ranks of one host go through gloo, at a hundredth of the speed. Install "
        "commgraph where there is a C compiler (and the headers of Python), or from a wheel",
        RuntimeWarning,
        stacklevel=1,
    )
    return None


def why_missing() -> str | None:
    """Why there is no native module here, None if there is one."""
    try:
        importlib.import_module("commgraph.shm._native")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None
