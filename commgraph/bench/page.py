"""Runs as a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

from commgraph.bench.figures import Row, size_text
from commgraph.bench.probe import PLACEMENTS
from commgraph.bench.report import Run, number_text

__all__ = ["markdown", "overview"]

# Least number of samples of which percentiles are shown.
_FEW = 5

# Columns of libraries that a reader can take in; a table of more has a line for each library.
_WIDE = 10

_INTRODUCTION = """# Benchmarks

commgraph's operations on one machine, beside other libraries that do the same work.
"""

_METHOD = """## Method

`nox -s bench` writes this page by running `commgraph bench`. [Measure it here](how-to/benchmark.md) says how to run it on another machine.

A virtual machine moves its cores between placements while a benchmark runs, and a program is several times slower when its two ranks no
longer share a cache. Therefore:

- All libraries of a table ran **in the same processes, in turn**: one sample of each, then the next sample of each.
- A **sample** is a batch of calls timed together. It takes at least 200 us, all ranks begin it at once with warm caches, and its time is
  that of its slowest rank.
- A cell is the **median** of the samples, with the **10th and 90th percentile** in brackets.
- Beside each sample a cache line was passed back and forth between ranks 0 and 1. Its time shows the **placement** of the two ranks: below
  45 ns they are siblings on one core, below 120 ns they share an L3 cache, above they do not. Samples of different placements are never
  mixed, and a cell of fewer than five samples is left out. A table without this column had no such measurement.
- The first result of every library was compared with the expected one.
- *shared tensors* are made by `group.empty`: they lie in memory that the ranks share, and are not copied to it first.
- The **size** is that of the larger buffer on each rank. **GB/s** is the bus bandwidth of commgraph's first column. Both are defined as in
  [nccl-tests](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

# gpu.txt is the latest report of `REPORT=docs/gpu.txt tests/gpu/run.sh`, from another machine than the rest of the page.
_GPU = """## On a GPU

```{literalinclude} gpu.txt
:language: text
```
"""

_SAYS = MappingProxyType(
    {
        "all_reduce_": "Sum over all ranks, in place.",
        "all_reduce": "Sum over all ranks, into a new tensor where the library makes one.",
        "all_gather": "The pieces of all ranks, concatenated on every rank.",
        "reduce_scatter": "Sum over all ranks; each rank keeps its piece.",
        "all_to_all": "A piece from every rank to every rank.",
        "broadcast": "From rank 0 to all.",
        "send_recv": "From one rank to another: half of a round trip.",
        "barrier": "No rank returns before every rank has called.",
        "tensor_dict": "A dict of two tensors of 2 MiB from one pipeline stage to the next: half of a round trip.",
        "overhead": "Cost of a coordinator: `ctx.tp.all_reduce`, the strategy's own method, and other calls with the same tensor.",
        "object_small": "A dict of a few entries, one way: half of a round trip without pauses.",
        "object_lists": "A dict of lists, as a scheduler sends for one step: half of a round trip without pauses.",
        "object_tensor": "A tensor of 10 MiB as an object (a numpy array for libraries without tensors): half of a round trip.",
        "object_rate": "Small dicts in a row to one reader.",
        "object_readers": "A small dict to three readers, until the slowest of them has it.",
        "object_wake": "A small dict to a reader that has waited for 1.2 s.",
        "object_idle": "CPU time of a reader while nothing comes.",
    }
)


def markdown(runs: Sequence[Run], picture: str = "") -> str:
    """Return a page on runs of one machine.

    Args:
        runs: at least one.
        picture: file of the drawn `overview`, relative to the page; "" for none.
    """
    machine = "\n".join(f"| {key} | {value} |" for key, value in [("", ""), ("---", "---"), *runs[0].machine.items()])
    parts = [_INTRODUCTION, *_opening(runs, picture), _METHOD, f"## Machine\n\n{machine}\n"]
    for run in runs:
        operations = dict.fromkeys(row.operation for row in run.rows)
        # A heading that repeats an earlier one could not be linked to.
        of = ", objects" if all(operation.startswith("object_") for operation in operations) else ""
        parts.append(f"## {run.how['ranks']} ranks ({run.how['started']}){of}\n\nSampling: {run.how['sampling']}.\n")
        parts += [_section(operation, [row for row in run.rows if row.operation == operation]) for operation in operations]
        if run.notes:
            parts.append("Not measured here:\n\n" + "\n".join(f"- {note}" for note in run.notes) + "\n")
    return "\n".join([*parts, _GPU])


def overview(runs: Sequence[Run]) -> list[Row]:
    """Return the rows that open the page: the first operation and dtype of the first run, in the placement with the most samples.

    Only sizes that every library has there are included. Empty where they are fewer than two.
    """
    first = runs[0].rows[:1]
    rows = _well_sampled([row for row in runs[0].rows for one in first if (row.operation, row.dtype) == (one.operation, one.dtype)])
    samples: dict[str, int] = {}
    for row in rows:
        samples[row.placement] = samples.get(row.placement, 0) + row.samples
    rows = [row for row in rows if row.size and row.placement == max(samples, key=samples.__getitem__)]
    libraries = {(row.who, row.strategy) for row in rows}
    sizes = {row.size for row in rows}
    whole = {size for size in sizes if {(row.who, row.strategy) for row in rows if row.size == size} == libraries}
    return [row for row in rows if row.size in whole] if len(whole) > 1 else []


def _opening(runs: Sequence[Run], picture: str) -> list[str]:
    """The picture, and a table of the smallest, the middle and the largest size in it."""
    rows = overview(runs)
    if not rows:
        return []
    sizes = sorted({row.size for row in rows})
    sizes = list(dict.fromkeys([sizes[0], sizes[len(sizes) // 2], sizes[-1]]))
    libraries = list(dict.fromkeys((row.who, row.strategy) for row in rows))
    medians = {(row.size, row.who, row.strategy): number_text(row.median) for row in rows}
    table = [["size", *(", ".join(filter(None, library)) for library in libraries)], ["---"] * (len(libraries) + 1)]
    table += [[size_text(size), *(medians[size, *library] for library in libraries)] for size in sizes]
    what = f"`{rows[0].operation}` of {rows[0].dtype} on {runs[0].how['ranks']} ranks"
    where = ", ".join(filter(None, [runs[0].machine.get("processor"), rows[0].placement]))
    body = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return [*([f"![{what}: time over size]({picture})\n"] if picture else []), f"{what}, median in {rows[0].unit} ({where}):\n\n{body}\n"]


def _section(operation: str, rows: Sequence[Row]) -> str:
    """Return the table of one operation: a line for each size, dtype and placement, a column for each library. Transposed if wide."""
    rows = _well_sampled(rows)
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
    if len(libraries) > _WIDE:
        cases_text = [", ".join(filter(None, (show(*case) for _, show in keys))) for case in lines]
        table = [["", *cases_text], ["---"] * (1 + len(lines))]
        table += [[", ".join(filter(None, library)), *(_cell(cells.get((*case, *library))) for case in lines)] for library in libraries]
        return _written(operation, rows, table)
    speeds = any(row.busbw is not None for row in rows)
    heads = [*(name for name, _ in keys), *(", ".join(filter(None, library)) for library in libraries), *(["GB/s"] if speeds else [])]
    table = [heads, ["---"] * len(heads)]
    for case in lines:
        found = [cells.get((*case, *library)) for library in libraries]
        speed = next((f"{row.busbw:.2f}" for row in found[:1] if row is not None and row.busbw is not None), "")
        table.append([*(show(*case) for _, show in keys), *map(_cell, found), *([speed] if speeds else [])])
    return _written(operation, rows, table)


def _written(operation: str, rows: Sequence[Row], table: Sequence[Sequence[str]]) -> str:
    """Return the section of an operation around its table."""
    body = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"### {operation}, {rows[0].unit}\n\n{_SAYS[operation]}\n\n{body}\n"


def _well_sampled(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without placements in which a library has only a few samples, where it has more in another one."""
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
