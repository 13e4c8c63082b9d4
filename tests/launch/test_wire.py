"""Objects as bytes: what goes in comes out, and what nobody made is refused."""

from __future__ import annotations

import contextlib
import enum
import pickle
import tracemalloc
from collections import OrderedDict, namedtuple
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commgraph.errors import CommGraphError
from commgraph.wire import WireError, decode, encode
from tests.helpers import CARRIERS, same

KEY = b"k" * 32
PLAIN_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
TENSOR_DTYPES = [dtype for dtype in PLAIN_DTYPES if not str(dtype).startswith("torch.q")]


class Color(enum.IntEnum):
    RED = 1


class Word(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")


def has_tensor(obj: Any) -> bool:
    if isinstance(obj, dict):
        return any(map(has_tensor, obj.values()))
    return isinstance(obj, torch.Tensor) or (isinstance(obj, (list, tuple)) and any(map(has_tensor, obj)))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    shape: list[int] = draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel() * dtype.itemsize
    tensor = torch.arange(count, dtype=torch.int64).remainder(120).to(torch.uint8)
    tensor = tensor.view(CARRIERS[dtype.itemsize]).reshape(shape)
    if shape and draw(st.booleans()):
        tensor = tensor.permute(*draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        tensor = tensor[..., ::2]
    return tensor.view(dtype)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.text(st.characters(codec=None), max_size=4)
    | st.binary()
    | st.sampled_from(PLAIN_DTYPES)
    | st.sampled_from([torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")])
    | st.lists(st.integers(0, 9)).map(torch.Size)
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5)
OBJECTS = st.recursive(
    HASHABLE | st.binary().map(bytearray) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
    ),
    max_leaves=10,
)


@given(OBJECTS)
def test_plain_data_comes_out_as_it_went_in(obj: Any) -> None:
    assert same(decode(memoryview(encode(obj, key=None, context=b"")), key=None, context=b""), obj)


@given(OBJECTS, st.binary(min_size=1), st.binary())
def test_plain_data_with_a_key(obj: Any, key: bytes, context: bytes) -> None:
    if not has_tensor(obj):  # torch cannot pickle tensors of every dtype
        assert same(decode(encode(obj, key=key, context=context), key=key, context=context), obj)


def test_any_object_with_a_key() -> None:
    obj = [Color.RED, Word("x"), Pair(1, 2), Fraction(1, 3), ValueError("v")]
    out = decode(encode(obj, key=KEY, context=b"c"), key=KEY, context=b"c")
    assert [type(item) for item in out] == [type(item) for item in obj]
    assert torch.equal(decode(encode(torch.arange(5), key=KEY, context=b""), key=KEY, context=b""), torch.arange(5))


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    base = torch.arange(24 * dtype.itemsize).to(torch.uint8).view(CARRIERS[dtype.itemsize]).reshape(2, 3, 4)
    for shaped in (base, base.transpose(0, 2), base[:, 1], base[0, 0, 0], base[:0], base[..., :0], base[:, :1].expand(2, 5, 4)):
        tensor = shaped.view(dtype)
        out = decode(encode({"t": tensor}, key=None, context=b""), key=None, context=b"")["t"]
        assert same(out, tensor)
        assert out.stride() == tensor.stride() or not out.numel()
        assert not out.requires_grad


def test_tensors_own_writable_memory() -> None:
    frame = bytearray(encode(torch.zeros(4), key=None, context=b""))
    first, second = (decode(frame, key=None, context=b"") for _ in range(2))
    first += 1
    frame[:] = bytes(len(frame))
    assert (first.tolist(), second.tolist()) == ([1] * 4, [0] * 4)
    first.resize_(1000)  # memory of torch's own


def test_tensors_that_stand_for_other_bits() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (value.conj(), value.conj().imag, torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True)):
        assert torch.equal(decode(encode(tensor, key=None, context=b""), key=None, context=b""), tensor.detach())


@pytest.mark.parametrize(
    ("obj", "what", "place"),
    [
        (Color.RED, "test_wire.Color", "obj;"),
        ({"a": [0, 1, 2, Fraction(1)]}, "fractions.Fraction", "obj['a'][3];"),
        ([Word("x")], "test_wire.Word", "obj[0];"),
        ((1, Pair(1, 2)), "test_wire.Pair", "obj[1];"),
        (OrderedDict(a=1), "collections.OrderedDict", "obj;"),
        ({3: {Color.RED: 1}}, "test_wire.Color", "obj[3].keys();"),
        ([{(1, Color.RED)}], "test_wire.Color", "obj[0]{...}[1];"),
        ({torch.int8: print}, "builtins.builtin_function_or_method", "obj[torch.int8];"),
        (torch.nn.Parameter(torch.ones(1)), "torch.nn.parameter.Parameter", "obj;"),
        ([torch.ones(1, device="meta")], "a tensor on meta", "obj[0];"),
        ([torch.ones(2, 2).to_sparse()], "torch.sparse_coo", "obj[0];"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_plain_is_named_with_its_place(obj: Any, what: str, place: str) -> None:
    with pytest.raises(TypeError) as caught:
        encode(obj, key=None, context=b"")
    assert what in str(caught.value)
    assert f" at {place}" in str(caught.value)
    assert "set an authkey (World.from_env(authkey=...) or COMMGRAPH_AUTHKEY)" in str(caught.value)


def test_objects_that_are_too_deep() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested deeper than 200 levels, or contains itself"):
        encode(endless, key=None, context=b"")
    assert decode(encode(endless, key=KEY, context=b""), key=KEY, context=b"")[0][0][0] is not endless
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    assert same(decode(encode(deep, key=None, context=b""), key=None, context=b""), deep)
    with pytest.raises(ValueError, match="nested deeper"):
        encode([deep], key=None, context=b"")
    for _ in range(100_000):
        deep = (deep,)
    with pytest.raises(ValueError, match="too deep"):
        encode(deep, key=KEY, context=b"")


@pytest.mark.parametrize("depth", [201, 900, 100_000])
@pytest.mark.parametrize("opening", [b"\x92\x00", b"\x91", b"\x81\x01"])
def test_frames_that_are_too_deep(opening: bytes, depth: int) -> None:
    with pytest.raises(WireError):
        decode(b"\x11" + opening * depth + b"\x01", key=None, context=b"")


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_frame_error(data: bytes) -> None:
    for frame in (data, b"\x11" + data):
        try:
            obj = decode(frame, key=None, context=b"")
        except WireError:
            continue
        decode(encode(obj, key=None, context=b""), key=None, context=b"")
    for frame in (data, b"\x12" + data):
        with pytest.raises(WireError):
            decode(frame, key=KEY, context=b"")


@given(OBJECTS, st.data())
def test_plain_frames_with_a_few_wrong_bytes(obj: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(obj, key=None, context=b""))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode(frame[: data.draw(st.integers(0, len(frame)))], key=None, context=b"")


TREES: st.SearchStrategy[Any] = st.recursive(
    st.integers(0, 7) | st.sampled_from(["float32", "qint8", "int4", "x", b"", b"\0" * 8, -1, 2**62, {}, None])
    | st.builds(msgspec.msgpack.Ext, st.integers(-3, 7), st.sampled_from([b"", b"\0" * 16, b"cuda:256", b"int8", b"\xff"])),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(st.just(6), inner, inner, inner),
    max_leaves=12,
)  # fmt: skip


@given(TREES)
def test_any_tree_is_an_object_or_a_frame_error(tree: Any) -> None:
    with contextlib.suppress(WireError):
        decode(b"\x11" + msgspec.msgpack.encode(tree), key=None, context=b"")


@pytest.mark.parametrize(
    "tree",
    [
        [6, "float32", [2], b"\0" * 4],
        [6, "float32", [-1, -1], b"\0" * 4],
        [6, "float32", [0, 2**62, 8], b""],
        [6, "float32", [2**63, 0], b""],
        [6, "float32", [True], b"\0" * 4],
        [6, "float33", [1], b"\0" * 4],
        [6, "qint8", [4], b"\0" * 4],
        [6, "float32"],
        [6, "float32", [1], b"\0" * 4, 1],
        [2, [0]],
        [4, 1],
        [4, [0], 1],
        [5, "x"],
        [7],
        [True],
        [],
        {},
        msgspec.msgpack.Ext(5, b"cuda:256"),
        msgspec.msgpack.Ext(5, b"nowhere"),
        msgspec.msgpack.Ext(1, b""),
        msgspec.msgpack.Ext(-1, b"\0" * 4),
    ],
    ids=lambda tree: str(type(tree).__name__),  # a repr may hold an address, which differs between worker processes
)
def test_trees_that_are_no_object(tree: Any) -> None:
    with pytest.raises(WireError):
        decode(b"\x11" + msgspec.msgpack.encode(tree), key=None, context=b"")


@pytest.mark.parametrize(
    "payload",
    [
        *(bytes([head]) + b"\xff" * 4 for head in (0xDD, 0xDF, 0xC6, 0xC9, 0xDB)),
        b"\xdd\x0f\xff\xff\xff\x00",
        b"\x81\xdd\x0f\xff\xff\xff\x00",
        msgspec.msgpack.encode([6, "float32", [2**40], b"\0" * 4]),
        msgspec.msgpack.encode([6, "float32", [2**31, 2**31, 2**31], b""]),
    ],
    ids=repr,
)
def test_small_frames_that_promise_much_allocate_little(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(b"\x11" + payload, key=None, context=b"")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=40), st.data())
def test_any_flipped_bit_of_a_signed_frame_is_refused(obj: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode(obj, key=KEY, context=b"c"))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode(frame, key=KEY, context=b"c")


def test_every_flipped_bit_and_every_cut_of_one_frame() -> None:
    frame = encode({"a": 1}, key=KEY, context=b"c")
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(flipped, key=KEY, context=b"c")
    for length in range(len(frame)):
        with pytest.raises(WireError):
            decode(frame[:length], key=KEY, context=b"c")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("was unpickled",))


@pytest.mark.parametrize(("key", "context"), [(b"other", b"c"), (KEY, b"d"), (KEY, b""), (None, b"c")])
def test_nothing_is_unpickled_before_it_is_trusted(key: bytes | None, context: bytes) -> None:
    with pytest.raises(WireError):
        decode(encode(Bomb(), key=KEY, context=b"c"), key=key, context=context)
    for codec in range(256):
        with pytest.raises(WireError):
            decode(bytes([codec]) + pickle.dumps(Bomb()), key=key, context=context)


def test_no_byte_passes_from_the_context_to_the_payload() -> None:
    frame = encode("x", key=KEY, context=b"ab")
    with pytest.raises(WireError):
        decode(frame[:33] + b"b" + frame[33:], key=KEY, context=b"a")


def test_a_plain_frame_is_refused_where_there_is_a_key() -> None:
    with pytest.raises(WireError, match="not signed"):
        decode(encode(1, key=None, context=b""), key=KEY, context=b"")
    with pytest.raises(WireError, match="the sender has an authkey and this rank has none"):
        decode(encode(1, key=KEY, context=b""), key=None, context=b"")


def test_the_error_is_one_of_commgraph() -> None:
    assert issubclass(WireError, CommGraphError)
    assert issubclass(WireError, ValueError)


def test_an_empty_key_is_none_at_all() -> None:
    with pytest.raises(ValueError, match="authkey is empty"):
        encode(1, key=b"", context=b"")
    with pytest.raises(ValueError, match="authkey is empty"):
        decode(encode(1, key=KEY, context=b""), key=b"", context=b"")
