"""The command line of `commgraph report`: records of ranks in a format that other programs read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from commgraph.shm.recorder import SUFFIX
from commgraph.trace.read import RankRecord, read_file
from commgraph.trace.write import chrome_trace, flight_records, json_lines

__all__ = ["main"]

_FORMS: Final = (
    "NAME.json: a trace for Perfetto (ui.perfetto.dev) and chrome://tracing; NAME.jsonl: a line for each call; "
    "FOLDER/: torch's flight records"
)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 2 where there is nothing to read, or the output has an unknown form."""
    parser = argparse.ArgumentParser(
        "commgraph report", description="Writes the recorded calls of all ranks, on one time axis, in a format that other programs read."
    )
    parser.add_argument("record", nargs="+", type=Path, help="files of records, or folders of them")
    parser.add_argument("-o", "--output", required=True, help=_FORMS)
    given = parser.parse_args(argv)
    try:
        records = read_all(given.record)
    except (OSError, ValueError) as error:
        print(f"commgraph report: {error}", file=sys.stderr)
        return 2
    output = Path(given.output)
    if given.output.endswith("/") or output.is_dir():
        count = flight_records(records, output)
        print(f"{count} calls of {len(records)} ranks in {output}: torchfrtrace --prefix rank_ {output}")
    elif output.suffix == ".json":
        print(f"{chrome_trace(records, output)} calls of {len(records)} ranks in {output}")
    elif output.suffix == ".jsonl":
        print(f"{json_lines(records, output)} calls of {len(records)} ranks in {output}")
    else:
        print(f"commgraph report: no form of output is called {given.output!r}. {_FORMS}", file=sys.stderr)
        return 2
    return 0


def read_all(paths: Sequence[Path]) -> list[RankRecord]:
    """Return the records in files and folders, by rank.

    Raises:
        OSError, ValueError: one cannot be read, or there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no record of calls (*{SUFFIX}) in {', '.join(map(str, paths))}: start the job with COMMGRAPH_RECORD=FOLDER")
    records = sorted(map(read_file, files), key=lambda record: (record.world, record.rank))
    if len(worlds := {record.world for record in records if not record.facts.get("queue")}) > 1:
        names = ", ".join(sorted(world[:12] for world in worlds))
        raise ValueError(f"the records are of {len(worlds)} worlds ({names}), whose ranks have equal numbers: give those of one")
    return records
