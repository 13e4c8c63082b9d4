"""Platforms: what is chosen on which machine, by stand-ins for devices; what other packages bring; graph capture; deterministic mode."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph import compat
from commgraph.accelerators.streams import Streams
from commgraph.communicators.base import OPERATIONS, Communicator, Refused
from commgraph.communicators.transport import Transport
from commgraph.deadline import Deadline
from commgraph.platforms import GroupFacts, detection
from commgraph.testing import spmd
from tests.helpers import ROOT
from tests.stand_ins import FakeStreams


class StandIn(cg.CudaPlatform):
    """CUDA without a GPU: its backend is torch's gloo, which is never given a device tensor."""

    def __init__(self, problems: dict[int, str] | None = None, devices: Sequence[str] | None = None) -> None:
        self.problems, self.devices = problems or {}, devices
        self.faked = FakeStreams()

    def problem(self, facts: GroupFacts) -> str:
        return self.problems.get(facts.ranks[facts.rank_in_group], "")

    def identity(self, device: torch.device) -> str:
        return str(device) if self.devices is None else self.devices[device.index or 0]

    def make_backend(self, facts: GroupFacts, timeout: timedelta) -> Any:
        return compat.make_gloo(facts.store, facts.rank_in_group, len(facts.ranks), timeout, compat.gloo_device("127.0.0.1"))

    def capability(self, device: torch.device) -> str:
        return "9.0"

    def streams(self, device: torch.device) -> Streams | None:
        return self.faked if device.type == "cuda" else None


CUDA = torch.device("cuda", 0)


def on_devices(n: int, body: Any, platform: Any = None, **options: Any) -> list[Any]:
    """`body(context)` on ranks whose devices do not exist."""

    def run(world: cg.World) -> Any:
        world.device = torch.device("cuda", world.rank)
        chosen = StandIn() if platform is None else platform()
        world.platform = chosen
        with world.context(cg.Layout(n, tp=n), name="a", platform=chosen, options=cg.CommunicatorOptions(**options)) as context:
            return body(context)

    return spmd(run, n)


def chain(
    group: cg.GroupCoordinator, operation: str, device: torch.device, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4,)
) -> str:
    return group._state.strategies.route(operation, shape, dtype, device).name


def fake_streams(group: cg.GroupCoordinator) -> FakeStreams:
    sides = group._state.side_streams
    assert sides is not None
    assert isinstance(sides.streams, FakeStreams)
    return sides.streams


def test_device_tensors_go_to_the_backend_and_host_tensors_to_the_hosts_strategies() -> None:
    def body(ctx: cg.ParallelContext) -> None:
        tp = ctx.tp
        assert tp.communicators["all_reduce"] == ("nccl", "shm", "tcp", "staged")
        assert tp.communicators["barrier"] == ("shm", "tcp", "staged")
        for operation in set(OPERATIONS) - {"barrier"}:
            assert chain(tp, operation, CUDA) == "nccl"
            assert chain(tp, operation, torch.device("cpu")) == "shm"
        # What NCCL cannot add up goes by way of the host; it only moves bytes.
        assert chain(tp, "all_reduce", CUDA, torch.uint16) == "staged"
        assert chain(tp, "all_gather", CUDA, torch.uint16) == "nccl"
        # Groups of the host only have no backend for devices, and serve host tensors.
        assert "nccl" not in ctx.world.communicators["all_reduce"]
        assert tp.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
        assert ctx.dp.world_size == 1
        assert "nccl: torch's nccl backend, tensors of cuda" in ctx.explain()

    on_devices(2, body)


def test_a_missing_backend_is_missing_for_all_and_said_once_in_a_warning() -> None:
    """A group that cannot have a communicator says why, alike on all its ranks."""
    texts = []

    def body(ctx: cg.ParallelContext) -> None:
        assert ctx.tp.communicators["all_reduce"] == ("shm", "tcp", "staged")
        assert chain(ctx.tp, "all_reduce", CUDA) == "staged"
        texts.append(next(line for line in ctx.explain().splitlines() if "nccl" in line).strip())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        on_devices(3, body, lambda: StandIn({1: "this torch has no NCCL, or sees no GPU"}))
    assert texts == ["nccl: not used, rank 1: this torch has no NCCL, or sees no GPU"] * 3
    said = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    assert set(said) == {
        "nccl cannot serve cuda tensors (rank 1: this torch has no NCCL, or sees no GPU); they are staged through the host"
    }


@pytest.mark.filterwarnings("ignore:nccl cannot serve")
def test_ranks_that_share_a_device_are_named() -> None:
    def body(ctx: cg.ParallelContext) -> str:
        return ctx.explain()

    for text in on_devices(3, body, lambda: StandIn(devices=["GPU a", "GPU b", "GPU a"])):
        assert "nccl: not used, ranks [0, 2] share GPU a" in text


@pytest.mark.filterwarnings("ignore:nccl cannot serve")
def test_options_choose_the_backend() -> None:
    def body(ctx: cg.ParallelContext) -> str:
        return ctx.tp.communicators["all_reduce"][0] + next(line for line in ctx.explain().splitlines() if "nccl" in line)

    for text in on_devices(2, body, backend="gloo"):
        assert text.startswith("shm")
        assert "nccl: not used, options.backend='gloo'" in text
    with pytest.raises(cg.BackendUnavailableError, match="'mpi'; on the cuda platform there are 'nccl' and 'gloo'"):
        on_devices(2, body, backend="mpi")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(OPERATIONS),
    st.lists(st.integers(0, 1 << 20), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint16, torch.bool, torch.float8_e4m3fn, torch.int64]),
    st.sampled_from(["cpu", "cuda:0", "cuda:1"]),
    st.booleans(),
)
def test_the_choice_is_a_pure_function(operation: str, shape: list[int], dtype: torch.dtype, device: str, capturing: bool) -> None:
    """Strategies of the same group on other ranks, and asked again, answer alike."""
    for by_rank in zip(*CHAINS, strict=True):
        answers = {
            operation in one.operations and one.accepts(operation, shape, dtype, torch.device(device), capturing=capturing)
            for one in by_rank
            for _ in range(2)
        }
        assert len(answers) == 1


def _chains() -> list[list[Communicator]]:
    return on_devices(2, lambda ctx: list(ctx.tp._state.strategies.communicators))


@pytest.fixture(scope="module", autouse=True)
def chains() -> Iterator[None]:
    CHAINS[:] = _chains()
    yield
    CHAINS.clear()


CHAINS: list[list[Communicator]] = []


def test_settings_of_a_backend_are_checked() -> None:
    good = cg.CommunicatorOptions(backend_settings={"max_ctas": 8, "is_high_priority_stream": True})  # type: ignore[arg-type]  # converted
    assert good.backend_settings == (("is_high_priority_stream", True), ("max_ctas", 8))
    assert cg.CommunicatorOptions(backend_settings=good.backend_settings) == good
    for bad in (3, None, {"a b": 1}, {"a": "b"}, {3: 1}, [("a",)], "ab"):
        with pytest.raises(cg.ConfigurationError, match="names with whole numbers or booleans are needed"):
            cg.CommunicatorOptions(backend_settings=bad)


# Capturing graphs


def test_what_cannot_be_captured_is_passed_over_and_never_run_eagerly() -> None:
    """While a graph is captured."""

    def body(ctx: cg.ParallelContext) -> None:
        tp = ctx.tp
        assert chain(tp, "all_reduce", CUDA, torch.uint16) == "staged"
        streams = fake_streams(tp)
        with ctx.graph_capture() as outer:
            assert outer.stream == streams.current() == "side 1"
            # The side stream begins after what the stream before it has to do.
            assert streams.said == [("record_event", "main", 0), ("wait_event", "side 1", ("main", 0))]
            streams.capturing = True
            assert chain(tp, "all_reduce", CUDA) == "nccl"
            with pytest.raises(cg.UnsupportedTensorError, match=r"a graph is being captured.*torch.uint16.*Nothing was sent"):
                chain(tp, "all_reduce", CUDA, torch.uint16)
            with tp.graph_capture(stream=outer.stream) as alone:
                assert alone.stream == outer.stream
            # Host tensors are none of its business.
            assert tp.all_reduce(torch.ones(2)).tolist() == [2, 2]
            # Target and draft in one graph: the inner one has the stream of the outer.
            with ctx.graph_capture(stream=outer.stream) as inner:
                assert inner.stream == outer.stream
        assert len(streams.said) == 2, "the same stream need not wait for itself"

    on_devices(2, body)


def test_an_error_in_a_capture_raises_on_every_rank() -> None:
    def body(ctx: cg.ParallelContext) -> str:
        if ctx.rank == 0:
            with pytest.raises(ValueError, match="mine"), ctx.graph_capture():
                raise ValueError("mine")
            with pytest.raises(cg.PeerLostError, match="an error ended the graph capture of context 'a' on this rank: ValueError: mine"):
                ctx.tp.all_reduce(torch.ones(2))
            return ""
        with pytest.raises(cg.PeerLostError) as caught:
            ctx.tp.all_reduce(torch.ones(2))
        return str(caught.value)

    for text in on_devices(3, body)[1:]:
        # Told by rank 0 itself, or by the other one, which had heard it before.
        assert "rank 0 left the group" in text or "rank 0 is gone (a peer reported it" in text, text


def test_on_the_host_there_is_nothing_to_capture() -> None:
    def run(world: cg.World) -> None:
        context = world.context(cg.Layout(2, tp=2), name="a")
        with context.graph_capture() as capture:
            assert capture.stream is None
            assert context.tp.all_reduce(torch.ones(2)).tolist() == [2, 2]
        context.close()
        with pytest.raises(cg.ContextClosedError, match="graph_capture"), context.graph_capture():
            pass

    spmd(run, 2)


# Deterministic mode


class Small(Communicator):
    """Serves what is small, in an order of its own."""

    name = "small"
    operations = frozenset({"all_reduce"})
    size_dependent = True
    closed = False

    def __init__(self, rest: Communicator) -> None:
        super().__init__(rest.rank_in_group, rest.world_size)
        self.rest = rest

    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        return torch.Size(shape).numel() <= 64

    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        # Rounded on the way, as an order of its own would have it.
        return self.rest.all_reduce(x.bfloat16(), op, tag=tag, deadline=deadline).to(x.dtype)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class BySize(cg.CpuPlatform):
    made: list[Small]

    def __init__(self) -> None:
        self.made = []

    def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
        host = list(super().communicators(facts, transport))
        self.made.append(Small(next(one for one in host if isinstance(one, Communicator) and one.name == "gloo")))
        return [self.made[-1], *host]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_gives_equal_bits_at_every_size(deterministic: bool) -> None:
    rows = torch.rand(256, 16, generator=torch.Generator().manual_seed(5))

    def run(world: cg.World) -> bool:
        platform = BySize()
        options = cg.CommunicatorOptions(deterministic=deterministic, shm=False)
        with world.context(cg.Layout(3, tp=3), name="a", platform=platform, options=options) as ctx:
            whole = ctx.tp.all_reduce(rows * (world.rank + 1))
            alone = torch.cat([ctx.tp.all_reduce(row * (world.rank + 1)) for row in rows[:8].split(1)])
            assert all(made.closed for made in platform.made) == deterministic
            assert ("small: not used, options.deterministic=True" in ctx.explain()) == deterministic
            return torch.equal(whole[:8], alone)

    assert spmd(run, 3) == [deterministic] * 3


@pytest.mark.parametrize("options", [{}, {"shm": False}], ids=str)
def test_the_hosts_strategies_need_no_mode_for_that(options: dict[str, Any]) -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5))

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(3, tp=3), name="a", options=cg.CommunicatorOptions(**options)) as ctx:
            whole = ctx.tp.all_reduce(rows * (world.rank + 0.1))
            for begin, end in ((0, 1), (5, 8), (100, 900), (2000, 4096)):
                assert torch.equal(ctx.tp.all_reduce(rows[begin:end] * (world.rank + 0.1)), whole[begin:end])

    spmd(run, 3)


# What is there


def test_detection_and_facts_of_each_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(cg.Platform.detect(), cg.CpuPlatform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(cg.Platform.detect()) is cg.CudaPlatform
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert type(cg.Platform.detect()) is cg.RocmPlatform
    monkeypatch.undo()
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert type(cg.Platform.detect()) is cg.XpuPlatform
    for platform, name, device, backend in (
        (cg.CpuPlatform(), "cpu", "cpu", "gloo"),
        (cg.CudaPlatform(), "cuda", "cuda:3", "nccl"),
        (cg.RocmPlatform(), "rocm", "cuda:3", "nccl"),
        (cg.XpuPlatform(), "xpu", "xpu:3", "xccl"),
        (cg.TpuPlatform(), "tpu", "xla:3", "xla"),
    ):
        assert (platform.name, str(platform.device(3)), platform.backend()) == (name, device, backend)
        assert repr(platform) == f"{type(platform).__name__}()"
    cg.CpuPlatform().seed(3)
    first = torch.rand(2)
    cg.CpuPlatform().seed(3)
    assert torch.equal(torch.rand(2), first)
    cg.CpuPlatform().synchronize(torch.device("cpu"))


def test_without_devices_every_platform_says_what_it_lacks() -> None:
    facts = GroupFacts((0, 1), 0, (0, 0), cg.CommunicatorOptions(), True, None, dist.HashStore(), CUDA)  # type: ignore[arg-type]  # no limits are looked at
    assert "no NCCL" in cg.CudaPlatform().problem(facts)
    assert "no NCCL" in cg.RocmPlatform().problem(facts)
    assert "XCCL" in cg.XpuPlatform().problem(facts)
    assert cg.TpuPlatform().problem(facts) == "torch_xla is not installed"


# What other packages bring


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the toy package was installed from its sources."""
    folder = tmp_path_factory.mktemp("installed")
    copied = tmp_path_factory.mktemp("sources")
    for path in (ROOT / "tests" / "toy_package").rglob("*"):
        if path.suffix in (".py", ".toml"):
            (copied / path.relative_to(ROOT / "tests" / "toy_package")).parent.mkdir(parents=True, exist_ok=True)
            (copied / path.relative_to(ROOT / "tests" / "toy_package")).write_text(path.read_text())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("platform", [False, True])
def test_a_package_of_others_needs_no_patch(platform: bool, toy: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(toy), str(ROOT))), "OMP_NUM_THREADS": "1"}
    if platform:
        environment["TOY_PLATFORM"] = "1"
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "programs" / "toy.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


class Point:
    """An entry point without a package."""

    dist = None

    def __init__(self, group: str, value: Any) -> None:
        self.group, self.name, self.value, self.loaded = group, "odd", "odd:thing", value

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.mark.parametrize(
    ("group", "value", "words"),
    [
        (detection.PLATFORMS, ImportError("no such module"), "cannot be loaded: ImportError: no such module"),
        (detection.PLATFORMS, int, "is no commgraph.Platform class"),
        (
            detection.STRATEGIES,
            ImportError("no such module"),
            "'odd' of commgraph.communicators, odd:thing of an unknown package, cannot be",
        ),
        (detection.STRATEGIES, lambda facts, host: 3, "gave a int, no Communicator and no Refused"),
    ],
)
def test_entry_points_that_are_none(group: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "_points", lambda asked: [Point(group, value)] if asked == group else [])
    # A platform is looked for when a world is made, strategies when a context is built.
    with pytest.raises(cg.ConfigurationError, match=words):
        spmd(lambda world: world.context(cg.Layout(2, tp=2), name="a"), 2)


def test_ranks_with_other_packages_do_not_build(monkeypatch: pytest.MonkeyPatch) -> None:

    mine = detection.Plugins.describe
    monkeypatch.setattr(
        detection.Plugins, "describe", lambda self: "toy 1.2" if threading.current_thread().name.endswith("1") else mine(self)
    )
    with pytest.raises(cg.LayoutMismatchError, match="the strategies of other packages"):
        spmd(lambda world: world.context(cg.Layout(2, tp=2), name="a"), 2)


# XLA, by a stub of torch_xla


class StubXla:
    """`torch_xla.core.xla_model` and `torch_xla.runtime` on threads: every rank of the world makes each call, each in its own group."""

    def __init__(self, n: int) -> None:
        self._given: dict[int, torch.Tensor] = {}
        self._barrier = threading.Barrier(n)
        self._here = threading.local()
        self.calls: list[tuple[int, str]] = []

    def enter(self, rank: int) -> None:
        self._here.rank = rank

    def _note(self, what: str) -> None:
        self.calls.append((self._here.rank, what))

    def made_by(self, rank: int) -> list[str]:
        return [what for who, what in self.calls if who == rank]

    def global_ordinal(self) -> int:
        return int(self._here.rank)

    def _together(self, x: torch.Tensor, groups: list[list[int]]) -> tuple[list[torch.Tensor], int]:
        assert sorted(rank for group in groups for rank in group) == list(range(self._barrier.parties)), "every replica in one group"
        rank = self._here.rank
        (mine,) = (group for group in groups if rank in group)
        self._given[rank] = x
        self._barrier.wait(20)
        pieces = [self._given[peer] for peer in mine]
        self._barrier.wait(20)
        return pieces, mine.index(rank)

    def _reduced(self, kind: str, pieces: list[torch.Tensor], scale: float) -> torch.Tensor:
        stack = torch.stack(pieces)
        whole = {"sum": stack.sum(0), "mul": stack.prod(0), "min": stack.amin(0), "max": stack.amax(0)}[kind]
        return (whole * scale).to(pieces[0].dtype)

    def all_reduce(self, kind: str, x: torch.Tensor, scale: float = 1.0, groups: Any = None) -> torch.Tensor:
        self._note("all_reduce")
        return self._reduced(kind, self._together(x, groups)[0], scale)

    def all_gather(self, x: torch.Tensor, dim: int = 0, groups: Any = None) -> torch.Tensor:
        self._note("all_gather")
        return torch.cat(self._together(x, groups)[0], dim)

    def reduce_scatter(
        self, kind: str, x: torch.Tensor, scale: float, scatter_dim: int, shard_count: int, groups: Any = None
    ) -> torch.Tensor:
        self._note("reduce_scatter")
        pieces, me = self._together(x, groups)
        return self._reduced(kind, pieces, scale).chunk(shard_count, scatter_dim)[me]


class StubTpu(cg.TpuPlatform):
    """A TPU whose tensors are host tensors."""

    device_type: ClassVar[str] = "cpu"
    stub: StubXla

    @classmethod
    def available(cls) -> bool:
        return True

    def _torch_xla(self, module: str) -> Any:
        assert module in ("core.xla_model", "runtime")
        return self.stub

    def identity(self, device: torch.device) -> str:
        return f"thread {threading.get_ident()}"


def test_xla_collectives_by_a_stub() -> None:
    """Two groups of two: each call names both, and every rank makes it."""
    stub = StubXla(4)

    def run(world: cg.World) -> None:
        stub.enter(world.rank)
        platform = StubTpu()
        platform.stub = stub
        with world.context(cg.Layout(4, dp=2, tp=2), name="a", platform=platform) as ctx:
            for group in (ctx.tp, ctx.dp):
                assert group.communicators["all_reduce"][0] == "xla"
                n, me = group.world_size, group.rank_in_group
                inputs = [torch.arange(8.0).view(2, 4) + rank for rank in group.ranks]
                whole = torch.stack(inputs)
                x = inputs[me].t().contiguous().t()
                for op, wanted in (("sum", whole.sum(0)), ("avg", whole.mean(0)), ("max", whole.amax(0)), ("product", whole.prod(0))):
                    assert torch.equal(group.all_reduce(x, op=op), wanted)
                assert torch.equal(group.all_reduce_(x.clone()), whole.sum(0))
                for dim in (0, 1):
                    assert torch.equal(group.all_gather(x, dim), torch.cat(inputs, dim))
                    assert torch.equal(group.reduce_scatter(x, dim), whole.sum(0).chunk(n, dim)[me])
                before = stub.made_by(world.rank)
                assert group.all_gatherv(x[: me + 1], 0, [1, 2]).shape == (3, 4)  # type: ignore[union-attr]  # of one tensor
                assert group.all_reduce(torch.tensor([True])).tolist() == [True]
                assert stub.made_by(world.rank) == before, "uneven pieces and bools go by way of the host"
            assert "xla: collectives of torch_xla in 2 groups" in ctx.explain()

    spmd(run, 4)
    assert set(stub.made_by(3)) == {"all_reduce", "all_gather", "reduce_scatter"}


@pytest.mark.filterwarnings("ignore:xla cannot serve")
def test_xla_has_to_number_the_ranks_as_the_world_does() -> None:
    stub = StubXla(2)

    def run(world: cg.World) -> str:
        stub.enter(1 - world.rank)
        platform = StubTpu()
        platform.stub = stub
        with world.context(cg.Layout(2, tp=2), name="a", platform=platform) as ctx:
            return ctx.explain()

    assert all("xla: not used, rank 0: XLA calls it 1, and its groups are made of XLA's numbers" in text for text in spmd(run, 2))
