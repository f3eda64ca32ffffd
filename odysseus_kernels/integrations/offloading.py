"""Offload of layer inputs for transformers models, stock or parallelized."""

from __future__ import annotations

import tempfile
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from odysseus_kernels.nn.offload import Offload, offload_layers

__all__ = ["offload_activations"]


def offload_activations(
    model: PreTrainedModel,
    *,
    folder: str | Path | None = None,
    min_bytes: int = 1 << 20,
    keep: int = 1,
    timeout_s: float = 600.0,
) -> Offload:
    """Puts the layer inputs that gradient checkpointing keeps away between forward and backward.

    With checkpointing a rank keeps [B, s, d] for each layer; with this, at most two at one time beside those of the
    last ``keep`` layers. On CPU ranks they go to a temporary file, written and read by a background thread; on GPUs to
    pinned memory of the host, on a stream of its own (which no GPU has run yet). Each comes back while the layer behind
    it is computed again. Results are the same to the bit.

    Gradient checkpointing is enabled if it is not; a Trainer may enable it again, and FSDP2 may wrap the layers before
    or after. What layers are given by keyword (masks, cosines and sines) is shared by all layers and stays. Layers that
    torch.compile compiles, and layers that are not checkpointed, keep what they keep without.

    Args:
        model: stock or parallelized.
        folder: where CPU ranks make their files (no names, nothing is left behind); a disk with room for all layer
            inputs of this host's ranks. None: the system's folder for temporary files, which may be in memory: that is
            a warning.
        min_bytes: smaller tensors stay.
        keep: so many last layers keep their inputs, which backward asks for first.
        timeout_s: seconds after which waiting for the disk is an error.

    Returns:
        How much was moved, in bytes (``bytes_out``, ``bytes_in``); its ``remove()`` ends it.

    Raises:
        ValueError: no such folder, bad numbers, a model without layers that can be checkpointed, one that is
            offloaded already, or a version of transformers (5.17, for one) whose layers run hooks when computed again.
        OSError: in forward, where the disk is full; in backward, where it cannot be read.

    Example:
        >>> model = ody.parallelize(model.train(), mesh)
        >>> offload = ody.offload_activations(model, folder=folder, min_bytes=0)
        >>> model(**ody.shard_sequence(batch, mesh)).loss.backward()
        >>> offload.bytes_out  # the first of two layers: 2 sequences, 8 of 16 tokens, 96 numbers of 4 bytes
        6144
        >>> offload.bytes_in == offload.bytes_out
        True
        >>> offload.remove()
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model: expected one whose layers can be checkpointed, got {type(model).__name__}")
    if "__call__" in vars(GradientCheckpointingLayer):
        raise ValueError(
            f"offload_activations: expected a transformers whose layers checkpoint their forward alone, got "
            f"{transformers.__version__}: there hooks run within the checkpoint, and all that a layer computes would "
            f"be put away, not its input; pip install -U transformers"
        )
    offload = offload_layers(
        layers,
        folder=tempfile.gettempdir() if folder is None else folder,
        min_bytes=min_bytes,
        keep=keep,
        timeout_s=timeout_s,
    )
    if not any(layer.gradient_checkpointing for layer in layers):
        # Under its newer name where there is one: the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return offload
