"""vLLM's queue between engine and workers, by `commgraph.MessageQueue`: a patch, since vLLM has no hook for it."""

from __future__ import annotations

import logging
from typing import Any

import attrs

from commgraph.shm.message_queue import MessageQueue, QueueHandle

__all__ = ["EngineHandle", "EngineQueue", "replace_queue"]

logger = logging.getLogger("commgraph")


def replace_queue() -> None:
    """Have vLLM's executor of several processes make its queues of `EngineQueue`."""
    from vllm.v1.executor import multiproc_executor

    executor: Any = multiproc_executor
    executor.MessageQueue = EngineQueue
    logger.info("vLLM's queue between engine and workers is replaced by commgraph.MessageQueue (COMMGRAPH_VLLM_MESSAGE_QUEUE=1)")


@attrs.frozen
class EngineHandle:
    """Where a reader attaches, with the attributes of vLLM's `Handle` that its executor reads.

    Attributes:
        queue: of commgraph.
        local_reader_ranks: the readers, all of which are on this host.
        remote_subscribe_addr: None: of readers on other hosts.
    """

    queue: QueueHandle
    local_reader_ranks: tuple[int, ...]
    remote_subscribe_addr: None = None


class EngineQueue:
    """One side of a queue, with the methods of vLLM's `MessageQueue` that its executor calls. Workers on this host only."""

    def __init__(self, n_reader: int, n_local_reader: int, *_: Any, max_chunk_bytes: int = 1 << 20, **later: Any) -> None:
        """The writer of a queue.

        Args:
            n_reader, n_local_reader: how many readers there are, and how many of them are on this host: all.
            max_chunk_bytes: vLLM's; the queue holds as much.
            later: settings of vLLM's own memory, which this queue has not.
        """
        if n_local_reader != n_reader:
            raise ValueError(
                f"{n_reader} workers, {n_local_reader} of them on this host: COMMGRAPH_VLLM_MESSAGE_QUEUE=1 serves workers of one host; "
                "unset it"
            )
        self._queue = MessageQueue.create(n_reader, chunk_bytes=max_chunk_bytes, chunks=1)

    def export_handle(self) -> EngineHandle:
        """What a reader attaches with."""
        return EngineHandle(self._queue.handle, tuple(range(self._queue.n_readers)))

    @classmethod
    def create_from_handle(cls, handle: EngineHandle, rank: int) -> EngineQueue:
        """The side of a reader."""
        made = cls.__new__(cls)
        made._queue = MessageQueue.attach(handle.queue, handle.local_reader_ranks.index(rank))
        return made

    def wait_until_ready(self) -> None:
        """Does nothing: the first object waits until all have attached."""

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Sends an object to every reader."""
        self._queue.enqueue(obj, timeout)

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """The next object.

        Args:
            timeout: seconds; None: as long as the others live.
            indefinite: vLLM's, which then does not warn of long waits; this queue never does.

        Raises:
            CollectiveTimeoutError: a TimeoutError, which vLLM expects: none came in time.
            ContextClosedError, PeerLostError: the queue was shut down, or the other process is gone.
        """
        return self._queue.dequeue(None if indefinite else timeout)

    def shutdown(self) -> None:
        """Ends the calls that wait, and closes."""
        self._queue.close()
