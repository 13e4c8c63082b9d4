"""The native module, where it could be built and loaded."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

__all__ = ["load", "why_missing"]


def load() -> Any | None:
    """Return the module `commgraph.shm._native`, or None after one warning that says why there is none."""
    reason = why_missing()
    if reason is None:
        return importlib.import_module("commgraph.shm._native")
    # Python shows a warning of one location and text once: the location is this line, and not the caller's.
    warnings.warn(
        f"commgraph's native module is missing ({reason}): the ranks of one host go through gloo, at a hundredth of the speed. {_advice()}",
        RuntimeWarning,
        stacklevel=1,
    )
    return None


def _advice() -> str:
    source = Path(__file__).parents[2]
    if (source / "setup.py").is_file():
        return (
            f"This is the source in {source}, in which it was not built: start in another folder, where the installed commgraph is "
            "found, or pip install --editable it, with a C compiler and the headers of Python"
        )
    return (
        "Install commgraph once more where there is a C compiler (and the headers of Python): in its checkout, "
        "pip install --no-deps --force-reinstall --no-cache-dir ."
    )


def why_missing() -> str | None:
    """Return why there is no native module here, None if there is one."""
    try:
        importlib.import_module("commgraph.shm._native")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None
