"""Predicted beside measured steps of layers on the scale model: every strategy, and several rates of the link.

    sudo "$(which python)" -m benchmarks.scale.predictions             measures (a quarter of an hour), judges
    python -m benchmarks.scale.predictions CALIBRATION.json TEST.json  judges what was measured

Compute and link are calibrated from one file, at one rate (``planner/planning/calibration.py``); the other one's shapes
and rates are predicted.  A case is a shape, a rate and a strategy; its step is that of the fastest of its variants, as
measured and as predicted.  Of strategies whose measured steps differ by more than a tenth, the predicted order has to
be the measured one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odysseus_kernels.planner.cost_model import MODEL_MARGIN
from odysseus_kernels.planner.formulas import STRATEGIES, Traffic, replicated_traffic, traffic
from odysseus_kernels.planner.planning.calibration import row_model
from odysseus_kernels.planner.planning.machines import Machine, machine_for
from odysseus_kernels.planner.planning.measured import with_measured
from odysseus_kernels.planner.planning.pipelining import form_of
from odysseus_kernels.planner.planning.split_bytes import StepTraffic
from odysseus_kernels.planner.planning.split_memory import layer_saved
from odysseus_kernels.planner.planning.split_seconds import split_seconds
from odysseus_kernels.planner.planning.splits import Split

__all__ = ["CALIBRATION", "LIMITS", "TESTS", "Judgement", "Prediction", "calibrated", "draw", "judge", "predictions"]

MACHINE = "h100-nvlink@8"
"""Whose CPU ranks and latencies are taken; rates are calibrated."""
CALIBRATION = (("512x256", "1024x512", "4096x256"), ("160mbit",))
"""Shapes and rates from which compute and link are calibrated."""
TESTS = (("2048x256", "3072x256", "1536x384"), ("80mbit", "160mbit", "320mbit"))
"""Shapes and rates that are predicted."""
LIMITS = {"median": 0.15, "worst": 0.35}
"""Largest relative errors of cases."""

_ELEMENT_SIZE = 4
_PIECES = 8


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One variant's step on one shape behind one link, in seconds.

    Attributes:
        rate: of the link as it was set, bits/s.
        shape: as ``--shapes`` takes it.
        strategy, mode: the variant's; mode is ``"unfused"``, ``"fused"`` or ``"pipelined"``.
        predicted, measured: of a step.
    """

    rate: float
    shape: str
    strategy: str
    mode: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How far cases are off.

    Attributes:
        cases: the fastest variant of each shape, rate and strategy.
        median, worst: of the cases' absolute errors.
        pairs: pairs of strategies at one shape and rate whose measured steps differ by more than a tenth.
        swapped: those whose predicted order is the other one, in words.
    """

    cases: tuple[Prediction, ...]
    median: float
    worst: float
    pairs: int
    swapped: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether errors are within :data:`LIMITS` and no pair is swapped."""
        return self.median <= LIMITS["median"] and self.worst <= LIMITS["worst"] and not self.swapped


def predictions(document: Mapping[str, Any], machine: Machine, bytes_per_s: float) -> list[Prediction]:
    """Every variant of a results file of ``--hosts 2 --level layer``, beside what a calibrated machine predicts.

    Args:
        document: the file's contents.
        machine, bytes_per_s: of :func:`calibrated`: a machine, and the rate that its link was set to.

    Raises:
        ValueError: if it is a file of another kind.
    """
    if document.get("kind") != "scale":
        raise ValueError(f'expected a result of kind "scale", got kind {document.get("kind")!r}')
    found = []
    for part in document["parts"]:
        for row in part["rows"]:
            if "variants" not in row:
                raise ValueError("expected rows of layers, got operators")
            for entry in row["entries"]:
                variant = row["variants"][entry["name"]]
                if variant["kind"] == "ours":
                    behind = _faster_link(machine, part["bits_per_s"] / 8 / bytes_per_s)
                    found.append(_prediction(row, variant, entry["median_s"], behind, part["bits_per_s"]))
    return found


def _prediction(
    row: Mapping[str, Any], variant: Mapping[str, Any], measured: float, machine: Machine, rate: float
) -> Prediction:
    model, strategy = row_model(row), variant["strategy"]
    split = Split(strategy, row["world"] // variant["ring"], variant["ring"])
    sizes = {"ring": split.ring, "element_size": _ELEMENT_SIZE}
    layer: Traffic = traffic(
        model.layer, strategy, split.seq, tokens=row["tokens"], gathered=variant["gathered"], **sizes
    )
    ends = replicated_traffic(model.layer.hidden, strategy, split.seq, **sizes)
    seconds = split_seconds(
        model,
        split,
        StepTraffic(dict(layer), ends, {}, {}, model.layers),
        machine,
        tokens=row["tokens"],
        length=row["tokens"],
        dtype="float32",
        layer_bytes=layer_saved(model, split, tokens=row["tokens"], element_size=_ELEMENT_SIZE),
        checkpointing=False,
        form=form_of(model, split, machine, length=row["tokens"], dtype="float32", pipeline=variant["pipeline"]),
    )
    mode = "pipelined" if variant["pipeline"] else variant["mode"]
    predicted = seconds.compute + getattr(seconds, f"exposed_{mode}")
    return Prediction(rate, f"{row['tokens']}x{row['hidden']}", strategy, mode, predicted, measured)


def calibrated(path: Path) -> tuple[Machine, float, list[str]]:
    """(the scale model's machine with a file's rates, the rate in bytes/s to which its link was set, notes).

    Raises:
        ValueError: as ``with_measured``, or if the file has no single rate.
    """
    machine, notes = with_measured(machine_for(MACHINE), path, "float32")
    rates = {part["bits_per_s"] / 8 for part in json.loads(path.read_text(encoding="utf-8"))["parts"]}
    if len(rates) != 1:
        raise ValueError(f"{path.name}: expected one rate of the link to calibrate from, got {len(rates)}")
    return machine, rates.pop(), notes


def _faster_link(machine: Machine, factor: float) -> Machine:
    """The machine behind a link that is set to ``factor`` times its rate, and reached by the same share."""
    rate = machine.device.link_bytes_per_s * factor
    device = dataclasses.replace(machine.device, link_bytes_per_s=rate)
    return dataclasses.replace(machine, device=device, network_bytes_per_s=rate)


def judge(found: Sequence[Prediction]) -> Judgement:
    """The cases' errors, and the order of strategies.

    Raises:
        ValueError: without predictions.
    """
    if not found:
        raise ValueError("expected at least one prediction")
    groups: dict[tuple[float, str], dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        groups[one.rate, one.shape][one.strategy].append(one)
    cases: list[Prediction] = []
    pairs, swapped = 0, []
    for (rate, shape), strategies in groups.items():
        best = [
            dataclasses.replace(
                min(variants, key=lambda one: one.measured), predicted=min(one.predicted for one in variants)
            )
            for variants in strategies.values()
        ]
        cases += best
        for one in best:
            for other in best:
                if one.measured < (1 - MODEL_MARGIN) * other.measured:
                    pairs += 1
                    if one.predicted >= other.predicted:
                        swapped.append(f"{shape} at {rate / 1e6:g} Mb/s: {one.strategy} before {other.strategy}")
    errors = [abs(one.error) for one in cases]
    return Judgement(tuple(cases), statistics.median(errors), max(errors), pairs, tuple(swapped))


def _measure(shapes: Sequence[str], links: Sequence[str], repeats: int, folder: Path) -> Path:
    before = set(folder.glob("scale-*.json"))
    command = [sys.executable, str(Path(__file__).parents[1] / "overlap.py"), "--hosts", "2", "--level", "layer"]
    command += ["--link", *links, "--shapes", *shapes, "--strategies", *STRATEGIES, "--no-peers"]
    command += ["--pipeline", str(_PIECES), "--repeats", str(repeats), "--output", str(folder)]
    subprocess.run(command, check=True)
    (path,) = set(folder.glob("scale-*.json")) - before
    return path


def _print(found: Sequence[Prediction], judgement: Judgement, notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, highlight=False)
    for note in notes:
        console.print(f"calibration: {note}", soft_wrap=True)
    table = Table(title="Steps of one layer, seconds: predicted / measured", title_justify="left", box=None)
    for column in ("link, Mb/s", "shape", "strategy", "unfused", "fused", "pipelined"):
        table.add_column(column, justify="right" if column[0] != "s" else "left")
    grouped: dict[tuple[float, str, str], dict[str, Prediction]] = defaultdict(dict)
    for one in found:
        grouped[one.rate, one.shape, one.strategy][one.mode] = one
    for (rate, shape, strategy), modes in grouped.items():
        cells = []
        for mode in ("unfused", "fused", "pipelined"):
            one = modes.get(mode)
            cells.append("" if one is None else f"{one.predicted:.3f} / {one.measured:.3f} {one.error:+.0%}")
        table.add_row(f"{rate / 1e6:g}", shape, strategy, *cells)
    console.print(table)
    errors = [abs(one.error) for one in found]
    console.print(
        f"{len(judgement.cases)} cases, the fastest variant of each: median error {judgement.median:.1%} (limit "
        f"{LIMITS['median']:.0%}), worst {judgement.worst:.1%} (limit {LIMITS['worst']:.0%}); all {len(found)} "
        f"variants: median {statistics.median(errors):.1%}, worst {max(errors):.1%}",
        soft_wrap=True,
    )
    console.print(
        f"{judgement.pairs} pairs of strategies differ by more than {MODEL_MARGIN:.0%}: "
        f"{len(judgement.swapped)} are predicted in the other order"
    )
    for text in judgement.swapped:
        console.print(f"  {text}")


def draw(found: Sequence[Prediction], judgement: Judgement, path: Path) -> None:
    """Predicted over measured steps of every variant, with the limits of a case as bands."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 6))
    least = 0.8 * min(min(one.predicted, one.measured) for one in found)
    most = 1.25 * max(max(one.predicted, one.measured) for one in found)
    ends = [least, most]
    for limit, shade in ((LIMITS["worst"], 0.08), (LIMITS["median"], 0.12)):
        axis.fill_between(
            ends, [x * (1 - limit) for x in ends], [x * (1 + limit) for x in ends], color="#1f4e79", alpha=shade,
            linewidth=0, label=f"within {limit:.0%}",
        )  # fmt: skip
    axis.plot(ends, ends, color="black", linewidth=0.8)
    markers = {"unfused": "o", "fused": "s", "pipelined": "^"}
    colors = dict(zip(STRATEGIES, ("#7f6000", "#c55a11", "#548235", "#1f4e79", "#7030a0"), strict=True))
    for strategy in STRATEGIES:
        for mode, marker in markers.items():
            points = [one for one in found if (one.strategy, one.mode) == (strategy, mode)]
            if points:
                axis.scatter(
                    [one.measured for one in points], [one.predicted for one in points], marker=marker, s=26,
                    color=colors[strategy], label=f"{strategy} {mode}", linewidth=0, alpha=0.85,
                )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, s", ylabel="predicted, s")
    axis.set_title(
        f"Scale model, 2 hosts: steps of one layer\nmedian error of {len(judgement.cases)} cases "
        f"{judgement.median:.1%}, worst {judgement.worst:.1%}",
        fontsize=10,
    )
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures or reads, prints, and writes ``predictions.json`` and ``.png``; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to calibrate from, and to predict")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are measured")
    parser.add_argument("--output", type=Path, default=Path("outputs/predictions"), help="folder of what is written")
    parsed = parser.parse_args(arguments)
    if len(parsed.files) not in (0, 2):
        parser.error(f"expected no files, or one to calibrate from and one to predict, got {len(parsed.files)}")
    parsed.output.mkdir(parents=True, exist_ok=True)
    files = parsed.files or [_measure(*what, parsed.repeats, parsed.output) for what in (CALIBRATION, TESTS)]
    try:
        machine, rate, notes = calibrated(files[0])
        document = json.loads(files[1].read_text(encoding="utf-8"))
        found = predictions(document, machine, rate)
        judgement = judge(found)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    _print(found, judgement, notes)
    written = {
        "schema": 1,
        "kind": "predictions",
        **{name: document[name] for name in ("date", "machine", "commit")},
        "files": [path.name for path in files],
        "calibration": notes,
        "median": judgement.median,
        "worst": judgement.worst,
        "pairs": judgement.pairs,
        "swapped": judgement.swapped,
        "variants": [dataclasses.asdict(one) for one in found],
    }
    (parsed.output / "predictions.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(found, judgement, parsed.output / "predictions.png")
    print(f"wrote {parsed.output / 'predictions.json'} and .png")
    return 0 if judgement.reached else 1


if __name__ == "__main__":
    sys.exit(main())
