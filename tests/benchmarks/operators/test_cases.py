"""The case table: what the contract fixes is there, and every shape divides."""

from __future__ import annotations

import pytest

from benchmarks.common.cases import Size, nearest_multiple
from benchmarks.operators.cases import TARGETS, make_cases


def _find(world_size: int, size: Size, operator: str, backward: bool) -> list[tuple[int, int, tuple[int, ...]]]:
    return [
        (case.tokens, case.inner, case.outer)
        for case in make_cases(world_size, size)
        if (case.operator, case.backward, case.label) == (operator, backward, "contract")
    ]


def test_contract_shapes_are_in_the_default_run() -> None:
    assert _find(2, "default", "all_gather_linear", False) == [(8192, 1024, (768,))]
    assert _find(2, "default", "linear_reduce_scatter", False) == [(8192, 1024, (2048,))]
    assert _find(2, "default", "zero3_linear", False) == [(8192, 1024, (2816,))]


@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_every_target_has_its_row(size: Size) -> None:
    for target in TARGETS:
        assert len(_find(2, size, target.operator, target.backward)) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_every_shape_divides_by_the_ranks(world_size: int, size: Size) -> None:
    for case in make_cases(world_size, size):
        assert case.tokens % world_size == 0
        assert min(case.inner, *case.outer) > 0
        if case.operator == "zero3_linear":
            assert case.outer[0] % world_size == 0


def test_full_has_the_true_widths_and_names_are_unique() -> None:
    cases = make_cases(2, "full")
    assert len({case.name for case in cases}) == len(cases)
    shapes = {(case.label, case.inner, case.outer) for case in cases}
    assert ("Llama-3-8B qkv", 4096, (2048, 512, 512)) in shapes
    assert ("Llama-2-7B down", 11008, (4096,)) in shapes


def test_pattern_selects_and_its_mistakes_are_explained() -> None:
    selected = make_cases(2, "default", "zero3_linear contract .* forward$")
    assert [case.part for case in selected] == ["forward"]
    with pytest.raises(ValueError, match=r"'nothing' is found in no row; the rows are\n  all_gather_linear contract"):
        make_cases(2, "default", "nothing")
    with pytest.raises(ValueError, match="not a regular expression"):
        make_cases(2, "default", "(")


def test_operations() -> None:
    (case,) = make_cases(2, "default", "zero3_linear contract .* forward$")
    assert case.flops(2) == 2 * 4096 * 1024 * 2816
    (case,) = make_cases(2, "default", r"all_gather_linear contract .* forward\+backward$")
    assert case.flops(2) == 3 * 2 * 4096 * 1024 * 768


def test_nearest_multiple() -> None:
    assert [nearest_multiple(v, 3) for v in (1, 3, 4, 5, 512)] == [3, 3, 3, 6, 513]
