"""The language models that ``commgraph demo`` ships, and the plain model that the sharded ones are held against."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Iterator

import pytest
import torch

from commgraph.demo.config import DEFAULT_PROMPT, LlamaConfig, decode, encode, weights_path
from commgraph.demo.reference import KVCache, Llama, load_checkpoint, speculate


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread, above all where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target() -> Llama:
    return Llama.load(weights_path("target"))


@pytest.fixture(scope="module")
def draft() -> Llama:
    return Llama.load(weights_path("draft"))


def test_the_weight_files_are_small() -> None:
    assert weights_path("target").stat().st_size + weights_path("draft").stat().st_size < 4_000_000


def test_the_configuration_survives_the_metadata() -> None:
    config, tensors = load_checkpoint(weights_path("target"))
    assert LlamaConfig.from_metadata(config.to_metadata()) == config
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (config.num_kv_heads * config.head_dim, config.hidden_size)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_both_models_can_be_cut_in_four(size: int) -> None:
    target, draft = (load_checkpoint(weights_path(name))[0] for name in ("target", "draft"))
    for config in (target, draft):
        sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
        assert [n % size for n in sizes] == [0, 0, 0, 0]
    assert target.num_layers % size == 0
    assert target.vocab_size == draft.vocab_size == 256


def test_the_target_writes_words(target: Llama) -> None:
    known = set(re.findall(r"[a-z]+", " ".join(pydoc_data.topics.topics.values()).lower()))
    text = decode(target.generate(encode(DEFAULT_PROMPT), 200))
    words = [re.sub(r"[^a-z]", "", word) for word in text.lower().split()[:-1]]  # the last may be cut short
    assert len(words) >= 20
    assert sum(word in known for word in words) > 0.8 * len(words)
    assert len(set(words)) >= 0.3 * len(words), "it repeats itself"


@pytest.mark.parametrize("name", ["target", "draft"])
def test_the_cache_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    model: Llama = request.getfixturevalue(name)
    prompt = encode(DEFAULT_PROMPT)
    assert model.generate(prompt, 40) == model.generate(prompt, 40, use_cache=False)


def test_logits_through_a_cache_in_pieces(target: Llama) -> None:
    tokens = torch.tensor([encode("Names are resolved"), encode("The global names a")])
    cache = KVCache()
    with torch.no_grad():
        whole = target(tokens)
        pieces = [target(tokens[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 18))]
        cache.truncate(5)
        again = target(tokens[:, 5:], cache)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, whole[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_speculation_writes_what_the_target_writes(target: Llama, draft: Llama, draft_length: int) -> None:
    result = speculate(target, draft, encode(DEFAULT_PROMPT), 99, draft_length=draft_length)
    assert result.tokens == target.generate(encode(DEFAULT_PROMPT), 99)
    assert result.proposed >= result.accepted > 0


def test_the_draft_is_accepted_most_of_the_time(target: Llama, draft: Llama) -> None:
    result = speculate(target, draft, encode(DEFAULT_PROMPT), 200, draft_length=4)
    assert result.acceptance >= 0.5
