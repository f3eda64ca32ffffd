"""The ranks that share one sequence, and how they communicate."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.config import OverlapConfig

__all__ = ["SEQUENCE_DIMENSION", "SequenceGroup"]

SEQUENCE_DIMENSION = "seq"


@dataclasses.dataclass(frozen=True)
class SequenceGroup:
    """The ``"seq"`` dimension of a mesh as the layers need it.

    Attributes:
        mesh: one-dimensional mesh of the ranks that share a sequence; what parameters are distributed over.
        group: process group of these ranks.
        rank: this rank within the group.
        size: number of ranks N.
        config: how operators communicate.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    config: OverlapConfig

    @staticmethod
    def of(mesh: DeviceMesh, config: OverlapConfig | None = None) -> SequenceGroup:
        """The sequence group of ``mesh``.

        Raises:
            ValueError: if ``mesh`` is not a DeviceMesh whose only dimension is ``"seq"``.
        """
        if not isinstance(mesh, DeviceMesh):
            raise ValueError(f"mesh: expected a torch DeviceMesh, got {type(mesh).__name__}; {_how()}")
        names = mesh.mesh_dim_names or ()
        if SEQUENCE_DIMENSION not in names:
            raise ValueError(f'mesh: expected a dimension named "seq", got the dimensions {names}; {_how()}')
        if len(names) > 1:
            raise ValueError(
                f'mesh: expected "seq" as the only dimension, got {names}: crossing it with other dimensions is not '
                f'supported in this version; pass mesh["seq"] if the other dimensions have size 1'
            )
        group = mesh.get_group(SEQUENCE_DIMENSION)
        return SequenceGroup(mesh, group, dist.get_rank(group), dist.get_world_size(group), config or OverlapConfig())

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        # A copy of a module communicates with the same peers; process groups themselves cannot be copied.
        return self


def _how() -> str:
    return 'make one with torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))'
