"""Stock modules whose parameters are replicated and whose tokens are not: norms, embeddings, unsharded heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import head_parameter, token_parameter

__all__ = ["Replicated", "ReplicatedHeadNorm"]


class Replicated(nn.Module):
    """Runs the stock forward on this rank's tokens; gradients of the module's own parameters are added over the ranks.

    The stock forward reads ``self.weight``. While it runs, an instance attribute of that name holds the local tensor:
    attributes win over parameters, which stay registered, so ``state_dict`` and optimizers see nothing of it.
    """

    sequence_group: SequenceGroup

    def _local(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return token_parameter(parameter, self.sequence_group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock module's forward, on local tensors."""
        shadowed = []
        try:
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    self.__dict__[name] = self._local(parameter)
                    shadowed.append(name)
            return super().forward(*args, **kwargs)
        finally:
            # Also after an exception: activation checkpointing stops its recomputation with one.
            for name in shadowed:
                del self.__dict__[name]


class ReplicatedHeadNorm(Replicated):
    """The same for a norm within attention, which each rank uses for its own heads (Qwen3's query and key norms)."""

    def _local(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return head_parameter(parameter, self.sequence_group)
