"""The benchmark: its numbers are sane, its peers take part or say why not, and mistakes end in one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.accelerators.custom_all_reduce import Kernels
from commgraph.accelerators.kernel_table import KernelTable
from commgraph.bench import main as bench_main
from commgraph.bench import page, peers, plan, report, timing
from commgraph.bench import run as bench_run
from commgraph.bench.figures import Row, Sample, bandwidths, percentile, rows_of, size_text
from commgraph.bench.library import Job
from commgraph.bench.objects import lists, small
from commgraph.bench.probe import Probe, placement
from commgraph.cli import main
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.transport import Transport
from commgraph.errors import ConfigurationError
from commgraph.options import CommunicatorOptions
from commgraph.platforms import CpuPlatform, GroupFacts
from commgraph.testing import spmd
from tests.helpers import ROOT
from tests.processes import Processes, environment, outputs
from tests.stand_ins import FakeDevice, Memory

# Two peers as users write them: one that is right, one that is not.
PEER = """
from commgraph.bench import Channel, Library

class Peer(Library):
    name = "mine"

    def call(self, operation, buffers):
        group = self.job.world.group
        if operation == "all_reduce_":
            return lambda: group.all_reduce_(buffers.x)
        return group.barrier if operation == "barrier" else None
"""
LIAR = PEER.replace("mine", "liar").replace("group.all_reduce_(buffers.x)", "buffers.x")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "commgraph.cli", "bench", *arguments]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run on two processes, and the folder of its files."""
    folder = tmp_path_factory.mktemp("bench")
    for name, code in (("mine.py", PEER), ("liar.py", LIAR)):
        (folder / name).write_text(code)
    done = subprocess.run(
        command(
            *("--op", "all_reduce_", "all_reduce", "all_gather", "send_recv", "barrier", "object_small", "object_rate"),
            *("--sizes", "4Ki,16Ki", "--iters", "2", "--strategy", "gloo"),
            *("--compare", "gloo", "pipe", "queue", "deepspeed", "oneccl", "mine.py", "liar.py"),
            *("--json", "run.json", "--markdown", "run.md"),
        ),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


def rows_in(folder: Path) -> list[dict[str, Any]]:
    (run,) = json.loads((folder / "run.json").read_text())["runs"]
    rows: list[dict[str, Any]] = run["rows"]
    return rows


def test_two_processes_give_every_row_and_every_column(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = measured
    rows = rows_in(folder)
    found = {(row["operation"], row["size"], row["who"]) for row in rows}
    for size in (4096, 16384):
        for operation in ("all_reduce_", "all_reduce", "all_gather", "send_recv"):
            assert (operation, size, "commgraph") in found
            assert (operation, size, "torch gloo") in found
    assert {row["who"] for row in rows if row["operation"] == "object_small"} == {
        *("commgraph", "torch gloo", "multiprocessing.Pipe", "multiprocessing.Queue")
    }
    assert {row["strategy"] for row in rows if row["operation"] == "all_gather" and row["who"] == "commgraph"} == {"gloo"}
    heads = next(line for line in done.stdout.splitlines() if line.startswith("operation"))
    assert " ".join(heads.split()) == "operation size dtype who strategy placement samples p10 median p90 unit algbw GB/s busbw GB/s"


def test_the_numbers_are_sane(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    for row in rows_in(measured[1]):
        assert 0 < row["p10"] <= row["median"] <= row["p90"], row
        assert row["samples"] >= 1
        if row["unit"] == "us":
            assert 0.05 < row["median"] < 60e6, row
        if row["operation"] == "all_gather":
            assert row["algbw"] == pytest.approx(row["size"] / row["median"] / 1e3)
            assert row["busbw"] == pytest.approx(row["algbw"] / 2)


def test_a_peer_of_ones_own_takes_part_and_a_wrong_result_is_told(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = measured
    rows = rows_in(folder)
    assert {row["operation"] for row in rows if row["who"] == "mine"} == {"all_reduce_", "barrier"}
    assert {row["operation"] for row in rows if row["who"] == "liar"} == {"barrier"}
    assert "# liar, all_reduce_ of 4096 bytes of float32: rank 0: ValueError: its result is wrong: 1.0 where 3.0 belongs" in done.stdout
    assert "# mine has no all_gather of float32 here" in done.stdout


def test_the_page_has_a_table_for_each_operation(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    text = (measured[1] / "run.md").read_text()
    assert text.startswith("# Benchmarks\n")
    assert re.search(r"^\| size \| dtype \| (placement \| |)commgraph, gloo \| torch gloo \| mine \| GB/s \|$", text, re.MULTILINE)
    assert "### object_rate, messages/s" in text
    assert os.uname().nodename not in text.split()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_missing_peer_is_one_line_and_the_rest_goes_on(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    lines = [line for line in measured[0].stdout.splitlines() if "DeepSpeed" in line]
    assert len(lines) == 1
    assert "pip install deepspeed" in lines[0]


def test_oneccl_says_what_it_needs(measured: Any) -> None:
    lines = [line for line in measured[0].stdout.splitlines() if "oneCCL" in line]
    assert len(lines) == 1
    assert "CCL_PLUGIN=ONECCL_LEGACY_CPU" in lines[0]


def test_what_was_measured_can_be_shown_again(
    measured: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(measured[1] / "run.json")
    assert main(["bench", "--read", file, file, "--markdown", str(tmp_path / "two.md")]) == 0
    shown = capsys.readouterr().out
    for line in measured[0].stdout.splitlines():
        assert line in shown
    assert (tmp_path / "two.md").read_text().count("### all_reduce_, us") == 2


def test_ranks_of_a_launcher_run_it_too_and_the_first_one_prints(tmp_path: Path, processes: Processes) -> None:
    asked = ("--op", "barrier", "object_idle", "--idle", "0.1", "--iters", "2", "--compare", "queue", "--json", "run.json")
    ranks = [
        processes.start("-m", "commgraph.cli", "bench", *asked, env=environment({"PMI_SIZE": "2", "PMI_RANK": str(rank)}), cwd=tmp_path)
        for rank in range(2)
    ]
    first, second = outputs(ranks)
    assert "barrier" in first
    assert "its queues are inherited from the process that starts the ranks, and PMI started these" in first
    assert second == ""
    shares = [row for row in rows_in(tmp_path) if row["operation"] == "object_idle"]
    assert shares[-1]["who"] == "time.sleep"
    assert all(0 <= row["median"] < 150 and row["unit"] == "% of a core" for row in shares)


def test_threads_need_no_processes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--op", "reduce_scatter", "object_readers", "object_idle", "--sizes", "4Ki", "--iters", "2", "--strategy", "gloo"]
    assert main(["bench", "--threads", *options, "--compare", "mpi"]) == 0
    out = capsys.readouterr().out
    assert "started threads" in out
    assert "reduce_scatter" in out
    assert "object_readers needs 4 ranks, these are 2" in out
    assert "object_idle needs processes" in out
    assert "\n# MPI: " in out  # not installed, or not MPI's own processes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "all_reduse"], "there are tensors, objects, all, all_reduce_"),
        (["--sizes", "4K"], "'4K' is no size"),
        (["--sizes", "0"], "no size"),
        (["--sizes", "1Mi:4Ki"], "larger than the last"),
        (["--sizes", "4Ki:1Mi:1"], "from 2 on"),
        (["--dtype", "float12"], "float12"),
        (["--ranks", "1"], "it takes two"),
        (["--iters", "0"], "at least one"),
        (["--seconds", "-1"], "above 0"),
        (["--iters", "many"], "invalid int value"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--compare", "nccl"], "built-in peers, which are gloo, mpi"),
        (["--compare", "no_such_file.py"], "neither a Python file"),
        (["--json", "no/such/folder/run.json"], "no folder"),
        (["--read", "no_such_file.json"], "FileNotFoundError"),
        (["--strategy", "carrier_pigeon", "--threads"], "--strategy carrier_pigeon: these ranks are served by"),
    ],
)
def test_a_bad_option_ends_in_one_clear_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("commgraph bench: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "needs a class Peer derived from commgraph.bench.Library"),
        ("class Peer: pass", "needs a class Peer derived from"),
        ("from commgraph.bench import Library\nclass Peer(Library): pass", "has no name"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_file_that_holds_no_peer_says_what_is_missing(code: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "peer.py"
    file.write_text(code)
    with pytest.raises(ConfigurationError, match=said.replace("(", r"\(")):
        peers.load(str(file))


def test_a_plot_without_matplotlib_ends_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench_main.main(["--plot", "run.png"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "commgraph bench: --plot needs matplotlib: pip install 'commgraph[bench]'\n")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text in ("", "[]", "{}", '{"format": 1, "runs": [{}]}', '{"format": 99, "runs": []}'):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=r"run\.json"):
            report.read(file)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512", (512,)),
        ("4Ki,1MiB", (4096, 1 << 20)),
        ("4Ki:64Ki", (4096, 16384, 65536)),
        ("4Ki:33Ki:2", (4096, 8192, 16384, 32768)),
        ("1Gi:1Gi", (1 << 30,)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert plan.parse_sizes(text) == sizes


def test_sizes_are_shown_as_people_read_them() -> None:
    assert [size_text(size) for size in (75, 4096, 9400, 10 << 20, 3 << 30)] == ["75 B", "4 KiB", "9.2 KiB", "10 MiB", "3 GiB"]


def test_compare_alone_means_every_peer() -> None:
    assert plan.parse(["--compare"]).compare == peers.BUILT_IN
    assert plan.parse([]).compare == ()


def test_names_of_operations_may_be_groups() -> None:
    assert plan.parse(["--op", "barrier", "objects", "barrier"]).operations[:2] == ("barrier", "object_small")


@pytest.mark.parametrize(
    ("operation", "ranks", "bus"),
    [
        ("all_reduce_", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 8, 0.875),
        ("all_to_all", 2, 0.5),
        ("broadcast", 8, 1.0),
        ("send_recv", 8, 1.0),
    ],
)
def test_bandwidths_are_those_of_nccl_tests(operation: str, ranks: int, bus: float) -> None:
    assert bandwidths(operation, 10**9, 0.5, ranks) == pytest.approx((2.0, 2.0 * bus))


def test_a_barrier_has_no_bandwidth() -> None:
    assert bandwidths("barrier", 0, 0.5, 2) is None
    assert bandwidths("object_small", 75, 0.5, 2) is None


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], q) for q in (0, 10, 50, 90, 100)] == pytest.approx([1.0, 1.2, 2.0, 2.8, 3.0])
    assert percentile([7.0], 90) == 7.0
    assert percentile([0.0, 10.0], 50) == 5.0


def test_samples_of_different_placements_are_never_mixed() -> None:
    samples = [Sample(seconds, ns) for seconds, ns in ((1e-6, 30.0), (9e-6, 240.0), (2e-6, 60.0), (3e-6, 32.0))]
    rows = rows_of(samples, operation="broadcast", size=1000, dtype="int8", who="a", strategy="b", ranks=2)
    assert [(row.placement, row.samples) for row in rows] == [("siblings", 2), ("one L3", 1), ("across L3s", 1)]
    assert [row.median for row in rows] == pytest.approx([2.0, 2.0, 9.0])
    assert rows[0].nanoseconds == 31.0
    assert rows[2].algbw == pytest.approx(1000 / 9e-6 / 1e9)
    text = page.markdown([report.Run({"processor": "x"}, {"ranks": 2, "started": "threads", "sampling": "4 samples"}, rows, [])])
    assert "| 1000 B | int8 | siblings | **2.00** (1.20 - 2.80) | 0.50 |" in text
    assert "across L3s |" not in text  # of a single sample, where there is more to tell


def test_the_page_opens_with_a_picture_and_a_short_table_of_what_every_library_has() -> None:
    def row(size: int, who: str, where: str, median: float, samples: int = 9) -> Row:
        values = {"nanoseconds": None, "samples": samples, "unit": "us", "p10": median, "p90": median, "algbw": None, "busbw": None}
        return Row(operation="all_reduce_", dtype="int8", strategy="", size=size, who=who, placement=where, median=median, **values)

    rows = [row(size, who, "one L3", size / 2) for size in (2, 4, 8, 16) for who in ("a", "b")]
    rows += [row(32, "a", "one L3", 16), row(2, "b", "siblings", 7)]
    run = report.Run({"processor": "x"}, {"ranks": 2, "started": "threads", "sampling": "9 samples"}, rows)
    assert [(row.size, row.who) for row in page.overview([run])] == [(size, who) for size in (2, 4, 8, 16) for who in ("a", "b")]
    opening, rest = page.markdown([run], "run.svg").split("## Method")
    assert "![`all_reduce_` of int8 on 2 ranks: time over size](run.svg)" in opening
    assert opening.endswith(
        "(x, one L3):\n\n| size | a | b |\n| --- | --- | --- |\n| 2 B | 1.00 | 1.00 |\n| 8 B | 4.00 | 4.00 |\n| 16 B | 8.00 | 8.00 |\n\n"
    )
    assert "| 2 B | int8 | siblings |" in rest
    assert "![" not in page.markdown([run])
    assert page.overview([report.Run(run.machine, run.how, rows[:2])]) == []  # one size is no curve


def test_the_page_of_the_documentation_has_the_words_that_are_written_today() -> None:
    run = report.Run({"processor": "x"}, {"ranks": 2, "started": "threads", "sampling": "9 samples"})
    written, kept = page.markdown([run]), (ROOT / "docs/benchmarks.md").read_text()
    introduction, _, method = written[: written.index("## Machine")].partition("## Method")
    assert kept.startswith(introduction)
    assert method in kept
    assert kept.endswith(written[written.index("## On a GPU") :])


def test_placements() -> None:
    assert [placement(ns) for ns in (30.0, 60.0, 240.0, None)] == ["siblings", "one L3", "across L3s", ""]
    assert Probe().measure() is None
    assert Probe(lambda: 55.0).measure() == 55.0


def test_contenders_take_turns_sample_by_sample() -> None:
    log: list[str] = []

    def contender(name: str, seconds: float) -> timing.Contender:
        def batch(calls: int) -> None:
            log.append(name)
            time.sleep(seconds * calls)

        return timing.Contender(name, "", batch, 0.5)

    stopwatch = timing.Stopwatch(lambda value: [value], lambda: None, Probe(lambda: 50.0), samples=3, seconds=1.0)
    fast, slow = timing.interleave([contender("a", 1e-4), contender("b", 1e-3)], stopwatch)
    # A lead and a sample of each in turn, at the end of the log: what came before found the size of the batches.
    assert log[-12:] == ["a", "a", "b", "b"] * 3
    assert [len(samples) for samples in (fast, slow)] == [3, 3]
    assert min(sample.seconds for sample in slow) >= 0.5e-3
    assert all(0.5e-4 <= sample.seconds < 0.5e-3 for sample in fast) or max(s.seconds for s in fast) < 5e-3
    assert fast[0].nanoseconds == 50.0


def test_a_sample_counts_as_its_slowest_rank() -> None:
    assert timing.slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]


def test_the_number_of_samples_follows_the_time_that_is_given() -> None:
    def rounds(samples: int | None, seconds: float, one: float) -> int:
        return timing.Stopwatch(lambda value: [value], lambda: None, Probe(), samples, seconds).rounds(one)

    assert rounds(7, 1.0, 0.01) == 7
    assert rounds(None, 1.0, 0.01) == 100
    assert rounds(None, 1.0, 10.0) == 5
    assert rounds(None, 1.0, 0.0) == 2000


def test_objects_have_the_sizes_that_they_are_known_by() -> None:
    import pickle

    assert len(pickle.dumps(small(), protocol=5)) == 75
    assert 9300 < len(pickle.dumps(lists(), protocol=5)) < 9500


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows: list[Row] = rows_of([Sample(1e-6, None)], operation="barrier", size=0, dtype="", who="a", strategy="", ranks=2)
    report.write([report.Run({"a": "b"}, {"ranks": 2}, rows, ["a note"])], tmp_path / "run.json")
    (again,) = report.read(tmp_path / "run.json")
    assert again.rows == rows
    assert again.notes == ["a note"]


# Tuning: on a stand-in for a device, where the kernels are threads that meet at barriers and the backend is gloo.


def tuned(tmp_path: Path, platform: Callable[[Memory], FakeDevice], ranks: int = 2) -> tuple[list[Any], Path]:
    memory = Memory()
    file = tmp_path / "table.json"
    asked = plan.parse(["--tune", str(file), "--sizes", "1Ki,1Mi", "--iters", "2", "--dtype", "float32", "int32"])

    def rank(world: cg.World) -> Any:
        world.platform = platform(memory)
        return bench_run.run(Job(world, "threads", tmp_path), asked, {})

    return spmd(rank, ranks), file


def test_tuning_writes_a_table_that_options_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(FakeDevice):
        """Whose backend is slow, so that a kernel wins, and whose kernels but for one are slower still."""

        def communicators(self, facts: GroupFacts, transport: Transport) -> Sequence[Communicator | Refused]:
            made = super().communicators(facts, transport)
            for one in made:
                if isinstance(one, Communicator) and one.name == "fakeccl":
                    for name in ("all_reduce_", "all_gather", "reduce_scatter"):
                        setattr(one, name, later(getattr(one, name), 0.02))
            return made

        def make_kernels(self, facts: GroupFacts, name: str, room: int) -> Kernels:
            made = super().make_kernels(facts, name, room)
            inner = made.all_reduce

            def slower(kernel: str, x: torch.Tensor, out: torch.Tensor) -> None:
                time.sleep(0.05 if kernel != "one_shot" else 0)
                inner(kernel, x, out)

            made.all_reduce = slower  # type: ignore[method-assign]  # of this one
            return made

    (found, _), file = tuned(tmp_path, Slow)
    table = KernelTable.read(file)
    assert {(row.capability, row.ranks) for row in table.rows} == {("9.0", 2)}
    by_operation = {row.operation: row for row in table.rows}
    assert [step.kernel for step in by_operation["all_reduce"].steps] == ["one_shot"]
    assert by_operation["all_reduce"].dtype == "float32"
    assert by_operation["all_reduce"].steps[-1].max_bytes == 1 << 20
    assert by_operation["all_gather"].dtype == "any"
    assert set(by_operation) == {"all_reduce", "all_gather", "reduce_scatter"}
    # Every kernel that can serve was measured, and what comes without.
    measured = {(row.operation, row.strategy) for row in found.rows}
    assert measured == {
        *(("all_reduce", name) for name in ("one_shot", "two_shot", "multimem", "fakeccl")),
        *(("all_gather", name) for name in ("multimem", "fakeccl")),
        *(("reduce_scatter", name) for name in ("one_shot", "fakeccl")),
    }
    options = CommunicatorOptions(custom_all_reduce=file)  # type: ignore[arg-type]  # converted
    assert options.custom_all_reduce == table
    assert "use it by CommunicatorOptions(custom_all_reduce=" in capsys.readouterr().out


def later(inner: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(*args, **kwargs)

    return call


def test_tuning_without_kernels_says_why(tmp_path: Path, processes: Processes) -> None:
    with pytest.raises(ConfigurationError, match=r"--tune: nothing to tune here: custom_all_reduce: not used, rank 0: no such kernels"):
        tuned(tmp_path, lambda memory: FakeDevice(memory, peer_problem="no such kernels"))
    with pytest.raises(ConfigurationError, match="--tune: nothing to tune here: the cpu platform has no kernels over the peers' memory"):
        tuned(tmp_path, lambda memory: CpuPlatform())  # type: ignore[arg-type,return-value]  # no stand-in
    done = processes.run("-m", "commgraph.cli", "bench", "--tune", "table.json", "--iters", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("commgraph bench: --tune: nothing to tune here: the cpu platform has no kernels")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ConfigurationError, match="--tune: kernels add up float32 and bfloat16, not int32"):
        spmd(lambda world: bench_run.run(Job(world, "threads", tmp_path), plan.parse(["--tune", "t.json", "--dtype", "int32"]), {}), 2)


def test_tensors_of_a_device_are_measured_beside_those_of_the_host(tmp_path: Path) -> None:
    memory = Memory()
    asked = plan.parse(["--op", "all_reduce_", "all_gather", "barrier", "--sizes", "4Ki", "--iters", "1"])

    def rank(world: cg.World) -> Any:
        world.platform = platform = FakeDevice(memory)
        waited: list[torch.device] = []
        setattr(platform, "synchronize", waited.append)  # noqa: B010 - of this one
        found = bench_run.run(Job(world, "threads", tmp_path), asked, {})
        assert waited, "a batch ends when the device has made its calls"
        return found

    found, _ = spmd(rank, 2)
    strategies = {(row.operation, row.strategy) for row in found.rows if row.who == "commgraph"}
    assert {("all_reduce_", "custom_all_reduce, fake"), ("all_gather", "fakeccl, fake")} <= strategies
    assert [strategy for operation, strategy in strategies if operation == "barrier"] == ["shm"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_the_overhead_of_every_kind_of_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    asked = plan.parse(["--op", "overhead", "--sizes", "4Ki", "--iters", "2", "--strategy", "gloo"])
    found, _ = spmd(lambda world: bench_run.run(Job(world, "threads", tmp_path), asked, {}), 2)
    assert {row.operation for row in found.rows} == {"overhead"}
    assert all(0 < row.p10 <= row.median <= row.p90 for row in found.rows)
    ways = {row.strategy for row in found.rows}
    assert {"ctx.tp, gloo", "gloo's method", "with timeout=", "gather", "reduce_from", "all_reduce_async, waited for"} <= ways
    assert ("compiled" in ways) == (shutil.which("g++") is not None)
