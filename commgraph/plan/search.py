"""What a step takes on a layout, and which layouts take the least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import attrs

from commgraph.errors import ConfigurationError
from commgraph.layout import Hosts, Layout, crossing
from commgraph.plan.links import Links
from commgraph.plan.memory import memory_of
from commgraph.plan.shapes import ModelShapes
from commgraph.plan.step import StepCall, check_cut, layers_of_stages, step_calls
from commgraph.plan.strategies import Placement, cost_of

__all__ = ["DEVICES", "Device", "Estimate", "Workload", "candidates", "estimate", "search"]

_GB: Final = 1e9


@attrs.frozen
class Device:
    """What one rank computes with.

    Attributes:
        name: for people.
        flops: floating-point operations in a second, by the data sheet.
        bandwidth: bytes of its memory in a second, by the data sheet.
        memory: bytes.
        efficiency: part of the first two that is reached.
        accelerator: whether ranks of a host communicate over nvlink rather than shared memory.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    efficiency: float = 0.7
    accelerator: bool = True


# Dense 16-bit peak, memory bandwidth and memory of the data sheets; "host" is a server's socket.
DEVICES: Final[Mapping[str, Device]] = MappingProxyType(
    {
        "a100": Device("a100", 312e12, 2.0e12, 80 * _GB),
        "h100": Device("h100", 989e12, 3.35e12, 80 * _GB),
        "h200": Device("h200", 989e12, 4.8e12, 141 * _GB),
        "b200": Device("b200", 2250e12, 8.0e12, 180 * _GB),
        "mi300x": Device("mi300x", 1307e12, 5.3e12, 192 * _GB),
        "host": Device("host", 3e12, 200e9, 256 * _GB, accelerator=False),
    }
)


@attrs.frozen(kw_only=True)
class Workload:
    """What the job does.

    Attributes:
        batch: sequences, over all replicas and dp ranks together.
        prompt: tokens of a sequence that a prefill step computes.
        context: tokens of a sequence whose keys and values a decode step reads.
        decode: a step computes the next token of each sequence; False: all tokens of each prompt.
    """

    batch: int
    prompt: int
    context: int
    decode: bool

    @property
    def tokens(self) -> int:
        """New tokens of a sequence in a step."""
        return 1 if self.decode else self.prompt

    @property
    def seen(self) -> int:
        """Tokens that a new one attends to, at most."""
        return self.context if self.decode else self.prompt


@attrs.frozen
class Estimate:
    """A layout and what one step takes on it.

    Attributes:
        axes: sizes of replica, dp, pp and tp.
        nodes: hosts.
        microbatches: parts of an engine's batch that follow each other through the pipeline.
        latency: seconds from the first stage's begin to the last one's end, for one part.
        period: seconds of a step of the whole batch.
        compute: seconds of `latency` in which ranks compute or read weights.
        communication: seconds of `latency` by group.
        sent: bytes that a rank sends in a step, by group; of the stage that sends most.
        strategies: strategy that serves the collectives of each group.
        memory: bytes that a rank holds, by what they are.
        rate: tokens in a second, of all engines.
        fits: whether the memory suffices.
        calls: of each stage, for one part.
    """

    axes: Mapping[str, int]
    nodes: int
    microbatches: int
    latency: float
    period: float
    compute: float
    communication: Mapping[str, float]
    sent: Mapping[str, int]
    strategies: Mapping[str, str]
    memory: Mapping[str, float]
    rate: float
    fits: bool
    calls: tuple[tuple[StepCall, ...], ...]

    @property
    def share(self) -> float:
        """Part of the latency that is communication."""
        return sum(self.communication.values()) / self.latency if self.latency else 0.0

    @property
    def total_memory(self) -> float:
        """Bytes that a rank holds."""
        return sum(self.memory.values())

    @property
    def reason(self) -> str:
        """What the time of a step is spent on, or why the layout cannot be used."""
        if not self.fits:
            return (
                f"does not fit: {self.total_memory / _GB:.0f} GB for each rank, most for {max(self.memory, key=lambda k: self.memory[k])}"
            )
        parts = [f"compute {self.compute / self.latency:.0%}"] if self.latency else []
        for group, seconds in sorted(self.communication.items(), key=lambda item: -item[1]):
            if seconds >= 0.005 * self.latency:
                parts.append(f"{group} {seconds / self.latency:.0%} ({self.strategies[group]})")
        if self.microbatches < self.axes["pp"]:
            parts.append(f"{self.microbatches} of {self.axes['pp']} stages busy at a time")
        return ", ".join(parts)


def hosts_of_groups(axes: Mapping[str, int], nodes: int) -> dict[str, list[int]]:
    """The host of each rank of the groups of a layout; of each name those of the group that lies worst.

    Raises:
        LayoutError: sizes that do not factor, or ranks that cannot be divided among so many hosts.
    """
    world = math.prod(axes.values())
    layout = Layout(world, dp=axes["dp"], pp=axes["pp"], tp=axes["tp"], groups={"engine": ("pp", "tp")})
    hosts = Hosts.of(world, nodes)
    found = {}
    for name in ("tp", "pp", "dp", "engine"):
        pattern = layout.pattern(name)
        first = crossing(pattern, hosts).first
        found[name] = [hosts.of_rank(rank) for rank in pattern.ranks(first or 0)]
    return found


def estimate(shapes: ModelShapes, axes: Mapping[str, int], nodes: int, links: Links, device: Device, workload: Workload) -> Estimate:
    """Compute what a step takes on one layout.

    Args:
        shapes: of the model.
        axes: sizes of replica, dp, pp and tp; they multiply to the world size.
        nodes: hosts.
        links: figures.
        device: what a rank computes with.
        workload: what a step does.

    Raises:
        LayoutError: the model cannot be cut so, or the ranks cannot be divided among so many hosts.
    """
    pp = axes["pp"]
    engines = axes["replica"] * axes["dp"]
    sequences = math.ceil(workload.batch / engines)
    parts = min(pp, sequences)
    part = math.ceil(sequences / parts)
    tokens = part * workload.tokens
    calls = step_calls(shapes, axes, tokens, logits=part, object_bytes=8 * part)
    lying = hosts_of_groups(axes, nodes)
    where = {name: Placement.of(hosts, device=device.accelerator) for name, hosts in lying.items()}
    # A message between ranks of one host goes through shared memory, whatever the group.
    hops = [Placement.of(pair, device=device.accelerator) for pair in itertools.pairwise(lying["pp"])]
    communication: dict[str, float] = {}
    sent: dict[str, int] = {}
    computing, stages = 0.0, []
    for stage, of_stage in enumerate(calls):
        seconds = 0.0
        mine: dict[str, int] = {}
        for call in of_stage:
            placement = hops[stage] if call.operation == "send_tensor_dict" else where[call.group]
            cost = cost_of(call.operation, call.nbytes, placement, links, itemsize=shapes.itemsize, sliced=call.sliced)
            mine[call.group] = mine.get(call.group, 0) + call.count * cost.sent * parts
            if call.operation == "broadcast_object" and stage < pp - 1:
                continue  # once for all stages
            seconds += call.count * cost.seconds
            communication[call.group] = communication.get(call.group, 0.0) + call.count * cost.seconds
        sent = {group: max(sent.get(group, 0), mine.get(group, 0)) for group in {**sent, **mine}}
        busy = _compute(shapes, axes, stage, tokens, part, device, workload)
        computing += busy
        stages.append(seconds + busy)
    latency = sum(stages)
    period = max(latency, parts * max(stages))
    memory = memory_of(shapes, axes, sequences=sequences, context=max(workload.seen, workload.context), tokens=tokens, rows=part)
    return Estimate(
        axes=dict(axes),
        nodes=nodes,
        microbatches=parts,
        latency=latency,
        period=period,
        compute=computing,
        communication=communication,
        sent=sent,
        strategies={name: place.strategy for name, place in where.items()},
        memory=memory,
        rate=workload.batch * workload.tokens / period,
        # A tenth is left to what is not counted: the runtime, workspaces, fragments.
        fits=sum(memory.values()) <= 0.9 * device.memory,
        calls=tuple(tuple(of_stage) for of_stage in calls),
    )


def _compute(
    shapes: ModelShapes, axes: Mapping[str, int], stage: int, tokens: int, sequences: int, device: Device, workload: Workload
) -> float:
    """Seconds that a rank of a stage computes, or reads weights, keys and values, whichever takes longer."""
    tp, pp, dp = axes["tp"], axes["pp"], axes["dp"]
    dense, moe = layers_of_stages(shapes, pp)[stage]
    size = shapes.itemsize
    common = (dense + moe) * shapes.attention_parameters + dense * 3 * shapes.hidden_size * shapes.intermediate_size
    common += moe * shapes.hidden_size * (shapes.num_experts + 3 * shapes.shared_intermediate_size)
    head = shapes.vocab_size * shapes.hidden_size if stage == pp - 1 else 0
    flops = 2 * tokens * common / tp + 2 * sequences * head / tp
    # A new token attends to what came before it: in a prefill to half of the prompt in the mean.
    seen = workload.seen if workload.decode else workload.seen / 2
    flops += 4 * tokens * seen * shapes.num_heads * shapes.head_dim / tp * (dense + moe)
    read = (common + head) / tp * size
    read += sequences * workload.seen * 2 * max(1, shapes.num_kv_heads // tp) * shapes.head_dim * size * (dense + moe)
    if moe:
        # The tokens of all dp ranks go to the experts of dp * tp ranks. Of its experts a rank reads those that a token chose.
        flops += 2 * tokens * shapes.top_k * shapes.expert_parameters / tp * moe
        chosen = 1 - (1 - shapes.top_k / shapes.num_experts) ** (tokens * dp)
        read += chosen * shapes.num_experts / (dp * tp) * shapes.expert_parameters * size * moe
    return max(flops / device.flops, read / device.bandwidth) / device.efficiency


def candidates(
    shapes: ModelShapes, world_size: int, *, tp: int | None = None, pp: int | None = None, dp: int | None = None
) -> list[dict[str, int]]:
    """List the layouts of a world on which a model can be cut; `tp`, `pp` and `dp` fix an axis."""
    found = []
    for size_tp in _sizes(shapes.num_heads, world_size, tp):
        for size_pp in _sizes(shapes.num_layers, world_size // size_tp, pp):
            for size_dp in _sizes(max(shapes.num_experts, 1), world_size // size_tp // size_pp, dp):
                axes = {"dp": size_dp, "pp": size_pp, "tp": size_tp}
                if world_size % math.prod(axes.values()) == 0 and not check_cut(shapes, axes):
                    found.append({"replica": world_size // math.prod(axes.values()), **axes})
    return found


def _sizes(of: int, most: int, fixed: int | None) -> Iterator[int]:
    return (size for size in ([fixed] if fixed is not None else range(1, min(of, most) + 1)) if of % size == 0)


def search(
    shapes: ModelShapes,
    world_size: int,
    nodes: int,
    links: Links,
    device: Device,
    workload: Workload,
    *,
    fixed: Mapping[str, int] | None = None,
    by: str = "throughput",
    advance: Callable[[], None] = lambda: None,
) -> list[Estimate]:
    """Estimate every layout on which a model can be cut, and sort them: those that fit first, then by throughput or latency.

    Args:
        shapes, nodes, links, device, workload: as for `estimate`.
        world_size: ranks.
        fixed: sizes of tp, pp or dp that are given.
        by: throughput or latency.
        advance: called once for each layout.

    Raises:
        ConfigurationError: the model cannot be cut for so many ranks.
        LayoutError: the ranks cannot be divided among so many hosts.
    """
    Hosts.of(world_size, nodes)
    fixed = dict(fixed or {})
    found = candidates(shapes, world_size, tp=fixed.get("tp"), pp=fixed.get("pp"), dp=fixed.get("dp"))
    if not found:
        given = {"tp": 1, "pp": 1, "dp": 1} | fixed
        why = check_cut(shapes, given) or f"world size {world_size} is not a multiple of {math.prod(given.values())}"
        raise ConfigurationError(f"{shapes.name} cannot be cut so: {why}")
    estimates = []
    for axes in found:
        estimates.append(estimate(shapes, axes, nodes, links, device, workload))
        advance()
    # Equal in what counts, fewer parts are the simpler layout.
    return sorted(
        estimates,
        key=lambda one: (not one.fits, one.latency if by == "latency" else -one.rate, one.axes["tp"] * one.axes["pp"] * one.axes["dp"]),
    )
