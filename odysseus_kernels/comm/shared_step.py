"""A step of all ranks: an error on one of them is an error on all.

Between two calls a rank may raise where its peers do not: a bad token id, the user's own code, no memory left.  Its
peers then wait for it in a call of some group of the mesh.  So a step is a scope: whatever a rank raises in it is told
to the groups of the mesh; peers that wait there raise it with that rank's number and tell the groups that they are in,
until all ranks of the mesh have left the step.  Nothing is sent while all goes well.

Each rank counts the steps of a group.  On the symmetric transport of a host peers see the count, so a rank that goes on
to another step without having made all calls of the last one is an error as well; and where ranks meet after an error,
they compare it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from odysseus_kernels.comm.data_parallel import watch_fsdp
from odysseus_kernels.comm.group_transports import GroupTransports
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.mismatch import departure
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError

__all__ = ["StepGroups"]


class StepGroups:
    """The process groups of a mesh, as steps see them.

    Args:
        groups: groups whose collectives are this package's.
        others: groups of the same mesh in which other code waits, such as those of data parallelism.
        config: how operators communicate.
        device_type: where their tensors lie.
    """

    def __init__(
        self,
        groups: Sequence[dist.ProcessGroup],
        others: Sequence[dist.ProcessGroup],
        config: OverlapConfig,
        device_type: str,
    ) -> None:
        self._groups = list({group.group_name: group for group in groups if group.size() > 1}.values())
        self._others = [group for group in others if group.size() > 1]
        self._config, self._device = config, torch.device(device_type)
        self._inside = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is within a step."""
        return bool(getattr(self._inside, "depth", 0))

    def watch(self, model: nn.Module) -> None:
        """Makes data parallelism's waits in ``model`` end when a rank of another replica leaves its step."""
        if self._others and self._device.type == "cpu":
            watch_fsdp(model, self._config.timeout_s)

    @contextlib.contextmanager
    def step(self) -> Iterator[bool]:
        """Everything within the block is one step; inside another step it is part of that one, and this yields False.

        Raises:
            CommunicationError: the ranks could not meet after an earlier error.
        """
        if self.inside:
            yield False
            return
        self._inside.depth = 1
        try:
            self._begin()
            yield True
        except BaseException as error:
            self.leave(error)
            raise
        finally:
            self._inside.depth = 0

    def leave(self, error: BaseException | None) -> None:
        """Tells all peers that this rank has left the step because of ``error``; once for each step.

        None stands for an error that is not known here: one that a peer told of, or one of this rank.
        """
        transports = self._transports()
        if error is None:
            heard = [one.heard for one in transports if one.heard]
            error = CommunicationError("its backward pass ended with an error", said=heard[0] if heard else "")
        said = departure(dist.get_rank(), "left the step", error)
        lasting = bool(self._others) or (isinstance(error, CommunicationError) and error.lasting)
        for one in transports:
            one.leave_step(said, self._config, lasting=lasting)

    def _transports(self) -> list[GroupTransports]:
        return [group_transports(group) for group in (*self._groups, *self._others)]

    def _begin(self) -> None:
        transports = self._transports()
        for one in transports:
            one.begin_step()
        for one in transports[len(self._groups) :]:
            one.look()
        for one in transports[: len(self._groups)]:
            one.meet(self._config, self._device)
