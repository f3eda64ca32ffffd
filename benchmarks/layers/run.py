"""``--level layer`` and ``--level model`` of overlap.py: options, settings, document, output."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.layers.cases import Variant, check_heads, make_layer_cases, make_variants, parse_shape, pick_variants
from odysseus_kernels.config import MOST_PIECES

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.layers.ranks import LayerSettings

__all__ = ["LEVELS", "add_options", "check_options", "make_layer_document", "make_layer_settings", "print_document"]

LEVELS = ("operator", "layer", "model")
_REPEATS = {"quick": 3, "default": 5, "full": 5}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of these levels."""
    group = parser.add_argument_group("levels of layers and models (CPU ranks)")
    group.add_argument(
        "--level",
        choices=LEVELS,
        default="operator",
        help="operators alone, one decoder layer under each strategy beside what a user would pick instead, or a small "
        "whole model",
    )
    group.add_argument("--strategies", nargs="+", metavar="NAME", help="of those that the package has (default: all)")
    group.add_argument("--ring", type=int, default=1, metavar="R", help="also each strategy across R ring ranks")
    group.add_argument(
        "--gathered", nargs="+", choices=("regather", "save"), default=["regather"], help="what backward keeps"
    )
    group.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="LxD",
        help="tokens x hidden size instead of the table, as 2048x512; of 2 layers, one behind the other: 2048x512x2",
    )
    group.add_argument(
        "--pipeline",
        type=int,
        metavar="P",
        help="also attention pipelined in P pieces, under Ulysses in up to P groups of heads (default with --hosts: 8)",
    )
    group.add_argument(
        "--auto", action="store_true", help="also what runs where neither mode nor pieces are set, as in most scripts"
    )
    group.add_argument("--no-peers", action="store_true", help="leave out torch's own parallelism")
    group.add_argument(
        "--variants",
        default="",
        metavar="REGEX",
        help="only ways to compute a layer (with --hosts also an operator) whose name this is found in, such as "
        "'pipelined', and their compute alone",
    )


def check_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Ends the program with usage where options do not go together; sets the default number of rounds."""
    if parsed.level == "operator":
        given = (parsed.strategies, parsed.no_peers, parsed.shapes, parsed.pipeline, parsed.auto)
        if parsed.ring != 1 or parsed.gathered != parser.get_default("gathered") or any(given):
            parser.error(
                "--ring, --gathered, --strategies, --shapes, --pipeline, --auto and --no-peers: expected --level layer "
                "or model beside them"
            )
        if parsed.variants and parsed.hosts is None and parsed.timeline is None:
            parser.error("--variants: expected --level layer or model, --hosts or --timeline beside it")
        return
    try:
        parsed.shapes = [parse_shape(text) for text in parsed.shapes]
    except ValueError as error:
        parser.error(str(error))
    if parsed.pipeline is not None and not 2 <= parsed.pipeline <= MOST_PIECES:
        parser.error(f"--pipeline: expected 2 to {MOST_PIECES} pieces, got {parsed.pipeline}")
    if parsed.device != "cpu":
        parser.error(f"--level {parsed.level}: expected --device cpu, got {parsed.device}")
    if parsed.memory:
        parser.error(f"--level {parsed.level}: shows memory beside the times; leave out --memory")
    ranks = int(os.environ.get("WORLD_SIZE", parsed.ranks))
    if parsed.ring < 1 or ranks % parsed.ring:
        parser.error(f"--ring: expected a number that divides the {ranks} ranks, got {parsed.ring}")
    if parsed.repeats is None:
        parsed.repeats = _REPEATS[parsed.size]


def _known() -> list[str]:
    from odysseus_kernels.strategies import STRATEGIES

    return list(STRATEGIES)


def make_layer_settings(arguments: argparse.Namespace, world_size: int) -> LayerSettings:
    """What ranks are told.

    Raises:
        ValueError: no case or variant is left, a strategy that the package does not have, or heads that the ranks do
            not divide.
    """
    from benchmarks.layers import peers
    from benchmarks.layers.ranks import LayerSettings

    known = _known()
    strategies = arguments.strategies or known
    for name in strategies:
        if name not in known:
            raise ValueError(f"--strategies: expected some of {known}, got {name!r}")
    present = [] if arguments.no_peers else peers.present_peers(arguments.level)
    variants: list[Variant] = make_variants(
        strategies,
        arguments.transports,
        ring=arguments.ring,
        gathered=arguments.gathered,
        peers=present,
        pipeline=arguments.pipeline,
        auto=arguments.auto,
    )
    variants = pick_variants(variants, arguments.variants)
    cases = make_layer_cases(
        arguments.level, world_size, arguments.size, arguments.cases, ring=arguments.ring, shapes=arguments.shapes
    )
    check_heads(cases, world_size)
    return LayerSettings(tuple(cases), tuple(variants), arguments.dtype, arguments.repeats)


def make_layer_document(
    arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], common: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is written to the JSON file; ``common`` says where and when."""
    from benchmarks.layers import peers
    from benchmarks.layers import report as layer_report

    summarized = [layer_report.summarize_layer({**row, "dtype": arguments.dtype}) for row in rows]
    names = ("level", "ring", "gathered", "strategies", "variants")
    present = [] if arguments.no_peers else peers.present_peers(arguments.level)
    given = {**common["arguments"], **{name: getattr(arguments, name) for name in names}}
    return {
        **common,
        "kind": arguments.level,
        "arguments": given,
        "absent": {} if arguments.no_peers else peers.absent_peers(arguments.level),
        "all_to_all": peers.describe_ulysses() if peers.FSDP_ULYSSES in present else None,
        "rows": summarized,
        "targets": layer_report.judge_layers(summarized),
    }


def print_document(console: Console, document: dict[str, Any], *, note: str, judged: bool) -> None:
    """The tables."""
    from benchmarks.layers import report as layer_report

    if document["all_to_all"]:
        console.print(f"FSDP2 + Ulysses: the all-to-all is that of {document['all_to_all']}", soft_wrap=True)
    layer_report.print_layers(console, document, note=note, judged=judged)
