"""`multiprocessing.Pipe`: its connections, made by name, so that ranks that a launcher started have them too."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from commgraph.bench.library import Channel, Library

__all__ = ["Peer"]

_CONNECT_SECONDS = 30.0


class Peer(Library):
    """A socket pair for each reader. Pickled by pickle itself: torch teaches `Connection.send` to move tensors to shared files."""

    name = "multiprocessing.Pipe"

    def available(self) -> str | None:
        """Needs one node."""
        return None if self.job.world.node_count == 1 else "a pipe does not leave its node"

    def channel(self, readers: int) -> Channel | None:
        """The writer listens, a reader connects."""
        rank = self.job.world.rank
        if rank:
            return _Objects({0: _connect(self._address(readers, rank))})
        listeners = {reader: Listener(self._address(readers, reader), family="AF_UNIX") for reader in range(1, readers + 1)}
        accepted = {reader: listener.accept() for reader, listener in listeners.items()}
        for listener in listeners.values():
            listener.close()
        return _Objects(accepted)

    def _address(self, readers: int, reader: int) -> str:
        return str(self.job.directory / f"pipe-{readers}-{reader}")


class _Objects(Channel):
    def __init__(self, connections: Mapping[int, Connection]) -> None:
        self._connections = connections

    def send(self, obj: object) -> None:
        data = pickle.dumps(obj, protocol=5)
        for connection in self._connections.values():
            connection.send_bytes(data)

    def recv(self, source: int = 0) -> Any:
        return pickle.loads(self._connections[source].recv_bytes())

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


def _connect(address: str) -> Connection:
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return Client(address, family="AF_UNIX")
        except OSError:  # the writer does not listen yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
