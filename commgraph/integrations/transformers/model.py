"""What a cut model does otherwise than a whole one: saving, resizing, and generation where ranks have to agree."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from commgraph.context import ParallelContext
from commgraph.coordinator import GroupCoordinator
from commgraph.errors import ConfigurationError
from commgraph.nn.state import full_state_dict

__all__ = ["ParallelModel", "become_parallel", "gather_model"]


class ParallelModel(nn.Module):
    """A model of transformers that `parallelize` has cut; its class derives from this one and its old one.

    Attributes:
        ctx: the context.
        whole_config: the configuration of the whole model; ``config`` is that of this rank's stage.
    """

    ctx: ParallelContext
    whole_config: Any
    _exchanges: bool  # whether ranks of dp exchange rows in every forward

    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any) -> None:
        """Writes the whole model, gathered from the ranks of tp and pp. Collective over them; the first rank of each replica writes.

        Args:
            save_directory: a folder.
            is_main_process: False: nothing is written on this rank.
            kwargs: as of transformers' own, but for ``state_dict``.
        """
        if kwargs.pop("state_dict", None) is not None:
            raise ConfigurationError("save_pretrained: state_dict= would be written in place of the model's shards: leave it out")
        state = gather_model(self)
        if self.ctx.tp.is_first_rank and self.ctx.pp.is_first_rank and is_main_process:
            whole = _empty(self)
            whole.save_pretrained(save_directory, state_dict=state, **kwargs)
        self.ctx.tp.barrier()
        self.ctx.pp.barrier()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: embeddings are cut. Resize the whole model and cut it then."""
        del args, kwargs
        raise ConfigurationError(
            f"resize_token_embeddings: the embeddings of {type(self).__name__} are cut over tp={self.ctx.tp.world_size}; resize the whole "
            "model, then call parallelize"
        )

    def generate(self, *args: Any, synced_gpus: bool | None = None, **kwargs: Any) -> Any:
        """Generates as the whole model does; every rank of tp and pp gets the same tokens.

        Samples are drawn alike from the random state of the first rank of each replica, in processes; ranks that are threads share one
        generator, so that sampling raises there. Where ranks of dp exchange rows (``experts="ep"``) all of them call it, with prompts of
        their own, and go on until the last has ended.
        """
        config = kwargs.get("generation_config") or self.generation_config
        sampled = kwargs.get("do_sample", getattr(config, "do_sample", False))
        if sampled:
            self._draw_alike()
        if synced_gpus is None and self._exchanges:
            synced_gpus = True
        return super().generate(*args, synced_gpus=synced_gpus, **kwargs)  # type: ignore[misc]  # of the model's class

    def _unified(self) -> list[GroupCoordinator]:
        """Return the groups whose ranks compute the same tokens."""
        return [group for group in (self.ctx.tp, self.ctx.pp) if group.world_size > 1]

    def _draw_alike(self) -> None:
        """Gives the ranks of a replica the first one's random state, or raises where they are threads."""
        for group in self._unified():
            places = group.all_gather_object((os.uname().nodename, os.getpid()))
            if len(set(places)) < len(places):
                raise ConfigurationError(
                    f"generate(do_sample=True) on rank {group.rank}: ranks {group.ranks} of group {group.name!r} are threads of one "
                    "process, which share torch's random generator and would draw different tokens; sample in processes, or greedily"
                )
            device = self.ctx.device
            torch.set_rng_state(group.broadcast(torch.get_rng_state(), 0))
            if device.type != "cpu":
                module = torch.get_device_module(device)
                module.set_rng_state(group.broadcast(module.get_rng_state(device), 0), device)

    def _has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
        if not synced_gpus:
            return not this_peer_finished
        waiting = torch.tensor(0 if this_peer_finished else 1, device=device, dtype=torch.int64)
        return bool(self.ctx.dp.all_reduce(waiting, op="max"))

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]  # of the model's class
        return agreed(criteria, self._unified())


def agreed(criteria: Any, groups: Sequence[GroupCoordinator]) -> Any:
    """Return stopping criteria by which ranks stop together: where one looks at a clock, or at what else we cannot know, rank 0 decides."""
    from transformers.generation.stopping_criteria import (
        ConfidenceCriteria,
        EosTokenCriteria,
        MaxLengthCriteria,
        StoppingCriteria,
        StopStringCriteria,
    )

    class Agreed(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
        def __init__(self, own: StoppingCriteria) -> None:
            self.own = own

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            done = self.own(input_ids, scores, **kwargs)
            if not isinstance(done, torch.Tensor):
                done = torch.full((input_ids.shape[0],), bool(done), device=input_ids.device, dtype=torch.bool)
            for group in groups:
                done = group.broadcast(done, 0)
            return done

    same_everywhere = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria, ConfidenceCriteria)
    if groups:
        criteria[:] = [one if isinstance(one, same_everywhere) else Agreed(one) for one in criteria]
    return criteria


def become_parallel(model: nn.Module, ctx: ParallelContext, exchanges: bool) -> None:
    """Makes a model of transformers a `ParallelModel`; any other module stays what it is."""
    if not hasattr(model, "save_pretrained"):
        return
    model.__class__ = type(f"Parallel{type(model).__name__}", (ParallelModel, type(model)), {})
    assert isinstance(model, ParallelModel)
    model.ctx, model._exchanges, model.whole_config = ctx, exchanges, copy.deepcopy(model.config)


def gather_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole model's state on every rank, as `full_state_dict`, of all stages. Collective over tp and pp."""
    state = full_state_dict(model)
    ctx: ParallelContext | None = getattr(model, "ctx", None)
    if ctx is None or ctx.pp.world_size == 1:
        return state
    names = ctx.pp.all_gather_object([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()])
    whole: dict[str, torch.Tensor] = {}
    for stage, listed in enumerate(names):
        for name, shape, dtype in listed:
            own = state[name] if stage == ctx.pp.rank_in_group else torch.empty(shape, dtype=dtype, device=ctx.device)
            if name not in whole:
                whole[name] = ctx.pp.broadcast(own.contiguous(), stage)
    return whole


def _empty(model: ParallelModel) -> Any:
    """Return the whole model without memory."""
    kind = next(base for base in type(model).__mro__[1:] if base is not ParallelModel)
    with torch.device("meta"):
        whole: Any = kind(copy.deepcopy(model.whole_config))
    whole.to(next(model.parameters()).dtype)
    if getattr(model, "generation_config", None) is not None:
        whole.generation_config = model.generation_config
    return whole
