"""The norm of all gradients of a model whose parameters lie on several ranks, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.marks import layer_of
from commgraph.nn.shards import Cut, as_dtensor, held

__all__ = ["clip_grad_norm_", "total_grad_norm"]

Parameters = nn.Module | torch.Tensor | Iterable[torch.Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    copies: Iterable[torch.Tensor] = (),
    ctx: ParallelContext | None = None,
) -> torch.Tensor:
    """Scales gradients so that their total norm, over all ranks, is at most `max_norm`; as ``torch.nn.utils.clip_grad_norm_``.

    Collective, as `total_grad_norm` is, which see for the other arguments. Every rank scales by the same factor.

    Args:
        parameters: as of `total_grad_norm`.
        max_norm: the greatest total norm.
        norm_type: p of the norm, greater than 0; may be infinite.
        error_if_nonfinite: whether a norm that is infinite or not a number is an error, on every rank.
        foreach: as of torch's: whether many tensors are scaled by one call; None: where it is faster.
        copies: parameters that another rank counts; scaled and not counted.
        ctx: whose pipeline the parameters are stages of.

    Returns:
        The total norm before, equal on all ranks.

    Raises:
        RuntimeError: the norm is not finite, with `error_if_nonfinite`; no gradient was changed.
        ConfigurationError: as of `total_grad_norm`.
    """
    if not isinstance(parameters, nn.Module | torch.Tensor):
        parameters = list(parameters)
    total = total_grad_norm(parameters, norm_type, error_if_nonfinite, copies=copies, ctx=ctx)
    # Gradients that are DTensors are scaled where they lie. Torch takes parameters, and of those the gradients alone.
    local = []
    for parameter in _all(parameters):
        if parameter.grad is not None:
            sharded = as_dtensor(parameter.grad)
            local.append(_Scaled(parameter.grad if sharded is None else sharded.to_local()))
    torch.nn.utils.clip_grads_with_norm_(local, max_norm, total, foreach)  # type: ignore[arg-type]  # it reads nothing but .grad
    return total


@attrs.frozen
class _Scaled:
    grad: torch.Tensor


@torch.no_grad()
def total_grad_norm(
    parameters: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    copies: Iterable[torch.Tensor] = (),
    ctx: ParallelContext | None = None,
) -> torch.Tensor:
    """The norm of all gradients, as if the model were on one rank.

    A sharded parameter counts with its shards on all ranks of its group, one that ranks hold whole once, heads that neighbours hold twice
    once, a parameter with two names once, and the stages of a pipeline all count. Gradients have to be complete: averaged over dp.

    Collective over the groups of the layers, over the pipeline, and over the mesh of DTensors (``fully_shard``), whether this rank has
    gradients or not.

    Args:
        parameters: a model, or parameters of one. A DTensor does not say by itself whether a layer shards it further: then the model.
        norm_type: p of the norm, greater than 0; may be infinite.
        error_if_nonfinite: whether a norm that is infinite or not a number is an error, on every rank.
        copies: parameters that another rank counts, too: those of a head that is tied to the embedding on another stage.
        ctx: whose pipeline the parameters are stages of; None: the context of the layers. Needed where a stage has none of these layers.

    Returns:
        A tensor without dims, equal on all ranks, in float32, or float64 where a gradient is.

    Raises:
        RuntimeError: the norm is not finite, with `error_if_nonfinite`.
        ConfigurationError: `norm_type` is not greater than 0; DTensors without their model; layers of several pipelines.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ConfigurationError(f"norm_type={norm_type}: must be greater than 0, infinity included")
    if not isinstance(parameters, nn.Module | torch.Tensor):
        parameters = list(parameters)
    sharding = _sharding(parameters)
    uncounted = {id(parameter) for parameter in copies}
    buckets: dict[tuple[int, tuple[int, ...], int], _Bucket] = {}
    found = _all(parameters)
    pipeline = _pipeline(parameters, ctx)
    device = found[0].device if found else pipeline.device if pipeline is not None else None
    dtype = torch.float32
    for parameter in found:
        if id(parameter) in uncounted:
            continue
        layer, cut = sharding.get(id(parameter), (None, None))
        bucket = _Bucket.of(parameter, layer.group if layer is not None and cut is not None and not cut.is_replicated else None)
        buckets.setdefault(bucket.key, bucket)
        if parameter.grad is not None:
            dtype = torch.promote_types(dtype, parameter.grad.dtype if parameter.grad.dtype.is_floating_point else dtype)
            buckets[bucket.key].terms.extend(_terms(parameter.grad, cut, norm_type))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for bucket in buckets.values():  # in the order of the parameters, which is one for all ranks of a group
        total = _add(total, bucket.reduced(norm_type, device), norm_type)
    if pipeline is not None and pipeline.world_size > 1:
        total = pipeline.all_reduce(total, op="max" if math.isinf(norm_type) else "sum")
    norm = (total if math.isinf(norm_type) else total ** (1 / norm_type)).to(dtype)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients over all ranks is {norm.item()}, so they cannot be clipped; pass "
            "error_if_nonfinite=False to scale by it anyway"
        )
    return norm


@attrs.define
class _Bucket:
    """Terms of the total that are added over the same ranks: those of a DTensor's mesh, then those of a group."""

    key: tuple[int, tuple[int, ...], int]
    parameter: torch.Tensor
    group: GroupCoordinator | None
    terms: list[torch.Tensor] = attrs.Factory(list)

    @classmethod
    def of(cls, parameter: torch.Tensor, group: GroupCoordinator | None) -> _Bucket:
        sharded = as_dtensor(parameter)
        if sharded is None:
            return cls((0, (), id(group)), parameter, group)
        dims = tuple(number for number, one in enumerate(sharded.placements) if one.is_shard())
        return cls((id(sharded.device_mesh), dims, id(group)), parameter, group)

    def reduced(self, norm_type: float, device: torch.device | None) -> torch.Tensor:
        """Return the sum of all terms of all ranks, of the infinite norm the greatest."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for term in self.terms:
            total = _add(total, term.to(device), norm_type)
        op = "max" if math.isinf(norm_type) else "sum"
        if (sharded := as_dtensor(self.parameter)) is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            placements = [Partial(op) if one.is_shard() else Replicate() for one in sharded.placements]
            total = DTensor.from_local(total, sharded.device_mesh, placements, run_check=False).full_tensor()
        return total if self.group is None or self.group.world_size == 1 else self.group.all_reduce(total, op=op)


def _terms(grad: torch.Tensor, cut: Cut | None, norm_type: float) -> list[torch.Tensor]:
    """Return this rank's terms of the sum of absolute values to the power of p, of the infinite norm their maxima."""
    if cut is None or cut.is_replicated:
        boxes = [(box, 1.0) for _, box in held(grad) if box.numel()]
    else:
        # Where ranks outnumber the blocks of a piece, several hold each, and each counts a part of it.
        boxes = [(chunk.tensor, cut.pieces[chunk.shard].blocks / cut.world) for chunk in cut.chunks(grad)]
    terms = []
    for box, share in boxes:
        norm = torch.linalg.vector_norm(box, norm_type, dtype=torch.promote_types(box.dtype, torch.float32)).double()
        terms.append(norm if math.isinf(norm_type) else norm**norm_type * share)
    return terms


def _add(total: torch.Tensor, term: torch.Tensor, norm_type: float) -> torch.Tensor:
    return torch.maximum(total, term) if math.isinf(norm_type) else total + term


def _all(parameters: Parameters) -> list[torch.Tensor]:
    """Every parameter once."""
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    several = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    return list({id(parameter): parameter for parameter in several}.values())


def _sharding(parameters: Parameters) -> dict[int, tuple[ParallelLayer, Cut]]:
    """The layer and the cut of each parameter that belongs to a parallel layer."""
    if isinstance(parameters, nn.Module):
        layers = [module for module in parameters.modules() if isinstance(module, ParallelLayer)]
        return {
            id(parameter): (layer, cut)
            for layer in layers
            for name, cut in layer.cuts.items()
            if (parameter := getattr(layer, name)) is not None
        }
    found = {}
    for parameter in _all(parameters):
        if as_dtensor(parameter) is not None:
            raise ConfigurationError(
                f"a parameter of shape {tuple(parameter.shape)} is a DTensor, which does not say whether a layer shards it further: "
                "pass the model in place of its parameters"
            )
        if (mark := layer_of(parameter)) is not None:
            layer, name = mark
            assert isinstance(layer, ParallelLayer)  # nothing else marks
            found[id(parameter)] = layer, layer.cuts[name]
    return found


def _pipeline(parameters: Parameters, ctx: ParallelContext | None) -> GroupCoordinator | None:
    """The group of the stages; None: there is no pipeline."""
    if ctx is not None:
        contexts = [ctx]
    elif isinstance(parameters, nn.Module):
        contexts = [value for module in parameters.modules() for value in vars(module).values() if isinstance(value, ParallelContext)]
    else:
        contexts = [layer.ctx for layer, _ in _sharding(parameters).values()]
    pipelines = {one["pp"].ranks: one["pp"] for one in contexts if "pp" in one.layout.names}
    if len(pipelines) > 1:
        names = ", ".join(sorted({repr(one.name) for one in contexts}))
        raise ConfigurationError(
            f"the layers are of contexts {names}, whose pipelines differ: say by ctx= whose stages these parameters are"
        )
    return next(iter(pipelines.values()), None)
