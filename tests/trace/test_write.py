"""Records in other formats: a Chrome trace, torch's flight records as its own reader reads them, and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.flight_recorder import fr_trace

import commgraph as cg
from commgraph import progress
from commgraph.cli import main
from commgraph.testing import spmd
from commgraph.trace.read import RankRecord, read_file
from commgraph.trace.write import chrome_trace, flight_records, json_lines


def program(world: cg.World, folder: Path, skips: bool) -> None:
    options = cg.CommunicatorOptions(record=folder, host_timeout=1)
    with world.context(cg.Layout(2, tp=2), name="target", options=options) as context:
        for rows in (1, 2):
            context.tp.all_reduce(torch.ones(rows, 3))
        context.tp.all_gather(torch.ones(2, 2), 0)
        context.tp.reduce_scatter(torch.ones(2, 2), 0)
        context.tp.broadcast_object("x")
        if world.rank == 0:
            context.tp.send(torch.ones(5), 1)
        else:
            context.tp.recv(5, torch.float32, 0)
        if not (skips and world.rank == 1):
            context.tp.barrier()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RankRecord]:
    folder = tmp_path_factory.mktemp("records")
    spmd(lambda world: program(world, folder, False), 2)
    return sorted(map(read_file, folder.glob("*.cgrecord")), key=lambda record: record.rank)


def test_a_chrome_trace_has_every_call_on_one_axis(records: list[RankRecord], tmp_path: Path) -> None:
    count = chrome_trace(records, tmp_path / "trace.json")
    events: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] == "X"]
    assert len(calls) == count == 16
    assert {event["name"] for event in calls} >= {"target/tp/all_reduce", "target/tp/send", "target/tp/recv", "target/tp/broadcast_object"}
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [f"rank {r} ({records[0].facts['host']})" for r in (0, 1)]
    assert min(event["ts"] for event in calls) == 0
    for event in calls:
        assert event["dur"] >= 0
        assert {"pid", "tid", "ts", "name", "args"} <= set(event)
    # A collective ends on no rank before it has begun on all of them.
    for number in (0, 1):
        both = [event for event in calls if event["name"] == "target/tp/all_reduce" and event["args"]["sequence"] == number]
        assert len(both) == 2
        assert max(event["ts"] for event in both) <= min(event["ts"] + event["dur"] for event in both) + 1


def test_lines_of_json(records: list[RankRecord], tmp_path: Path) -> None:
    assert json_lines(records, tmp_path / "calls.jsonl") == 16
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    first = lines[0]
    assert (first["rank"], first["group"], first["operation"], first["shape"], first["dtype"]) == (
        0,
        "target/tp",
        "all_reduce",
        [1, 3],
        "float32",
    )
    assert first["nbytes"] == 12
    assert first["state"] == "done"
    assert first["ranks"] == [[0, 1, 1]]
    assert "test_write.py" in first["site"]


def read_by_torch(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    said: list[str] = []
    write: Callable[..., None] = lambda text, *args: said.append(str(text) % args if args else str(text))  # noqa: E731 - a stand-in
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(f"torch.distributed.flight_recorder.components.fr_logger.FlightRecorderLogger.{level}", lambda _, *a: write(*a))
    fr_trace.main(["--prefix", "rank_", str(folder)])
    return "\n".join(said) + capsys.readouterr().out


def test_torch_reads_flight_records(
    records: list[RankRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flight_records(records, tmp_path / "flight") == 12
    said = read_by_torch(tmp_path / "flight", capsys, monkeypatch)
    assert "mismatch" not in said.lower().replace("mismatch_cap", ""), said


def test_torch_finds_the_call_that_a_rank_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(cg.CommGraphError):
        spmd(lambda world: program(world, tmp_path, True), 2)
    records = [read_file(path) for path in tmp_path.glob("*.cgrecord")]
    flight_records(records, tmp_path / "flight")
    assert "barrier" in read_by_torch(tmp_path / "flight", capsys, monkeypatch)


def test_the_command_writes_each_form(
    records: list[RankRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    source = str(Path(records[0].source).parent)
    for name, count in (("trace.json", 16), ("calls.jsonl", 16), ("flight/", 12)):
        assert main(["report", source, "-o", f"{tmp_path}/{name}"]) == 0
        said, shown = capsys.readouterr()
        assert f"{count} calls of 2 ranks" in said
        assert [line for line in shown.splitlines() if " 2 of 2 " in line] == [
            "commgraph report: 2 of 2 records read",
            "commgraph report: 2 of 2 ranks written",
        ]
    assert sorted(path.name for path in (tmp_path / "flight").iterdir()) == ["rank_0", "rank_1"]
    assert main(["report", source, "-o", str(tmp_path / "x.txt")]) == 2
    assert "no form of output" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.json")]) == 2
    assert "COMMGRAPH_RECORD=FOLDER" in capsys.readouterr().err
    spmd(lambda world: program(world, tmp_path, False), 2)
    assert main(["report", source, str(tmp_path), "-o", str(tmp_path / "x.json")]) == 2
    assert "2 worlds" in capsys.readouterr().err
