"""Which kernel serves which messages of an accelerator: a table by device, ranks, operation, dtype and bytes, and the one to begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import attrs
import msgspec

from commgraph.errors import ConfigurationError

__all__ = ["KERNELS", "OTHERS", "KernelTable", "Plan", "Row", "Step", "merged"]

# Operation -> its kernels.
KERNELS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "all_reduce": frozenset({"one_shot", "two_shot", "multimem"}),
        "all_gather": frozenset({"multimem"}),
        "reduce_scatter": frozenset({"one_shot"}),
    }
)
# In place of the name of a kernel: left to the strategies behind.
OTHERS = ""

_KI, _MI = 1 << 10, 1 << 20
_ANY = "any"
_DTYPES = frozenset({"float32", "bfloat16"})


class Step(msgspec.Struct, frozen=True, array_like=True):
    """The kernel of calls of up to `max_bytes`, included.

    Attributes:
        max_bytes: of the whole tensor: of the input of a reduction, of the result of a gather.
        kernel: its name, or `OTHERS`.
    """

    max_bytes: int
    kernel: str


class Row(msgspec.Struct, frozen=True):
    """The steps of one kind of call, by growing size; larger calls than the last step are left to the strategies behind.

    Attributes:
        capability: of the devices, as `commgraph.Platform` names it: ``"9.0"`` (CUDA's compute capability).
        ranks: of the group.
        operation: "all_reduce", "all_gather" or "reduce_scatter".
        dtype: ``"float32"`` or ``"bfloat16"``, the ones that the kernels can add up; ``"any"``: whatever the operation's kernels serve and
            no row of its own is about.
        steps: see `Step`.
    """

    capability: str
    ranks: int
    operation: str
    dtype: str
    steps: tuple[Step, ...]


def _rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return rows as they would be read from a file, which validates them: msgspec does not when a struct is constructed."""
    try:
        return msgspec.json.decode(msgspec.json.encode(tuple(rows)), type=tuple[Row, ...])
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigurationError(f"kernel table: {error}") from error


@attrs.frozen
class KernelTable:
    """Rows by (capability, ranks, operation, dtype). A value: equal tables choose alike.

    `commgraph bench --tune FILE` measures one and `CommunicatorOptions(custom_all_reduce=KernelTable.read(FILE))` uses it.

    Raises:
        ConfigurationError: rows that contradict each other, or name what does not exist.
    """

    rows: tuple[Row, ...] = attrs.field(converter=_rows)

    def __attrs_post_init__(self) -> None:
        seen: dict[tuple[str, int, str, str], Row] = {}
        for row in self.rows:
            key = (row.capability, row.ranks, row.operation, row.dtype)
            if key in seen:
                raise ConfigurationError(f"kernel table: two rows for {key}")
            seen[key] = row
            _check(row)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table that `write` wrote.

        Raises:
            ConfigurationError: no such file, or it holds something else.
        """
        try:
            return cls(msgspec.json.decode(Path(path).read_bytes(), type=tuple[Row, ...]))
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigurationError(f"no kernel table can be read from {path}: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write the table as JSON, one row per line."""
        lines = ",\n".join(f" {msgspec.json.encode(row).decode()}" for row in self.rows)
        Path(path).write_text(f"[\n{lines}\n]\n")

    @property
    def digest(self) -> str:
        """Hash of the rows in 16 hexadecimal digits, equal for equal tables."""
        return hashlib.sha256(msgspec.json.encode(self.rows)).hexdigest()[:16]

    def sizes(self, capability: str) -> tuple[int, ...]:
        """Return the group sizes for which it has rows about such devices."""
        return tuple(sorted({row.ranks for row in self.about(capability)}))

    def about(self, capability: str) -> tuple[Row, ...]:
        """Return the rows about such devices; if there are none, about the next older ones of the same maker."""
        mine = [row for row in self.rows if row.capability == capability]
        if mine or (version := _version(capability)) is None:
            return tuple(mine)
        older = {known for row in self.rows if (known := _version(row.capability)) is not None and known < version}
        return tuple(row for row in self.rows if _version(row.capability) == max(older)) if older else ()

    def plan(self, capability: str, ranks: int, *, multicast: bool) -> Plan:
        """Return the plan of one group.

        Args:
            capability: of its devices.
            ranks: of the group.
            multicast: whether its devices can send to all others, and add up what all hold, in one instruction.
        """
        return Plan(
            {
                (row.operation, row.dtype): row.steps if multicast else tuple(_without_multicast(step, row.operation) for step in row.steps)
                for row in self.about(capability)
                if row.ranks == ranks
            }
        )

    def __repr__(self) -> str:
        return f"<KernelTable of {len(self.rows)} rows, {self.digest}>"

    @classmethod
    def shipped(cls) -> Self:
        """Return the default table: the thresholds of vLLM's communicators as far as there is a kernel for them here; not measured.

        Where vLLM has its own one- and two-stage kernels the one- and two-shot kernels of torch stand, with the same limits; from 4 ranks
        on what its torch symmetric-memory communicator serves by multicast is served so. Devices newer than 9.0 keep the limit of 8 MiB
        that vLLM has for whatever it has no figure for.
        """
        limits = {"8.0": {2: 8 * _MI, 4: 8 * _MI, 8: 8 * _MI}, "9.0": {2: 64 * _MI, 4: 32 * _MI, 8: 64 * _MI}}
        limits["10.0"] = limits["8.0"]
        one_shot = {4: 512 * _KI, 8: 256 * _KI}
        multimem = {("9.0", 4), ("9.0", 8), ("10.0", 8)}
        rows = []
        for capability, by_ranks in limits.items():
            for ranks, limit in by_ranks.items():
                large = "multimem" if (capability, ranks) in multimem else "two_shot"
                steps = [Step(one_shot[ranks], "one_shot"), Step(limit, large)] if ranks in one_shot else [Step(limit, "one_shot")]
                rows.append(Row(capability, ranks, "all_reduce", _ANY, tuple(steps)))
                rows.append(Row(capability, ranks, "reduce_scatter", _ANY, (Step(one_shot.get(ranks, 512 * _KI), "one_shot"),)))
                if (capability, ranks) in multimem:
                    rows.append(Row(capability, ranks, "all_gather", _ANY, (Step(one_shot[ranks], "multimem"),)))
        return cls(rows)


@attrs.frozen
class Plan:
    """Kernels of one group, by operation, dtype and size.

    Attributes:
        steps: (operation, dtype) -> steps.
    """

    steps: Mapping[tuple[str, str], tuple[Step, ...]]

    def kernel(self, operation: str, dtype: str, nbytes: int) -> str:
        """Return the name of the kernel, `OTHERS` for a size that no step covers or no kernel can serve."""
        steps = self.steps.get((operation, dtype)) or self.steps.get((operation, _ANY), ())
        return next((step.kernel for step in steps if nbytes <= step.max_bytes), OTHERS)

    @property
    def max_bytes(self) -> int:
        """Largest size that a kernel serves, in bytes."""
        return max((step.max_bytes for steps in self.steps.values() for step in steps if step.kernel != OTHERS), default=0)

    def describe(self) -> str:
        """Return the steps as one line of text."""
        by_steps: dict[tuple[Step, ...], list[str]] = {}
        for (operation, dtype), steps in sorted(self.steps.items()):
            by_steps.setdefault(steps, []).append(f"{operation} of {dtype}")
        return "; ".join(
            f"{', '.join(calls)}: " + ", ".join(f"{step.kernel or 'others'} up to {step.max_bytes}" for step in steps)
            for steps, calls in by_steps.items()
        )


def _check(row: Row) -> None:
    problems = []
    if row.operation not in KERNELS:
        problems.append(f"there is no operation {row.operation!r}, only {', '.join(KERNELS)}")
    if row.dtype not in _DTYPES | {_ANY}:
        problems.append(f"dtype {row.dtype!r} is none of {', '.join(sorted(_DTYPES | {_ANY}))}")
    if row.ranks < 2:
        problems.append(f"{row.ranks} ranks do not communicate")
    unknown = {step.kernel for step in row.steps} - KERNELS.get(row.operation, frozenset()) - {OTHERS}
    if row.operation in KERNELS and unknown:
        problems.append(f"{row.operation} has no kernel {', '.join(sorted(unknown))}, only {', '.join(sorted(KERNELS[row.operation]))}")
    sizes = [step.max_bytes for step in row.steps]
    if any(size <= 0 for size in sizes) or sizes != sorted(set(sizes)):
        problems.append(f"its sizes {sizes} do not grow")
    if problems:
        raise ConfigurationError(f"kernel table, row {msgspec.json.encode(row).decode()}: {'; '.join(problems)}")


def _without_multicast(step: Step, operation: str) -> Step:
    """Return the step with the next best kernel that needs no multicast, `OTHERS` if there is none."""
    if step.kernel != "multimem":
        return step
    return Step(step.max_bytes, "two_shot" if operation == "all_reduce" else OTHERS)


def _version(capability: str) -> tuple[int, ...] | None:
    parts = capability.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else None


def merged(steps: Sequence[tuple[int, str]]) -> tuple[Step, ...]:
    """Return steps from (size, kernel) by growing size: equal neighbours become one step, and `OTHERS` at the end is dropped."""
    found: list[Step] = []
    for size, kernel in steps:
        if found and found[-1].kernel == kernel:
            found.pop()
        found.append(Step(size, kernel))
    while found and found[-1].kernel == OTHERS:
        found.pop()
    return tuple(found)
