"""Operations on tensors, blocking."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.compiler import is_dynamo_compiling

from commgraph.communicators import signature
from commgraph.communicators.base import Communicator
from commgraph.coordinator import traced
from commgraph.coordinator.call import Call, Timeout
from commgraph.coordinator.facts import GroupFacts

__all__ = ["TensorOperations"]


class TensorOperations(GroupFacts):
    """Tensors of a known shape: reductions, gathers, exchanges, messages."""

    # Reductions.

    def all_reduce(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> torch.Tensor:
        """Reduces x over the group.

        Args:
            x: any shape, equal on all ranks; any dtype with arithmetic. Unchanged.
            op: "sum", "avg" (not of integers), "max", "min" or "product"; taken in rank order, small floats in float32.
            timeout: deadline.

        Returns:
            A new tensor of x's shape and dtype, with the same bits on every rank.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.all_reduce(self, x, op)
        if timeout is None and (door := self._door) is not None:
            try:
                if (y := door.all_reduce(x, op)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_reduce", lambda: signature.reduced(op, x), error)
        if traced.wants(self, x):
            traced.plain(timeout)
            return traced.all_reduce(self, x, op)
        call, seconds = self._begin("all_reduce", timeout)
        x = call.tensor(x, differentiable=True)
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x
        strategy = self._link.route("all_reduce", x.shape, x.dtype, x.device)
        return self._link.run(
            call, signature.reduced(op, x), seconds, lambda tag, left: strategy.all_reduce(x, op, tag=tag, timeout=left), strategy=strategy
        )

    def all_reduce_(self, x: torch.Tensor, *, op: str = "sum", timeout: Timeout = None) -> torch.Tensor:
        """`all_reduce` into x itself, which is returned."""
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.all_reduce_(self, x, op)
        if timeout is None and (door := self._door) is not None:
            try:
                if door.all_reduce_(x, op):
                    return x
            except BaseException as error:
                self._broken_off("all_reduce_", lambda: signature.reduced(op, x), error)
        if traced.wants(self, x):
            traced.plain(timeout)
            traced.fillable(self, "all_reduce_", x, "x")
            return traced.all_reduce_(self, x, op)
        call, seconds = self._begin("all_reduce_", timeout)
        x = call.written(call.tensor(x, differentiable=True))
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x
        call.filling(x)
        strategy = self._link.route("all_reduce", x.shape, x.dtype, x.device)
        return self._link.run(
            call, signature.reduced(op, x), seconds, lambda tag, left: strategy.all_reduce_(x, op, tag=tag, timeout=left), strategy=strategy
        )

    def reduce_scatter(
        self, x: torch.Tensor, dim: int = -1, *, op: str = "sum", out: torch.Tensor | None = None, timeout: Timeout = None
    ) -> torch.Tensor:
        """Reduces x over the group and keeps this rank's piece of `dim`.

        Args:
            x: equal shapes on all ranks; `x.shape[dim]` divides by the group's size. Unchanged.
            dim: which dimension is cut, in rank order.
            op: as for `all_reduce`.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `dim` divided by the group's size.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.reduce_scatter(self, x, dim, op, out)
        if timeout is None and (door := self._door) is not None:
            try:
                if (y := door.reduce_scatter(x, dim, op, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("reduce_scatter", lambda: f"{op} {signature.describe(x)} dim={dim}", error)
        if traced.wants(self, x):
            traced.plain(timeout)
            traced.fillable(self, "reduce_scatter", out, "out")
            return traced.reduce_scatter(self, x, dim, op, out)
        call, seconds = self._begin("reduce_scatter", timeout)
        x = call.tensor(x, differentiable=True)
        dim = call.dim(x, dim)
        sizes = call.even(x.shape[dim], f"dim {dim} of x {tuple(x.shape)}")
        return self._reduce_scatter(call, x, dim, sizes, op, out, seconds)

    def reduce_scatterv(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None, *, timeout: Timeout = None
    ) -> torch.Tensor:
        """Sums x over the group and keeps this rank's piece, of uneven pieces.

        Args:
            x: equal shapes on all ranks. Unchanged.
            dim: which dimension is cut, in rank order.
            sizes: extent of each rank's piece, adding up to `x.shape[dim]`; zeros are fine; None cuts evenly.
            timeout: deadline.

        Returns:
            x's shape with `sizes[rank_in_group]` along `dim`.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.reduce_scatterv(self, x, dim, sizes)
        if traced.wants(self, x):
            traced.plain(timeout)
            return traced.reduce_scatterv(self, x, dim, sizes)
        call, seconds = self._begin("reduce_scatterv", timeout)
        x = call.tensor(x, differentiable=True)
        dim = call.dim(x, dim)
        what = f"dim {dim} of x {tuple(x.shape)}"
        pieces = call.even(x.shape[dim], what) if sizes is None else call.split(sizes, x.shape[dim], what)
        return self._reduce_scatter(call, x, dim, pieces, "sum", None, seconds)

    def _reduce_scatter(
        self, call: Call, x: torch.Tensor, dim: int, sizes: list[int], op: str, out: torch.Tensor | None, seconds: float
    ) -> torch.Tensor:
        call.op(op, x.dtype)
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        strategy = self._link.route("reduce_scatter", x.shape, x.dtype, x.device)
        result = call.out(out, _resized(x, dim, sizes[self.rank_in_group]), x, strategy.new)
        x = _apart(x, result)
        self._link.run(
            call,
            signature.scattered(op, x, dim, sizes),
            seconds,
            lambda tag, left: strategy.reduce_scatter(x, dim, sizes, op, result, tag=tag, timeout=left),
            strategy=strategy,
        )
        return result

    # Gathers.

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, out: torch.Tensor | None = None, timeout: Timeout = None) -> torch.Tensor:
        """Concatenates every rank's x along `dim`.

        Args:
            x: equal shapes on all ranks, at least 1-D. Unchanged.
            dim: where the pieces are joined, in rank order.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `dim` multiplied by the group's size.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.all_gather(self, x, dim, out)
        if timeout is None and (door := self._door) is not None:
            try:
                if (y := door.all_gather(x, dim, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_gather", lambda: f"{signature.describe(x)} dim={dim}", error)
        if traced.wants(self, x):
            traced.plain(timeout)
            traced.fillable(self, "all_gather", out, "out")
            return traced.all_gather(self, x, dim, out)
        call, seconds = self._begin("all_gather", timeout)
        x = call.tensor(x, differentiable=True)
        dim = call.dim(x, dim)
        return self._all_gather(call, x, dim, [x.shape[dim]] * self.world_size, out, seconds)

    def all_gatherv(
        self, x: torch.Tensor | Sequence[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None, *, timeout: Timeout = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Concatenates uneven pieces along `dim`.

        Args:
            x: one tensor, or a list of them with the same extent along `dim`. Shapes may differ between ranks along `dim` alone.
            dim: where the pieces are joined, in rank order.
            sizes: extent of every rank's piece; zeros are fine; None: all like this rank's.
            timeout: deadline, of the whole list.

        Returns:
            A tensor with `sum(sizes)` along `dim`, or a list of them.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.all_gatherv(self, x, dim, sizes)
        if traced.wants(self, *(x if isinstance(x, list | tuple) else (x,))):
            traced.plain(timeout)
            return traced.all_gatherv(self, x, dim, sizes)
        call, seconds = self._begin("all_gatherv", timeout)
        single = isinstance(x, torch.Tensor)
        tensors = [
            call.tensor(t, "x" if single else f"x[{i}]", differentiable=True) for i, t in enumerate([x] if single else call.several(x, "x"))
        ]
        checked = []
        for i, tensor in enumerate(tensors):
            axis = call.dim(tensor, dim)
            extent = tensor.shape[axis]
            pieces = [extent] * self.world_size if sizes is None else call.sizes(sizes)
            if pieces[self.rank_in_group] != extent:
                what = "x" if single else f"x[{i}]"
                raise call.wrong(
                    f"sizes={pieces} says {pieces[self.rank_in_group]} here; {what} {tuple(tensor.shape)} has {extent} in dim {axis}"
                )
            checked.append((tensor, axis, pieces))
        deadline = time.monotonic() + seconds
        results = [
            self._all_gather(call, tensor, axis, pieces, None, max(deadline - time.monotonic(), 0.001)) for tensor, axis, pieces in checked
        ]
        return results[0] if single else results

    def _all_gather(
        self, call: Call, x: torch.Tensor, dim: int, sizes: list[int], out: torch.Tensor | None, seconds: float
    ) -> torch.Tensor:
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        shape = _resized(x, dim, sum(sizes))
        strategy = self._link.route("all_gather", shape, x.dtype, x.device)
        result = call.out(out, shape, x, strategy.new)
        x = _apart(x, result, result.split(sizes, dim)[self.rank_in_group])
        self._link.run(
            call,
            signature.gathered(x.dtype, shape, dim, sizes),
            seconds,
            lambda tag, left: strategy.all_gather(x, dim, sizes, result, tag=tag, timeout=left),
            strategy=strategy,
        )
        return result

    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1, *, timeout: Timeout = None) -> torch.Tensor | None:
        """Concatenates every rank's x along `dim`, on one rank.

        Args:
            x: equal shapes on all ranks, at least 1-D. Unchanged.
            dst: rank in the group that gets the result.
            dim: where the pieces are joined, in rank order.
            timeout: deadline.

        Returns:
            On `dst` x's shape with `dim` multiplied by the group's size, None elsewhere.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.gather(self, x, dst, dim)
        if traced.looks_on(x):
            traced.plain(timeout)
            return traced.gather(self, x, dst, dim)
        call, seconds = self._begin("gather", timeout)
        x = call.tensor(x)
        dst = call.peer(dst, "dst")
        dim = call.dim(x, dim)
        if self.world_size == 1:
            return x
        out = None
        strategy = self._link.route("gather", x.shape, x.dtype, x.device)
        if self.rank_in_group == dst:
            out = strategy.new(_resized(x, dim, x.shape[dim] * self.world_size), x.dtype, x.device)
        pieces = None if out is None else out.split([x.shape[dim]] * self.world_size, dim)
        self._link.run(
            call,
            f"dst={dst} {signature.describe(x)} dim={dim}",
            seconds,
            lambda tag, left: strategy.gather(x, pieces, dst, tag=tag, timeout=left),
            strategy=strategy,
        )
        return out

    # Exchanges.

    def all_to_all(
        self,
        x: torch.Tensor,
        *,
        scatter_dim: int = 0,
        gather_dim: int = 0,
        input_sizes: Sequence[int] | None = None,
        output_sizes: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Cuts x along `scatter_dim`, sends piece i to rank i, and joins what came along `gather_dim` in rank order.

        Args:
            x: at least 1-D. Unchanged.
            scatter_dim: which dimension is cut.
            gather_dim: where the pieces are joined.
            input_sizes: extent along `scatter_dim` of the piece for each rank; None cuts evenly. Where the two dims differ they must be
                the same on every rank.
            output_sizes: extent along `gather_dim` of the piece from each rank. None: as even as the input; needed with `input_sizes`
                where the two dims are the same.
            out: filled and returned in place of a new tensor.
            timeout: deadline.

        Returns:
            x's shape with `scatter_dim` cut to this rank's share and `gather_dim` grown to the sum of `output_sizes`.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.all_to_all(self, x, scatter_dim, gather_dim, input_sizes, output_sizes, out)
        if timeout is None and (door := self._door) is not None and input_sizes is None and output_sizes is None:
            try:
                if (y := door.all_to_all(x, scatter_dim, gather_dim, out)) is not None:
                    return y  # type: ignore[no-any-return]  # the native module has no types
            except BaseException as error:
                self._broken_off("all_to_all", lambda: f"{signature.describe(x)} dim={scatter_dim}", error)
        if traced.wants(self, x):
            traced.plain(timeout)
            traced.fillable(self, "all_to_all", out, "out")
            return traced.all_to_all(self, x, scatter_dim, gather_dim, input_sizes, output_sizes, out)
        call, seconds = self._begin("all_to_all", timeout)
        x = call.tensor(x, differentiable=True)
        scatter_dim, gather_dim = call.dim(x, scatter_dim, "scatter_dim"), call.dim(x, gather_dim, "gather_dim")
        what = f"dim {scatter_dim} of x {tuple(x.shape)}"
        cut = (
            call.even(x.shape[scatter_dim], what)
            if input_sizes is None
            else call.split(input_sizes, x.shape[scatter_dim], what, "input_sizes")
        )
        same = scatter_dim == gather_dim
        if output_sizes is not None:
            joined = call.sizes(output_sizes, "output_sizes")
            own = cut[self.rank_in_group] if same else x.shape[gather_dim]
            if joined[self.rank_in_group] != own:
                raise call.wrong(f"output_sizes={joined} says {joined[self.rank_in_group]} for this rank's own piece, which has {own}")
        elif same and input_sizes is not None:
            raise call.wrong("input_sizes without output_sizes: what each rank sends is its own affair, so say what comes from each")
        else:
            joined = cut if same else [x.shape[gather_dim]] * self.world_size
        if self.world_size == 1:
            return x if out is None else call.out(out, x.shape, x).copy_(x)
        shape = list(x.shape)
        shape[scatter_dim] = cut[self.rank_in_group]
        shape[gather_dim] = sum(joined)
        rest = [extent for i, extent in enumerate(x.shape) if i not in (scatter_dim, gather_dim)]
        even = input_sizes is None and output_sizes is None
        # What all ranks share of the shape: not the extents that each may choose, which therefore must not choose the strategy either.
        shared = x.shape if even else rest
        strategy = self._link.route("all_to_all", shared, x.dtype, x.device)
        result = call.out(out, shape, x, strategy.new)
        x = _apart(x, result)
        sends, receives = x.split(cut, scatter_dim), result.split(joined, gather_dim)
        text = signature.all_to_all(x, shared, scatter_dim, gather_dim, None if same else cut)
        crossing = [(to.numel(), back.numel()) for to, back in zip(sends, receives, strict=True)]
        self._link.run(
            call, text, seconds, lambda tag, left: strategy.all_to_all(sends, receives, tag=tag, timeout=left), crossing, strategy
        )
        return result

    def broadcast(self, x: torch.Tensor, src: int = 0, *, timeout: Timeout = None) -> torch.Tensor:
        """Fills x on every rank with that of `src`, in place.

        Args:
            x: equal shapes and dtypes on all ranks.
            src: rank in the group whose x is sent.
            timeout: deadline.

        Returns:
            x.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.broadcast(self, x, src)
        if timeout is None and (door := self._door) is not None:
            try:
                if door.broadcast(x, src):
                    return x
            except BaseException as error:
                self._broken_off("broadcast", lambda: f"src={src} {signature.describe(x)}", error)
        if traced.wants(self, x):
            traced.plain(timeout)
            traced.fillable(self, "broadcast", x, "x")
            return traced.broadcast(self, x, src)
        call, seconds = self._begin("broadcast", timeout)
        x = call.written(call.tensor(x, differentiable=True))
        src = call.peer(src, "src")
        return self._broadcast(call, x if self.world_size == 1 else call.filling(x), src, seconds)

    def _broadcast(self, call: Call, x: torch.Tensor, src: int, seconds: float) -> torch.Tensor:
        if self.world_size > 1:
            strategy = self._link.route("broadcast", x.shape, x.dtype, x.device)
            self._link.run(
                call,
                f"src={src} {signature.describe(x)}",
                seconds,
                lambda tag, left: strategy.broadcast(x, src, tag=tag, timeout=left),
                strategy=strategy,
            )
        return x

    def barrier(self, *, timeout: Timeout = None) -> None:
        """Returns on no rank before every rank of the group has called it. Orders the hosts, not their devices."""
        if is_dynamo_compiling():
            traced.plain(timeout)
            traced.barrier(self)
            return
        if timeout is None and (door := self._door) is not None:
            try:
                if door.barrier():
                    return
            except BaseException as error:
                self._broken_off("barrier", str, error)
        if traced.looks_on():
            traced.plain(timeout)
            traced.barrier(self)
            return
        self._barrier(timeout)

    def _barrier(self, timeout: Timeout) -> None:
        """The same where torch traces, too: it is the ranks that wait, and not the program that is traced."""
        call, seconds = self._begin("barrier", timeout)
        if self.world_size > 1:
            strategy = self._link.route("barrier", (), None, torch.device("cpu"))
            self._link.run(call, "", seconds, lambda tag, left: strategy.barrier(tag=tag, timeout=left))

    # Point to point. Only the two ranks concerned count these, so they may fall between collectives as they like.

    def send(self, x: torch.Tensor, dst: int | None = None, *, timeout: Timeout = None) -> None:
        """Sends x to one rank; returns when it was taken.

        Args:
            x: any shape.
            dst: rank in the group, by default `next_in_group`.
            timeout: deadline.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            traced.send(self, x, dst)
            return
        short = self._link.messages
        if timeout is None and short is not None and short.send(self, x, self.next_in_group if dst is None else dst):
            return
        if traced.looks_on(x):
            traced.plain(timeout)
            traced.send(self, x, dst)
            return
        call, seconds = self._message("send", timeout)
        x = call.tensor(x)
        dst = call.peer(self.next_in_group if dst is None else dst, "dst", other=True)
        self._exchange(call, [x], dst, "send", seconds)

    def recv(
        self,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None = None,
        *,
        device: torch.device | str | None = None,
        out: torch.Tensor | None = None,
        timeout: Timeout = None,
    ) -> torch.Tensor:
        """Receives a tensor of a known shape and dtype.

        Args:
            size: its shape.
            dtype: its dtype.
            src: rank in the group, by default `prev_in_group`.
            device: where to put it, by default the group's device.
            out: filled and returned in place of a new tensor.
            timeout: deadline.
        """
        if is_dynamo_compiling():
            traced.plain(timeout)
            return traced.recv(self, size, dtype, src, device, out)
        short = self._link.messages
        if timeout is None and device is None and short is not None:
            result = short.receive(self, size, dtype, self.prev_in_group if src is None else src, out)
            if result is not None:
                return result
        if traced.looks_on(out):
            traced.plain(timeout)
            return traced.recv(self, size, dtype, src, device, out)
        call, seconds = self._message("recv", timeout)
        result, src = self._landing(call, size, dtype, src, device, out)
        self._exchange(call, [result], src, "recv", seconds)
        return result

    def _landing(
        self,
        call: Call,
        size: Sequence[int] | int,
        dtype: torch.dtype,
        src: int | None,
        device: torch.device | str | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, int]:
        """What is to be filled, and from whom."""
        src = call.peer(self.prev_in_group if src is None else src, "src", other=True)
        if device is None:
            device = self.device if out is None else call.tensor(out, "out").device
        return call.out(out, call.size(size), call.like(dtype, device)), src

    def _exchange(self, call: Call, tensors: Sequence[torch.Tensor], peer: int, operation: str, seconds: float) -> None:
        """Sends or receives tensors, all at once, after everything that was begun before with that peer."""
        if not tensors:
            return
        outgoing = operation == "send"
        seconds = self._link.settle((peer, outgoing), call, seconds)
        self._link.ensure_open(self.name)
        self._link.follow((peer, outgoing))
        by_strategy: dict[Communicator, list[tuple[torch.Tensor, int]]] = {}
        for x in tensors:
            by_strategy.setdefault(self._link.route(operation, x.shape, x.dtype, x.device), []).append((x, peer))
        for strategy, pairs in by_strategy.items():
            text = signature.messages(*(x for x, _ in pairs))
            number = self._link.count(signature.MESSAGE, peer, outgoing=outgoing)
            tag = signature.make_tag(signature.MESSAGE, number, text)
            left = self._link.deadline(call, strategy, seconds)
            with self._link.guard(call, f"{operation}({text}, {peer})", left):
                strategy.exchange(pairs if outgoing else [], [] if outgoing else pairs, tag=tag, timeout=left)


def _resized(x: torch.Tensor, dim: int, extent: int) -> tuple[int, ...]:
    return (*x.shape[:dim], extent, *x.shape[dim + 1 :])


def _apart(x: torch.Tensor, out: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """x, or a copy where filling `out` could change it before it was sent; it may be `own`, the view of `out` that x fills itself."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return x
    in_place = own is not None and own.data_ptr() == x.data_ptr() and own.is_contiguous() and x.is_contiguous()
    return x if in_place else x.clone()
