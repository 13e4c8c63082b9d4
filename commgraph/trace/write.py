"""Writes records in other formats: a Chrome trace, torch's flight records, and lines of JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import attrs

from commgraph.shm.recorder import COLLECTIVE, FAILED, OPEN, OUTGOING
from commgraph.trace.read import STATES, Call, RankRecord, calls_of

__all__ = ["chrome_trace", "flight_records", "json_lines"]

# torch's names of operations in flight records (torch.distributed.flight_recorder); operations of other names have an all_gather's form.
_FLIGHT_NAMES: Final = MappingProxyType(
    {
        "all_reduce": "all_reduce",
        "all_reduce_": "all_reduce",
        "reduce": "reduce",
        "broadcast": "broadcast",
        "all_gather": "_all_gather_base",
        "all_gatherv": "all_gather",
        "reduce_scatter": "_reduce_scatter_base",
        "reduce_scatterv": "reduce_scatter",
        "gather": "gather",
        "scatter": "scatter",
        "all_to_all": "all_to_all",
        "barrier": "barrier",
    }
)
_FLIGHT_DTYPES: Final = MappingProxyType(
    {
        "float32": "Float",
        "float64": "Double",
        "float16": "Half",
        "bfloat16": "BFloat16",
        "int64": "Long",
        "int32": "Int",
        "int16": "Short",
        "int8": "Char",
        "uint8": "Byte",
        "bool": "Bool",
    }
)


def _nothing() -> None:
    pass


def chrome_trace(records: Sequence[RankRecord], path: Path, advance: Callable[[], None] = _nothing) -> int:
    """Write a trace that Perfetto and chrome://tracing open: a process for each rank, a row for each of its threads.

    Times are microseconds since the first call of any rank, by rank 0's clock. Calls that have not ended last until the latest time.

    Args:
        records: of the ranks.
        path: of the file.
        advance: called after each rank.

    Returns:
        How many calls were written.
    """
    times = [time + record.to_real for record in records for call in calls_of(record) for time in (call.begin, call.end) if time]
    start, latest = min(times, default=0), max(times, default=0)
    count = 0
    with path.open("w") as file:
        heads = [
            {"ph": "M", "name": "process_name", "pid": record.rank, "args": {"name": f"rank {record.rank} ({record.facts['host']})"}}
            for record in records
        ]
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(map(json.dumps, heads)))
        for record in records:
            threads: dict[int, int] = {}
            for call in calls_of(record):
                begin, end = call.begin + record.to_real, (call.end + record.to_real) if call.end else latest
                event = {
                    "ph": "X",
                    "cat": "commgraph" if call.state != FAILED else "commgraph,failed",
                    "name": f"{call.group.label}/{call.operation}",
                    "pid": record.rank,
                    "tid": threads.setdefault(call.thread, len(threads)),
                    "ts": (begin - start) / 1e3,
                    "dur": max(end - begin, 0) / 1e3,
                    "args": _facts(call),
                }
                file.write(",\n" + json.dumps(event))
                count += 1
            advance()
        file.write("\n]}\n")
    return count


def json_lines(records: Sequence[RankRecord], path: Path, advance: Callable[[], None] = _nothing) -> int:
    """Write one line of JSON for each call, rank by rank, calling `advance` after each; return how many."""
    count = 0
    with path.open("w") as file:
        for record in records:
            for call in calls_of(record):
                times = {"begin_ns": call.begin + record.to_real, "end_ns": call.end + record.to_real if call.end else None}
                file.write(
                    json.dumps({"rank": record.rank, **times, "group": call.group.label, "operation": call.operation, **_facts(call)})
                    + "\n"
                )
                count += 1
            advance()
    return count


def flight_records(records: Sequence[RankRecord], folder: Path, advance: Callable[[], None] = _nothing) -> int:
    """Write a flight record of each rank, ``rank_N``, which torch's own ``torchfrtrace --prefix rank_ FOLDER`` reads.

    Only what torch has a name for is written: collectives of tensors, and sends and receives of them. `advance` is called after each rank.

    Returns:
        How many calls were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for record in records:
        entries = list(_flight_entries(record))
        count += len(entries)
        configuration = {group.uid: {"name": group.uid, "desc": group.label, "ranks": str(list(group.ranks))} for group in record.groups}
        status = {
            str(number): {"last_enqueued_collective": -1, "last_started_collective": -1, "last_completed_collective": -1}
            for number in range(len(configuration))
        }
        whole = {
            "version": "2.10",
            "pg_config": configuration,
            "pg_status": status,
            "entries": entries,
            "rank": record.rank,
            "host_name": record.facts["host"],
        }
        with (folder / f"rank_{record.rank}").open("wb") as file:
            pickle.dump(whole, file)
        advance()
    return count


def _flight_entries(record: RankRecord) -> Iterator[dict[str, Any]]:
    number = 0
    for call in calls_of(record):
        if call.kind == COLLECTIVE:
            name = _FLIGHT_NAMES.get(call.operation)
        elif call.family == 1 and call.peer >= 0:
            me, peer = call.group.rank_in_group, call.peer
            name = f"send {me}->{peer}" if call.kind == OUTGOING else f"recv {me}<-{peer}"
        else:
            name = None
        if name is None:
            continue
        site, _, function = call.site.partition(" in ")
        file, _, line = site.rpartition(":")
        dtype = _FLIGHT_DTYPES.get(call.dtype, call.dtype or "Byte")
        sizes, outputs = _sizes(call)
        yield {
            "record_id": number,
            "pg_id": 0,
            "process_group": (call.group.uid, call.group.label),
            "collective_seq_id": call.sequence + 1 if call.kind == COLLECTIVE else 0,
            "p2p_seq_id": 0 if call.kind == COLLECTIVE else call.sequence + 1,
            "op_id": number + 1,
            "profiling_name": f"gloo:{name}",  # torch's reader knows the names of its own backends only
            "time_created_ns": call.begin + record.to_real,
            "duration_ms": max(call.end - call.begin, 0) / 1e6,
            "input_sizes": [sizes],
            "input_dtypes": [dtype],
            "output_sizes": [outputs],
            "output_dtypes": [dtype],
            "state": "completed" if call.state not in (OPEN, FAILED) else "started",
            "time_discovered_started_ns": call.begin + record.to_real,
            "time_discovered_completed_ns": call.end + record.to_real if call.end else None,
            "retired": not call.is_open,
            "timeout_ms": 600_000,
            "is_p2p": call.kind != COLLECTIVE,
            "frames": [{"name": function or "?", "filename": file, "line": int(line) if line.isdigit() else 0}],
        }
        number += 1


def _sizes(call: Call) -> tuple[list[int], list[int]]:
    """Return the shapes of input and output, by the number of elements: torch's reader compares their products."""
    shape, n = list(call.shape), call.group.size
    if call.operation in ("all_gather", "all_gatherv") and shape:
        return shape, [shape[0] * n, *shape[1:]]
    if call.operation in ("reduce_scatter", "reduce_scatterv") and shape:
        elements = 1
        for extent in shape:
            elements *= extent
        return [elements], [elements // n]
    return shape, shape


def _facts(call: Call) -> dict[str, Any]:
    skipped = ("number", "group", "operation", "begin", "end", "state")
    facts = attrs.asdict(call, recurse=False, filter=lambda field, _: field.name not in skipped)
    return {**facts, "ranks": [list(run) for run in call.group.runs], "state": STATES.get(call.state, "unknown")}
