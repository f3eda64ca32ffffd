"""Layers, a model and peers on ranks: small shapes, real operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from covering import cover

from benchmarks.layers import peers
from benchmarks.layers.cases import LayerCase, Variant, make_variants
from benchmarks.layers.ranks import LayerSettings, run_layer_rows
from benchmarks.layers.workload import LayerWorkload
from odysseus_kernels.strategies import STRATEGIES
from odysseus_kernels.testing.spawn import RankPool, RankPools

LAYER = LayerCase("small", "layer", 32, 64, 96, 4, 4)
GQA = LayerCase("small GQA", "layer", 32, 64, 96, 4, 1)
LONG = LayerCase("long", "layer", 256, 64, 96, 4, 2)
GROWING = {world: LayerCase("growing", "layer", 512 * world, 256, 704, 8, 8) for world in (2, 4)}
MODEL = LayerCase("small", "model", 32, 64, 96, 4, 2, layers=2, vocabulary=40)
TRANSPORTS = ("symmetric", "collective")
ROTATIONS = 2  # while they are made, angles and their doubled copy stand beside cosines and sines


def _settings(case: LayerCase, variants: Sequence[Variant], dtype: str = "float32") -> LayerSettings:
    """Of checks, a median only has to be there."""
    return LayerSettings((case,), tuple(variants), dtype, repeats=1, check_calls=3)


# Of which more is looked at than that they are right.
_LOOKED_AT = (
    "tp fused collective",
    "tp_sp fused collective save",
    "ulysses fused collective",
    "ulysses pipelined symmetric",
)


def _by_default(variants: Sequence[Variant]) -> list[Variant]:
    """Those in which every two of strategy, mode, transport, gathered and pipeline meet, and what has no such values.

    All with --complete: bytes and memory of a strategy are those of the same formulas in every mode, on each transport.
    """
    ours = [one for one in variants if one.kind == "ours"]
    values = [(v.strategy, (v.mode, v.pipeline), v.transport, v.gathered) for v in ours]
    axes = [list(dict.fromkeys(axis)) for axis in zip(*values, strict=True)]
    rows = [tuple(axis.index(value) for axis, value in zip(axes, row, strict=True)) for row in values]
    always = [row for row, one in zip(rows, ours, strict=True) if one.name in _LOOKED_AT]
    found = cover(rows, always)
    kept = [one for row, one in zip(rows, ours, strict=True) if row in found]
    return [one for one in variants if one.kind != "ours" or one in kept]


def _check_row(row: dict[str, Any]) -> None:
    assert row["wrong"] == []
    for name, entry in row["bytes"].items():
        assert entry["equal"], (name, entry)
        assert sum(entry["formula"].values()) > 0
    for name, entry in row["memory"].items():
        if "formula" in entry:
            formula = sum(entry["formula"].values())
            assert abs(entry["saved"] - formula) <= 0.01 * formula, (name, entry)
    assert row["checks"].keys() == row["bytes"].keys()
    for parts in row["checks"].values():
        assert parts.keys() == {"descriptor", "model", "comparison", "step"}
        assert all(seconds > 0 for seconds in parts.values())
    assert all(len(values) == 1 and values[0] > 0 for values in row["samples_s"].values())


def _run_with_a_wrong_layer(rank: int, world_size: int, settings: LayerSettings) -> list[dict[str, Any]]:
    right = LayerWorkload.runnable

    def wrong(self: LayerWorkload, model: Any, *others: Any) -> Any:
        # One weight of one rank, scaled by a thousandth, must be enough.
        if rank == 1:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.to_local().mul_(1.001)
        return right(self, model, *others)

    LayerWorkload.runnable = wrong  # type: ignore[method-assign]
    try:
        return run_layer_rows(rank, world_size, settings)
    finally:
        LayerWorkload.runnable = right  # type: ignore[method-assign]


def _plain_all_to_all(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens of numbered elements, their heads and the way back, which is the gradient's too."""
    import torch.distributed as dist

    whole = torch.arange(2 * 6 * 4 * 3, dtype=torch.float32).view(2, 6, 4, 3)
    mine = whole.chunk(world_size, 1)[rank].contiguous().requires_grad_()
    heads = peers.PlainAllToAll.apply(dist.group.WORLD, mine, 2, 1)
    heads.backward(heads.detach())
    return heads.detach(), mine.detach(), mine.grad


@pytest.mark.without_ranks
def test_all_variants_and_peers_are_right_counted_and_timed(request: pytest.FixtureRequest) -> None:
    with RankPool(2) as pool:
        variants = make_variants(
            tuple(STRATEGIES),
            TRANSPORTS,
            gathered=("regather", "save"),
            peers=peers.present_peers("layer"),
            pipeline=2,
            auto=True,
        )
        fused = [one for one in variants if one.kind != "ours" or (one.mode, one.transport) == ("fused", "symmetric")]
        if not request.config.getoption("complete"):
            variants = _by_default(variants)
        (row,), again = pool.run(run_layer_rows, _settings(LAYER, variants))
        assert [row] == again
        (gqa,) = pool.run(run_layer_rows, _settings(GQA, fused))[0]
        for one in (row, gqa):
            _check_row(one)
        assert row["refused"] == {}
        assert set(row["samples_s"]) == {variant.name for variant in variants}
        for peer, twin in (
            ("torch TP", "tp fused"),
            ("torch SP-TP", "tp_sp fused"),
            ("FSDP2 + Ulysses", "ulysses fused"),
        ):
            saved = " save" if "tp_sp" in twin else ""
            formula = row["bytes"][f"{twin} collective{saved}"]["formula"]
            assert row["peer_bytes"][peer] == sum(formula.values())
        # One key/value head on two ranks: ours share it, the peers cannot; and it makes no groups.
        assert set(gqa["refused"]) == {*peers.present_peers("layer"), "ulysses pipelined symmetric"}
        assert "which make no groups on 2 ranks" in gqa["refused"]["ulysses pipelined symmetric"]
        operators = {name.split()[1] for name in row["bytes"]["ulysses pipelined symmetric"]["formula"]}
        assert "pipelined_ulysses" in operators and "linear_all_to_all" not in operators

        own = make_variants(("odysseus",), ("symmetric",))
        (row,) = pool.run(_run_with_a_wrong_layer, _settings(LAYER, own))[0]
        assert row["wrong"] == ["odysseus unfused symmetric", "odysseus fused symmetric"]
        assert list(row["samples_s"]) == ["odysseus alone"]

        model = make_variants(tuple(STRATEGIES), ("symmetric",))
        (row,) = pool.run(run_layer_rows, _settings(MODEL, model))[0]
        _check_row(row)
        assert row["loss"] > 0

        (row,) = pool.run(run_layer_rows, _settings(LAYER, own, "bfloat16"))[0]
        _check_row(row)

        whole = torch.arange(2 * 6 * 4 * 3, dtype=torch.float32).view(2, 6, 4, 3)
        for rank, (heads, mine, back) in enumerate(pool.run(_plain_all_to_all)):
            assert torch.equal(heads, whole.chunk(2, 2)[rank])
            assert torch.equal(back, mine)


def test_peak_at_a_fixed_share_of_the_sequence_does_not_grow_with_the_ranks(ranks: RankPools) -> None:
    """Beside the rotation's cosines and sines, which are those of all tokens: 2 L head_dim."""
    peaks = {}
    for world, case in GROWING.items():
        variants = make_variants(("odysseus",), ("symmetric",))[-1:]
        (row,) = ranks(world).run(run_layer_rows, _settings(case, variants))[0]
        _check_row(row)
        (memory,) = row["memory"].values()
        peaks[world] = memory["peak"] + memory["gradients"] - ROTATIONS * memory["formula"]["rotation"]
    assert peaks[4] <= 1.01 * peaks[2], peaks


RINGS = [(2, 2), (4, 1), (4, 2)]  # ranks in all, ring ranks


@pytest.mark.parametrize(
    ("world_size", "ring", "case"),
    # The model across a ring; on the largest mesh, where it takes a quarter of a minute, with --complete.
    [*((*ring, LONG) for ring in RINGS), (2, 2, MODEL), pytest.param(4, 2, MODEL, marks=pytest.mark.complete)],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_and_memory_on_other_meshes(ranks: RankPools, world_size: int, ring: int, case: LayerCase) -> None:
    variants = make_variants(tuple(STRATEGIES), ("symmetric",), ring=ring, gathered=("regather", "save"))
    variants = [variant for variant in variants if variant.ring == ring and variant.mode != "unfused"]
    for row in ranks(world_size).run(run_layer_rows, _settings(case, variants))[0]:
        _check_row(row)
        assert row["refused"] == {}
        assert len(row["memory"]) == len(variants)
