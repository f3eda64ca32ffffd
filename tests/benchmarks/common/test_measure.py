"""Statistics and the order of measuring."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from benchmarks.common.measure import hidden_share, interquartile_spread, paired_ratio, take_turns


def test_variants_take_turns_in_both_orders_and_collection_waits() -> None:
    order: list[str] = []
    time = iter(range(1000))

    def record(name: str) -> Callable[[], str]:
        def call() -> str:
            assert not gc.isenabled()
            order.append(name)
            return name.upper()

        return call

    seen: list[tuple[str, str]] = []
    samples = take_turns(
        {name: record(name) for name in "abc"},
        rounds=3,
        barrier=lambda: order.append("|"),
        synchronize=lambda: None,
        last=lambda name, result: seen.append((name, result)),
        clock=lambda: float(next(time)),
    )
    assert "".join(order).replace("|", "") == "abccbaabc"
    assert "".join(order).startswith("|a|b|c|c")
    assert samples == {name: [1.0, 1.0, 1.0] for name in "abc"}
    assert seen == [("a", "A"), ("b", "B"), ("c", "C")]
    assert gc.isenabled()


def test_collection_is_on_again_after_an_error() -> None:
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        take_turns({"a": fail}, rounds=1, barrier=lambda: None, synchronize=lambda: None)
    assert gc.isenabled()


def test_paired_ratio_is_immune_to_drift_between_rounds() -> None:
    base = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert paired_ratio([1.1 * b for b in base], base) == pytest.approx(1.1)
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], base)


def test_interquartile_spread() -> None:
    assert interquartile_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert interquartile_spread([2.0] * 9) == 0.0
    assert interquartile_spread([2.0]) == 0.0


def test_hidden_share() -> None:
    # All of the shorter one vanished; nothing did; fusing cost something.
    assert hidden_share(unfused=14.0, fused=10.0, gemm=10.0, communication=4.0) == 1.0
    assert hidden_share(unfused=14.0, fused=14.0, gemm=4.0, communication=10.0) == 0.0
    assert hidden_share(unfused=14.0, fused=15.0, gemm=10.0, communication=4.0) == -0.25
