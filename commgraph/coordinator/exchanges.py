"""Exchanges: all_to_all, scatter, barrier."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from commgraph import ambient
from commgraph.carriers import UNSERVED, carried, carrier
from commgraph.communicators.base import CallsDiffer, Communicator
from commgraph.communicators.reduction import DTYPES
from commgraph.communicators.tags import COLLECTIVE, make_tag
from commgraph.coordinator import checks
from commgraph.coordinator.checks import BadArgument, Place
from commgraph.coordinator.failures import CLOSE
from commgraph.coordinator.gathers import apart_from, describe, into
from commgraph.coordinator.operation import Group, Operation, deadline_of, differentiate, perform, run_directly
from commgraph.deadline import Deadline, Timeout
from commgraph.shm.kinds import KINDS

__all__ = ["AllToAll", "AllToAllV", "Barrier", "CloseBarrier", "Scatter", "SiblingBarrier"]

_HOST = torch.device("cpu")


class AllToAll(Operation):
    """Pieces of a dim, one to each rank and one from each."""

    name = "all_to_all"
    routed_as = "all_to_all"
    native: ClassVar[int | None] = 6
    schema = "all_to_all(Tensor x, Group group, int scatter_dim, int gather_dim) -> Tensor"
    dims: ClassVar[tuple[int, ...]] = (0, 1)

    @classmethod
    def check(
        cls, place: Place, x: Any, scatter_dim: Any, gather_dim: Any, input_sizes: Any = None, output_sizes: Any = None, out: Any = None
    ) -> tuple[Any, ...]:
        checks.tensor(place, x)
        scatter_dim, gather_dim = checks.dim(x, scatter_dim, "scatter_dim"), checks.dim(x, gather_dim, "gather_dim")
        cut = checks.split(place, x, scatter_dim, input_sizes, "input_sizes")
        n, me, same = place.world_size, place.rank_in_group, scatter_dim == gather_dim
        if output_sizes is not None:
            joined = checks.sizes(place, output_sizes, "output_sizes")
            own = cut[me] if same else x.shape[gather_dim]
            checks.require(joined[me] == own, f"output_sizes={joined} says {joined[me]} for this rank's own piece, which has {own}")
        elif same and input_sizes is not None:
            raise BadArgument("input_sizes without output_sizes: what each rank sends is its own affair, so say what comes from each")
        else:
            joined = cut if same else [x.shape[gather_dim]] * n
        shape = list(x.shape)
        shape[scatter_dim] = cut[me]
        shape[gather_dim] = sum(joined)
        if out is not None:
            out = checks.out(place, out, shape, x)
        even = input_sizes is None and output_sizes is None
        # The extents that are equal on all ranks: those of the dims that are not cut or joined unevenly.
        shared = tuple(x.shape) if even else tuple([extent for i, extent in enumerate(x.shape) if i not in (scatter_dim, gather_dim)])
        return x, scatter_dim, gather_dim, cut, joined, tuple(shape), shared, out

    @classmethod
    def alone(cls, *checked: Any) -> torch.Tensor:
        return into(checked[-1], checked[0])

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        x, *_, shared, _ = checked
        return shared, x.dtype, x.device

    @classmethod
    def text(cls, n: int, *checked: Any) -> str:
        x, scatter_dim, gather_dim, cut, _, _, shared, _ = checked
        return f"{x.dtype} {shared} {x.dim()} {scatter_dim} {gather_dim} {'' if scatter_dim == gather_dim else cut}"

    @classmethod
    def pair_sizes(cls, n: int, *checked: Any) -> Sequence[tuple[int, int]]:
        x, scatter_dim, gather_dim, cut, joined, shape, _, _ = checked
        sent = [x.numel() // x.shape[scatter_dim] * size if size else 0 for size in cut]
        whole = torch.Size(shape).numel()
        return list(zip(sent, [whole // shape[gather_dim] * size if size else 0 for size in joined], strict=True))

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, *checked: Any) -> torch.Tensor:
        x, scatter_dim, gather_dim, cut, joined, shape, _, out = checked
        if out is None:
            out = strategy.new(shape, x.dtype, x.device)
        else:
            x = apart_from(out, x)
        strategy.all_to_all(x.split(cut, scatter_dim), out.split(joined, gather_dim), tag=tag, deadline=deadline)
        result: torch.Tensor = out
        return result

    @classmethod
    def filled(cls, *args: Any) -> Sequence[tuple[Any, str]]:
        return [(args[-1], "out")]

    @classmethod
    def traced(
        cls,
        group: Group,
        x: torch.Tensor,
        scatter_dim: int,
        gather_dim: int,
        input_sizes: Sequence[int] | None = None,
        output_sizes: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        n = group.world_size
        if n == 1:
            return into(out, x)
        if input_sizes is None and output_sizes is None:
            return into(out, AllToAll.call(group, x, scatter_dim, gather_dim))
        same = x.dim() > 0 and scatter_dim % x.dim() == gather_dim % x.dim()
        if same and output_sizes is None:
            raise ValueError(
                f"all_to_all on rank {group.rank}, in a group of {n}: input_sizes without output_sizes: what a rank sends is its own "
                "affair, so say what comes from each. Nothing was sent."
            )
        cut = [x.shape[scatter_dim] // n] * n if input_sizes is None else list(input_sizes)
        joined = (cut if same else [x.shape[gather_dim]] * n) if output_sizes is None else list(output_sizes)
        return into(out, AllToAllV.call(group, x, scatter_dim, gather_dim, cut, joined))

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, scatter_dim: int, gather_dim: int, *sizes: Any) -> torch.Tensor:
        shape: tuple[int, ...] = cls.check(place, x, scatter_dim, gather_dim, *sizes)[5]
        return x.new_empty(shape)

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        scatter_dim, gather_dim = node.args[:2]
        back: torch.Tensor = differentiate("all_to_all", node, grad, gather_dim, scatter_dim)
        return back


class AllToAllV(AllToAll):
    """The operator of `AllToAll` with pieces of any sizes; in eager `AllToAll` itself takes sizes."""

    native: ClassVar[int | None] = None
    schema = (
        "all_to_allv(Tensor x, Group group, int scatter_dim, int gather_dim, SymInt[] input_sizes, SymInt[] output_sizes, "
        "Tensor(a!) token) -> Tensor"
    )
    ordered = True

    @classmethod
    def traced(cls, group: Group, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y: torch.Tensor = cls.call(group, x, *args)
        return y

    @classmethod
    def gradient(cls, node: Any, grad: torch.Tensor) -> torch.Tensor:
        scatter_dim, gather_dim, sent, received = node.args[:4]
        back: torch.Tensor = differentiate("all_to_allv", node, grad, gather_dim, scatter_dim, received, sent)
        return back


# Number of a dtype in a header of `Scatter`: that of the native module, or 1 << 16 | its index among all, which every rank has alike.
_NUMBERS = MappingProxyType(
    {
        dtype: KINDS[dtype] if dtype in KINDS else 1 << 16 | place
        for place, dtype in enumerate((*DTYPES, torch.complex32, *sorted(UNSERVED, key=str)))
    }
)
_DTYPES = MappingProxyType({number: dtype for dtype, number in _NUMBERS.items()})
_FIXED = 4
_DIMS = 24


class Scatter(Operation):
    """The pieces of one rank's tensor, one to each rank.

    The others do not know its shape. A header is broadcast on the host first: dtype, dim, number of dims, whether the tensor is on the
    host, shape, sizes. It has the same size in every call of a group.
    """

    name = "scatter"
    routed_as = "scatter"
    rooted: ClassVar[bool] = True
    schema = "scatter(Tensor x, Group group, int src, int dim, SymInt[]? sizes, Tensor(a!) token) -> Tensor"
    ordered = True
    differentiable: ClassVar[bool] = False
    carries: ClassVar[bool] = False

    @classmethod
    def check(cls, place: Place, x: Any, src: Any, dim: Any, sizes: Any) -> tuple[Any, ...]:
        src = checks.peer(place, src, "src")
        if place.rank_in_group != src:
            if x is not None:  # its shape is compared with that of src
                checks.tensor(place, x, gradient="scatter")
                dim = checks.dim(x, dim)
            elif place.device.type == "meta":
                raise BadArgument(
                    "x is None, and no peer gives its shape: give a meta tensor of the shape that src's has", unsupported=True
                )
            return x, src, checks.index(dim, "dim"), None if sizes is None else checks.sizes(place, sizes)
        checks.tensor(place, x, gradient="scatter")
        if x.dim() > _DIMS or x.dtype not in _NUMBERS:
            raise BadArgument(f"x is {describe(x)}: scatter serves up to {_DIMS} dims")
        dim = checks.dim(x, dim)
        return x, src, dim, checks.split(place, x, dim, sizes)

    @classmethod
    def routed_by(cls, *checked: Any) -> tuple[Any, ...]:
        # Facts of the header, as the tensor's shape is known on src only. A meta tensor has no peers, and therefore no header.
        x = checked[0]
        return (), torch.int64, _HOST if x is None or not x.is_meta else x.device

    @classmethod
    def text(cls, n: int, x: torch.Tensor | None, src: int, dim: int, sizes: list[int] | None) -> str:
        return f"src={src}"

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline, *checked: Any) -> torch.Tensor:
        x, src, dim, sizes = checked
        if x is not None and x.is_meta:
            return cls.fake(group, x, src, dim, sizes)
        if group.rank_in_group == src:
            numbers = [_NUMBERS[x.dtype], dim, x.dim(), int(x.is_cpu), *x.shape, *[0] * (_DIMS - x.dim()), *sizes]
            header = ambient.integers(numbers)
        else:
            header = ambient.empty(_FIXED + _DIMS + group.world_size, torch.int64)
        serving = group._state.strategies.route("broadcast", header.shape, header.dtype, _HOST)
        serving.broadcast(header, src, tag=tag, deadline=deadline)
        return cls.pieces(group, tag, deadline, header.tolist(), *checked)

    @classmethod
    def pieces(
        cls, group: Group, tag: int, deadline: Deadline, header: list[int], x: Any, src: int, dim: int, sizes: list[int] | None
    ) -> torch.Tensor:
        """Exchange the pieces, once the header is known on every rank."""
        number, at, dims, on_host, *rest = header
        dtype, shape, pieces = _DTYPES[number], rest[:dims], rest[_DIMS:]
        mine = group.rank_in_group == src
        if not mine:
            # `x` and `sizes`, where another rank than src gives them, must be as those of src.
            wrong = sizes is not None and sizes != pieces
            if wrong or (x is not None and (list(x.shape) != shape or x.dtype != dtype or at != dim)):
                raise CallsDiffer(src)
        device = _HOST if on_host else group.device
        shape[at] = pieces[group.rank_in_group]
        serving = group._state.strategies.route("scatter", (), carrier(dtype), device)
        out = serving.new(shape, carrier(dtype), device)
        serving.scatter(carried(x) if mine else None, at, pieces, out, src, tag=tag, deadline=deadline)
        return out.view(dtype)

    @classmethod
    def resume(cls, group: Group, header: list[int], args: tuple[Any, ...], timeout: Timeout) -> torch.Tensor:
        """Exchange the pieces after a native call that has exchanged the header, and does not handle this tensor."""
        state = group._state
        try:
            sequence, deadline = state.sequence - 1, deadline_of(group, cls.name, timeout)
            checked = cls.check(group, *args)
            what = f"{cls.name}({cls.text(group.world_size, *checked)})"
            tag = make_tag(COLLECTIVE, sequence, what)
            act = lambda: cls.pieces(group, tag, deadline, header, *checked)  # noqa: E731 - one line of what `perform` takes
            return perform(group, cls.name, sequence, what, deadline, act, checked[0], peer=checked[1])
        finally:
            state.turns.release_held(header)

    @classmethod
    def has_operator(cls, *args: Any) -> bool:
        return args[0] is not None

    @classmethod
    def traced(cls, group: Group, x: Any, src: int, dim: int, sizes: Sequence[int] | None) -> Any:
        if group.world_size == 1:
            return x
        if x is None:
            raise ValueError(
                f"scatter on rank {group.rank}, in a group of {group.world_size}: x is None, and where torch traces a shape must be known: "
                "give a tensor of the shape that src's has; its values are ignored. Nothing was sent."
            )
        checks.refuse_gradient(group, x, cls.name)
        return cls.call(group, x, src, dim, None if sizes is None else list(sizes))

    @classmethod
    def fake(cls, place: Place, x: torch.Tensor, src: int, dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
        checks.peer(place, src, "src")
        dim = checks.dim(x, dim)
        return x.new_empty(checks.resized(x, dim, checks.split(place, x, dim, sizes)[place.rank_in_group]))


class Barrier(Operation):
    """Wait until every rank has called it."""

    name = "barrier"
    routed_as = "barrier"
    native: ClassVar[int | None] = 0
    schema = "barrier(Group group, Tensor(a!) token) -> ()"
    ordered = True

    @classmethod
    def check(cls, place: Place) -> tuple[Any, ...]:
        return ()

    @classmethod
    def alone(cls) -> None:
        return None

    @classmethod
    def routed_by(cls) -> tuple[Any, ...]:
        return (), None, _HOST

    @classmethod
    def text(cls, n: int) -> str:
        return ""

    @classmethod
    def serve(cls, group: Group, strategy: Communicator, tag: int, deadline: Deadline) -> None:
        strategy.barrier(tag=tag, deadline=deadline)

    @classmethod
    def traced(cls, group: Group) -> None:
        if group.world_size > 1:
            cls.operator(group, cls.token(group))

    @classmethod
    def kernel(cls, group: Group, token: torch.Tensor) -> None:
        run_directly(cls, group, ())

    @classmethod
    def fake(cls, place: Place) -> None:
        return None


class CloseBarrier(Barrier):
    """Wait until every rank is about to close the group."""

    name = CLOSE
    native: ClassVar[int | None] = None


class SiblingBarrier(Barrier):
    """Wait until every rank is about to build a sibling: a rank that has left, or calls something else, is found out as in any call."""

    name = "sibling"
    native: ClassVar[int | None] = None
