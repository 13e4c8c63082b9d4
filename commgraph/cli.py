"""The command `commgraph`."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from commgraph import __version__
from commgraph.commands import ended_well
from commgraph.errors import LayoutError

__all__ = ["main"]

_AXES = ("dp", "pp", "pcp", "tp", "dcp")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return ended_well("commgraph", functools.partial(_run, list(sys.argv[1:] if argv is None else argv)))


def _run(argv: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Pictures are drawn with box characters; a terminal that lacks them shows question marks and no traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(
        "commgraph", description="Communication groups for distributed inference and training, without globals."
    )
    parser.add_argument("--version", action="version", version=f"commgraph {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # `bench` and `demo` parse their own arguments: launchers start them without this command.
    commands.add_parser("demo", help="generate text on several processes of this machine", add_help=False)
    commands.add_parser("bench", help="measure what communication takes here, alone or beside other libraries", add_help=False)
    layout = commands.add_parser(
        "layout", help="print and draw where ranks sit", description="Prints and draws where the ranks of a layout sit."
    )
    layout.add_argument("world_size", type=int, help="ranks")
    for axis in _AXES:
        layout.add_argument(f"--{axis}", type=int, default=1, help=f"size of {axis} (default: 1)")
    layout.add_argument("--rank", type=int, help="a rank to mark, with the groups that it is in")
    given, rest = parser.parse_known_args(argv)
    if given.command == "demo":
        return _demo(argv[argv.index("demo") + 1 :])
    if given.command == "bench":
        return _bench(argv[argv.index("bench") + 1 :])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _layout(given)


def _demo(argv: Sequence[str]) -> int:
    try:
        from commgraph.demo.main import main as run_demo
    except ModuleNotFoundError as error:
        print(f"commgraph demo needs {error.name}: pip install 'commgraph[demo]'", file=sys.stderr)
        return 2
    return run_demo(argv)


def _bench(argv: Sequence[str]) -> int:
    from commgraph.bench.main import main as run_bench

    return run_bench(argv)


def _layout(given: argparse.Namespace) -> int:
    from commgraph.layout import Layout, describe

    try:
        layout = Layout(given.world_size, **{axis: getattr(given, axis) for axis in _AXES})
        print(describe(layout, rank=given.rank))
    except LayoutError as error:
        print(f"commgraph layout: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
