"""What it costs that a batch says how it was cut, and that a model compares it and looks at itself: by themselves.

They send nothing of their own (what ranks compare stands in the signature of the next call), so their time on a rank is
what a step takes longer. Differences between whole steps with and without them would drown in noise: these are
microseconds beside milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor

from benchmarks.common.ranks import largest_over_ranks
from benchmarks.layers.runnable import Runnable
from odysseus_kernels.integrations.inputs import opened
from odysseus_kernels.integrations.intact import check_intact
from odysseus_kernels.nn.cut import KEY, SequenceCut, checksums

__all__ = ["measure_checks"]


def measure_checks(whole: dict[str, Tensor], runnable: Runnable, calls: int) -> dict[str, float]:
    """Seconds of each part of a step, the slowest rank's median.

    Args:
        whole: the whole batch, before it was cut.
        runnable: a variant of ours.
        calls: how often each part is timed.
    """
    model, part = runnable.model, runnable.batch
    assert model is not None
    group = model.sequence_group
    length = whole["input_ids"].shape[1]

    def describe() -> None:
        SequenceCut.of(group, length, length).tensor(checksums(whole, whole["input_ids"].shape[0]))

    def look() -> None:
        check_intact(model, group)

    def compare() -> None:
        labels = part.get("shift_labels")
        with opened(model, part[KEY], part["input_ids"], position_ids=None, attention_mask=None, targets=labels):
            pass

    def scope() -> None:
        with group.steps.step():
            pass

    parts = {"descriptor": describe, "model": look, "comparison": compare, "step": scope}
    return largest_over_ranks({name: _median(call, calls) for name, call in parts.items()})


def _median(call: Callable[[], None], calls: int) -> float:
    samples = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)
