"""The page of `commgraph report`: its sums against counts over single calls, from 2 ranks to 512, and that it is one file."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import commgraph as cg
from commgraph.cli import main
from commgraph.shm.recorder import COLLECTIVE, DONE, ENTRY, FACTS, GROUP, HEADER, INCOMING, MAGIC, OUTGOING, SUFFIX, VERSION
from commgraph.testing import spmd
from commgraph.testing.faults import COUNTED
from commgraph.trace import times
from commgraph.trace.columns import Columns, columns_of, entry_type
from commgraph.trace.flows import flows_of, places_of
from commgraph.trace.read import RankRecord, calls_of, read_file

TEXTS = 1 << 16
needs_plotly = pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is not installed (extra `report`)")


def program(world: cg.World, folder: Path) -> None:
    options = cg.CommunicatorOptions(record=folder)
    with world.context(cg.Layout(4, tp=2, pp=2), name="target", options=options) as context:
        x = torch.ones(3, 5)
        for _ in range(5):
            context.tp.all_reduce(x)
            context.tp.all_gather(x, 0)
            context.tp.reduce_scatter(torch.ones(4, 2), 0)
            context.world.broadcast(x, 2)
            context.world.gather(x, 1, 0)
            context.world.scatter(torch.ones(4, 2) if world.rank == 3 else None, 3, 0)
            context.world.all_gather_object({"rank": world.rank})
            context.world.broadcast_object("hello" if world.rank == 1 else None, 1)
            context.world.gather_object("hello", 2)
            context.world.scatter_object(["hello"] * 4 if world.rank == 3 else None, 3)
            context.world.broadcast_tensor_dict({"x": x, "n": 1} if world.rank == 1 else None, 1)
            if context.pp.rank_in_group == 0:
                context.pp.send(x, 1)
                context.pp.send_object("hello", 1)
            else:
                context.pp.recv(x.shape, x.dtype, 0)
                context.pp.recv_object(0)
        context.world.barrier()


@functools.lru_cache(1)
def _read(folder: str) -> tuple[RankRecord, ...]:
    return tuple(sorted(map(read_file, Path(folder).glob(f"*{SUFFIX}")), key=lambda record: record.rank))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[RankRecord, ...]:
    folder = tmp_path_factory.mktemp("records")
    spmd(lambda world: program(world, folder), 4, nodes=2)
    return _read(str(folder))


def counted(records: Sequence[RankRecord], size: int) -> tuple[dict[str, list[list[float]]], dict[tuple[str, str], list[float]]]:
    """Bytes from rank to rank by group, and calls, bytes given and seconds by group and operation: call by call, as the page says it."""
    have = {record.rank for record in records}
    matrices: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0] * size for _ in range(size)])
    uses: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for record in records:
        me = record.rank
        for call in calls_of(record):
            if call.state != DONE:
                continue
            use = uses[call.group.label, call.operation]
            use[0] += 1
            use[1] += call.nbytes
            use[2] += (call.end - call.begin) / 1e9
            ranks, b, n = call.group.ranks, call.nbytes, call.group.size
            root = ranks[call.peer] if call.peer >= 0 else None
            for other in ranks:
                if call.kind == OUTGOING:
                    matrices[call.group.label][me][other] += b * (other == root)
                elif call.kind == INCOMING:
                    matrices[call.group.label][other][me] += b * (other == root and other not in have)
                elif other != me and call.operation == "all_reduce":
                    matrices[call.group.label][me][other] += 2 * b / n
                elif other != me and call.operation in ("all_gather", "all_gather_object"):
                    matrices[call.group.label][me][other] += b
                elif other != me and call.operation in ("broadcast", "broadcast_object", "broadcast_tensor_dict"):
                    matrices[call.group.label][me][other] += b * (root == me)
                elif other != me and call.operation == "scatter":
                    matrices[call.group.label][me][other] += b / n * (root == me)
                elif other != me and call.operation == "scatter_object":
                    matrices[call.group.label][me][other] += b / (n - 1) * (root == me)
                elif other != me and call.operation in ("gather", "gather_object"):
                    matrices[call.group.label][me][other] += b * (root == other)
                elif other != me:
                    assert call.operation in ("reduce_scatter", "barrier", "close"), call.operation
                    matrices[call.group.label][me][other] += b / n
    return matrices, uses


@pytest.mark.parametrize("given", [(0, 1, 2, 3), (1, 2, 3), (2,)])
def test_sums_are_those_of_single_calls(records: tuple[RankRecord, ...], given: tuple[int, ...]) -> None:
    some = [records[rank] for rank in given]
    columns = columns_of(some)
    found = flows_of(columns, places_of(columns, 64))
    matrices, uses = counted(some, 4)
    assert {label for label, matrix in matrices.items() if np.sum(matrix)} == {k for k, matrix in found.matrices.items() if matrix.sum()}
    for label, matrix in found.matrices.items():
        np.testing.assert_allclose(matrix, matrices[label], err_msg=label)
    everything = np.sum(list(matrices.values()), axis=0)
    np.testing.assert_allclose(found.sent, everything.sum(1))
    np.testing.assert_allclose(found.received, everything.sum(0))
    assert found.unattributed == 0
    assert set(found.uses) == set(uses)
    for key, use in found.uses.items():
        assert [use.calls, use.given] == uses[key][:2], key
        assert use.seconds == pytest.approx(uses[key][2]), key
    assert sum(use.calls for use in found.by_size.values()) == sum(
        call.state == DONE and call.nbytes > 0 for one in some for call in calls_of(one)
    )
    assert columns.missing == [rank for rank in range(4) if rank not in given]


def test_who_began_last_is_found_by_comparing_each_collective(records: tuple[RankRecord, ...]) -> None:
    columns = columns_of(records)
    found = times.stragglers(columns, 5)
    begins: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        for call in calls_of(record):
            if call.kind == COLLECTIVE:
                begins[call.group.uid, call.sequence].append((call.begin + record.to_real, record.rank))
    assert found.compared == len(begins)
    assert found.left_out == 0
    late, often = [0.0] * 4, Counter[int]()
    for each in begins.values():
        (before, _), (last, rank) = sorted(each)[-2:]
        late[rank] += (last - before) / 1e9
        often[rank] += 1
    np.testing.assert_allclose(found.seconds, late, atol=1e-9)
    assert found.times.tolist() == [often[rank] for rank in range(4)]
    assert len(found.worst) == 5
    assert found.worst[0].seconds == max(one.seconds for one in found.worst) >= max(late) / len(begins)
    assert "test_report.py" in found.worst[0].site
    assert sum(count for _, _, count, _, _, _ in found.by_use) == found.compared


def test_time_in_calls_is_all_of_it(records: tuple[RankRecord, ...]) -> None:
    columns = columns_of(records)
    span = times.span_of(columns)
    edges, part = times.busy(columns, places_of(columns, 64), span, 50)
    assert part.shape == (4, 50)
    assert part.min() > -1e-6
    for record in records:
        expected = sum(call.end - call.begin for call in calls_of(record))
        assert part[record.rank].sum() * (edges[1] - edges[0]) == pytest.approx(expected, rel=1e-6)
    whole = times.longest(columns, span, 10**6)
    assert [len(at) for _, at in whole] == [len(one) for one in columns.ranks]
    few = times.longest(columns, span, 16)
    assert all(len(at) >= 2 for _, at in few)
    assert sum(len(at) for _, at in few) <= 16
    taken = {(one.rank, i): one.end[i] - one.begin[i] for one in columns.ranks for i in range(len(one))}
    assert max(taken, key=lambda key: taken[key]) in {(columns.ranks[index].rank, int(i)) for index, at in few for i in at}


def synthetic(size: int, calls: int, *, capacity: int | None = None) -> Iterator[RankRecord]:
    """Records of ranks on hosts of 8: all_reduce of 1,000 bytes on the host, with rank 5 always late by 3 us, and a ring of sends."""
    from commgraph.trace.read import parse

    capacity = calls if capacity is None else capacity
    for rank in range(size):
        first, texts = rank - rank % 8, b""
        facts = {"world": "w", "rank": rank, "world_size": size, "node": rank // 8, "nodes": size // 8, "host": f"h{rank // 8}"}
        tp = {"context": "m", "name": "tp", "uid": f"tp{first}", "ranks": [[first, first + 7, 1]], "rank_in_group": rank % 8}
        world = {"context": "", "name": "world", "uid": "world", "ranks": [[0, size - 1, 1]], "rank_in_group": rank}
        for kind, text in (
            (1, ""),
            (FACTS, json.dumps(facts)),
            (GROUP, json.dumps(tp)),
            (GROUP, json.dumps(world)),
            (1, "all_reduce"),
            (1, "send"),
            (1, "step.py:7"),
        ):
            texts += (kind << 24 | len(text)).to_bytes(4, "little") + text.encode()
        entries = np.zeros(capacity, entry_type())
        for number in range(max(0, calls - capacity), calls):
            is_sum, begin = number % 2 == 0, 10**6 + 10_000 * number + 3000 * (rank == 5) + rank
            entries[number % capacity] = (
                number << 3 | DONE,
                begin,
                begin + 5000,
                number // 2,
                1000,
                6,
                *((2, 4) if is_sum else (3, 5)),
                0,
                0,
            )
            if is_sum:
                entries[number % capacity]["peer"] = -1
            else:
                entries[number % capacity]["peer"] = (rank + 1) % size
                entries[number % capacity]["kind"] = OUTGOING
        head = HEADER.pack(MAGIC, VERSION, ENTRY.size, capacity, 4096, TEXTS, 4096 + TEXTS, len(texts), calls, 0, 0, 10**18, 0, 50)
        yield parse(head.ljust(4096, b"\0") + texts.ljust(TEXTS, b"\0") + entries.tobytes(), f"rank {rank}")


def test_of_512_ranks_none_is_lost() -> None:
    columns = columns_of(synthetic(512, 20))
    assert [one.rank for one in columns.ranks] == list(range(512))
    assert sum(map(len, columns.ranks)) == 512 * 20
    places = places_of(columns, 64)
    assert (places.unit, len(places.names), places.names[63]) == ("host", 64, "h63")
    found = flows_of(columns, places)
    assert found.sent.tolist() == pytest.approx([10 * (2 * 1000 / 8 * 7 + 1000)] * 512)
    assert found.received.tolist() == pytest.approx(found.sent.tolist())
    # All of the sums stays on the hosts, as do 7 of 8 messages.
    np.testing.assert_allclose(found.matrices["m/tp"], np.eye(64) * 8 * 10 * 1750)
    np.testing.assert_allclose(found.matrices["world"], np.eye(64) * 70_000 + np.roll(np.eye(64), 1, axis=1) * 10_000)
    late = times.stragglers(columns)
    assert (late.compared, late.left_out) == (640, 0)
    assert int(late.seconds.argmax()) == 5
    assert late.seconds[5] == pytest.approx(10 * (3000 + 5 - 7) / 1e9)
    assert late.worst[0].rank == 5
    # Hosts that are not all known, and more hosts than there is room for, are blocks of ranks.
    part = columns_of(one for one in synthetic(512, 4) if one.rank >= 100)
    assert part.missing == list(range(100))
    for some, limit in ((part, 64), (columns, 50)):
        blocks = places_of(some, limit)
        assert blocks.unit.startswith("block of ")
        assert len(blocks.names) <= limit
        assert np.bincount(blocks.of).sum() == 512


def test_what_the_ring_has_overwritten_is_said_and_left_out() -> None:
    some = [next(iter(one)) for one in (synthetic(8, 20, capacity=8), synthetic(8, 20))]
    columns = columns_of([some[0], *list(synthetic(8, 20))[1:]])
    assert [one.lost for one in columns.ranks] == [12, *[0] * 7]
    assert columns.ranks[0].sequence.tolist() == [6, 6, 7, 7, 8, 8, 9, 9]
    late = times.stragglers(columns)
    assert (late.compared, late.left_out) == (4, 6)


def test_records_that_do_not_belong_together_are_refused(records: tuple[RankRecord, ...]) -> None:
    with pytest.raises(ValueError, match="second record of rank 0"):
        columns_of([records[0], records[0]])
    with pytest.raises(ValueError, match="2 worlds"):
        columns_of([records[0], next(synthetic(8, 2))])
    with pytest.raises(ValueError, match="no record"):
        columns_of([])


class Links(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: Counter[str] = Counter()
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = dict(attrs)
        self.found += [str(given[name]) for name in ("src", "href", "srcset", "data", "action") if given.get(name)]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])


@pytest.fixture(scope="module")
def page(records: tuple[RankRecord, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", str(Path(records[0].source).parent), "-o", str(place), "--links", "shm=1us:8GB/s,net=5us:40GB/s"]) == 0
    return place


@needs_plotly
def test_the_page_is_one_file(page: Path) -> None:
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.found == []
    assert links.tags["link"] == links.tags["iframe"] == links.tags["img"] == 0
    # The browser itself refuses whatever plotly could ask for.
    assert links.policy.startswith("default-src 'none'")
    assert "http" not in links.policy
    assert list(page.parent.iterdir()) == [page]
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://", own)
    for words in ("4 ranks on 2 hosts", "all_gather_object", "Stragglers", "target/tp", "test_report.py"):
        assert words in own, words
    assert "link shm: 8 GB/s" in text.replace("\\u002f", "/")


@needs_plotly
def test_an_operation_has_one_colour_on_the_whole_page(page: Path) -> None:
    colours: dict[str, set[str]] = {}
    text, decoder = page.read_text(), json.JSONDecoder()
    for found in re.finditer(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*(?=\[)", text):
        traces, _ = decoder.raw_decode(text, found.end())
        for trace in traces:
            if trace.get("type") in ("bar", "scatter") and trace.get("name") in COUNTED:
                colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert len(colours) > 5
    assert all(len(found) == 1 for found in colours.values()), colours
    assert len({colour for found in colours.values() for colour in found}) > 5


@needs_plotly
@pytest.mark.parametrize(("size", "calls"), [(8, 1), (512, 20)])
def test_a_page_of_few_calls_and_of_many_ranks(size: int, calls: int, tmp_path: Path) -> None:
    from commgraph.trace.page import write_page

    missing = 3 if size > 8 else 0
    columns: Columns = columns_of(one for one in synthetic(size, calls) if one.rank >= missing)
    assert write_page(columns, tmp_path / "report.html") == (size - missing) * calls
    text = (tmp_path / "report.html").read_text()
    assert ("No record was given of 3 of 512 ranks: 0, 1, 2." in text) == bool(missing)
    assert len(text) < 12 << 20


@needs_plotly
def test_the_command_refuses_what_it_cannot_draw(
    records: tuple[RankRecord, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(Path(records[0].source).parent), str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "-o", out]) == 2
    assert "COMMGRAPH_RECORD=FOLDER" in capsys.readouterr().err
    assert main(["report", records[0].source, records[0].source, "-o", out]) == 2
    assert "second record of rank 0" in capsys.readouterr().err
    assert main(["report", source, "-o", out, "--links", "nothing.json"]) == 2
    assert "nothing.json is no file of `commgraph bench --fit`" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find(name, *rest))
    assert main(["report", source, "-o", out]) == 2
    assert "pip install 'commgraph[report]'" in capsys.readouterr().err
    assert not Path(out).exists()


@needs_plotly
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_draws_all_of_it(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--virtual-time-budget=5000",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    # Of a plot, plotly makes one such element when it has drawn it: matrix, graph, times, stragglers, bandwidth, timeline.
    drawn: Any = re.findall(r'class="main-svg"', done.stdout)
    assert len(drawn) >= 6
    assert done.stdout.count('class="hm"') >= 2  # the matrix that is shown, and the time in calls
    assert "barlayer" in done.stdout
