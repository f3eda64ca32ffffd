"""Every refusal names what was expected and what was given."""

from __future__ import annotations

import input_cases as cases
import pytest
import torch

import odysseus_kernels as ody
from odysseus_kernels.testing.spawn import RankPools

EXPECTED = {
    "inner": ("all_gather_linear", "in_features 7", "[2, 4, 8]", "[6, 7]"),
    "inner rs": ("linear_reduce_scatter", "in_features 7", "[2, 4, 8]"),
    "inner z3": ("zero3_linear", "weight_shard", "in_features 7"),
    "dtype": ("float32", "float64"),
    "integers": ("float32, bfloat16, float16 or float64", "int32"),
    "device": ("cpu", "meta"),
    "bias": ("[6]", "[5]"),
    "biases": ("1 and 2",),
    "weight": ("[out_features, in_features]", "[8]"),
    "dim": ("the last one",),
    "dim range": ("from -3 to 1", "got 5"),
    "vector": ("at least 2 dimensions", "[8]"),
    "length": ("divide by 2 ranks", "[2, 5, 8]", "shard_sequence"),
    "mesh": ("one-dimensional", "dp"),
    "group": ("ProcessGroup", "'seq'"),
    "switch backward": ("linear_reduce_scatter (backward)", "GPUs behind one NVLink switch", 'use gather="ranks"'),
    "outsider": ("member",),
    **{
        f"switch {name} {transport}": (
            operator,
            "GPUs behind one NVLink switch",
            "got ranks without",
            f'use {setting}="ranks"',
        )
        for transport in ("symmetric", "collective")
        for name, operator, setting in (
            ("rs", "linear_reduce_scatter (forward)", "reduce"),
            ("ar", "linear_all_reduce (forward)", "reduce"),
            ("ag", "all_gather_linear (forward)", "gather"),
            ("rs unfused", "linear_reduce_scatter (forward)", "reduce"),
        )
    },
}


def test_refusals(ranks: RankPools) -> None:
    for messages in ranks(2).run(cases.messages):
        assert set(messages) == set(EXPECTED)
        for name, parts in EXPECTED.items():
            for part in parts:
                assert part in messages[name], f"{name}: {part!r} is not in {messages[name]!r}"


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ody.all_gather_linear(torch.randn(4, 8), torch.randn(6, 8), group=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"mode": "fast"}, "'fused'"),
        ({"transport": "rdma"}, "'symmetric'"),
        ({"gathered": "keep"}, "'regather'"),
        ({"chunks_per_rank": 0}, "1 to 64"),
        ({"chunks_per_rank": True}, "1 to 64"),
        ({"reduce_dtype": torch.bfloat16}, "torch.float32"),
        ({"timeout_s": 0}, "above 0"),
        ({"reduce": "switch"}, "'nvls'"),
        ({"gather": "pull"}, "'nvls'"),
    ),
)
def test_configuration(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ody.OverlapConfig(**arguments)  # type: ignore[arg-type]


def test_configuration_survives_its_key() -> None:
    config = ody.OverlapConfig("fused", "collective", 3, "save", torch.float64, 1.5)
    assert ody.OverlapConfig.from_key(config.key()) == config
    assert ody.OverlapConfig.from_key(ody.OverlapConfig().key()) == ody.OverlapConfig()


def test_a_configuration_survives_as_a_key() -> None:
    for settings in ({"reduce": "nvls"}, {"gather": "nvls"}, {"reduce": "nvls", "gather": "nvls", "tile_rows": 8}):
        config = ody.OverlapConfig(**settings)  # type: ignore[arg-type]
        assert ody.OverlapConfig.from_key(config.key()) == config != ody.OverlapConfig()
