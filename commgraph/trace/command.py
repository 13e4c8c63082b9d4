"""The command line of `commgraph report`: records of ranks as a page, or in a format that other programs read."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from commgraph.errors import ConfigurationError
from commgraph.plan.links import Links
from commgraph.progress import progress
from commgraph.shm.recorder import SUFFIX
from commgraph.trace.read import RankRecord, read_file
from commgraph.trace.write import chrome_trace, flight_records, json_lines

__all__ = ["main"]

_FORMS: Final = (
    "NAME.html: a page to look at; NAME.json: a trace for Perfetto (ui.perfetto.dev) and chrome://tracing; NAME.jsonl: a line for each "
    "call; FOLDER/: torch's flight records"
)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 2 where there is nothing to read, or the output has an unknown form."""
    parser = argparse.ArgumentParser(
        "commgraph report", description="Writes the recorded calls of all ranks, on one time axis: as a page, or for other programs."
    )
    parser.add_argument("record", nargs="+", type=Path, help="files of records, or folders of them")
    parser.add_argument("-o", "--output", required=True, help=_FORMS)
    parser.add_argument(
        "--links", metavar="FILE", help="figures of links, as of `commgraph plan`: NAME.html shows their bandwidth beside what was achieved"
    )
    given = parser.parse_args(argv)
    output = Path(given.output)
    is_folder = given.output.endswith("/") or output.is_dir()
    if not is_folder and output.suffix not in (".html", ".json", ".jsonl"):
        print(f"commgraph report: no form of output is called {given.output!r}. {_FORMS}", file=sys.stderr)
        return 2
    try:
        files = _files_in(given.record)
        if output.suffix == ".html" and not is_folder:
            return _page(files, output, given.links)
        records = _read_all(files)
    except (OSError, ValueError, ConfigurationError) as error:
        print(f"commgraph report: {error}", file=sys.stderr)
        return 2
    write = flight_records if is_folder else chrome_trace if output.suffix == ".json" else json_lines
    with progress("commgraph report", len(records), "ranks written") as advance:
        count = write(records, output, advance)
    then = f": torchfrtrace --prefix rank_ {output}" if is_folder else ""
    print(f"{count} calls of {len(records)} ranks in {output}{then}")
    return 0


def _page(files: Sequence[Path], output: Path, links: str | None) -> int:
    missing = [name for name in ("numpy", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"commgraph report: a page needs {' and '.join(missing)}: pip install 'commgraph[report]'", file=sys.stderr)
        return 2
    from commgraph.trace.columns import columns_of
    from commgraph.trace.page import write_page

    found = None if links is None else Links.read(links)
    queues = 0

    def of_ranks() -> Iterator[RankRecord]:
        nonlocal queues
        with progress("commgraph report", len(files), "records") as advance:
            for file in files:
                record = read_file(file)
                advance()
                if record.facts.get("queue"):
                    queues += 1  # whose ranks have numbers of their own
                else:
                    yield record

    try:
        columns = columns_of(of_ranks())
    except ValueError as error:
        if queues:
            raise ValueError(f"{error}; {queues} of {len(files)} are records of a MessageQueue, which the page leaves out") from error
        raise
    bandwidths = {}
    if found is not None:
        kinds = ("shm", "net") if columns.ranks[0].facts["nodes"] > 1 else ("shm",)
        bandwidths = {f"link {kind}": 1 / found.of(kind, columns.world_size).byte for kind in kinds}
    count = write_page(columns, output, bandwidths)
    left_out = f"; {queues} records of a MessageQueue are left out" if queues else ""
    print(f"{count} calls of {len(columns.ranks)} ranks in {output}{left_out}")
    return 0


def _files_in(paths: Sequence[Path]) -> list[Path]:
    """Return the files of records, and those in folders.

    Raises:
        ValueError: there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no record of calls (*{SUFFIX}) in {', '.join(map(str, paths))}: start the job with COMMGRAPH_RECORD=FOLDER")
    return files


def _read_all(files: Sequence[Path]) -> list[RankRecord]:
    """Return the records in files, by rank.

    Raises:
        OSError, ValueError: one cannot be read, or they are of several worlds.
    """
    records = []
    with progress("commgraph report", len(files), "records read") as advance:
        for file in files:
            records.append(read_file(file))
            advance()
    records.sort(key=lambda record: (record.world, record.rank))
    if len(worlds := {record.world for record in records if not record.facts.get("queue")}) > 1:
        names = ", ".join(sorted(world[:12] for world in worlds))
        raise ValueError(f"the records are of {len(worlds)} worlds ({names}), whose ranks have equal numbers: give those of one")
    return records
