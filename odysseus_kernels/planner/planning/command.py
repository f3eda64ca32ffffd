"""``python -m odysseus_kernels plan``: its arguments, and what it prints.

    python -m odysseus_kernels plan --model llama-3.1-8b --gpus 64 --seq 262144 --hardware h200-nvlink --checkpointing

Exit status: 0 if a split fits, 1 if none does, 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from odysseus_kernels.planner.planning.machines import MACHINES
from odysseus_kernels.planner.planning.map import draw_map
from odysseus_kernels.planner.planning.models import bundled_models
from odysseus_kernels.planner.planning.plan import plan
from odysseus_kernels.planner.planning.table import print_plan

__all__ = ["add_plan", "run_plan"]

_FITS, _FITS_NOT, _WRONG = 0, 1, 2


def add_plan(commands: Any) -> None:
    """Adds the command to a parser's."""
    parser = commands.add_parser(
        "plan", help="which strategy and mesh to train a model with", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help=f"a config.json, or one of {', '.join(bundled_models())}")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, all of which are used")
    parser.add_argument("--seq", type=int, required=True, metavar="L", help="tokens of each sequence")
    parser.add_argument(
        "--hardware", default="h200-nvlink",
        help=f"{', '.join(MACHINES)} (with +100g, +200g, +400g or +800g for another network), cpu, or a link of the "
        f"scale model such as h100-nvlink@8 (default h200-nvlink)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step in all (default 1)")
    parser.add_argument("--checkpointing", action="store_true", help="layers are recomputed in backward")
    parser.add_argument("--offload", action="store_true", help="layers' inputs wait in the host's memory")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16, float32 or float64")
    parser.add_argument("--strategies", nargs="+", metavar="S", help="which to look at (default all)")
    parser.add_argument(
        "--pipeline", type=_pipeline, default="auto", metavar="P",
        help="attention in so many pieces, or in at most so many groups of heads under ulysses; auto (default); none",
    )  # fmt: skip
    parser.add_argument("--measured", metavar="RESULTS.json", help="rates from a result of benchmarks/overlap.py")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--all", action="store_true", help="print all splits")
    parser.add_argument("--plot", metavar="MAP.png", help="draw the best strategy by length and ranks")


def run_plan(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    arguments: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("hardware", "batch", "checkpointing", "offload", "dtype", "measured", "pipeline")
    }
    if options.strategies:
        arguments["strategies"] = tuple(options.strategies)
    try:
        found = plan(options.model, options.gpus, options.seq, **arguments)
        if options.plot:
            draw_map(found, options.plot, model_config=options.model, **arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return _WRONG
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print_plan(found, everything=options.all)
    return _FITS if found.best is not None else _FITS_NOT


def _pipeline(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return text if text == "auto" else None
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number, auto or none, got {text!r}")
