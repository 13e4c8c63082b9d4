"""Models of transformers in processes that have no default group: compared, compiled, and loaded by their parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.processes import PROGRAMS, Processes

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.shrink import configuration_classes, small_model

pytestmark = [pytest.mark.models, pytest.mark.timeout(1500)]  # seconds; on a busy machine an import of transformers takes half a minute


def launched(program: str, ranks: int, *arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(ROOT / "tests/programs" / program), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_seven_cut_models_are_the_whole_ones() -> None:
    launched("cut_models.py", 4, "plain")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_three_compiled_ones_too(backend: str) -> None:
    launched("cut_models.py", 2, "compiled", backend)


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


@pytest.mark.parametrize(("sizes", "drafts"), [({"tp": 2}, False), ({"pp": 2}, False), ({"tp": 2}, True)])
def test_ranks_draw_alike(sizes: dict[str, int], drafts: bool, tmp_path: Path, processes: Processes) -> None:
    """Each rank has a seed of its own before; the first one's decides, and the tokens are those of the whole model with that seed."""
    import torch

    model = small_model(configuration_classes(only="LlamaConfig")["LlamaConfig"], overrides={"eos_token_id": None})
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.manual_seed(0)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=16, pad_token_id=0)[0].tolist()
    said = processes.launch(2, PROGRAMS / "sampled.py", tmp_path, json.dumps(sizes), str(int(drafts)), timeout=700)
    first, second = map(json.loads, said)
    assert first == second
    assert len(first) == 20
    if not drafts:  # which draws of its own
        assert first == expected
