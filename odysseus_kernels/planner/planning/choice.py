"""Which strategy on a mesh that is there already: what ``strategy="auto"`` predicts on one rank.

:func:`~.plan.plan` looks for a mesh, too; here seq, ring and dp are given, and strategies are compared on them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.hardware import hardware_for
from odysseus_kernels.planner.planning.machines import MACHINES, machine_for
from odysseus_kernels.planner.planning.models import model_sizes
from odysseus_kernels.planner.planning.pipelining import Pipeline
from odysseus_kernels.planner.planning.plan import SplitPlan, evaluate_split
from odysseus_kernels.planner.planning.splits import Split, why_not

__all__ = ["machine_of_device", "on_mesh", "split_on"]


def machine_of_device(device_name: str) -> str:
    """The machine (:func:`~.machines.machine_for`) whose devices are called ``device_name`` by torch, or ``"cpu"``.

    Raises:
        ValueError: for a device of no machine that is known.
    """
    if device_name.lower() == "cpu":
        return "cpu"
    device = hardware_for(device_name)
    for name, machine in MACHINES.items():
        if machine.device.name == device.name:
            return name
    raise ValueError(
        f"hardware: expected the name of a machine, since none is known with the device {device_name!r}: one of "
        f"{', '.join(MACHINES)}, cpu, or a link of the scale model, such as h100-nvlink@8"
    )


def split_on(strategy: str, *, seq: int, ring: int, dp: int) -> Split:
    """A strategy on a mesh; ``"tsp"`` makes one ring of seq and ring."""
    return Split(strategy, seq * ring, 1, dp) if strategy == "tsp" else Split(strategy, seq, ring, dp)


def on_mesh(
    model_config: Any,
    *,
    seq: int,
    seq_len: int,
    ring: int = 1,
    dp: int = 1,
    hardware: str = "cpu",
    batch: int = 1,
    checkpointing: bool = False,
    dtype: str = "bfloat16",
    strategies: Sequence[str] = STRATEGIES,
    pipeline: Pipeline = "auto",
) -> dict[str, SplitPlan | str]:
    """What a step takes on a given mesh under each strategy, or why the strategy cannot be had.

    Args:
        model_config, hardware, checkpointing, dtype, strategies, pipeline: as those of :func:`~.plan.plan`.
        seq, ring, dp: ranks of each dimension of the mesh.
        seq_len: tokens of each sequence.
        batch: sequences of a step on each rank of dp.

    Raises:
        ValueError: an unknown model, machine or type.

    Example:
        >>> found = on_mesh("llama-3.1-8b", seq=8, seq_len=65536, hardware="h200-nvlink")
        >>> found["odysseus"].seconds.step < found["tp"].seconds.step
        True
        >>> on_mesh("llama-3.1-8b", seq=6, seq_len=65536, hardware="h200-nvlink")["odysseus"]
        'heads: 6 ranks of seq do not divide 32 query heads'
    """
    model, machine = model_sizes(model_config), machine_for(hardware)
    found: dict[str, SplitPlan | str] = {}
    for strategy in strategies:
        split = split_on(strategy, seq=seq, ring=ring, dp=dp)
        found[strategy] = why_not(model, split) or evaluate_split(
            model, split, machine, seq_len, batch * dp, checkpointing, False, dtype.removeprefix("torch."), pipeline
        )
    return found
