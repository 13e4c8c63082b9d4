"""What ranks tell each other before a call where `CommunicatorOptions.check` is set, and what they learn from it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

__all__ = ["check_text", "what_differs"]

# Of a message in which a rank tells a peer what it calls, and of the place in the code at its end.
_CHECK_BYTES = 512
_PLACE_BYTES = 200
_ONE_ORDER = (
    "\nOn a device all ranks begin what they have in common in one order, whatever groups it is of: else they can wait for each other"
)


def check_text(sequence: int, crossing: tuple[int, int], what: str, at: str) -> torch.Tensor:
    """What a rank tells a peer; a long signature is cut, with a digest in the place of what was cut off.

    Args:
        sequence: number of the call in its group.
        crossing: entries that go to the peer and come from it.
        what: the call.
        at: place of it in the user's code.
    """
    end = f"\0{crossing[0]}\0{crossing[1]}\0".encode() + at.encode()[-_PLACE_BYTES:]
    head = f"{sequence}\0{what}".encode()
    room = _CHECK_BYTES - len(end)
    if len(head) > room:
        mark = f"... {zlib.crc32(head):08x}".encode()
        head = head[: room - len(mark)] + mark
    text = torch.zeros(_CHECK_BYTES, dtype=torch.uint8)
    text[: len(head) + len(end)] = torch.frombuffer(bytearray(head + end), dtype=torch.uint8)
    return text


def what_differs(
    texts: Sequence[torch.Tensor], ranks: Sequence[int], me: int, crossing: Sequence[tuple[int, int]] | None, *, ordered: bool
) -> str:
    """How the calls do not fit together, in words; empty where they do.

    Args:
        texts: by rank in the group what it told this one.
        ranks: global ranks.
        me: this rank in the group.
        crossing: entries that go from here to each rank and come from it, where that is not in the calls themselves.
        ordered: whether the calls may be of several groups.
    """
    said = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace").split("\0") for text in texts]
    calls = [f"  rank {ranks[i]}: call #{number}, {words}, at {there}" for i, (number, words, *_, there) in enumerate(said)]
    if len({tuple(words[:2]) for words in said}) > 1:
        return "the ranks of the group called different things:\n" + "\n".join(calls) + (_ONE_ORDER if ordered else "")
    wrong = []
    for peer, (_, _, sent, expected, _) in enumerate(said if crossing else ()):
        to, back = crossing[peer] if crossing else (0, 0)
        if int(expected) != to:
            wrong.append(f"  rank {ranks[me]} sends {to} entries to rank {ranks[peer]}, which expects {expected}")
        if int(sent) != back and peer != me:
            wrong.append(f"  rank {ranks[peer]} sends {sent} entries to rank {ranks[me]}, which expects {back}")
    return "the sizes of the ranks do not fit together:\n" + "\n".join([*wrong, *calls]) if wrong else ""
