"""The planner: its bytes are those that running models send, its times follow the figures, its ranking is sane, and its command says so."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commgraph as cg
from commgraph import cli
from commgraph.demo.config import weights_path
from commgraph.demo.model import ShardedLlama
from commgraph.demo.reference import KVCache, load_checkpoint
from commgraph.errors import ConfigurationError, LayoutError
from commgraph.nn import ExpertParallelMLP
from commgraph.plan import Device, Figures, Links, ModelShapes, Placement, Workload, cost_of, estimate, search, step_calls
from commgraph.plan.memory import parameters_of
from commgraph.plan.search import DEVICES, candidates
from commgraph.plan.strategies import uses_of
from commgraph.testing import spmd

LINKS = Links.usual()
LLAMA = ModelShapes(
    name="llama", hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256
)
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}


def demo_shapes() -> ModelShapes:
    config, _ = load_checkpoint(weights_path("target"))
    return ModelShapes(
        name="demo",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        dtype="float64",
    )


def place(world: cg.World, ranks: tuple[int, ...]) -> Placement:
    return Placement.of([world.nodes[rank] for rank in ranks])


def predicted(world: cg.World, ctx: cg.ParallelContext, shapes: ModelShapes, tokens: int) -> dict[str, int]:
    """Bytes that this rank is to send in a step, by group."""
    axes = {"tp": ctx.tp.world_size, "pp": ctx.pp.world_size, "dp": 1}
    sent = {"tp": 0, "pp": 0}
    for call in step_calls(shapes, axes, tokens, objects=0)[ctx.pp.rank_in_group]:
        group = ctx[call.group]
        # A message between ranks of one host goes through shared memory, whatever the group.
        ranks = (group.rank, group.ranks[group.next_in_group]) if call.operation == "send_tensor_dict" else group.ranks
        cost = cost_of(call.operation, call.nbytes, place(world, ranks), LINKS, itemsize=shapes.itemsize, sliced=call.sliced)
        sent[call.group] += call.count * cost.sent
    return sent


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2), (1, 4)])
def test_the_demo_sends_every_byte_that_is_predicted_and_no_other(nodes: int, tp: int, pp: int) -> None:
    shapes = demo_shapes()
    lengths = (1, 7, 100)

    def rank(world: cg.World) -> list[tuple[dict[str, int], dict[str, int]]]:
        found = []
        with world.context(cg.Layout(4, tp=tp, pp=pp), name="target") as ctx:
            model = ShardedLlama.load(weights_path("target"), ctx=ctx, dtype=torch.float64)
            for tokens in lengths:
                before = {name: ctx[name].bytes_sent for name in ("tp", "pp")}
                model(list(range(tokens)), KVCache())
                world.group.barrier()
                counted = {name: ctx[name].bytes_sent - before[name] for name in ("tp", "pp")}
                found.append((counted, predicted(world, ctx, shapes, tokens)))
        return found

    for pairs in spmd(rank, 4, nodes=nodes):
        for counted, said in pairs:
            # The sizes in the description of a dict take one byte or more over a network.
            described = 8 if nodes > 1 and pp > 1 else 0
            assert counted["tp"] == said["tp"]
            assert abs(counted["pp"] - said["pp"]) <= described, (counted, said)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("dp", [4, 2])
def test_experts_send_every_byte_that_is_predicted(nodes: int, dp: int) -> None:
    hidden, experts, top_k, rows = 64, 8, 2, 10
    shapes = ModelShapes(
        hidden_size=hidden,
        intermediate_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=64,
        dtype="float32",
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=32,
    )

    def rank(world: cg.World) -> tuple[int, int]:
        with world.context(cg.Layout(4, dp=dp, tp=4 // dp), name="main") as ctx, torch.no_grad():
            layer = ExpertParallelMLP(hidden, 32, num_experts=experts, top_k=top_k, ctx=ctx)
            before = ctx.dp.bytes_sent
            layer(torch.randn(rows, hidden), sizes="equal")
            world.group.barrier()
            calls = [call for call in step_calls(shapes, {"tp": 4 // dp, "pp": 1, "dp": dp}, rows)[0] if call.group == "dp"]
            where = place(world, ctx.dp.ranks)
            said = sum(call.count * cost_of(call.operation, call.nbytes, where, LINKS, itemsize=4).sent for call in calls)
            return ctx.dp.bytes_sent - before, said

    for counted, said in spmd(rank, 4, nodes=nodes):
        assert counted == said > 0


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
    st.integers(1, 40_000),
    st.sampled_from([(2,), (3,), (4,), (1, 1), (1, 1, 1), (2, 2)]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_collectives_of_any_size_are_counted_as_predicted(operation: str, numel: int, local: tuple[int, ...], dtype: torch.dtype) -> None:
    n = sum(local)
    numel = max(numel // (32 * n), 1) * 32 * n  # shares end at cache lines; elsewhere they differ by a line from rank to rank

    def rank(world: cg.World) -> tuple[int, int]:
        with world.context(cg.Layout(n, tp=n), name="main") as ctx:
            before = ctx.tp.bytes_sent
            x = torch.ones(numel, dtype=dtype)
            getattr(ctx.tp, operation)(x)
            world.group.barrier()
            said = cost_of(operation, x.nbytes, place(world, ctx.tp.ranks), LINKS, itemsize=x.itemsize)
            return ctx.tp.bytes_sent - before, said.sent

    for counted, said in spmd(rank, n, nodes=len(local)):
        assert counted == said


def test_parameters_are_those_of_the_checkpoint() -> None:
    _, tensors = load_checkpoint(weights_path("target"))
    shapes = demo_shapes()
    held = sum(x.numel() for x in tensors.values())
    assert held in (shapes.parameters, shapes.parameters - shapes.vocab_size * shapes.hidden_size)  # the head may be tied
    for axes in ({"tp": 1, "pp": 1, "dp": 1}, {"tp": 2, "pp": 2, "dp": 1}, {"tp": 4, "pp": 4, "dp": 1}):
        total = axes["tp"] * sum(parameters_of(shapes, axes, stage) for stage in range(axes["pp"]))
        norms = (axes["tp"] - 1) * (2 * shapes.num_layers + 1) * shapes.hidden_size  # on every rank
        assert total == shapes.parameters + norms


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "send_tensor_dict", "broadcast_object"]),
    st.integers(1, 1 << 24),
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.booleans(),
)
def test_costs_are_positive_and_grow_with_the_tensor(operation: str, nbytes: int, local: list[int], device: bool) -> None:
    where = Placement(tuple(local), device)
    small, large = (cost_of(operation, size, where, LINKS, itemsize=4) for size in (nbytes, 4 * nbytes))
    if where.ranks == 1:
        assert (small.seconds, small.sent) == (0, 0)
    else:
        assert 0 < small.seconds <= large.seconds * 1.5  # at a threshold the other algorithm may be the shorter one
        assert 0 <= small.sent <= large.sent


@given(st.sampled_from(["all_reduce", "all_gather", "send_tensor_dict"]), st.integers(1, 1 << 22), st.lists(st.integers(1, 4), min_size=1))
def test_faster_links_never_cost_more(operation: str, nbytes: int, local: list[int]) -> None:
    faster = Links({kind: {n: Figures(one.step / 2, one.byte / 2, one.calls) for n, one in of.items()} for kind, of in LINKS.table.items()})
    where = Placement(tuple(local))
    assert cost_of(operation, nbytes, where, faster).seconds <= cost_of(operation, nbytes, where, LINKS).seconds


def test_tp_inside_hosts_is_ranked_before_tp_across_them() -> None:
    workload = Workload(batch=32, prompt=512, context=1024, decode=True)
    found = search(LLAMA, 16, 2, LINKS, DEVICES["h100"], workload, by="latency")
    order = [one.axes["tp"] for one in found if one.axes["pp"] == 1]
    assert order.index(8) < order.index(16)
    assert next(one for one in found if one.axes["tp"] == 16).strategies["tp"] == "hierarchical"
    assert found[0].axes["tp"] == 8
    assert all(one.latency <= other.latency for one, other in itertools.pairwise(found) if one.fits == other.fits)


def test_layouts_that_do_not_fit_come_last_and_say_so() -> None:
    small = Device("small", 100e12, 1e12, 8e9)
    found = search(LLAMA, 8, 1, LINKS, small, Workload(batch=8, prompt=128, context=1024, decode=True))
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True)
    assert not all(fits)
    assert all("does not fit" in one.reason and "weights" in one.reason for one in found if not one.fits)


def test_every_candidate_multiplies_to_the_world_and_is_unique() -> None:
    shapes = ModelShapes.from_config(MIXTRAL)
    found = candidates(shapes, 96)
    assert all(math.prod(axes.values()) == 96 for axes in found)
    assert len({tuple(axes.items()) for axes in found}) == len(found)
    assert {axes["dp"] for axes in found} > {1, 2}


def test_a_hundred_thousand_ranks_take_seconds() -> None:
    started = time.thread_time()
    workload = Workload(batch=1_000_000, prompt=1024, context=4096, decode=True)
    for shapes in (LLAMA, ModelShapes.from_config(MIXTRAL)):
        assert search(shapes, 100_000, 12_500, LINKS, DEVICES["h200"], workload)
    assert time.thread_time() - started < 5


def test_the_bytes_of_an_estimate_are_those_of_its_calls() -> None:
    workload = Workload(batch=8, prompt=128, context=512, decode=False)
    one = estimate(LLAMA, {"replica": 1, "dp": 1, "pp": 2, "tp": 4}, 1, LINKS, DEVICES["h100"], workload)
    hidden = 4 * 128 * 4096 * 2  # half of the prompts, the other half follows
    assert one.microbatches == 2
    assert one.sent["tp"] == 2 * (33 * hidden)  # embedding, and twice in each of 16 layers
    assert one.period >= one.latency > one.compute > 0


@pytest.mark.parametrize(
    ("text", "kind", "step", "byte", "call"),
    [
        ("shm=1us:8GB/s", "shm", 1e-6, 1 / 8e9, 0.0),
        ("net=5us:50GB/s+4us,shm=200ns:10GB/s", "net", 5e-6, 1 / 50e9, 4e-6),
        ("nvlink=0.002ms:0.4TB/s", "nvlink", 2e-6, 1 / 400e9, 0.0),
    ],
)
def test_links_are_read_as_they_are_written(text: str, kind: str, step: float, byte: float, call: float) -> None:
    figures = Links.read(text).of(kind, 64)
    assert (figures.step, figures.byte, figures.call("all_reduce")) == pytest.approx((step, byte, call))


@pytest.mark.parametrize("text", ["shm=1us", "disk=1us:1GB/s", "shm=1us:0GB/s", "no such file", "shm=fast"])
def test_other_links_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Links.read(text)


def test_figures_survive_a_file(tmp_path: Path) -> None:
    links = Links({"shm": {2: Figures(1e-6, 1e-10, {"all_reduce": 3e-6, "": 1e-6}), 4: Figures(4e-6, 4e-10)}}, "here")
    links.write(tmp_path / "links.json", ["shm"])
    again = Links.read(str(tmp_path / "links.json"))
    assert again.table["shm"] == links.table["shm"]
    assert again.of("shm", 3) in links.table["shm"].values()
    assert again.of("shm", 100) == links.table["shm"][4]
    assert "here" in again.where


def test_figures_are_found_again_from_the_times_that_they_make() -> None:
    from commgraph.bench.fit import figures_from

    truth = Links(
        {kind: {2: Figures(3e-6, 2e-10, {"all_reduce": 5e-6, "all_gather": 9e-6, "send_tensor_dict": 4e-5})} for kind in ("shm", "net")}
    )
    uses = [
        uses_of(operation, nbytes, where, itemsize=4)
        for where in (Placement((2,)), Placement((1, 1)), Placement((2, 2)))
        for operation in ("all_reduce", "all_gather", "send_tensor_dict")
        for nbytes in (256, 4096, 40_000, 200_000, 1_000_000, 8_000_000)
        if where.ranks == 2 or operation != "send_tensor_dict"
    ]
    seconds = [sum(use.seconds(truth) for use in parts) for parts in uses]
    found = figures_from(uses, seconds, "made up")
    for parts, measured in zip(uses, seconds, strict=True):
        assert sum(use.seconds(found) for use in parts) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 8}, "lacks intermediate_size"),
        (MIXTRAL | {"kv_lora_rank": 512}, "kv_lora_rank=512"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "takes 9 of 8 experts"),
        (MIXTRAL | {"torch_dtype": "int4"}, "dtype 'int4'"),
        (MIXTRAL | {"num_key_value_heads": 7}, "cannot share 7"),
    ],
)
def test_what_is_no_such_model_is_refused(config: Mapping[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ModelShapes.from_config(config)


def test_a_model_that_cannot_be_cut_so_says_why() -> None:
    with pytest.raises(LayoutError, match="32 heads cannot be cut by tp=3"):
        step_calls(LLAMA, {"tp": 3, "pp": 1, "dp": 1}, 1)
    with pytest.raises(LayoutError, match="copies of a dense model are replicas"):
        step_calls(LLAMA, {"tp": 1, "pp": 1, "dp": 2}, 1)


def test_the_command_ranks_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    arguments = ["plan", "--model", str(tmp_path), "--world-size", "16", "--nodes", "2", "--links", "net=9us:20GB/s"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "46.70 billion parameters" in out  # as its card says
    assert "decode: " in out
    assert "prefill: " in out
    assert cli.main([*arguments, "--phase", "decode", "--tp", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["decode"]
    assert {row["axes"]["tp"] for row in found["decode"]} == {8}
    row = found["decode"][0]
    assert row["sent_bytes"]["tp"] > 0
    assert row["latency_seconds"] == pytest.approx(row["compute_seconds"] + sum(row["communication_seconds"].values()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--world-size", "16", "--nodes", "3"], "not a multiple of nodes=3"),
        (["--world-size", "16", "--tp", "3"], "cannot be cut"),
        (["--world-size", "0"], "at least 1"),
        (["--world-size", "8", "--device", "abacus"], "known are a100"),
        (["--world-size", "8", "--memory", "many"], "a number with G, T or P"),
        (["--world-size", "8", "--efficiency", "2"], "above 0, up to 1"),
        ([], "--world-size"),
    ],
)
def test_a_bad_option_ends_in_one_line(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MIXTRAL))
    assert cli.main(["plan", "--model", str(file), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("commgraph plan: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_the_fit_of_two_threads_writes_figures_that_the_planner_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "links.json"
    assert cli.main(["bench", "--fit", str(file), "--threads", "--ranks", "2", "--iters", "5"]) == 0
    assert "in the median" in capsys.readouterr().out
    figures = Links.read(str(file)).table["shm"][2]
    assert figures.call("all_reduce") + figures.step > 0
    assert {"all_reduce", "all_gather", "send_tensor_dict"} <= set(figures.calls)


def test_a_small_all_reduce_among_many_hosts_takes_the_bytes_and_steps_of_the_code() -> None:
    def rank(world: cg.World) -> int:
        group = world.group
        group.all_reduce(torch.ones(64))  # makes the links
        before = group.bytes_sent
        group.all_reduce(torch.ones(64))
        return group.bytes_sent - before

    for hosts, steps in ((8, 1), (9, 4)):
        (use,) = uses_of("all_reduce", 256, Placement((1,) * hosts), itemsize=4)
        assert use.steps == steps
        assert spmd(rank, hosts, nodes=hosts) == [use.sent] * hosts
