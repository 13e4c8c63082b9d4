"""The command line of `commgraph doctor`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import commgraph as cg
from commgraph import launch
from commgraph.doctor import attach, machine, ranks
from commgraph.errors import CommGraphError
from commgraph.trace.diagnose import Diagnosis

__all__ = ["main"]

# Columns of a name, and of text beside it, at least.
_NAME_COLUMNS, _LEAST_COLUMNS = 34, 60


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 1 where ranks cannot be connected."""
    parser = argparse.ArgumentParser(
        "commgraph doctor",
        description="Says what this machine offers to ranks: launcher, hosts, network, platform, strategies, native module, limits. "
        "Started by a launcher, as in torchrun --nproc-per-node 4 -m commgraph doctor, it looks at the ranks of that job, else at two of "
        "its own.",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument("--pid", type=int, help="say what the job of that process is doing, and who waits for whom")
    parser.add_argument("--job", metavar="NAME", help="likewise, by a job's id, a world's name, a context, or a part of the command line")
    parser.add_argument("--record", metavar="PATH", nargs="+", type=Path, help="likewise, from files of records or folders of them")
    given = parser.parse_args(argv)
    if given.pid is not None or given.job is not None or given.record is not None:
        return _attach(given)
    facts: dict[str, Any] = dict(machine.look(os.environ))
    try:
        several = launch.detect(os.environ).world_size > 1
    except CommGraphError:
        several = False
    if several:
        with cg.World.from_env() as world:
            found, rank = ranks.find(world), world.rank
    else:
        found, rank = ranks.look_alone(), 0
    facts |= found
    if rank == 0:
        print(json.dumps(facts, indent=2) if given.json else _page(facts))
    return 0 if found["strategies"] else 1


def _attach(given: argparse.Namespace) -> int:
    """Diagnose a job; return 0, 1 where a rank holds up others, or 2 where there is no record."""
    try:
        if given.pid is not None:
            found = attach.attach_to_process(given.pid)
        elif given.job is not None:
            found = attach.attach_to_job(given.job)
        else:
            found = attach.attach_to_records(given.record)
    except attach.NotRecordedError as error:
        print(f"commgraph doctor: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps([_as_json(one) for one in found], indent=2))
    else:
        print("\n\n".join(one.text for one in found))
    return 1 if any(one.culprits for one in found) else 0


def _as_json(found: Diagnosis) -> dict[str, Any]:
    return {
        "ranks": {rank: state.says for rank, state in sorted(found.states.items())},
        "waits": [{"rank": wait.rank, "in": wait.call.what, "at": wait.call.site, "for": wait.on} for wait in found.waits],
        "unknown": list(found.unknown),
        "culprits": list(found.culprits),
        "finding": found.finding,
    }


def _page(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the facts as text for a terminal."""
    width = max(shutil.get_terminal_size((120, 40)).columns, _NAME_COLUMNS + _LEAST_COLUMNS)
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        for name, value in entries.items():
            if value:
                lines += textwrap.wrap(
                    _text(value),
                    width,
                    initial_indent=f"  {name}".ljust(_NAME_COLUMNS - 1) + " ",
                    subsequent_indent=" " * _NAME_COLUMNS,
                    break_on_hyphens=False,
                )
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" if isinstance(one, list) else f"{name}={one}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "without address"
    return str(value)
