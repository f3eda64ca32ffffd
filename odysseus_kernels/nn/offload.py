"""Layer inputs that checkpointing keeps, away from memory between forward and backward.

A checkpointed layer keeps its input, [B, s, d] on each rank, and nothing else.  Hooks of autograd (those that
``torch.autograd.graph.saved_tensors_hooks`` sets) put it away where a layer is called, and bring it back where backward
asks for it; they are set around each layer's call and not within, where the checkpoint has its own.  While a layer is
computed again and differentiated, the input of the layer before is on its way.

What is put away comes back to the bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from odysseus_kernels.nn.offload_file import FileStore
from odysseus_kernels.nn.offload_pinned import PinnedStore

__all__ = ["Offload", "offload_layers"]


class _Slot(Protocol):
    nbytes: int

    def begin(self) -> None: ...

    def take(self) -> Tensor: ...


class _Input:
    """A saved layer input.

    Attributes:
        layer: number of the layer.
        slot: where it was put, or the tensor itself where it stays.
        before: the input of the layer before, of the same forward pass.
    """

    def __init__(self, layer: int, slot: _Slot | Tensor, before: _Input | None) -> None:
        self.layer, self.slot = layer, slot
        # Weak: an input lives as long as its own checkpoint.
        self.before = None if before is None else weakref.ref(before)

    def take(self) -> Tensor:
        """The tensor, with the one before on its way."""
        if not isinstance(self.slot, Tensor):
            self.slot.begin()
        before = None if self.before is None else self.before()
        if before is not None and not isinstance(before.slot, Tensor):
            before.slot.begin()
        return self.slot if isinstance(self.slot, Tensor) else self.slot.take()


class Offload:
    """What :func:`~odysseus_kernels.offload_activations` returns: how much was moved, and how to end it.

    A copy of the model shares it.
    """

    def __init__(self, layers: Sequence[nn.Module], folder: Path, min_bytes: int, keep: int, timeout_s: float) -> None:
        self._folder, self._min_bytes, self._keep, self._timeout_s = folder, min_bytes, keep, timeout_s
        self._count = len(layers)
        self._file: FileStore | None = None
        self._pinned: dict[torch.device, PinnedStore] = {}
        self._last: weakref.ref[_Input] | None = None
        self._handles: list[Any] = []
        for number, layer in enumerate(layers):
            around = AroundLayer(self, number)
            self._handles.append(layer.register_forward_pre_hook(around.enter))
            # Also where the layer raises: hooks on saved tensors must not stay set.
            self._handles.append(layer.register_forward_hook(around.leave, always_call=True))

    @property
    def bytes_out(self) -> int:
        """Bytes of layer inputs that were put away so far."""
        return sum(store.written for store in self._stores())

    @property
    def bytes_in(self) -> int:
        """Bytes of layer inputs that were brought back so far."""
        return sum(store.read for store in self._stores())

    def remove(self) -> None:
        """Takes the hooks off the layers; what is away can still be brought back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stores(self) -> list[FileStore | PinnedStore]:
        return [*([] if self._file is None else [self._file]), *self._pinned.values()]

    def put_away(self, layer: int, tensor: Tensor) -> Tensor | _Input:
        """Hook: a tensor that autograd saves for layer number ``layer``."""
        # An empty one takes no room; torch 2.10 saves one with every checkpoint.
        if type(tensor) is not Tensor or tensor.nbytes < max(self._min_bytes, 1) or tensor.is_inference():
            return tensor
        before = None if self._last is None else self._last()
        if before is not None and before.layer >= layer:
            before = None  # of another forward pass
        stays = layer >= self._count - self._keep
        store = self._store(tensor.device)
        if stays:
            store.settle()
        found = _Input(layer, tensor if stays else store.put(tensor), before)
        self._last = weakref.ref(found)
        return found

    @staticmethod
    def bring_back(saved: Tensor | _Input) -> Tensor:
        """Hook: backward asks for what :meth:`put_away` returned."""
        return saved if isinstance(saved, Tensor) else saved.take()

    def _store(self, device: torch.device) -> FileStore | PinnedStore:
        if device.type == "cpu":
            if self._file is None:
                self._file = FileStore(self._folder, self._timeout_s)
            return self._file
        if device.type != "cuda":
            raise ValueError(f"offload_activations: expected activations on the CPU or on CUDA devices, got {device}")
        return self._pinned.setdefault(device, PinnedStore(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        return self

    def __repr__(self) -> str:
        return f"Offload({self._count} layers, {self.bytes_out} bytes out, {self.bytes_in} bytes in)"


class AroundLayer:
    """Hooks around the calls of one layer."""

    def __init__(self, offload: Offload, number: int) -> None:
        self._offload, self._number = offload, number
        self._set = threading.local()

    def enter(self, layer: Any, _: Any) -> None:
        """Before the layer's forward."""
        if not (layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()):
            return  # everything that the layer computes would be put away, not its input
        if torch.compiler.is_compiling():
            return
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._offload.put_away(self._number, tensor), self._offload.bring_back
        )
        hooks.__enter__()
        self._set.hooks = [*getattr(self._set, "hooks", []), hooks]

    def leave(self, *_: Any) -> None:
        """After it, however it ended."""
        if getattr(self._set, "hooks", []):
            self._set.hooks.pop().__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> AroundLayer:
        return self


def offload_layers(
    layers: Sequence[nn.Module], *, folder: str | Path, min_bytes: int, keep: int, timeout_s: float
) -> Offload:
    """Puts away the inputs of checkpointed ``layers``, which are called in this order.

    Each has transformers' attribute ``gradient_checkpointing``; arguments are those of
    :func:`~odysseus_kernels.offload_activations`.
    """
    where = Path(folder)
    if not where.is_dir():
        raise ValueError(f"folder: expected a folder that exists, got {str(folder)!r}")
    for name, value in (("min_bytes", min_bytes), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a whole number, 0 or more, got {value!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
    for layer in layers:
        hooks = layer._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), AroundLayer) for hook in hooks):
            raise ValueError(
                "model: expected one whose activations are not offloaded yet: call remove() on what the first call "
                "returned"
            )
    return Offload(layers, where, min_bytes, keep, timeout_s)
