"""Pickled objects in parts, of which the first is signed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commgraph.shm.pickling import Pickler
from commgraph.shm.sealed_pickle import key_of, open_sealed, seal
from commgraph.wire import WireError

KEY, CONTEXT = key_of(b"key"), b"context"
LARGE = bytes(range(256)) * 300  # beyond the size from which pickle writes a payload apart

leaves = st.one_of(
    st.integers(),
    st.text(max_size=20),
    st.sampled_from([LARGE, bytearray(LARGE), LARGE.decode("latin-1"), "é" * 40_000, b"\x95" * 70_000, "x" * 65_536, b"y" * 65_535]),
    st.integers(0, 30_000).map(lambda n: list(range(n))),
    st.integers(0, 30_000).map(bytearray),
)
objects = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=8
)


def moved(parts: tuple[Any, ...]) -> list[bytearray]:
    """Return the parts as they arrive."""
    return [bytearray(memoryview(part).cast("B")) for part in parts]


@settings(max_examples=40)
@given(objects)
def test_objects_arrive_as_they_were(obj: Any) -> None:
    head, *beside = moved(seal(obj, Pickler(), KEY, CONTEXT))
    sealed = open_sealed(head, KEY, CONTEXT)
    assert sealed.lengths == [len(part) for part in beside]
    found = sealed.load(beside)
    assert found == obj
    assert type(found) is type(obj)


def test_large_contents_travel_beside_what_is_signed() -> None:
    x = torch.arange(100_000.0)
    parts = seal({"b": LARGE, "s": "é" * 70_000, "x": x, "twice": [LARGE, LARGE]}, Pickler(), KEY, CONTEXT)
    assert len(parts) == 4  # an object that occurs again is no payload
    assert len(parts[0]) < 1000
    found = open_sealed(parts[0], KEY, CONTEXT).load(moved(parts)[1:])
    assert torch.equal(found["x"], x)
    assert found["twice"] == [LARGE, LARGE]


def test_what_pickle_runs_is_signed() -> None:
    """A frame of opcodes that is as large as a payload is signed, also where it holds something that looks like the begin of one."""
    disguised = [b"\x8e" + (70_000).to_bytes(8, "little")] * 20_000
    obj = [*map(str, range(40_000)), *disguised, *[bytes([i % 256, 1]) for i in range(30_000)]]
    parts = seal(obj, Pickler(), KEY, CONTEXT)
    assert len(parts) == 1
    assert len(parts[0]) >= len(pickle.dumps(obj, protocol=5))


@pytest.mark.parametrize("at", [0, 5, 40, 45, 60, -1])
def test_nothing_that_was_changed_is_unpickled(at: int) -> None:
    head = bytearray(seal([LARGE, torch.ones(3000)], Pickler(), KEY, CONTEXT)[0])
    head[at] ^= 1
    with pytest.raises(WireError):
        open_sealed(head, KEY, CONTEXT)


def test_a_part_of_elsewhere_is_refused() -> None:
    (head,) = seal(1, Pickler(), KEY, CONTEXT)
    for key, context in ((key_of(b"other"), CONTEXT), (KEY, b"other")):
        with pytest.raises(WireError, match="not signed with this rank's authkey, or belongs elsewhere"):
            open_sealed(head, key, context)
    for noise in (b"", b"\x13", head[:-1], b"\x12" + head[1:], bytes(100)):
        with pytest.raises(WireError):
            open_sealed(noise, KEY, CONTEXT)
    with pytest.raises(ValueError, match="authkey is empty"):
        key_of(b"")
