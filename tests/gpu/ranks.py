"""One rank of a check on a GPU that several processes share: ``python -m tests.gpu.ranks CHECK RANK SIZE FILE``.

The ranks meet at FILE. What a check has to say it prints, a line each that begins with "#"; it ends with code 0 where all was well. Without
a GPU (COMMGRAPH_GPU_REHEARSAL=1) the checks run as far as they can on the host, so that a mistake in them shows before a GPU is at hand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph import compat
from commgraph.accelerators.kernel_table import KERNELS, KernelTable, Row, Step
from commgraph.accelerators.torch_backend import TorchCommunicator

REHEARSAL = bool(os.environ.get("COMMGRAPH_GPU_REHEARSAL"))
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)
REPLAYS = 20 if REHEARSAL else 1000
SIZES = (16, 48, 1024, 4096, 100_000 * 16, 1 << 20, (8 << 20) + 16)


class OneGpu(cg.CudaPlatform):
    """CUDA that does not ask for links between devices: there is one, and what is measured is whose turn it is."""

    linked = 0.0


class Shared(OneGpu):
    """CUDA whose ranks say that they share no GPU, though they do: NCCL and symmetric memory can be told to bear with it."""

    def identity(self, device: torch.device) -> str:
        return f"{super().identity(device)}, process {os.getpid()}"


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def sync() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def platform(kind: type[cg.CudaPlatform]) -> cg.Platform:
    return cg.CpuPlatform() if REHEARSAL else kind()


def forced(kernel: str, size: int) -> KernelTable:
    """A table that names one kernel wherever it can serve."""
    capability = platform(cg.CudaPlatform).capability(DEVICE) or "9.0"
    rows = [Row(capability, size, op, "any", (Step(1 << 40, kernel),)) for op, kernels in KERNELS.items() if kernel in kernels]
    return KernelTable(rows)


@contextlib.contextmanager
def context(world: cg.World, name: str, **options: Any) -> Iterator[cg.ParallelContext]:
    """One whose kernels serve, and whose other calls go by way of the host: no NCCL, which refuses a GPU that is shared."""
    given = cg.CommunicatorOptions(backend="gloo", timeout=timedelta(seconds=60), **options)
    with world.context(cg.Layout(world.size, tp=world.size), name=name, options=given, platform=platform(OneGpu)) as made:
        yield made


def serves(group: cg.GroupCoordinator, operation: str = "all_reduce") -> None:
    if not REHEARSAL:
        assert group.communicators[operation][0] == "custom_all_reduce", group.communicators


def numbers(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in every dtype; the same wherever they are made."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-8, 9, (numel,), generator=generator).to(dtype)


def alike(group: cg.GroupCoordinator, x: torch.Tensor) -> None:
    """The same bits on every rank."""
    bits = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    assert len(set(group.all_gather_object(bits))) == 1, "the ranks' results differ"


# Checks.


def kernels(world: cg.World) -> None:
    """Every kernel against one process, for sizes that fit its buffer and sizes that go through in pieces; the same bits on all ranks."""
    n = world.size
    for kernel in ("one_shot", "two_shot", "multimem"):
        with context(world, kernel, custom_all_reduce=forced(kernel, n), custom_all_reduce_bytes=1 << 20) as ctx:
            tp = ctx.tp
            if world.rank == 0:
                for line in ctx.explain().splitlines():
                    if "custom_all_reduce" in line:
                        say(f"{n} ranks, {kernel}: {line.strip()}")
            if kernel == "multimem" and "without multicast" in ctx.explain():
                continue
            if kernel != "multimem":
                serves(tp)
            for dtype in (torch.float32, torch.bfloat16):
                for nbytes in SIZES:
                    numel = nbytes // dtype.itemsize
                    x = numbers(world.rank, numel, dtype).to(DEVICE)
                    wanted = sum(numbers(rank, numel, torch.float64) for rank in range(n))
                    before = x.clone()
                    y = tp.all_reduce(x)
                    assert torch.equal(y.double().cpu(), wanted), f"{kernel} {dtype} {nbytes}: wrong sum"
                    assert torch.equal(x, before), "its input was changed"
                    assert tp.all_reduce_(x) is x
                    assert torch.equal(x.double().cpu(), wanted), f"{kernel} {dtype} {nbytes}: wrong sum in place"
                # Sums that are rounded: every rank the same bits all the same.
                z = torch.randn(4096, generator=torch.Generator().manual_seed(world.rank)).to(dtype).to(DEVICE)
                alike(tp, tp.all_reduce(z))
                assert torch.allclose(tp.all_reduce(z, op="avg").float() * n, tp.all_reduce(z).float(), rtol=0.02, atol=0.02)
                # Lying in memory in another way, and at an address of its own.
                wide = numbers(world.rank, 128 * 64, dtype, 7).view(128, 64).to(DEVICE)
                summed = sum(numbers(rank, 128 * 64, torch.float64, 7) for rank in range(n)).view(128, 64)  # type: ignore[union-attr]  # n is not 0
                assert torch.equal(tp.all_reduce(wide.t()).double().cpu(), summed.t())
                assert torch.equal(tp.all_reduce(wide.view(-1)[1:-7]).double().cpu(), summed.reshape(-1)[1:-7])
                for dim in (0, 1):
                    got = tp.reduce_scatter(wide, dim)
                    assert torch.equal(got.double().cpu(), summed.tensor_split(n, dim)[world.rank]), f"reduce_scatter over {dim}"
                    piece = wide.tensor_split(n, dim)[world.rank]
                    parts = [numbers(rank, 128 * 64, dtype, 7).view(128, 64).tensor_split(n, dim)[rank] for rank in range(n)]
                    assert torch.equal(tp.all_gather(piece, dim).cpu(), torch.cat(parts, dim)), f"all_gather over {dim}"
            # What no kernel serves goes by way of the host.
            assert tp.all_reduce(torch.ones(3, dtype=torch.int64, device=DEVICE)).tolist() == [n] * 3
            assert tp.all_reduce(torch.full((8,), 1.0 + world.rank, device=DEVICE), op="max").tolist() == [float(n)] * 8
            sync()


def graphs(world: cg.World) -> None:
    """One graph with calls of two contexts, captured while a third exists, and replayed; each replay has other inputs."""
    n = world.size
    with context(world, "target") as target, context(world, "draft") as draft, context(world, "idle") as idle:
        idle.warmup()
        target.warmup()
        draft.warmup()
        x = torch.zeros(4096, device=DEVICE)
        y = torch.zeros(64, 32, device=DEVICE, dtype=torch.bfloat16)
        if REHEARSAL:
            return
        serves(target.tp)
        graph = torch.cuda.CUDAGraph()
        with target.graph_capture() as outer, draft.graph_capture(stream=outer.stream):
            # Once before, as torch asks for: what is made at first use must not be made in the graph.
            target.tp.all_reduce(x)
            draft.tp.all_reduce(y)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=outer.stream):
                a = target.tp.all_reduce(x) + 1
                b = draft.tp.all_reduce(y)
                work = target.tp.all_reduce_async(a)
                c = b * 2
                d = work.wait()
        replays = REPLAYS if n == 2 else REPLAYS // 5  # processes that share a device wait for each other's slices of its time
        started = time.monotonic()
        for i in range(replays):
            x.fill_(float(i % 100 + world.rank))
            y.fill_(float(i % 7 + world.rank))
            graph.replay()
            if i % 100 == 0 or i == replays - 1:
                first = n * (i % 100) + n * (n - 1) / 2 + 1
                assert bool((a == first).all()), f"replay {i}: {a[0].item()} where {first} belongs"
                assert bool((c == 2 * (n * (i % 7) + n * (n - 1) / 2)).all()), f"replay {i}"
                assert bool((d == n * first).all()), f"replay {i}: asynchronous"
        torch.cuda.synchronize()
        if world.rank == 0:
            say(f"{n} ranks: {replays} replays of a graph with 3 all-reduces of 2 contexts in {time.monotonic() - started:.1f} s")
        # Eagerly beside it, as ever.
        assert target.tp.all_reduce(torch.ones(8, device=DEVICE)).tolist() == [float(n)] * 8
        del graph


def refused(world: cg.World) -> None:
    """While a graph is captured, what goes by way of the host is refused and not run eagerly; an error in a capture reaches all ranks."""
    with context(world, "a") as ctx:
        ctx.warmup()
        if REHEARSAL:
            return
        graph = torch.cuda.CUDAGraph()
        whole = torch.ones(8, device=DEVICE, dtype=torch.int64)
        with ctx.graph_capture() as captured:
            torch.cuda.synchronize()
            with (
                torch.cuda.graph(graph, stream=captured.stream),
                pytest.raises(cg.UnsupportedTensorError, match="a graph is being captured"),
            ):
                ctx.tp.all_reduce(whole)
        assert ctx.tp.all_reduce(whole).tolist() == [world.size] * 8
    other = world.context(
        cg.Layout(world.size, tp=world.size), name="b", platform=platform(cg.CudaPlatform), options=cg.CommunicatorOptions(backend="gloo")
    )
    if world.rank == 0:
        with pytest.raises(ValueError, match="mine"), other.graph_capture():
            raise ValueError("mine")
    with pytest.raises(cg.PeerLostError, match=r"an error ended the graph capture|is gone"):
        other.tp.all_gather_object(1)
    other.close()


def work(world: cg.World) -> None:
    """Asynchronous calls: on a stream of their own, ordered before what waits and not holding up the host."""
    n = world.size
    with context(world, "a") as ctx:
        tp = ctx.tp
        ctx.warmup()
        serves(tp)
        for i in range(50):
            x = torch.full((1 << 16,), float(i + world.rank), device=DEVICE)
            pending = tp.all_reduce_async(x)
            del x  # its memory must not be given away before it was read
            other = torch.full((1 << 16,), -1.0, device=DEVICE)
            y = pending.wait() + 0
            assert bool((y == n * i + n * (n - 1) / 2).all()), f"call {i}: {y[0].item()}"
            assert bool((other == -1).all())
        # A blocking call does not overtake what was begun before it.
        works = [tp.all_reduce_async(torch.full((1024,), float(i), device=DEVICE)) for i in range(8)]
        assert tp.all_reduce(torch.ones(1024, device=DEVICE))[0].item() == n
        for i, one in enumerate(works):
            assert one.wait()[0].item() == n * i
        # Messages and dicts go by way of the host here.
        peer = (world.rank + 1) % n, (world.rank - 1) % n
        done = tp.batch(
            [cg.Send(torch.full((5,), float(world.rank), device=DEVICE), peer[0]), cg.Recv(torch.empty(5, device=DEVICE), peer[1])]
        ).wait()
        assert done[1] is not None
        assert done[1].tolist() == [float(peer[1])] * 5
        if world.rank == 0:
            tp.isend_tensor_dict({"a": torch.arange(6.0, device=DEVICE), "b": [1, 2]}, 1).wait()
        if world.rank == 1:
            got = tp.irecv_tensor_dict(0).wait()
            assert got["a"].device.type == DEVICE.type
            assert got["a"].tolist() == [0, 1, 2, 3, 4, 5]
        tp.barrier()


def memory(world: cg.World) -> None:
    """What contexts hold of the device is given back when they are closed."""

    def used() -> int:
        world.group.barrier()
        if REHEARSAL:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        world.group.barrier()
        free, whole = torch.cuda.mem_get_info()
        return whole - free

    def cycle(number: int) -> int:
        with context(world, f"cycle {number}", custom_all_reduce_bytes=64 << 20) as ctx:
            ctx.tp.all_reduce(torch.ones(1 << 20, device=DEVICE))
            return used()

    cycle(0)  # what is made once and stays, kernels for one
    before = used()
    held = [cycle(number) for number in range(1, 6)]
    after = used()
    if world.rank == 0:
        open_, closed = (max(held) - before) >> 20, (after - before) >> 20
        say(f"{world.size} ranks: {open_} MiB of the device while a context is open, {closed} MiB after 5 of them were closed")
    assert after - before < 32 << 20, f"{after - before} bytes were not given back"


def compiled(world: cg.World) -> None:
    """torch.compile with inductor over device tensors: the same numbers as eager, in one graph."""
    n = world.size
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        say("not compiled: there is no C compiler, which inductor needs")
        return
    with context(world, "a") as ctx:
        ctx.warmup()
        tp = ctx.tp

        def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y = tp.all_reduce(torch.relu(x @ w)) * 2
            return tp.all_reduce(y + 1) - 1

        x = torch.ones(64, 64, device=DEVICE)
        w = torch.full((64, 64), 1.0 + world.rank, device=DEVICE)
        eager = block(x, w)
        fast = torch.compile(block, fullgraph=True)(x, w)
        assert torch.allclose(eager, fast)
        assert eager[0, 0].item() == n * (2 * 64 * n * (n + 1) / 2 + 1) - 1


def nccl(world: cg.World) -> None:
    """NCCL on a stand-alone process group, with several ranks on one GPU where NCCL lets itself be told that they are hosts."""
    n = world.size
    if REHEARSAL:
        return
    started = time.monotonic()
    options = cg.CommunicatorOptions(
        custom_all_reduce=False, timeout=timedelta(seconds=60), backend_settings={"is_high_priority_stream": True, "max_ctas": 4}
    )
    with world.context(cg.Layout(n, tp=n), name="a", options=options, platform=Shared()) as ctx:
        tp = ctx.tp
        assert tp.communicators["all_reduce"][0] == "nccl", ctx.explain()
        ctx.warmup()
        if world.rank == 0:
            say(f"{n} ranks on one GPU: NCCL connected and warm after {time.monotonic() - started:.1f} s")
        every_operation(tp)
        replay(tp, "nccl")
        assert tp.device_group is not None
        assert tp.device_group is not tp.cpu_group


def nccl_alone(world: cg.World) -> None:
    """The strategy over an NCCL of one rank: every call, 1,000 replays, and an abort that ends in time."""
    if REHEARSAL:
        return
    store = torch.distributed.HashStore()
    backend = compat.make_nccl(store, 0, 1, timedelta(seconds=60), DEVICE, {"max_ctas": 4})
    made = TorchCommunicator("nccl", backend, DEVICE, 0, 1, store)
    x = torch.arange(8.0, device=DEVICE)
    limits: dict[str, Any] = {"tag": 0, "timeout": 30.0}
    made.warmup()
    for op in ("sum", "avg", "max", "min", "product"):
        assert torch.equal(made.all_reduce(x, op, **limits), x)
    out = torch.empty_like(x)
    made.all_gather(x, 0, [8], out, **limits)
    assert torch.equal(out, x)
    made.reduce_scatter(x, 0, [8], "sum", out.zero_(), **limits)
    assert torch.equal(out, x)
    made.all_to_all([x], [out.zero_()], **limits)
    assert torch.equal(out, x)
    made.broadcast(out, 0, **limits)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = made.all_reduce(x, "sum", **limits)
    for i in range(REPLAYS):
        x.fill_(float(i))
        graph.replay()
    assert bool((y == REPLAYS - 1).all())
    say(f"NCCL of one rank: {REPLAYS} replays")
    del graph
    torch.cuda.synchronize()
    started = time.monotonic()
    made.close()
    say(f"NCCL of one rank: aborted in {time.monotonic() - started:.2f} s")
    assert time.monotonic() - started < 15


def lost(world: cg.World) -> None:
    """NCCL with a rank that never comes: the others' host is told at the deadline, and closing is bounded."""
    if REHEARSAL:
        return
    options = cg.CommunicatorOptions(custom_all_reduce=False, timeout=timedelta(seconds=8), check=True)
    ctx = world.context(cg.Layout(world.size, tp=world.size), name="a", options=options, platform=Shared())
    assert ctx.tp.communicators["all_reduce"][0] == "nccl", ctx.explain()
    ctx.tp.all_reduce(torch.ones(4, device=DEVICE))
    sync()
    started = time.monotonic()
    if world.rank:
        with pytest.raises(cg.CollectiveError) as caught:
            ctx.tp.all_reduce(torch.ones(4, device=DEVICE))
        if world.rank == 1:
            say(f"told after {time.monotonic() - started:.1f} s: {caught.typename}")
    else:
        time.sleep(10)
    started = time.monotonic()
    ctx.close(timedelta(seconds=3))
    took = time.monotonic() - started
    if world.rank == 1:
        say(f"closed in {took:.1f} s")
    assert took < 20


def overhead(world: cg.World) -> None:
    """A world of one: what a call costs over plain torch, on the host, by events of the device, and in a replayed graph."""
    tp = world.context(cg.Layout(1), name="a", platform=platform(cg.CudaPlatform)).tp
    x = torch.ones(1 << 12, device=DEVICE)

    def plain() -> torch.Tensor:
        return x * 2

    def ours() -> torch.Tensor:
        return tp.all_reduce(x * 2)

    def host(call: Callable[[], object], count: int = 2000) -> float:
        for _ in range(100):
            call()
        sync()
        started = time.perf_counter()
        for _ in range(count):
            call()
        took = time.perf_counter() - started
        sync()
        return took / count * 1e6

    rounds = [(host(plain), host(ours)) for _ in range(9)]
    a, b = (sorted(column)[4] for column in zip(*rounds, strict=True))
    say(f"world of one, host: x * 2 takes {a:.2f} us, with all_reduce {b:.2f} us: {b - a:+.2f} us a call")
    if REHEARSAL:
        return

    def events(call: Callable[[], object], count: int = 2000) -> float:
        for _ in range(100):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / count * 1e3

    rounds = [(events(plain), events(ours)) for _ in range(9)]
    a, b = (sorted(column)[4] for column in zip(*rounds, strict=True))
    say(f"world of one, events: {a:.2f} and {b:.2f} us: {b - a:+.2f} us a call")
    graphs = []
    for call in (plain, ours):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(100):
                call()
        graphs.append(graph)
    rounds = [(events(graphs[0].replay, 50) / 100, events(graphs[1].replay, 50) / 100) for _ in range(9)]
    a, b = (sorted(column)[4] for column in zip(*rounds, strict=True))
    say(f"world of one, in a graph: {a:.3f} and {b:.3f} us a call: {b - a:+.3f} us")


def every_operation(tp: cg.GroupCoordinator) -> None:
    """Against what one process computes."""
    n, me = tp.world_size, tp.rank_in_group
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        inputs = [numbers(rank, 48 * n, dtype, 3).view(4 * n, 12) for rank in range(n)]
        x = inputs[me].to(DEVICE)
        whole = torch.stack([one.double() for one in inputs])
        assert torch.equal(tp.all_reduce(x).double().cpu(), whole.sum(0))
        assert torch.equal(tp.all_reduce(x, op="max").double().cpu(), whole.amax(0))
        assert torch.equal(tp.reduce_scatter(x, 0).double().cpu(), whole.sum(0).tensor_split(n)[me])
        for dim in (0, 1):
            assert torch.equal(tp.all_gather(x, dim).cpu(), torch.cat(inputs, dim))
        sizes = [rank + 1 for rank in range(n)]
        joined = tp.all_gatherv(x[: me + 1], 0, sizes)
        assert isinstance(joined, torch.Tensor)
        assert torch.equal(joined.cpu(), torch.cat([one[: i + 1] for i, one in enumerate(inputs)]))
        uneven = x[: sum(sizes)] if sum(sizes) <= 4 * n else x
        if sum(sizes) <= 4 * n:
            begin = sum(sizes[:me])
            assert torch.equal(tp.reduce_scatterv(uneven, 0, sizes).double().cpu(), whole.sum(0)[begin : begin + sizes[me]])
        assert torch.equal(tp.all_to_all(x).cpu(), torch.cat([one.tensor_split(n)[me] for one in inputs]))
        gathered = tp.gather(x, n - 1, 0)
        assert (gathered is None) == (me != n - 1)
        assert gathered is None or torch.equal(gathered.cpu(), torch.cat(inputs))
        y = x.clone()
        tp.broadcast(y, 1)
        assert torch.equal(y.cpu(), inputs[1])
        out = torch.empty_like(x)
        tp.batch([cg.Recv(out, (me - 1) % n), cg.Send(x, (me + 1) % n)]).wait()
        assert torch.equal(out.cpu(), inputs[(me - 1) % n])
    sync()


def replay(tp: cg.GroupCoordinator, name: str) -> None:
    x = torch.zeros(1024, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with tp.graph_capture() as captured:
        tp.all_reduce(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=captured.stream):
            y = tp.all_reduce(x)
    started = time.monotonic()
    for i in range(REPLAYS):
        x.fill_(float(i + tp.rank_in_group))
        graph.replay()
    n = tp.world_size
    assert bool((y == n * (REPLAYS - 1) + n * (n - 1) / 2).all())
    if tp.rank_in_group == 0:
        say(f"{n} ranks, {name}: {REPLAYS} replays in {time.monotonic() - started:.1f} s")
    del graph
    torch.cuda.synchronize()


CHECKS = MappingProxyType(
    {one.__name__: one for one in (kernels, graphs, refused, work, memory, compiled, nccl, nccl_alone, lost, overhead)}
)


def main(check: str, rank: int, size: int, file: str) -> None:
    if not REHEARSAL:
        torch.cuda.set_device(DEVICE)
    world = cg.World.connect(
        f"file://{file}", rank=rank, world_size=size, device=DEVICE, platform=platform(cg.CudaPlatform), timeout=timedelta(seconds=90)
    )
    with world:
        CHECKS[check](world)
        world.group.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
