"""Small models of transformers' architectures: a configuration class with every size made small, and a model with drawn weights."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

VOCABULARY = 99
LAYERS = 4
HEADS, KEY_VALUE_HEADS, HEAD = 4, 2, 16

# The first pattern that a name of an entry matches in full gives its value.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(?:text_)?vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|n_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|num_encoder_layers|decoder_layers|encoder_layers", LAYERS),
    (
        r"num_key_value_heads|n_kv_heads|num_kv_heads|num_attention_groups|swa_num_key_value_heads|num_global_key_value_heads",
        KEY_VALUE_HEADS,
    ),
    (r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads|swa_num_attention_heads", HEADS),
    (r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|attention_hidden_size|lru_width|hidden_dim", HEADS * HEAD),
    (r"intermediate_size_mlp|prefix_dense_intermediate_size|dense_intermediate_size|ffn_hidden_size|n_inner|ffn_dim|d_ff", 96),
    (r"(?:moe_|shared_expert_|shared_|moe_shared_expert_|expert_|shared_intermediate_)?intermediate_size|shared_intermediate_size", 96),
    (r"moe_latent_size|moe_ffn_hidden_size|expert_ffn_hidden_size", 32),
    (r"head_dim|global_head_dim|swa_head_dim|attention_head_dim|qk_nope_head_dim|v_head_dim|swa_v_head_dim|qk_head_dim_unused", HEAD),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank_.*|rwkv_.*_rank", 32),
    (r"index_n_heads|index_heads|index_num_heads", 4),
    (r"index_head_dim", HEAD),
    (r"index_topk", 64),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|num_local_routed_experts", 4),
    (
        r"num_experts_per_tok|num_experts_per_token|moe_top_?k|top_k_experts|experts_per_token|num_selected_experts|moe_k|top_k|num_experts_per_topk",
        2,
    ),
    (r"n_group|topk_group|num_expert_groups|num_expert_group|moe_n_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|n_dense_layers", 1),
    (r"linear_num_key_heads|linear_num_value_heads|linear_num_heads", 4),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", HEAD),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_state|ssm_state_size|mamba_d_ssm_state", 8),
    (r"mamba_d_ssm", 128),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_dt_rank", 8),
    (r"mamba_chunk_size|chunk_size|attention_chunk_size", 16),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|original_max_position_embeddings", 256),
    (r"sliding_window|attention_window_size|local_attention|window_size", 8),
    (r"rotary_dim", 8),
    (r"hidden_size_per_layer_input|laurel_rank|per_layer_dim", 16),
    (r"num_kv_shared_layers", 0),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_layers", 0),
    (r"audio_embed_dim|condition_dim", 32),
)


FILLED = frozenset({"head_dim", "num_key_value_heads", "num_experts_per_tok", "num_attention_heads"})
"""Entries whose default is none, and which some models read all the same."""


def shrunk(name: str, value: Any) -> Any:
    """The value of an entry in a small configuration; the value itself where it may stay."""
    if isinstance(value, bool):
        return value
    if value is None and name in FILLED:
        value = 1
    if re.fullmatch(r".*token_id|.*token_index|.*_id", name) and not isinstance(value, str):
        if isinstance(value, list):
            return [2]
        return (
            value if value is None or (isinstance(value, int) and 0 <= value < 3) else (0 if "pad" in name else 1 if "bos" in name else 2)
        )
    if isinstance(value, int):
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return size if value else value
    return value


# What the sizes by name do not make right, by configuration class.
LATENT = MappingProxyType({"num_key_value_heads": HEADS, "num_attention_heads": HEADS})  # multi-head latent attention has no groups
ROPE = MappingProxyType({"rope_parameters": MappingProxyType({"rope_type": "default", "rope_theta": 10000.0})})
SECTIONS = MappingProxyType(
    {"rope_parameters": MappingProxyType({"rope_type": "default", "rope_theta": 10000.0, "mrope_section": (2, 3, 3)})}
)
HALF_SECTIONS = MappingProxyType(
    {
        "rope_parameters": MappingProxyType(
            {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": (2, 1, 1), "partial_rotary_factor": 0.5}
        )
    }
)
OVERRIDES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *(
                    "AXK1Config",
                    "AXK2Config",
                    "BailingHybridConfig",
                    "DeepseekV2Config",
                    "DeepseekV3Config",
                    "DeepseekV32Config",
                    "YoutuConfig",
                ),
                *("Glm4MoeLiteConfig", "GlmMoeDsaConfig", "KimiLinearConfig", "LongcatFlashConfig", "MiniCPM3Config", "Mistral4Config"),
                *("MistralLarge4TextConfig", "UnlimitedOcrTextConfig", "EsmcConfig", "Glm5NextTextConfig", "DeepseekOcr2TextConfig"),
            ),
            LATENT,
        ),
        **dict.fromkeys(("HunYuanDenseV1Config", "HunYuanMoEV1Config", "HunYuanVLTextConfig", "MinistralConfig", "Lfm2MoeConfig"), ROPE),
        **dict.fromkeys(("Qwen2VLTextConfig", "Qwen2_5_VLTextConfig", "Qwen2_5OmniTextConfig", "PaddleOCRTextConfig"), SECTIONS),
        **dict.fromkeys(("GlmOcrTextConfig", "GlmImageTextConfig", "Glm4vTextConfig"), SECTIONS),
        "Glm4vMoeTextConfig": HALF_SECTIONS,
        "BambaConfig": MappingProxyType({"attn_layer_indices": (1, 2)}),
        "JambaConfig": MappingProxyType(
            {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        ),
        "GraniteMoeHybridConfig": MappingProxyType({"layer_types": ("mamba", "attention", "mamba", "attention")}),
        "NemotronConfig": MappingProxyType({"head_dim": HEAD}),
        "Step3p7TextConfig": MappingProxyType({"sliding_window": 8}),
        "Qwen3OmniMoeTalkerTextConfig": MappingProxyType({"shared_expert_intermediate_size": 96}),
        "Ernie4_5_VLMoeTextConfig": MappingProxyType({"moe_num_experts": 4, "moe_intermediate_size": (96, 96)}),
        "T5Gemma2TextConfig": MappingProxyType({"dropout_rate": 0.0}),
        "T5Gemma2DecoderConfig": MappingProxyType({"dropout_rate": 0.0}),
        "Dots1Config": MappingProxyType({"n_routed_experts": 4, "moe_intermediate_size": 96, "n_shared_experts": 1}),
        "Qwen3OmniMoeTalkerCodePredictorConfig": MappingProxyType({"layer_types": ("full_attention",) * LAYERS}),
    }
)


def plain(value: Any) -> Any:
    """Lists and dicts of what was frozen."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def rotary(value: Any, rotated: int) -> Any:
    """Parameters of a rotary embedding whose sections have `rotated` pairs of features in all."""
    if not isinstance(value, Mapping):
        return value
    new = {key: rotary(item, rotated) for key, item in value.items()}
    if isinstance(new.get("mrope_section"), list | tuple):
        first = rotated // 4
        new["mrope_section"] = [rotated - 2 * ((rotated - first) // 2), (rotated - first) // 2, (rotated - first) // 2]
    return new


def picked(kinds: list[Any], count: int) -> list[Any]:
    """As many entries as layers, every kind among them, in the first and the second half where that can be."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[place % len(distinct)] for place in range(count)] if len(distinct) > 1 else kinds[:1] * count


def configuration(kind: type, overrides: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A small configuration of a class, and of the classes within it."""
    default = kind()
    total = next(
        (
            getattr(default, name)
            for name in ("num_hidden_layers", "n_layer", "num_layers")
            if isinstance(getattr(default, name, None), int)
        ),
        None,
    )
    values: dict[str, Any] = {}
    accepted = set(inspect.signature(kind).parameters) | set(getattr(kind, "__dataclass_fields__", ()))
    for name in accepted - {"self", "kwargs", "args"}:
        try:
            value = getattr(default, name)
        except Exception:  # AmbiguousGlobalPerLayerAttributeError, which derives from nothing narrower, and AttributeError
            continue  # it has none, or one for each layer
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            pairs = 4 if hasattr(default, "qk_rope_head_dim") else int(HEAD // 2 * value.get("partial_rotary_factor", 1))
            value = rotary(value, pairs)
            if value != getattr(default, name):
                values[name] = value
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            values[name] = configuration(type(value)).to_dict()
            continue
        new = shrunk(name, value)
        if isinstance(value, list | tuple) and total and len(value) == total and len(value) > 3:
            new = picked(list(value), overrides.get("num_hidden_layers", LAYERS))
        if new != value:
            values[name] = new
    return kind(**(values | plain(OVERRIDES.get(kind.__name__, {})) | plain(overrides)))


def configuration_classes(plan: str = "base_model_tp_plan", *, only: str = "") -> dict[str, type]:
    """Every configuration class of transformers with a plan, by its name; `only`: one, without a look at the others."""
    import transformers.models as models
    from transformers import PreTrainedConfig

    if only:
        import transformers

        return {only: getattr(transformers, only)}
    found: dict[str, type] = {}
    for folder in sorted(info.name for info in pkgutil.iter_modules(models.__path__)):
        try:
            module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        except ImportError:
            continue  # a folder without configuration
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, PreTrainedConfig)
            and value.__module__ == module.__name__
            and getattr(value, plan, None)
        }
    return found


def model_class(kind: type) -> type:
    """The class of a model for a configuration: one that generates from text alone, else the first without a head."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    folder = kind.__module__.rsplit(".configuration_", 1)
    try:
        modeling = importlib.import_module(f"{folder[0]}.modeling_{folder[1]}")
    except ModuleNotFoundError:  # it is another architecture's
        found = AutoModelForCausalLM._model_mapping.get(kind, None)
        if found is None:
            raise LookupError(f"transformers has no model for {kind.__name__}") from None
        first: type = found[0] if isinstance(found, tuple) else found
        return first
    candidates = [
        value
        for value in vars(modeling).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == modeling.__name__
        and getattr(value, "config_class", None) is kind
        and not value.__name__.endswith("PreTrainedModel")
    ]
    for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "TextModel", "Model", ""):
        for candidate in candidates:
            if candidate.__name__.endswith(end):
                return candidate
    raise LookupError(f"no model for {kind.__name__} in {modeling.__name__}")


def small_model(kind: type, *, seed: int = 0, overrides: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A small model of a configuration class, in float32, every parameter drawn. Not on several threads: it sets default dtypes."""
    torch.manual_seed(seed)
    config = configuration(kind, overrides)
    config._attn_implementation = "eager"
    model = model_class(kind)(config).float().eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
