"""Stock modules whose parameters are replicated and whose tokens are not: norms, embeddings, unsharded heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import replicated_parameter

__all__ = ["Replicated"]


class Replicated(nn.Module):
    """Runs the stock forward on this rank's tokens; gradients of the module's own parameters are added over the ranks.

    The stock forward reads ``self.weight``. While it runs, an instance attribute of that name holds the local tensor:
    attributes win over parameters, which stay registered, so ``state_dict`` and optimizers see nothing of it.
    """

    sequence_group: SequenceGroup

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock module's forward, on local tensors."""
        shadowed = []
        try:
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    self.__dict__[name] = replicated_parameter(parameter, self.sequence_group)
                    shadowed.append(name)
            return super().forward(*args, **kwargs)
        finally:
            # Also after an exception: activation checkpointing stops its recomputation with one.
            for name in shadowed:
                del self.__dict__[name]
