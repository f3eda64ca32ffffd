"""Ring attention against fp64 on the whole sequence: output and every gradient."""

from __future__ import annotations

import pytest
import ring_cases as cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odysseus_kernels.attention.dropout import Dropout
from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")
MODES = ("fused", "unfused")
PROBLEMS = [
    {},
    {"causal": False, "kv_heads": 4},
    {"documents": "packed", "kv_heads": 1},
    {"window": 19, "batch": 1},
    {"key_mask": True},
]
# Less usual ones, for which one transport and type say enough.
ODD_PROBLEMS = [
    {"rows": 10, "width": 7},
    {"rows": 7, "layout": "contiguous"},
    {"rows": 1, "layout": "contiguous", "causal": False},
    {"rows": 2, "window": 2},  # with 1 all but the value gradient would be zero
    {"rows": 14, "documents": "scattered"},
    {"rows": 13, "documents": "packed", "causal": False, "layout": "contiguous"},
    {"rows": 22, "documents": "packed", "window": 5},
    {"rows": 14, "key_mask": True, "documents": "scattered"},
    {"rows": 22, "key_mask": True, "window": 5},
    {"rows": 8, "value_width": 5, "width": 12},
    # More than one tile of 512 tokens: empty, full and masked ones.
    {"rows": 1100, "batch": 1, "heads": 2, "kv_heads": 1, "width": 8, "window": 700, "documents": "packed"},
]


@pytest.mark.parametrize("world", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
def test_against_fp64(ranks: RankPools, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, dtype, TRANSPORTS, MODES, PROBLEMS)


def test_fp16(ranks: RankPools) -> None:
    ranks(2).run(cases.check, "float16", TRANSPORTS, ("fused",), PROBLEMS)


@pytest.mark.parametrize("world", (1, 2, 3))
def test_odd_shapes(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.check, "float64", ("symmetric",), MODES[: world - 1 or 1], ODD_PROBLEMS)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.sampled_from((2, 3, 4)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    half=st.integers(3, 12),
    width=st.integers(4, 17),
    layout=st.sampled_from(("zigzag", "contiguous")),
    documents=st.sampled_from((None, "packed", "scattered")),
    window=st.one_of(st.none(), st.integers(2, 60)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    ranks: RankPools,
    world: int,
    batch: int,
    kv_heads: int,
    shared: int,
    half: int,
    width: int,
    layout: str,
    documents: str | None,
    window: int | None,
    seed: int,
) -> None:
    problem = {
        "batch": batch,
        "heads": kv_heads * shared,
        "kv_heads": kv_heads,
        "rows": 2 * half,
        "width": width,
        "layout": layout,
        "documents": documents,
        "window": window,
        "seed": seed,
    }
    ranks(world).run(cases.check, "float64", ("symmetric",), ("fused",), [problem])


@pytest.mark.parametrize("layout", ("zigzag", "contiguous"))
def test_dropout_does_not_depend_on_how_the_sequence_is_cut(ranks: RankPools, layout: str) -> None:
    length = 24
    found = {world: ranks(world).run(cases.dropped, length, 0, 4, layout) for world in (1, 2, 4)}
    upper = ranks(2).run(cases.dropped, length, 2, 2, layout)
    alone = found[1][0]
    for results in (*found[2], *found[4]):
        for name, one, other in zip(cases.NAMES, results, alone, strict=True):
            # The same probabilities are dropped; sums over keys of several ranks are rounded in another order.
            torch.testing.assert_close(
                one, other, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
    for name, one, other in zip(cases.NAMES, upper[0], alone, strict=True):
        heads = slice(2, 4) if name in cases.NAMES[:2] else slice(1, 2)
        torch.testing.assert_close(one, other[:, heads], rtol=1e-12, atol=1e-12)

    whole = cases.Problem(rows=length, documents="packed")
    *inputs, grad = whole.inputs(1, torch.float64)
    for x in inputs:
        x.requires_grad_()
    where = torch.arange(length)
    factors = Dropout(0.3, 7, 0, where, where).factors(2, slice(0, 4), slice(0, length), torch.float64)
    expected = cases.gradients(cases.attention(*inputs, cases.whole_mask(whole, 1), factors=factors), inputs, grad)
    for one, other in zip(alone, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", (1, 2, 3, 4))
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
def test_bytes_equal_the_formula(ranks: RankPools, mode: str, transport: str, world: int) -> None:
    for dtype in ("float32", "bfloat16"):
        elements = 2 * 6 * 8  # of k, and of v: 1/N of what the formula's f is taken of
        shard = elements * getattr(torch, dtype).itemsize
        expected = {
            "forward send_recv": (world - 1) * 2 * shard,
            "backward send_recv": (world - 1) * 2 * (shard + elements * 4),  # gradients in fp32
        }
        for counted in ranks(world).run(cases.traffic, transport, mode, dtype):
            assert counted == (expected if world > 1 else {})


@pytest.mark.parametrize("world", (1, 2, 3))
@pytest.mark.parametrize("layout", ("zigzag", "contiguous"))
def test_packed_documents_do_not_see_each_other(ranks: RankPools, world: int, layout: str) -> None:
    ranks(world).run(cases.documents_apart, layout)


def test_refusals(ranks: RankPools) -> None:
    expected = {
        "heads": ("divide", "3 and 2"),
        "odd": ("even", "zigzag", "got 5", "multiple of 4"),
        "documents": ("[2, 12]", "[2, 6]"),
        "real documents": ("integers", "float32"),
        "key_mask": ("[2, 12]", "[2, 6]"),
        "real key_mask": ("booleans or integers", "float32"),
        "batch": ("[2, heads, 6, 8]", "[1, 2, 6, 8]"),
        "values": ("[2, 2, 5, 8]",),
        "dtype": ("float32", "float64"),
        "integers": ("float32, bfloat16, float16 or float64", "int32"),
        "dimensions": ("[batch, heads, tokens, width]", "[4, 6, 8]"),
        "empty": ("empty", "[0, 4, 6, 8]"),
        "layout": ("'zigzag', 'contiguous'", "'striped'"),
        "window": ("at least 1", "got 0"),
        "two-sided window": ("causal=True", "window=3"),
        "dropout": ("from 0 to below 1", "1.0"),
        "seed": ("dropout_seed", "None"),
        "head": ("first_head", "-1"),
        "scale": ("above 0", "0.0"),
        "kernel": ('"sdpa"', '"flash_attention_2"', "'eager'"),
        "tiles": ('"unfused"', '"tiles"'),
    }
    for messages in ranks(2).run(cases.refusals):
        assert set(messages) == set(expected)
        for name, parts in expected.items():
            for part in parts:
                assert part in messages[name], f"{name}: {part!r} is not in {messages[name]!r}"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", ("seed", "probability", "documents", "key_mask", "window"))
def test_ranks_that_differ_are_told(ranks: RankPools, what: str, transport: str) -> None:
    for message in ranks(3).run(cases.disagreement, transport, what):
        assert "rank 2 differs" in message
