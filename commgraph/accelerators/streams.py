"""Streams of a device, as far as commgraph needs them: a call that nobody waits for runs on one of its own."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Streams", "TorchStreams"]


class Streams(abc.ABC):
    """Streams of one device. Calls enqueued on one run in order; events order one stream after another. Nothing here holds up the host."""

    @abc.abstractmethod
    def new(self) -> Any:
        """Another stream."""

    @abc.abstractmethod
    def current(self) -> Any:
        """The one on which this thread enqueues."""

    @abc.abstractmethod
    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A block in which `stream` is current for this thread."""

    @abc.abstractmethod
    def record_event(self) -> Any:
        """An event on the current stream, reached when all that was enqueued on it so far is done."""

    @abc.abstractmethod
    def wait_event(self, event: Any) -> None:
        """Whatever is enqueued on the current stream from now on comes after the event."""

    @abc.abstractmethod
    def reached(self, event: Any) -> bool:
        """Whether the device has come to the event."""

    @abc.abstractmethod
    def record_stream(self, x: torch.Tensor) -> None:
        """The memory of x is not given to anybody else before what the current stream has to do with it is done."""

    @abc.abstractmethod
    def is_capturing(self) -> bool:
        """Whether what is enqueued now is recorded into a graph."""

    @contextlib.contextmanager
    def beside(self, stream: Any) -> Iterator[Any]:
        """A block in which `stream` is current, after all that was enqueued so far on what was current before."""
        if stream == self.current():
            yield stream
            return
        before = self.record_event()
        with self.use(stream):
            self.wait_event(before)
            yield stream


class TorchStreams(Streams):
    """Those of ``torch.cuda`` or ``torch.xpu``. Not yet run on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = getattr(torch, device.type)

    def new(self) -> Any:
        return self._torch.Stream(self._device)

    def current(self) -> Any:
        return self._torch.current_stream(self._device)

    @contextlib.contextmanager
    def use(self, stream: Any) -> Iterator[Any]:
        # The device first: a thread's is the first of all, and going back to a stream of that would claim memory there.
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
