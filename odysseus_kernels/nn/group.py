"""The ranks that share one sequence, and how they communicate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.announce import announce, withdraw
from odysseus_kernels.comm.arguments import check_config
from odysseus_kernels.comm.shared_step import StepGroups
from odysseus_kernels.config import OverlapConfig

__all__ = ["DATA_DIMENSION", "RING_DIMENSION", "SEQUENCE_DIMENSION", "SequenceGroup"]

SEQUENCE_DIMENSION = "seq"
RING_DIMENSION = "ring"
DATA_DIMENSION = "dp"
# Outermost first; a mesh has "seq" and any of the others, in this order.
_ORDER = (DATA_DIMENSION, RING_DIMENSION, SEQUENCE_DIMENSION)


@dataclasses.dataclass(frozen=True)
class SequenceGroup:
    """The dimensions of a mesh over which one sequence is cut, as the layers need them.

    The sequence is cut over ``ring`` first (each ring rank's part is two blocks in zigzag order) and its part over
    ``seq``.  Ranks that differ in ``"dp"`` alone hold other sequences and are not part of this.

    Attributes:
        mesh: ``("seq",)`` or ``("ring", "seq")``; what parameters are distributed over.
        group: process group of the ``"seq"`` dimension.
        rank: this rank within ``group``.
        size: number of ranks N in ``group``.
        config: how operators communicate.
        ring: process group of the ``"ring"`` dimension, or None where the mesh has none.
        ring_rank: this rank within ``ring``; 0 without.
        ring_size: number of ranks R in ``ring``; 1 without.
        everyone: process group of all ranks that share the sequence, R·N of them; ``group`` without a ring.  Its ranks
            are in the order of ring rank · N + rank.
        every_rank: this rank within ``everyone``.
        whole: the mesh that this is made of, with ``"dp"`` where it has it.
        steps: tells all ranks of the mesh, those of ``"dp"`` included, of an error on one.
        tokens: ``"sharded"`` where ranks of ``group`` hold different tokens outside of attention, ``"replicated"``
            where they hold the same (classical tensor parallelism).
        folded: whether ring and seq are one ring: the sequence is cut in zigzag order over ``everyone``, and attention
            visits all of them (tensor and sequence parallelism on the same ranks).
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    config: OverlapConfig
    ring: dist.ProcessGroup | None
    ring_rank: int
    ring_size: int
    everyone: dist.ProcessGroup
    every_rank: int
    whole: DeviceMesh
    steps: StepGroups = dataclasses.field(repr=False)
    tokens: Literal["sharded", "replicated"] = "sharded"
    folded: bool = False

    @property
    def zigzag(self) -> dist.ProcessGroup | None:
        """The ranks that the sequence is cut over in zigzag order, which Ring attention visits; None where none is."""
        return self.everyone if self.folded else self.ring

    @property
    def zigzag_rank(self) -> int:
        """This rank within ``zigzag``; 0 without."""
        return self.every_rank if self.folded else self.ring_rank

    @property
    def zigzag_size(self) -> int:
        """Number of ranks in ``zigzag``; 1 without."""
        return self.every_size if self.folded else self.ring_size

    @property
    def slices(self) -> int:
        """Slices into which ranks of seq cut what a rank of ``zigzag`` has of the sequence."""
        return 1 if self.folded or self.tokens == "replicated" else self.size

    @property
    def token_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different tokens outside of attention; None where there is one such rank."""
        return self.everyone if self.tokens == "sharded" else self.ring

    @property
    def every_size(self) -> int:
        """Number of ranks that share the sequence."""
        return self.ring_size * self.size

    def announce(self, text: str, *groups: dist.ProcessGroup) -> None:
        """Has ranks compare ``text`` with the next call of each of ``groups``: all that share the sequence, if none."""
        for name in self._names(groups):
            announce(name, text)

    def withdraw(self) -> None:
        """Forgets what was announced but not yet taken by a call."""
        for name in self._names(()):
            withdraw(name)

    def _names(self, groups: tuple[dist.ProcessGroup, ...]) -> list[str]:
        chosen = groups or tuple(group for group in (self.group, self.ring, self.everyone) if group is not None)
        return list(dict.fromkeys(group.group_name for group in chosen if group.size() > 1))

    def dimensions(self) -> list[dist.ProcessGroup]:
        """The process group of each dimension of the whole mesh, innermost first, without those of one rank."""
        groups = [self.whole.get_group(dim) for dim in reversed(range(self.whole.ndim))]
        return [group for group in groups if group.size() > 1]

    def saving_group(self) -> dist.ProcessGroup | None:
        """A process group of all ranks of the whole mesh; None is the default group.  All of them call it."""
        if self.whole.size() == dist.get_world_size():
            return None
        if DATA_DIMENSION not in (self.whole.mesh_dim_names or ()):
            return self.everyone
        return self.whole._flatten("dp_ring_seq").get_group()

    @staticmethod
    def of(mesh: DeviceMesh, config: OverlapConfig | None = None) -> SequenceGroup:
        """The sequence group of ``mesh``; every rank of the mesh calls this together.

        Raises:
            ValueError: if ``mesh`` is not a DeviceMesh with a dimension ``"seq"``, optionally ``"ring"`` outside it and
                ``"dp"`` outside both; or if its ranks do not increase along each dimension and over a whole sequence.
        """
        if not isinstance(mesh, DeviceMesh):
            raise ValueError(f"mesh: expected a torch DeviceMesh, got {type(mesh).__name__}; {_how()}")
        names = mesh.mesh_dim_names or ()
        if SEQUENCE_DIMENSION not in names:
            raise ValueError(f'mesh: expected a dimension named "seq", got the dimensions {names}; {_how()}')
        if names != tuple(name for name in _ORDER if name in names):
            raise ValueError(
                f'mesh: expected dimensions out of {_ORDER}, outermost first, got {names}: "ring" lies outside of '
                f'"seq", "dp" outside of both, and other dimensions are not supported'
            )
        _check_order(mesh)
        settled, group = check_config(config), mesh.get_group(SEQUENCE_DIMENSION)
        data = [mesh.get_group(DATA_DIMENSION)] if DATA_DIMENSION in names else []
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if RING_DIMENSION not in names:
            own = mesh if len(names) == 1 else mesh[SEQUENCE_DIMENSION]
            steps = StepGroups([group], data, settled, mesh.device_type)
            return SequenceGroup(own, group, rank, size, settled, None, 0, 1, group, rank, mesh, steps)
        own = mesh if len(names) == 2 else mesh[RING_DIMENSION, SEQUENCE_DIMENSION]
        ring = mesh.get_group(RING_DIMENSION)
        ring_rank, ring_size = dist.get_rank(ring), dist.get_world_size(ring)
        everyone = group if ring_size == 1 else ring if size == 1 else own._flatten("ring_seq").get_group()
        every_rank = ring_rank * size + rank
        assert dist.get_rank(everyone) == every_rank, "a flattened mesh is in row-major order"
        steps = StepGroups([group, ring, everyone], data, settled, mesh.device_type)
        return SequenceGroup(
            own, group, rank, size, settled, ring, ring_rank, ring_size, everyone, every_rank, mesh, steps
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        # A copy of a module communicates with the same peers; process groups themselves cannot be copied.
        return self


def _check_order(mesh: DeviceMesh) -> None:
    """Refuses meshes whose coordinates are not the ranks of their process groups, which are ordered by number.

    To find a rank's part of a DTensor, torch itself goes by the one in some places and by the other in others.
    """
    ranks = mesh.mesh
    names = mesh.mesh_dim_names or ()
    over = tuple(names.index(name) for name in (RING_DIMENSION, SEQUENCE_DIMENSION) if name in names)
    sequences = ranks.reshape(-1, math.prod(ranks.shape[dim] for dim in over))
    lines = [(f"along {name!r}", ranks.diff(dim=dim)) for dim, name in enumerate(names)]
    lines.append(('over ("ring", "seq"), row by row', sequences.diff(dim=1)))
    for where, differences in lines:
        if bool((differences <= 0).any()):
            raise ValueError(
                f"mesh: expected ranks that increase {where}, since the ranks of a process group are ordered by "
                f"number, got {ranks.tolist()}; give each process the rank that its place in the mesh asks for, "
                f"or sort the ranks"
            )


def _how() -> str:
    return 'make one with torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))'
