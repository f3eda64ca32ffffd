"""Outputs of a model's parts, put together from all ranks, and texts that ranks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.nn.cut import RING_LAYOUT, natural_order
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["assemble", "bare", "closeness", "observed", "part_names", "share", "whole"]

# What wrappers put into the names of modules and parameters.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_LAYERS, _PARTS = "layers", ("self_attn", "mlp")
_OPERATOR = "verify"


def bare(name: str) -> str:
    """The stock name of a module or parameter of a wrapped model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def part_names(model: nn.Module) -> list[str]:
    """Stock names of what is observed, in the order of the modules: embedding, each layer with its parts, last norm."""
    embedding, names = model.get_input_embeddings(), []  # type: ignore[operator]
    last = ""
    for name, module in model.named_modules():
        path = bare(name).split(".")
        in_layer = len(path) > 2 and path[-3] == _LAYERS and path[-1] in _PARTS
        is_layer = len(path) > 1 and path[-2] == _LAYERS
        if module is embedding or in_layer or is_layer:
            names.append(bare(name))
        if is_layer:
            last = bare(name).rpartition(f".{_LAYERS}.")[0]
    final = [bare(name) for name, _ in model.named_modules() if bare(name) == f"{last}.norm"]
    return names + final


@contextlib.contextmanager
def observed(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Within it, outputs of the named modules are kept, by stock name in the order of running; the last run counts."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen.pop(name, None)
            seen[name] = first.detach().clone()

        return hook

    for name, module in model.named_modules():
        if bare(name) in names:
            handles.append(module.register_forward_hook(keep(bare(name))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def assemble(local: torch.Tensor, group: SequenceGroup, length: int, pieces: int = 1) -> torch.Tensor:
    """[B, L, ...] in the order of the sequence, on every rank, of this rank's part [B, s, ...]; without the padding.

    ``pieces``: in which the sequence is striped.
    """
    over = group.everyone if group.tokens == "sharded" else group.ring
    parts = (
        local
        if over is None or over.size() == 1
        else all_gather(local.contiguous(), over, operator=_OPERATOR, dim=1, config=group.config)
    )
    parts = natural_order(parts, group.zigzag_size, group.slices, pieces)
    if group.zigzag_size > 1:
        parts = parts[:, layout.inverse(group.zigzag_size, parts.shape[1], RING_LAYOUT, parts.device)]
    return parts[:, :length]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a DTensor; every rank calls it.  Plain tensors are whole already."""
    if not isinstance(tensor, DTensor):
        return tensor
    # The innermost dimension first: parts of parts come back in the order in which they were cut.
    for dim in reversed(range(tensor.device_mesh.ndim)):
        placements = list(tensor.placements)
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def share(text: str, group: SequenceGroup) -> list[str]:
    """Every rank's text, in the order of ranks; all ranks that share the sequence call it."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    device = torch.device(group.mesh.device_type)
    size = torch.tensor([data.numel()], device=device)
    sizes = all_gather(size, group.everyone, operator=_OPERATOR, config=group.config).tolist()
    padded = data.new_zeros(max(sizes)).to(device)
    padded[: data.numel()] = data.to(device)
    rows = all_gather(padded[None], group.everyone, operator=_OPERATOR, config=group.config).cpu()
    return [bytes(row[:size].tolist()).decode().strip("\0") for row, size in zip(rows, sizes, strict=True)]


def closeness(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(error, scale): ``|found - truth| / |truth|``, and the factor of ``truth`` that comes closest to ``found``.

    Anything that is not finite where the truth is has an infinite error.
    """
    if found.shape != truth.shape:
        return float("inf"), float("nan")
    a, b = found.detach().double().cpu(), truth.detach().double().cpu()
    size = float(b.norm())
    if size == 0:
        return (0.0, 1.0) if float(a.norm()) == 0 else (float("inf"), float("nan"))
    error, scale = float((a - b).norm()) / size, float((a * b).sum()) / size**2
    return (error if error == error else float("inf")), scale
