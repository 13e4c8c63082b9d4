"""`commgraph generate` writes on several ranks what one writes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import commgraph as cg
from commgraph import generate
from commgraph.testing import spmd
from tests.helpers import ROOT
from tests.processes import environment

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.shrink import configuration_classes, small_model

PROMPT = ("w5 w6 w7", "--tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    model = small_model(configuration_classes(only="LlamaConfig")["LlamaConfig"], overrides={"num_hidden_layers": 2, "eos_token_id": None})
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return str(folder)


def written(ranks: int, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[str]]:
    """Run the command on ranks that are threads: its text, and the groups that sent bytes."""
    given = generate._parse([*PROMPT, *words])
    capsys.readouterr()
    assert spmd(lambda world: generate._run(world, given), ranks, timeout=100) == [0] * ranks
    text, _, speed, sent = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"8 tokens in [\d.]+ s: [\d.]+ tokens/s; loaded in [\d.]+ s", speed)
    return text, re.findall(r"(\S+) [\d,]+", sent.removeprefix("bytes sent, over all ranks: "))


def test_one_text_however_it_is_cut(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, groups = written(1, capsys, "--model", folder)
    assert len(text.split()) == 8
    assert groups == []
    draft = ("--draft", folder, "--draft-tp")
    for how, senders in (
        (("--tp", "2"), ["target.tp"]),
        (("--pp", "2"), ["target.pp"]),
        (("--tp", "2", *draft, "2"), ["draft.tp", "target.tp"]),
        (("--pp", "2", *draft, "1"), ["target.pp"]),
    ):
        found, groups = written(2, capsys, "--model", folder, *how)
        assert found == text, how
        assert [re.sub(r"world/|/.*", "", group) for group in groups] == senders, how


def test_a_count_that_cannot_share_the_heads_is_refused(folder: str) -> None:
    given = generate._parse([*PROMPT, "--model", folder, "--tp", "3"])
    with pytest.raises(cg.ConfigurationError, match="4 query heads and 2 key-value heads cannot be shared by 3 ranks"):
        spmd(lambda world: generate._run(world, given), 3, timeout=100)


@pytest.mark.models
@pytest.mark.timeout(1500)
def test_the_command_starts_its_processes(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = written(1, capsys, "--model", folder)
    command = [sys.executable, "-m", "commgraph", "generate", *PROMPT, "--model", folder, "--tp"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=700, cwd=ROOT, env=environment(), check=False)

    done = run("2", "--draft", folder, "--draft-tp", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == text
    wrong = run("3")
    assert wrong.returncode == 2
    assert "4 query heads and 2 key-value heads cannot be shared by 3 ranks" in wrong.stderr.splitlines()[-1]
