"""The ranks that save a model together, and a check that all have come to do so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.errors import RankMismatchError
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.step import Stepped

__all__ = ["SavingRanks"]


class SavingRanks:
    """All ranks of a parallelized model's mesh; of the default process group for a stock model.

    Attributes:
        first: whether this is the one that writes what is written once.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [module.sequence_group for module in model.modules() if isinstance(module, Stepped)]
        self._group: SequenceGroup | None = found[0] if found else None
        self._device_type = next((p.device.type for p in model.parameters()), "cpu")
        if self._group is not None:
            self.first = not any(self._group.whole.get_coordinate() or ())
        else:
            self.first = not dist.is_initialized() or dist.get_rank() == 0

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """One group of them all; None is the default group."""
        return self._group.saving_group() if self._group is not None else None

    def come_together(self, what: str, folder: Path, names: Iterable[str]) -> None:
        """Checks, before anything is written, that all ranks are about to do the same.

        Args:
            what: the function that was called, for errors.
            folder: where to.
            names: of what is saved.

        Raises:
            RankMismatchError: ranks make other calls, save other tensors, or save elsewhere.
            SignalTimeoutError: a rank has not come within ``timeout_s``.
        """
        group = self._group
        if group is None:
            return
        saved = "\n".join((str(folder), *names)).encode()
        digest = int.from_bytes(hashlib.blake2b(saved, digest_size=7).digest(), "little")
        with group.steps.step():
            for ranks in group.dimensions():
                mine = torch.tensor([digest], device=self._device_type)
                everyone = all_gather(mine, ranks, operator=what, config=group.config).tolist()
                if len(set(everyone)) > 1:
                    raise RankMismatchError(
                        f"{what}: expected the same folder and the same tensors on ranks "
                        f"{dist.get_process_group_ranks(ranks)}, rank {dist.get_rank()} saves {folder}; others differ"
                    )

    def anywhere(self, flag: bool, what: str) -> bool:
        """Whether the flag is set on any rank; returns when all ranks have come here."""
        if self._group is not None:
            with self._group.steps.step():
                for ranks in self._group.dimensions():
                    mine = torch.tensor([flag], device=self._device_type)
                    flag = bool(all_gather(mine, ranks, operator=what, config=self._group.config).any())
            return flag
        if not dist.is_initialized():
            return flag
        mesh = init_device_mesh(self._device_type, (dist.get_world_size(),))
        mine = torch.tensor([float(flag)], device=self._device_type)
        return bool(DTensor.from_local(mine, mesh, [Partial("max")], run_check=False).full_tensor().item())
