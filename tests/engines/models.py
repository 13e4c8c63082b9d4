"""Tiny models with random weights in the format of Hugging Face, for engines: run in the engine's environment.

python tests/engines/models.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def main(folder: Path) -> None:
    """Make ``llama`` (12 heads: 2, 3, 4 and 6 ranks divide them), ``moe`` (8 experts) and ``middle`` (24 layers) in a folder."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    trained: Any = ByteLevelBPETokenizer()
    trained.train([str(path) for path in sorted((ROOT / "docs").rglob("*.md"))], vocab_size=1024, special_tokens=["<s>", "</s>"])
    # vLLM pads the words to a multiple of 64, which has to divide by 6 ranks.
    words = {"vocab_size": 1152, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512}
    llama = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 4}
    middle = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 24}
    moe = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**words, **llama)),
        "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**words, **moe, **heads)),
        "middle": lambda: LlamaForCausalLM(LlamaConfig(**words, **middle)),
    }
    for name, make in models.items():
        model = make()
        for weight in model.parameters():
            weight.data.normal_(std=0.08) if weight.dim() > 1 else weight.data.fill_(1)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
