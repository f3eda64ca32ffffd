"""The scaled rate: the ratio of communication to compute that it preserves, links by name, and what errors say."""

from __future__ import annotations

import pytest

from odysseus_kernels.planner.cost_model import PRODUCT_SHARE
from odysseus_kernels.planner.scale import LINKS, parse_link, scaled_rate


@pytest.mark.parametrize("text", ("h100-nvlink@8", "h100-ib@16", "b200-nvlink@8", "a100-nvlink@2"))
@pytest.mark.parametrize("element_size", (4, 8))
def test_ratio_of_wire_to_compute_is_the_machines(text: str, element_size: int) -> None:
    thread, operations, elements = 60e9, 3e12, 5e7
    link, ranks = parse_link(text)
    compute = operations / ranks / link.flops
    wire = (ranks - 1) / ranks * elements * 2 / link.bytes_per_s
    rate = scaled_rate(text, flops=thread, element_size=element_size).bytes_per_s
    assert (elements * element_size / 2 / rate) / (operations / 2 / thread) == pytest.approx(wire / compute, rel=1e-12)


def test_known_links_come_from_the_tables() -> None:
    assert LINKS["h100-nvlink"].bytes_per_s == 450e9
    assert LINKS["b200-nvlink"].bytes_per_s == 900e9
    assert LINKS["h100-ib"].bytes_per_s == LINKS["b200-ib"].bytes_per_s == 50e9
    assert LINKS["a100-ib"].bytes_per_s == 25e9
    assert LINKS["l40s-pcie"].bytes_per_s == 32e9
    assert LINKS["h100-ib"].flops == 989e12 * PRODUCT_SHARE
    assert all(name == link.name and link.source for name, link in LINKS.items())


def test_formula_is_printed_with_its_numbers() -> None:
    rate = scaled_rate("h100-nvlink@8", flops=70e9)
    # 450e9 * (70e9 / 791.2e12) * 2 * (0.5 / 0.875) * 0.25
    assert rate.bytes_per_s == pytest.approx(11.375e6, rel=1e-3)
    for number in (
        "450 GB/s",
        "70.0 GFLOP/s",
        "791 TFLOP/s",
        "(4/2)",
        "(0.500/0.875)",
        "(2/8)",
        "11.4 MB/s",
        "91 Mb/s",
    ):
        assert number in rate.formula
    assert rate.label == "h100-nvlink@8"


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("h800-nvlink@8", "expected one of a100-nvlink, h100-nvlink"),
        ("h100", "got 'h100'"),
        ("h100-nvlink", "expected h100-nvlink@N with 2 to 65536 ranks N"),
        ("h100-nvlink@1", "got 'h100-nvlink@1'"),
        ("h100-nvlink@x", "such as h100-nvlink@8"),
    ),
)
def test_errors_name_what_is_known(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="link: expected") as caught:
        scaled_rate(text, flops=1e9)
    assert message in str(caught.value)


def test_rate_of_a_thread_must_be_measured() -> None:
    with pytest.raises(ValueError, match=r"flops: expected a measured rate above 0, got 0\.0"):
        scaled_rate("h100-nvlink@8", flops=0.0)
