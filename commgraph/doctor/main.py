"""The command line of `commgraph doctor`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import commgraph as cg
from commgraph import launch
from commgraph.doctor import machine, ranks
from commgraph.errors import CommGraphError

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
    given = parser.parse_args(argv)
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
