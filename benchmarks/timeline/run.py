"""``--timeline`` of overlap.py: options, the ranks, the files, and a table of what is drawn."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from benchmarks.common import machine
from benchmarks.layers.cases import check_heads, make_layer_cases, make_variants, pick_variants
from benchmarks.operators.cases import MODELS
from benchmarks.scale import run as scale_run
from odysseus_kernels.testing.spawn import RankPool, RanksFailedError

if TYPE_CHECKING:
    from benchmarks.timeline.ranks import TimelineSettings

__all__ = ["add_options", "check_options", "make_document", "make_settings", "run"]

Panels = list[dict[str, Any]]

_REPEATS = 3
_PIECES = 8
_STRATEGY = "odysseus"
_RUN_LIMIT_S = 1800.0
# The operator as the model has it, on few tokens; quick: narrow as well.
_OPERATOR_TOKENS, _QUICK_OPERATOR_TOKENS, _QUICK_DIVISOR = 1024, 512, 8
_LAYER, _QUICK_LAYER = (4096, 512), (512, 256)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of timelines; others say what is drawn: --shapes, --pipeline, --strategies, --variants, --hosts, ..."""
    parser.add_argument(
        "--timeline",
        nargs="?",
        const="",
        metavar="PNG",
        help="instead of measuring, draw who computes, waits, sends and receives when, in an operator and a layer; a "
        "file beside it holds the events for Perfetto (default: in the folder of the results)",
    )


def check_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Ends the program with usage where options do not go together; sets what is drawn where nothing says so."""
    if parsed.timeline is None:
        return
    if parsed.timeline and Path(parsed.timeline).suffix.lower() != ".png":
        parser.error(f"--timeline: expected a path that ends in .png, got {parsed.timeline}")
    unwanted = {"--level model": parsed.level == "model", "--memory": parsed.memory, "--cases": parsed.cases}
    unwanted |= {"--device cuda": parsed.device != "cpu", "--full": parsed.full, "--ring": parsed.ring != 1}
    unwanted |= {"--gathered": parsed.gathered != parser.get_default("gathered"), "--auto": parsed.auto}
    for name, given in unwanted.items():
        if given:
            parser.error(
                f"--timeline: expected it without {name}, for it draws one operator and one layer of CPU ranks"
            )
    for name, most in (("shapes", 1), ("strategies", 1), ("link", 1)):
        given = getattr(parsed, name) or []
        if len(given) > most and (name != "link" or parsed.hosts):
            parser.error(f"--timeline: expected one of --{name}, got {' '.join(map(str, given))}")
    parsed.level = "layer"
    parsed.pipeline = parsed.pipeline or _PIECES
    parsed.repeats = parsed.repeats or _REPEATS


def make_settings(arguments: argparse.Namespace, world_size: int) -> TimelineSettings:
    """What ranks are told.

    Raises:
        ValueError: no such strategy, or no such variant.
    """
    from benchmarks.timeline.ranks import TimelineSettings
    from odysseus_kernels.strategies import STRATEGIES

    strategy = (arguments.strategies or [_STRATEGY])[0]
    if strategy not in STRATEGIES:
        raise ValueError(f"--strategies: expected one of {list(STRATEGIES)}, got {strategy!r}")
    tokens = _QUICK_OPERATOR_TOKENS if arguments.quick else _OPERATOR_TOKENS
    transport = arguments.transports[0]
    shapes = arguments.shapes or [_QUICK_LAYER if arguments.quick else _LAYER]
    made = make_variants([strategy], [transport], pipeline=arguments.pipeline)
    variants = [variant for variant in pick_variants(made, arguments.variants) if variant.kind == "ours"]
    layer = make_layer_cases("layer", world_size, shapes=shapes)[0]
    check_heads([layer], world_size)
    return TimelineSettings(
        operator=next(MODELS[0].layers(tokens, _QUICK_DIVISOR if arguments.quick else 1, world_size)),
        layer=layer,
        variants=tuple(variants),
        transport=transport,
        dtype=arguments.dtype,
        repeats=arguments.repeats,
    )


def run(arguments: argparse.Namespace, program: Path, common: dict[str, Any], results: Path) -> int:
    """Traces, draws, prints; returns the exit status: 1 if any result was wrong or a rank failed, 2 if nothing can run.

    Args:
        arguments: of overlap.py.
        program: overlap.py, which is also what ranks on hosts run.
        common: what every document says of where and when.
        results: folder of files that no path was given for.
    """
    try:
        settings = make_settings(arguments, common["arguments"]["ranks"])
        link, panels = None, None
        if arguments.report_fd is not None:
            return scale_run.run_rank(arguments, lambda rank, size: _trace(rank, size, settings))
        if arguments.hosts:
            (link,) = scale_run.find_links(arguments.link)[1]
            panels = scale_run.ask_ranks(link, program, arguments.command_line)
        elif "RANK" in os.environ:
            panels = _as_rank(arguments, settings)
        else:
            panels = _on_pool(arguments, settings)
    except (ValueError, scale_run.HostsError) as error:
        print(error, file=sys.stderr)
        return 2
    except RanksFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if panels is None else _finish(arguments, make_document(common, panels, link, settings.transport), results)


def make_document(
    common: dict[str, Any], panels: Panels, link: dict[str, Any] | None, transport: str
) -> dict[str, Any]:
    """A trace that Perfetto opens, with what the plot needs beside the events: ``timeline``."""
    metadata: dict[tuple[Any, ...], dict[str, Any]] = {}
    events = []
    for event in (event for panel in panels for event in panel.get("events", ())):
        if event["ph"] == "M":
            metadata[event["name"], event["pid"], event["tid"]] = event
        else:
            events.append(event)
    given, place = common["arguments"], common["machine"]
    ranks = f"{given['ranks']} ranks of {given['threads']} thread{'s' * (given['threads'] > 1)}"
    if link is None:
        memory = "over shared memory" if transport == "symmetric" else "on one host, over TCP connections"
        title = f"{ranks} {memory}, {given['dtype']}, {place['processor']}"
    else:
        rate = f"{link['bits_per_s'] / 1e6:.0f} Mb/s each way"
        title = (
            f"{link['title'][:1].upper()}{link['title'][1:]} ({rate}), {ranks}, {given['dtype']}, {place['processor']}"
        )
    described = [{key: value for key, value in panel.items() if key != "events"} for panel in panels]
    timeline = {**common, "kind": "timeline", "title": title, "link": link, "panels": described}
    return {"traceEvents": [*metadata.values(), *events], "displayTimeUnit": "ms", "timeline": timeline}


def _finish(arguments: argparse.Namespace, document: dict[str, Any], results: Path) -> int:
    panels = document["timeline"]["panels"]
    for panel in panels:
        for why in ("refused", "wrong"):
            if why in panel:
                print(f"{panel['level']} {panel['name']}: {why}: {panel[why]}", file=sys.stderr)
    if not any("spans" in panel for panel in panels):
        return 1
    from benchmarks.timeline.plot import draw

    _print_table(document)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = arguments.output or results / machine.machine_tag(arguments.device)
    image = Path(arguments.timeline) if arguments.timeline else folder / f"timeline-{stamp}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    trace = image.with_suffix(".json")
    trace.write_text(json.dumps(document, allow_nan=False))
    draw(document, image)
    print("\n" + "\n".join(f"wrote {os.path.relpath(path)}" for path in (image, trace)))
    return int(any("wrong" in panel for panel in panels))


def _print_table(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.timeline.intervals import intervals_of, totals_ms
    from benchmarks.timeline.plot import panels_of

    table = Table(title=document["timeline"]["title"], title_justify="left")
    for name in ("level", "variant", "rank", "ms", "computes", "waits", "copies", "sends", "receives"):
        table.add_column(name, justify="left" if name in ("level", "variant") else "right")
    for panel in panels_of(document):
        totals = totals_ms(intervals_of(panel), len(panel["spans"]))
        for rank, (total, (begin, end)) in enumerate(zip(totals, panel["spans"], strict=True)):
            computes = total["own"] + total["peer"] + total["other"]
            figures = (computes, total["wait"], total["copy"], total["send"], total["receive"])
            named = (panel["level"], panel["name"]) if rank == 0 else ("", "")
            table.add_row(*named, str(rank), f"{(end - begin) / 1e3:.1f}", *(f"{figure:.1f}" for figure in figures))
    Console(width=120, highlight=False).print(table)


def _trace(rank: int, world_size: int, settings: TimelineSettings) -> Panels:
    from benchmarks.timeline.ranks import run_timeline

    return run_timeline(rank, world_size, settings)


def _as_rank(arguments: argparse.Namespace, settings: TimelineSettings) -> Panels | None:
    """Under torchrun; what rank 0 draws."""
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo")
    try:
        panels = _trace(dist.get_rank(), dist.get_world_size(), settings)
        return panels if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def _on_pool(arguments: argparse.Namespace, settings: TimelineSettings) -> Panels:
    # Ranks import what they run by its module's name.
    from benchmarks.timeline.ranks import run_timeline

    with RankPool(arguments.ranks, threads=arguments.threads, timeout=_RUN_LIMIT_S) as pool:
        panels: Panels = pool.run(run_timeline, settings)[0]
    return panels
