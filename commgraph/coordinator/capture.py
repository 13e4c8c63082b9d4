"""Recording device graphs: the stream on which it is done, and what becomes of the groups where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from commgraph.coordinator.group import GroupCoordinator

__all__ = ["GraphCapture", "capture"]


@attrs.frozen
class GraphCapture:
    """What `graph_capture` yields.

    Attributes:
        stream: on which to capture, current inside of the block; None on the host, which has no streams.
    """

    stream: Any


@contextlib.contextmanager
def capture(groups: Sequence[GroupCoordinator], device: torch.device, stream: Any, what: str) -> Iterator[GraphCapture]:
    """A block in which graphs are captured that communicate in `groups`, of which there is at least one.

    An error inside ends the groups: the peers, who go on capturing, would wait in a replay for a call that was never recorded. They raise
    in their next call instead, and nothing is sent to them.
    """
    streams = groups[0]._link.streams(device)
    side = None if streams is None else streams.new() if stream is None else stream
    for group in groups:
        if group._link.sides is not None and streams is not None and not streams.is_capturing():
            group._link.sides.forget_recorded()
    with contextlib.nullcontext() if streams is None else streams.beside(side):
        try:
            yield GraphCapture(side)
        except BaseException as error:
            for group in groups:
                call, _ = group._describe("graph_capture", group._link.sequence, None)
                group._link.break_off(call, f"an error ended the graph capture of {what} on this rank: {type(error).__name__}: {error}")
            raise
