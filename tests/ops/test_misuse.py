"""What no operator may get wrong: strides, second and forward-mode derivatives, autocast, odd arguments, odd ranks."""

from __future__ import annotations

import misuse_cases as cases
import pytest
import torch
from every_operator import OPERATORS

from odysseus_kernels.comm.bundles import as_bytes
from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")
EVERY = pytest.mark.parametrize("operator", OPERATORS)


@EVERY
def test_any_strides(ranks: RankPools, operator: str) -> None:
    ranks(2).run(cases.strides, operator, "symmetric", "fused")
    ranks(2).run(cases.strides, operator, "collective", "unfused", ("stepped", "constant"))


def test_one_element_of_any_stride(ranks: RankPools) -> None:
    ranks(2).run(cases.one_element)


def test_bytes_of_what_is_not_contiguous_are_an_error() -> None:
    """Those of a row-major reading of its memory would be other elements, or other memory."""
    with pytest.raises(RuntimeError, match="stride"):
        as_bytes(torch.ones(3, 2).t())


@EVERY
def test_second_derivatives_are_right_or_refused(ranks: RankPools, operator: str) -> None:
    ranks(2).run(cases.second_derivatives, operator)


@EVERY
def test_forward_mode_derivatives_are_refused(ranks: RankPools, operator: str) -> None:
    ranks(2).run(cases.tangents, operator)


@EVERY
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_autocast_as_stock(ranks: RankPools, operator: str, dtype: str) -> None:
    ranks(2).run(cases.autocast, operator, dtype, "symmetric" if dtype == "bfloat16" else "collective")


def test_autocast_of_mixed_types(ranks: RankPools) -> None:
    ranks(2).run(cases.autocast_of_mixed_types)


@EVERY
def test_refusals_name_the_argument(ranks: RankPools, operator: str) -> None:
    ranks(2).run(cases.refusals, operator)


def test_more_refusals(ranks: RankPools) -> None:
    ranks(2).run(cases.more_refusals)


# These say that they need at least one row.
NEEDS_ROWS = (
    "pipelined_attention",
    "pipelined_ulysses",
    "ring_attention",
    "vocab_parallel_linear_cross_entropy",
    "replicated vocab_parallel_linear_cross_entropy",
)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in NEEDS_ROWS])
def test_no_rows(ranks: RankPools, operator: str) -> None:
    for transport, mode in (("symmetric", "fused"), ("collective", "fused"), ("collective", "unfused")):
        ranks(2).run(cases.no_rows, operator, transport, mode)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("operator", "what"),
    (
        ("linear_reduce_scatter", "bias"),
        ("linear_reduce_scatter", "weight"),
        ("linear_all_reduce", "bias"),
        ("linear_all_reduce", "weight"),
        ("zero3_linear", "weight"),
        ("all_gather_linear", "x"),
        ("linear_all_to_all", "x"),
        ("vocab_parallel_linear_cross_entropy", "weight"),
        ("vocab_parallel_linear_cross_entropy", "ignore_index"),
        ("replicated vocab_parallel_linear_cross_entropy", "weight"),
        ("replicated vocab_parallel_linear_cross_entropy", "ignore_index"),
        ("zero3_linear_cross_entropy", "weight"),
        ("zero3_experts", "activation"),
    ),
)
def test_ranks_that_differ_are_told(ranks: RankPools, operator: str, what: str, transport: str) -> None:
    for message in ranks(3).run(cases.differs, transport, operator, what):
        assert "rank 2 differs" in message


@pytest.mark.parametrize("tokens", ("sharded", "replicated"))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_vocabulary_of_unequal_parts(ranks: RankPools, tokens: str, transport: str) -> None:
    ranks(2).run(cases.uneven_vocabulary, tokens, transport, (5, 4))
    ranks(4).run(cases.uneven_vocabulary, tokens, transport, (1, 7, 3, 2))
