"""Tags: 31 bits that the messages of one call share, and that differ between calls that do not match."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

__all__ = [
    "CHECK",
    "COLLECTIVE",
    "MESSAGE",
    "OBJECT",
    "OBJECT_REST",
    "SETUP",
    "digest",
    "make_tag",
    "message_text",
    "rest_of",
    "tag_of",
    "tagged_text",
]

# Kinds of messages: messages of different kinds are never matched, however they are interleaved. SETUP: of strategies that are being
# built. The highest of 3 bits stays free.
COLLECTIVE, MESSAGE, OBJECT, OBJECT_REST, CHECK, SETUP = range(6)

_MASK = (1 << 28) - 1


def message_text(dtype: object, shape: Sequence[int]) -> str:
    """Return the text of a message. With its shape: elements that arrive in another one would be taken for others without a word."""
    return f"{dtype} {tuple(shape)}"


def tagged_text(text: str, tag: int) -> str:
    """Return the text of messages with a tag of the user's; 0 is that of messages without one."""
    return f"{text} tag={tag}" if tag else text


def digest(text: str) -> int:
    """Return 28 bits of a text."""
    return zlib.crc32(text.encode()) & _MASK


def make_tag(kind: int, sequence: int, text: str = "") -> int:
    """Return the tag of a call: its kind, and a hash of its number and of the text that all ranks of the call have in common."""
    return kind << 28 | ((zlib.crc32(text.encode()) ^ sequence * 0x9E3779B1) & _MASK)


def tag_of(kind: int, sequence: int, hashed: int) -> int:
    """Return the tag of a call whose text has the digest `hashed`.

    The native module computes it alike (`make_tag` in native/module.c). The multiplier is odd, so the tags of 2**28 equal calls differ.
    """
    return kind << 28 | ((hashed ^ sequence * 0x9E3779B1) & _MASK)


def rest_of(tag: int) -> int:
    """Return the tag of the frames of an object that follow the one with `tag`."""
    return OBJECT_REST << 28 | (tag & _MASK)
