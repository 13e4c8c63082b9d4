"""The demo's Llama, cut over tensor and pipeline parallelism: an example of a model that is given a `ParallelContext`.

Shapes: T new tokens of one sequence over S = past + T positions, hidden size H, heads of size D, of which a rank holds its share.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commgraph.context import ParallelContext
from commgraph.demo.config import LlamaConfig
from commgraph.demo.reference import KVCache, RMSNorm, load_checkpoint, rotary, rotate
from commgraph.errors import ConfigurationError, LayoutError
from commgraph.nn import (
    MergedColumnParallelLinear,
    NameMapping,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    load_full_state_dict,
)

__all__ = ["ShardedLlama", "check_sizes"]

# The checkpoint's projections that are one matrix here.
_FUSED: NameMapping = MappingProxyType(
    {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
)


def check_sizes(config: LlamaConfig, model: str, *, tp: int, pp: int = 1) -> None:
    """Whether a model can be cut so.

    Raises:
        LayoutError: naming the sizes that do not divide.
    """
    cuts = (
        ("heads", config.num_heads, "tp", tp),
        ("key-value heads", config.num_kv_heads, "tp", tp),
        ("layers", config.num_layers, "pp", pp),
    )
    wrong = [f"its {size} {what} cannot be cut by {axis}={parts}" for what, size, axis, parts in cuts if size % parts]
    if wrong:
        raise LayoutError(f"the {model} model does not fit: {'; '.join(wrong)}")


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.layer = config.head_dim, layer
        heads = (config.num_heads, config.num_kv_heads)
        self.qkv_proj = QKVParallelLinear(config.hidden_size, config.head_dim, *heads, ctx=ctx, bias=False, dtype=dtype)
        self.o_proj = RowParallelLinear(config.num_heads * config.head_dim, config.hidden_size, ctx=ctx, bias=False, dtype=dtype)
        self.widths = [
            count * config.head_dim // ctx.tp.world_size for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """``[1, T, H]`` to ``[1, T, H]``, over this rank's heads."""
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv_proj(x).split(self.widths, dim=-1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = cache.extend(self.layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        y: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return y


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, widths, ctx=ctx, bias=False, dtype=dtype)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, ctx=ctx, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


class _DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = _Attention(config, layer, ctx, dtype)
        self.mlp = _MLP(config, ctx, dtype)
        self.input_layernorm = RMSNorm(config, dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class _Decoder(nn.Module):
    def __init__(self, config: LlamaConfig, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        per_stage = config.num_layers // ctx.pp.world_size
        first = ctx.pp.rank_in_group * per_stage
        if ctx.pp.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx=ctx, dtype=dtype)
        # Keyed by the layer's number in the whole model, as the checkpoint's names are; the cache counts from the stage's first.
        self.layers = nn.ModuleDict({str(first + i): _DecoderLayer(config, i, ctx, dtype) for i in range(per_stage)})
        if ctx.pp.is_last_rank:
            self.norm = RMSNorm(config, dtype)


class ShardedLlama(nn.Module):
    """One rank's part of a Llama: a stage of the pipeline, a share of every matrix in it."""

    def __init__(self, config: LlamaConfig, *, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        check_sizes(config, ctx.name, tp=ctx.tp.world_size, pp=ctx.pp.world_size)
        self.config, self.ctx = config, ctx
        self.model = _Decoder(config, ctx, dtype)
        if ctx.pp.is_last_rank:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx=ctx, dtype=dtype)

    @classmethod
    def load(cls, path: Path, *, ctx: ParallelContext, dtype: torch.dtype) -> ShardedLlama:
        """This rank's part of a weight file, for inference. Every rank reads the whole file: it is small."""
        config, tensors = load_checkpoint(path)
        model = cls(config, ctx=ctx, dtype=dtype)
        report = load_full_state_dict(model, tensors, mapping=_FUSED, strict=False)
        # Layers of other stages are skipped; a parameter of this stage that is not in the file is an error.
        if report.missing:
            raise ConfigurationError(f"{path.name} lacks {', '.join(report.missing)}")
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: list[int], cache: KVCache) -> Tensor | None:
        """Runs this rank's stage, between its neighbours in the pipeline.

        Args:
            tokens: the T new tokens, known to every rank.
            cache: of this rank's layers and heads; extended.

        Returns:
            On the last stage the logits ``[T, vocab_size]``, None elsewhere.
        """
        pp, past, count = self.ctx.pp, cache.length, len(tokens)
        positions = torch.arange(past, past + count)
        cos, sin = rotary(positions, self.config)
        mask = torch.arange(past + count) <= positions[:, None] if past else None
        if pp.is_first_rank:
            x = self.model.embed_tokens(torch.tensor([tokens]))
        else:
            x = pp.recv_tensor_dict(all_gather_group=self.ctx.tp)["hidden_states"]
        for layer in self.model.layers.values():
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype), mask, cache)
        if not pp.is_last_rank:
            pp.send_tensor_dict({"hidden_states": x}, all_gather_group=self.ctx.tp)
            return None
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits[0]
