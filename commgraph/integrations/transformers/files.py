"""The tensors of a checkpoint's safetensors files, none of which is read before it is indexed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from commgraph.errors import ConfigurationError
from commgraph.nn.shards import Slice

__all__ = ["slices_of"]


@contextlib.contextmanager
def slices_of(folder: Path) -> Iterator[dict[str, Slice]]:
    """Context manager in which each tensor of a checkpoint can be read by parts.

    Args:
        folder: with ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Raises:
        ConfigurationError: there are no such files.
    """
    import safetensors

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.is_file():
        names = [single.name]
    else:
        have = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ConfigurationError(f"from_checkpoint: {folder} has neither {single.name} nor {index.name}; it has: {have}")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safetensors.safe_open(folder / name, framework="pt")) for name in names]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - a file is no dict
