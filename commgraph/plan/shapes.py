"""`ModelShapes`: the sizes of a decoder that decide what it communicates, computes and stores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import attrs

from commgraph.errors import ConfigurationError

__all__ = ["DTYPE_BYTES", "ModelShapes"]

DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}
)

# Names under which Hugging Face's configurations give the number of experts, and the width of one.
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_WIDTH: Final = ("moe_intermediate_size", "intermediate_size")
_NEEDED: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Settings of architectures whose layers communicate or store something else; a plan for them would be wrong.
_OTHER: Final = ("kv_lora_rank", "ssm_cfg", "state_size")


def _size(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value < (0 if attribute.name in ("num_experts", "shared_intermediate_size", "dense_layers") else 1):
        raise ConfigurationError(f"{attribute.name}={value}: a model has at least one")


@attrs.frozen(kw_only=True)
class ModelShapes:
    """A decoder of the Llama type, dense or with experts: attention with grouped heads, and a gated MLP or experts in each layer.

    Attributes:
        name: what it is called in tables.
        hidden_size: width of a token's activations.
        intermediate_size: width of a dense MLP.
        num_layers: decoder layers.
        num_heads, num_kv_heads: query heads, and the key-value heads that they share.
        head_dim: width of a head.
        vocab_size: tokens.
        dtype: of weights and activations.
        num_experts: experts of a layer; 0: the MLP is dense.
        top_k: experts of a token.
        expert_intermediate_size: width of one expert.
        shared_intermediate_size: width of the expert that every token takes; 0: there is none.
        dense_layers: layers, the first ones, whose MLP is dense all the same.
        tied: whether embedding and head are one matrix.
    """

    name: str = "model"
    hidden_size: int = attrs.field(validator=_size)
    intermediate_size: int = attrs.field(validator=_size)
    num_layers: int = attrs.field(validator=_size)
    num_heads: int = attrs.field(validator=_size)
    num_kv_heads: int = attrs.field(validator=_size)
    head_dim: int = attrs.field(validator=_size)
    vocab_size: int = attrs.field(validator=_size)
    dtype: str = "bfloat16"
    num_experts: int = attrs.field(default=0, validator=_size)
    top_k: int = 1
    expert_intermediate_size: int = 0
    shared_intermediate_size: int = attrs.field(default=0, validator=_size)
    dense_layers: int = attrs.field(default=0, validator=_size)
    tied: bool = False

    def __attrs_post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigurationError(f"dtype {self.dtype!r}: known are {', '.join(DTYPE_BYTES)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigurationError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ConfigurationError(f"each token takes {self.top_k} of {self.num_experts} experts")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a Hugging Face ``config.json``, or the one in a folder.

        Raises:
            ConfigurationError: there is none, it lacks sizes, or the architecture communicates otherwise.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigurationError(f"{file} is no config.json of a model: {error}") from None
        if not isinstance(config, dict):
            raise ConfigurationError(f"{file} is no config.json of a model: it holds a {type(config).__name__}")
        return cls.from_config(config, file.parent.name if file.name == "config.json" else file.stem)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "model") -> Self:
        """Take the sizes from a Hugging Face configuration of the Llama, Mistral, Qwen, Mixtral or OLMoE type.

        Raises:
            ConfigurationError: sizes are missing, or the architecture communicates otherwise.
        """
        config = config.get("text_config") or config
        if other := [key for key in _OTHER if config.get(key)]:
            raise ConfigurationError(f"{name} has {other[0]}={config[other[0]]}: plan knows attention with key-value heads, and no other")
        if missing := [key for key in _NEEDED if not isinstance(config.get(key), int)]:
            raise ConfigurationError(f"the configuration of {name} lacks {', '.join(missing)}")
        experts = next((int(config[key]) for key in _EXPERTS if config.get(key)), 0)
        width = next((int(config[key]) for key in _EXPERT_WIDTH if config.get(key)), 0) if experts else 0
        shared = int(config.get("shared_expert_intermediate_size") or 0) or int(config.get("n_shared_experts") or 0) * width
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            name=name,
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            dtype=dtype,
            num_experts=experts,
            top_k=int(config.get("num_experts_per_tok") or 1),
            expert_intermediate_size=width,
            shared_intermediate_size=shared if experts else 0,
            dense_layers=int(config.get("first_k_dense_replace") or 0) if experts else 0,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return max(self.num_layers - self.dense_layers, 0) if self.num_experts else 0

    @property
    def attention_parameters(self) -> int:
        """Elements of the four projections of one layer's attention."""
        return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Elements of one expert."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        dense = self.num_layers - self.expert_layers
        per_layer = self.attention_parameters + 2 * self.hidden_size
        moe = self.num_experts * self.expert_parameters + self.hidden_size * (self.num_experts + 3 * self.shared_intermediate_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return embeddings + self.num_layers * per_layer + dense * mlp + self.expert_layers * moe + self.hidden_size
