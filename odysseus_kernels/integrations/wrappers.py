"""Wrappers of modules that a parallelized model cannot be put into, refused where they are made."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from odysseus_kernels.integrations.model import SequenceCausalLM

__all__ = ["refuse_replicating_wrappers"]

# Known by name: importing them costs more than this module does.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@functools.cache
def refuse_replicating_wrappers() -> None:
    """From now on a wrapper that takes parameters for plain copies refuses a parallelized model when it is made."""
    register_module_module_registration_hook(_refuse)


def _refuse(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
    if wrapper is None or submodule is None:
        return
    if any(isinstance(part, SequenceCausalLM) for part in submodule.modules()):
        raise TypeError(
            f"{wrapper}: expected a module with plain parameters, got a parallelized model, whose ranks hold parts of "
            f"one model. transformers' Trainer makes such a wrapper wherever RANK is set: use the one of "
            f"odysseus_kernels.integrations.trainer instead, or SequenceAccelerator beside a loop of your own. For "
            f'data parallelism around it give the mesh a dimension "dp" and use '
            f'torch.distributed.fsdp.fully_shard(model, mesh=mesh["dp"])'
        )
