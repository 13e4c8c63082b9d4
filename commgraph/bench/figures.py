"""`Sample` and `Row`: samples, and the rows of a table that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import attrs

from commgraph.bench.probe import placement

__all__ = ["Row", "Sample", "bandwidths", "percentile", "rows_of", "size_text"]


def _moves_once(n: int) -> float:
    return 1.0


def _moves_pieces(n: int) -> float:
    return (n - 1) / n


def _moves_twice(n: int) -> float:
    return 2 * (n - 1) / n


_BUS: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {
        "all_reduce_": _moves_twice,
        "all_reduce": _moves_twice,
        "all_gather": _moves_pieces,
        "reduce_scatter": _moves_pieces,
        "all_to_all": _moves_pieces,
        "broadcast": _moves_once,
        "send_recv": _moves_once,
        "tensor_dict": _moves_once,
    }
)


@attrs.frozen
class Sample:
    """One batch of calls: seconds for each, and nanoseconds of the probe beside it."""

    seconds: float
    nanoseconds: float | None


@attrs.frozen(kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        operation: name of the operation.
        size: bytes, in nccl-tests' sense for collectives.
        dtype: of the tensors; "" for objects.
        who: the library.
        strategy: algorithm of the library.
        placement: of the ranks, by distance; "" where it was not measured.
        nanoseconds: median of the probe's.
        samples: how many the percentiles are taken from.
        unit: of the three percentiles.
        p10, median, p90: percentiles over the samples; by value, so that p10 is the worst of a rate.
        algbw, busbw: GB/s (10**9) at the median; None where bandwidth means nothing.
    """

    operation: str
    size: int
    dtype: str
    who: str
    strategy: str
    placement: str
    nanoseconds: float | None
    samples: int
    unit: str
    p10: float
    median: float
    p90: float
    algbw: float | None
    busbw: float | None


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated between the two nearest values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def bandwidths(operation: str, size: int, seconds: float, ranks: int) -> tuple[float, float] | None:
    """Return algorithm and bus bandwidth in GB/s, by the formulas of nccl-tests; None for operations that those do not cover.

    The algorithm's is ``size / time``. The bus bandwidth multiplies it by the share of every byte that each rank's link carries, so that it
    compares with the hardware whatever the number of ranks n: ``2 (n - 1) / n`` for all-reduce, ``(n - 1) / n`` for all-gather,
    reduce-scatter and all-to-all (of the whole array on one rank), 1 for broadcast and for send and receive. See
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    if operation not in _BUS or not size or seconds <= 0:
        return None
    algorithm = size / seconds / 1e9
    return algorithm, algorithm * _BUS[operation](ranks)


def rows_of(
    samples: Sequence[Sample],
    *,
    operation: str,
    size: int,
    dtype: str,
    who: str,
    strategy: str,
    ranks: int,
    unit: str = "us",
    convert: Callable[[float], float] = lambda seconds: seconds * 1e6,
) -> list[Row]:
    """Return one row for each placement among the samples, the nearest first.

    Args:
        samples: of one contender in one case.
        operation, size, dtype, who, strategy: as in `Row`.
        ranks: of the group.
        unit: of the values that `convert` gives.
        convert: from a sample's seconds to the value in the row.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.nanoseconds or 0.0):
        groups.setdefault(placement(sample.nanoseconds), []).append(sample)
    rows = []
    for where, group in groups.items():
        values = [convert(sample.seconds) for sample in group]
        probed = [sample.nanoseconds for sample in group if sample.nanoseconds is not None]
        speed = bandwidths(operation, size, percentile([sample.seconds for sample in group], 50), ranks)
        rows.append(
            Row(
                operation=operation,
                size=size,
                dtype=dtype,
                who=who,
                strategy=strategy,
                placement=where,
                nanoseconds=percentile(probed, 50) if probed else None,
                samples=len(group),
                unit=unit,
                p10=percentile(values, 10),
                median=percentile(values, 50),
                p90=percentile(values, 90),
                algbw=speed and speed[0],
                busbw=speed and speed[1],
            )
        )
    return rows


def size_text(size: int) -> str:
    """``64 KiB``, ``9.4 KiB``, ``75 B``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
