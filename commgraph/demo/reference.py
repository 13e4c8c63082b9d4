"""The demo's models on one process, in plain torch: the oracle that the sharded models are held against.

It imports nothing of commgraph's parallel machinery. Shapes: B sequences of T new tokens over S = past + T positions, hidden size H,
heads of size D. Parameters and arithmetic are float32, whatever the file stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import attrs
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from commgraph.demo.config import LlamaConfig

__all__ = ["KVCache", "Llama", "SpeculativeResult", "load_checkpoint", "speculate"]


def load_checkpoint(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration and the whole float32 tensors, by parameter name, of a weight file."""
    with safe_open(path, framework="pt") as file:
        return LlamaConfig.from_metadata(file.metadata()), {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


@attrs.define
class KVCache:
    """Keys and values of the positions seen so far: one pair ``[B, num_kv_heads, S, D]`` per layer."""

    layers: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[B, num_kv_heads, T, D]`` to ``layer``; returns all of that layer, ``[B, num_kv_heads, S, D]``."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            past_key, past_value = self.layers[layer]
            self.layers[layer] = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        return self.layers[layer]

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.layers = [(key[:, :, :length], value[:, :, :length]) for key, value in self.layers]


def rotary(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T, D]`` of the rotary embedding at ``positions`` ``[T]``."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` ``[B, heads, T, D]`` by its positions; element i pairs with i + D/2, as in Hugging Face's Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """``[B, T, H]`` to ``[B, T, H]``; ``mask`` ``[T, S]`` is True where a token sees a position, None for plain causal."""
        heads = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        y: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """The gated feed-forward network, SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H]`` to ``[B, T, H]``."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each normalised before and added to its input."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """``[B, T, H]`` to ``[B, T, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Decoder(nn.Module):
    """Everything before the head; of its own only because the parameter names begin with ``model.``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config)


class Llama(nn.Module):
    """A whole Llama in one process."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The model of a weight file, for inference."""
        config, tensors = load_checkpoint(path)
        model = cls(config)
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of ``tokens`` ``[B, T]``, which follow those in ``cache`` and are added to it."""
        past, count = cache.length if cache is not None else 0, tokens.shape[1]
        positions = torch.arange(past, past + count)
        cos, sin = rotary(positions, self.config)
        mask = torch.arange(past + count) <= positions[:, None] if past else None
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, cache)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """The ``count`` tokens that follow ``prompt`` greedily; without the cache every step computes everything anew."""
        tokens, cache = list(prompt), KVCache() if use_cache else None
        for _ in range(count):
            new = tokens[cache.length if cache is not None else 0 :]
            tokens.append(int(self(torch.tensor([new]), cache)[0, -1].argmax()))
        return tokens[len(prompt) :]


@attrs.frozen
class SpeculativeResult:
    """Tokens written by :func:`speculate`, and how many of the draft's proposals the target accepted."""

    tokens: list[int]
    proposed: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Accepted tokens per proposed one."""
        return self.accepted / self.proposed if self.proposed else 0.0


@torch.no_grad()
def speculate(target: Llama, draft: Llama, prompt: list[int], count: int, *, draft_length: int) -> SpeculativeResult:
    """Greedy speculative decoding: ``target.generate(prompt, count)``, by fewer steps of the target.

    The draft proposes ``draft_length`` tokens, one forward of the target checks them all; the longest agreeing run is kept, and the
    target's own token after it.
    """
    tokens, proposed, accepted = list(prompt), 0, 0
    target_cache, draft_cache = KVCache(), KVCache()
    while len(tokens) < len(prompt) + count:
        guess: list[int] = []
        for _ in range(draft_length):
            new = torch.tensor([(tokens + guess)[draft_cache.length :]])
            guess.append(int(draft(new, draft_cache)[0, -1].argmax()))
        new = torch.tensor([(tokens + guess)[target_cache.length :]])
        truth = target(new, target_cache)[0, -draft_length - 1 :].argmax(-1).tolist()
        agreed = next((i for i, (a, b) in enumerate(zip(guess, truth, strict=False)) if a != b), draft_length)
        tokens += truth[: agreed + 1]
        proposed, accepted = proposed + draft_length, accepted + agreed
        for cache in (target_cache, draft_cache):
            cache.truncate(len(tokens) - 1)
    return SpeculativeResult(tokens[len(prompt) : len(prompt) + count], proposed, accepted)
