"""Jobs as the tests of vLLM and mpi4py have them, in processes that just end.

    comm_ops.py models RANKS ROUNDS     vLLM's test_comm_ops: so many jobs, in each what tensor and pipeline parallel models communicate
    comm_ops.py collectives RANKS       mpi4py's test_coll_vec: every collective, from and to every rank, with as many rows as ranks differ

Prints a line of JSON for each job: what each rank returned, or how it ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import commgraph as cg
from tests.helpers import free_port
from tests.programs.builds import PATIENCE, processes

ROWS = 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8)


def models(ranks: int, turn: int) -> list[Any]:
    """Run one job. Which operation is the last before the processes end differs from turn to turn."""
    where = f"tcp://127.0.0.1:{free_port()}"

    def body(rank: int) -> int:
        world = cg.World.connect(where, rank=rank, world_size=ranks, timeout=PATIENCE)
        tp = world.context(cg.Layout(ranks, tp=ranks), name="tp").tp
        pp = world.context(cg.Layout(ranks, pp=ranks), name="pp").pp
        targets: list[Callable[[], None]] = [
            lambda: reductions(tp, rank),
            lambda: gathers(tp, rank),
            lambda: dict_for_all(tp, rank),
            lambda: dict_on_its_way(pp, rank),
            lambda: tensor_on_its_way(pp, rank),
        ]
        for target in targets[turn % len(targets) :] + targets[: turn % len(targets)]:
            target()
        return rank  # and ends, with everything open

    return processes(ranks, body)


def of_rank(rank: int) -> torch.Tensor:
    return torch.arange(8 * 16, dtype=torch.float32).reshape(8, 16) * (rank + 1)


def reductions(tp: Any, rank: int) -> None:
    n = tp.world_size
    total = torch.stack([of_rank(one) for one in range(n)]).sum(0)
    assert torch.equal(tp.all_reduce(of_rank(rank)), total)
    assert torch.equal(tp.reduce_scatter(of_rank(rank), 0), total.chunk(n)[rank])


def gathers(tp: Any, rank: int) -> None:
    for dim in (0, 1):
        assert torch.equal(tp.all_gather(of_rank(rank), dim), torch.cat([of_rank(one) for one in range(tp.world_size)], dim))


def a_dict() -> dict[str, Any]:
    tensors = {"a": of_rank(1), "b": torch.arange(16, dtype=torch.int8), "e": torch.empty(0), "f": {"g": of_rank(3)}}
    return {**tensors, "c": "test", "d": [1, 2, 3]}


def same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else bool(one == other)


def dict_for_all(tp: Any, rank: int) -> None:
    assert same(tp.broadcast_tensor_dict(a_dict() if rank == 0 else None, src=0), a_dict())


def dict_on_its_way(pp: Any, rank: int) -> None:
    if not pp.is_first_rank:
        assert same(pp.recv_tensor_dict(), a_dict())
    if not pp.is_last_rank:
        pp.send_tensor_dict(a_dict())


def tensor_on_its_way(pp: Any, rank: int) -> None:
    if not pp.is_first_rank:
        assert torch.equal(pp.recv((64,), torch.float32), torch.arange(64.0))
    if not pp.is_last_rank:
        pp.send(torch.arange(64.0))


def collectives(ranks: int) -> list[Any]:
    """Run one job; each rank returns how many results it has compared with what one process computes."""
    where = f"tcp://127.0.0.1:{free_port()}"

    def body(rank: int) -> int:
        world = cg.World.connect(where, rank=rank, world_size=ranks, timeout=PATIENCE)
        group = world.context(cg.Layout(ranks, tp=ranks), name="a").tp
        # Lengths that differ between ranks, among them none.
        lengths = [[one + 1 for one in range(ranks)], [(one * 3 + 1) % 4 for one in range(ranks)], [0, *[5] * (ranks - 1)]]
        return sum(compared(group, rank, sizes, dtype) for sizes in lengths for dtype in DTYPES)

    return processes(ranks, body)


def filled(rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(rows * 3).reshape(rows, 3) * 7 + seed * 5) % 11).to(dtype)


def compared(group: Any, rank: int, sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Make every collective; assert that each gives what one process computes; return how many that were."""
    n, count = group.world_size, 0

    def check(got: Any, want: Any) -> None:
        nonlocal count
        count += 1
        assert (got is None) == (want is None), (got, want)
        assert got is None or (got.dtype == want.dtype and torch.equal(got, want)), (count, got, want)

    mine = [filled(sizes[one], one, dtype) for one in range(n)]
    joined, alike = torch.cat(mine), [filled(ROWS, one, dtype) for one in range(n)]
    total, largest = torch.stack(alike).sum(0).to(dtype), torch.stack(alike).amax(0)
    long = [filled(sum(sizes), 20 + one, dtype) for one in range(n)]
    piece = torch.stack(long).sum(0).to(dtype).split(list(sizes))[rank]
    # Row i, column j: how many rows rank i sends to rank j.
    rows = [[(i * 2 + j + sizes[j]) % 4 for j in range(n)] for i in range(n)]
    sent = [filled(sum(rows[i]), 30 + i, dtype) for i in range(n)]
    received = torch.cat([sent[i].split(rows[i])[rank] for i in range(n)])
    for root in range(n):
        check(group.broadcast(alike[root].clone() if rank == root else torch.zeros(ROWS, 3, dtype=dtype), src=root), alike[root])
        check(group.gather(mine[rank], dst=root, dim=0, sizes=list(sizes)), joined if rank == root else None)
        check(group.scatter(joined if rank == root else None, src=root, dim=0, sizes=list(sizes)), mine[rank])
        check(group.reduce(alike[rank], dst=root), total if rank == root else None)
        check(group.reduce(alike[rank], dst=root, op="max"), largest if rank == root else None)
        check(torch.tensor(group.broadcast_object(list(sizes) if rank == root else None, src=root)), torch.tensor(list(sizes)))
    check(group.all_gather(alike[rank], 0), torch.cat(alike))
    check(group.all_gather(alike[rank], 1), torch.cat(alike, 1))
    check(group.all_gatherv(mine[rank], 0, list(sizes)), joined)
    check(group.all_reduce(alike[rank]), total)
    check(group.all_reduce(alike[rank], op="max"), largest)
    check(group.reduce_scatterv(long[rank], 0, list(sizes)), piece)
    check(group.all_to_all(sent[rank], input_sizes=rows[rank], output_sizes=[rows[i][rank] for i in range(n)]), received)
    check(torch.tensor(group.all_gather_object(sizes[rank])), torch.tensor(list(sizes)))
    group.barrier()
    return count


if __name__ == "__main__":
    n = int(sys.argv[2])
    if sys.argv[1] == "models":
        for turn in range(int(sys.argv[3])):
            said = models(n, turn)
            print(json.dumps({"turn": turn, "said": said, "fine": said == list(range(n))}), flush=True)
    else:
        said = collectives(n)
        print(json.dumps({"said": said, "fine": said == [3 * len(DTYPES) * (6 * n + 8)] * n}), flush=True)
