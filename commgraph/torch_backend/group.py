"""`ProcessGroup`: a process group of torch.distributed whose operations a World of commgraph serves."""

# torch's stub gives each method two forms and some two names; here one function serves them all.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import attrs
import torch
import torch.distributed as dist

from commgraph import compat
from commgraph.coordinator import GroupCoordinator
from commgraph.coordinator.asynchronous import submit
from commgraph.coordinator.failures import Call
from commgraph.options import CommunicatorOptions
from commgraph.platforms import CpuPlatform
from commgraph.torch_backend import monitored, sparse
from commgraph.torch_backend.arguments import copy_pieces, fill, flat, host, joined, one, reduction, seconds
from commgraph.torch_backend.work import Ended, Pending, Recorded
from commgraph.work import ANY, Work
from commgraph.world import World

__all__ = ["ProcessGroup", "make"]

Tensors = Sequence[torch.Tensor]


def make(options: Any, chosen: Any) -> ProcessGroup:
    """Make the group that torch asks for; what `register_backend` registers.

    A group of some ranks is split from the World of the default group, where commgraph serves that as well: its ranks know their hosts
    and need not meet again.

    Args:
        options: torch's `_DistributedBackendOptions`: store, ranks and deadline.
        chosen: what the user gives as `pg_options`: `CommunicatorOptions` or None.
    """
    if chosen is not None and not isinstance(chosen, CommunicatorOptions):
        raise TypeError(f"pg_options is a {type(chosen).__name__}; the backend commgraph takes commgraph.CommunicatorOptions")
    settings = chosen or CommunicatorOptions(check=dist.get_debug_level() == dist.DebugLevel.DETAIL)
    if settings.timeout is None:
        settings = attrs.evolve(settings, timeout=options.timeout)
    ranks = list(options.global_ranks_in_group)
    default = dist.group.WORLD if ranks and dist.is_initialized() else None
    if isinstance(default, ProcessGroup):
        world = default.world.split(ranks, options=settings)
    else:
        world = World.from_store(
            options.store,
            rank=options.group_rank,
            world_size=options.group_size,
            timeout=options.timeout,
            device="cpu",
            platform=CpuPlatform(),
            options=settings,
        )
    return ProcessGroup(world, options.store)


class ProcessGroup(dist.ProcessGroup):
    """A process group for host tensors. Made by torch.distributed, for the backend ``commgraph``.

    Every method has torch's name and arguments. Blocking calls of torch's functions return when the operation has ended; with
    ``async_op=True`` operations run in the order in which they were begun, and messages beside them. Tensors may have any strides and need
    not have the same shape on all ranks, as long as they have as many elements. They are filled behind autograd's back, as
    by torch's own groups.

    Errors are those of `commgraph.GroupCoordinator`. After a timeout, a mismatch or a lost peer the group is broken.

    Attributes:
        world: the World of its ranks, closed by `torch.distributed.destroy_process_group`.
    """

    def __init__(self, world: World, store: dist.Store) -> None:
        """Not for users: torch.distributed makes it."""
        super().__init__(world.rank, world.size)  # type: ignore[call-arg]  # the stub lacks the form that a class in Python may use
        self.world = world
        self._store = store
        self._group: GroupCoordinator = world.group
        self._ended = Ended()
        self._barriers = 0
        # torch's own groups leave their names to their backends, of which this one has none.
        self._name = self._description = ""
        # In place of the deadline of the World, once `set_timeout` was called.
        self._limit: timedelta | None = None

    # Facts.

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """``"commgraph"``."""
        return "commgraph"

    def name(self) -> str:
        """``"commgraph"``."""
        return "commgraph"

    def getSize(self) -> int:  # noqa: N802 - torch's name
        """Number of ranks."""
        return self.world.size

    def getRank(self) -> int:  # noqa: N802 - torch's name
        """Rank in the group."""
        return self.world.rank

    def get_group_store(self) -> dist.Store:
        """The store in which its ranks met."""
        return self._store

    def getGroupName(self) -> str:  # noqa: N802 - torch's name
        """Under which torch lists it."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802 - torch's name
        """Called by torch."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802 - torch's name
        """What the user says that it is."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802 - torch's name
        """Called by torch."""
        self._description = description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc

    @property
    def group_name(self) -> str:
        """As `getGroupName`."""
        return self._name

    @property
    def group_desc(self) -> str:
        """As `getGroupDesc`."""
        return self._description

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        """This object, which serves host tensors without a further one."""
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"a group of the backend commgraph serves host tensors, and has no backend for {device}")
        return self

    def _has_hooks(self) -> bool:
        return False

    @property
    def supports_splitting(self) -> bool:
        """Whether `split_group` works."""
        return True

    @property
    def supports_coalescing(self) -> bool:
        """False, so that torch begins the messages of a batch one by one."""
        return False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """False: tensors come from torch's allocator."""
        return False

    def _set_sequence_number_for_group(self) -> None:
        """Does nothing: calls are counted from the beginning."""

    def _get_sequence_number_for_group(self) -> int:
        """Number of collectives begun."""
        return self._group._state.sequence

    def set_timeout(self, timeout: timedelta) -> None:
        """Gives later operations another deadline."""
        self._limit = timeout

    _set_default_timeout = set_timeout

    # Lifetime.

    def shutdown(self) -> None:
        """Closes the World; waits for the other ranks for a bounded time."""
        self.world.close()

    def abort(self) -> None:
        """Ends the calls under way with an error, here and on the peers, and closes the World on this rank alone. From any thread."""
        if not self.world.closed:
            self.world._abort()
            self.world._drop()

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> ProcessGroup | None:
        """A smaller group, of ranks of this one; None on a rank that is not among them. Collective over `new_ranks`.

        Args:
            new_ranks: ranks in this group.
            timeout: deadline of its operations, in place of this group's.
            opts: `CommunicatorOptions`, in place of this group's.
            group_name, group_desc: as `torch.distributed.new_group`'s.
            device_types: host only.
        """
        if self.world.rank not in new_ranks:
            return None
        options = opts if isinstance(opts, CommunicatorOptions) else None
        made = ProcessGroup(self.world.split(new_ranks, options=options), dist.PrefixStore(f"split/{group_name}", self._store))
        if timeout is not None:
            made.set_timeout(timeout)
        made.setGroupName(group_name or "")
        made.setGroupDesc(group_desc or "")
        return made

    # Collectives. Each takes torch's lists, which hold one tensor, and torch's options, whose asyncOp says whether to begin it only.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Reduces a tensor in place. A sparse one is summed."""
        try:
            op, begin_only = opts.reduceOp, opts.asyncOp
        except AttributeError:  # allreduce(x), allreduce(x, ReduceOp.MAX)
            op, begin_only = opts or dist.ReduceOp.SUM, True
        x = one(tensors, "allreduce")
        name, factor = reduction(op)
        if factor is None and not begin_only and not x.is_sparse:
            self._group.all_reduce_(x, op=name, timeout=self._limit)
            return self._ended

        def call() -> None:
            if x.is_sparse:
                sparse.all_reduce_(self._group, x, name, self._limit)
                return
            if factor is not None:
                x.mul_(factor)
            self._group.all_reduce_(x, op=name, timeout=self._limit)

        return self._run("allreduce", call, [x], begin_only)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """Reduces several tensors in place, as one call."""
        opts = opts or _options("AllreduceCoalesced")
        xs = [host(x, "allreduce_coalesced") for x in tensors]
        name, factor = reduction(opts.reduceOp)

        def call() -> None:
            if factor is not None:
                for x in xs:
                    x.mul_(factor)
            self._group.all_reduce_(xs, op=name, timeout=self._limit)

        return self._run("allreduce_coalesced", call, xs, opts.asyncOp)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Fills a tensor with that of `opts.rootRank`."""
        if opts is None or isinstance(opts, int):  # broadcast(x, root)
            opts = _options("Broadcast", rootRank=opts, timeout=timeout)
        x = one(tensors, "broadcast")
        src = opts.rootRank
        return self._run("broadcast", lambda: self._group.broadcast(x, src, timeout=self._limit), [x], opts.asyncOp)

    def reduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Reduces a tensor, into that of `opts.rootRank`; the others are unchanged."""
        opts = opts or _options("Reduce")
        x, dst = one(tensors, "reduce"), opts.rootRank
        name, factor = reduction(opts.reduceOp)

        def call() -> None:
            result = self._group.reduce(x if factor is None else x * factor, dst, op=name, timeout=self._limit)
            if result is not None and result is not x:
                x.copy_(result)

        return self._run("reduce", call, [x], opts.asyncOp)

    def allgather(self, output_tensors: Sequence[Tensors], input_tensors: Any, opts: Any = None) -> dist.Work:
        """Fills one tensor for each rank, of which each has the size of that rank's input."""
        opts = opts or _options("Allgather")
        x, outs = one(input_tensors, "allgather"), [host(out, "allgather") for out in _only(output_tensors, "allgather")]
        self._expect(outs, "allgather")

        def call() -> None:
            copy_pieces(outs, self._gathered(x, [out.numel() for out in outs]))

        return self._run("allgather", call, outs, opts.asyncOp)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:  # noqa: A002 - torch's name
        """Fills a tensor with the inputs of all ranks, one after the other."""
        opts = opts or _options("Allgather")
        out, x = host(output, "all_gather_single"), host(input, "all_gather_single")
        self._expect_elements(out, x.numel() * self.world.size, "all_gather_single: the output")
        return self._run("all_gather_single", lambda: self._gather_into(out, x), [out], opts.asyncOp)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """`all_gather_single` of several tensors, as one call."""
        opts = opts or _options("Allgather")
        outs = [host(out, "all_gather_single_coalesced") for out in outputs]
        xs = [host(x, "all_gather_single_coalesced") for x in inputs]
        for out, x in zip(outs, xs, strict=True):
            self._expect_elements(out, x.numel() * self.world.size, "all_gather_single_coalesced: an output")

        def call() -> None:
            if len(xs) == 1:
                self._gather_into(outs[0], xs[0])
                return
            for out, values in zip(outs, self._group.all_gather([flat(x) for x in xs], 0, timeout=self._limit), strict=True):
                fill(out, values)

        return self._run("all_gather_single_coalesced", call, outs, opts.asyncOp)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(self, output_lists: Sequence[Tensors], input_list: Tensors, opts: Any = None) -> dist.Work:
        """`allgather` of several tensors, as one call: `output_lists` has a list for each rank."""
        opts = opts or _options("Allgather")
        xs = [host(x, "allgather_coalesced") for x in input_list]
        lists = [[host(out, "allgather_coalesced") for out in outs] for outs in output_lists]
        self._expect(lists, "allgather_coalesced")

        def call() -> None:
            for number, values in enumerate(self._group.all_gather([flat(x) for x in xs], 0, timeout=self._limit)):
                copy_pieces([outs[number] for outs in lists], values)

        return self._run("allgather_coalesced", call, [out for outs in lists for out in outs], opts.asyncOp)

    def gather(self, output_tensors: Sequence[Tensors], input_tensors: Any, opts: Any = None) -> dist.Work:
        """Fills one tensor for each rank, on `opts.rootRank`."""
        opts = opts or _options("Gather")
        x, dst = one(input_tensors, "gather"), opts.rootRank
        outs = [host(out, "gather") for out in _only(output_tensors, "gather")] if dst == self.world.rank else []
        if dst == self.world.rank:
            self._expect(outs, "gather")

        def call() -> None:
            values = self._group.gather(flat(x), dst, 0, timeout=self._limit)
            if values is not None:
                copy_pieces(outs, values)

        return self._run("gather", call, outs, opts.asyncOp)

    def scatter(self, output_tensors: Any, input_tensors: Sequence[Tensors], opts: Any = None) -> dist.Work:
        """Gives each rank one tensor of the list that `opts.rootRank` has."""
        opts = opts or _options("Scatter")
        out, src = one(output_tensors, "scatter"), opts.rootRank
        given = _only(input_tensors, "scatter") if src == self.world.rank else None
        if given is not None:
            self._expect(given, "scatter")

        def call() -> None:
            fill(out, self._group.scatter(None if given is None else joined(given, "scatter"), src, 0, timeout=self._limit))

        return self._run("scatter", call, [out], opts.asyncOp)

    def reduce_scatter(self, output_tensors: Any, input_tensors: Sequence[Tensors], opts: Any = None) -> dist.Work:
        """Reduces a list of one tensor for each rank, and gives each rank its own; their sizes may differ."""
        opts = opts or _options("ReduceScatter")
        out, given = one(output_tensors, "reduce_scatter"), _only(input_tensors, "reduce_scatter")
        self._expect(given, "reduce_scatter")
        name, factor = reduction(opts.reduceOp)

        def call() -> None:
            values = joined(given, "reduce_scatter")
            if factor is not None:
                values.mul_(factor)
            sizes = [x.numel() for x in given]
            fill(out, self._group.reduce_scatterv(values, 0, sizes, op=name, timeout=self._limit))

        return self._run("reduce_scatter", call, [out], opts.asyncOp)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:  # noqa: A002 - torch's name
        """Reduces a tensor, and gives each rank its part of the elements."""
        opts = opts or _options("ReduceScatter")
        out, x = host(output, "reduce_scatter_single"), host(input, "reduce_scatter_single")
        self._expect_elements(x, out.numel() * self.world.size, "reduce_scatter_single: the input")
        name, factor = reduction(opts.reduceOp)
        return self._run("reduce_scatter_single", lambda: self._scatter_into(out, x, name, factor), [out], opts.asyncOp)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """`reduce_scatter_single` of several tensors, as one call."""
        opts = opts or _options("ReduceScatter")
        outs = [host(out, "reduce_scatter_single_coalesced") for out in outputs]
        xs = [host(x, "reduce_scatter_single_coalesced") for x in inputs]
        for out, x in zip(outs, xs, strict=True):
            self._expect_elements(x, out.numel() * self.world.size, "reduce_scatter_single_coalesced: an input")
        name, factor = reduction(opts.reduceOp)

        def call() -> None:
            if len(xs) == 1:
                self._scatter_into(outs[0], xs[0], name, factor)
                return
            given = [flat(x) if factor is None else flat(x) * factor for x in xs]
            for out, values in zip(outs, self._group.reduce_scatter(given, 0, op=name, timeout=self._limit), strict=True):
                fill(out, values)

        return self._run("reduce_scatter_single_coalesced", call, outs, opts.asyncOp)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> dist.Work:
        """Sends one tensor to each rank, and fills one from each; their sizes may differ."""
        opts = opts or _options("AllToAll")
        outs = [host(out, "alltoall") for out in output_tensors]
        self._expect(outs, "alltoall")
        self._expect(input_tensors, "alltoall")

        def call() -> None:
            sizes = [x.numel() for x in input_tensors], [out.numel() for out in outs]
            copy_pieces(outs, self._exchanged(joined(input_tensors, "alltoall"), *sizes, None))

        return self._run("alltoall", call, outs, opts.asyncOp)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch's name
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> dist.Work:
        """Cuts a tensor along its first dimension, sends a piece to each rank, and joins what comes; no sizes cut evenly."""
        opts = opts or _options("AllToAll")
        out, x = host(output, "all_to_all_single"), host(input, "all_to_all_single")
        received = self._pieces(out, output_split_sizes, "output")
        sent = self._pieces(x, input_split_sizes, "input")

        def call() -> None:
            into = flat(out) if out.is_contiguous() else None
            fill(out, self._exchanged(flat(x), sent, received, into))

        return self._run("all_to_all_single", call, [out], opts.asyncOp)

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> dist.Work:
        """Waits for every rank."""
        opts = opts or _options("Barrier")
        limit = seconds(opts.timeout) or self._limit
        return self._run("barrier", lambda: self._group.barrier(timeout=limit), [], opts.asyncOp)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Waits for every rank, and names those that did not come. Through the store, so also beside a collective that hangs.

        Args:
            timeout: deadline; None: that of the group.
            wait_all_ranks: let rank 0 look for all that are missing, and not only for the first.

        Raises:
            RuntimeError: on rank 0, which ranks did not come; on the others, that rank 0 gave up.
        """
        self._barriers += 1
        store = dist.PrefixStore(f"monitored/{self._barriers}", self._store)
        limit = timeout if timeout is not None else self._limit or timedelta(seconds=self._group._state.timeouts.host)
        monitored.barrier(store, self.world.rank, self.world.size, limit, wait_all_ranks)

    # Messages.

    def send(self, tensors: Any, dst: int, tag: int = 0) -> dist.Work:
        """Sends a tensor to a rank."""
        x = one(tensors, "send")
        return Pending(self._group.isend(flat(x), dst, tag=tag, timeout=self._limit), [x])

    def recv(self, tensors: Any, src: int, tag: int = 0) -> dist.Work:
        """Fills a tensor with the next one of that tag from a rank."""
        return self._receive(one(tensors, "recv"), src, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        """Fills a tensor with the next one of that tag from any rank."""
        return self._receive(one(tensors, "recv_anysource"), None, tag)

    def _receive(self, x: torch.Tensor, src: int | None, tag: int) -> dist.Work:
        out = flat(x) if x.is_contiguous() else torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        begun: Work[Any] = self._group.irecv(
            [x.numel()],
            x.dtype,
            ANY if src is None else src,
            tag=tag,
            out=out,
            timeout=self._limit,
        )
        return Received(begun, x, out, src)

    # Parts of the above.

    def _run(self, name: str, call: Callable[[], object], tensors: Tensors, begin_only: bool) -> dist.Work:
        """Make a call, or begin it, in the lane of the group's collectives."""
        if not begin_only:
            call()
            return self._ended
        group = self._group
        state = group._state
        state.ensure_open(group.name)
        recorded = Recorded(call)
        begun: Work[Any] = Work(Call(group.name, name, state.members, state.sequence), [submit(group, None, recorded)], _nothing)
        return Pending(begun, tensors, recorded)

    def _gathered(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if all(size == x.numel() for size in sizes):
            return self._group.all_gather(flat(x), 0, timeout=self._limit)
        values = self._group.all_gatherv(flat(x), 0, sizes, timeout=self._limit)
        assert isinstance(values, torch.Tensor)
        return values

    def _gather_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        into = flat(out) if out.is_contiguous() else None
        fill(out, self._group.all_gather(flat(x), 0, out=into, timeout=self._limit))

    def _scatter_into(self, out: torch.Tensor, x: torch.Tensor, name: str, factor: Any) -> None:
        into = flat(out) if out.is_contiguous() else None
        values = flat(x) if factor is None else flat(x) * factor
        fill(out, self._group.reduce_scatter(values, 0, op=name, out=into, timeout=self._limit))

    def _exchanged(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int], out: torch.Tensor | None) -> torch.Tensor:
        return self._group.all_to_all(x, input_sizes=sent, output_sizes=received, out=out, timeout=self._limit)

    def _pieces(self, x: torch.Tensor, rows: Sequence[int] | None, what: str) -> list[int]:
        """Return the elements of each rank's piece of a tensor that is cut along its first dimension."""
        extent, n = (x.shape[0] if x.dim() else 1), self.world.size
        if not rows:
            if extent % n:
                raise ValueError(f"all_to_all_single: {extent} rows of the {what} do not divide by {n} ranks; give the sizes of its pieces")
            rows = [extent // n] * n
        if len(rows) != n or sum(rows) != extent:
            raise ValueError(f"all_to_all_single: sizes {list(rows)} of the {what}; {n} are needed, which add up to its {extent} rows")
        return [count * (x.numel() // extent if extent else 0) for count in rows]

    def _expect(self, pieces: Sequence[Any], what: str) -> None:
        if len(pieces) != self.world.size:
            raise ValueError(f"{what}: {len(pieces)} tensors for {self.world.size} ranks")

    def _expect_elements(self, x: torch.Tensor, elements: int, what: str) -> None:
        if x.numel() != elements:
            raise ValueError(f"{what} {tuple(x.shape)} has {x.numel()} elements; {elements} are needed for {self.world.size} ranks")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} holds connections of this process and cannot be pickled")

    def __repr__(self) -> str:
        return f"<commgraph.torch_backend.ProcessGroup: rank {self.world.rank} of {self.world.size}>"


class Received(Pending):
    """A message that fills a tensor."""

    def __init__(self, begun: Work[Any], x: torch.Tensor, out: torch.Tensor, src: int | None) -> None:
        """Of a receive into `out`, which has the elements of x; from any rank where `src` is None."""
        super().__init__(begun, [x], source=(lambda result: result[1]) if src is None else (lambda _: src))
        self._out = out

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """As `Pending.wait`."""
        super().wait(timeout)
        fill(self._tensors[0], self._out)
        return True


def _nothing(_: object) -> None:
    """The result of a call that fills tensors."""


def _only(lists: Any, what: str) -> Sequence[torch.Tensor]:
    """Return the tensors of a call that torch gives as a list of one list."""
    if len(lists) == 1 and not isinstance(lists[0], torch.Tensor):
        found: Sequence[torch.Tensor] = lists[0]
        return found
    if lists and all(isinstance(x, torch.Tensor) for x in lists):
        return list(lists)
    raise ValueError(f"{what}: {len(lists)} lists of tensors; a group of commgraph takes one a call")


def _options(kind: str, **fields: Any) -> Any:
    """Make torch's options of an operation, with the fields that are given."""
    options = compat.operation_options(kind)
    for name, value in fields.items():
        if value is not None:
            setattr(options, name, value)
    return options
