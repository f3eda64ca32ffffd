"""What is decided about modes, for what, and as a table for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal

from odysseus_kernels.planner.cost_model import MODES

__all__ = ["ChoiceKey", "Decision", "How", "explain"]

How = Literal["asked", "default", "measured", "cached", "model", "only"]

_LEGEND = {
    "asked": "asked: the configuration names the mode",
    "default": "default: what this kind of device does unless it is told to measure or to predict",
    "measured": "measured: medians of timed runs in this process, of the slowest rank",
    "cached": "cached: measured likewise in an earlier process on such a machine",
    "model": "model: predicted by planner.cost_model, not measured",
    "only": "only: no other mode can be had",
}


@dataclasses.dataclass(frozen=True)
class ChoiceKey:
    """For what a mode is chosen.

    Attributes:
        operator, phase: as in :class:`~odysseus_kernels.comm.transport.Call`.
        transport: its name.
        world: ranks of the group.
        dtype: of the products, without ``"torch."``.
        shapes: of what is communicated, in the user's words; equal on all ranks.
        settings: what else of the configuration changes the time (pieces, what is gathered, the reducing type).
        device: name of this rank's device.
        own: sizes that may differ between ranks, such as this rank's output features.

    All but ``device`` and ``own`` have to be equal on all ranks.  ``own`` may differ, but ranks have to come to a new
    key together: sizes of one rank must not change from call to call where all the others' stay.
    """

    operator: str
    phase: str
    transport: str
    world: int
    dtype: str
    shapes: str
    settings: str = ""
    device: str = "cpu"
    own: str = ""

    @cached_property
    def text(self) -> str:
        """The key as a line that is equal in every process."""
        return json.dumps(dataclasses.astuple(self), separators=(",", ":"))

    @cached_property
    def shared(self) -> str:
        """What has to be equal on all ranks, for people to read."""
        parts = (f"{self.operator} {self.phase}", self.shapes, self.dtype, self.settings)
        return ", ".join(part for part in (*parts, f"{self.transport} transport, {self.world} ranks") if part)


@dataclasses.dataclass(frozen=True)
class Decision:
    """A mode and why it was chosen.

    Attributes:
        key: for what.
        mode: what to run; ``"fused/4"`` is fused with shards in four pieces.
        how: ``"measured"`` in this process; ``"cached"``: measured in an earlier one; ``"model"``: predicted;
            ``"only"``: there was no other; ``"asked"``: by the caller; ``"default"``: by the caller's default.
        seconds: of each mode, measured on the slowest rank or predicted; empty where nothing was compared.
        dropped: modes that cannot be had for this key, with the reason.
    """

    key: ChoiceKey
    mode: str
    how: How
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Seconds of unfused over those of the chosen mode (above 1: faster), or None where they are not known."""
        unfused, chosen = self.seconds.get("unfused"), self.seconds.get(self.mode)
        return unfused / chosen if unfused is not None and chosen else None


def explain(decisions: Iterable[Decision]) -> str:
    """The decisions as a table in plain text, one row each, and below it how its figures came about."""
    made = list(decisions)
    if not made:
        return "No mode has been chosen yet."
    rows: list[tuple[str, ...]] = [("operator", "phase", "shapes", "transport", "mode", "how", *MODES, "unfused/mode")]
    for decision in made:
        key = decision.key
        seconds = [_duration(_best(decision.seconds, mode)) for mode in MODES]
        ratio = "-" if decision.ratio is None else f"{decision.ratio:.2f}"
        sizes = ", ".join(part for part in (key.shapes, key.own, key.dtype) if part)
        where = f"{key.transport}, {key.world} ranks"
        rows.append((key.operator, key.phase, sizes, where, decision.mode, decision.how, *seconds, ratio))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_figure = len(rows[0]) - len(MODES) - 1
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if index >= first_figure else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("")
    lines += [text for how, text in _LEGEND.items() if any(decision.how == how for decision in made)]
    for decision in made:
        for mode, reason in decision.dropped.items():
            lines.append(f"{decision.key.operator} {decision.key.phase} cannot be {mode}: {reason}")
    return "\n".join(lines)


def _best(seconds: Mapping[str, float], mode: str) -> float | None:
    """Of a mode, or of the best of its variants: ``"fused/4"`` is fused with shards in four pieces."""
    return min((value for name, value in seconds.items() if name.partition("/")[0] == mode), default=None)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds * 1e6:.1f} us"
