"""pyzmq over `ipc`: a PAIR of sockets for each reader."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Mapping
from typing import Any

from commgraph.bench.library import Channel, Library

__all__ = ["Peer"]


class Peer(Library):
    """Pickled with the large buffers out of band, as frames of their own that are not copied."""

    name = "pyzmq"

    def available(self) -> str | None:
        """Needs pyzmq, and one node."""
        if importlib.util.find_spec("zmq") is None:
            return "pyzmq is not installed: pip install 'commgraph[bench]'"
        return None if self.job.world.node_count == 1 else "ipc does not leave its node"

    def prepare(self) -> None:
        """Starts the thread that serves the sockets."""
        self._zmq: Any = importlib.import_module("zmq")
        self._context = self._zmq.Context()
        self.name = f"pyzmq {self._zmq.__version__} ipc"

    def channel(self, readers: int) -> Channel | None:
        """The writer binds, a reader connects."""
        rank = self.job.world.rank
        sockets = {reader: self._context.socket(self._zmq.PAIR) for reader in ([0] if rank else range(1, readers + 1))}
        for reader, socket in sockets.items():
            socket.setsockopt(self._zmq.LINGER, 0)
            address = f"ipc://{self.job.directory}/zmq-{readers}-{reader or rank}"
            if rank:
                socket.connect(address)
            else:
                socket.bind(address)
        return _Objects(sockets)

    def close(self) -> None:
        """Ends that thread."""
        self._context.term()


class _Objects(Channel):
    def __init__(self, sockets: Mapping[int, Any]) -> None:
        self._sockets = sockets

    def send(self, obj: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
        frames = [head, *(buffer.raw() for buffer in buffers)]
        for socket in self._sockets.values():
            socket.send_multipart(frames, copy=False)

    def recv(self, source: int = 0) -> Any:
        head, *buffers = self._sockets[source].recv_multipart(copy=False)
        return pickle.loads(head.buffer, buffers=[frame.buffer for frame in buffers])

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()
