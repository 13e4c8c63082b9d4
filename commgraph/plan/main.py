"""The command line of ``commgraph plan``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import attrs

from commgraph.errors import ConfigurationError
from commgraph.plan.links import Links
from commgraph.plan.search import DEVICES, Device, Estimate, Workload, candidates, search
from commgraph.plan.shapes import DTYPE_BYTES, ModelShapes
from commgraph.progress import progress

__all__ = ["main"]

_RATES: Final[Mapping[str, float]] = MappingProxyType({"G": 1e9, "T": 1e12, "P": 1e15})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see commgraph plan --help")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        given = _parser().parse_args(argv)
        shapes = ModelShapes.read(given.model)
        if given.dtype is not None:
            shapes = attrs.evolve(shapes, dtype=given.dtype)
        links = Links.usual() if given.links is None else Links.read(given.links)
        device = _device(given)
        fixed = {axis: size for axis in ("tp", "pp", "dp") if (size := getattr(given, axis)) is not None}
        for name in ("world_size", "nodes", "batch", "prompt", "context", "top", *fixed):
            if getattr(given, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(given, name)}: at least 1")
        found: dict[str, list[Estimate]] = {}
        phases = ("decode", "prefill") if given.phase == "both" else (given.phase,)
        layouts = len(candidates(shapes, given.world_size, **fixed))
        with progress("commgraph plan", layouts * len(phases), "layouts") as advance:
            for phase in phases:
                workload = Workload(batch=given.batch, prompt=given.prompt, context=given.context, decode=phase == "decode")
                found[phase] = search(
                    shapes, given.world_size, given.nodes, links, device, workload, fixed=fixed, by=given.sort, advance=advance
                )
    except (ConfigurationError, OSError) as error:
        print(f"commgraph plan: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({phase: [_row(one) for one in rows[: given.top]] for phase, rows in found.items()}, indent=1))
        return 0
    print(f"{shapes.name}: {shapes.parameters / 1e9:.2f} billion parameters, {shapes.dtype}")
    print(f"{given.world_size} ranks on {given.nodes} hosts, {device.name}; links: {links.where}")
    for phase, rows in found.items():
        print()
        print(_heading(phase, given, len(rows)))
        print(_table(rows[: given.top]))
        print()
        print(_details(rows[0]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("commgraph plan", description="Predicts what a model communicates on each layout, and ranks the layouts.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER|config.json", help="configuration of Hugging Face's form")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts, with equally many ranks each (default: 1)")
    parser.add_argument("--batch", type=int, default=32, help="sequences, of all replicas together (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt, for prefill (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens whose keys and values are kept (default: %(default)s)")
    parser.add_argument("--links", metavar="KIND=TIME:BANDWIDTH,...|FILE", help="figures, or a file of `commgraph bench --fit`")
    parser.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument("--flops", metavar="RATE", help="of a device, e.g. 989T, in place of the data sheet's")
    parser.add_argument("--memory-bandwidth", metavar="RATE", help="bytes in a second, e.g. 3.35T")
    parser.add_argument("--memory", metavar="BYTES", help="of a device, e.g. 80G")
    parser.add_argument("--efficiency", type=float, help="part of both rates that is reached (default: 0.7)")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="of weights and activations (default: the configuration's)")
    for axis in ("tp", "pp", "dp"):
        parser.add_argument(f"--{axis}", type=int, help=f"layouts with this {axis} only")
    parser.add_argument("--phase", choices=("both", "prefill", "decode"), default="both", help="(default: both)")
    parser.add_argument("--sort", choices=("throughput", "latency"), default="throughput", help="(default: %(default)s)")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    return parser


def _device(given: argparse.Namespace) -> Device:
    if given.device not in DEVICES:
        raise ConfigurationError(f"--device {given.device}: known are {', '.join(DEVICES)}; give the nearest one and --flops, --memory ...")
    device = DEVICES[given.device]
    changes: dict[str, Any] = {}
    for option, field in (("flops", "flops"), ("memory_bandwidth", "bandwidth"), ("memory", "memory")):
        text = getattr(given, option)
        if text is not None:
            try:
                changes[field] = float(text[:-1]) * _RATES[text[-1:]]
            except (ValueError, KeyError):
                raise ConfigurationError(f"--{option.replace('_', '-')} {text}: a number with G, T or P behind it, e.g. 80G") from None
    if given.efficiency is not None:
        if not 0 < given.efficiency <= 1:
            raise ConfigurationError(f"--efficiency {given.efficiency}: above 0, up to 1")
        changes["efficiency"] = given.efficiency
    return attrs.evolve(device, **changes)


def _heading(phase: str, given: argparse.Namespace, layouts: int) -> str:
    what = f"the next token of {given.batch} sequences" if phase == "decode" else f"{given.batch} prompts of {given.prompt} tokens"
    return f"{phase}: {what}; the best of {layouts} layouts by {given.sort}"


def _table(rows: Sequence[Estimate]) -> str:
    head = ("tp", "pp", "dp", "replicas", "ms/step", "ms latency", "tokens/s", "comm", "GB/rank", "why")
    lines = [head] + [
        (
            *(str(one.axes[axis]) for axis in ("tp", "pp", "dp", "replica")),
            f"{one.period * 1e3:.2f}",
            f"{one.latency * 1e3:.2f}",
            f"{one.rate:,.0f}",
            f"{one.share:.0%}",
            f"{one.total_memory / 1e9:.1f}",
            one.reason,
        )
        for one in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == len(head) - 1 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _details(one: Estimate) -> str:
    sizes = ", ".join(f"{axis}={size}" for axis, size in one.axes.items() if size > 1) or "one rank"
    lines = [f"{sizes}: what a rank communicates in a step"]
    for group, count in one.sent.items():
        seconds = one.communication.get(group, 0.0)
        lines.append(f"  {group:6}  {one.strategies[group]:12}  {count:>15,} bytes  {seconds * 1e3:9.3f} ms")
    named = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in one.memory.items())
    return "\n".join([*lines, f"  memory of a rank: {named}"])


def _row(one: Estimate) -> dict[str, Any]:
    return {
        "axes": one.axes,
        "step_seconds": one.period,
        "latency_seconds": one.latency,
        "tokens_per_second": one.rate,
        "compute_seconds": one.compute,
        "communication_seconds": one.communication,
        "sent_bytes": one.sent,
        "strategies": one.strategies,
        "memory_bytes": one.memory,
        "fits": one.fits,
        "reason": one.reason,
    }
