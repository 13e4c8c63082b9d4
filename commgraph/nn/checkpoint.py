"""`save_checkpoint`: torch.distributed.checkpoint's saving over a group of commgraph, where the process has no default group."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from commgraph.coordinator import GroupCoordinator
from commgraph.errors import CollectiveError
from commgraph.nn.local_shards import LocalShards

if TYPE_CHECKING:
    from torch.distributed.checkpoint import StorageWriter

__all__ = ["save_checkpoint"]

T = TypeVar("T")
R = TypeVar("R")


def save_checkpoint(
    state: Mapping[str, Any],
    checkpoint: str | PathLike[str] | StorageWriter,
    group: GroupCoordinator,
    *,
    timeout: timedelta | float | None = None,
) -> None:
    """Saves a state as ``torch.distributed.checkpoint.save`` does, in its format. Collective over `group`.

    ``torch.distributed.checkpoint.load`` reads it without any group: each rank reads its part by itself.

    Args:
        state: as for torch's, e.g. ``{"model": sharded_state_dict(model)}``.
        checkpoint: a folder, which all ranks see, or any ``StorageWriter``.
        group: the ranks that together hold the model, usually ``world.group``. Between hosts plans of what is written where are objects
            that need an authkey.
        timeout: deadline for each of two exchanges, between which the ranks write; None: the group's.

    Raises:
        CollectiveError: another rank could not write or plan; says which and why. The rank itself raises its own error.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
    from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

    class Planner(DefaultSavePlanner):
        """Torch's, which takes the shards without asking for a default group."""

        def create_local_plan(self) -> Any:
            shards = {name: value for name, value in self.state_dict.items() if isinstance(value, LocalShards)}
            plan = create_default_local_save_plan({k: v for k, v in self.state_dict.items() if k not in shards}, self.is_coordinator)
            items = [*plan.items, *(item for name, value in shards.items() for item in value.write_items(name))]
            self.plan = dataclasses.replace(plan, items=items, planner_data=self.mappings)
            return self.plan

    writer: Any = FileSystemWriter(checkpoint) if isinstance(checkpoint, str | PathLike) else checkpoint
    planner, is_first = Planner(), group.rank_in_group == 0
    metadata: Any = None

    def plan() -> Any:
        planner.set_up_planner(dict(state), writer.storage_meta(), is_first)
        takes_rank = "kwargs" in inspect.signature(writer.set_up_storage_writer).parameters
        writer.set_up_storage_writer(is_first, **({"rank": group.rank_in_group, "use_collectives": True} if takes_rank else {}))
        return writer.prepare_local_plan(planner.create_local_plan())

    def assign(plans: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return list(writer.prepare_global_plan(plans))

    def finish(results: list[Any]) -> list[None]:
        writer.finish(metadata=metadata, results=results)
        return [None] * len(results)

    def write(part: Any) -> Any:
        writes = writer.write_data(planner.finish_plan(part), planner)
        writes.wait()
        return writes.value()

    part = _together(group, plan, assign, timeout)
    _together(group, lambda: write(part), finish, timeout)


def _together(
    group: GroupCoordinator, step: Callable[[], T], collect: Callable[[list[T]], Sequence[R]], timeout: timedelta | float | None
) -> R:
    """Take a step on every rank, have the first rank collect the results, and return its answer for this rank; or raise on every rank."""
    result, error = _tried(step)
    outcomes = group.gather_object((result, _text(error)), 0, timeout=timeout)
    answers: list[tuple[Any, str]] | None = None
    if outcomes is not None:
        failed = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in zip(group.ranks, outcomes, strict=True) if text)
        parts: Sequence[Any] | None = [None] * group.world_size
        if not failed:
            parts, error = _tried(lambda: collect([value for value, _ in outcomes]))  # type: ignore[misc]  # no error, so no None
            failed = f"rank {group.rank}: {_text(error)}" if error is not None else ""
        answers = [(part, failed) for part in parts or [None] * group.world_size]
    part, failed = group.scatter_object(answers, 0, timeout=timeout)
    if error is not None:
        raise error
    if failed:
        message = f"save_checkpoint on rank {group.rank} over group {group.name!r}: {failed}"
        raise CollectiveError(message, group=group.name, operation="save_checkpoint", rank=group.rank)
    answer: R = part
    return answer


def _tried(step: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return step(), None
    except Exception as error:
        return None, error


def _text(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
