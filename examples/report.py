"""What a training run leaves: a JSON file, a table, and a plot of all runs in the output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["plot_runs", "print_table", "write_run"]

# Runs that agree in these must have equal losses; whoever plots others on one another is told.
_COMPARABLE = ("seq_len", "batch_size", "hidden", "layers", "heads", "kv_heads", "lr", "seed", "text_limit")


def write_run(folder: Path, run: dict[str, Any]) -> Path:
    """Writes ``loss-N<ranks>-<strategy>.json`` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"loss-N{run['ranks']}-{run['name']}.json"
    path.write_text(json.dumps(run, indent=1))
    return path


def print_table(run: dict[str, Any]) -> None:
    """Prints the figures of a run."""
    losses, memory = run["losses"], run["peak_memory_bytes"]
    steps = sorted(int(step) for step in losses)
    ranks = "1 process" if run["ranks"] == 1 else f"{run['ranks']} ranks"
    table = Table(title=f"{ranks}, {run['parameters'] / 1e6:.1f} M parameters\n{run['how']}")
    table.add_column("measured in this run")
    table.add_column("value", justify="right")
    table.add_row(f"loss at step {steps[0]}", f"{losses[str(steps[0])]:.4f}")
    table.add_row(f"loss at step {steps[-1]}", f"{losses[str(steps[-1])]:.4f}")
    for step, bits in run["validation_bits_per_byte"].items():
        table.add_row(f"validation, bits per byte, after step {step}", f"{bits:.4f}")
    table.add_row("tokens/s, all ranks, median step", f"{run['tokens_per_second']:,.0f}")
    for rank, peak in enumerate(memory):
        table.add_row(f"peak resident memory, rank {rank}", f"{peak / 2**20:,.0f} MiB")
    # Wide enough where there is no terminal to ask, as in a log file.
    Console(width=100).print(table)


def plot_runs(folder: Path) -> Path:
    """Draws the losses of every ``loss-N*.json`` in ``folder`` into ``loss.png`` there, one over another.

    Below them, where a single process's run is among them: how far each is from it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [json.loads(path.read_text()) for path in folder.glob("loss-N*.json")]
    runs.sort(key=lambda run: (run["ranks"], run["name"]))
    figure, (curves, differences) = plt.subplots(
        2, figsize=(8, 7), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    single = runs[0]["losses"] if runs[0]["ranks"] == 1 else {}
    for index, run in enumerate(runs):
        steps = sorted(int(step) for step in run["losses"])
        label = "single process, stock model" if run["ranks"] == 1 else f"{run['ranks']} ranks, {run['how']}"
        if any(run["settings"][name] != runs[0]["settings"][name] for name in _COMPARABLE):
            label += " (other settings)"
        # Equal curves lie on one another: later ones are thinner and dashed, so that all can be seen.
        width = 1.2 + 6.0 * (1 - index / max(1, len(runs) - 1))
        losses = run["losses"]
        style = ("-", "--", ":", "-.")[index % 4]
        (line,) = curves.plot(steps, [losses[str(step)] for step in steps], style, linewidth=width, label=label)
        common = [step for step in steps if str(step) in single]
        if common and run["ranks"] > 1:
            apart = [abs(losses[str(step)] / single[str(step)] - 1) for step in common]
            differences.plot(common, apart, color=line.get_color(), linewidth=1.0)
    curves.set(ylabel="training loss, nats per byte", title="Byte-level Llama on Python's own sources")
    differences.set(xlabel="step", ylabel="relative difference\nto the single process", yscale="log")
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    curves.legend(fontsize="small")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
