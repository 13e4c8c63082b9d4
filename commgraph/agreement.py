"""Agreement of ranks on what they are about to build, and on whether all of them succeeded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from commgraph.errors import BuildError, LayoutMismatchError
from commgraph.meeting import Meeting, listing

__all__ = ["agree"]


def agree(meeting: Meeting, facts: Mapping[str, str]) -> None:
    """Compare facts over all ranks of a meeting. Collective.

    Args:
        meeting: with a prefix of its own for this agreement.
        facts: name -> what must be equal among the ranks that state that name.

    Raises:
        LayoutMismatchError: facts differ; on every rank, naming fact, values and ranks.
        BuildError: a rank reported an error, died or did not come, or what the store holds is not commgraph's.
    """
    if len(meeting.ranks) == 1:
        return
    answer = meeting.answer("agree", json.dumps(dict(facts)).encode(), lambda said: _judge(said, meeting.what, meeting.ranks))
    try:
        kind, message = json.loads(answer)
    except (ValueError, TypeError):
        kind, message = "error", f"{meeting.what}: what the store holds for rank {meeting.ranks[0]}'s answer is not commgraph's"
    if kind == "mismatch":
        raise LayoutMismatchError(f"rank {meeting.ranks[meeting.rank]}: {message}")
    if kind == "error":
        raise BuildError(f"rank {meeting.ranks[meeting.rank]}: {message}")


def _judge(said: Sequence[bytes], what: str, ranks: Sequence[int]) -> bytes:
    by_name: dict[str, dict[str, list[int]]] = {}
    for rank, value in zip(ranks, said, strict=True):
        try:
            facts = {str(name): str(fact) for name, fact in json.loads(value).items()}
        except (ValueError, AttributeError):
            return json.dumps(("error", f"{what}: what the store holds for rank {rank} is not commgraph's, or another version's")).encode()
        for name, fact in facts.items():
            by_name.setdefault(name, {}).setdefault(fact, []).append(rank)
    for name in sorted(by_name):
        if len(by_name[name]) > 1:
            lines = [f"  ranks {listing(peers)}: {fact}" for fact, peers in by_name[name].items()]
            return json.dumps(("mismatch", f"{what}: the ranks disagree about {name}:\n" + "\n".join(lines))).encode()
    return json.dumps(("agreed", "")).encode()
