"""The base class of operations, and the paths on which one is run.

An operation is a class with class methods only: its checks, its text, how a strategy serves it, what it gives for fake tensors, its
derivative. `run` chooses the path: through its torch operator where torch traces, recorded for autograd where a gradient is wanted, else
straight to the strategy. `perform` calls the strategy for an operation of every kind, messages and objects included, and turns a
failure into the public error. A recorder that is to see every operation goes there (and in the callback of native calls).
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from commgraph import ambient, compat
from commgraph.carriers import carried
from commgraph.communicators.base import Communicator
from commgraph.communicators.tags import COLLECTIVE, digest, make_tag
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument, Place
from commgraph.coordinator.failures import EXPECTED, Call, call_site, concurrent
from commgraph.coordinator.recorded import Message
from commgraph.coordinator.spans import span
from commgraph.coordinator.state import GroupState
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import CollectiveTimeoutError, ContextClosedError, UnsupportedTensorError
from commgraph.ops import rules
from commgraph.shm.stopped import Busy
from commgraph.work import Job

__all__ = [
    "Describe",
    "Group",
    "Operation",
    "begin",
    "collective",
    "count_in_turn",
    "differentiate",
    "explain",
    "interrupted_by",
    "is_watched",
    "passes_by",
    "perform",
    "raise_native",
    "run",
    "whole",
]

T = TypeVar("T")


class Group(Place, Protocol):
    """A coordinator, as operations know it."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def next_in_group(self) -> int: ...
    @property
    def prev_in_group(self) -> int: ...
    @property
    def _experts(self) -> int | None: ...
    @property
    def _operations(self) -> Mapping[str, type[Operation]]: ...
    @property
    def _state(self) -> GroupState: ...
    @property
    def _fast(self) -> Any: ...
    @property
    def _token(self) -> torch.Tensor: ...


class Operation:
    """A collective operation on tensors. Never instantiated: its methods belong to the class.

    `args` are those of the coordinator's method, in its order and without `timeout`; `checked` is what `check` makes of them.
    """

    name: ClassVar[str]
    """As the coordinator's method is called."""

    routed_as: ClassVar[str]
    """Which entry of `commgraph.communicators.base.OPERATIONS` a strategy is asked for."""

    native: ClassVar[int | None] = None
    """How many `args` the method of the native calls takes that has this name, beside a timeout; None where there is no such method."""

    schema: ClassVar[str]
    """Of the torch operator, with ``Group`` in the place of a coordinator's type (`commgraph.ops.library`)."""

    ordered: ClassVar[bool] = False
    """Whether the operator says that it changes the coordinator's token, so that no compiler drops or moves it."""

    operator: ClassVar[Any]
    """``torch.ops.commgraph.<name>``, once it was declared."""

    differentiable: ClassVar[bool] = True
    """Whether derivatives pass; if not an x that has one is refused."""

    carries: ClassVar[bool] = True
    """Whether `serve` gets tensors of dtypes that torch does not copy as their bytes; if not it takes care of them itself."""

    rooted: ClassVar[bool] = False
    """Whether the second argument is the rank that gives or gets everything."""

    dims: ClassVar[tuple[int, ...]] = ()
    """Which of the arguments behind x are dimensions of it."""

    @classmethod
    def check(cls, place: Place, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the checked arguments.

        Raises:
            BadArgument: one is wrong.
        """
        raise NotImplementedError(cls)

    @classmethod
    def alone(cls, *checked: Any) -> Any:
        """Return what a group of one rank gets: its input."""
        return checked[0]

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        """Return shape, dtype, device, and of a reduction the op, by which the strategy is chosen: all ranks have them in common."""
        x: torch.Tensor = checked[0]
        return x.shape, x.dtype, x.device

    @classmethod
    def text(cls, n: int, *checked: Any) -> str:
        """Return what the n ranks of the call have in common, as text: for its tag, for mismatches and errors, and for a recorder."""
        raise NotImplementedError(cls)

    @classmethod
    def pair_sizes(cls, n: int, *checked: Any) -> Sequence[tuple[int, int]] | None:
        """Return the elements that go to and come from each rank, where they are not in the text."""
        return None

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, *checked: Any) -> Any:
        """Have the strategy do it, and return the result."""
        raise NotImplementedError(cls)

    # Where torch traces or records.

    @classmethod
    def watched(cls, *args: Any) -> Sequence[Any]:
        """Return the arguments that may be fake tensors, tensor subclasses or require a gradient."""
        return args[:1]

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        """Return the arguments that are filled, and their names; None in the place of one where a new tensor is made."""
        return ()

    @classmethod
    def has_operator(cls, *args: Any) -> bool:
        """Whether its torch operator takes such arguments."""
        return True

    @classmethod
    def traced(cls, group: Group, *args: Any) -> Any:
        """Return the result of `call`. torch.compile traces this instead of the eager paths."""
        return args[0] if group.world_size == 1 else cls.call(group, *args)

    @classmethod
    def call(cls, group: Group, *args: Any) -> Any:
        """Call the torch operator, or in eager record the operation for autograd."""
        if is_dynamo_compiling() or is_watched(*cls.watched(*args)):
            return cls.operator(args[0], group, *args[1:], cls.token(group)) if cls.ordered else cls.operator(args[0], group, *args[1:])
        return rules.record(Recorded, rules.with_tangent(args[0]), cls, group, args[1:])

    @classmethod
    def token(cls, group: Group) -> torch.Tensor:
        """Return the tensor that ordered operators say they change."""
        return group._token if is_dynamo_compiling() else compat.known_to_modes(group._token)

    @classmethod
    def kernel(cls, x: torch.Tensor, group: Group, *args: Any) -> Any:
        """Do it, as the torch operator: below autograd, and never giving x itself back."""
        if x.requires_grad:  # of a compiled graph, which calls this without the dispatcher
            x = x.detach()
        y = run_directly(cls, group, (x, *(args[:-1] if cls.ordered else args)))
        return x.clone(memory_format=torch.contiguous_format) if y is x else y

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, *args: Any) -> Any:
        """Return an empty tensor of the result's shape, after the same checks."""
        raise NotImplementedError(cls)

    @classmethod
    def save_for_backward(cls, node: Any, x: torch.Tensor, group: Any, args: Sequence[Any], output: Any) -> None:
        """Save tensors and shapes that `gradient` needs on `node`, beside `node.group`, `node.args` and `node.token`."""

    @classmethod
    def gradient(cls, node: Any, grad: Any) -> Any:
        """Return the gradient of x from that of the result: the adjoint with respect to the sum of all ranks' losses."""
        raise NotImplementedError(cls)

    @classmethod
    def tangent(cls, node: Any, tangent: torch.Tensor) -> Any:
        """Return the tangent of the result from that of x; here of an operation that is linear."""
        return differentiate(cls.schema[: cls.schema.index("(")], node, tangent, *node.args)


class Recorded(rules.Rule):
    """An operation in eager, of an x whose derivatives are recorded."""

    @staticmethod
    def compute(x: torch.Tensor, operation: type[Operation], group: Group, args: tuple[Any, ...]) -> Any:
        return run_directly(operation, group, (x, *args))

    @staticmethod
    def keep(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, operation, group, args = inputs
        node.operation, node.group, node.args, node.token = operation, group, args, group._token
        operation.save_for_backward(node, x, group, args, output)

    @staticmethod
    def batched(x: torch.Tensor, operation: type[Operation], group: Group, args: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            return operation, group, tuple([checks.dim(x, one) if i in operation.dims else one for i, one in enumerate(args)])
        except BadArgument as error:
            raise explain(error, group, operation.name, group._state.sequence) from None

    @staticmethod
    def forward(node: Any, *inputs: Any) -> Any:
        return rules.in_rule(Recorded, node, inputs)

    @staticmethod
    def backward(node: Any, grad: Any) -> Any:
        return node.operation.gradient(node, grad), None, None, None

    @staticmethod
    def push(node: Any, tangent: torch.Tensor, *_: None) -> Any:
        return node.operation.tangent(node, tangent)


def differentiate(name: str, node: Any, *args: Any) -> Any:
    """Run the operation whose torch operator has that name as part of a derivative.

    Args:
        name: of the operator: rules refer to each other, as all_gather and reduce_scatter do.
        node: of autograd, with the group, which may be torch's stand-in for a coordinator, and the token that the operator was given.
        args: those of the operator, without the group and the token.
    """
    group: Group = compat.real_object(node.group)
    operation = group._operations[name]
    if group is not node.group or compat.count_modes():
        more = (node.token,) if operation.ordered else ()
        return operation.operator(args[0], node.group, *args[1:], *more)
    return rules.again(Recorded, args[0], operation, group, args[1:])


def is_watched(*tensors: Any) -> bool:
    """Whether torch wants to see the operator of an eager call: a dispatch mode is active, or a tensor is one of torch's stand-ins."""
    if compat.count_modes() > 0:
        return True
    for x in tensors:  # noqa: SIM110 - the generator of `any` is one more frame
        if type(x) is not torch.Tensor and isinstance(x, torch.Tensor) and compat.is_traced(x):
            return True
    return False


def passes_by(special: bool, *tensors: Any) -> bool:
    """Whether a call passes by the modes that are active: one with arguments that its operator lacks, where nothing is traced."""
    return special and not compat.is_tracing(*tensors)


def records(group: Place, *tensors: Any) -> bool:
    """Whether derivatives of an eager call are to be recorded. Never in a group of one rank, which returns its input."""
    if group.world_size == 1:
        return False
    forward = compat.in_forward_mode()
    if forward or compat.in_transform():
        for x in tensors:
            if isinstance(x, torch.Tensor) and (compat.is_wrapped(x) or (forward and (x.is_floating_point() or x.is_complex()))):
                return True
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110 - as above
        if isinstance(x, torch.Tensor) and x.requires_grad:
            return True
    return False


def refuse_timeout(timeout: Any) -> None:
    """Refuse a deadline for a call through its operator, which has no such argument."""
    if timeout is not None:
        raise ValueError(
            "timeout= cannot go with a call that is traced or that wants a gradient: such calls have the deadline of the options "
            "(CommunicatorOptions.host_timeout)"
        )


def run(operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout = None) -> Any:
    """Run an operation on the path that its tensors need: traced, recorded for autograd, or directly."""
    if is_dynamo_compiling():
        refuse_timeout(timeout)
        return operation.traced(group, *args)
    watched = operation.watched(*args)
    recorded = operation.differentiable and records(group, *watched)
    if recorded or is_watched(*watched):
        if not recorded and passes_by(timeout is not None or not operation.has_operator(*args), *watched):
            with ambient.shelter():
                return run_generally(operation, group, args, timeout)
        refuse_timeout(timeout)
        try:
            for filled, name in operation.filled(*args):
                if isinstance(filled, torch.Tensor):
                    checks.fillable(filled, name)
        except BadArgument as error:
            raise explain(error, group, operation.name, group._state.sequence) from None
        return operation.traced(group, *args)
    return run_generally(operation, group, args, timeout)


def run_directly(operation: type[Operation], group: Group, args: tuple[Any, ...]) -> Any:
    """Run an operation below autograd and below every mode: natively where that serves it, else by the general path."""
    if operation.native is not None and (fast := group._fast) is not None:
        optional = [None] * (operation.native - len(args))  # operators have no `out`
        try:
            y = getattr(fast, operation.name)(*args, *optional, None)
        except BaseException as error:
            raise_native(error, operation, group, args, None)
        if y is not None:
            return None if y is False or not args else args[0] if y is True else y
    return run_generally(operation, group, args)


def run_generally(operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout = None) -> Any:
    """Run an operation by the general path, which serves every tensor and every argument, or says what is wrong with it."""
    turn = Turn()
    try:
        return _run_generally(operation, group, args, timeout, turn)
    finally:
        group._state.turns.release(None, turn)


def _run_generally(operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout, turn: Turn) -> Any:
    sequence, deadline = begin(group, operation.name, timeout, turn)
    try:
        checked = operation.check(group, *args)
        n = group.world_size
        if n == 1:
            return operation.alone(*checked)
    except BadArgument as error:
        raise explain(error, group, operation.name, sequence) from None
    state = group._state
    moved = carry(checked) if operation.carries else checked
    routed = operation.routed_by(*moved)
    strategy = state.strategies.route(operation.routed_as, *routed)
    what = f"{operation.name}({operation.text(n, *checked)})"
    if timeout is None and strategy.stream_ordered:
        deadline = Deadline.after(state.timeouts.device)

    def act() -> Any:
        if state.comparison is not None:
            call = Call(group.name, operation.name, state.members, sequence)
            sizes = operation.pair_sizes(n, *checked)
            state.comparison.compare(call, what, deadline, pair_sizes=sizes, on_device=strategy.stream_ordered)
        result = operation.serve(group, strategy, make_tag(COLLECTIVE, sequence, what), deadline, *moved)
        return result if moved is checked else bring_back(result, moved, checked)

    about = {} if state.records is None else _about(operation, strategy, checked, routed)
    return perform(group, operation.name, sequence, what, deadline, act, **about)


def _about(operation: type[Operation], strategy: Communicator, checked: tuple[Any, ...], routed: tuple[Any, ...]) -> dict[str, Any]:
    """Return what the record of calls holds of a collective; of one with a list of tensors each has its arguments in `checked`."""
    coalesced = bool(checked) and isinstance(checked[0], tuple)
    first = checked[0] if coalesced else checked
    return {
        "moved": [part[0] for part in checked] if coalesced else first[0] if first else None,
        "strategy": strategy.name,
        "peer": first[1] if operation.rooted and first else -1,
        "reduction": routed[3] if len(routed) > 3 else None,
    }


def carry(checked: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return checked arguments with a view of each tensor whose dtype needs a carrier; themselves, where there is none."""
    moved = tuple([carried(one) if isinstance(one, torch.Tensor) else carry(one) if type(one) is tuple else one for one in checked])
    return checked if all(map(operator.is_, moved, checked)) else moved


def bring_back(result: Any, moved: Any, checked: Any) -> Any:
    """Return a result in the dtype of the arguments, and an argument itself where it is one; of lists of tensors each."""
    if isinstance(result, list):
        return [bring_back(one, *parts) for one, *parts in zip(result, moved, checked, strict=True)]
    for view, x in zip(moved, checked, strict=True):
        if view is result:
            return x
    return None if result is None else result.view(checked[0].dtype)


def perform(
    group: Group,
    operation: str,
    sequence: int,
    what: str,
    deadline: Deadline,
    act: Callable[[], T],
    moved: Any = None,
    *,
    strategy: str | None = None,
    peer: int = -1,
    message: Message | None = None,
    reduction: str | None = None,
    is_made: Callable[[T], bool] | None = None,
    received: Callable[[T], int] | None = None,
) -> T:
    """Do what meets the peers, and turn a failure into the public error, which breaks the group and releases the peers.

    Args:
        group: on which.
        operation: name of the method.
        sequence: collectives that were begun on the group before.
        what: the call with its arguments, as text.
        deadline: of the call.
        act: does it.
        moved, strategy, peer, message, reduction: for the record of calls (`GroupRecords`).
        is_made: whether such a result is that of a call that was made; None: every result is.
        received: bytes of such a result, for the record; None: those of a tensor or memory.
    """
    records, token = group._state.records, None
    record = None if records is None else records[group.name]
    try:
        with ambient.shelter(), span(group, operation):
            if record is not None:
                token = record.begin(operation, strategy, sequence, message, peer, moved, reduction)
            result = act()
            if record is not None and token is None:
                if received is not None or isinstance(result, memoryview):
                    record.add(result if received is None else received(result))
            elif record is not None and token is not None:
                if is_made is not None and not is_made(result):
                    record.cancel(token)
                elif received is not None:
                    record.done(token, received(result))
                else:
                    record.done(token, result if moved is None and isinstance(result, torch.Tensor | memoryview) else None)
        return result
    except EXPECTED as error:
        overrun = (time.monotonic_ns() - deadline.at_ns) * 1e-9
        call = Call(group.name, operation, group._state.members, sequence)
        group._state.failures.end(call, what, deadline.seconds, error, overrun=overrun)
    except Busy:
        # A signal handler calls for another kind of message of a ring that the call around it uses; nothing was sent.
        if record is not None and token is not None:
            record.cancel(token)
        raise concurrent(Call(group.name, operation, group._state.members, sequence), message=True) from None
    except BaseException as error:
        state, call = group._state, Call(group.name, operation, group._state.members, sequence)
        if state.failures.closed and isinstance(error, Exception):
            # Another thread has closed the strategy during this call.
            raise ContextClosedError(f"{call.where}: its context was closed during the call") from None
        if state.strategies.has_aborted:
            state.failures.break_off(call, interrupted_by(error, what))
        raise
    finally:
        if record is not None and token is not None:
            record.fail(token)  # where it is open still


def begin(group: Group, operation: str, timeout: Timeout, turn: Turn) -> tuple[int, Deadline]:
    """Count a collective, after those that were begun and not waited for, whether its arguments are good or not.

    Args:
        group, operation, timeout: of the call.
        turn: of the call, which is claimed. The caller releases it, whether this raises or not.

    Returns:
        How many were begun before, and the deadline.

    Raises:
        ConcurrentCallError: another call is under way; nothing was counted.
    """
    state = group._state
    pending = state.pending
    if pending.lanes and not pending.is_idle(None):
        state.ensure_open(group.name)
        try:
            deadline = deadline_of(group, operation, timeout)
        except ValueError:
            count_in_turn(group, operation)
            raise
        wait_pending(group, None, operation, deadline)
        pending.follow(None)
        return state.begin(group.name, operation, turn), deadline
    if pending.side_streams is not None:
        pending.follow(None)
    sequence = state.begin(group.name, operation, turn)
    if timeout is None:
        return sequence, Deadline.after(state.timeouts.host)
    return sequence, deadline_of(group, operation, timeout)


@contextlib.contextmanager
def collective(group: Group, operation: str, timeout: Timeout) -> Iterator[tuple[int, Deadline]]:
    """Context manager in which a collective is under way; gives what `begin` returns."""
    turn = Turn()
    try:
        yield begin(group, operation, timeout, turn)
    finally:
        group._state.turns.release(None, turn)


@contextlib.contextmanager
def whole(group: Group, operation: str, timeout: Timeout, root: int = -1) -> Iterator[None]:
    """Context manager of a call that consists of several collectives, between which no other call may come; `root`: for its record."""
    state = group._state
    if group.world_size == 1 or is_dynamo_compiling():
        yield
        return
    state.ensure_open(group.name)
    wait_pending(group, None, operation, deadline_of(group, operation, timeout))
    held = state.turns.claim_whole()
    if held is None:
        raise state.refused(group.name, operation)
    record = None if state.records is None else state.records[group.name]
    token = None if record is None else record.begin(operation, None, state.sequence, None, root, None, None, True)
    try:
        yield
        if record is not None and token is not None:
            record.done(token)
    finally:
        state.turns.release_held(held)
        if record is not None and token is not None:
            record.fail(token)  # where it is open still


def count_in_turn(group: Group, operation: str) -> None:
    """Count a collective that was refused when its turn would have come, after those that were begun before it."""

    def count() -> None:
        with collective(group, operation, None):
            pass

    group._state.pending.submit(None, Job(count, call_site()))


def wait_pending(group: Group, key: Any, operation: str, deadline: Deadline) -> None:
    """Wait until what was begun before in a lane has ended, so that a blocking call does not overtake it."""
    if not group._state.pending.wait(key, deadline):
        call = Call(group.name, operation, group._state.members, group._state.sequence)
        raise CollectiveTimeoutError(
            f"{call.where}: operations that were begun before it and not waited for did not end within {deadline.seconds:g} s, so it was "
            "not begun. The group is unharmed",
            **call.facts,
        )


def deadline_of(group: Group, operation: str, timeout: Timeout) -> Deadline:
    """Return the deadline of a call."""
    try:
        return Deadline.of(timeout, group._state.timeouts.host)
    except ValueError as error:
        where = Call(group.name, operation, group._state.members, group._state.sequence).where
        raise ValueError(f"{where}: {error}. Nothing was sent.") from None


def explain(error: BadArgument, group: Any, operation: str, sequence: int) -> Exception:
    """Return the public error for a bad argument: who called what, and what is wrong with it."""
    call = Call(group.name, operation, group._state.members, sequence)
    message = f"{call.where}: {error}. Nothing was sent."
    return UnsupportedTensorError(message, **call.facts) if error.unsupported else ValueError(message)


def raise_native(error: BaseException, operation: type[Operation], group: Group, args: tuple[Any, ...], timeout: Timeout) -> NoReturn:
    """Raise for a native call what the general path would have raised."""
    state = group._state
    fast = state.detects
    try:
        if isinstance(error, Busy):
            raise state.refused(group.name, operation.name) from None
        if fast is None or not fast.interrupted:
            raise error  # nothing was sent
        translated = fast.translate(error)
        if translated is None:
            call = Call(group.name, operation.name, state.members, max(state.sequence - 1, 0))
            state.failures.break_off(call, interrupted_by(error, operation.name))  # the others must not wait for this rank
            raise error
        sequence = max(state.sequence - 1, 0)
        what = f"{operation.name}({operation.text(group.world_size, *operation.check(group, *args))})"
        seconds = deadline_of(group, operation.name, timeout).seconds
        state.failures.end(Call(group.name, operation.name, state.members, sequence), what, seconds, translated)
    finally:
        del error  # whose traceback holds this frame


def interrupted_by(error: BaseException, what: str) -> str:
    """Return why a call has broken its group that a signal handler has ended, which left it half done."""
    return f"{what} was interrupted on this rank by {type(error).__name__}, half done"


class Describe:
    """Gives the native calls the digest of a call's text. Refers to no coordinator, which refers to the native calls: no cycle."""

    __slots__ = ("device", "lists", "operations", "rank_in_group", "world_size")

    def __init__(self, operations: Mapping[str, type[Operation]], lists: Mapping[str, type[Operation]], group: Place) -> None:
        """By name: `operations`, and `lists`, those on a list of tensors."""
        self.operations = operations
        self.lists = lists
        self.world_size = group.world_size
        self.rank_in_group = group.rank_in_group
        self.device = group.device

    def __call__(self, name: str, args: tuple[Any, ...]) -> int:
        """Return the digest of a call's text."""
        operation = self.lists[name] if args and isinstance(args[0], list | tuple) else self.operations[name]
        checked = operation.check(self, *args)
        return digest(f"{name}({operation.text(self.world_size, *checked)})")
