"""The peers that commgraph can be measured beside: a file each, with a class `Peer`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commgraph.bench.library import Library
from commgraph.errors import ConfigurationError

__all__ = ["BUILT_IN", "inherit", "load"]

BUILT_IN = ("gloo", "mpi", "deepspeed", "oneccl", "pipe", "queue", "zmq", "raw")


def load(spec: str) -> type[Library]:
    """The class `Peer` of a built-in peer, or of a Python file.

    Raises:
        ConfigurationError: there is no such peer, or the file does not hold one.
    """
    if spec in BUILT_IN:
        peer: Any = importlib.import_module(f"commgraph.bench.peers.{spec}").Peer
    else:
        peer = _from_file(spec)
    if not (isinstance(peer, type) and issubclass(peer, Library)):
        raise ConfigurationError(f"--compare {spec}: the file needs a class Peer derived from commgraph.bench.Library")
    if not isinstance(getattr(peer, "name", None), str):
        raise ConfigurationError(f"--compare {spec}: its class Peer has no name, which the table would show it by")
    return peer


def inherit(specs: Sequence[str], ranks: int) -> dict[str, Any]:
    """Return, by peer, the objects that it passes to the ranks when this process starts them."""
    return {spec: load(spec).inherit(ranks) for spec in specs}


def _from_file(name: str) -> Any:
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigurationError(f"--compare {name}: neither a Python file nor one of the built-in peers, which are {', '.join(BUILT_IN)}")
    spec = importlib.util.spec_from_file_location(f"commgraph_peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(f"--compare {name}: {type(error).__name__}: {error}") from error
    return getattr(module, "Peer", None)
