"""A barrier that names the ranks that did not come."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from commgraph.deadline import Deadline

__all__ = ["barrier"]


def barrier(store: dist.Store, rank: int, world_size: int, timeout: timedelta, wait_all_ranks: bool) -> None:
    """Wait for every rank: rank 0 for the others, and these for its word.

    Args:
        store: a place of this barrier's own.
        rank, world_size: of the group.
        timeout: deadline of rank 0. The others wait for as long, and a second more: rank 0 says first who is missing.
        wait_all_ranks: let rank 0 look for all that are missing.

    Raises:
        RuntimeError: a rank did not come, or rank 0 gave up; in the words of torch's own barrier, which programs look for.
    """
    wait_ms, failed = round(timeout.total_seconds() * 1000), "failed to pass monitoredBarrier"
    if rank:
        store.set(f"{rank}", "here")
        try:
            store.wait(["said"], timeout + timedelta(seconds=1))
            why = store.get("said").decode()
        except RuntimeError:
            why = f"it did not come in {wait_ms} ms"
        if why:
            raise RuntimeError(
                f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank 0: {why}"
            )
        return
    if timeout <= timedelta(0):
        raise RuntimeError(f"Rank 0 timed out in monitoredBarrier after {wait_ms} ms: a deadline in the future is needed")
    deadline, missing = Deadline.after(timeout.total_seconds()), []
    for other in range(1, world_size):
        try:
            store.wait([f"{other}"], timedelta(seconds=max(deadline.left(), 0.001)))
        except RuntimeError:
            missing.append(other)
            if not wait_all_ranks:
                break
    said = f"Rank{'s' if wait_all_ranks else ''} {', '.join(map(str, missing))} {failed} in {wait_ms} ms" if missing else ""
    store.set("said", said)
    if said:
        raise RuntimeError(said)
