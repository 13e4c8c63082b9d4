"""The shape of the demo's language models, and where their weights lie.

The models read and write bytes: a token id is a byte, so there is no tokenizer to ship. Parameter names are those of Hugging Face's Llama,
and a weight file carries its own configuration in the metadata of the safetensors header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

import attrs

__all__ = ["DEFAULT_PROMPT", "WEIGHTS", "LlamaConfig", "decode", "encode", "weights_path"]

WEIGHTS: Final = Path(__file__).parent / "weights"
"""Where the weights lie in a checkout and in the source distribution; a wheel has none."""


DEFAULT_PROMPT: Final = "When a function is called,"


@attrs.frozen(kw_only=True)
class LlamaConfig:
    """Sizes of a Llama: ``num_heads`` query heads share ``num_kv_heads`` key-value heads, in ``num_layers`` layers."""

    vocab_size: int = 256
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 512

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file, whose values must be strings."""
        return {"format": "pt", "config": json.dumps(attrs.asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """The inverse of :meth:`to_metadata`."""
        return cls(**json.loads(metadata["config"]))


def weights_path(name: Literal["target", "draft"], folder: Path = WEIGHTS) -> Path:
    """The weight file of the target or the draft."""
    return folder / f"{name}.safetensors"


def encode(text: str) -> list[int]:
    """Token ids of ``text``: its UTF-8 bytes."""
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    """Text of ``tokens``; bytes that are no UTF-8 show as the replacement character."""
    return bytes(tokens).decode(errors="replace")
