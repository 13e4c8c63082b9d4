"""Runs as a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

from commgraph.bench.figures import Row, size_text
from commgraph.bench.probe import PLACEMENTS
from commgraph.bench.report import Run, number_text

__all__ = ["markdown"]

# Percentiles of fewer samples tell nothing.
_FEW = 5

_PAGE = """# Benchmarks

What commgraph takes on one machine, beside other libraries that do the same. Written by `nox -s bench`, which runs
`commgraph bench`; [how to use that](how-to/benchmark.md) on your own machine is a page of its own.

Read the numbers with the machine in mind: on a virtual machine the cores move between placements while the benchmark runs, and the same
program is several times slower when its two ranks no longer share a cache. Hence the method.

- The libraries of a table ran **in the same processes, in turn**: one sample of each, then the next sample of each.
- A **sample** is a batch of calls timed together, long enough to take at least 200 us, begun by all ranks at once with warm caches. It
  counts as its slowest rank.
- A cell is the **median** of the samples, and in brackets the **10th and 90th percentile**: most of what you would see lies between them.
- Beside each sample a cache line was passed to and fro between ranks 0 and 1. Its time tells the **placement** in which the sample was
  taken: below 45 ns the two are siblings on one core, below 120 ns they share an L3 cache, above they do not. Rows of different placements
  are never mixed; one that a library met fewer than five times is left out. Where nothing can tell, there is no such column.
- Every library's first result was compared with what it ought to be.
- The **size** is that of the larger buffer on each rank and **GB/s** is the bus bandwidth, both as
  [nccl-tests](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md) defines them, of commgraph's first column.

## Machine

"""


# What `REPORT=docs/gpu.txt tests/gpu/run.sh` saw last, from another machine than the rest of the page.
_GPU = """## On a GPU

```{literalinclude} gpu.txt
:language: text
```
"""

_SAYS = MappingProxyType(
    {
        "all_reduce_": "Sum over all ranks, into the tensor itself.",
        "all_reduce": "Sum over all ranks, into a new tensor where the library makes one.",
        "all_gather": "Every rank's piece, concatenated on all.",
        "reduce_scatter": "Sum over all ranks, of which each keeps its piece.",
        "all_to_all": "A piece from every rank to every rank.",
        "broadcast": "From rank 0 to all.",
        "send_recv": "From one rank to another: half of there and back.",
        "barrier": "Nobody goes before all are there.",
        "tensor_dict": "A dict of two tensors of 2 MiB from one pipeline stage to the next: half of there and back.",
        "overhead": "What a coordinator costs: the call that users make, and the strategy's own method by itself.",
        "object_small": "A dict of a few entries, one way: half of a round trip that never pauses.",
        "object_lists": "A dict of lists, as a scheduler sends for one step: half of a round trip that never pauses.",
        "object_tensor": "A tensor of 10 MiB as an object (a numpy array for those who know no tensors): half of a round trip.",
        "object_rate": "Small dicts in a row to one reader.",
        "object_readers": "A small dict to three readers, until the slowest of them has it.",
        "object_wake": "A small dict to a reader that has waited for 1.2 s.",
        "object_idle": "What a reader takes of its core while nothing comes.",
    }
)


def markdown(runs: Sequence[Run]) -> str:
    """A page on some runs of one machine."""
    parts = [_PAGE + "\n".join(f"| {key} | {value} |" for key, value in [("", ""), ("---", "---"), *runs[0].machine.items()]) + "\n"]
    for run in runs:
        operations = dict.fromkeys(row.operation for row in run.rows)
        # Not twice the same heading: nothing could be linked to below the second.
        of = ", objects" if all(operation.startswith("object_") for operation in operations) else ""
        parts.append(f"## {run.how['ranks']} ranks ({run.how['started']}){of}\n\nSampling: {run.how['sampling']}.\n")
        parts += [_section(operation, [row for row in run.rows if row.operation == operation]) for operation in operations]
        if run.notes:
            parts.append("Not measured here:\n\n" + "\n".join(f"- {note}" for note in run.notes) + "\n")
    return "\n".join([*parts, _GPU])


def _section(operation: str, rows: Sequence[Row]) -> str:
    """One operation: a line for each size, dtype and placement, a column for each library."""
    rows = _telling(rows)
    libraries = list(dict.fromkeys((row.who, row.strategy) for row in rows))
    cells = {(row.size, row.dtype, row.placement, row.who, row.strategy): row for row in rows}
    cases = list(dict.fromkeys((row.size, row.dtype) for row in rows))
    near_first = [where for where in PLACEMENTS if any(row.placement == where for row in rows)]
    lines = [(*case, where) for case in cases for where in near_first if any((*case, where) == key[:3] for key in cells)]
    keys: list[tuple[str, Callable[[int, str, str], str]]] = [("size", lambda size, dtype, where: size_text(size) if size else "-")]
    if any(dtype for _, dtype, _ in lines):
        keys.append(("dtype", lambda size, dtype, where: dtype))
    if any(where for _, _, where in lines):
        keys.append(("placement", lambda size, dtype, where: where))
    speeds = any(row.busbw is not None for row in rows)
    heads = [*(name for name, _ in keys), *(", ".join(filter(None, library)) for library in libraries), *(["GB/s"] if speeds else [])]
    table = [heads, ["---"] * len(heads)]
    for case in lines:
        found = [cells.get((*case, *library)) for library in libraries]
        speed = next((f"{row.busbw:.2f}" for row in found[:1] if row is not None and row.busbw is not None), "")
        table.append([*(show(*case) for _, show in keys), *map(_cell, found), *([speed] if speeds else [])])
    body = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"### {operation}, {rows[0].unit}\n\n{_SAYS[operation]}\n\n{body}\n"


def _telling(rows: Sequence[Row]) -> list[Row]:
    """Without placements that a library met a few times only, where it met another one more often."""
    most: dict[tuple[int, str, str, str], int] = {}
    for row in rows:
        key = (row.size, row.dtype, row.who, row.strategy)
        most[key] = max(most.get(key, 0), row.samples)
    return [row for row in rows if row.samples >= min(_FEW, most[row.size, row.dtype, row.who, row.strategy])]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ({number_text(row.p10)} - {number_text(row.p90)})" if row.samples > 1 else ""
    return f"**{number_text(row.median)}**{spread}"
