"""Selective activation checkpointing: products and attention are computed again, communication is not."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

__all__ = ["selective_checkpoint"]

_NAMESPACE = "odysseus"


def selective_checkpoint() -> tuple[Any, Any]:
    """Contexts for ``torch.utils.checkpoint`` that keep what this package's operators return.

    Everything between them (norms, activations, rotary embeddings, attention) is computed again in backward; an
    operator whose result is kept is not, so backward sends what it would send without checkpointing.

    Without ``context_fn`` a whole layer is computed again, its forward collectives included.

    Returns:
        The contexts of forward and of recomputation.

    Example:
        >>> model = ody.parallelize(model.train(), mesh)
        >>> model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": ody.selective_checkpoint})
        >>> loss = model(**ody.shard_sequence(batch, mesh)).loss
        >>> with ody.CommRecorder() as record:
        ...     loss.backward()
        >>> record.bytes(phase="forward")  # what forward sent is not sent again
        0
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-any-return]


def _policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = isinstance(operator, torch._ops.OpOverload) and operator.namespace == _NAMESPACE
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE
