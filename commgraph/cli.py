"""The command `commgraph`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Sequence

from commgraph import __version__
from commgraph.commands import ended_well

__all__ = ["main"]


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
    # Each command parses its own arguments: launchers start `bench`, `demo` and `doctor` without this one.
    commands.add_parser("demo", help="generate text on several processes of this machine", add_help=False)
    commands.add_parser("bench", help="measure what communication takes here, alone or beside other libraries", add_help=False)
    commands.add_parser(
        "report", help="draw recorded calls as a page, or write them as a trace, flight records or lines of JSON", add_help=False
    )
    commands.add_parser("doctor", help="say what this machine offers, and what a job on it is doing", add_help=False)
    commands.add_parser("layout", help="print, draw and compare where ranks sit", add_help=False)
    commands.add_parser("generate", help="write text with a model of transformers on several processes", add_help=False)
    commands.add_parser("plan", help="predict what a model communicates on each layout, and rank the layouts", add_help=False)
    given, _ = parser.parse_known_args(argv)
    if given.command == "demo":
        return _demo(argv[argv.index("demo") + 1 :])
    if given.command == "bench":
        return _bench(argv[argv.index("bench") + 1 :])
    if given.command == "report":
        return _report(argv[argv.index("report") + 1 :])
    if given.command == "doctor":
        return _doctor(argv[argv.index("doctor") + 1 :])
    if given.command == "generate":
        return _generate(argv[argv.index("generate") + 1 :])
    if given.command == "plan":
        return _plan(argv[argv.index("plan") + 1 :])
    return _layout(argv[argv.index("layout") + 1 :])


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


def _report(argv: Sequence[str]) -> int:
    from commgraph.trace.command import main as run_report

    return run_report(argv)


def _doctor(argv: Sequence[str]) -> int:
    from commgraph.doctor.main import main as run_doctor

    return run_doctor(argv)


def _generate(argv: Sequence[str]) -> int:
    if importlib.util.find_spec("transformers") is None:
        print("commgraph generate needs transformers: pip install 'commgraph[transformers]'", file=sys.stderr)
        return 2
    from commgraph.generate import main as run_generate

    return run_generate(argv)


def _plan(argv: Sequence[str]) -> int:
    from commgraph.plan.main import main as run_plan

    return run_plan(argv)


def _layout(argv: Sequence[str]) -> int:
    from commgraph.layout.command import main as run_layout

    return run_layout(argv)


if __name__ == "__main__":
    sys.exit(main())
