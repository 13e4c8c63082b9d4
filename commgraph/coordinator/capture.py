"""Capture of device graphs: its stream, and the end of the groups where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from commgraph.coordinator.failures import Call
from commgraph.coordinator.operation import Group

__all__ = ["GraphCapture", "capture"]


@attrs.frozen
class GraphCapture:
    """Value of the ``with`` statement of `graph_capture`.

    Attributes:
        stream: on which to capture, current inside of the block; None on the host, which has no streams.
    """

    stream: Any


@contextlib.contextmanager
def capture(groups: Sequence[Group], device: torch.device, stream: Any, what: str) -> Iterator[GraphCapture]:
    """Context manager in which graphs that communicate in `groups` (at least one) are captured.

    An error inside ends the groups: the peers, who go on capturing, would wait in a replay for a call that was never recorded. They raise
    in their next call instead, and nothing is sent to them.
    """
    streams = groups[0]._state.streams(device)
    side = None if streams is None else streams.new() if stream is None else stream
    for group in groups:
        side_streams = group._state.side_streams
        if side_streams is not None and streams is not None and not streams.is_capturing():
            side_streams.forget_recorded()
    with contextlib.nullcontext() if streams is None else streams.beside(side):
        try:
            yield GraphCapture(side)
        except BaseException as error:
            for group in groups:
                call = Call(group.name, "graph_capture", group._state.members, group._state.sequence)
                group._state.failures.break_off(
                    call, f"an error ended the graph capture of {what} on this rank: {type(error).__name__}: {error}"
                )
            raise
