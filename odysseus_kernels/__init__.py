"""Fused communication and matrix products for long-sequence transformers.

Importing this package starts nothing, prints nothing and needs neither a GPU nor the compiled extension, which is
loaded when ranks first communicate.  Names that need transformers load it when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from odysseus_kernels.comm.groups import synchronize
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.comm.trace import trace
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import (
    CapacityWarning,
    CommunicationError,
    ExtensionNotBuiltError,
    FallbackWarning,
    KernelUnavailableError,
    PeerLostError,
    RankMismatchError,
    SignalTimeoutError,
)
from odysseus_kernels.ops import (
    all_gather_linear,
    all_to_all_linear,
    column_parallel_linear,
    linear_all_reduce,
    linear_all_to_all,
    linear_reduce_scatter,
    pipelined_attention,
    pipelined_ulysses,
    ulysses_attention,
    zero3_linear,
)

if TYPE_CHECKING:
    from odysseus_kernels.attention.ring import ring_attention
    from odysseus_kernels.data.loader import SequenceDataLoader
    from odysseus_kernels.data.shared_prefix import pack_shared_prefix, unpack_shared_prefix
    from odysseus_kernels.integrations.checkpoint import load_checkpoint, save_checkpoint
    from odysseus_kernels.integrations.huggingface import parallelize
    from odysseus_kernels.integrations.offloading import offload_activations
    from odysseus_kernels.integrations.pretrained import load_pretrained, save_pretrained
    from odysseus_kernels.integrations.switching import set_strategy
    from odysseus_kernels.integrations.verify import verify
    from odysseus_kernels.nn.checkpointing import selective_checkpoint
    from odysseus_kernels.nn.clipping import clip_grad_norm_
    from odysseus_kernels.nn.explain import explain
    from odysseus_kernels.nn.gather import gather_sequence
    from odysseus_kernels.nn.items import num_items_in_batch
    from odysseus_kernels.nn.logprobs import sequence_logprobs
    from odysseus_kernels.nn.loss import sequence_loss
    from odysseus_kernels.nn.master import MasterWeights
    from odysseus_kernels.nn.sequence import declare_cut, shard_sequence
    from odysseus_kernels.nn.step import step
    from odysseus_kernels.planner.planning.plan import plan

__version__ = "0.1.0"

__all__ = [
    "CapacityWarning",
    "CommRecorder",
    "CommunicationError",
    "ExtensionNotBuiltError",
    "FallbackWarning",
    "KernelUnavailableError",
    "MasterWeights",
    "OverlapConfig",
    "PeerLostError",
    "RankMismatchError",
    "SequenceDataLoader",
    "SignalTimeoutError",
    "all_gather_linear",
    "all_to_all_linear",
    "clip_grad_norm_",
    "column_parallel_linear",
    "declare_cut",
    "explain",
    "gather_sequence",
    "linear_all_reduce",
    "linear_all_to_all",
    "linear_reduce_scatter",
    "load_checkpoint",
    "load_pretrained",
    "num_items_in_batch",
    "offload_activations",
    "pack_shared_prefix",
    "parallelize",
    "pipelined_attention",
    "pipelined_ulysses",
    "plan",
    "ring_attention",
    "save_checkpoint",
    "save_pretrained",
    "selective_checkpoint",
    "sequence_logprobs",
    "sequence_loss",
    "set_strategy",
    "shard_sequence",
    "step",
    "synchronize",
    "trace",
    "ulysses_attention",
    "unpack_shared_prefix",
    "verify",
    "zero3_linear",
]

_LAZY = {
    "MasterWeights": "odysseus_kernels.nn.master",
    "SequenceDataLoader": "odysseus_kernels.data.loader",
    "clip_grad_norm_": "odysseus_kernels.nn.clipping",
    "declare_cut": "odysseus_kernels.nn.sequence",
    "explain": "odysseus_kernels.nn.explain",
    "gather_sequence": "odysseus_kernels.nn.gather",
    "load_checkpoint": "odysseus_kernels.integrations.checkpoint",
    "load_pretrained": "odysseus_kernels.integrations.pretrained",
    "num_items_in_batch": "odysseus_kernels.nn.items",
    "offload_activations": "odysseus_kernels.integrations.offloading",
    "pack_shared_prefix": "odysseus_kernels.data.shared_prefix",
    "parallelize": "odysseus_kernels.integrations.huggingface",
    "plan": "odysseus_kernels.planner.planning.plan",
    "ring_attention": "odysseus_kernels.attention.ring",
    "save_checkpoint": "odysseus_kernels.integrations.checkpoint",
    "save_pretrained": "odysseus_kernels.integrations.pretrained",
    "selective_checkpoint": "odysseus_kernels.nn.checkpointing",
    "sequence_logprobs": "odysseus_kernels.nn.logprobs",
    "sequence_loss": "odysseus_kernels.nn.loss",
    "set_strategy": "odysseus_kernels.integrations.switching",
    "shard_sequence": "odysseus_kernels.nn.sequence",
    "step": "odysseus_kernels.nn.step",
    "unpack_shared_prefix": "odysseus_kernels.data.shared_prefix",
    "verify": "odysseus_kernels.integrations.verify",
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
