"""Models of transformers in processes that have no default group: compared, compiled, and loaded by their parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytest.importorskip("transformers", reason="the extra `transformers`")

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]


def launched(program: str, ranks: int, *arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(ROOT / "tests/programs" / program), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["plain", "compiled"])
def test_cut_models_are_the_whole_ones(how: str) -> None:
    launched("cut_models.py", 4, how)


def test_a_rank_reads_and_holds_its_quarter(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=7, num_attention_heads=16, num_key_value_heads=16
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    assert 550 < sum(parameter.nbytes for parameter in model.parameters()) / 2**20 < 650
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path)
    del model
    said = re.findall(r"rank (\d) asked ([\d.]+) peak ([\d.]+)", launched("load_part.py", 4, str(tmp_path)))
    assert sorted(rank for rank, *_ in said) == ["0", "1", "2", "3"]
    for _, asked, peak in said:
        assert float(asked) <= 0.26
        assert float(peak) <= 0.28
