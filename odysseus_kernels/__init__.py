"""Fused communication and matrix products for long-sequence transformers.

Importing this package starts nothing, prints nothing and needs neither a GPU nor the compiled extension, which is
loaded when ranks first communicate.  Names that need transformers load it when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .comm.groups import explain, synchronize
from .comm.recorder import CommRecorder
from .config import OverlapConfig
from .errors import (
    CapacityWarning,
    CommunicationError,
    ExtensionNotBuiltError,
    FallbackWarning,
    PeerLostError,
    RankMismatchError,
    SignalTimeoutError,
)
from .ops import all_gather_linear, linear_reduce_scatter, zero3_linear

if TYPE_CHECKING:
    from .integrations.checkpoint import load_checkpoint, save_checkpoint
    from .integrations.huggingface import parallelize
    from .nn.loss import sequence_loss
    from .nn.sequence import shard_sequence

__version__ = "0.1.0"

__all__ = [
    "CapacityWarning",
    "CommRecorder",
    "CommunicationError",
    "ExtensionNotBuiltError",
    "FallbackWarning",
    "OverlapConfig",
    "PeerLostError",
    "RankMismatchError",
    "SignalTimeoutError",
    "all_gather_linear",
    "explain",
    "linear_reduce_scatter",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
    "sequence_loss",
    "shard_sequence",
    "synchronize",
    "zero3_linear",
]

_LAZY = {
    "load_checkpoint": "odysseus_kernels.integrations.checkpoint",
    "save_checkpoint": "odysseus_kernels.integrations.checkpoint",
    "parallelize": "odysseus_kernels.integrations.huggingface",
    "sequence_loss": "odysseus_kernels.nn.loss",
    "shard_sequence": "odysseus_kernels.nn.sequence",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
