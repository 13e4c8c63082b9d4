"""Cut models are filled from files of which each rank reads its part alone."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.integrations.transformers import check_replicated, from_checkpoint, parallelize
from commgraph.integrations.transformers.lazy import Joined, Part, Stacked, Transposed
from commgraph.testing import spmd

pytest.importorskip("transformers", reason="the extra `transformers`")

from tests.integrations.models.examine import objective, output_of, prompt, relative, tokens_of
from tests.integrations.models.shrink import configuration_classes, small_model


class Memory:
    """A tensor as a file gives it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self.tensor[index]
        self.read += found.numel()
        return found


def test_tensors_made_of_others_are_read_by_parts() -> None:
    parts = [torch.arange(24.0).reshape(4, 6) + 100 * number for number in range(3)]
    sources = [Memory(part) for part in parts]
    stacked, joined = Stacked(tuple(sources), 0), Joined(tuple(sources), 1)
    for made, whole in (
        (stacked, torch.stack(parts)),
        (joined, torch.cat(parts, 1)),
        (Part(joined, 1, 4, 11), torch.cat(parts, 1)[:, 4:11]),
        (Transposed(stacked, (1, 2)), torch.stack(parts).transpose(1, 2)),
        (Joined((Stacked(tuple(sources), 0), Stacked(tuple(sources), 0)), 1), torch.cat([torch.stack(parts)] * 2, 1)),
    ):
        assert made.get_shape() == list(whole.shape)
        assert torch.equal(made[...], whole)
        for index in ((slice(1, 3), slice(2, 5)), (slice(0, 2),), (slice(None), slice(3, 4)), (slice(2, 3), slice(0, 7))):
            assert torch.equal(made[index], whole[index])
    for source in sources:
        source.read = 0
    _ = stacked[1:2, :2]
    assert [source.read for source in sources] == [0, 12, 0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements that were asked of files."""
    import safetensors
    import safetensors.torch

    counted: list[int] = []
    opened: Any = safetensors.safe_open

    class Counted:
        def __init__(self, path: Any, **arguments: Any) -> None:
            self.file: Any = opened(path, **arguments)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return CountedSlice(self.file.get_slice(name))

    class CountedSlice:
        def __init__(self, part: Any) -> None:
            self.part = part

        def get_shape(self) -> Any:
            return self.part.get_shape()

        def __getitem__(self, index: Any) -> Any:
            found = self.part[index]
            counted.append(found.numel())
            return found

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    return counted


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LlamaConfig", {"tp": 2}),
        ("MixtralConfig", {"tp": 2}),  # an expert a tensor in the files
        pytest.param("Qwen3MoeConfig", {"tp": 2, "experts": "ep"}, marks=pytest.mark.models),
        pytest.param("GPTNeoXConfig", {"tp": 2}, marks=pytest.mark.models),
        ("Gemma2Config", {"pp": 2}),  # tied over the stages
    ],
)
def test_a_rank_reads_what_it_holds(name: str, arguments: dict[str, Any], tmp_path: Path, asked: list[int]) -> None:
    kind = configuration_classes(only=name)[name]
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    expected, tokens = output_of(model, prompt()).detach(), tokens_of(model, prompt())
    given = {key: value for key, value in arguments.items() if key == "experts"}
    layout = cg.Layout(2, **{key: value for key, value in arguments.items() if key != "experts"})

    def run(world: cg.World) -> None:
        own: Any = None
        with world.context(layout, name="a") as ctx:
            for rank in range(2):  # one after the other: what is read is counted, and default dtypes are the process's
                world.group.barrier()
                if rank == world.rank:
                    asked.clear()
                    own = from_checkpoint(type(model), tmp_path, ctx, **given)
                    held = sum(tensor.numel() for tensor in {id(one): one for one in own.state_dict(keep_vars=True).values()}.values())
                    assert held - 2 * 64 <= sum(asked) <= held  # an odd vocabulary is padded by a row of embedding and head
            world.group.barrier()
            with torch.no_grad():
                found = output_of(own, prompt())
                assert tokens is None or torch.equal(tokens_of(own, prompt()), tokens)
            assert relative(found, expected) < 1e-4
            whole = dict(model.named_buffers())
            assert all(buffer.dtype == whole[name].dtype for name, buffer in own.named_buffers() if "layers" not in name)

    spmd(run, 2)


def test_a_checkpoint_that_lacks_something(tmp_path: Path) -> None:
    import safetensors.torch

    model = small_model(configuration_classes(only="LlamaConfig")["LlamaConfig"], overrides={"num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(1), name="a") as ctx:
            with pytest.raises(cg.ConfigurationError, match=r"lacks tensors of .*: model.norm.weight"):
                from_checkpoint(model.config, tmp_path, ctx)
            file.unlink()
            with pytest.raises(cg.ConfigurationError, match=r"has neither model\.safetensors nor"):
                from_checkpoint(type(model), tmp_path, ctx)

    spmd(run, 1)


def test_a_plan_that_lacks_a_rule_is_found_by_its_gradients() -> None:
    model = small_model(configuration_classes(only="Qwen3Config")["Qwen3Config"], overrides={"num_hidden_layers": 1})
    plan = {f"model.{name}": style for name, style in model.config.base_model_tp_plan.items()}
    less = {name: style for name, style in plan.items() if not name.endswith("q_norm")}

    def run(world: cg.World) -> None:
        with world.context(cg.Layout(2, tp=2), name="a") as ctx:
            for rules, message in ((plan, ""), (less, r"model.layers.0.self_attn.q_norm.weight by")):
                own = parallelize(copy.deepcopy(model), ctx, plan=rules)
                objective(output_of(own, prompt())).backward()
                if message:
                    with pytest.raises(cg.ConfigurationError, match=message):
                        check_replicated(own)
                else:
                    check_replicated(own)

    spmd(run, 2)


def test_parameters_stay_in_the_file_until_they_are_written(tmp_path: Path) -> None:
    """What lies there in one piece, as this rank holds it; and a change is no change of the file."""
    model = small_model(configuration_classes(only="LlamaConfig")["LlamaConfig"], overrides={"num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    turns = threading.Lock()

    def run(world: cg.World) -> list[str]:
        ctx = world.context(cg.Layout(2, tp=2), name="a")
        with turns:  # default dtypes are the process's
            loaded = from_checkpoint(type(model), tmp_path, ctx)
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
        spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
        mapped = [name for name, p in loaded.named_parameters() if any(start <= p.data_ptr() < end for start, end in spans)]
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(1)
        return mapped

    for mapped in spmd(run, 2):
        assert any("q_proj" in name for name in mapped), mapped
        assert not any("o_proj" in name for name in mapped), "a part of each row is no single piece"
    assert (tmp_path / "model.safetensors").read_bytes() == before
