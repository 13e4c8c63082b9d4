"""``torchrun -m commgraph.selftest``: every operation on every group of a layout, checked, and a table of what came of it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

import commgraph as cg
from commgraph.commands import ended_well
from commgraph.errors import CommGraphError, ConfigurationError
from commgraph.progress import progress

__all__ = ["OPERATIONS", "main", "run"]

_AXES: Final = ("dp", "pp", "pcp", "tp", "dcp")
_ROWS, _COLUMNS = 4, 6

Check = Callable[[cg.GroupCoordinator], None]


def _mine(g: cg.GroupCoordinator, rank: int | None = None, rows: int = _ROWS) -> torch.Tensor:
    """Return the tensor of a rank in the group, which differs from those of the others."""
    base = torch.arange(rows * _COLUMNS, dtype=torch.float32, device=g.device).view(rows, _COLUMNS)
    return base + 100 * (g.rank_in_group if rank is None else rank)


def _all(g: cg.GroupCoordinator, rows: int = _ROWS) -> list[torch.Tensor]:
    return [_mine(g, rank, rows) for rank in range(g.world_size)]


def _total(g: cg.GroupCoordinator, rows: int = _ROWS) -> torch.Tensor:
    return torch.stack(_all(g, rows)).sum(0)


def _piece(g: cg.GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    return x.chunk(g.world_size, 0)[g.rank_in_group]


def _sizes(g: cg.GroupCoordinator) -> list[int]:
    return [1 + rank % 3 for rank in range(g.world_size)]


def _same(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        equal = isinstance(actual, torch.Tensor) and torch.equal(actual, expected)
    elif isinstance(expected, list | tuple):
        equal = isinstance(actual, list | tuple) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=False):
            _same(one, other)
    else:
        equal = actual == expected
    if not equal:
        raise AssertionError(f"{actual!r:.200} in place of {expected!r:.200}")


def _all_reduce(g: cg.GroupCoordinator) -> None:
    _same(g.all_reduce(_mine(g)), _total(g))
    _same(g.all_reduce(_mine(g), op="max"), _mine(g, g.world_size - 1))
    _same(g.all_reduce([_mine(g), _mine(g, rows=1)]), [_total(g), _total(g, 1)])


def _all_reduce_in_place(g: cg.GroupCoordinator) -> None:
    x = _mine(g)
    _same(g.all_reduce_(x), _total(g))
    _same(x, _total(g))


def _reduce(g: cg.GroupCoordinator) -> None:
    dst = g.world_size - 1
    _same(g.reduce(_mine(g), dst), _total(g) if g.rank_in_group == dst else None)


def _reduce_scatter(g: cg.GroupCoordinator) -> None:
    rows = 2 * g.world_size
    _same(g.reduce_scatter(_mine(g, rows=rows), 0), _piece(g, _total(g, rows)))


def _reduce_scatterv(g: cg.GroupCoordinator) -> None:
    sizes = _sizes(g)
    whole = _total(g, sum(sizes)).split(sizes)[g.rank_in_group]
    _same(g.reduce_scatterv(_mine(g, rows=sum(sizes)), 0, sizes), whole)


def _all_gather(g: cg.GroupCoordinator) -> None:
    _same(g.all_gather(_mine(g), 0), torch.cat(_all(g), 0))
    _same(g.all_gather(_mine(g)), torch.cat(_all(g), 1))


def _all_gatherv(g: cg.GroupCoordinator) -> None:
    sizes = _sizes(g)
    pieces = [_mine(g, rank, size) for rank, size in enumerate(sizes)]
    _same(g.all_gatherv(pieces[g.rank_in_group], 0, sizes), torch.cat(pieces))


def _gather(g: cg.GroupCoordinator) -> None:
    dst = g.world_size - 1
    _same(g.gather(_mine(g), dst, 0), torch.cat(_all(g)) if g.rank_in_group == dst else None)


def _scatter(g: cg.GroupCoordinator) -> None:
    whole = _mine(g, 0, 2 * g.world_size)
    _same(g.scatter(whole if g.rank_in_group == 0 else None, 0, 0), _piece(g, whole))


def _broadcast(g: cg.GroupCoordinator) -> None:
    src = g.world_size - 1
    _same(g.broadcast(_mine(g), src), _mine(g, src))


def _all_to_all(g: cg.GroupCoordinator) -> None:
    n = g.world_size
    expected = torch.cat([_mine(g, rank, n).chunk(n)[g.rank_in_group] for rank in range(n)])
    _same(g.all_to_all(_mine(g, rows=n)), expected)


def _barrier(g: cg.GroupCoordinator) -> None:
    g.barrier()


def _send_recv(g: cg.GroupCoordinator) -> None:
    # Even ranks send first; the last of an odd number of ranks waits for the first, which has received by then.
    x, size = _mine(g), (_ROWS, _COLUMNS)
    if g.rank_in_group % 2 == 0:
        g.send(x)
        got = g.recv(size, x.dtype)
    else:
        got = g.recv(size, x.dtype)
        g.send(x)
    _same(got, _mine(g, g.prev_in_group))


def _sendrecv(g: cg.GroupCoordinator) -> None:
    x = _mine(g)
    _same(g.sendrecv(x, g.next_in_group, (_ROWS, _COLUMNS), x.dtype, g.prev_in_group), _mine(g, g.prev_in_group))


def _isend_irecv(g: cg.GroupCoordinator) -> None:
    x = _mine(g)
    coming, going = g.irecv((_ROWS, _COLUMNS), x.dtype), g.isend(x)
    _same(coming.wait(), _mine(g, g.prev_in_group))
    going.wait()


def _tagged(g: cg.GroupCoordinator) -> None:
    if g.device.type == "cpu":  # elsewhere messages pair by their order alone
        sent = [g.isend(_mine(g), tag=tag) for tag in (1, 2)]
        for tag in (2, 1):
            _same(g.recv((_ROWS, _COLUMNS), torch.float32, tag=tag), _mine(g, g.prev_in_group))
        for work in sent:
            work.wait()


def _batch(g: cg.GroupCoordinator) -> None:
    out = torch.empty_like(_mine(g))
    g.batch([cg.Recv(out, g.prev_in_group), cg.Send(_mine(g), g.next_in_group)]).wait()
    _same(out, _mine(g, g.prev_in_group))


def _broadcast_object(g: cg.GroupCoordinator) -> None:
    _same(g.broadcast_object({"rank": g.rank_in_group}), {"rank": 0})


def _all_gather_object(g: cg.GroupCoordinator) -> None:
    _same(g.all_gather_object(g.rank_in_group), list(range(g.world_size)))


def _gather_object(g: cg.GroupCoordinator) -> None:
    _same(g.gather_object(g.rank_in_group), list(range(g.world_size)) if g.rank_in_group == 0 else None)


def _scatter_object(g: cg.GroupCoordinator) -> None:
    _same(g.scatter_object(list(range(g.world_size)) if g.rank_in_group == 0 else None), g.rank_in_group)


def _objects(g: cg.GroupCoordinator) -> None:
    sent = g.isend_object(["from", g.rank_in_group], g.next_in_group)
    _same(g.recv_object(g.prev_in_group), ["from", g.prev_in_group])
    sent.wait()


def _broadcast_dict(g: cg.GroupCoordinator) -> None:
    got = g.broadcast_tensor_dict({"x": _mine(g), "step": 7} if g.rank_in_group == 0 else None)
    _same((got["x"], got["step"]), (_mine(g, 0), 7))


def _dicts(g: cg.GroupCoordinator) -> None:
    sent = g.isend_tensor_dict({"x": _mine(g), "step": g.rank_in_group})
    got = g.recv_tensor_dict()
    _same((got["x"], got["step"]), (_mine(g, g.prev_in_group), g.prev_in_group))
    sent.wait()


def _dispatch_combine(g: cg.GroupCoordinator) -> None:
    rows = _mine(g)
    given = g.dispatch(rows, torch.ones(_ROWS, 2, dtype=torch.float32, device=g.device))
    _same(given.tensors[0], torch.cat(_all(g)))
    _same(g.combine(given.tensors[0], given), rows * g.world_size)


def _asynchronous(g: cg.GroupCoordinator) -> None:
    n = g.world_size
    works: list[tuple[cg.Work[Any], Any]] = [
        (g.all_reduce_async(_mine(g)), _total(g)),
        (g.all_gather_async(_mine(g), 0), torch.cat(_all(g))),
        (g.reduce_scatter_async(_mine(g, rows=n), 0), _piece(g, _total(g, n))),
        (g.broadcast_async(_mine(g), n - 1), _mine(g, n - 1)),
        (g.barrier_async(), None),
        (g.all_to_all_async(_mine(g, rows=n)), torch.cat([one.chunk(n)[g.rank_in_group] for one in _all(g, n)])),
        (g.gather_async(_mine(g), 0, 0), torch.cat(_all(g)) if g.rank_in_group == 0 else None),
    ]
    for work, expected in works:
        _same(work.wait(), expected)


OPERATIONS: Final[tuple[tuple[str, Check], ...]] = (
    ("all_reduce", _all_reduce),
    ("all_reduce_", _all_reduce_in_place),
    ("reduce", _reduce),
    ("reduce_scatter", _reduce_scatter),
    ("reduce_scatterv", _reduce_scatterv),
    ("all_gather", _all_gather),
    ("all_gatherv", _all_gatherv),
    ("gather", _gather),
    ("scatter", _scatter),
    ("broadcast", _broadcast),
    ("all_to_all", _all_to_all),
    ("barrier", _barrier),
    ("send, recv", _send_recv),
    ("sendrecv", _sendrecv),
    ("isend, irecv", _isend_irecv),
    ("isend, recv by tags", _tagged),
    ("batch", _batch),
    ("broadcast_object", _broadcast_object),
    ("all_gather_object", _all_gather_object),
    ("gather_object", _gather_object),
    ("scatter_object", _scatter_object),
    ("isend_object, recv_object", _objects),
    ("broadcast_tensor_dict", _broadcast_dict),
    ("isend_tensor_dict, recv_tensor_dict", _dicts),
    ("dispatch, combine", _dispatch_combine),
    ("*_async", _asynchronous),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank; return its exit code, equal on all ranks.

    Returns:
        0 where every operation was right, 1 where one was not, 2 where there is nothing to test.
    """
    parser = argparse.ArgumentParser(
        "commgraph.selftest",
        description="Runs every operation on every group of a layout and checks the results: torchrun --nproc-per-node 4 -m "
        "commgraph.selftest --tp 2 --pp 2. Rank 0 prints a table of microseconds.",
    )
    for axis in _AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"size of {axis} (default: 1)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that one operation may take (default: 60)")
    given = parser.parse_args(argv)
    try:
        with cg.World.from_env(timeout=given.timeout) as world:
            layout = cg.Layout(world.size, **{axis: getattr(given, axis) for axis in _AXES})
            return run(world, layout)
    except ConfigurationError as error:
        print(f"commgraph.selftest: {error}", file=sys.stderr)
        return 2


def run(world: cg.World, layout: cg.Layout) -> int:
    """Test every group of a layout; print the table on rank 0 and return the exit code. Collective."""
    names = [name for name in layout.names if any(len(ranks) > 1 for ranks in layout.groups(name))]
    if not names:
        if world.rank == 0:
            print(f"{layout!r} has no group of two ranks or more: nothing is sent. Start more ranks, or name axes, e.g. --tp 2")
        return 2
    context = world.context(layout, name="selftest")
    with progress("commgraph.selftest", len(names) * len(OPERATIONS), "operations", shown=world.rank == 0) as advance:
        cells = {name: _test(world, context[name], advance) for name in names}
    answers: list[dict[str, dict[str, str | float]]] = world.group.all_gather_object(cells)
    faults = [
        f"rank {rank}, {name} {layout.ranks(name, rank)}, {operation}: {cell}"
        for rank, answer in enumerate(answers)
        for name, column in answer.items()
        for operation, cell in column.items()
        if isinstance(cell, str)
    ]
    if world.rank == 0:
        print(f"{layout!r}, {world.node_count} host{'s' if world.node_count > 1 else ''}; microseconds of the slowest rank\n")
        print(_table(names, answers))
        print("\n" + ("\n".join(faults) if faults else f"all right: {len(OPERATIONS)} operations on {len(names)} kinds of groups"))
    context.close()
    return 1 if faults else 0


def _test(world: cg.World, group: cg.GroupCoordinator, advance: Callable[[], None]) -> dict[str, str | float]:
    """Return for each operation the microseconds that it took, once warm, or why it failed. Collective over the world.

    Args:
        world, group: of which it is.
        advance: called after each operation.
    """
    found: dict[str, str | float] = {}
    for operation, check in OPERATIONS:
        # A rank alone has nobody to send to.
        takes_part = group.world_size > 1 or not ("send" in operation or operation == "batch")
        why = ""
        if takes_part:
            try:
                check(group)
            except (CommGraphError, AssertionError, ValueError, TypeError, RuntimeError) as error:
                why = found[operation] = f"{type(error).__name__}: {error}"
        # Ranks on which it was right would wait in the second call for one on which it was not.
        said: list[tuple[str, bool]] = world.group.all_gather_object((why, group.is_broken))
        if any(broken for _, broken in said):
            break
        if takes_part and not any(failed for failed, _ in said):
            begun = time.perf_counter()
            check(group)
            found[operation] = (time.perf_counter() - begun) * 1e6
        advance()
    return found


def _table(names: Sequence[str], answers: Sequence[dict[str, dict[str, str | float]]]) -> str:
    rows = [["", *names]]
    for operation, _ in OPERATIONS:
        row = [operation]
        for name in names:
            cells = [answer[name].get(operation) for answer in answers]
            times = [cell for cell in cells if isinstance(cell, float)]
            failed = any(isinstance(cell, str) for cell in cells)
            row.append("FAILED" if failed else f"{max(times):.0f}" if times else "-")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(ended_well("commgraph.selftest", main))
