"""The list of operations, and their torch operators. To be imported once `GroupCoordinator` is known to torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from commgraph import compat
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.exchanges import AllToAll, AllToAllV, Barrier, Scatter
from commgraph.coordinator.experts import Combine, Dispatch
from commgraph.coordinator.gathers import AllGather, AllGatherV, BroadcastCopy, Gather
from commgraph.coordinator.messages import Receive, SendReceive, Transmit
from commgraph.coordinator.operation import Operation, explain
from commgraph.coordinator.reductions import AllReduce, AllReduceInPlace, Reduce, ReduceOnOne, ReduceScatter, ReduceScatterV
from commgraph.ops.library import declare

__all__ = ["OPERATIONS", "declare_operators"]

# By the name of the torch operator, or of the native call.
OPERATIONS = MappingProxyType(
    {
        "all_reduce": AllReduce,
        "all_reduce_": AllReduceInPlace,
        "reduce": Reduce,
        "reduce_on_one": ReduceOnOne,
        "reduce_scatter": ReduceScatter,
        "reduce_scatterv": ReduceScatterV,
        "all_gather": AllGather,
        "all_gatherv": AllGatherV,
        "gather": Gather,
        "scatter": Scatter,
        "broadcast": BroadcastCopy,
        "all_to_all": AllToAll,
        "all_to_allv": AllToAllV,
        "barrier": Barrier,
        "send": Transmit,
        "recv": Receive,
        "sendrecv": SendReceive,
        "dispatch": Dispatch,
        "combine": Combine,
    }
)


def declare_operators() -> Sequence[Any]:
    """Declare the torch operator of every operation, and return them."""
    return tuple([_declare(operation) for name, operation in OPERATIONS.items() if name != "all_reduce_"])  # that is a copy of one


def _declare(operation: type[Operation]) -> Any:
    # Whether the group is the first argument: of messages and barriers, which have no input; else the second.
    first = operation.schema[operation.schema.index("(") + 1 :].startswith("Group ")

    def parts(inputs: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
        x, group = (None, inputs[0]) if first else (inputs[0], inputs[1])
        rest = inputs[1 if first else 2 : -1 if operation.ordered else None]
        return x, group, tuple(rest)

    def fake(*inputs: Any) -> Any:
        x, group, rest = parts(inputs)
        real = compat.real_object(group)
        try:
            return operation.fake(real, *rest) if first else operation.fake(real, x, *rest)
        except BadArgument as error:
            raise explain(error, real, operation.name, real._state.sequence) from None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # torch passes them by these names
        x, ctx.group, ctx.args = parts(inputs)
        ctx.token = inputs[-1] if operation.ordered else None
        operation.save_for_backward(ctx, x, ctx.group, ctx.args, output)

    gradient: Callable[..., Any] | None = operation.gradient if _has_gradient(operation) else None
    operation.operator = declare(operation.schema, operation.kernel, fake, setup_context=setup_context, gradient=gradient)
    return operation.operator


def _has_gradient(operation: type[Operation]) -> bool:
    return operation.gradient.__func__ is not Operation.gradient.__func__  # type: ignore[attr-defined]  # of class methods
