"""What an NVLink switch is asked to do for the ranks: which calls it can serve, and how exact its sums are.

``OverlapConfig(reduce="nvls")`` lets it add partial results: a rank reads one *multicast address*, and the switch loads
what lies there in every rank's memory, adds, and returns the sum; a store to such an address reaches all ranks' memory,
which is what ``gather="nvls"`` asks for.
Schedules: ``comm/schedules/switch.py``.  Kernels: ``csrc/cuda/multimem.cu``, operations of the program that enqueues a
whole schedule in one call; kernels of Triton would come back to Python for every sum.

What orders these accesses, and by which promise:

* a multicast address may be accessed by ``multimem`` instructions alone (PTX ISA 9.1, 8.2.3), and is another address of
  memory that products write and read by their ranks' own addresses: an alias (8.2.2);
* what one alias wrote is seen by the other once the writing grid has completed, by grids that begin after it (CUDA
  programming guide, 4.16.5.3).  So sums and stores are grids of their own.  Between the writing one and the reading one
  stand a signal kernel behind the writing one, which stores with release at system scope, and a wait kernel in front of
  the reading one, which acquires at system scope; a sum does not wait by itself, as then its grid could have begun too
  early;
* the guide speaks of one device and the ISA of aliases within a grid (``fence.proxy.alias``), neither of a release and
  an acquire between two grids of two devices.  The kernels also execute that fence, in front of their loads and behind
  their stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SWITCHED_BYTES", "check_switched", "switch_error_bound"]

SWITCHED_BYTES = 16
"""One access of the switch; rows of chunks are multiples of it."""

_ADDED = (torch.float32, torch.bfloat16, torch.float16)


def check_switched(
    name: str, setting: str, mode: str, no_switch: str, summed: Tensor | None, stored: Tensor | None
) -> None:
    """Refuses a call that no switch can serve, on all ranks alike and before anything is sent.

    Args:
        name: of the call.
        setting: what asked for the switch, ``"reduce"`` or ``"gather"``.
        mode: of its settings.
        no_switch: why its ranks have none; empty if they have.
        summed, stored: what is scattered and gathered, [batch, rows, width].

    Raises:
        ValueError: says what was expected, what was given, and what to do.
    """
    asked, instead = f'{setting}="nvls"', f'use {setting}="ranks", the default'
    if no_switch:
        raise ValueError(
            f"{name}: expected GPUs behind one NVLink switch for {asked}, got ranks without: {no_switch}; {instead}"
        )
    if mode == "tiles":
        raise ValueError(
            f'{name}: expected mode "auto", "fused" or "unfused" with {asked}, got "tiles": its kernel moves by itself '
            f"what a switch would; {instead}"
        )
    if summed is not None and summed.dtype not in _ADDED:
        raise ValueError(
            f"{name}: expected float32, bfloat16 or float16 for {asked}, got {summed.dtype}, which no switch adds; "
            f"{instead}"
        )
    for tensor in (summed, stored):
        row = 0 if tensor is None else tensor.shape[-1] * tensor.element_size()
        if row % SWITCHED_BYTES:
            assert tensor is not None
            raise ValueError(
                f"{name}: expected rows of a multiple of {SWITCHED_BYTES} bytes for {asked}, got {tensor.shape[-1]} of "
                f"{tensor.dtype}, which are {row} bytes; pad the features, or {instead}"
            )


def switch_error_bound(parts: Tensor) -> Tensor:
    """How far a sum of the switch may be from the exact one, element by element, whatever order it adds in.

    ``parts`` [ranks, ...] are in the type in which they travel.  N - 1 additions in fp32, each of them wrong by at most
    v times its result, are wrong by at most g = (N - 1) v / (1 - (N - 1) v) times the sum of all magnitudes in any
    order, and the sum is then rounded once to the parts' type, by u of what it is.  PTX names the precision of the
    additions (``.acc::f32``) and not how they are rounded (machine code says to nearest, but not what of), so v and u
    are whole units in the last place, 2**-23 for fp32, 2**-7 for bf16 and 2**-10 for fp16, twice those of rounding to
    nearest; fp32 is not rounded again.

    Returns:
        [...] in fp64.

    Raises:
        ValueError: fp64, or another type that no switch adds.
    """
    if parts.dtype not in _ADDED:
        raise ValueError(f"parts: expected float32, bfloat16 or float16, got {parts.dtype}")
    exact = parts.double()
    magnitude, total = exact.abs().sum(0), exact.sum(0).abs()
    additions = (parts.shape[0] - 1) * torch.finfo(torch.float32).eps
    added = additions / (1 - additions) * magnitude
    if parts.dtype == torch.float32:
        return added
    kind = torch.finfo(parts.dtype)
    return added + kind.eps * (total + added) + kind.smallest_normal * kind.eps
