"""`commgraph generate` writes on several processes what one writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.shrink import configuration_classes, small_model


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "commgraph", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, check=False)


@pytest.mark.models
@pytest.mark.timeout(300)
def test_text_on_two_processes_with_a_draft(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(99)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    model = small_model(configuration_classes(only="LlamaConfig")["LlamaConfig"], overrides={"num_hidden_layers": 2, "eos_token_id": None})
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path)
    folder = str(tmp_path)
    alone = generate("w5 w6 w7", "--model", folder, "--tokens", "8")
    assert alone.returncode == 0, alone.stderr
    text = alone.stdout.splitlines()[0]
    assert len(text.split()) == 8
    for how in (("--tp", "2"), ("--pp", "2"), ("--tp", "2", "--draft", folder, "--draft-tp", "2")):
        done = generate("w5 w6 w7", "--model", folder, "--tokens", "8", *how)
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        assert said[0] == text
        assert "tokens/s" in done.stdout
        assert "target." in said[-1]
    wrong = generate("w5", "--model", folder, "--tp", "3")
    assert wrong.returncode == 2
    assert "4 query heads and 2 key-value heads cannot be shared by 3 ranks" in wrong.stderr
