"""`Links`: how long a step, a byte and a call take on each kind of link, given or measured by ``commgraph bench --fit``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import attrs

from commgraph.errors import ConfigurationError

__all__ = ["KINDS", "Figures", "Links"]

KINDS: Final = ("shm", "net", "nvlink")
_FORMAT: Final = 1
_UNITS: Final[Mapping[str, float]] = MappingProxyType({"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0})
_RATES: Final[Mapping[str, float]] = MappingProxyType({"": 1e9, "M": 1e6, "G": 1e9, "T": 1e12})
_TEXT: Final = re.compile(r"([\d.]+)(ns|us|ms|s):([\d.]+)(M|G|T|)B/s(?:\+([\d.]+)(ns|us|ms|s))?")


@attrs.frozen
class Figures:
    """What n ranks that communicate at once see of a link.

    Attributes:
        step: seconds until what one rank has written is seen by all others, e.g. the latency of one message.
        byte: seconds for a byte that a rank copies, sends or receives; 1 / bandwidth.
        calls: seconds of a call beside its steps and bytes (checks, Python, waking up), by operation; others take that of "".
    """

    step: float
    byte: float
    calls: Mapping[str, float] = attrs.field(factory=dict)

    def call(self, operation: str) -> float:
        """Seconds of a call of `operation` beside its steps and bytes."""
        return self.calls.get(operation, self.calls.get("", 0.0))


@attrs.frozen
class Links:
    """Figures by kind of link and number of ranks that use it at once.

    Attributes:
        table: kind of link -> number of ranks -> figures. A number that is not there takes those of the nearest that is, by ratio.
        where: a line that says where the figures come from.
    """

    table: Mapping[str, Mapping[int, Figures]]
    where: str = ""

    @classmethod
    def usual(cls) -> Self:
        """Round figures of common hardware: DDR5 server, a network adapter of 400 Gbit/s for each rank, NVLink of an H100."""
        table = {
            "shm": {2: Figures(1e-6, 1 / 8e9, {"": 2e-6})},
            "net": {2: Figures(8e-6, 1 / 40e9, {"": 5e-6})},
            "nvlink": {2: Figures(2e-6, 1 / 400e9, {"": 4e-6})},
        }
        return cls(table, "round figures of common hardware")

    @classmethod
    def read(cls, text: str) -> Self:
        """Take the figures of a file that ``commgraph bench --fit`` wrote, or of a text such as ``shm=1us:8GB/s,net=5us:40GB/s+4us``.

        In a text each kind has the time of a step, the bandwidth of one rank, and what a call costs beside them (default: nothing). Kinds
        that are left out take round figures.

        Raises:
            ConfigurationError: neither.
        """
        if "=" not in text:
            return cls._load(Path(text))
        table = dict(cls.usual().table)
        for item in text.split(","):
            kind, _, value = item.strip().partition("=")
            found = _TEXT.fullmatch(value)
            if kind not in KINDS or found is None or not float(found[3]):
                raise ConfigurationError(
                    f"--links {item.strip()}: KIND=TIME:BANDWIDTH with KIND one of {', '.join(KINDS)}, e.g. shm=1us:8GB/s+2us"
                )
            call = float(found[5]) * _UNITS[found[6]] if found[5] else 0.0
            figures = Figures(float(found[1]) * _UNITS[found[2]], 1 / (float(found[3]) * _RATES[found[4]]), {"": call})
            table[kind] = {2: figures}
        return cls(table, f"given: {text}")

    @classmethod
    def _load(cls, file: Path) -> Self:
        try:
            found = json.loads(file.read_text())
            if found["format"] != _FORMAT:
                raise ConfigurationError(f"{file} has format {found['format']}; this commgraph reads {_FORMAT}")
            table = dict(cls.usual().table) | {
                kind: {int(n): Figures(one["step"], one["byte"], one["calls"]) for n, one in numbers.items()}
                for kind, numbers in found["links"].items()
            }
            return cls(table, f"{', '.join(sorted(found['links']))} measured: {found['where']}")
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"{file} is no file of `commgraph bench --fit`: {type(error).__name__}: {error}") from None

    def write(self, file: Path, kinds: Iterable[str]) -> None:
        """Write the figures of some kinds of links as JSON that `read` takes."""
        links: dict[str, Any] = {kind: {str(n): attrs.asdict(one) for n, one in self.table[kind].items()} for kind in kinds}
        file.write_text(json.dumps({"format": _FORMAT, "where": self.where, "links": links}, indent=1) + "\n")

    def of(self, kind: str, n: int) -> Figures:
        """Return the figures of a kind of link for n ranks."""
        numbers = self.table[kind]
        return numbers[min(numbers, key=lambda known: max(known, n) / max(1, min(known, n)))]
