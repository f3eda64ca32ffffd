"""What ``--level layer`` and ``--level model`` measure, as data: shapes, variants, and the figures to be reached.

A *variant* is a strategy with a mesh, a mode and a transport, or the same compute without any communication, or a peer:
what a user would pick instead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from benchmarks.common.cases import CONTRACT, NEVER_SLOWER, Size, nearest_multiple
from odysseus_kernels.planner.formulas import LayerShape

__all__ = [
    "FSDP_ULYSSES",
    "GATHERING",
    "LAYER_TARGETS",
    "NEVER_SLOWER",
    "PIPELINED",
    "TORCH_TP",
    "TORCH_TP_SP",
    "LayerCase",
    "LayerTarget",
    "Level",
    "Variant",
    "check_heads",
    "make_layer_cases",
    "make_variants",
    "parse_shape",
    "pick_variants",
]

Level = Literal["layer", "model"]

TORCH_TP = "torch TP"
TORCH_TP_SP = "torch SP-TP"
FSDP_ULYSSES = "FSDP2 + Ulysses"


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A Llama-shaped model: decoder layers and the norm behind them, or a small whole model with its loss.

    Attributes:
        label: where the shape comes from.
        level: what of the model is run: ``"layer"`` without embedding and head, or ``"model"`` with loss.
        tokens: L, of one sequence.
        hidden, intermediate, heads, kv_heads: sizes; a head has ``hidden / heads`` numbers.
        layers: decoder layers.
        vocabulary: rows of embedding and head.
    """

    label: str
    level: Level
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int = 1
    vocabulary: int = 256

    @property
    def shape(self) -> LayerShape:
        """As the formulas take it."""
        return LayerShape(self.hidden, self.intermediate, self.heads, self.kv_heads, self.hidden // self.heads)

    @property
    def sizes(self) -> str:
        """Sizes in words, such as ``L4096 d512``."""
        attention = "MHA" if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads} heads"
        depth = f" x{self.layers}" if self.level == "model" or self.layers > 1 else ""
        return f"L{self.tokens} d{self.hidden} i{self.intermediate} {attention}{depth}"

    @property
    def name(self) -> str:
        """All of it, which ``--cases`` is matched with."""
        return f"{self.level} {self.label} {self.sizes}"

    def flops(self, world: int) -> int:
        """Floating-point operations of one rank's products, forward and backward, causal attention counted by half."""
        shape = self.shape
        weights = 2 * self.hidden * (shape.query + shape.key_value) + 3 * self.hidden * self.intermediate
        linear = 6 * self.tokens * weights
        attention = 7 * self.tokens**2 * shape.query  # two products forward, five backward, each half of 2 * L * L * q
        head = 6 * self.tokens * self.hidden * self.vocabulary if self.level == "model" else 0
        return (self.layers * (linear + attention) + head) // world


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: unique within a case.
        kind: ``"ours"``, ``"alone"`` (the compute of a strategy without communication) or ``"peer"``.
        strategy: of ours and of the compute alone.
        ring: ring ranks R outside of seq.
        mode, transport, gathered: of ours.
        pipeline: pieces in which the attention block of ours is pipelined, or None; ``"auto"``: what the model chooses.
            Under Ulysses the most groups of a rank's heads.
    """

    name: str
    kind: Literal["ours", "alone", "peer"]
    strategy: str = ""
    ring: int = 1
    mode: str = ""
    transport: str = ""
    gathered: str = "regather"
    pipeline: int | Literal["auto"] | None = None

    @property
    def family(self) -> str:
        """The strategy and its ring: what shares its compute alone."""
        return self.strategy + (f"+ring{self.ring}" if self.ring > 1 else "")

    @property
    def nearest(self) -> str:
        """The strategy, or the one that a peer is closest to."""
        peers = {TORCH_TP: "tp", TORCH_TP_SP: "tp_sp", FSDP_ULYSSES: "ulysses"}
        return peers[self.name] if self.kind == "peer" else self.strategy

    @property
    def alone(self) -> str:
        """The variant of the same compute without communication; a peer's is that of the strategy it is closest to."""
        return f"{self.nearest} alone" if self.kind == "peer" else f"{self.family} alone"


@dataclasses.dataclass(frozen=True)
class LayerTarget:
    """A ratio of two variants' times that a case of the contract must reach."""

    hidden: int
    variant: str
    base: str
    limit: float


def _targets() -> tuple[LayerTarget, ...]:
    found = []
    for hidden, odysseus, tp_sp in ((512, 1.08, 1.12), (1024, 1.04, 1.06)):
        fused = "odysseus fused symmetric"
        found.append(LayerTarget(hidden, fused, "odysseus alone", odysseus))
        found += [LayerTarget(hidden, fused, peer, 1.0) for peer in (TORCH_TP_SP, FSDP_ULYSSES)]
        found.append(LayerTarget(hidden, "tp_sp fused symmetric", "tp_sp alone", tp_sp))
    # From 8,192 tokens on, where models pipeline by themselves; what costs little here hides much over a link.
    # Ulysses' do so between hosts only.
    found += [
        LayerTarget(1024, f"{strategy} pipelined symmetric", f"{strategy} fused symmetric", NEVER_SLOWER)
        for strategy in GATHERING
    ]
    return tuple(found)


GATHERING = ("tp_sp", "odysseus")
"""Strategies that gather the input of attention: they can keep it, and can gather it piece by piece."""

PIPELINED = (*GATHERING, "ulysses")
"""Strategies whose attention can be pipelined; the last by groups of heads, and without a ring."""

LAYER_TARGETS = _targets()

_CONTRACT_SIZES = ((4096, 512), (8192, 1024))
_HEAD_DIM = 64


def _case(label: str, level: Level, tokens: int, hidden: int, *, groups: int = 1, **others: int) -> LayerCase:
    heads = hidden // _HEAD_DIM
    return LayerCase(label, level, tokens, hidden, hidden * 11 // 4, heads, heads // groups, **others)


def parse_shape(text: str) -> tuple[int, ...]:
    """(L, d) of ``"2048x512"``, or (L, d, layers) of ``"2048x512x4"``.

    Raises:
        ValueError: for anything else, and for a width that is not a multiple of a head's.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)(?:x([1-9][0-9]?))?", text.strip().lower())
    if match is None or int(match[2]) % _HEAD_DIM:
        raise ValueError(
            f"--shapes: expected tokens x hidden size, such as 2048x512, or with a number of layers behind it, such as "
            f"2048x512x2, with a hidden size that {_HEAD_DIM} divides, got {text!r}"
        )
    return tuple(int(number) for number in match.groups() if number is not None)


def make_layer_cases(
    level: Level,
    world_size: int,
    size: Size = "default",
    pattern: str = "",
    *,
    ring: int = 1,
    shapes: Sequence[tuple[int, ...]] = (),
) -> list[LayerCase]:
    """The cases of ``level``, contract first, whose name ``pattern`` is found in; or those of ``shapes``.

    A shape is (L, d) or (L, d, layers); without it there is one layer, and a model has two.

    Lengths are those nearest to the table's that all ranks, and two blocks for each rank, divide.

    Raises:
        ValueError: if the pattern is not an expression, or is found in no case.
    """
    if shapes:
        sizes = {"layers": 1} if level == "layer" else {"layers": 2, "vocabulary": 4096}
        cases = [
            _case("given", level, tokens, hidden, **sizes | dict(zip(("layers",), depth, strict=False)))
            for tokens, hidden, *depth in shapes
        ]
    elif level == "layer":
        cases = {
            "quick": [_case("quick", level, 512, 256), _case("quick GQA", level, 256, 256, groups=2)],
            "default": [
                *(_case(CONTRACT, level, tokens, hidden) for tokens, hidden in _CONTRACT_SIZES),
                _case("GQA", level, 2048, 512, groups=2),
            ],
            "full": [
                *(_case(CONTRACT, level, tokens, hidden) for tokens, hidden in _CONTRACT_SIZES),
                _case("GQA", level, 8192, 1024, groups=4),
                _case("long", level, 16384, 1024),
            ],
        }[size]
    else:
        cases = {
            "quick": [_case("quick", level, 256, 256, layers=2, vocabulary=512)],
            "default": [
                _case("small", level, 2048, 512, layers=2, vocabulary=4096),
                _case("small GQA", level, 2048, 512, groups=2, layers=2, vocabulary=4096),
            ],
            "full": [_case("large", level, 8192, 1024, groups=4, layers=4, vocabulary=32000)],
        }[size]
    multiple = 2 * ring * world_size
    cases = [dataclasses.replace(case, tokens=nearest_multiple(case.tokens, multiple)) for case in cases]
    try:
        kept = [case for case in cases if re.search(pattern, case.name)]
    except re.error as error:
        raise ValueError(f"--cases: {pattern!r} is not a regular expression: {error}") from None
    if not kept:
        names = "\n  ".join(case.name for case in cases)
        raise ValueError(f"--cases: {pattern!r} is found in no row; the rows are\n  {names}")
    return kept


def check_heads(cases: Sequence[LayerCase], world_size: int) -> None:
    """Raises ValueError for a case whose heads the ranks do not divide, as no strategy could compute it."""
    for case in cases:
        if case.kv_heads % world_size:
            raise ValueError(
                f"{case.name}: {world_size} ranks do not divide its {case.kv_heads} key/value heads of {_HEAD_DIM}; "
                f"choose --shapes LxD with a hidden size D that {_HEAD_DIM * world_size} divides"
            )


def make_variants(
    strategies: Sequence[str],
    transports: Sequence[str],
    *,
    ring: int = 1,
    gathered: Sequence[str] = ("regather",),
    peers: Sequence[str] = (),
    pipeline: int | None = None,
    auto: bool = False,
) -> list[Variant]:
    """Each strategy's compute alone, then its modes on each transport; the same across a ring; then the peers.

    ``gathered="save"`` makes variants of its own for strategies that gather an input, and ``pipeline`` one on each
    transport whose attention block is pipelined in so many pieces, or groups of heads.  ``auto`` adds what runs where a
    user sets neither mode nor pieces, and cuts the batch with the model.
    """
    variants = []
    for rings in (1, ring) if ring > 1 else (1,):
        for strategy in strategies:
            family = strategy + (f"+ring{rings}" if rings > 1 else "")
            variants.append(Variant(f"{family} alone", "alone", strategy, rings))
            for how in gathered:
                if how == "save" and strategy not in GATHERING:
                    continue
                suffix = " save" if how == "save" else ""
                variants += [
                    Variant(f"{family} {mode} {transport}{suffix}", "ours", strategy, rings, mode, transport, how)
                    for transport in transports
                    for mode in ("unfused", "fused")
                ]
                if pipeline is not None and strategy in (PIPELINED if rings == 1 else GATHERING):
                    variants += [
                        Variant(f"{family} pipelined {t}{suffix}", "ours", strategy, rings, "fused", t, how, pipeline)
                        for t in transports
                    ]
                if auto:
                    variants += [
                        Variant(f"{family} auto {t}{suffix}", "ours", strategy, rings, "auto", t, how, "auto")
                        for t in transports
                    ]
    return variants + [Variant(peer, "peer") for peer in peers]


def pick_variants(variants: Sequence[Variant], pattern: str) -> list[Variant]:
    """Those that move something and whose name ``pattern`` is found in, and their compute alone; all for ``""``.

    Raises:
        ValueError: if the pattern is not an expression, or is found in no name.
    """
    if not pattern:
        return list(variants)
    try:
        kept = [variant for variant in variants if variant.kind != "alone" and re.search(pattern, variant.name)]
    except re.error as error:
        raise ValueError(f"--variants: {pattern!r} is not a regular expression: {error}") from None
    if not kept:
        names = "\n  ".join(variant.name for variant in variants if variant.kind != "alone")
        raise ValueError(f"--variants: {pattern!r} is found in no name; the names are\n  {names}")
    alone = {variant.alone for variant in kept}
    return [variant for variant in variants if variant in kept or variant.name in alone]
