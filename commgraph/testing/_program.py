"""Programs of collective operations as plain values: what `commgraph.testing.strategies.programs` draws.

Values only: nothing here imports torch before it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from commgraph.layout import Layout

if TYPE_CHECKING:
    import torch

    from commgraph.context import ParallelContext
    from commgraph.coordinator import GroupCoordinator
    from commgraph.work import Work
    from commgraph.world import World

__all__ = ["LATER", "OPERATIONS", "STRIDES", "Program", "Step", "TensorSpec", "fill"]

STRIDES = ("plain", "transposed", "sliced", "expanded")

OPERATIONS = (
    "all_reduce",
    "all_reduce_",
    "all_gather",
    "all_gatherv",
    "all_gatherv_list",
    "reduce_scatter",
    "reduce_scatterv",
    "all_to_all",
    "all_to_allv",
    "gather",
    "gatherv",
    "scatter",
    "scatterv",
    "reduce",
    "broadcast",
    "ring",
    "pair",
    "barrier",
    "broadcast_object",
    "broadcast_object_list",
    "all_gather_object",
    "object_ring",
    "broadcast_tensor_dict",
    "tensor_dict_ring",
    "dispatch",
    "combine",
)
"""A step's operations. In ``ring`` every rank sends to the next and receives from the previous; in ``pair`` one sends to one other."""

LATER = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "all_to_allv",
    "gather",
    "gatherv",
    "broadcast",
    "barrier",
    "ring",
    "pair",
    "tensor_dict_ring",
)
"""Operations that can be begun in one step and waited for in a later one."""


@attrs.frozen
class TensorSpec:
    """A tensor to be made.

    Attributes:
        dtype: name of its dtype, without ``torch.``.
        shape: its shape.
        strides: how it lies in memory: one of `STRIDES`.
        bits: random bits (NaN included), and not small numbers with which a reduction does not overflow.
    """

    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    strides: str = "plain"
    bits: bool = False

    def make(self, seed: int) -> torch.Tensor:
        """Return the tensor; equal for equal seeds, whatever the modes and defaults of torch."""
        from commgraph import ambient

        with ambient.shelter():
            return self._make(seed)

    def _make(self, seed: int) -> torch.Tensor:
        if not self.shape:
            return self._dense((), seed)
        if self.strides == "transposed":
            return self._dense(self.shape[::-1], seed).permute(*range(len(self.shape) - 1, -1, -1))
        if self.strides == "sliced":
            # Its data do not begin at the start of its memory either.
            return self._dense((*self.shape[:-1], 2 * self.shape[-1] + 1), seed)[..., 1::2]
        if self.strides == "expanded":
            return self._dense((min(self.shape[0], 1), *self.shape[1:]), seed).expand(self.shape)
        return self._dense(self.shape, seed)

    def _dense(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        import torch

        random = torch.Generator("cpu").manual_seed(seed)
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype == torch.bool:
            return torch.randint(2, shape, generator=random, device="cpu").bool()
        if self.bits or not (dtype.is_floating_point or dtype.is_complex):
            data = torch.randint(256, (*shape, dtype.itemsize), generator=random, device="cpu", dtype=torch.uint8)
            return data.view(dtype).reshape(shape)
        if dtype.is_complex:
            real, imag = [torch.randn(shape, generator=random, dtype=torch.float32, device="cpu") for _ in range(2)]
            return torch.complex(real, imag).to(dtype)
        if dtype.itemsize > 1:
            return torch.randn(shape, generator=random, device="cpu", dtype=torch.float64).to(dtype)
        # Dtypes of few bits: small numbers, and powers of two for a dtype that has no others.
        few = torch.randint(-3, 4, shape, generator=random, device="cpu").float()
        return (few.exp2() if dtype == torch.float8_e8m0fnu else few / 2).to(dtype)


@attrs.frozen
class Step:
    """One operation on one group, the same in every rank's program. An operation ignores the attributes that it does not need.

    Attributes:
        operation: one of `OPERATIONS`.
        group: name of the group.
        tensor: input of each rank, or its piece of that. Values differ between ranks.
        dim, other_dim: as given to the operation (`other_dim`: where `all_to_all` joins).
        op: of a reduction.
        root: source or destination, modulo the size of the group.
        hop: how far from `root` the peer of a ``pair`` is.
        sizes: uneven extents; ranks and pairs of ranks take theirs in turn.
        out: whether the result goes to a tensor that the caller gives; of ``scatter`` whether all ranks give one.
        tree: a dict of tensor specs, objects and dicts; for objects its whole is the object.
        gather: the all-gather group of ``tensor_dict_ring``, None for none.
        override: its ``all_gather_tensors``.
        later: of one of `LATER`, after how many further steps it is waited for; None: it blocks.
        batch: whether a ``ring`` that does not block is one `batch`, and not a send and a receive.
    """

    operation: str
    group: str
    tensor: TensorSpec = TensorSpec()
    dim: int = 0
    other_dim: int = 0
    op: str = "sum"
    root: int = 0
    hop: int = 1
    sizes: tuple[int, ...] = (1,)
    out: bool = False
    tree: Mapping[Any, Any] = attrs.field(factory=dict)
    gather: str | None = None
    override: Mapping[str, bool] | None = None
    later: int | None = None
    batch: bool = False

    def extent(self, i: int) -> int:
        """Return the uneven size of rank i."""
        return self.sizes[i % len(self.sizes)]

    def pair_size(self, i: int, j: int) -> int:
        """Return the uneven size of the piece that rank i sends to rank j."""
        return self.sizes[(i + 2 * j) % len(self.sizes)]

    def extents(self, n: int, i: int) -> tuple[int, ...]:
        """Return the shape of the input of rank i of n."""
        shape, operation = list(self.tensor.shape), self.operation
        if operation in ("reduce_scatter", "all_to_all", "scatter"):
            shape[self.dim] *= n
        elif operation in ("all_gatherv", "all_gatherv_list", "gatherv"):
            shape[self.dim] = self.extent(i)
        elif operation in ("dispatch", "combine"):
            shape[0] = self.extent(i)
        elif operation in ("reduce_scatterv", "scatterv"):
            shape[self.dim] = sum(map(self.extent, range(n)))
        elif operation == "all_to_allv" and self.same_dims:
            shape[self.dim] = sum(self.pair_size(i, j) for j in range(n))
        elif operation == "all_to_allv":
            shape[self.dim] = sum(map(self.extent, range(n)))
            shape[self.other_dim] = self.extent(i + 1)
        return tuple(shape)

    @property
    def same_dims(self) -> bool:
        """Whether `all_to_all` cuts and joins the same dimension."""
        return (self.dim - self.other_dim) % max(len(self.tensor.shape), 1) == 0

    def given(self, n: int, i: int, seed: int) -> torch.Tensor:
        """Return the tensor of rank i of n; `seed` differs between ranks."""
        return attrs.evolve(self.tensor, shape=self.extents(n, i)).make(seed)

    def run(self, group: GroupCoordinator, seed: Callable[[int], int], gather: GroupCoordinator | None = None) -> tuple[Any, Any]:
        """Run the step on this rank, or begin it.

        Args:
            group: the coordinator.
            seed: global rank -> seed.
            gather: the all-gather group of ``tensor_dict_ring``.

        Returns:
            The input and the result; of an operation that does not block, a callable that waits for the result.
        """
        n, me, operation = group.world_size, group.rank_in_group, self.operation
        root = self.root % n
        mine = seed(group.rank)
        if operation == "barrier":
            if self.later is not None:
                return None, group.barrier_async().wait
            group.barrier()
            return None, None
        if "object" in operation:
            obj = {"rank": group.rank, "value": fill(self.tree, mine)}
            return obj, self._run_objects(group, obj, root)
        if operation == "broadcast_tensor_dict":
            tree = fill(self.tree, mine) if me == root else None
            return tree, group.broadcast_tensor_dict(tree, root)
        if operation == "tensor_dict_ring":
            # Ranks of the all-gather group hold the same dict.
            tree = fill(self.tree, seed(group.rank if gather is None else gather.first_rank))
            if self.later is not None:
                return tree, self._ring_later(
                    group,
                    lambda: group.isend_tensor_dict(tree, None, gather, self.override),
                    lambda: group.irecv_tensor_dict(None, gather, self.override),
                )
            return tree, self._ring(
                group,
                lambda: group.send_tensor_dict(tree, None, gather, self.override),
                lambda: group.recv_tensor_dict(None, gather, self.override),
            )
        x = self.given(n, me, mine)
        return x, self._run_tensors(group, x, root) if self.later is None else self._begin(group, x, root)

    def _begin(self, group: GroupCoordinator, x: torch.Tensor, root: int) -> Callable[[], Any]:
        n, me, dim, operation = group.world_size, group.rank_in_group, self.dim, self.operation
        if operation == "all_reduce":
            return group.all_reduce_async(x, op=self.op).wait
        if operation == "all_gather":
            return group.all_gather_async(x, dim, out=self._out(x, dim, n * x.shape[dim])).wait
        if operation == "reduce_scatter":
            return group.reduce_scatter_async(x, dim, op=self.op, out=self._out(x, dim, x.shape[dim] // n)).wait
        if operation in ("all_to_all", "all_to_allv"):
            return group.all_to_all_async(x, scatter_dim=dim, gather_dim=self.other_dim, **self._cuts(n, me)).wait
        if operation in ("gather", "gatherv"):
            return group.gather_async(x, root, dim, sizes=self._uneven(n)).wait
        if operation == "broadcast":
            return group.broadcast_async(x, root).wait
        into = self._out(x, 0, x.shape[0]) if x.dim() else None
        if operation == "ring" and self.batch and into is not None and n > 1:
            from commgraph.work import Recv, Send

            # The receive first: a batch may have any order.
            both = group.batch([Recv(into), Send(x)])
            return lambda: both.wait()[0]
        if operation == "ring":
            return self._ring_later(group, lambda: group.isend(x), lambda: group.irecv(x.shape, x.dtype, out=into))
        to = self._partner(n, root)
        if n > 1 and me == root:
            return group.isend(x, to).wait
        return group.irecv(x.shape, x.dtype, root, out=into).wait if n > 1 and me == to else lambda: None

    def _uneven(self, n: int) -> list[int] | None:
        """The sizes of an operation whose pieces are uneven."""
        return [self.extent(i) for i in range(n)] if self.operation.endswith("v") else None

    def _cuts(self, n: int, me: int) -> dict[str, Any]:
        """The sizes of an `all_to_all`."""
        if self.operation == "all_to_all":
            return {}
        if self.same_dims:
            return {
                "input_sizes": [self.pair_size(me, j) for j in range(n)],
                "output_sizes": [self.pair_size(j, me) for j in range(n)],
            }
        return {"input_sizes": self._uneven(n), "output_sizes": [self.extent(j + 1) for j in range(n)]}

    @staticmethod
    def _ring_later(group: GroupCoordinator, send: Callable[[], Work[None]], receive: Callable[[], Work[Any]]) -> Callable[[], Any]:
        if group.world_size == 1:
            return lambda: None
        sent, received = send(), receive()

        def wait() -> Any:
            result = received.wait()
            sent.wait()
            return result

        return wait

    def _partner(self, n: int, root: int) -> int:
        return (root + 1 + self.hop % max(n - 1, 1)) % n

    def _run_objects(self, group: GroupCoordinator, obj: Any, root: int) -> Any:
        if self.operation == "broadcast_object":
            return group.broadcast_object(obj if group.rank_in_group == root else None, root)
        if self.operation == "broadcast_object_list":
            return group.broadcast_object_list([obj, group.rank], root)
        if self.operation == "all_gather_object":
            return group.all_gather_object(obj)
        return self._ring(group, lambda: group.send_object(obj, group.next_in_group), lambda: group.recv_object(group.prev_in_group))

    def _run_tensors(self, group: GroupCoordinator, x: torch.Tensor, root: int) -> Any:
        n, me, dim, operation = group.world_size, group.rank_in_group, self.dim, self.operation
        spread = [self.extent(i) for i in range(n)]
        if operation == "all_reduce":
            return group.all_reduce(x, op=self.op)
        if operation == "all_reduce_":
            return group.all_reduce_(x, op=self.op)
        if operation == "all_gather":
            return group.all_gather(x, dim, out=self._out(x, dim, n * x.shape[dim]))
        if operation == "all_gatherv":
            return group.all_gatherv(x, dim, spread)
        if operation == "all_gatherv_list":
            return group.all_gatherv([x, x.clone()], dim, spread)
        if operation == "reduce_scatter":
            return group.reduce_scatter(x, dim, op=self.op, out=self._out(x, dim, x.shape[dim] // n))
        if operation == "reduce_scatterv":
            return group.reduce_scatterv(x, dim, spread, op=self.op)
        if operation in ("all_to_all", "all_to_allv"):
            return group.all_to_all(x, scatter_dim=dim, gather_dim=self.other_dim, **self._cuts(n, me))
        if operation in ("gather", "gatherv"):
            return group.gather(x, root, dim, sizes=self._uneven(n))
        if operation in ("scatter", "scatterv"):
            # Elsewhere than on the root the input is None, or a tensor of which only the shape counts.
            if me != root and not self.out:
                return group.scatter(None, root, dim)
            return group.scatter(x, root, dim, sizes=self._uneven(n))
        if operation == "reduce":
            return group.reduce(x, root, op=self.op)
        if operation == "broadcast":
            return group.broadcast(x, root)
        if operation in ("dispatch", "combine"):
            sent = group.dispatch(x, x.new_zeros(x.shape[0], 4), sizes=spread if self.out else None, extra_tensors=[x])
            return [sent[0], sent[2]] if operation == "dispatch" else group.combine(sent[0], sent)
        into = self._out(x, 0, x.shape[0]) if x.dim() else None
        if operation == "ring":
            return self._ring(group, lambda: group.send(x), lambda: group.recv(x.shape, x.dtype, out=into))
        assert operation == "pair", operation
        to = self._partner(n, root)
        if n > 1 and me == root:
            group.send(x, to)
        elif n > 1 and me == to:
            return group.recv(x.shape, x.dtype, root, out=into)
        return None

    @staticmethod
    def _ring(group: GroupCoordinator, send: Callable[[], None], receive: Callable[[], Any]) -> Any:
        if group.world_size == 1:
            return None
        # A send may wait for its receiver, so one rank has to send first.
        if group.is_first_rank:
            send()
            return receive()
        received = receive()
        send()
        return received

    def _out(self, x: torch.Tensor, dim: int, extent: int) -> torch.Tensor | None:
        if not self.out:
            return None
        shape = list(x.shape)
        shape[dim] = extent
        # Not contiguous, and filled with other values.
        return attrs.evolve(self.tensor, shape=tuple(shape), strides="transposed", bits=False).make(0)


@attrs.frozen
class Program:
    """A layout and what its ranks do, in order. Call it with a `World`, e.g. ``spmd(program, program.world_size)``.

    Attributes:
        layout: the groups.
        steps: the operations.
    """

    layout: Layout
    steps: tuple[Step, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @staticmethod
    def seed(index: int, rank: int) -> int:
        """Return the seed of the values of a rank in a step."""
        return 1 + index * 4099 + rank * 17

    def __call__(self, world: World) -> list[tuple[Any, Any]]:
        """Run it on one rank.

        Returns:
            For each step the input and the result of this rank.
        """
        with world.context(self.layout, name="program") as context:
            return self.perform(context)

    def perform(self, context: ParallelContext) -> list[tuple[Any, Any]]:
        """Run it on one rank of an existing context; return as a call does."""
        done: list[tuple[Any, Any]] = []
        awaited: dict[int, list[int]] = {}
        for index, step in enumerate(self.steps):
            gather = None if step.gather is None else context[step.gather]
            done.append(step.run(context[step.group], partial(self.seed, index), gather))
            if step.later is not None:
                awaited.setdefault(min(index + step.later, len(self.steps) - 1), []).append(index)
            for begun in awaited.pop(index, ()):
                given, wait = done[begun]
                done[begun] = given, wait()
        return done


def fill(tree: Any, seed: int) -> Any:
    """Return `tree` with a tensor for each `TensorSpec`."""
    if isinstance(tree, TensorSpec):
        return tree.make(seed)
    return {key: fill(value, seed + 1 + i) for i, (key, value) in enumerate(tree.items())} if isinstance(tree, Mapping) else tree
