"""The strategy that serves every call on the host over a transport."""

from __future__ import annotations

from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.tcp import TcpCommunicator
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.communicators.transport import Transport

__all__ = ["strategy_over"]


def strategy_over(transport: Transport) -> GlooCommunicator:
    """Return the strategy for host tensors over a transport: the last one of each chain on the host."""
    return TcpCommunicator(transport) if isinstance(transport, TcpTransport) else GlooCommunicator(transport)
