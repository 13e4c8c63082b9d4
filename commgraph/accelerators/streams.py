"""`Streams`: interface to the streams and events of a device, for asynchronous calls."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Streams", "TorchStreams"]


class Streams(abc.ABC):
    """Streams of one device. Calls enqueued on one run in order; events order one stream after another. No method blocks the host."""

    @abc.abstractmethod
    def new(self) -> Any:
        """Return a new stream."""

    @abc.abstractmethod
    def current(self) -> Any:
        """Return the current stream of this thread."""

    @abc.abstractmethod
    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Context manager in which `stream` is current for this thread."""

    @abc.abstractmethod
    def record_event(self) -> Any:
        """Return an event on the current stream, reached when all calls enqueued on it so far are done."""

    @abc.abstractmethod
    def wait_event(self, event: Any) -> None:
        """Order whatever is enqueued on the current stream from now on after the event."""

    @abc.abstractmethod
    def reached(self, event: Any) -> bool:
        """Whether the device has come to the event."""

    @abc.abstractmethod
    def record_stream(self, x: torch.Tensor) -> None:
        """Keep the memory of x from being allocated again before the current stream is done with it."""

    @abc.abstractmethod
    def is_capturing(self) -> bool:
        """Whether the current stream is recording a graph."""

    @contextlib.contextmanager
    def beside(self, stream: Any) -> Iterator[Any]:
        """Context manager in which `stream` is current, ordered after the calls enqueued so far on the stream that was."""
        if stream == self.current():
            yield stream
            return
        before = self.record_event()
        with self.use(stream):
            self.wait_event(before)
            yield stream


class TorchStreams(Streams):
    """Streams of ``torch.cuda`` or ``torch.xpu``. Not yet run on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = getattr(torch, device.type)

    def new(self) -> Any:
        return self._torch.Stream(self._device)

    def current(self) -> Any:
        return self._torch.current_stream(self._device)

    @contextlib.contextmanager
    def use(self, stream: Any) -> Iterator[Any]:
        # The device first: a new thread's is device 0, and restoring a stream of that one would allocate memory there.
        with self._torch.device(self._device), self._torch.stream(stream):
            yield stream

    def record_event(self) -> Any:
        return self.current().record_event()

    def wait_event(self, event: Any) -> None:
        self.current().wait_event(event)

    def reached(self, event: Any) -> bool:
        return bool(event.query())

    def record_stream(self, x: torch.Tensor) -> None:
        x.record_stream(self.current())

    def is_capturing(self) -> bool:
        asked = getattr(self._torch, "is_current_stream_capturing", None)  # torch.xpu has none in every version
        if asked is None:
            return False
        with self._torch.device(self._device):  # it asks about the current one
            return bool(asked())
