"""`Plan`: the options of ``commgraph bench``, parsed from its command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import attrs
import torch

from commgraph.bench import objects, peers, tensors
from commgraph.errors import ConfigurationError

__all__ = ["Plan", "parse", "parse_size", "parse_sizes"]

_UNITS = ("", "Ki", "Mi", "Gi")
_SIZE = re.compile(r"(\d+)(Ki|Mi|Gi|)(?:B|)")
_FACTOR = 4
_LARGEST = 2**40


@attrs.frozen(kw_only=True)
class Plan:
    """One run.

    Attributes:
        operations: which, in order.
        sizes: bytes.
        dtypes: names of torch's.
        samples: of each contender; None: as many as fit into `seconds`.
        seconds: for each contender in each row.
        idle: seconds of silence before an idle reader is looked at.
        ranks: processes or threads to start; None: two, or what a launcher started.
        threads: whether the ranks are threads.
        strategies: of commgraph, each measured; "" is the platform's choice.
        compare: peers.
        json, markdown, plot: files to write.
        read: files of earlier runs, to be shown in place of a new one.
        tune: where to write a table of the kernels that are fastest here; None: measure the operations.
        fit: where to write the figures of the links, for ``commgraph plan``; None likewise.
    """

    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    samples: int | None
    seconds: float
    idle: float
    ranks: int | None
    threads: bool
    strategies: tuple[str, ...]
    compare: tuple[str, ...]
    json: Path | None
    markdown: Path | None
    plot: Path | None
    read: tuple[Path, ...]
    tune: Path | None = None
    fit: Path | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see commgraph bench --help")


def parse(argv: Sequence[str]) -> Plan:
    """Reads the arguments.

    Raises:
        ConfigurationError: one that cannot be, with the reason.
    """
    given = _parser().parse_args(argv)
    given.compare = peers.BUILT_IN if given.compare == [] else given.compare
    for name in given.compare:
        peers.load(name)
    if given.ranks is not None and given.ranks < 2:
        raise ConfigurationError(f"--ranks {given.ranks}: it takes two to communicate")
    if given.iters is not None and given.iters < 1:
        raise ConfigurationError(f"--iters {given.iters}: at least one sample is needed")
    for name in ("seconds", "idle"):
        if not 0 < getattr(given, name) <= 3600:
            raise ConfigurationError(f"--{name} {getattr(given, name)}: a time above 0, up to an hour")
    for file in (given.json, given.markdown, given.plot, given.tune, given.fit):
        if file is not None and not file.parent.is_dir():
            raise ConfigurationError(f"{file} cannot be written: there is no folder {file.parent}")
    return Plan(
        operations=_operations(given.op),
        sizes=parse_sizes(given.sizes),
        dtypes=tuple(_dtype(name) for name in given.dtype),
        samples=given.iters,
        seconds=given.seconds,
        idle=given.idle,
        ranks=given.ranks,
        threads=given.threads,
        strategies=tuple(given.strategy),
        compare=tuple(given.compare),
        json=given.json,
        markdown=given.markdown,
        plot=given.plot,
        read=tuple(given.read),
        tune=given.tune,
        fit=given.fit,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("commgraph bench", description="Measures the operations of a group on this machine, or under the launcher at hand.")
    parser.add_argument(
        "--op",
        nargs="+",
        default=["all"],
        metavar="OP",
        help=f"all, tensors, objects, or some of: {', '.join((*tensors.OPERATIONS, *objects.OPERATIONS))} (default: all)",
    )
    parser.add_argument("--sizes", default="4Ki:64Mi", help="FIRST:LAST[:FACTOR] or a list, e.g. 4Ki,1Mi (default: %(default)s, times 4)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of the tensors (default: float32)")
    parser.add_argument("--iters", type=int, metavar="N", help="samples of each row; a sample is a batch of at least 200 us")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each row, where --iters is not given (default: %(default)s)")
    parser.add_argument("--idle", type=float, default=5.0, metavar="SECONDS", help="silence of object_idle (default: %(default)s)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start (default: 2)")
    parser.add_argument("--threads", action="store_true", help="the ranks are threads of this process")
    parser.add_argument(
        "--strategy", nargs="+", default=[""], help="which of commgraph's to measure, e.g. shm gloo (default: its own choice)"
    )
    parser.add_argument(
        "--compare",
        nargs="*",
        default=(),
        metavar="PEER",
        help=f"{', '.join(peers.BUILT_IN)}, or a file with a class Peer; alone: all of them",
    )
    parser.add_argument(
        "--tune",
        type=Path,
        metavar="FILE",
        help="find the fastest kernel for each size on this machine's accelerators, and write the table",
    )
    parser.add_argument(
        "--fit", type=Path, metavar="FILE", help="measure the links between these ranks, and write their figures for commgraph plan --links"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw there, too (.png, .svg, .pdf)")
    parser.add_argument("--read", type=Path, nargs="+", default=(), metavar="JSON", help="show earlier runs in place of a new one")
    return parser


def parse_sizes(text: str) -> tuple[int, ...]:
    """``4Ki:64Mi`` (times 4 each), ``4Ki:64Mi:2`` or ``4Ki,1Mi`` as bytes.

    Raises:
        ConfigurationError: anything else.
    """
    if ":" not in text:
        return tuple(parse_size(part) for part in text.split(","))
    first, last, *rest = text.split(":")
    factor = rest[0] if rest else str(_FACTOR)
    if len(rest) > 1 or not factor.isdigit() or int(factor) < 2:
        raise ConfigurationError(f"--sizes {text}: FIRST:LAST:FACTOR, the factor a whole number from 2 on, e.g. 4Ki:64Mi:4")
    sizes = [parse_size(first)]
    end = parse_size(last)
    if sizes[0] > end:
        raise ConfigurationError(f"--sizes {text}: the first is larger than the last")
    while sizes[-1] * int(factor) <= end:
        sizes.append(sizes[-1] * int(factor))
    return tuple(sizes)


def parse_size(text: str) -> int:
    """``512``, ``64Ki``, ``1MiB`` as bytes.

    Raises:
        ConfigurationError: anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(found[1]) * 1024 ** _UNITS.index(found[2]) if found else 0
    if not 0 < size <= _LARGEST:
        raise ConfigurationError(f"{text!r} is no size: a whole number of bytes with Ki, Mi or Gi behind it, e.g. 64Ki")
    return size


def _operations(names: Sequence[str]) -> tuple[str, ...]:
    groups = {"tensors": tensors.OPERATIONS, "objects": objects.OPERATIONS, "all": (*tensors.OPERATIONS, *objects.OPERATIONS)}
    for name in names:
        if name not in groups and name not in groups["all"]:
            raise ConfigurationError(f"--op {name}: there are {', '.join((*groups, *groups['all']))}")
    return tuple(dict.fromkeys(one for name in names for one in groups.get(name, (name,))))


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ConfigurationError(f"--dtype {name}: torch has no dtype of that name; e.g. float32, bfloat16, int64")
    return name
