"""Streams of a device, as far as commgraph needs them: a call that nobody waits for runs on one of its own."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Streams", "TorchStreams"]


class Streams(abc.ABC):
    """Streams of one device. What is enqueued on one runs in order; marks order one after another. Nothing here holds up the host."""

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
    def mark(self) -> Any:
        """A point of the current stream: all that was enqueued on it so far."""

    @abc.abstractmethod
    def after(self, mark: Any) -> None:
        """Whatever is enqueued on the current stream from now on comes after the mark."""

    @abc.abstractmethod
    def reached(self, mark: Any) -> bool:
        """Whether the device has come so far."""

    @abc.abstractmethod
    def keep(self, x: torch.Tensor) -> None:
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
        before = self.mark()
        with self.use(stream):
            self.after(before)
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

    def mark(self) -> Any:
        return self.current().record_event()

    def after(self, mark: Any) -> None:
        self.current().wait_event(mark)

    def reached(self, mark: Any) -> bool:
        return bool(mark.query())

    def keep(self, x: torch.Tensor) -> None:
        x.record_stream(self.current())

    def is_capturing(self) -> bool:
        asked = getattr(self._torch, "is_current_stream_capturing", None)  # torch.xpu has none in every version
        if asked is None:
            return False
        with self._torch.device(self._device):  # it asks about the current one
            return bool(asked())
