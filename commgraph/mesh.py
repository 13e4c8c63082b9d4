"""Groups of a context as a ``DeviceMesh`` of torch, for FSDP2, DTensor and what is built on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commgraph.coordinator import GroupCoordinator
from commgraph.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["mesh_of"]


def mesh_of(groups: Sequence[GroupCoordinator], device: torch.device, where: str) -> DeviceMesh:
    """Return a mesh with a dim for each group, outermost first. Collective over them.

    Two meshes over the same ranks are equal to torch where their dims have the same names, and its caches then mix their groups. A dim's
    name therefore ends in that of its torch group, which no other group of the process has had.

    Args:
        groups: one for each dim; together they are a grid.
        device: of this rank.
        where: names the call in errors.

    Raises:
        LayoutError: the groups are no grid.
        BackendUnavailableError: there is no default process group.
    """
    from torch.distributed.device_mesh import DeviceMesh

    torch_groups = [group.torch_group("cpu" if device.type == "cpu" else "device") for group in groups]
    grid: object = dist.get_rank()
    for group in reversed(groups):  # from the innermost: each adds a dim in front
        grid = group.all_gather_object(grid)
    mesh = torch.tensor(grid, device="cpu", dtype=torch.int)
    rows = [mesh.movedim(dim, -1).reshape(-1, mesh.shape[dim]).tolist() for dim in range(mesh.dim())]
    own = [dist.get_process_group_ranks(group) for group in torch_groups]
    if mesh.unique().numel() != mesh.numel() or any(ranks not in lines for ranks, lines in zip(own, rows, strict=True)):
        listed = ", ".join(f"{group.name} {group.ranks}" for group in groups)
        raise LayoutError(f"{where}: the groups are no grid, of which each is one dim: {listed}")
    names = tuple(f"{group.name}@{torch_group.group_name}" for group, torch_group in zip(groups, torch_groups, strict=True))
    if len(groups) == 1:
        return DeviceMesh.from_group(torch_groups[0], device.type, mesh_dim_names=names)
    return DeviceMesh.from_group(torch_groups, device.type, mesh=mesh, mesh_dim_names=names)
