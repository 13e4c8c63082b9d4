"""Agreement of ranks on what they are about to build, and on whether all of them succeeded.

Every rank writes one message to the store and reads one: rank 0 reads those of all and writes the answer, so that the traffic grows with
the number of ranks and not with its square.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from commgraph.errors import BuildError, LayoutMismatchError
from commgraph.waiting import await_keys

__all__ = ["PeerLeftError", "agree"]

# Seconds that the others wait longer than rank 0, which answers at its deadline at the latest and may have begun later.
_GRACE = timedelta(seconds=5)


class PeerLeftError(BuildError):
    """A build ended because another rank of the group had ended it."""


def agree(
    store: dist.Store,
    rank: int,
    world_size: int,
    facts: Mapping[str, str],
    *,
    what: str,
    timeout: timedelta,
    error: str = "",
    follows: bool = False,
) -> None:
    """Compare facts over all ranks. Collective; `store` must be this agreement's own prefix.

    Args:
        store: where to meet.
        rank: this rank.
        world_size: number of ranks.
        facts: name -> what must be equal among the ranks that state that name.
        what: name of what is agreed on, for messages, e.g. ``"context 'target'"``.
        timeout: how long to wait for the last rank.
        error: why this rank cannot go on: every other rank then raises `BuildError`, and this one, which has an error of its own,
            returns at once.
        follows: the error only follows from that of another rank, which is likely to be reported here: this rank raises that one, too.

    Raises:
        LayoutMismatchError: facts differ; on every rank, naming fact, values and ranks.
        BuildError: a rank reported an error or did not come.
    """
    if world_size == 1:
        return
    keys = [f"said/{peer}" for peer in range(world_size)]
    try:
        store.set(keys[rank], json.dumps({"facts": dict(facts), "error": error, "follows": follows}))
        if error and not follows:
            if rank == 0:  # it need not hear the others to answer them
                store.set("verdict", json.dumps(("error", _refusal(what, {0: error}))))
            return
        if rank == 0:
            verdict = _judge(store, keys, what, timeout)
            store.set("verdict", json.dumps(verdict))
        else:
            await_keys(store, ["verdict"], timeout + _GRACE)
            verdict = json.loads(store.get("verdict"))
    except RuntimeError as failure:
        why = (
            "the store that the ranks meet in failed"
            if rank == 0
            else f"no answer from rank 0 within {timeout.total_seconds():g} s: it never came here, or it died, or the store that the ranks "
            "meet in is gone. Building is collective: every rank makes the same calls in the same order"
        )
        raise BuildError(f"rank {rank}: {what}: {why} ({failure})") from failure
    kind, message = verdict
    if kind == "mismatch":
        raise LayoutMismatchError(f"rank {rank}: {message}")
    if kind == "error":
        raise BuildError(f"rank {rank}: {message}")


def _judge(store: dist.Store, keys: Sequence[str], what: str, timeout: timedelta) -> tuple[str, str]:
    try:
        await_keys(store, keys, timeout)
        came = list(range(len(keys)))
    except RuntimeError:  # each store has an error of its own for a wait that ran out; one that is gone fails again below
        came = [peer for peer, key in enumerate(keys) if store.check([key])]
    present = [keys[peer] for peer in came]
    extended = store.has_extended_api()  # type: ignore[attr-defined]  # missing in torch's stub
    values = store.multi_get(present) if extended else [store.get(key) for key in present]
    said = {peer: json.loads(value) for peer, value in zip(came, values, strict=True)}
    if failed := {peer: entry["error"] for peer, entry in said.items() if entry["error"]}:
        # Reported errors first: the ranks that did not come may be waiting for one that failed.
        failed = {peer: why for peer, why in failed.items() if not said[peer]["follows"]} or failed
        return "error", _refusal(what, failed)
    if missing := sorted(set(range(len(keys))) - set(came)):
        return "error", (
            f"{what}: rank{'s' if len(missing) > 1 else ''} {_listing(missing)} of {len(keys)} did not come within "
            f"{timeout.total_seconds():g} s. Building is collective: every rank makes the same calls in the same order"
        )
    for name in sorted({name for entry in said.values() for name in entry["facts"]}):
        by_value: dict[str, list[int]] = {}
        for peer, entry in said.items():
            if name in entry["facts"]:
                by_value.setdefault(entry["facts"][name], []).append(peer)
        if len(by_value) > 1:
            lines = [f"  ranks {_listing(peers)}: {value}" for value, peers in by_value.items()]
            return "mismatch", f"{what}: the ranks disagree about {name}:\n" + "\n".join(lines)
    return "agreed", ""


def _refusal(what: str, failed: Mapping[int, str]) -> str:
    first = min(failed)
    others = f" (and ranks {_listing([peer for peer in failed if peer != first])})" if len(failed) > 1 else ""
    return f"{what}: rank {first}{others} could not build it: {failed[first]}"


def _listing(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
